"""What the API answers with: rows as documents, times as RFC 3339."""

import json
from typing import Any, Literal

from pydantic import BaseModel, Field

from tower import trace
from tower.errors import FAILURES
from tower.spec import Status
from tower.terms import SUCCEEDED
from tower.trace import rfc3339

WaitReason = Literal[
    "not_before",
    "retry_backoff",
    "paused",
    "quarantine",
    "concurrency_key",
    "rate_limit",
    "type_limit",
    "queue_limit",
    "tower_limit",
    "no_worker",
    "no_free_slot",
]

_ID = "0192f0c1-2345-7abc-8def-0123456789ab"
_AT = "2031-05-01T08:00:00.000Z"


class Health(BaseModel):
    """The process lives."""

    status: Literal["ok"] = Field(examples=["ok"])


class Readiness(BaseModel):
    """What accepts and runs tasks right now."""

    status: Literal["ready", "degraded", "unavailable"] = Field(examples=["ready"])
    database: Literal["ok", "down"] = Field(examples=["ok"])
    broker: Literal["embedded", "ok", "down"] = Field(examples=["embedded"])
    workers: int = Field(examples=[1])
    slots: int = Field(examples=[8])
    oldest_waiting_s: float | None = Field(
        description="For how many seconds the task that waits longest among the first in line has been ready to start.", examples=[None]
    )
    problems: list[str] = Field(description="What is wrong and what it means for tasks.", examples=[[]])


class Enqueued(BaseModel):
    """The task's id; GET /tasks/{task_id} follows it."""

    task_id: str = Field(examples=[_ID])


class BatchEnqueued(BaseModel):
    """The tasks' ids, in the order asked for."""

    task_ids: list[str] = Field(examples=[[_ID]])


class Cancelled(BaseModel):
    """What a cancel led to: `cancelled`, or `running` while the task is being stopped."""

    task_id: str = Field(examples=[_ID])
    status: Literal["cancelled", "running"] = Field(examples=["cancelled"])


class Changed(BaseModel):
    """What came of a change of many tasks."""

    matched: int = Field(description="How many tasks fitted and could be changed.", examples=[3])
    changed: int = Field(description="How many were cancelled or asked to stop, or how many new tasks were made.", examples=[3])
    task_ids: list[str] = Field(
        description="The first 1,000 ids: of the tasks that were cancelled, or of the new ones; with `dry_run`, of those that fitted.",
        examples=[[_ID]],
    )
    dry_run: bool = Field(examples=[False])


class TaskFailure(BaseModel):
    """Why a task did not succeed, or why its last attempt did not, in short."""

    code: str = Field(examples=["exit_nonzero"])
    message: str = Field(examples=["pytest exited with code 1."])
    advice: str | None = Field(None, examples=[FAILURES["exit_nonzero"]])


class TaskError(TaskFailure):
    """Why a task did not succeed, or why its last attempt did not, with all that the handler told."""

    details: dict[str, Any] = Field(default_factory=dict, examples=[{"exit_code": 1, "tail": "1 failed"}])


class TaskSummary(BaseModel):
    """A task, without its payload, result and the details of its error."""

    id: str = Field(examples=[_ID])
    type: str = Field(examples=["echo"])
    queue: str = Field(examples=["default"])
    title: str | None = Field(examples=["Say hello"])
    status: Status = Field(examples=["running"])
    wait_reason: WaitReason | None = Field(description="Why a queued task has not started.", examples=[None])
    labels: dict[str, str] = Field(examples=[{"team": "platform"}])
    requested_by: str | None = Field(examples=["alice"])
    priority: int = Field(examples=[0])
    not_before: str | None = Field(examples=[None])
    expires_at: str | None = Field(description="It may not start after this.", examples=[None])
    concurrency_key: str | None = Field(examples=[None])
    concurrency_limit: int = Field(examples=[1])
    rate_key: str | None = Field(examples=[None])
    rate_limit: int | None = Field(examples=[None])
    rate_per_s: float | None = Field(examples=[None])
    correlation_id: str = Field(description="The tree of tasks it belongs to.", examples=[_ID])
    parent_id: str | None = Field(examples=[None])
    retry_of: str | None = Field(description="The final task that it repeats.", examples=[None])
    attempt: int = Field(examples=[1])
    max_attempts: int = Field(examples=[1])
    losses: int = Field(description="How many workers were lost while they ran it.", examples=[0])
    max_losses: int = Field(description="With so many it fails; with 1 it runs at most once.", examples=[3])
    timeout_s: float = Field(examples=[60])
    silence_s: float | None = Field(description="Seconds without output after which an attempt is timed out.", examples=[None])
    worker_id: str | None = Field(examples=[_ID])
    cancel_requested_at: str | None = Field(examples=[None])
    error: TaskFailure | None = Field(description="Why it did not succeed; in a list a long message is cut.", examples=[None])
    created_at: str = Field(examples=[_AT])
    queued_at: str = Field(examples=[_AT])
    dispatched_at: str | None = Field(examples=[_AT])
    started_at: str | None = Field(examples=[_AT])
    finished_at: str | None = Field(examples=[None])
    updated_at: str = Field(examples=[_AT])
    trace_complete: bool = Field(description="Whether the trace folder tells all there will ever be.", examples=[False])
    trace_error: str | None = Field(description="Why the trace folder could not be written last.", examples=[None])


class TaskDetail(TaskSummary):
    """A task, whole."""

    payload: dict[str, Any] = Field(examples=[{"hello": "tower"}])
    result: Any = Field(examples=[None])
    error: TaskError | None = Field(examples=[None])


class TaskPage(BaseModel):
    """Tasks, newest first."""

    tasks: list[TaskSummary]
    next_cursor: str | None = Field(description="Give it as `cursor` for the next page; null on the last.", examples=[None])


class Event(BaseModel):
    """What happened to a task."""

    seq: int = Field(examples=[1])
    at: str = Field(examples=[_AT])
    attempt: int = Field(examples=[0])
    kind: str = Field(examples=["queued"])
    data: dict[str, Any] = Field(examples=[{}])


class Events(BaseModel):
    """A task's events in order."""

    events: list[Event]


class File(BaseModel):
    """A file of the trace folder."""

    path: str = Field(examples=["artifacts/report.html"])
    size: int = Field(examples=[2048])
    modified_at: str = Field(examples=[_AT])


class Files(BaseModel):
    """The files of a trace folder."""

    files: list[File]


class HandlerInfo(BaseModel):
    """A task type."""

    type: str = Field(examples=["echo"])
    summary: str = Field(examples=["Return the payload; for trying the way a task travels."])
    queue: str = Field(examples=["default"])
    timeout_s: float = Field(examples=[60])
    max_attempts: int = Field(examples=[1])
    payload_schema: dict[str, Any] = Field(description="JSON schema of the payload.", examples=[{"type": "object"}])


class Handlers(BaseModel):
    """The task types this tower takes."""

    handlers: list[HandlerInfo]


class WorkerInfo(BaseModel):
    """A live worker."""

    id: str = Field(examples=[_ID])
    host: str = Field(examples=["build-1"])
    pid: int = Field(examples=[4242])
    slots: int = Field(examples=[8])
    running: int = Field(examples=[1])
    queues: list[str] = Field(examples=[["default"]])
    version: str = Field(examples=["0.1.0"])
    started_at: str = Field(examples=[_AT])
    beat_at: str = Field(examples=[_AT])


class Workers(BaseModel):
    """The live workers, oldest first."""

    workers: list[WorkerInfo]


class QueueInfo(BaseModel):
    """A queue and what is in it."""

    name: str = Field(examples=["default"])
    types: list[str] = Field(examples=[["command", "echo"]])
    queued: int = Field(examples=[0])
    dispatched: int = Field(examples=[0])
    running: int = Field(examples=[1])
    paused: bool = Field(description="Whether nothing of it starts, because it or the whole tower is paused.", examples=[False])
    workers: int = Field(examples=[1])
    slots: int = Field(examples=[8])


class Queues(BaseModel):
    """The queues of all task types."""

    queues: list[QueueInfo]


#: Characters of an error's message in a list, so that a page stays small whatever handlers say.
_MOST_MESSAGE = 2000

_TIMES = (
    "not_before",
    "expires_at",
    "cancel_requested_at",
    "created_at",
    "queued_at",
    "dispatched_at",
    "started_at",
    "finished_at",
    "updated_at",
)


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as a TaskSummary."""
    told = {name: row[name] for name in TaskSummary.model_fields if name in row}
    told |= {name: rfc3339(row[name]) for name in _TIMES}
    told |= {"labels": json.loads(row["labels"]), "error": _short(_error(row)), "trace_complete": trace.is_complete(row)}
    return told


def detail(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as a TaskDetail."""
    result = json.loads(row["result"]) if row["result"] else None
    return {**summary(row), "payload": json.loads(row["payload"]), "result": result, "error": _error(row)}


def event(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as an Event."""
    told = {name: row[name] for name in ("seq", "attempt", "kind")}
    return {**told, "at": rfc3339(row["at"]), "data": json.loads(row["data"])}


def _error(row: dict[str, Any]) -> dict[str, Any] | None:
    if not row["error"] or row["status"] == SUCCEEDED:
        return None
    told = json.loads(row["error"])
    code, message = told.pop("code"), told.pop("message")
    return {"code": code, "message": message, "advice": FAILURES.get(code), "details": told}


def _short(error: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return an error as it stands in a list."""
    if error is None:
        return None
    message = str(error["message"])
    cut = message if len(message) <= _MOST_MESSAGE else message[: _MOST_MESSAGE - 1] + "…"
    return {"code": error["code"], "message": cut, "advice": error["advice"]}

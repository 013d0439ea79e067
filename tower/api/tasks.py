"""/tasks: enqueue, list, show, cancel, retry."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from tower import db, queries
from tower.api.access import actor_of, caller_of, check_task
from tower.api.answers import BatchEnqueued, Cancelled, Enqueued, Events, TaskDetail, TaskPage, detail, event, summary
from tower.api.errors import problems
from tower.api.strict import StrictRoute, is_large
from tower.errors import InvalidTask, NotFound, Refused
from tower.keys import Caller
from tower.orchestrator import Accepted, EnhancedOrchestrator
from tower.spec import MAX_BATCH, Key, Line, Status, TaskSpec, Text, Time
from tower.tree import unknown_parent

router = APIRouter(prefix="/tasks", tags=["tasks"], route_class=StrictRoute)

_UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
_ID = "0192f0c1-2345-7abc-8def-0123456789ab"

TaskId = Annotated[str, Path(pattern=_UUID, description="The task's id.", examples=[_ID])]


By = Annotated[Line | None, Query(description="Who asks, for the record.", examples=["alice"])]

_EXAMPLES = {
    "echo": {"summary": "The smallest task", "value": {"type": "echo", "payload": {"hello": "tower"}}},
    "command": {
        "summary": "Run a program",
        "value": {
            "type": "command",
            "payload": {"argv": ["git", "log", "--oneline", "-3"], "cwd": "/srv/app"},
            "timeout_s": 600,
            "labels": {"repo": "acme/api"},
        },
    },
}


class Batch(BaseModel):
    """Tasks to accept together: all or none."""

    model_config = ConfigDict(extra="forbid")

    tasks: list[TaskSpec] = Field(min_length=1, max_length=MAX_BATCH)


def within(request: Request, **chosen: Any) -> queries.Filter:
    """Return a filter that lets whoever asks find what he may see."""
    caller = caller_of(request)
    return queries.Filter(**chosen, within_types=caller.types, within_labels=caller.labels)


def check_covered(caller: Caller, specs: Sequence[TaskSpec]) -> None:
    """Raise Refused if the key is limited to other tasks."""
    for spec in specs:
        if not caller.covers(spec.type, spec.labels):
            types = f"of type {' or '.join(caller.types)}" if caller.types else "of any type"
            labels = "".join(f", with the label {name}={value}" for name, value in caller.labels)
            said = f"The key of {caller.name!r} is limited to tasks {types}{labels}; change the task, or use another key."
            raise Refused(said, code="key_limited")
    parents = {spec.parent_id for spec in specs if spec.parent_id}
    if caller.is_limited and parents:
        db.read(lambda: _check_parents(caller, parents))


def _check_parents(caller: Caller, parents: Iterable[str]) -> None:
    """Raise what an unknown parent raises if whoever asks may not see one of these."""
    for parent_id in parents:
        try:
            check_task(caller, parent_id)
        except NotFound:
            raise unknown_parent(parent_id) from None


def orchestrator_of(request: Request) -> EnhancedOrchestrator:
    """Return the orchestrator of the app that was asked."""
    found: EnhancedOrchestrator = request.app.state.orchestrator
    return found


@router.post(
    "/enqueue",
    status_code=202,
    response_model=Enqueued,
    responses={
        200: {"model": Enqueued, "description": "An earlier request with this idempotency key and body made the task."},
        202: {"description": "Accepted: the task survives any crash and reaches a final state."},
        **problems(400, 403, 409, 413, 415, 422, 503),
    },
    summary="Enqueue a task",
)
async def enqueue(
    request: Request,
    spec: Annotated[TaskSpec, Body(openapi_examples=_EXAMPLES)],
    idempotency_key: Annotated[Key | None, Header(description="The same as the field of that name.", examples=["release-42"])] = None,
) -> Response:
    """Take a task in. It has a row when this answers; Location says where to follow it."""
    if idempotency_key is not None:
        if spec.idempotency_key not in (None, idempotency_key):
            raise InvalidTask(
                f"The header says {idempotency_key!r} and the body {spec.idempotency_key!r}; give one key.",
                code="invalid_field",
                field="idempotency_key",
            )
        spec = spec.model_copy(update={"idempotency_key": idempotency_key})
    return enqueued(await _taken(request, spec))


def enqueued(accepted: Accepted) -> Response:
    """Return the answer to whoever enqueued a task."""
    place = {"location": f"/tasks/{accepted.id}"}
    return JSONResponse({"task_id": accepted.id}, status_code=202 if accepted.new else 200, headers=place)


async def _taken(request: Request, spec: TaskSpec) -> Accepted:
    """Take a task in; what could keep other requests waiting is done in a thread."""
    caller, orchestrator = caller_of(request), orchestrator_of(request)
    if spec.parent_id or is_large(await request.body()):
        await run_in_threadpool(check_covered, caller, [spec])
        return await run_in_threadpool(orchestrator.accept, spec, by=caller.actor)
    check_covered(caller, [spec])
    return await orchestrator.take(spec, by=caller.actor)


@router.post(
    "/enqueue/batch",
    status_code=202,
    response_model=BatchEnqueued,
    responses={
        202: {"description": "All are accepted."},
        **problems(400, 403, 409, 413, 415, 422, 503),
    },
    summary="Enqueue up to 1,000 tasks, all or none",
)
def enqueue_batch(request: Request, batch: Batch) -> dict[str, list[str]]:
    """Take many tasks in with one commit. Each may carry an idempotency key; those whose key is known are not made again."""
    if "idempotency-key" in request.headers:
        raise InvalidTask(
            "A batch has no key of its own; give each task of it an idempotency_key.", code="invalid_field", field="idempotency-key"
        )
    check_covered(caller_of(request), batch.tasks)
    made = orchestrator_of(request).enqueue_all(batch.tasks, by=caller_of(request).actor)
    return {"task_ids": [accepted.id for accepted in made]}


@router.get("", response_model=TaskPage, responses=problems(422, 503), summary="List tasks, newest first")
def list_tasks(
    request: Request,
    status: Annotated[list[Status] | None, Query(max_length=20, description="Only these statuses.", examples=[["running"]])] = None,
    type: Annotated[list[Text] | None, Query(max_length=100, description="Only these types.", examples=[["echo"]])] = None,  # noqa: A002
    label: Annotated[
        list[Text] | None, Query(max_length=32, description="Only with all these labels, as `name:value`.", examples=[["team:platform"]])
    ] = None,
    text: Annotated[Text | None, Query(description="Only with this in the title, type or id.", examples=["release"])] = None,
    error_code: Annotated[
        list[Text] | None,
        Query(max_length=100, description="Only with one of these codes as their last error.", examples=[["worker_lost"]]),
    ] = None,
    correlation_id: Annotated[str | None, Query(pattern=_UUID, description="Only of this tree.", examples=[_ID])] = None,
    created_after: Annotated[
        Time | None, Query(description="Only created at this time or later.", examples=["2031-05-01T08:00:00Z"])
    ] = None,
    created_before: Annotated[Time | None, Query(description="Only created before this time.", examples=["2031-05-02T08:00:00Z"])] = None,
    retried: Annotated[bool | None, Query(description="Only those that a later task repeats, or does not.", examples=[False])] = None,
    cursor: Annotated[str | None, Query(pattern=_UUID, description="`next_cursor` of the page before.", examples=[_ID])] = None,
    limit: Annotated[int, Query(ge=1, le=500, description="Tasks per page.")] = 50,
) -> dict[str, Any]:
    """List tasks that fit every filter given, one page at a time."""
    chosen = within(
        request,
        statuses=status or (),
        types=type or (),
        labels=labels(label or ()),
        text=text or None,
        error_codes=error_code or (),
        correlation_id=correlation_id,
        created_after=seconds(created_after),
        created_before=seconds(created_before),
        retried=retried,
    )
    rows = db.read(lambda: queries.tasks(chosen, before=cursor, limit=limit + 1))
    more = len(rows) > limit
    return {"tasks": [summary(row) for row in rows[:limit]], "next_cursor": rows[limit - 1]["id"] if more else None}


def labels(items: Sequence[str]) -> list[tuple[str, str]]:
    """Return what is to be looked for, of name:value texts; raise InvalidTask for one without a colon."""
    for item in items:
        if ":" not in item:
            raise InvalidTask(f"The label filter {item[:80]!r} has no colon; write name:value.", code="invalid_field", field="label")
    return [(name, value) for name, _, value in (item.partition(":") for item in items)]


def seconds(at: datetime | None) -> float | None:
    """Return a time of a filter in seconds since the epoch."""
    return at.timestamp() if at else None


@router.get("/{task_id}", response_model=TaskDetail, responses=problems(404, 422, 503), summary="Show a task")
def show(task_id: TaskId) -> dict[str, Any]:
    """Return everything known about a task, and why it waits if it does."""
    return detail(db.read(lambda: queries.task(task_id)))


@router.get("/{task_id}/events", response_model=Events, responses=problems(404, 422, 503), summary="What happened to a task")
def events(
    task_id: TaskId, after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Only events with a greater `seq`.")] = 0
) -> dict[str, Any]:
    """Return a task's events in order."""

    def work() -> list[dict[str, Any]]:
        queries.progress(task_id)
        return queries.events(task_id, after)

    return {"events": [event(row) for row in db.read(work)]}


@router.post("/{task_id}/cancel", response_model=Cancelled, responses=problems(403, 404, 409, 413, 415, 422, 503), summary="Cancel a task")
def cancel(request: Request, task_id: TaskId, by: By = None) -> dict[str, str]:
    """End a waiting task at once; ask a running one to stop, which takes its worker a heartbeat and its processes 5 s at most."""
    return {"task_id": task_id, "status": orchestrator_of(request).cancel(task_id, actor_of(request, by))}


@router.post(
    "/{task_id}/retry",
    status_code=202,
    response_model=Enqueued,
    responses=problems(403, 404, 409, 413, 415, 422, 503),
    summary="Run a final task again",
)
def retry(request: Request, response: Response, task_id: TaskId, by: By = None) -> dict[str, str]:
    """Enqueue a copy of a final task; the old one keeps its end, and `retry_of` of the new one names it."""
    accepted = orchestrator_of(request).retry(task_id, actor_of(request, by))
    response.headers["location"] = f"/tasks/{accepted.id}"
    return {"task_id": accepted.id}

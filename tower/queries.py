"""Questions to the rows that change nothing. Each runs inside `db.read`."""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from peewee import fn

from tower import db, load
from tower.decision import obstacle
from tower.errors import NotFound, Unavailable
from tower.models import CLOCKS_DIFFER_S, Task, TaskArtifact, TaskEvent, TaskLabel, TaskLog, behind, first_id, in_line, not_yet
from tower.terms import DISPATCHED, FINAL, IN_FLIGHT, QUEUED, RUNNING
from tower.trouble import explain

#: The columns of a list: everything but the texts that may be large.
SLIM = tuple(field for name, field in Task._meta.fields.items() if name not in ("payload", "result"))
_SLIM = ", ".join(field.column_name for field in SLIM)
#: What an id begins with.
_OF_ID = re.compile(r"[0-9a-f-]{1,36}")


@dataclass(frozen=True)
class Filter:
    """Which tasks to list; what is None or empty does not restrict."""

    statuses: Sequence[str] = ()
    types: Sequence[str] = ()
    labels: Sequence[tuple[str, str]] = ()
    text: str | None = None
    error_codes: Sequence[str] = ()
    correlation_id: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    #: Whether a later task repeats it.
    retried: bool | None = None
    worker_id: str | None = None
    #: The id of the task that is the oldest to be looked at.
    not_older_than: str | None = None
    #: What whoever asks is limited to: one of these types, and all of these labels.
    within_types: Sequence[str] = ()
    within_labels: Sequence[tuple[str, str]] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it narrows nothing down; `retried` alone does not, since most tasks are not, and what one is limited to anyway."""
        aside = ("retried", "within_types", "within_labels")
        return not any(value not in (None, (), []) for name, value in vars(self).items() if name not in aside)


def task(task_id: str) -> dict[str, Any]:
    """Return one task with its wait reason; raise NotFound."""
    row = Task.select().where(Task.id == task_id).dicts().first()
    if row is None:
        raise missing(task_id)
    _explain_waits([row])
    return dict(row)


def outline(task_id: str) -> dict[str, Any]:
    """Return one task without the texts that may be large, and with its wait reason; raise NotFound."""
    found = some([task_id])
    if not found:
        raise missing(task_id)
    return found[0]


def some(ids: Sequence[str]) -> list[dict[str, Any]]:
    """Return these tasks as `outline` does, in no order; those that are gone are missing."""
    named, values = db.among("id", ids)
    rows = db.rows(f"SELECT {_SLIM} FROM task WHERE {named}", values) if ids else []
    _explain_waits(rows)
    return rows


def tasks(chosen: Filter, *, before: str | None, limit: int) -> list[dict[str, Any]]:
    """Return tasks, newest first, that come after the one with id `before`."""
    query = Task.select(*SLIM).order_by(Task.id.desc()).limit(limit)
    if before:
        query = query.where(Task.id < before)
    for condition in conditions(chosen):
        query = query.where(condition)
    return slim(query)


def slim(query: Any) -> list[dict[str, Any]]:
    """Return the tasks that a query of SLIM columns finds, with their wait reasons."""
    rows = [dict(row) for row in query.dicts()]
    _explain_waits(rows)
    return rows


def older_by(before: str | None, count: int) -> str | None:
    """Return the id of the task that is `count` tasks older than the one with id `before`; None if there are not so many."""
    query = Task.select(Task.id).order_by(Task.id.desc()).offset(count).limit(1)
    found = (query.where(Task.id < before) if before else query).scalar()
    return None if found is None else str(found)


def ids(after: str, limit: int) -> list[str]:
    """Return the ids of the tasks behind this one, oldest first: a page on the way through all of them."""
    return [row[0] for row in Task.select(Task.id).where(Task.id > after).order_by(Task.id).limit(limit).tuples()]


def conditions(chosen: Filter) -> list[Any]:
    """Return what holds for the tasks that fit a filter."""
    found: list[Any] = []
    if chosen.statuses:
        found.append(Task.status << list(chosen.statuses))
    for types in filter(None, (chosen.types, chosen.within_types)):
        found.append(Task.type << list(types))
    for key, value in (*chosen.labels, *chosen.within_labels):
        found.append(Task.id << TaskLabel.select(TaskLabel.task_id).where(TaskLabel.key == key, TaskLabel.value == value))
    if chosen.text:
        found.append(_mentions(chosen.text))
    if chosen.error_codes:
        found.append(Task.error_code << list(chosen.error_codes))
    if chosen.correlation_id:
        found.append(Task.correlation_id == chosen.correlation_id)
    if chosen.created_after is not None:
        found += [Task.created_at >= chosen.created_after, Task.id >= first_id(chosen.created_after - CLOCKS_DIFFER_S)]
    if chosen.created_before is not None:
        found += [Task.created_at < chosen.created_before, Task.id < first_id(chosen.created_before + CLOCKS_DIFFER_S)]
    if chosen.worker_id:
        found.append(Task.worker_id == chosen.worker_id)
    if chosen.not_older_than:
        found.append(Task.id >= chosen.not_older_than)
    if chosen.retried is not None:
        found.append(is_repeated() if chosen.retried else ~is_repeated())
    return found


def _mentions(text: str) -> Any:
    """Return the condition that a text is in the title or the type of a task, or begins its id; types and ids are lower case."""
    low = text.lower()
    found = Task.title.contains(text) | (db.place_of(low, Task.type) > 0)
    return found | (fn.SUBSTR(Task.id, 1, len(low)) == low) if _OF_ID.fullmatch(low) else found


def is_repeated() -> Any:
    """Return the condition that a later task repeats this one."""
    later = Task.alias()
    return fn.EXISTS(later.select(later.id).where(later.retry_of == Task.id))


def by_idempotency_key(keys: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the id and body digest of the tasks that carry these keys."""
    rows = Task.select(Task.idempotency_key, Task.id, Task.idempotency_hash).where(Task.idempotency_key << list(keys)).tuples()
    return {key: (task_id, digest) for key, task_id, digest in rows}


def log_tail(task_id: str, attempt: int, characters: int) -> str:
    """Return the last lines of an attempt's log."""
    chunks = TaskLog.select(TaskLog.text).where(TaskLog.task_id == task_id, TaskLog.attempt == attempt).order_by(TaskLog.seq.desc())
    text = "".join(reversed([row[0] for row in chunks.limit(2).tuples()]))
    return text if len(text) <= characters else text[-characters:].partition("\n")[2]


def _explain_waits(rows: list[dict[str, Any]]) -> None:
    """Say of every queued task why it waits, by the decision that the orchestrator actor starts tasks by."""
    waiting = [row for row in rows if row["status"] == QUEUED]
    for row in rows:
        row["wait_reason"] = None
    if not waiting:
        return
    now = load.read()
    load.add_starts(now, waiting)
    for row in waiting:
        found = obstacle(row, now)
        row["wait_reason"] = found.reason if found else None


def dispatched_count(queues: Sequence[str]) -> int:
    """Return how many tasks of these queues wait for a worker to claim them."""
    theirs, values = db.among("queue", queues)
    return int(db.rows(f"SELECT COUNT(*) AS count FROM task WHERE status = '{DISPATCHED}' AND {theirs}", values)[0]["count"])


@dataclass(frozen=True)
class Ready:
    """Which queued tasks' time has come, and when the next one's will."""

    #: For how long the first of those that may start waits; None if there is none.
    waits_s: float | None
    #: Whether one of those that were asked about may.
    is_asked: bool
    #: In how many seconds the next may; none or less if its time has come and nobody has woken it, None if no time is known.
    next_s: float | None


def ready(asked: Sequence[str] = ()) -> Ready:
    """Return what is ready to start."""
    # Else Postgres may go through all that waits for them.
    waits = f"{db.aside('status')} = '{QUEUED}' AND ready_at = 0"
    those, values = db.among("id", asked)
    named = f"EXISTS (SELECT 1 FROM task WHERE {those} AND {waits})"
    first = f"(SELECT queued_at FROM task WHERE {in_line().sql} ORDER BY rank, id LIMIT 1)"
    if db.is_postgres():  # on SQLite a pass has entered them
        named, values = f"({named} OR EXISTS (SELECT 1 FROM task_arrived WHERE {those}))", [*values, *values]
        first = f"COALESCE({first}, (SELECT MIN(created_at) FROM task_arrived))"
    [found] = db.rows(f"SELECT {{now}} - {first} AS waits, {named} AS asked, {_next_time()} - {{now}} AS next", values, in_order=True)
    return Ready(found["waits"], bool(found["asked"]), found["next"])


def _next_time() -> str:
    return f"(SELECT MIN(ready_at) FROM task WHERE {not_yet().sql})"


def is_anything_to_do(queues: Sequence[str]) -> bool:
    """Whether a queued task's time has come, or one of these queues waits for a worker to claim it."""
    theirs, values = db.among("queue", queues)
    handed = f"SELECT 1 FROM task WHERE status = '{DISPATCHED}' AND {theirs}"
    first = f"SELECT id FROM task WHERE {in_line().sql} ORDER BY rank, id LIMIT 1"
    found = f"SELECT 1 AS found WHERE EXISTS ({handed}) OR ({first}) IS NOT NULL OR {_next_time()} <= {{now}}"
    return bool(db.rows(found, values, in_order=True))


def events(task_id: str, after: int = 0, limit: int = -1) -> list[dict[str, Any]]:
    """Return a task's events in order."""
    query = TaskEvent.select().where(TaskEvent.task_id == task_id, TaskEvent.seq > after).order_by(TaskEvent.seq)
    return [dict(row) for row in (query.limit(limit) if limit >= 0 else query).dicts()]


def log_entries(task_id: str, after: int, limit: int) -> list[dict[str, Any]]:
    """Return a task's events and log chunks after `after`, in order: what log.txt is made of."""
    chunks = TaskLog.select().where(TaskLog.task_id == task_id, TaskLog.seq > after).order_by(TaskLog.seq).limit(limit)
    entries = [dict(row) for row in chunks.dicts()] + events(task_id, after, limit)
    return sorted(entries, key=lambda entry: entry["seq"])[:limit]


def artifacts(task_id: str) -> list[tuple[str, int]]:
    """Return the names of the files a task left, and in how many parts each is kept."""
    count = fn.COUNT(TaskArtifact.part)
    rows = TaskArtifact.select(TaskArtifact.name, count).where(TaskArtifact.task_id == task_id).group_by(TaskArtifact.name).tuples()
    return [(str(name), int(parts)) for name, parts in rows]


class Told(TypedDict):
    """What the folder of a task is written from."""

    task: dict[str, Any]
    events: list[dict[str, Any]]
    #: Events and log chunks that log.txt does not tell yet; None if they are too many to hold.
    news: list[dict[str, Any]] | None
    #: Names of files, and in how many parts each is kept.
    artifacts: list[tuple[str, int]]


#: Tasks that one statement asks for; tasks among which the one that waits longest is looked for.
_MANY, _FIRST = 500, 200
#: Log chunks of a task that are held together: a quarter of a megabyte each, at most.
_FEW = 4


def to_trace(ids: Sequence[str]) -> dict[str, Told]:
    """Return what the folders of tasks are written from; tasks that are gone are missing."""
    if not ids:
        return {}
    named, values = db.among("id", ids)
    tasks = {row["id"]: row for row in db.rows(f"{_TO_TRACE} WHERE {named}", values)}
    few = {task_id: task["traced_seq"] for task_id, task in tasks.items() if task["chunks"] <= _FEW}
    entries = _by_task(_entries(few) + _events([task_id for task_id in tasks if task_id not in few]))
    kept = _by_task(_artifacts([task_id for task_id, task in tasks.items() if task["has_artifacts"] and task["status"] in FINAL]))
    told: dict[str, Told] = {}
    for task_id, task in tasks.items():
        until = [entry for entry in entries[task_id] if entry["seq"] <= task["seq"]]  # more may have come since
        told[task_id] = {
            "task": task,
            "events": [entry for entry in until if entry["kind"]],
            "news": [entry for entry in until if entry["seq"] > task["traced_seq"]] if task_id in few else None,
            "artifacts": [(row["name"], row["count"]) for row in kept[task_id]],
        }
    return told


_UNREAD = f"SELECT 1 FROM task_log WHERE task_id = task.id AND task_log.seq > traced_seq LIMIT {_FEW + 1}"
#: What a folder tells of its task, and what is known of the folder; all columns would take a sixteenth longer.
_TRACED = ", ".join(
    (
        *("id", "type", "title", "payload", "labels", "priority", "timeout_s", "silence_s", "max_attempts", "not_before", "expires_at"),
        *("idempotency_key", "concurrency_key", "concurrency_limit", "rate_key", "rate_limit", "rate_per_s"),
        *("requested_by", "parent_id", "correlation_id", "retry_of", "created_at", "finished_at", "status", "result", "error"),
        *("seq", "traced_seq", "traced_bytes", "trace_error"),
    )
)
#: Tasks, how many log chunks of each are not in its folder yet, or that they are many, and whether it left files.
_TO_TRACE = f"""
SELECT {_TRACED}, (SELECT COUNT(*) FROM ({_UNREAD}) AS few) AS chunks,
    EXISTS (SELECT 1 FROM task_artifact WHERE task_id = task.id) AS has_artifacts
FROM task"""
_EVENTS = "SELECT task_id, seq, attempt, at, kind, data, NULL AS text FROM task_event"


def _entries(after: dict[str, int]) -> list[dict[str, Any]]:
    """Return, in order, the events of tasks, and of each the log chunks behind a number."""
    if not after:
        return []
    given, numbers = db.listed(list(after.items()))
    chunks = f"SELECT task_id, seq, attempt, NULL, NULL, NULL, text FROM task_log JOIN {given}"
    theirs, ids = db.among("task_id", [*after])
    both = f"{_EVENTS} WHERE {theirs} UNION ALL {chunks} ON task_id = column1 AND seq > CAST(column2 AS integer)"
    return db.rows(f"{both} ORDER BY seq", [*ids, *numbers])


def _events(ids: Sequence[str]) -> list[dict[str, Any]]:
    theirs, values = db.among("task_id", ids)
    return db.rows(f"{_EVENTS} WHERE {theirs} ORDER BY seq", values) if ids else []


def _artifacts(ids: Sequence[str]) -> list[dict[str, Any]]:
    if not ids:
        return []
    theirs, values = db.among("task_id", ids)
    return db.rows(
        f"SELECT task_id, name, COUNT(*) AS count FROM task_artifact WHERE {theirs} GROUP BY task_id, name ORDER BY name", values
    )


def _by_task(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["task_id"]].append(row)
    return found


def artifact_sizes(task_id: str) -> list[tuple[str, int]]:
    """Return the names and sizes of the files a task left."""
    size = fn.SUM(fn.LENGTH(TaskArtifact.data))
    rows = TaskArtifact.select(TaskArtifact.name, size).where(TaskArtifact.task_id == task_id).group_by(TaskArtifact.name)
    return [(str(name), int(total)) for name, total in rows.order_by(TaskArtifact.name).tuples()]


def artifact_part(task_id: str, name: str, part: int) -> bytes:
    """Return one piece of a file that a task left."""
    query = TaskArtifact.select(TaskArtifact.data)
    return bytes(query.where(TaskArtifact.task_id == task_id, TaskArtifact.name == name, TaskArtifact.part == part).scalar())


def live_workers(within_s: float = 30.0) -> list[dict[str, Any]]:
    """Return the workers that renewed their row in the last seconds, oldest first."""
    rows = db.rows("SELECT * FROM worker WHERE beat_at > {now} - ? ORDER BY started_at", [within_s])
    return [{**row, "queues": json.loads(row["queues"])} for row in rows]


def running_counts() -> dict[str, int]:
    """Return how many tasks each worker runs."""
    found = db.rows(f"SELECT worker_id, COUNT(*) AS count FROM task WHERE status = '{RUNNING}' GROUP BY worker_id")
    return {row["worker_id"]: row["count"] for row in found}


def queues() -> dict[str, dict[str, int]]:
    """Return how many tasks of each queue are queued, dispatched and running."""
    statuses = ", ".join(f"'{status}'" for status in (QUEUED, *IN_FLIGHT))
    rows = db.rows(f"SELECT queue, status, COUNT(*) AS count FROM task WHERE status IN ({statuses}) GROUP BY queue, status")
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        found.setdefault(row["queue"], {QUEUED: 0, DISPATCHED: 0, RUNNING: 0})[row["status"]] = row["count"]
    return found


def oldest_waiting_s() -> float | None:
    """Return for how many seconds that of the tasks which could start already has waited that waits longest; None if none waits.

    Only the first in line are looked at, however many there are: one behind them has waited longer only if all these came back lately.
    """
    first = f"SELECT queued_at FROM task WHERE {in_line().sql} ORDER BY rank, id LIMIT {_FIRST}"
    waits = db.rows(f"SELECT {{now}} - MIN(queued_at) AS waits FROM ({first}) AS first", in_order=True)[0]["waits"]
    return None if waits is None else max(0.0, waits)


def trace_error(task_id: str) -> str | None:
    """Return why a task's folder could not be written last; None if it could, or if there is no such task."""
    found = Task.select(Task.trace_error).where(Task.id == task_id).scalar()
    return None if found is None else str(found)


def trace_errors(limit: int = 1000) -> list[str]:
    """Return why folders lag behind, those tried most often first; of those that wait, and of all others, only so many are looked at."""
    each = (f"SELECT trace_error FROM task WHERE {lagging.sql} ORDER BY trace_due_at DESC LIMIT {limit}" for lagging in behind())
    found = db.rows(" UNION ALL ".join(f"SELECT trace_error FROM ({one}) AS lagging" for one in each))
    return [row["trace_error"] for row in found if row["trace_error"] is not None]


def progress(task_id: str) -> tuple[str, int]:
    """Return a task's status and the number of its last event or log chunk; raise NotFound."""
    found = progress_of([task_id]).get(task_id)
    if found is None:
        raise missing(task_id)
    return found


def log_extent(task_id: str) -> tuple[int, int, int]:
    """Return the number of a task's last event or log chunk, that of the last that its folder tells, and the size of log.txt then.

    Raises NotFound.
    """
    row = Task.select(Task.seq, Task.traced_seq, Task.traced_bytes).where(Task.id == task_id).tuples().first()
    if row is None:
        raise missing(task_id)
    return row[0], row[1], row[2]


def kind_and_labels(task_id: str) -> tuple[str, dict[str, str]]:
    """Return a task's type and labels; raise NotFound."""
    row = Task.select(Task.type, Task.labels).where(Task.id == task_id).dicts().first() or db.accepted(task_id)
    if row is None:
        raise not_found(task_id)
    return str(row["type"]), json.loads(row["labels"])


def progress_of(ids: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return the status of tasks and the number of the last event or log chunk of each; those that are gone are missing."""
    found: dict[str, tuple[str, int]] = {}
    for start in range(0, len(ids), _MANY):
        named, some = db.among("id", ids[start : start + _MANY])
        found |= {row["id"]: (row["status"], row["seq"]) for row in db.rows(f"SELECT id, status, seq FROM task WHERE {named}", some)}
    return found


def missing(task_id: str) -> NotFound | Unavailable:
    """Return the error for a task that was not found: it does not exist, or has arrived and could not be entered."""
    if db.accepted(task_id):
        cause = db.trouble.suspected()
        why = explain(cause) if cause else "It could not be entered among the others so far."
        return Unavailable(f"Task {task_id!r} is accepted, and cannot be shown yet; ask again. {why}", code="database_unavailable")
    return not_found(task_id)


def not_found(task_id: str) -> NotFound:
    """Return the error for a task that does not exist, as far as whoever asks may know."""
    return NotFound(f"There is no task {task_id!r}; GET /tasks lists them.", code="task_not_found")

"""What comes due again: nudges that nobody took, traces that nobody wrote. Every function runs inside `db.unit`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peewee

from tower import db
from tower.models import Task, Worker, behind, in_line, not_yet
from tower.terms import DISPATCHED, FINAL, IN_FLIGHT, QUEUED

#: A nudge that nobody took is sent again after this many seconds, then after twice as many, up to the ceiling.
NUDGE_S, NUDGE_CEILING_S = 5.0, 60.0
#: A trace that nobody wrote is asked for again, likewise: a disk that has space again waits no longer than that.
TRACE_S, TRACE_CEILING_S = 2.0, 60.0
#: A task that waits is traced after this many seconds; most have started by then. Of a crowd that waits only so many are asked for at
#: once: a folder that is there already makes the end of its task dearer, and those that end should not wait for others.
WAITING_TRACE_S, _WAITING_AT_ONCE = 10.0, 20
#: What was changed so many seconds before the last change may not be on the disk.
_UNWRITTEN_S = 60.0
#: Tasks whose time has come that one statement wakes.
_WOKEN = 500
#: A time that lies less ahead than this may have been set a moment ago.
_SET_BACK_S = 1.0


@dataclass(frozen=True)
class Nudge:
    """A task that somebody should look at, and the type whose actor that is."""

    id: str
    type: str
    queue: str = ""


def due_to_start() -> Nudge | None:
    """Return a queued task that could start and has not been nudged for a while; push its next nudge back."""
    due = Task.select(Task.id).where(in_line(), Task.nudge_at <= db.instant())
    return next(iter(_push_back(due.order_by(Task.rank, Task.id), QUEUED, 1)), None)


def wake() -> bool:
    """Let tasks whose time has come take their places in the queue; return whether there may be more of them."""
    due = Task.select(Task.id).where(not_yet(), Task.ready_at <= db.instant()).order_by(Task.ready_at).limit(_WOKEN)
    if db.is_postgres():
        due = due.for_update("FOR UPDATE SKIP LOCKED")
    still = peewee.SQL(f"{db.aside('status')} = '{QUEUED}'"), Task.ready_at <= db.now()
    return bool(Task.update(ready_at=0).where(_among(due), *still).execute() == _WOKEN)


def all_due() -> None:
    """Let every nudge that was sent be due now, because the broker has forgotten them."""
    Task.update(nudge_at=0).where(Task.status == DISPATCHED, Task.nudge_at > db.now()).execute()
    first = Task.select(Task.id).where(in_line()).order_by(Task.rank, Task.id).limit(1)
    Task.update(nudge_at=0).where(_among(first), Task.status == QUEUED).execute()


def set_back() -> None:
    """Bring forward what was due by a clock that has been set back since, by as much as it was; times that clients named stay."""
    ahead = Task.updated_at - db.now()
    named = peewee.fn.COALESCE(Task.not_before, 0)
    later = (db.now() + _SET_BACK_S) < Task.updated_at
    moved = {time: peewee.Case(None, [(time << (0, named), time)], time - ahead) for time in (Task.ready_at, Task.nudge_at)}
    Task.update({**moved, Task.rank: rank(), Task.updated_at: db.now()}).where(Task.status << (QUEUED, DISPATCHED), later).execute()
    for lagging in behind():
        Task.update(trace_due_at=db.now()).where(lagging, Task.trace_due_at > db.now() + TRACE_CEILING_S + _SET_BACK_S).execute()
    Worker.update(beat_at=db.now()).where(Worker.beat_at > db.now() + _SET_BACK_S).execute()


def rank() -> Any:
    """Return a task's rank, but none later than if it were created now: made before a clock was set back, it would let all others pass."""
    latest = db.now() - Task.priority
    return peewee.Case(None, [(Task.rank > latest, latest)], Task.rank)


def due_to_run(limit: int) -> list[Nudge]:
    """Return dispatched tasks whose nudge nobody took; push their next nudges back."""
    waiting = Task.select(Task.id).where(Task.status == DISPATCHED, Task.nudge_at <= db.instant())
    return _push_back(waiting.order_by(Task.nudge_at), DISPATCHED, limit)


def _push_back(due: Any, status: str, limit: int) -> list[Nudge]:
    rows = (
        Task.update(nudges=Task.nudges + 1, nudge_at=db.now() + _doubling(Task.nudges, NUDGE_S, NUDGE_CEILING_S))
        .where(_among(due.limit(limit)), peewee.SQL(f"{db.aside('status')} = '{status}'"), Task.nudge_at <= db.now())
        .returning(Task.id, Task.type)
        .dicts()
    )
    return [Nudge(row["id"], row["type"]) for row in rows]


def _among(due: Any) -> Any:
    """Return the condition that a task is one of those a query finds, which is asked first: inside, Postgres may ask it for each task."""
    return Task.id << [row["id"] for row in db.ask(*due.sql(), in_order=True)]


def due_to_trace(limit: int) -> list[str]:
    """Return tasks whose trace folder lags behind, at last a few of those that wait; push their next reminders back."""
    begun, waiting = behind()
    found = _due_to_trace(begun, limit)
    return [*found, *_due_to_trace(waiting, min(limit - len(found), _WAITING_AT_ONCE))]


def _due_to_trace(lagging: peewee.SQL, limit: int) -> list[str]:
    due = Task.select(Task.id).where(lagging, Task.trace_due_at <= db.instant()).order_by(Task.trace_due_at).limit(limit)
    rows = (
        Task.update(trace_tries=Task.trace_tries + 1, trace_due_at=db.now() + _doubling(Task.trace_tries, TRACE_S, TRACE_CEILING_S))
        .where(_among(due), Task.traced_seq < Task.seq, Task.trace_due_at <= db.now())
        .returning(Task.id)
        .dicts()
    )
    return [row["id"] for row in rows]


def traced(marks: Sequence[tuple[str, int, int]]) -> None:
    """Note of each task that its trace folder tells everything up to a number, with so many bytes of log.txt."""
    given, values = db.listed(marks)
    # A mark beyond the last number tells of rows that are gone.
    seq = "CAST(column2 AS integer)"
    newer = f"(traced_seq <= {seq} OR traced_seq > seq)"
    db.rows(
        f"""
        UPDATE task SET traced_seq = {seq}, traced_bytes = CAST(column3 AS bigint),
            trace_tries = 0, trace_error = NULL, trace_due_at = {{now}} + {TRACE_S}
        FROM {given} WHERE id = column1 AND seq >= {seq} AND {newer}""",
        values,
    )


def untraced(task_id: str) -> None:
    """Note that the trace folder has lost something, so that it is written from the start."""
    Task.update(traced_seq=0, traced_bytes=0).where(Task.id == task_id).execute()


def untraced_lately() -> None:
    """Let the folders of the last minute, and of all that has not ended, be written from the start.

    Linux writes to the disk within some thirty seconds. Asked by status, all is found by an index, however long the history is.
    """
    ends = [Task.select(peewee.fn.MAX(Task.finished_at)).where(Task.status == status, Task.finished_at.is_null(False)) for status in FINAL]
    last = max((float(at) for end in ends if (at := end.scalar()) is not None), default=0.0)
    lately = [(Task.status == status) & (Task.finished_at > last - _UNWRITTEN_S) for status in FINAL]
    for late in [*lately, *(Task.status == status for status in (QUEUED, *IN_FLIGHT))]:
        Task.update(traced_seq=0, traced_bytes=0, trace_tries=0, trace_due_at=0).where(late, Task.traced_seq > 0).execute()


def trace_failed(task_id: str, error: str) -> bool:
    """Note why the trace folder could not be written; the sweep asks for it again. False if that was known, or the task is gone."""
    known = Task.trace_error.is_null(False) & (Task.trace_error == error[:500])
    return bool(Task.update(trace_error=error[:500]).where(Task.id == task_id, ~known).execute())


def _doubling(count: Any, first: float, ceiling: float) -> Any:
    steps = [(count == n, first * 2**n) for n in range(12) if first * 2**n < ceiling]
    return peewee.Case(None, steps, ceiling)

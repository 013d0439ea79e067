"""Trees of tasks: who may join one. Every function runs inside `db.unit`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tower import db
from tower.errors import Conflict, InvalidTask
from tower.lifecycle import NewTask
from tower.models import Task


@dataclass(frozen=True)
class _Ancestor:
    parent_id: str | None
    correlation_id: str
    created_at: float
    #: When somebody asked it to stop.
    stopped_at: float | None


def joined(tasks: list[NewTask]) -> list[NewTask]:
    """Return the tasks, those with a parent in its tree; raise InvalidTask for an unknown parent, Conflict under one that was cancelled.

    The ancestors stay locked until the commit: a cancel that comes at the same time either is seen here, or waits and sees the child.
    """
    asked = sorted({task.parent_id for task in tasks if task.parent_id})
    if not asked:
        return tasks
    lineage = _lineage(asked)
    for parent_id in asked:
        if parent_id not in lineage:
            raise unknown_parent(parent_id)
        _refuse_stopped(lineage, parent_id)
    return [task._replace(correlation_id=lineage[task.parent_id].correlation_id) if task.parent_id else task for task in tasks]


def unknown_parent(parent_id: str) -> InvalidTask:
    """Return the error for a parent that does not exist."""
    return InvalidTask(f"There is no task {parent_id!r} that could be the parent.", code="unknown_parent", field="parent_id")


def _refuse_stopped(lineage: dict[str, _Ancestor], parent_id: str) -> None:
    """Raise Conflict if the parent was cancelled, or an ancestor of it since; what is retried after that begins anew."""
    below, at = None, lineage[parent_id]
    while True:
        if at.stopped_at is not None and (below is None or at.stopped_at >= below.created_at):
            whose = f"The parent {parent_id}" if below is None else f"{below.parent_id}, above the parent {parent_id},"
            raise Conflict(f"{whose} was cancelled; its tree takes no more tasks.", code="parent_cancelled")
        if at.stopped_at is not None or at.parent_id not in lineage:
            return
        below, at = at, lineage[at.parent_id]


def _lineage(ids: Sequence[str]) -> dict[str, _Ancestor]:
    """Return these tasks and all above them, locked in the order of their ids, as `bulk` does: nobody waits in a circle."""
    first = Task.select(Task.id, Task.parent_id).where(Task.id << list(ids)).cte("lineage", recursive=True, columns=("id", "parent_id"))
    above = Task.alias()
    line = first.union(above.select(above.id, above.parent_id).join(first, on=(above.id == first.c.parent_id)))
    found = sorted(row[0] for row in line.select_from(line.c.id).tuples())
    return {row[0]: _Ancestor(*row[1:]) for row in _locked(found)}


def _locked(ids: Iterable[str]) -> list[tuple[str, str | None, str, float, float | None]]:
    columns = (Task.id, Task.parent_id, Task.correlation_id, Task.created_at, Task.cancel_requested_at)
    query = Task.select(*columns).where(Task.id << list(ids)).order_by(Task.id)
    return list((query.for_update("FOR SHARE") if db.is_postgres() else query).tuples())  # in SQLite BEGIN IMMEDIATE has done it

"""A lease, and what its holder may write while it holds it. Every function runs inside `db.unit`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tower import db
from tower.models import Task, TaskArtifact, TaskLog
from tower.terms import RUNNING

#: A log chunk holds at most this many characters, an artifact part so many bytes.
CHUNK = 256 * 1024


class Claim(NamedTuple):
    """A lease on one attempt, and what its worker needs to know to run it."""

    id: str
    attempt: int
    token: str
    worker_id: str
    type: str
    payload: str
    timeout_s: float
    silence_s: float | None
    max_attempts: int
    max_losses: int
    failures: int
    #: The database's time at the claim; the log of the attempt counts on from it.
    started_at: float
    #: Why the attempt before ended, if there was one.
    previous: dict[str, Any] | None = None


def heartbeat(worker_id: str, ids: Sequence[str]) -> dict[tuple[str, int], bool]:
    """Renew a worker's leases with one statement; return those it still holds, and whether each was asked to stop."""
    rows = (
        Task.update(beat=Task.beat + 1)
        .where(Task.status == RUNNING, Task.worker_id == worker_id, Task.claim_token.is_null(False), Task.id << list(ids))
        .returning(Task.id, Task.attempt, Task.cancel_requested_at)
        .dicts()
    )
    return {(row["id"], row["attempt"]): row["cancel_requested_at"] is not None for row in rows}


def append_log(claim: Claim, part: int, text: str) -> bool:
    """Add whole lines to a running task's log, as part `part` of the attempt's; False if the lease is gone."""
    rows = Task.update(seq=Task.seq + 1, updated_at=db.now()).where(*held(claim)).returning(Task.seq).dicts()
    for row in rows:
        TaskLog.insert(task_id=claim.id, seq=row["seq"], attempt=claim.attempt, part=part, text=text).execute()
        return True
    return False


def appended(claim: Claim, part: int) -> bool | None:
    """Return True if that part of the log is there already, because only the answer to its commit was lost."""
    chosen = (TaskLog.task_id == claim.id, TaskLog.attempt == claim.attempt, TaskLog.part == part)
    return True if TaskLog.select(TaskLog.seq).where(*chosen).exists() else None


def forget_artifacts(claim: Claim) -> None:
    """Make room for the files of this attempt: those of earlier ones could stand in their way."""
    TaskArtifact.delete().where(TaskArtifact.task_id == claim.id, TaskArtifact.attempt < claim.attempt).execute()


def keep_artifact(claim: Claim, name: str, part: int, data: bytes) -> bool:
    """Keep a piece of a file that the attempt left; False if the lease is gone."""
    if not Task.select(Task.id).where(*held(claim)).exists():
        return False
    TaskArtifact.insert(task_id=claim.id, name=name, part=part, attempt=claim.attempt, data=data).on_conflict_ignore().execute()
    return True


def held(claim: Claim) -> tuple[Any, ...]:
    """Return the conditions under which a task is still leased by this claim."""
    return (Task.id == claim.id, Task.status == RUNNING, Task.attempt == claim.attempt, Task.claim_token == claim.token)


def locked(*conditions: Any) -> dict[str, Any] | None:
    """Return what decides about a task's next state, and keep everybody else from changing it until the commit."""
    columns = (Task.id, Task.status, Task.attempt, Task.losses, Task.max_losses, Task.lane, Task.cancel_requested_at)
    query = Task.select(*columns).where(*conditions)
    row = (query.for_update() if db.is_postgres() else query).dicts().first()  # in SQLite BEGIN IMMEDIATE has done it
    return dict(row) if row else None

"""A lease, and what its holder may write while it holds it. Every function runs inside `db.unit`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tower import db
from tower.models import RUNNING, Task, TaskArtifact, TaskLog

#: A log chunk and an artifact part hold at most this many bytes.
CHUNK = 256 * 1024


@dataclass(frozen=True)
class Claim:
    """A lease on one attempt, and what its worker needs to know to run it."""

    id: str
    attempt: int
    token: str
    worker_id: str
    type: str
    payload: str
    timeout_s: float
    max_attempts: int
    max_losses: int
    failures: int
    #: The database's time at the claim; the log of the attempt counts on from it.
    started_at: float


def heartbeat(worker_id: str, ids: Sequence[str]) -> dict[tuple[str, int], bool]:
    """Renew a worker's leases with one statement; return those it still holds, and whether each was asked to stop."""
    rows = (
        Task.update(beat=Task.beat + 1)
        .where(Task.status == RUNNING, Task.worker_id == worker_id, Task.id << list(ids))
        .returning(Task.id, Task.attempt, Task.cancel_requested_at)
        .dicts()
    )
    return {(row["id"], row["attempt"]): row["cancel_requested_at"] is not None for row in rows}


def append_log(claim: Claim, text: str) -> bool:
    """Add whole lines to a running task's log; False if the lease is gone."""
    rows = Task.update(seq=Task.seq + 1, updated_at=db.now()).where(*held(claim)).returning(Task.seq).dicts()
    for row in rows:
        TaskLog.insert(task_id=claim.id, seq=row["seq"], attempt=claim.attempt, text=text).execute()
        return True
    return False


def keep_artifact(claim: Claim, name: str, part: int, data: bytes) -> bool:
    """Keep a piece of a file that the attempt left; False if the lease is gone."""
    if not Task.select(Task.id).where(*held(claim)).exists():
        return False
    if part == 0:
        TaskArtifact.delete().where(TaskArtifact.task_id == claim.id, TaskArtifact.name == name).execute()
    TaskArtifact.insert(task_id=claim.id, name=name, part=part, attempt=claim.attempt, data=data).on_conflict_ignore().execute()
    return True


def held(claim: Claim) -> tuple[Any, ...]:
    """Return the conditions under which a task is still leased by this claim."""
    return (Task.id == claim.id, Task.status == RUNNING, Task.attempt == claim.attempt, Task.claim_token == claim.token)

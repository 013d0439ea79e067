"""Shorthand for tests that work on rows directly."""

from typing import Any

from tower import db, lifecycle, load, queries
from tower.leases import Claim
from tower.lifecycle import NewTask
from tower.models import Rule, Worker, new_id


def new(**fields: Any) -> NewTask:
    """Return a task that has no row yet."""
    task_id = str(fields.pop("id", None) or new_id())
    defaults: dict[str, Any] = {
        "type": "echo",
        "queue": "default",
        "payload": "{}",
        "labels": {},
        "priority": 0,
        "not_before": None,
        "timeout_s": 60.0,
        "max_attempts": 1,
        "max_losses": 3,
        "correlation_id": task_id,
    }
    return NewTask(id=task_id, **(defaults | fields))


def insert(**fields: Any) -> str:
    """Insert a queued task and return its id."""
    task = new(**fields)
    db.unit(lambda: lifecycle.insert([task]))
    return task.id


def dispatch(*ids: str) -> list[str]:
    return [nudge.id for nudge in db.unit(lambda: lifecycle.dispatch(ids, load.read().token))]


def claim(task_id: str | None = None, worker: str = "w1") -> Claim | None:
    return db.unit(lambda: lifecycle.claim(worker, new_id(), task_id=task_id, queues=["default"]))


def running(worker: str = "w1", **fields: Any) -> Claim:
    """Insert a task and bring it to running."""
    task_id = insert(**fields)
    dispatch(task_id)
    claimed = claim(task_id, worker)
    assert claimed is not None
    return claimed


def expire(claimed: Claim) -> str | None:
    """Take a task from a worker that is gone; return its next status, None if another sweep did."""
    seen = row(claimed.id)["beat"]
    beat = db.unit(lambda: lifecycle.fence(claimed.id, claimed.attempt, seen))
    return None if beat is None else db.unit(lambda: lifecycle.expire(claimed.id, claimed.attempt, beat, "gone"))


def row(task_id: str) -> dict[str, Any]:
    return db.read(lambda: queries.task(task_id))


def kinds(task_id: str) -> list[str]:
    return [event["kind"] for event in db.read(lambda: queries.events(task_id))]


def add_worker(worker_id: str = "w1", **fields: Any) -> None:
    """Make a worker known that lives somewhere else, and beat just now."""
    values = {
        "host": "elsewhere",
        "pid": 1,
        "pid_space": "elsewhere",
        "pid_started": 0.0,
        "slots": 8,
        "queues": '["default"]',
        "version": "0",
    }
    db.unit(lambda: Worker.insert(id=worker_id, started_at=db.now(), beat_at=db.now(), **(values | fields)).execute())


class Nudges:
    """Stands in for the broker: remembers what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.memory: str | None = None

    def send(self, actor: str, *task_ids: str) -> bool:
        self.sent += [(actor, task_id) for task_id in task_ids]
        return True

    def epoch(self) -> str | None:
        return self.memory


def set_rule(kind: str, name: str, **changes: Any) -> None:
    """Set a rule; nobody is nudged."""
    db.unit(lambda: Rule.insert(kind=kind, name=name, updated_at=0, **changes).execute(), sees_arrived=False)

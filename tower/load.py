"""The rows that a decision looks at beside the tasks: what is in flight, the rules, the starts of rates."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tower import db
from tower.decision import PREFETCH, Limits, Load, Place, Row, measure, rate_of
from tower.models import Rule, Task, TaskStart
from tower.terms import DISPATCHED, RUNNING

#: What the decision needs to know of a task.
COLUMNS = (
    *(Task.id, Task.rank, Task.queue, Task.type, Task.ready_at, Task.attempt, Task.losses, Task.max_losses),
    *(Task.concurrency_key, Task.concurrency_limit, Task.rate_key, Task.rate_limit, Task.rate_per_s),
)
NAMES = ", ".join(field.column_name for field in COLUMNS)
_LIMITS = ("max_running", "rate_limit", "rate_per_s", "paused_at", "paused_by", "reason")


def read(lease_s: float = 30.0, prefetch: float = PREFETCH) -> Load:
    """Return the load now on the workers that beat within the lease, without the starts of any rate; see `measure`."""
    return read_beside(lease_s, prefetch)[0]


def read_beside(lease_s: float, prefetch: float, *statements: str) -> tuple[Load, list[list[dict[str, Any]]]]:
    """Return the load, as `read` does, and what some SELECTs find on the same way."""
    # The token first: whoever decides meanwhile changes it, and what is read after that may tell of it or not.
    asked = ["SELECT token FROM decision", _WORKERS.format(lease_s=float(lease_s)), _IN_FLIGHT, "SELECT * FROM rule", *statements]
    now, ([decision], workers, in_flight, rules, *found) = db.several(asked)
    limits = {(row["kind"], row["name"]): Limits(**{name: row[name] for name in _LIMITS}) for row in rules}
    served = ({**worker, "queues": json.loads(worker["queues"])} for worker in workers)
    measured = measure(now, served, in_flight, limits, prefetch)
    measured.token = decision["token"]
    measured.workers = frozenset(worker["id"] for worker in workers if worker["slots"])
    measured.unclaimed = frozenset(row["queue"] for row in in_flight if row["unclaimed"])
    return measured, found


def paused() -> set[Place]:
    """Return what is paused."""
    return {(kind, name) for kind, name in Rule.select(Rule.kind, Rule.name).where(Rule.paused_at.is_null(False)).tuples()}


_WORKERS = "SELECT id, slots, queues FROM worker WHERE beat_at > {{now}} - {lease_s}"
#: What is in flight by queue, type, key and losses; what a stopping worker still runs holds no slot.
_IN_FLIGHT = f"""
SELECT queue, type, concurrency_key, losses, max_losses, COUNT(*) AS count, MIN(concurrency_limit) AS lowest,
    SUM(CASE WHEN status = '{RUNNING}' AND worker_id IN (SELECT id FROM worker WHERE slots = 0) THEN 0 ELSE 1 END) AS holding,
    SUM(CASE WHEN status = '{DISPATCHED}' THEN 1 ELSE 0 END) AS unclaimed
FROM task WHERE status IN ('{DISPATCHED}', '{RUNNING}') GROUP BY queue, type, concurrency_key, losses, max_losses
"""


def add_starts(load: Load, rows: Iterable[Row], chosen: Counter[str] | None = None) -> None:
    """Read, for the rates that these tasks are held to, the starts that still count; `chosen` are starts of this pass by rate key."""
    wanted: dict[str, tuple[int, float]] = {}
    for row in rows:
        rate = rate_of(row, load.rules)
        if rate:
            key, limit, per_s = rate
            known = wanted.get(key, (0, 0.0))
            wanted[key] = max(limit, known[0]), max(per_s, known[1])
    for key, (limit, per_s) in wanted.items():
        query = TaskStart.select(TaskStart.at).where(TaskStart.rate_key == key, TaskStart.at > load.now - per_s)
        found = [float(at) for (at,) in query.order_by(TaskStart.at.desc()).limit(limit).tuples()]
        load.starts[key] = found + [load.now] * (chosen or Counter())[key]

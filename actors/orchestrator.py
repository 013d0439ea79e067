"""The orchestrator actor: decides, alone and in SQL order, which tasks may start, and nudges their handler actors."""

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tower import db, lifecycle, queries
from tower.broker import Nudger, handler_actor
from tower.models import QUEUED, Task
from tower.reminders import Nudge
from tower.settings import Settings

#: Tasks that wait at the workers, per slot, so that none idles between two tasks.
PREFETCH = 0.25


@dataclass(frozen=True)
class Room:
    """How many more tasks may be in flight: in all, and on each queue that a worker serves."""

    total: int
    queues: Mapping[str, int]

    def open_queues(self) -> list[str]:
        """Return the queues that can take one more."""
        return [queue for queue, free in self.queues.items() if free > 0] if self.total > 0 else []


class Dispatcher:
    """Runs passes; nudges that arrive while one runs are answered together by the next."""

    def __init__(self, settings: Settings, nudger: Nudger) -> None:
        self._settings = settings
        self._nudger = nudger
        self._turn = threading.Lock()
        self._asked = threading.Event()

    def orchestrate(self, task_id: str) -> None:
        """Start everything that may start, now or, if a pass is under way, by the one that follows it; nobody waits for a pass."""
        self._asked.set()
        while self._asked.is_set() and self._turn.acquire(blocking=False):
            try:
                self._asked.clear()
                self.run_pass()
            finally:
                self._turn.release()

    def run_pass(self) -> int:
        """Mark as dispatched what may start now, nudge the handler actors, and return how many there were."""
        if not db.read(self._is_needed):
            return 0
        chosen = db.unit(self._decide)
        for nudge in chosen:
            self._nudger.send(handler_actor(nudge.type), nudge.id)
        return len(chosen)

    def _is_needed(self) -> bool:
        """Look before writing: most nudges under a backlog find no room."""
        room = measure_room(queries.live_workers(self._settings.lease_s), queries.in_flight()).open_queues()
        return bool(room) and bool(Task.select(Task.id).where(*_may_start(room)).exists())

    def _decide(self) -> list[Nudge]:
        db.lock_for_dispatch()
        room = measure_room(queries.live_workers(self._settings.lease_s), queries.in_flight())
        held, picked = queries.held_keys(), list[str]()
        while room.open_queues():
            chosen, room = choose(_candidates(room, held), room, held)
            if not chosen:
                break
            picked += chosen
        return lifecycle.dispatch(picked) if picked else []


def measure_room(workers: Iterable[Mapping[str, Any]], in_flight: Iterable[Mapping[str, Any]]) -> Room:
    """Return how much more the workers can take: their slots and a small prefetch, less what is in flight."""
    total, queues = 0, dict[str, int]()
    for worker in workers:
        takes = math.ceil(worker["slots"] * (1 + PREFETCH))  # none from a worker that is stopping and has no slots left
        total += takes
        for queue in worker["queues"]:
            queues[queue] = queues.get(queue, 0) + takes
    for row in in_flight:
        total -= row["count"]
        queues[row["queue"]] = queues.get(row["queue"], 0) - row["count"]
    return Room(total, queues)


def choose(candidates: Iterable[Mapping[str, Any]], room: Room, held: set[str]) -> tuple[list[str], Room]:
    """Return which of the candidates, which come in order, may start, and the room left; their keys are added to `held`."""
    chosen, total, queues = list[str](), room.total, dict(room.queues)
    for row in candidates:
        key = row["concurrency_key"]
        if total <= 0 or queues.get(row["queue"], 0) <= 0 or (key is not None and key in held):
            continue
        chosen.append(row["id"])
        total -= 1
        queues[row["queue"]] -= 1
        if key is not None:
            held.add(key)
    return chosen, Room(total, queues)


def _may_start(queues: list[str]) -> tuple[Any, ...]:
    return Task.status == QUEUED, Task.ready_at <= db.now(), Task.queue << queues


def _candidates(room: Room, held: set[str]) -> list[dict[str, Any]]:
    query = Task.select(Task.id, Task.queue, Task.concurrency_key).where(*_may_start(room.open_queues()))
    if held:
        query = query.where(Task.concurrency_key.is_null() | Task.concurrency_key.not_in(list(held)))
    return list(query.order_by(Task.rank, Task.id).limit(room.total).dicts())

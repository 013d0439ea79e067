"""The orchestrator actor: decides, alone and in order, which tasks may start, and nudges their handler actors."""

import json
import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from peewee import Tuple, ValuesList

from tower import db, lifecycle, load, queries, reminders
from tower.broker import Nudger, handler_actor
from tower.decision import (
    CONCURRENCY_KEY,
    KEY,
    PREFETCH,
    QUARANTINE,
    QUEUE_LIMIT,
    RATE_LIMIT,
    TOWER_LIMIT,
    TYPE,
    TYPE_LIMIT,
    Load,
    Row,
    choose,
    obstacle,
    openings,
)
from tower.faults import fault
from tower.models import Task, in_line
from tower.reminders import Nudge
from tower.settings import Settings
from tower.terms import RUNNING

#: A task that waits no longer than that is new: the nudge that came with it is on its way. So many of those asked about are looked up.
_NEW_S, _MOST_ASKED = 0.05, 10
#: How soon a pass looks again for a task whose time has come and whose row somebody locks.
_LOCKED_S = 1.0
#: As many tasks wait at the workers as short ones have ended since the last pass, but per slot no more than this. Of those that are kept,
#: as many as will have ended in so many seconds, since passes are further apart then.
_MOST_AHEAD, _MOST_KEPT, _KEPT_S = 8.0, 24.0, 0.15
#: What keeps a task from starting until another one ends, though slots are free.
_UNTIL_AN_END = frozenset({CONCURRENCY_KEY, QUARANTINE, TYPE_LIMIT, QUEUE_LIMIT, TOWER_LIMIT})
#: Waiting tasks looked at together.
PAGE = 200
#: Lanes that are looked at one by one, and tasks at their heads; beyond that all tasks are walked in their order.
LANES = 100
_MOST_HEADS = 10_000
#: How often a pass looks again because others decided meanwhile, and about how long it waits before, longer each time.
_MOST_TRIES, _FORESTALLED_S = 10, 0.002


class Slots(Protocol):
    """The slots of this process, which a pass fills first of all."""

    def take_turnover(self) -> float:
        """Return how many short tasks a slot has ended, on average, since this was asked last."""

    def recall(self) -> None:
        """Start no more of what the last pass has chosen: another one chooses anew."""

    def start(self, walk: "Walk", *, keeps: bool) -> int | None:
        """Start what a walk has chosen, the rest later if it `keeps`; return how many do, none if somebody else decided meanwhile.

        Returns None if they have to be dispatched first.
        """

    def would_keep(self, walk: "Walk") -> bool:
        """Whether what has to be dispatched now would be kept, if nothing that was dispatched before waited for a slot."""

    def offer(self, nudges: Sequence[Nudge]) -> Sequence[Nudge]:
        """Give free slots tasks that were dispatched; return those for which there are none."""


class NoSlots(Slots):
    """A process that runs no tasks."""

    def take_turnover(self) -> float:
        """Return 0."""
        return 0.0

    def recall(self) -> None:
        """Do nothing."""

    def start(self, walk: "Walk", *, keeps: bool) -> int | None:
        """Return None."""
        return None

    def would_keep(self, walk: "Walk") -> bool:
        """Return False."""
        return False

    def offer(self, nudges: Sequence[Nudge]) -> Sequence[Nudge]:
        """Return them all."""
        return nudges


class Dispatcher:
    """Runs passes; nudges that arrive while one runs are answered together by the next."""

    def __init__(self, settings: Settings, nudger: Nudger, slots: Slots | None = None) -> None:
        self._settings = settings
        self._nudger = nudger
        #: Where tasks can be started without anybody being nudged.
        self.slots = slots or NoSlots()
        #: Whether the last pass found no room for more: then every end of a task makes some.
        self._was_cut_short = False
        #: When the last pass found nothing that waits; who asks a while after that most likely speaks of a new task.
        self._idle_since = math.inf
        #: Whether a task waits for nothing but the end of certain others: then no pass can wait.
        self.is_held_up = False
        #: Whether what the last pass chose is kept, and when the ends of short tasks were counted last.
        self._is_kept, self._counted_at = False, 0.0
        self._turn = threading.Lock()
        self._asked: deque[str] = deque()
        #: When, on our own clock, a pass is due though nobody asks.
        self._due_at: float | None = None

    def answer_one(self, task_id: str) -> None:
        """Do what `answer` does, asked because of one task."""
        self.answer([task_id])

    def answer(self, asked: Sequence[str]) -> None:
        """Start what may start, now or, if a pass is under way, by the one that follows it; nobody waits for a pass.

        One is asked because of tasks that are new, or that have ended and make room for others.
        """
        fault("orchestrate.received")
        self._asked.extend(asked)
        while self._asked and self._turn.acquire(blocking=False):
            try:
                self.run_pass([self._asked.popleft() for _ in range(len(self._asked))])
            finally:
                self._turn.release()

    @property
    def due_s(self) -> float:
        """In how many seconds another pass should run though nobody asks.

        A rate becomes free then, a task's time comes, or what was left to others still waits.
        """
        due_at = self._due_at
        return math.inf if due_at is None else due_at - time.monotonic()

    def run_pass(self, asked: Sequence[str] = ()) -> int:
        """Mark as dispatched what may start now, have it started, and return how many there were.

        Who is asked because of tasks that have ended leaves what has just come to whoever is asked because of that.
        """
        self._due_at = None
        db.enter_arrived()
        # To look first whether anything waits is worth a way of its own only while passes follow one another.
        started = self._start_some(PREFETCH) if asked and time.monotonic() - self._idle_since > _NEW_S else 0
        ready = self._ready(asked[-_MOST_ASKED:])
        self._idle_since = math.inf if ready.waits_s is not None else time.monotonic()
        if ready.waits_s is None:
            self._count_ends()  # what ended while nothing waited says little of what comes
            return started
        if asked and not ready.is_asked and not self._was_cut_short and 0 <= ready.waits_s < _NEW_S:
            self._be_due(_NEW_S)
            return started
        return started + self._start_some(self._ahead())

    def _ahead(self) -> float:
        """Return how many tasks may wait at the workers, per slot: as many as have ended since the last pass.

        After a pass whose choice is kept, as many as will have ended in the time until the next one, unless that has just passed.
        """
        ended, seconds = self._count_ends()
        if self._is_kept and seconds < _KEPT_S:
            return min(max(PREFETCH, ended * _KEPT_S / max(seconds, 0.001)), _MOST_KEPT)
        return min(max(PREFETCH, ended), _MOST_AHEAD)

    def _count_ends(self) -> tuple[float, float]:
        """Return how many short tasks a slot has ended since this was asked last, and how many seconds ago that was."""
        now = time.monotonic()
        seconds, self._counted_at = now - self._counted_at, now
        return self.slots.take_turnover(), seconds

    def _start_some(self, ahead: float) -> int:
        """Mark as dispatched what may start now, and have it started; so many tasks may wait at the workers, per slot.

        Nobody is kept from deciding meanwhile. What was chosen starts only if nobody has, else it is looked at again.
        """
        for tries in range(_MOST_TRIES):
            if tries:
                time.sleep(random.uniform(0, tries * _FORESTALLED_S))  # so that many do not look in step
            self.slots.recall()
            walk = db.read(partial(self._choose, ahead), in_turn=True)
            if not walk.chosen:
                return 0
            fault("dispatch.before_commit")
            keeps = ahead > PREFETCH
            started = self.slots.start(walk, keeps=keeps)
            self._is_kept = keeps and started is not None
            if started is None:
                # What is dispatched is as good as started, so less of it waits; least where it would keep the next pass from keeping.
                most = PREFETCH if self.slots.would_keep(walk) else _MOST_AHEAD
                if ahead > most:
                    ahead = most
                    continue
                started = self._dispatch(walk)
            if 0 < started < len(walk.chosen):  # the others are held by somebody, or were cancelled
                self._be_due(_NEW_S)
            if started:
                return started
        self._be_due(_NEW_S)
        return 0

    def _dispatch(self, walk: "Walk") -> int:
        """Mark what was chosen as dispatched, and have it started wherever there are slots."""
        work = partial(lifecycle.dispatch, walk.chosen, walk.load.token)
        nudges = db.unit(work, is_one_statement=db.is_postgres(), is_promise=False, sees_arrived=False)
        if nudges:
            fault("dispatch.after_commit")
            self._deliver(nudges)
            fault("dispatch.after_send")
        return len(nudges)

    def _ready(self, asked: Sequence[str]) -> queries.Ready:
        """Return what is ready, once those whose time has come have been woken; a pass is due when the next one's comes."""
        ready = db.read(partial(queries.ready, asked), in_turn=True)
        if ready.next_s is not None and ready.next_s <= 0:
            while db.unit(reminders.wake, is_promise=False):
                pass
            ready = db.read(partial(queries.ready, asked), in_turn=True)
        if ready.next_s is not None:
            self._be_due(ready.next_s if ready.next_s > 0 else _LOCKED_S)
        return ready

    def _be_due(self, seconds: float) -> None:
        """Let a pass run in so many seconds, or earlier."""
        at = time.monotonic() + max(0.0, seconds)
        self._due_at = at if self._due_at is None else min(at, self._due_at)

    def _deliver(self, chosen: list[Nudge]) -> None:
        """Give tasks to free slots: first to those of this process, others' workers are nudged. A slot that is busy looks by itself.

        Who is busy is asked after the commit: a slot that becomes free later will find what was chosen.
        """
        left = self.slots.offer(chosen)
        if not left:
            return
        idle = db.read(partial(_idle_workers, self._settings.lease_s), in_turn=True)
        for nudge in left:  # whoever is nudged takes as many as it has slots
            if idle[nudge.queue] > 0:
                idle[nudge.queue] -= 1
                self._nudger.send(handler_actor(nudge.type), nudge.id)

    def _choose(self, ahead: float) -> "Walk":
        """Return a walk that has chosen which tasks may start; note when a rate frees one that may not."""
        # Where there was no room, there most likely is none: then nothing but that is read.
        walk = look(self._settings.lease_s, ahead, with_lanes=not self._was_cut_short)
        while walk.goes_on:
            walk.step()
        if walk.frees_at is not None:
            self._be_due(walk.frees_at - walk.load.now)
        self._was_cut_short = not walk.load.open_queues()
        self.is_held_up = walk.is_held_up
        return walk


class Walk:
    """One walk over the waiting tasks in their order, which leaves out what it has seen cannot start.

    The load only grows meanwhile, so what could not start once cannot start later in the walk either: one is enough.
    """

    def __init__(self, begin: Load, lanes: Sequence[Row] | None) -> None:
        self.load = begin
        #: The first task of each lane, if that is known.
        self._lanes = lanes
        #: When the first of the rates frees that hold up a task.
        self.frees_at: float | None = None
        #: Whether the end of another task would let one start that was left.
        self.is_held_up = False
        self._is_first = True
        self._is_over = False
        self._after: tuple[float, str] | None = None
        #: The tasks that may start, in their order, and their queues.
        self.chosen, self.queues = list[str](), set[str]()
        self._starts = Counter[str]()
        self._blocked_keys = set[tuple[str, int]]()
        self._blocked_rates = set[tuple[str, int, float]]()

    @property
    def goes_on(self) -> bool:
        """Whether there may be another task that can start."""
        return not self._is_over and bool(self.load.open_queues())

    def step(self) -> None:
        """Choose from the next tasks."""
        heads = self._heads() if self._is_first else None
        self._is_first = False
        rows = self._page() if heads is None else heads
        load.add_starts(self.load, rows, self._starts)
        chosen, self.load = choose(rows, self.load)
        picked = set(chosen)
        taken = [row for row in rows if row["id"] in picked]
        self.chosen += chosen
        self.queues.update(row["queue"] for row in taken)
        self._starts.update(row["rate_key"] for row in taken if row["rate_key"] is not None)
        self._learn(row for row in rows if row["id"] not in picked)
        self._is_over = heads is not None or len(rows) < PAGE
        self._after = (rows[-1]["rank"], rows[-1]["id"]) if rows else None

    def _heads(self) -> list[Row] | None:
        """Return as many tasks of each lane as it has openings, and one more, in order, if the lanes are few; None if they are not.

        Tasks of a lane are restricted alike, so no more of it than these can start, and one that is left tells what the others wait for.
        A crowd behind one full key or rate thus costs one look.
        """
        lanes = db.rows(_lanes(), in_order=True) if self._lanes is None else self._lanes
        if len(lanes) > LANES:
            return None
        load.add_starts(self.load, lanes)
        self._learn(lanes)
        wanted = {row["lane"]: count for row in lanes if (count := openings(row, self.load)) > 0}
        if sum(wanted.values()) > _MOST_HEADS:
            return None
        of_lane = _OF_LANE.format(in_line=in_line().sql, in_time=lifecycle.IN_TIME)
        rows = [row for row in lanes if row["lane"] in wanted and row["is_alone"]]
        for lane in wanted.keys() - {row["lane"] for row in rows}:
            rows += db.rows(of_lane, [lane, lane, wanted[lane] + 1], in_order=True)
        return sorted(rows, key=lambda row: (row["rank"], row["id"]))

    def _waiting(self) -> Any:
        return Task.select(*load.COLUMNS).where(in_line(), lifecycle.in_time())

    def _page(self) -> list[dict[str, Any]]:
        query = self._waiting().where(Task.queue << self.load.open_queues())
        for kind, column in ((TYPE, Task.type), (KEY, Task.concurrency_key)):
            closed = self.load.closed(kind)
            if closed:
                query = query.where(column.is_null() | column.not_in(closed))
        for blocked, columns in (
            (self._blocked_keys, (Task.concurrency_key, Task.concurrency_limit)),
            (self._blocked_rates, (Task.rate_key, Task.rate_limit, Task.rate_per_s)),
        ):
            if blocked:
                query = query.where(columns[0].is_null() | Tuple(*columns).not_in(ValuesList(sorted(blocked))))
        if self._after:
            query = query.where(Tuple(Task.rank, Task.id) > Tuple(*self._after))
        return db.ask(*query.order_by(Task.rank, Task.id).limit(PAGE).sql(), in_order=True)

    def _learn(self, left: Iterable[Row]) -> None:
        """Note what the tasks that were left wait for: others with the same key and limit need not be looked at."""
        for row in left:
            found = obstacle(row, self.load)
            self.is_held_up = self.is_held_up or (found is not None and found.reason in _UNTIL_AN_END)
            if found and found.reason == CONCURRENCY_KEY:
                self._blocked_keys.add((row["concurrency_key"], row["concurrency_limit"]))
            elif found and found.reason == RATE_LIMIT:
                self._blocked_rates.add((row["rate_key"], row["rate_limit"], row["rate_per_s"]))
                self.frees_at = min(found.until or 0.0, self.frees_at or float("inf"))


#: One step along the index of lanes for each lane in which a task waits.
_HEADS = """
WITH RECURSIVE head(id) AS (
    SELECT (SELECT id FROM task WHERE {in_line} ORDER BY lane, rank, id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT id FROM task
        WHERE {in_line} AND lane > (SELECT lane FROM task WHERE id = head.id)
        ORDER BY lane, rank, id LIMIT 1
    ) FROM head WHERE head.id IS NOT NULL
)
SELECT {names}, lane, {in_time} AND NOT EXISTS (
    SELECT 1 FROM task AS other WHERE {in_line} AND other.lane = task.lane AND (other.rank, other.id) > (task.rank, task.id)
) AS is_alone FROM task WHERE {chosen}
"""
#: The first tasks of one lane, whose name is asked for twice: Postgres, which plans for any lane, would go over the queue to find one
#: that it takes for large, and only the index of lanes has this order.
_OF_LANE = f"SELECT {load.NAMES} FROM task WHERE {{in_line}} AND {{in_time}} AND lane >= ? AND lane <= ? ORDER BY lane, rank, id LIMIT ?"


def look(lease_s: float, ahead: float, *, with_lanes: bool = True) -> Walk:
    """Return a walk over what waits now, see `load.read`; with lanes it has what it needs first of all."""
    if not with_lanes:
        return Walk(load.read(lease_s, ahead), None)
    begin, [lanes] = load.read_beside(lease_s, ahead, _lanes())
    return Walk(begin, lanes)


def _idle_workers(lease_s: float) -> Counter[str]:
    """Return how many live workers have a slot free, by queue."""
    return Counter(queue for worker in db.rows(_IDLE, [lease_s]) for queue in json.loads(worker["queues"]))


_IDLE = f"""
SELECT queues FROM worker
LEFT JOIN (SELECT worker_id, COUNT(*) AS busy FROM task WHERE status = '{RUNNING}' GROUP BY worker_id) AS held ON worker_id = worker.id
WHERE beat_at > {{now}} - ? AND slots > coalesce(busy, 0)
"""


def _lanes() -> str:
    """Return the SELECT of the first task of each lane, and whether it is the only one there; of one lane more than are looked at."""
    chosen = db.found("id", f"SELECT id FROM head WHERE id IS NOT NULL LIMIT {LANES + 1}")
    return _HEADS.format(in_line=in_line().sql, in_time=lifecycle.IN_TIME, chosen=chosen, names=load.NAMES)

"""The orchestrator actor: decides, alone and in order, which tasks may start, and nudges their handler actors."""

import json
import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from actors.walk import Walk, look
from tower import db, lifecycle, queries, reminders
from tower.broker import Nudger, handler_actor
from tower.decision import PREFETCH
from tower.faults import fault
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
#: How often a pass looks again because others decided meanwhile, and about how long it waits before, longer each time.
_MOST_TRIES, _FORESTALLED_S = 10, 0.002


class Slots(Protocol):
    """The slots of this process, which a pass fills first of all."""

    def take_turnover(self) -> float:
        """Return how many short tasks a slot has ended, on average, since this was asked last."""

    def recall(self) -> None:
        """Start no more of what the last pass has chosen: another one chooses anew."""

    def start(self, walk: Walk, *, keeps: bool) -> int | None:
        """Start what a walk has chosen, the rest later if it `keeps`; return how many do, none if somebody else decided meanwhile.

        Returns None if they have to be dispatched first.
        """

    def would_keep(self, walk: Walk) -> bool:
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

    def start(self, walk: Walk, *, keeps: bool) -> int | None:
        """Return None."""
        return None

    def would_keep(self, walk: Walk) -> bool:
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
        if not db.is_postgres():  # there they may start from where they are
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

    def _dispatch(self, walk: Walk) -> int:
        """Mark what was chosen as dispatched, and have it started wherever there are slots."""
        if walk.arrived:
            db.enter_arrived()
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

    def _choose(self, ahead: float) -> Walk:
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


def _idle_workers(lease_s: float) -> Counter[str]:
    """Return how many live workers have a slot free, by queue."""
    return Counter(queue for worker in db.rows(_IDLE, [lease_s]) for queue in json.loads(worker["queues"]))


_IDLE = f"""
SELECT queues FROM worker
LEFT JOIN (SELECT worker_id, COUNT(*) AS busy FROM task WHERE status = '{RUNNING}' GROUP BY worker_id) AS held ON worker_id = worker.id
WHERE beat_at > {{now}} - ? AND slots > coalesce(busy, 0)
"""

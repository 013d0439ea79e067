"""Tasks that one thread runs one after the other: what is quick needs neither a thread nor a commit of its own."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from actors.attempt import Attempt
from tower.leases import Claim
from tower.lifecycle import Outcome

#: A type is quick if its handler took less than this lately, and how much the last time counts beside those before.
_QUICK_S, _WEIGHT = 0.002, 0.2
#: A task is short if its handler took less than this, more than twice the time from one pass to the next while little is kept: slots whose
#: tasks take longer find enough of what waits at the workers anyway.
_SHORT_S = 0.1
#: How often batches are looked at: one that is seen twice has all but the task under way taken away.
_LOOK_S = 0.02


class Done(NamedTuple):
    """An attempt whose handler has ended, and how, None if it was not called; nobody has recorded it yet."""

    attempt: Attempt
    outcome: Outcome | None


class Batch:
    """Claims that one thread runs in turn, and the ends it will record together. Each holds a slot of its worker."""

    def __init__(self, claims: Iterable[Claim], leased_at: float, done: Iterable[Done] = ()) -> None:
        #: The time, on the leases' clock, before they were claimed.
        self.leased_at = leased_at
        self._waiting = deque(claims)
        self._done = list(done)
        self.slots = len(self._waiting) + len(self._done)
        self._lock = threading.Lock()

    @property
    def has_company(self) -> bool:
        """Whether something depends on the task under way: others that wait behind it."""
        return self.slots > 1

    def next(self) -> Claim | None:
        """Return the next task to run; None after the last."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def end(self, attempt: Attempt, outcome: Outcome | None) -> None:
        """Note how the task under way ended."""
        with self._lock:
            self._done.append(Done(attempt, outcome))

    def take_done(self) -> list[Done]:
        """Return what is to be recorded; whoever takes it does that."""
        with self._lock:
            done, self._done = self._done, []
            return done

    def split(self) -> list["Batch"]:
        """Take away everything but the task under way; return it as batches of their own."""
        with self._lock:
            others = [Batch([claim], self.leased_at) for claim in self._waiting]
            if self._done:
                others.append(Batch([], self.leased_at, self._done))
            self._waiting.clear()
            self._done = []
            self.slots -= sum(other.slots for other in others)
            return others


class Tempo:
    """How long the handler of each type took lately, in this process."""

    def __init__(self) -> None:
        self._took_s: dict[str, float] = {}
        #: How many short tasks have ended since `take_short` was asked last.
        self._short = 0
        self._lock = threading.Lock()

    def note(self, type_name: str, seconds: float) -> None:
        """Note how long a handler took."""
        before = self._took_s.get(type_name, seconds)
        self._took_s[type_name] = before + _WEIGHT * (seconds - before)
        if seconds < _SHORT_S:
            with self._lock:
                self._short += 1

    def take_short(self) -> int:
        """Return how many short tasks have ended since this was asked last."""
        with self._lock:
            short, self._short = self._short, 0
        return short

    def batches(self, claims: Sequence[Claim], leased_at: float) -> list[Batch]:
        """Return the batches to run them in: what is quick together, everything else alone."""
        quick = [claim for claim in claims if self.is_quick(claim.type)]
        alone = [Batch([claim], leased_at) for claim in claims if not self.is_quick(claim.type)]
        return [Batch(quick, leased_at), *alone] if quick else alone

    def is_quick(self, type_name: str) -> bool:
        """Whether a handler takes so little that a thread of its own would cost more."""
        return self._took_s.get(type_name, math.inf) < _QUICK_S


class Watch:
    """Looks after batches, so that a task that turns out to be slow holds up no other."""

    def __init__(self, run: Callable[[Batch], None]) -> None:
        #: Runs a batch in a thread of its own.
        self._run = run
        #: The batches under way, and whether each was seen before.
        self._seen: dict[Batch, bool] = {}
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Look after a batch meanwhile, if a task could hold up others in it."""
        if not batch.has_company:
            yield
            return
        try:
            with self._change:
                self._seen[batch] = False
                if self._thread is None:
                    thread = threading.Thread(target=self._look, name="watch", daemon=True)
                    thread.start()
                    self._thread = thread
                elif len(self._seen) == 1:
                    self._change.notify()
            yield
        finally:
            with self._change:
                self._seen.pop(batch, None)

    def _look(self) -> None:
        while True:
            with self._change:
                while not self._seen:
                    self._change.wait()
                old = [batch for batch, was_seen in self._seen.items() if was_seen]
                self._seen = {batch: True for batch in self._seen if batch not in old}
            for batch in old:
                for other in batch.split():
                    self._run(other)
            time.sleep(_LOOK_S)

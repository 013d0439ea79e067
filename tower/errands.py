"""Actors of this process, asked without a broker: what would be a message to ourselves is a word to a thread."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from tower.errors import Unavailable

#: An errand that is asked for more than so many things at a time is under load, unless it is told otherwise.
_MANY = 8
#: How often one that waits looks whether it still has to, and after how long nothing more is expected soon.
_LOOK_S, _QUIET_S = 0.01, 0.02

_log = logging.getLogger(__name__)


class Errand:
    """A thread that does one actor's work; what it is asked for while it works, it does together.

    It begins at once when it has been idle, else `pace_s` after it began last: under load more comes together, and costs less. While
    it is asked for one thing at a time, a quarter of that is enough. It takes `loaded_s` when it is asked for many at a time, or, with
    `can_wait`, while that is true, whatever it is asked for. With `enough` it waits no longer when it was asked for so many things, which
    are as cheap as more, or when nothing more comes: the last of a burst are not kept waiting for what follows. What is more than enough,
    but not as much again, waits for more.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Sequence[str]], object],
        pace_s: float = 0.0,
        *,
        loaded_s: float | None = None,
        can_wait: Callable[[], bool] | None = None,
        enough: int | None = None,
    ) -> None:
        self._name, self._work, self._pace_s = name, work, pace_s
        self._loaded_s = pace_s if loaded_s is None else loaded_s
        self._can_wait, self._enough = can_wait, enough
        self._look_s = _LOOK_S if can_wait or enough else threading.TIMEOUT_MAX
        #: When it began last, and for how many things.
        self._began_at, self._began_for = 0.0, 0
        self._asked_at = 0.0
        self._asked: dict[str, None] = {}
        self._is_ending = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def ask(self, *task_ids: str) -> None:
        """Have the work done for some tasks, soon."""
        with self._change:
            self._asked.update(dict.fromkeys(task_ids))
            self._asked_at = time.monotonic()
            self._change.notify()

    def stop(self) -> None:
        """Do what was asked for, then end; wait for that a few seconds at most."""
        with self._change:
            self._is_ending = True
            self._change.notify()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while asked := self._next():
            try:
                self._work(asked)
            except Unavailable as error:
                # The rows are as they were, and the sweep asks again.
                _log.warning("%s %s waits.", error.message, self._name)
            except Exception:
                _log.exception("%s failed; the sweep asks for it again", self._name)

    def _next(self) -> list[str]:
        with self._change:
            while not self._asked and not self._is_ending:
                self._change.wait()
        while (early := self._began_at + self._pause_s() - time.monotonic()) > 0 and not self._is_ending and not self._has_enough():
            time.sleep(min(early, self._look_s))
        with self._change:
            asked = list(self._asked)
            if self._enough and len(asked) > self._enough:  # the rest is not enough, and waits for more
                del asked[len(asked) - len(asked) % self._enough :]
            for task_id in asked:
                del self._asked[task_id]
        self._began_at, self._began_for = time.monotonic(), len(asked)
        return asked

    def _has_enough(self) -> bool:
        return self._enough is not None and (len(self._asked) >= self._enough or time.monotonic() - self._asked_at > _QUIET_S)

    def _pause_s(self) -> float:
        is_loaded = self._can_wait() if self._can_wait else self._began_for > _MANY
        if is_loaded:
            return self._loaded_s
        return self._pace_s if self._began_for > 1 else self._pace_s / 4


class Threads:
    """Threads that are kept for the next call; as many as there are calls at once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: list[Callable[[], object]] = []
        self._idle = 0
        self._change = threading.Condition()

    def run(self, call: Callable[[], object]) -> None:
        """Run this in a thread, now."""
        with self._change:
            self._calls.append(call)
            if self._idle >= len(self._calls):
                self._change.notify()
                return
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._change:
                self._idle += 1
                while not self._calls:
                    self._change.wait()
                self._idle -= 1
                call = self._calls.pop(0)
            try:
                call()
            except Exception:
                _log.exception("%s failed", self._name)

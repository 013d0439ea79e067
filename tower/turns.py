"""The turn to write to SQLite, which threads take one by one: its own waiting is a sleep that grows, and starves somebody."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import peewee

#: Whoever has had his turn for so long is stuck, most likely.
STUCK_S = 0.4
#: How long who only reads stands behind others that get on, and for how long nobody does so again after that was in vain.
_PATIENCE_S, _AVOIDED_S = 2.0, 1.0


class NoTurn(peewee.OperationalError):
    """Other threads of this process were writing all the time; what keeps them is another question."""

    def __init__(self) -> None:
        super().__init__("database is locked by other threads of this process")


class Turns:
    """Whose turn it is, and since when."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._since = self._avoided_until = 0.0

    @property
    def are_avoided(self) -> bool:
        """Whether who only reads goes on without a turn, since one was not to be had lately."""
        return time.monotonic() < self._avoided_until

    def acquire(self, *, blocking: bool = True, timeout: float = -1) -> bool:
        """Take the turn; return whether it is taken."""
        has_it = self._lock.acquire(blocking, timeout)
        if has_it:
            self._since = time.monotonic()
        return has_it

    def release(self) -> None:
        """Give it up."""
        self._lock.release()

    @contextmanager
    def while_others_get_on(self) -> Iterator[None]:
        """Take the turn for somebody who only reads: he waits behind others, but not behind one that is stuck. Raise NoTurn."""
        deadline = time.monotonic() + _PATIENCE_S
        while not self.acquire(timeout=STUCK_S / 4):
            now = time.monotonic()
            if now > deadline or now - self._since > STUCK_S:
                self._avoided_until = now + _AVOIDED_S
                raise NoTurn
        try:
            yield
        finally:
            self.release()

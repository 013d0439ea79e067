"""Following tasks: however many people follow however many tasks, the database is asked once in a while for all of them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool

from tower import db, queries
from tower.errors import Unavailable
from tower.terms import FINAL

#: Seconds between two looks.
_LOOK_S = 0.5
#: What was read last is kept for those who follow in step; whoever lags behind reads for himself.
_KEPT = 2

_log = logging.getLogger(__name__)

Entries = list[dict[str, Any]]


class Followed:
    """A task that somebody follows, as it was at the last look."""

    def __init__(self, status: str, seq: int) -> None:
        self.status, self.seq = status, seq
        self.is_gone = False
        self.followers = 0
        self._change = asyncio.Event()
        self._lock = asyncio.Lock()
        self._kept: dict[int, Entries] = {}

    @property
    def is_final(self) -> bool:
        """Whether nothing will follow."""
        return self.status in FINAL

    def tell(self, found: tuple[str, int] | None) -> None:
        """Note what the task is now, None if it was deleted, and wake who waits for that."""
        if found == (self.status, self.seq):
            return
        self.is_gone = found is None
        self.status, self.seq = found or (self.status, self.seq)
        self._change.set()
        self._change = asyncio.Event()

    async def wait(self, after: int, seconds: float) -> bool:
        """Wait until there is something behind a number, or nothing will be; False if that takes longer."""
        try:
            async with asyncio.timeout(seconds):
                while self.seq <= after and not self.is_final and not self.is_gone:
                    await self._change.wait()
        except TimeoutError:
            return False
        return True

    async def entries(self, after: int, read: Callable[[], Awaitable[Entries]]) -> Entries:
        """Return what is behind a number, read once for all who ask for the same."""
        async with self._lock:
            if after not in self._kept:
                found = await read()
                if not found:
                    return found
                while len(self._kept) >= _KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[after] = found
            return self._kept[after]


class Watch:
    """Looks after all followed tasks of this server, as long as there are any."""

    def __init__(self) -> None:
        self._followed: dict[str, Followed] = {}
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def on(self, task_id: str, status: str, seq: int) -> Iterator[Followed]:
        """Follow a task, of which this is known already."""
        task = self._followed.setdefault(task_id, Followed(status, seq))
        task.followers += 1
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            yield task
        finally:
            task.followers -= 1
            if not task.followers:
                del self._followed[task_id]

    async def _look(self) -> None:
        while self._followed:
            await asyncio.sleep(_LOOK_S)
            try:
                found = await run_in_threadpool(db.read, partial(queries.progress_of, list(self._followed)))
            except Unavailable:  # `db` has said so; streams outlive the database's absence
                continue
            except Exception:
                _log.exception("followed tasks could not be looked at; the next look tries again")
                continue
            for task_id, task in list(self._followed.items()):
                if not task.is_gone and (task_id in found or not task.is_final):
                    task.tell(found.get(task_id))

"""Keeps shown pages live: what many look at is made once a second for all of them, and not at all while nobody looks."""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool

from tower.errors import TowerError, Unavailable

#: Seconds between two looks; after one that took long, so many times as long, and so many at once: the pages leave the server its time.
_LOOK_S, _REST, _AT_ONCE = 1.0, 5, 4
#: Different pages that are kept live; more are told to come back.
_MOST = 200

_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A part of a page, and what tells it from what it was."""

    digest: str
    text: str

    @classmethod
    def of(cls, text: str) -> "Part":
        """Return the part that this text is."""
        return cls(sha256(text.encode()).hexdigest()[:12], text)


Parts = dict[str, Part]


class Shown:
    """The parts of a page that somebody looks at, as they were at the last look."""

    def __init__(self) -> None:
        self.followers = 0
        self._parts: Parts | None = None
        self._error: TowerError | None = None
        self._change = asyncio.Event()

    def tell(self, parts: Parts | None, error: TowerError | None = None) -> None:
        """Note what the parts are now, or what ended it, and wake who waits for a change."""
        if error is None and parts == self._parts:
            return
        self._parts, self._error = parts, error
        self._change.set()
        self._change = asyncio.Event()

    async def wait(self, known: Sequence[str], seconds: float) -> Parts | None:
        """Return the parts once their digests are others than the known; None if that takes longer. Raises what ended it."""
        try:
            async with asyncio.timeout(seconds):
                while self._error is None and (self._parts is None or [part.digest for part in self._parts.values()] == list(known)):
                    await self._change.wait()
        except TimeoutError:
            return None
        if self._error:
            raise self._error
        return self._parts


class Live:
    """What is looked at right now."""

    def __init__(self) -> None:
        self._shown: dict[Hashable, Shown] = {}
        self._looking: set[asyncio.Task[None]] = set()
        self._turns = asyncio.Semaphore(_AT_ONCE)

    def has_room_for(self, key: Hashable) -> bool:
        """Whether a page can be kept live; one that is already takes any number."""
        return key in self._shown or len(self._shown) < _MOST

    @contextmanager
    def on(self, key: Hashable, make: Callable[[], Parts]) -> Iterator[Shown]:
        """Look at what `make` makes; those who give the same key share it, so it must name all that makes a difference."""
        shown = self._shown.get(key)
        if shown is None:
            shown = self._shown[key] = Shown()
            looking = asyncio.create_task(self._look(key, shown, make))
            self._looking.add(looking)
            looking.add_done_callback(self._looking.discard)
        shown.followers += 1
        try:
            yield shown
        finally:
            shown.followers -= 1

    async def _look(self, key: Hashable, shown: Shown, make: Callable[[], Parts]) -> None:
        try:
            while shown.followers:
                try:
                    async with self._turns:
                        began = time.monotonic()
                        shown.tell(await run_in_threadpool(make))
                except Unavailable:
                    pass  # the stream outlives the database's absence
                except TowerError as error:
                    shown.tell(None, error)
                    return
                except Exception as error:  # whoever looks is told to load the page, which says what is wrong
                    _log.exception("a live page could not be made")
                    shown.tell(None, TowerError(f"The page cannot be kept live: {type(error).__name__}.", code="internal_error"))
                    return
                await asyncio.sleep(max(_LOOK_S, _REST * (time.monotonic() - began)))
        finally:
            if self._shown.get(key) is shown:
                del self._shown[key]

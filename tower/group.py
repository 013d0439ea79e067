"""Lets threads, or coroutines, that come at the same time share one piece of work, as one commit serves many."""

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from tower.errors import Unavailable

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Ticket(Generic[Item, Result]):
    """What one thread asks for, and waits for."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.result: Result | None = None
        self.error: BaseException | None = None
        self.is_done = False
        self._gate = threading.Lock()
        self._gate.acquire()

    def wait(self) -> None:
        self._gate.acquire()

    def wake(self) -> None:
        self._gate.release()


class Group(Generic[Item, Result]):
    """Does `work` for the items of all threads that wait, in the thread of one of them; nobody waits for others to come.

    `work` takes items and returns a result for each, in order. If it fails for several, each is tried alone: nobody suffers for another,
    except from a database that is away, which is waited for once.
    """

    def __init__(self, work: Callable[[list[Item]], list[Result]], most: int = 100) -> None:
        self._work, self._most = work, most
        self._lock = threading.Lock()
        self._waiting: deque[_Ticket[Item, Result]] = deque()
        self._is_led = False

    def do(self, item: Item) -> Result:
        """Return the result for this item; raise what `work` raises for it."""
        ticket: _Ticket[Item, Result] = _Ticket(item)
        with self._lock:
            self._waiting.append(ticket)
            leads, self._is_led = not self._is_led, True
        if not leads:
            ticket.wait()
        if not ticket.is_done:
            self._lead()
        if ticket.error is not None:
            raise ticket.error
        return ticket.result  # type: ignore[return-value]

    def _lead(self) -> None:
        """Do the work for the first of those who wait, oneself among them, and let the next of the others lead."""
        with self._lock:
            tickets = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
        try:
            self._serve(tickets)
        finally:
            with self._lock:
                following = self._waiting[0] if self._waiting else None
                self._is_led = following is not None
            if following:
                following.wake()
            for ticket in tickets[1:]:  # the first is ours
                ticket.is_done = True
                ticket.wake()

    def _serve(self, tickets: list[_Ticket[Item, Result]]) -> None:
        outcomes = _outcomes(self._work, [ticket.item for ticket in tickets])
        for ticket, (result, error) in zip(tickets, outcomes, strict=True):
            ticket.result, ticket.error = result, error


class Gathering(Generic[Item, Result]):
    """A group of coroutines of one event loop: a thread works for all that wait, while the loop goes on; see `Group`."""

    def __init__(self, work: Callable[[list[Item]], list[Result]], most: int = 100) -> None:
        self._work, self._most = work, most
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._serving: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gathering")

    async def do(self, item: Item) -> Result:
        """Return the result for this item; raise what `work` raises for it. Whoever is cancelled before his turn is left out."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future))
        if self._serving is None or self._serving.done():
            self._serving = loop.create_task(self._serve())
        return await future

    async def stop(self) -> None:
        """Leave out whoever waits, and wait for the work under way."""
        for _, future in self._waiting:
            future.cancel()
        if self._serving and not self._serving.done():
            await asyncio.wait([self._serving])

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while some := self._next():
            also = list(self._waiting)
            try:
                outcomes = await loop.run_in_executor(self._thread, _outcomes, self._work, [item for item, _ in some])
            except BaseException:  # of the loop, which ends: the work itself raises nothing here
                for _, future in some:
                    future.cancel()
                raise
            for (_, future), outcome in zip(some, outcomes, strict=True):
                _settle(future, *outcome)
            away = outcomes[-1][1]
            if isinstance(away, Unavailable):  # whoever waited meanwhile has waited as long
                for _, future in also:
                    _settle(future, None, away)

    def _next(self) -> list[tuple[Item, asyncio.Future[Result]]]:
        some = list[tuple[Item, asyncio.Future[Result]]]()
        while self._waiting and len(some) < self._most:
            item, future = self._waiting.popleft()
            if not future.done():
                some.append((item, future))
        return some


def _settle(future: "asyncio.Future[Result]", result: Result | None, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)  # type: ignore[arg-type]
    else:
        future.set_exception(error)


def _outcomes(work: Callable[[list[Item]], list[Result]], items: Sequence[Item]) -> list[tuple[Result | None, BaseException | None]]:
    """Return for each item its result or its error; a database that is away is waited for once."""
    try:
        results = work(list(items))
        return [(result, None) for result, _ in zip(results, items, strict=True)]
    except BaseException as error:
        _let_go(error)
        if len(items) == 1 or isinstance(error, Unavailable) or not isinstance(error, Exception):
            return [(None, error)] * len(items)
    found = list[tuple[Result | None, BaseException | None]]()
    while len(found) < len(items):
        alone = _outcomes(work, [items[len(found)]])
        found += alone
        if isinstance(found[-1][1], Unavailable):
            found += [found[-1]] * (len(items) - len(found))
    return found


def _let_go(error: BaseException | None) -> None:
    """Free what the calls that an error ended had at hand: kept with the error, a connection would stay open."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

"""Lets threads, or coroutines, that come at the same time share one piece of work, as one commit serves many."""

import asyncio
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

from tower.errors import Unavailable

#: So many who came one by one are most likely one and the same, who waits for each answer before he asks again.
_ALONE = 20
#: How long a loop that has its answers at once may go on without a turn, in which others come.
_TURN_S = 0.002

_log = logging.getLogger(__name__)

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
    """A group of coroutines of one event loop: a thread works for all that wait, while the loop goes on; see `Group`.

    `send` does the same without a thread, and may tell before it returns. It returns False if it cannot now. Then, or if it tells of no
    results, the thread does it.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], list[Result]],
        send: "Callable[[list[Item], Told[Result]], bool]" = lambda items, told: False,
        most: int = 100,
    ) -> None:
        self._work, self._send, self._most = work, send, most
        #: Who waits, and since when.
        self._waiting: deque[tuple[Item, asyncio.Future[Result], float]] = deque()
        #: The loop whose coroutines wait, whether somebody works for it, what was sent, and the future of whoever waits for its end.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_busy = False
        self._sent: _Served[Item, Result] | None = None
        self._ended: asyncio.Future[None] | None = None
        #: How many times in a row only one was served.
        self._alone = 0
        #: Whether something is being sent, and until when what has ended by then is told at once.
        self._is_sending = False
        self._at_once_until = 0.0
        #: What the thread has to do; None ends it, and it has one of its own.
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def is_alone(self) -> bool:
        """Whether whoever is served now has nobody beside him, as far as can be told from those before."""
        return self._alone >= _ALONE

    async def do(self, item: Item) -> Result:
        """Return the result for this item; raise what `work` raises for it. Whoever is cancelled before his turn is left out."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._move_to(loop)
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future, loop.time()))
        if not self._is_busy:
            self._serve(loop)
        return await future

    async def stop(self) -> None:
        """Leave out whoever waits, and wait for the work under way. Whoever comes later begins anew."""
        for _, future, _ in self._waiting:
            future.cancel()
        loop = asyncio.get_running_loop()
        if self._sent and loop is self._loop:  # another has ended, and nobody waits in it
            self._ended = self._ended or loop.create_future()
            await asyncio.shield(self._ended)
        thread, inbox = self._thread, self._inbox
        self._thread, self._inbox = None, SimpleQueue()
        if thread:
            inbox.put(None)
            await asyncio.to_thread(thread.join)

    def _move_to(self, loop: asyncio.AbstractEventLoop) -> None:
        """Work for another loop from now on; the one before has ended, or has to ask elsewhere."""
        left, self._waiting = self._waiting, deque()
        error = RuntimeError("Another event loop has asked meanwhile; each needs an engine of its own.")
        with suppress(RuntimeError):  # it is closed, and nobody waits in it
            for _, future, _ in left:
                future.get_loop().call_soon_threadsafe(_settle, future, None, error)
            if self._ended:
                self._ended.get_loop().call_soon_threadsafe(_settle, self._ended, None, None)
        self._loop, self._is_busy, self._sent, self._ended = loop, False, None, None

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Work for the next of those who wait."""
        served = list[tuple[Item, asyncio.Future[Result]]]()
        while self._waiting and len(served) < self._most:
            item, future, _ = self._waiting.popleft()
            if not future.done():
                served.append((item, future))
        self._is_busy = bool(served)
        if not served:
            return
        self._sent, self._alone = served, self._alone + 1 if len(served) == 1 else 0
        self._is_sending = True
        try:
            is_sent = self._send([item for item, _ in served], partial(self._take_back, loop, served))
        except Exception:  # a mistake of ours: the thread does the same another way, and would not tell
            _log.exception("a thread does what could not be sent")
            is_sent = False
        finally:
            self._is_sending = False
        if not is_sent:
            self._sent = None
            self._hand_over(loop, served)

    def _take_back(self, loop: asyncio.AbstractEventLoop, served: "_Served[Item, Result]", results: list[Result] | None) -> None:
        if self._is_sending and results is not None and (self._waiting or loop.time() > self._at_once_until):
            # Nobody could come meanwhile. Who does in this turn or the next goes before the answer, and is seen.
            loop.call_soon(loop.call_soon, self._take_turn, loop, served, results)
            return
        if self._sent is served:
            self._sent = None
            if self._ended:
                _settle(self._ended, None, None)
                self._ended = None
        if results is None:
            self._hand_over(loop, served)
        else:
            self._tell(loop, served, loop.time(), [(result, None) for result in results])

    def _take_turn(self, loop: asyncio.AbstractEventLoop, served: "_Served[Item, Result]", results: list[Result]) -> None:
        self._at_once_until = loop.time() + _TURN_S
        self._take_back(loop, served, results)

    def _hand_over(self, loop: asyncio.AbstractEventLoop, served: "_Served[Item, Result]") -> None:
        """Have the thread do it."""
        try:
            if self._thread is None:
                thread = threading.Thread(target=_run, args=(self._inbox,), name="gathering", daemon=True)
                thread.start()
                self._thread = thread
        except RuntimeError as error:  # the system has no more threads
            self._tell(loop, served, loop.time(), [(None, error)] * len(served))
            return
        self._inbox.put(partial(self._work_for, loop, served))

    def _work_for(self, loop: asyncio.AbstractEventLoop, served: "_Served[Item, Result]") -> None:
        began_at = loop.time()
        outcomes = _outcomes(self._work, [item for item, _ in served])
        with suppress(RuntimeError):  # the loop has ended, and whoever waited with it
            loop.call_soon_threadsafe(self._tell, loop, served, began_at, outcomes)

    def _tell(
        self,
        loop: asyncio.AbstractEventLoop,
        served: "_Served[Item, Result]",
        began_at: float,
        outcomes: "list[_Outcome[Result]]",
    ) -> None:
        for (_, future), outcome in zip(served, outcomes, strict=True):
            _settle(future, *outcome)
        away = outcomes[-1][1]
        if isinstance(away, Unavailable):  # whoever came in the first half of that has waited nearly as long
            for _, future, came_at in self._waiting if loop is self._loop else ():
                if came_at <= (began_at + loop.time()) / 2:
                    _settle(future, None, away)
        if loop is self._loop:
            self._serve(loop)


def _run(inbox: "SimpleQueue[Callable[[], None] | None]") -> None:
    while work := inbox.get():
        work()


#: Takes the results of what was sent, None if the same has to be done by a thread.
Told = Callable[[list[Result] | None], None]
_Served = list[tuple[Item, "asyncio.Future[Result]"]]
_Outcome = tuple[Result | None, BaseException | None]


def _settle(future: "asyncio.Future[Result]", result: Result | None, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)  # type: ignore[arg-type]
    else:
        future.set_exception(error)


def _outcomes(work: Callable[[list[Item]], list[Result]], items: Sequence[Item]) -> list[_Outcome[Result]]:
    """Return for each item its result or its error; a database that is away is waited for once."""
    try:
        results = work(list(items))
        return [(result, None) for result, _ in zip(results, items, strict=True)]
    except BaseException as error:
        _let_go(error)
        if len(items) == 1 or isinstance(error, Unavailable) or not isinstance(error, Exception):
            return [(None, error)] * len(items)
    found = list[_Outcome[Result]]()
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

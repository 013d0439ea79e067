"""Lets threads that come at the same time share one piece of work, as one commit serves many."""

import threading
from collections import deque
from collections.abc import Callable
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
            try:
                raise ticket.error
            finally:
                ticket.error = None  # else the error would hold itself by its traceback, and with it what it met, such as a connection
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
        try:
            for ticket, result in zip(tickets, self._work([ticket.item for ticket in tickets]), strict=True):
                ticket.result = result
        except BaseException as error:
            if len(tickets) == 1 or isinstance(error, Unavailable) or not isinstance(error, Exception):
                for ticket in tickets:
                    ticket.error = error
                return
            for ticket in tickets:
                self._serve([ticket])

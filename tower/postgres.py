"""Postgres as the tower uses it: statements are prepared, transactions begin with them, and an event loop waits for one connection."""

import asyncio
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Any

import psycopg2.extensions  # type: ignore[import-untyped]
from playhouse.pool import PooledPostgresqlDatabase
from psycopg2.extensions import POLL_OK, POLL_WRITE, TRANSACTION_STATUS_IDLE

from tower import arrived

#: Told of what was sent: that it is committed, or what went wrong. What it raises when all is well comes back to it as what went wrong.
Then = Callable[[Exception | None], None]

#: A pooled connection that was used so many seconds ago is taken to be alive.
_TRUSTED_S = 1.0
#: Statements that are prepared on a connection at most.
_MOST_PREPARED = 300
#: A statement with more values is one of a large batch: it is rarely the same again, and its plan takes memory.
_MOST_VALUES = 250
#: Sent ahead of a statement that takes the first of an order, and true until the end of its transaction: where Postgres expects few rows,
#: it may as well read all and sort them, and would do so with each plan that it kept from then, however many there are by now.
_BY_INDEX = "SET LOCAL enable_sort = off; "
#: How long a connection may take to come, and how long none is tried after one has failed.
_CONNECT_S, _REST_S = 3.0, 1.0
#: How long a loop waits for a statement, and such a statement for a lock: a thread has more patience, and says what it means.
_ANSWER_S, _LOCK_LIMIT = 5.0, "-c lock_timeout=500"
#: Rows that may have left the place where tasks arrive until they are removed, and its size at which none arrives: whoever looks goes over
#: all of it, which takes half a millisecond then.
_MOST_LEFT, _MOST_BYTES = 1000, 2**24


def tell(then: Then) -> None:
    """Tell that what was sent is committed."""
    try:
        then(None)
    except Exception as failure:
        then(failure)


class Session(psycopg2.extensions.connection):
    """A connection, the statements that are prepared on it, and when it was last used."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._prepared: dict[str, str] = {}
        self._numbers = itertools.count()
        self.used_at = time.monotonic()
        #: What is to be sent before the next statement, with it.
        self.ahead = ""

    def spell(self, statement: str, values: Sequence[Any]) -> str:
        """Return how a statement is sent with these values.

        It is prepared from its second time on this connection on, since to plan it costs more than to run it.
        """
        known = self._prepared.get(statement)
        if known:
            return known
        is_new = known is None
        if is_new and len(self._prepared) < _MOST_PREPARED and len(values) <= _MOST_VALUES:
            self._prepared[statement] = ""
        if is_new:
            return statement.replace("?", "%s")
        name = f"tower_{next(self._numbers)}"
        known = self._prepared[statement] = f"EXECUTE {name} ({', '.join(['%s'] * len(values))})" if values else f"EXECUTE {name}"
        return f"PREPARE {name} AS {_numbered(statement)}; {known}"

    def forget(self, statement: str) -> None:
        """Prepare a statement anew the next time: it failed, and nobody knows whether it was prepared before that."""
        if statement in self._prepared:
            self._prepared[statement] = ""


class Postgres(PooledPostgresqlDatabase):
    """A database of so many connections at most, and one for an event loop."""

    def __init__(self, connections: int, **options: Any) -> None:
        super().__init__(connection_factory=Session, max_connections=connections, timeout=5, autoconnect=False, **options)
        #: Whether there is place for tasks to arrive.
        self.takes_arrivals = True
        self.in_loop = LoopConnection(self._connect_for_loop)

    def _connect_for_loop(self) -> Session:
        options = {**self.connect_params, "options": f"{self.connect_params['options']} {_LOCK_LIMIT}"}
        session: Session = psycopg2.connect(dbname=self.database, async_=True, **options)
        deadline = time.monotonic() + _CONNECT_S
        while (state := session.poll()) != POLL_OK:
            with DefaultSelector() as selector:
                selector.register(session.fileno(), EVENT_WRITE if state == POLL_WRITE else EVENT_READ)
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    session.close()
                    raise psycopg2.OperationalError("timeout expired")
        return session

    def close_all(self) -> None:
        """Close every connection, the one of the loop as well."""
        super().close_all()
        self.in_loop.close()

    def take(self, *, writing: bool) -> None:
        """Take a connection for this thread; any will do for writing."""
        self.connect()

    def _is_closed(self, conn: Session) -> bool:
        """Whether a pooled connection is of no use; one that was used a moment ago is not asked, which would double the way there."""
        if conn.closed or time.monotonic() - conn.used_at < _TRUSTED_S:
            return bool(conn.closed)
        return bool(super()._is_closed(conn))

    def _close(self, conn: Session, close_conn: bool = False) -> None:
        conn.used_at = time.monotonic()
        super()._close(conn, close_conn)

    def begin(self) -> None:
        """Begin a transaction, with its first statement: a way of its own would cost as much as to find a row."""
        session: Session = self.connection()
        session.ahead = "BEGIN; "

    @contextmanager
    def scope(self, *, is_one_statement: bool, waits: bool, patience_s: float | None = None) -> Iterator[None]:
        """Let what is done meanwhile be a transaction, or a part of the one that there is; its commit need not wait for the disk.

        With a patience of its own it waits so long at most for each lock.
        """
        session, is_outer = self.connection(), not self.in_transaction()
        with nullcontext() if is_one_statement else self.atomic():
            if is_outer and not waits:
                session.ahead += "SET LOCAL synchronous_commit = off; "
            if is_outer and patience_s is not None:
                session.ahead += f"SET LOCAL lock_timeout = {round(patience_s * 1000)}; "
            try:
                yield
            finally:
                if is_outer and is_one_statement:
                    self._drop_unsent()  # if there was no statement, it is for no other

    def execute_sql(self, sql: str, params: Any = None) -> Any:
        """Run a statement, and before it what was to be sent ahead of it."""
        session: Session = self.connection()
        ahead, session.ahead = session.ahead, ""
        try:
            return super().execute_sql(ahead + sql, params)
        except BaseException:
            if session.get_transaction_status() == TRANSACTION_STATUS_IDLE:  # it was not even begun
                session.ahead = ahead
            raise

    def commit(self) -> None:
        """Commit the transaction, if anything was done in it."""
        if not self._drop_unsent():
            super().commit()

    def rollback(self) -> None:
        """Undo the transaction, if anything was done in it."""
        if not self._drop_unsent():
            super().rollback()

    def _drop_unsent(self) -> bool:
        """Forget what was to be sent ahead of a statement that never came; return whether there was any."""
        session: Session | None = self._state.conn
        unsent = session.ahead if session else ""
        if session:
            session.ahead = ""
        return bool(unsent)

    def is_any_arrived(self) -> bool:
        """Whether there is a task that has arrived, and has not been entered yet."""
        return self.run("SELECT 1 FROM task_arrived LIMIT 1", ()).fetchone() is not None

    def enter_arrived(self) -> None:
        """Enter the tasks that have arrived, each with its first event."""
        self.run(arrived.ENTRY, ())

    def is_untidy(self, left: int, size: int) -> bool:
        """Whether so many rows or bytes, which have left the place where tasks arrive, had better be removed; see `tidy_arrivals`."""
        return left > _MOST_LEFT or size > _MOST_BYTES or not self.takes_arrivals

    def tidy_arrivals(self, size: int) -> None:
        """Remove what has left the place where tasks arrive, so that new ones come there.

        If it becomes large all the same, since somebody has a view of what was there before, none arrives until it is not.
        """
        # To give space back to the system it waits for a moment at which nobody is there.
        self.execute_sql(f"VACUUM (SKIP_LOCKED, TRUNCATE {size > _MOST_BYTES}) task_arrived")
        size = self.execute_sql("SELECT pg_relation_size('task_arrived')").fetchone()[0]
        self.takes_arrivals = size <= _MOST_BYTES

    def in_order(self, sql: str) -> str:
        """Return a statement as one whose order is that of an index; see `db.rows`."""
        return _BY_INDEX + sql

    def run(self, statement: str, values: Sequence[Any], *, in_order: bool = False) -> Any:
        """Run a statement with a question mark for each value; see `Session.spell` and, for one that is in order, `db.rows`."""
        session: Session = self.connection()
        try:
            spelled = session.spell(statement, values)
            return self.execute_sql(self.in_order(spelled) if in_order else spelled, values)
        except BaseException:
            session.forget(statement)
            raise


def array(items: Sequence[Any]) -> Sequence[Any] | str:
    """Return items as Postgres takes an array of them: as one text if they are plain, as ids and numbers are.

    Of any others each is a value of its own to the driver and to Postgres, which takes both of them twice as long, or longer.
    """
    # The first tells of most: texts of kilobytes are not joined to see that they are none.
    if items and _is_plain(str(items[0])) and _PLAIN_TYPES.issuperset(map(type, items)) and "" not in items:
        text = ",".join(map(str, items))
        if _is_plain(text.replace(",", "")) and text.count(",") == len(items) - 1 and "null" not in text.lower():
            return f"{{{text}}}"
    return list(items)


_PLAIN_TYPES = frozenset((str, int))


def _is_plain(text: str) -> bool:
    return text.replace("-", "").isalnum()


@lru_cache(maxsize=500)
def _numbered(statement: str) -> str:
    """Return a statement with $1, $2, … in place of its question marks."""
    numbers = itertools.count(1)
    return re.sub(r"\?", lambda _: f"${next(numbers)}", statement)


class LoopConnection:
    """A connection that an event loop waits for by itself: who hands over to a thread, and is handed back to, waits for the system twice.

    It runs one statement at a time, which is a transaction by itself. Whenever that cannot be, or fails, the same has to be done in a
    thread, where there are patience, other connections, and words for what is wrong.
    """

    def __init__(self, connect: Callable[[], Session]) -> None:
        self._connect = connect
        self._line: _Line | None = None
        self._opening_for: asyncio.AbstractEventLoop | None = None
        self._rests_until = 0.0

    @property
    def is_free(self) -> bool:
        """Whether the loop that runs can send a statement now; if it has no connection yet, one is opened meanwhile.

        It serves one loop at a time: another gets it when that one has ended.
        """
        loop, line = asyncio.get_running_loop(), self._line
        if line and line.is_closed:
            self._line, self._rests_until = None, time.monotonic() + _REST_S
        elif line and line.loop is loop:
            return line.is_free
        busy = line.loop if line else self._opening_for
        if not (busy and busy.is_running()) and time.monotonic() >= self._rests_until:
            self.close()
            self._open(loop)
        return False

    def run(self, statement: str, values: Sequence[Any], then: Then) -> bool:
        """Send a statement; return whether it could be sent. Later `then` is called, once it is committed, or with an error.

        After an error it may be committed all the same. What `then` raises when it is called without one comes back to it as one.
        """
        line = self._line
        return self.is_free and line is not None and line.send(statement, values, then)

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop is about to end
            self._opening_for = loop
            loop.run_in_executor(None, self._connect).add_done_callback(partial(self._opened, loop))

    def _opened(self, loop: asyncio.AbstractEventLoop, connected: "asyncio.Future[Session]") -> None:
        is_wanted = self._opening_for is loop
        if is_wanted:
            self._opening_for = None
        if connected.cancelled() or connected.exception():
            self._rests_until = time.monotonic() + _REST_S
            return
        session = connected.result()
        if not is_wanted:
            session.close()
            return
        try:
            self._line = _Line(loop, session)
        except NotImplementedError:  # a loop that waits for nothing but its own sockets
            self._rests_until = math.inf
            session.close()

    def close(self) -> None:
        """Close the connection, from any thread; what is under way has failed."""
        line, self._line, self._opening_for = self._line, None, None
        if line and line.loop.is_running() and line.loop is not _running_loop():
            with suppress(RuntimeError):  # it has ended meanwhile
                line.loop.call_soon_threadsafe(line.end)
                return
        if line:
            line.end()


class _Line:
    """An open connection, and the loop that looks when there is something to read from it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, session: Session) -> None:
        self.loop = loop
        self._session, self._number = session, session.fileno()
        self._cursor = session.cursor()
        #: Who is told of what is under way, when that has taken too long, and what looks whether it has.
        self._then: Then | None = None
        self._ends_at = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._is_writing = False
        loop.add_reader(self._number, self._go_on)

    @property
    def is_closed(self) -> bool:
        """Whether it is of no use any more."""
        return bool(self._session.closed)

    @property
    def is_free(self) -> bool:
        """Whether nothing is under way."""
        return self._then is None

    def send(self, statement: str, values: Sequence[Any], then: Then) -> bool:
        """Send a statement, while nothing is under way; see `LoopConnection.run`."""
        try:
            self._cursor.execute(self._session.spell(statement, values), values)
        except (psycopg2.Error, ValueError) as error:  # it is gone, or no statement can hold such a value
            self.end(error)
            return False
        self._then, self._ends_at = then, self.loop.time() + _ANSWER_S
        if self._watch is None:
            self._watch = self.loop.call_at(self._ends_at, self._look)
        self._go_on()
        return True

    def _look(self) -> None:
        """End what takes too long; one look for many statements, since most have long been answered by then."""
        self._watch = None
        if self._then is None:
            return
        if self.loop.time() >= self._ends_at:
            self.end()
        else:
            self._watch = self.loop.call_at(self._ends_at, self._look)

    def _go_on(self) -> None:
        """Send what is still to be sent, and take what has come."""
        try:
            state = self._session.poll()
        except psycopg2.Error as error:
            self.end(error)
            return
        if self._is_writing != (state == POLL_WRITE):
            self._is_writing = not self._is_writing
            if self._is_writing:
                self.loop.add_writer(self._number, self._go_on)
            else:
                self.loop.remove_writer(self._number)
        if state == POLL_OK and self._then is not None:
            then, self._then = self._then, None
            tell(then)

    def end(self, error: Exception | None = None) -> None:
        """Close the connection; what is under way has failed."""
        with suppress(RuntimeError):  # the loop has ended
            self.loop.remove_reader(self._number)
            self.loop.remove_writer(self._number)
        self._session.close()
        if self._watch:
            self._watch.cancel()
        then, self._then = self._then, None
        if then and self.loop.is_running():  # else nobody waits any more
            then(error or psycopg2.OperationalError("the connection was closed"))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None

"""SQLite as the tower uses it: one connection writes, and what was promised waits for the disk without holding up others."""

import math
import os
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peewee
from playhouse.pool import PooledSqliteDatabase

#: Where there is no fdatasync, as on macOS, what SQLite itself would call.
_sync = getattr(os, "fdatasync", os.fsync)
#: Pages of the log, of 4 kB, after which a writer brings them into the file: it waits for the disk twice, and others for it.
_CHECKPOINT_PAGES = 8000
#: How long a writer waits for one in another process.
_WAIT_MS = 5000
#: A disk is quick while it was waited for no longer than this lately, on average, and how much the last time counts beside those before.
_QUICK_S, _WEIGHT = 0.002, 0.2


class _Session(sqlite3.Connection):
    """A connection: whether it is the one for writing, whether its commits wait for the disk, and how long for others."""

    is_pen = False
    waits = True
    patience_ms = _WAIT_MS


class File:
    """The file of a database, whether it is still the one that was opened, and whether the disk has what was committed.

    Who deletes or replaces it under a running tower leaves the open connections writing into nowhere: every task accepted from then on
    would be gone with the process.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._opened: tuple[int, int] | None = None
        #: Whether the disk could not take the log. Asked again it would say that all is well, and it is not: what is in the log is safe
        #: only once it has reached the file itself.
        self.has_failed = False
        #: The log, kept open: a descriptor is told of a failure once, whoever else has heard of it.
        self._log: int | None = None
        self._may_be_another = False
        #: How often the disk was waited for: begun, and the number of the last that ended well.
        self._begun = self._ended = 0
        #: How long that took lately, of which nothing is known at first, and since when it is waited for now.
        self._took_s, self._since = math.inf, math.inf
        self._lock = threading.Lock()

    @property
    def is_quick(self) -> bool:
        """Whether the disk takes what it gets, and so soon that even an event loop can wait for it."""
        return not self.has_failed and max(self._took_s, time.monotonic() - self._since) < _QUICK_S

    def check(self) -> None:
        """Raise OperationalError if it is another file now, or none."""
        if self._path is None:
            return
        try:
            found = os.stat(self._path)
        except OSError as error:
            if self._opened is None:
                return  # it is about to be made
            raise peewee.OperationalError(f"the file {self._path} is gone; put it back, and the tower goes on") from error
        now = (found.st_dev, found.st_ino)
        self._opened = self._opened or now
        if now != self._opened:
            raise peewee.OperationalError(f"the file {self._path} was replaced under the running tower; stop it and start again")

    def settle(self, *, has_time: bool = True) -> None:
        """Wait until the disk has everything that was committed before; raise OperationalError if it cannot take it.

        It waits outside of transactions, as SQLite does not: meanwhile others write. A wait serves all who came before it began. Without
        time it waits for that of another a moment only, and raises the same.
        """
        before = self._begun
        if not self._lock.acquire(timeout=-1 if has_time else _QUICK_S):
            raise peewee.OperationalError("the log could not be written yet: the disk is slow")
        try:
            if self.has_failed:
                raise peewee.OperationalError("disk I/O error: the log could not be written")
            if self._ended > before:
                return
            self._begun += 1
            try:
                log = self._open_log()
            except OSError as error:
                raise peewee.OperationalError(f"the log cannot be opened: {error.strerror}") from error
            try:
                if log is not None:
                    self._wait_for(log)
            except OSError as error:
                self.has_failed = True
                raise peewee.OperationalError(f"disk I/O error: {error.strerror}") from error
            self._ended = self._begun
        finally:
            self._lock.release()

    def _wait_for(self, log: int) -> None:
        began = self._since = time.monotonic()
        try:
            _sync(log)
        finally:
            took_s, self._since = time.monotonic() - began, math.inf
            self._took_s = took_s if self._took_s == math.inf else self._took_s + _WEIGHT * (took_s - self._took_s)

    def _open_log(self) -> int | None:
        """Return the log; None if there is none: the last connection has closed, and SQLite has brought the log into the file."""
        if self._log is not None and not self._may_be_another:
            return self._log
        self._may_be_another = False  # before we look: who connects after that says so again
        path = f"{os.path.realpath(str(self._path))}-wal"  # beside the file itself, not beside a link to it
        try:
            if self._log is not None and not os.path.samestat(os.fstat(self._log), os.stat(path)):
                self._let_go()
            if self._log is None:
                self._log = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            self._let_go()
        except OSError:
            self._may_be_another = True
            raise
        return self._log

    def look_again(self) -> None:
        """Note that the log may be another one from now on. It lasts as long as any connection, so that is so for each new one."""
        self._may_be_another = True

    def close(self) -> None:
        """Let the log go."""
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        """Close the log, which is safe: SQLite's locks, which a file loses when any descriptor of it is closed, are on other files."""
        log, self._log = self._log, None
        if log is not None:
            os.close(log)

    def checkpoint(self, database: "Sqlite") -> None:
        """Bring the log into the file and wait for the disk; raise OperationalError if that cannot be done."""
        is_busy = database.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        if is_busy:
            raise peewee.OperationalError("database is locked: its log could not be brought into the file")
        self.has_failed = False


class Sqlite(PooledSqliteDatabase):
    """A pool in which whoever writes gets the same connection: one that has not written must read again all that others have."""

    def __init__(self, path: Path, file: File, *, connections: int) -> None:
        def opened(*arguments: Any, **options: Any) -> _Session:
            file.check()  # to open what took its place, beside the journal of the other, could harm both
            return _Session(*arguments, **options)

        super().__init__(
            str(path),
            pragmas={
                "journal_mode": "wal",
                "synchronous": 2,
                "foreign_keys": 1,
                "busy_timeout": _WAIT_MS,
                "wal_autocheckpoint": _CHECKPOINT_PAGES,
            },
            # A transaction that reads first could otherwise not upgrade its lock, whatever the timeout.
            lock_type="IMMEDIATE",
            max_connections=connections,
            timeout=5,
            check_same_thread=False,
            autoconnect=False,
            factory=opened,
        )
        self._file = file
        #: The connection for writing, while nobody uses it. Threads write one by one, so whoever writes finds it here.
        self._pen: _Session | None = None

    def take_pen(self, *, has_time: bool) -> bool:
        """Take the connection for writing for this thread, if it is there; return whether it is taken.

        Without time nothing is waited for, as somebody who opens another one.
        """
        if not self._pool_lock.acquire(blocking=has_time):
            return False
        try:
            pen, self._pen = self._pen, None
        finally:
            self._pool_lock.release()
        if pen:
            self._state.set_connection(pen)
        return pen is not None

    def take(self, *, writing: bool) -> None:
        """Take a connection for this thread, to be given back by `close`."""
        if writing and self.take_pen(has_time=True):
            return
        self.connect()
        if writing:
            session: _Session = self._state.conn
            with self._pool_lock:
                self._in_use.pop(self.conn_key(session))
                self._pool_available.notify()
            session.is_pen = True

    def scope(self, *, is_one_statement: bool, waits: bool, patience_s: float | None = None) -> AbstractContextManager[object]:
        """Let what is done meanwhile be a transaction, or a part of the one that there is.

        No commit waits for the disk; whoever has promised something does so after it, see `File.settle`. With a patience of its own it
        waits so long only for somebody in another process, and leaves it to others to bring the log into the file.
        """
        wanted_ms = _WAIT_MS if patience_s is None else round(patience_s * 1000)
        session: _Session = self._state.conn
        if not self.in_transaction():
            if session.waits:
                self.run("PRAGMA synchronous = NORMAL")
                session.waits = False
            if session.patience_ms != wanted_ms:
                self.run(f"PRAGMA busy_timeout = {wanted_ms}")
                self.run(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES if patience_s is None else 0}")
                session.patience_ms = wanted_ms
        return nullcontext() if is_one_statement else self.atomic()

    def _add_conn_hooks(self, conn: _Session) -> None:
        """Prepare a new connection; by then it holds the log that is there, or has begun another."""
        super()._add_conn_hooks(conn)
        self._file.look_again()

    def close(self) -> bool:
        """Give the connection of this thread back."""
        pen: _Session | None = self._state.conn
        if pen is None or not pen.is_pen or self._state.transactions:
            return bool(super().close())
        self._state.reset()
        self._pen = pen  # whoever writes has the only one, so nobody else can put one here
        return True

    def manual_close(self) -> bool:
        """Close the connection of this thread for good."""
        session: _Session | None = self._state.conn
        if session is not None:
            session.is_pen = False
        return bool(super().manual_close())

    def close_idle(self) -> None:
        """Close the connections that nobody uses."""
        with self._pool_lock:
            pen, self._pen = self._pen, None
            if pen:
                self._close_raw(pen)
            super().close_idle()

    def in_order(self, sql: str) -> str:
        """Return a statement as it is: an index that has its order is taken wherever there is one."""
        return sql

    def run(self, statement: str, values: Sequence[Any] = (), *, in_order: bool = False) -> sqlite3.Cursor:
        """Run a statement, as directly as can be; see `in_order`."""
        try:
            session: _Session = self._state.conn
            return session.execute(statement, values)
        except sqlite3.Error:
            with peewee.__exception_wrapper__:
                raise

    #: Whether there is place for tasks to arrive.
    takes_arrivals = True

    def is_any_arrived(self) -> bool:
        """Whether there is a task that has arrived, and has not been entered yet."""
        return self.run("SELECT 1 FROM task_arrived LIMIT 1").fetchone() is not None

    def enter_arrived(self) -> None:
        """Enter the tasks that have arrived, each with its first event: a trigger does so for each that is deleted here."""
        self.run("DELETE FROM task_arrived")

    def begin(self, lock_type: str | None = None) -> None:
        """Begin a transaction that writes."""
        self.run(f"BEGIN {lock_type or self._lock_type}")

    def commit(self) -> None:
        """Commit it."""
        self.run("COMMIT")

    def rollback(self) -> None:
        """Undo the transaction, unless SQLite has done it already, as it does when the disk is full."""
        if self.connection().in_transaction:
            super().rollback()

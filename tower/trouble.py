"""What a database's failure means, in one line; told once when it begins, and once when it is over."""

import logging
import sqlite3
import threading
import time

import peewee
from playhouse.pool import MaxConnectionsExceeded

from tower.log import Outage

#: Part of what a database says, or the code that Postgres gives in any language, and what that means and needs.
_MEANINGS = (
    (("is full", "no space left", "could not extend file"), ("53100",), "The disk of the database is full; make room there"),
    (("readonly database", "read-only"), ("25006",), "The database can only be read; make it writable"),
    (
        ("is locked", "lock timeout", "statement timeout", "deadlock"),
        ("55P03", "57014", "40P01", "40001"),
        "Somebody holds a lock on the database for too long",
    ),
    (
        ("disk i/o error", "log could not be", "log cannot be"),
        (),
        "The disk of the database does not take what is written; the system's log says more",
    ),
    (
        ("malformed", "not a database"),
        ("XX001", "XX002"),
        "The database file is damaged; stop the tower and restore a backup",
    ),
    (("unable to open database file",), (), "The database file cannot be opened; check its folder and its permissions"),
    (("max connections exceeded",), (), "Every database connection of this process is in use; raise TOWER_DB_POOL"),
    (("too many clients",), ("53300",), "The database takes no more connections; raise its limit or lower TOWER_DB_POOL"),
)
#: Those that say nothing of reading: a read that works does not end them.
_OF_WRITING = _MEANINGS[:4]
#: What psycopg2 files under mistakes of the program, though Postgres or its administrator is at fault: read-only, ended, damaged.
_NO_MISTAKE = ("25006", "25P03", "25P04", "XX")

#: For so long after a write failed, writing is taken to be impossible, unless one works meanwhile.
_WRITES_S = 15.0

_log = logging.getLogger("tower.db")


def first_of(error: BaseException) -> BaseException:
    """Return what failed first: SQLite ends a transaction by itself when its disk is full, and the rollback that follows fails too."""
    found: BaseException | None = error
    while found is not None and "no transaction is active" in str(found):
        found = found.__context__
    while found is not None and not isinstance(found, peewee.PeeweeException | MaxConnectionsExceeded):
        found = found.__context__
    return found or error


def explain(error: BaseException) -> str:
    """Return what the failure means, and what the database said."""
    said, meaning = _said(error), _meaning(error)
    return f"{meaning[-1]} ({said})." if meaning else f"The database does not answer: {said}."


def _said(error: BaseException) -> str:
    error = first_of(error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _meaning(error: BaseException) -> tuple[tuple[str, ...], tuple[str, ...], str] | None:
    code, low = _code(first_of(error)), _said(error).lower()
    return next((known for known in _MEANINGS if code in known[1] or any(word in low for word in known[0])), None)


def is_outage(error: BaseException) -> bool:
    """Whether the database may be fine again later: it restarted, was locked, full, read-only, or every connection was in use."""
    error = first_of(error)
    if isinstance(error, peewee.OperationalError | peewee.InterfaceError | MaxConnectionsExceeded):
        # SQLite reports a mistake in a statement like an outage.
        return getattr(error.__cause__ or error.__context__, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR
    if isinstance(error, peewee.InternalError) and _code(error).startswith(_NO_MISTAKE):
        return True
    return isinstance(error, peewee.DatabaseError) and any(word in str(error) for word in ("malformed", "not a database", "read-only"))


def _code(error: BaseException) -> str:
    return getattr(error.__cause__ or error.__context__, "pgcode", None) or ""


class Trouble:
    """What the last tries of this process say about its database."""

    def __init__(self) -> None:
        self._outage = Outage(_log, "the database answers again")
        self._lock = threading.Lock()
        self._message: str | None = None
        self._was_writing = False
        self._since = 0.0
        #: When it answered last.
        self._answered_at = 0.0
        #: What was said when a write failed last, and when; no error, which would keep open what its frames have at hand.
        self._write_failed: tuple[str, float] | None = None

    def begin(self, error: BaseException, *, writing: bool, tried_at: float) -> None:
        """Note that reading or writing failed; that no answer came is no news if one has come since this try began."""
        if _meaning(error) is None and tried_at < self._answered_at:
            return
        message = explain(error)
        with self._lock:
            self._message, self._since = message, time.monotonic()
            self._was_writing = writing and _meaning(error) in _OF_WRITING
        self._outage.begin("%s Nothing accepted is lost: new tasks are refused, running ones go on while their leases last.", message)

    def suspect(self, error: BaseException) -> None:
        """Note why a write failed that is going to be tried again."""
        self._write_failed = _said(error), time.monotonic()

    def suspected(self) -> peewee.OperationalError | None:
        """Return why others could not write lately, which is most likely why whoever stands behind them cannot; None if they could."""
        failed = self._write_failed
        return peewee.OperationalError(failed[0]) if failed and time.monotonic() - failed[1] < _WRITES_S else None

    def end(self, *, writing: bool) -> None:
        """Note that reading or writing worked; a read that works says nothing about writing."""
        self._answered_at = time.monotonic()
        if writing:
            self._write_failed = None
        if self._message is not None and (writing or not self._was_writing):
            with self._lock:
                self._message = None
            self._outage.end()

    def now(self) -> str | None:
        """Return what is wrong, None if nothing is known to be."""
        message = self._message
        return message if message is None or time.monotonic() - self._since < _WRITES_S else None

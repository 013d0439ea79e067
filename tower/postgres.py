"""Postgres as the tower uses it: its statements are prepared."""

import itertools
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import psycopg2.extensions  # type: ignore[import-untyped]
from playhouse.pool import PooledPostgresqlDatabase

#: A pooled connection that was used so many seconds ago is taken to be alive.
_TRUSTED_S = 1.0
#: Statements that are prepared on a connection at most.
_MOST_PREPARED = 300
#: A statement with more values is one of a large batch: it is rarely the same again, and its plan takes memory.
_MOST_VALUES = 250


class Session(psycopg2.extensions.connection):
    """A connection, the statements that are prepared on it, and when it was last used."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._prepared: dict[str, str] = {}
        self.used_at = time.monotonic()

    def spell(self, statement: str, values: Sequence[Any]) -> tuple[str | None, str]:
        """Return what has to be prepared first, if anything, and how a statement is sent with these values.

        It is prepared from its second time on this connection on, since to plan it costs more than to run it.
        """
        plain = statement.replace("?", "%s")
        if len(values) > _MOST_VALUES:
            return None, plain
        known = self._prepared.get(statement)
        if known is None:
            if len(self._prepared) < _MOST_PREPARED:
                self._prepared[statement] = ""
            return None, plain
        first = None
        if not known:
            known = self._prepared[statement] = f"tower_{len(self._prepared)}_{abs(hash(statement))}"
            first = f"PREPARE {known} AS {_numbered(statement)}"
        return first, f"EXECUTE {known} ({', '.join(['%s'] * len(values))})" if values else f"EXECUTE {known}"


class Postgres(PooledPostgresqlDatabase):
    """A database of so many connections at most."""

    def __init__(self, connections: int, **options: Any) -> None:
        super().__init__(connection_factory=Session, max_connections=connections, timeout=5, autoconnect=False, **options)

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

    def run(self, statement: str, values: Sequence[Any]) -> Any:
        """Run a statement with a question mark for each value; see `Session.spell`."""
        session: Session = self.connection()
        first, text = session.spell(statement, values)
        if first:
            self.execute_sql(first)
        return self.execute_sql(text, values)


@lru_cache(maxsize=500)
def _numbered(statement: str) -> str:
    """Return a statement with $1, $2, … in place of its question marks."""
    numbers = itertools.count(1)
    return re.sub(r"\?", lambda _: f"${next(numbers)}", statement)

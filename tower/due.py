"""What has come due: all that a pass of the sweep looks at before it does anything, in one question to the database."""

import time
from dataclasses import dataclass
from typing import Any

from tower import db
from tower.models import behind, in_line, not_yet, waiting
from tower.spec import MAX_WINDOW_S
from tower.terms import DISPATCHED, RUNNING

#: After so many seconds no pass can be about to look for a task that has arrived.
_OVERLOOKED_S = 1.0


@dataclass(frozen=True)
class Look:
    """What a pass looks at, from one moment: so an idle tower asks once, and writes nothing."""

    now: float
    #: How far the database's clock is ahead of our own.
    ahead_s: float
    running: list[dict[str, Any]]
    workers: list[dict[str, Any]]
    #: Whether there is any: that is late, whose time has come, whose nudge or trace is due, or of which nothing needs to be known any more.
    late: bool
    wakes: bool
    queued: bool
    dispatched: bool
    untraced: bool
    old_starts: bool
    #: Whether a task has arrived a while ago and nobody has looked for it since.
    overlooked: bool
    #: How many rows have left the place where tasks arrive and are still in it, and its size in bytes; 0 on SQLite, where none stays.
    arrivals_left: int
    arrivals_size: int
    #: In how many seconds the next task may start, or may start no more; None if none is known.
    next_s: float | None


#: What makes up a look; the conditions in braces are put in when the database is known. The time is asked for by itself: Postgres looks
#: for no row by a clock that goes on, and would go over all that is due later.
_DUE = {
    "late": "{waiting} AND expires_at IS NOT NULL AND expires_at <= {instant}",
    "wakes": "{not_yet} AND ready_at <= {instant}",
    "queued": "id = (SELECT id FROM task WHERE {in_line} AND nudge_at <= {instant} ORDER BY rank, id LIMIT 1)",
    "dispatched": "{dispatched} AND nudge_at <= {instant}",
    "untraced": "{begun} AND trace_due_at <= {instant} UNION ALL SELECT 1 FROM task WHERE {behind} AND trace_due_at <= {instant}",
}
_RUNNING = """
SELECT task.id, attempt, beat, worker_id, pid, pid_space, pid_started, host
FROM task LEFT JOIN worker ON worker.id = worker_id WHERE {running}"""
_OLD_STARTS = "EXISTS (SELECT 1 FROM task_start WHERE at < {instant} - {window}) AS old_starts"
_NEXT_DUE = """
SELECT MIN(at) - {{now}} AS wait FROM (
    SELECT MIN(ready_at) AS at FROM task WHERE {not_yet} AND ready_at > {{now}}
    UNION ALL SELECT MIN(expires_at) FROM task WHERE {waiting} AND expires_at IS NOT NULL AND expires_at > {{now}}
) AS due"""
_ANY_DUE = ", ".join([*(f"EXISTS (SELECT 1 FROM task WHERE {found}) AS {name}" for name, found in _DUE.items()), _OLD_STARTS])
_OVERLOOKED = f"SELECT EXISTS (SELECT 1 FROM task_arrived WHERE created_at < {{{{now}}}} - {_OVERLOOKED_S}) AS overlooked"
_PLACE = "pg_stat_get_dead_tuples('task_arrived'::regclass) AS dead, pg_relation_size('task_arrived') AS bytes"
_ANY_PLACE = "0 AS dead, 0 AS bytes"
_LOOK = (_RUNNING, "SELECT * FROM worker", f"SELECT {_ANY_DUE}", _NEXT_DUE)


def look() -> Look:
    """Look at what a pass of the sweep may have to do."""
    begun, lagging = behind()
    conditions = {"in_line": in_line().sql, "not_yet": not_yet().sql, "waiting": waiting().sql, "window": MAX_WINDOW_S}
    conditions |= {"begun": begun.sql, "behind": lagging.sql, "instant": "(SELECT {now})"}
    conditions |= {status: f"status = '{status}'" for status in (DISPATCHED, RUNNING)}
    statements = [statement.format(**conditions) for statement in (*_LOOK, f"{_OVERLOOKED}, {_PLACE if db.is_postgres() else _ANY_PLACE}")]
    at, (now, (running, workers, (due,), (following,), (place,))) = db.read(
        lambda: (time.monotonic(), db.several(statements)), sees_arrived=False
    )
    is_due = {name: bool(is_any) for name, is_any in due.items()}
    return Look(
        now,
        now - at,
        running,
        workers,
        **is_due,
        overlooked=bool(place["overlooked"]),
        arrivals_left=place["dead"],
        arrivals_size=place["bytes"],
        next_s=following["wait"],
    )

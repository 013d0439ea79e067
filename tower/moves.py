"""How a task's status is changed: one guarded update and the event of each row it changed, together.

`move` is for what happens now and then. The others are hand-written, because they run in the life of every task: for many tasks at once,
and in Postgres as one statement each, which is a transaction by itself. In SQLite that holds for new tasks without a key. What brings
along no more than most only arrives, which writes a fraction of that, and is entered later, together with others.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from string import Formatter
from typing import Any

from peewee import SQL

from tower import arrived, db, log
from tower.models import Task, TaskEvent
from tower.reminders import NUDGE_S, TRACE_S, WAITING_TRACE_S
from tower.terms import CANCELLED, DISPATCHED, FAILED, QUEUED, RUNNING, SUCCEEDED, TIMED_OUT

#: What may follow each status. Nothing follows a final one.
ARROWS: dict[str, tuple[str, ...]] = {
    QUEUED: (DISPATCHED, CANCELLED, TIMED_OUT),
    DISPATCHED: (RUNNING, QUEUED, CANCELLED, TIMED_OUT),
    RUNNING: (SUCCEEDED, FAILED, CANCELLED, TIMED_OUT, QUEUED),
    SUCCEEDED: (),
    FAILED: (),
    CANCELLED: (),
    TIMED_OUT: (),
}

Row = dict[str, Any]

#: Rows written by one statement: SQLite takes 32,766 values.
ROWS = 500

#: What a new task brings along, with the types that Postgres cannot guess from a list of values.
_GIVEN = {
    **dict.fromkeys(("id", "type", "queue", "title", "payload", "labels", "requested_by"), "text"),
    "priority": "integer",
    **dict.fromkeys(("not_before", "expires_at"), "double precision"),
    "concurrency_key": "text",
    "concurrency_limit": "integer",
    "rate_key": "text",
    "rate_limit": "integer",
    "rate_per_s": "double precision",
    **dict.fromkeys(("lane", "idempotency_key", "idempotency_hash", "parent_id", "correlation_id", "retry_of"), "text"),
    "max_attempts": "integer",
    "max_losses": "integer",
    "timeout_s": "double precision",
    "silence_s": "double precision",
}
#: What most tasks have no value for.
_GIVEN_AT_TIMES = (
    *("title", "requested_by", "not_before", "expires_at", "concurrency_key", "rate_key", "rate_limit", "rate_per_s", "silence_s"),
    *("idempotency_key", "idempotency_hash", "parent_id", "retry_of"),
)
_GIVEN_ALWAYS = tuple(name for name in _GIVEN if name not in _GIVEN_AT_TIMES)
#: What each task has for itself.
_OWN = ("id", "payload", "correlation_id")
#: Texts that can stand in a statement as they are.
_PLAIN = re.compile(r"[\w.:/-]*|{}", re.ASCII)
#: Returns what a task has in them, in order, to see whether it has any.
_at_times, _NEVER = itemgetter(*_GIVEN_AT_TIMES), (None,) * len(_GIVEN_AT_TIMES)
#: The columns of a new task, what stands in them, and what returns the values that that asks for.
_Shape = tuple[str, str, Callable[[Row], tuple[Any, ...]]]
#: By the values that are shared. No more of them: whoever gives each task a time limit of its own, say, shall not fill the connections.
_shapes: dict[tuple[Any, ...], _Shape] = {}
_MOST_SHAPES = 50
#: What it gets; `at` is the time of the statement.
_MADE = {
    "status": f"'{QUEUED}'",
    **dict.fromkeys(("attempt", "failures", "losses", "beat", "nudges", "traced_seq", "traced_bytes", "trace_tries"), "0"),
    "seq": "1",
    "rank": "{at} - {priority}",
    "ready_at": "CASE WHEN {not_before} > {at} THEN {not_before} ELSE 0 END",
    "nudge_at": f"CASE WHEN {{not_before}} > {{at}} THEN {{not_before}} ELSE {{at}} + {NUDGE_S} END",
    "trace_due_at": f"{{at}} + {WAITING_TRACE_S}",
    **dict.fromkeys(("created_at", "queued_at", "updated_at"), "{at}"),
}
_EVENT = "INSERT INTO task_event (task_id, seq, attempt, at, kind, data)"
#: In Postgres, the events of the rows that a statement named `moved` has changed.
_TELLING = "SELECT id, seq, attempt, updated_at, ?, ? FROM moved"
_TOLD = f"{_EVENT} {_TELLING}"
_TOLD_PLAINLY = f"{_EVENT} SELECT id, seq, attempt, updated_at, '{QUEUED}', '{{}}' FROM moved"
#: The event before that, of an attempt earlier.
_TELLING_BEFORE = "SELECT id, seq - 1, attempt - 1, updated_at, ?, ? FROM moved"

_log = logging.getLogger("tower.task")

#: A statement written by hand, and its values.
Statement = tuple[str, Sequence[Any]]
_NONE: Statement = ("", ())


def insert(tasks: Sequence[Row], data: dict[str, Any]) -> set[str]:
    """Insert tasks as queued, each with its first event; return the ids of those whose id and key were new."""
    return {row["id"] for some in pieces(tasks) for row in _insert(some, data)}


def _insert(tasks: Sequence[Row], data: dict[str, Any]) -> list[Row]:
    statement, values = _insertion(tasks)
    return _with_events({"moved": (statement, values)}, "queued", data)


def enter(tasks: Sequence[Row], data: dict[str, Any]) -> None:
    """Insert tasks as `insert` does, none of which has a key; each piece is one statement, on SQLite too a transaction by itself."""
    for some in pieces(tasks):
        db.rows(*_entry(some, data))
        _tell_new(some, data)


def send(tasks: Sequence[Row], data: dict[str, Any], then: db.Then) -> bool:
    """Insert tasks as `enter` does, by one statement that the event loop waits for; see `db.send`."""

    def entered(error: Exception | None) -> None:
        if error is None:
            _tell_new(tasks, data)
        then(error)

    return db.send(*_entry(tasks, data, is_first_try=True), entered)


def _entry(tasks: Sequence[Row], data: dict[str, Any], *, is_first_try: bool = False) -> Statement:
    """Return the statement that inserts tasks with their first events, and its values."""
    event = ["queued", _text(data)]
    if (len(tasks) == 1 or db.is_postgres()) and all(map(_may_arrive, tasks)) and db.takes_arrivals():
        names, rows, values = _new(tasks, "CAST(? AS text), ", _ARRIVES)
        return f"INSERT INTO task_arrived (data, {names}) {rows}", [event[1], *values]
    if db.is_postgres():
        statement, values = _insertion(tasks, "" if is_first_try else _UNLESS_THERE)
        if not data:
            return f"WITH moved AS ({statement}) {_TOLD_PLAINLY}", values
        return f"WITH moved AS ({statement}) {_TOLD}", [*values, *event]
    names, rows, values = _new(tasks, "?, ?, ")
    return f"INSERT INTO task_entry (kind, data, {names}) {rows}", [*event, *values]


#: What a task brings along that only arrives. It is entered with others, by whoever looks next; see `db.enter_arrived`.
_ARRIVES = tuple(name for name in _GIVEN_ALWAYS if name != "labels")
_MADE_THEN = {name: text for name, text in _MADE.items() if name in ("rank", "nudge_at", "trace_due_at", "created_at")}
#: Characters of a payload that is written twice, there and where it is entered.
_MOST_ARRIVING = 1500


def _may_arrive(task: Row) -> bool:
    """Whether a task brings along no more than most, and nothing that would better be written once."""
    return _at_times(task) == _NEVER and task["labels"] == "{}" and len(task["payload"]) <= _MOST_ARRIVING


def _tell_new(tasks: Sequence[Row], data: dict[str, Any]) -> None:
    _tell([{"id": task["id"], "attempt": 0} for task in tasks], "queued", data)


#: After a commit whose answer was lost they are there. To look for that takes Postgres a twentieth of the whole.
_UNLESS_THERE = "ON CONFLICT DO NOTHING"


def _insertion(tasks: Sequence[Row], or_else: str = _UNLESS_THERE) -> Statement:
    """Return the statement that inserts tasks, and its values."""
    names, rows, values = _new(tasks)
    return f"INSERT INTO task ({names}) {rows} {or_else} RETURNING id, seq, attempt, created_at AS updated_at", values


def _new(tasks: Sequence[Row], first: str = "", given: Sequence[str] | None = None) -> tuple[str, str, Sequence[Any]]:
    """Return the columns of new tasks, the rows to insert, and their values; what most have no value for is left out if none has."""
    if given is None:
        given = _GIVEN_ALWAYS if all(_at_times(task) == _NEVER for task in tasks) else tuple(_GIVEN)
    if len(tasks) == 1:  # to select it from a list would cost a third more
        names, taken, values_of = _shape(tasks[0], given)
        return names, f"VALUES ({first}{taken})", values_of(tasks[0])
    source, values = db.listed([[task[name] for name in given] for task in tasks])
    names, taken = _listed(given)
    return names, f"SELECT {first}{taken} FROM {source} WHERE true", values


def _shape(task: Row, given: Sequence[str]) -> _Shape:
    """Return the columns of a new task, what stands in them, and what returns the values that that asks for.

    In Postgres what it shares with most others of its type stands there itself: a value costs more than a word of a plan that is kept, and
    with twelve fewer the whole took a seventh less.
    """
    if not db.is_postgres():
        return _general(given)
    names, values_of = _shared(given)
    values = values_of(task)
    known = _shapes.get(values)
    if known or len(_shapes) >= _MOST_SHAPES or not all(map(_is_plain, values)):
        return known or _general(given)
    _shapes[values] = _shaped(given, dict(zip(names, map(repr, values), strict=True)))
    return _shapes[values]


@lru_cache
def _shared(given: Sequence[str]) -> tuple[list[str], Callable[[Row], tuple[Any, ...]]]:
    """Return the columns in which a new task may have the same as others, and what returns its values there."""
    names = [name for name in given if name not in _OWN]
    return names, itemgetter(*names)


@lru_cache
def _general(given: Sequence[str]) -> _Shape:
    return _shaped(given, {})


def _shaped(given: Sequence[str], shared: dict[str, str]) -> _Shape:
    names, taken = _taken(given, [shared.get(name, "?") for name in given])
    # Some are asked for more than once.
    asked = [*given, *(name for text in _made(given).values() for _, name, _, _ in Formatter().parse(text) if name and name in given)]
    return names, taken, itemgetter(*(name for name in asked if name not in shared))


def _made(given: Sequence[str]) -> dict[str, str]:
    return _MADE_THEN if given == _ARRIVES else _MADE


def _is_plain(value: Any) -> bool:
    return bool(_PLAIN.fullmatch(value)) if isinstance(value, str) else value is not None and math.isfinite(value)


@lru_cache
def _listed(given: Sequence[str]) -> tuple[str, str]:
    return _taken(given, [f"column{number}" for number, _ in enumerate(given, 1)])


def _taken(given: Sequence[str], places: Sequence[str]) -> tuple[str, str]:
    """Return the columns of a new task, and what stands in them, if the values given for some stand in these places."""
    typed = {name: f"CAST({place} AS {_GIVEN[name]})" for name, place in zip(given, places, strict=True)}
    made = _made(given)
    values = (text.format(**{"at": "{moment}", "not_before": "NULL", **typed}) for text in made.values())
    return ", ".join([*given, *made]), ", ".join([*typed.values(), *values])


def pieces(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield rows, as many at a time as one statement writes."""
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]


def change(
    target: str,
    sources: Iterable[str],
    kind: str,
    data: dict[str, Any],
    *,
    where: str,
    via: str = "",
    sets: Mapping[str, str] | None = None,
    more: str = "0",
    given: str = "",
    values: Sequence[Any] = (),
    returning: Sequence[str] = (),
    allowed: Statement = _NONE,
    also: Statement = _NONE,
    places: Mapping[str, str] | None = None,
) -> list[Row]:
    """Change the status of the rows that still are where they should be, and append the event of each; return what they are now.

    `via` is a status that they pass through at that moment, with an event of that name before the new attempt. `sets` by column, `given`
    (what stands behind FROM) and `where` are SQL, with a question mark for each of `values` in that order; `more` is SQL for how many
    numbers before that of the event something else takes. `allowed` is a statement that returns a row, else nothing changes. Two are for
    Postgres alone: `also`, a statement of the same moment, which can select from `moved`, and `places`, where tasks have arrived to
    which the same is to happen, by id.
    """
    sources = checked(sources, via or target)
    if via:
        checked((via,), target)
    if allowed[0] and not db.is_postgres():
        if not db.rows(*allowed):
            return []
        allowed = _NONE
    patience_s = WAITING_TRACE_S if target in (QUEUED, DISPATCHED) else TRACE_S
    returned = ", ".join(dict.fromkeys(("id", "seq", "attempt", "type", "updated_at", *returning)))
    becomes = {
        "status": f"'{target}'",
        "seq": f"seq + {2 if via else 1} + {more}",
        "updated_at": "{now}",
        "trace_tries": "0",
        "trace_due_at": f"{{now}} + {patience_s}",
        **(sets or {}),
    }
    if_allowed = "AND EXISTS (SELECT 1 FROM allowed)" if allowed[0] else ""
    statement = f"""
        UPDATE task SET {", ".join(f"{name} = {value}" for name, value in becomes.items())} {given and f"FROM {given}"}
        WHERE {where} AND {_is_one_of(sources)} {if_allowed} RETURNING {returned}"""
    steps = {"allowed": allowed, "moved": (statement, values)}
    if places:
        steps = {"allowed": allowed, **_moved_or_entered(statement, values, places, becomes, returned, if_allowed)}
    return _with_events(steps, kind, data, via=via, also=also)


def _moved_or_entered(
    move: str, values: Sequence[Any], places: Mapping[str, str], becomes: Mapping[str, str], returned: str, if_allowed: str
) -> dict[str, Statement]:
    """Return the steps that change rows of `task`, as `move` does, and enter, changed alike, those that are still where they arrived."""
    those, named = db.among("id", list(places))
    # There may be another one in its place by now, and whoever locks it is about to enter it.
    still = f"SELECT ctid FROM task_arrived WHERE ctid = ANY (CAST(? AS tid[])) AND {those} FOR UPDATE SKIP LOCKED"
    gone = f"DELETE FROM task_arrived WHERE ctid = ANY (ARRAY({still})) {if_allowed}"
    entering = arrived.entering(gone, returned, becomes)
    where = "{" + ",".join(f'"{place}"' for place in places.values()) + "}"
    given = {"gone": [where, *named], "entered": values[: sum(value.count("?") for value in becomes.values())]}
    both = f"SELECT {returned} FROM changed UNION ALL SELECT {returned} FROM entered"
    steps = {name: (step, given.get(name, ())) for name, step in entering.items()}
    return {"changed": (move, values), **steps, "moved": (both, ())}


def _is_one_of(sources: Sequence[str]) -> str:
    """Return the condition that a task has one of these statuses; no task is looked for by it."""
    names = ", ".join(f"'{source}'" for source in sources)
    return f"{db.aside('status')} IN ({names})"


def checked(sources: Iterable[str], target: str) -> tuple[str, ...]:
    """Return the statuses; raise ValueError if one cannot be followed by the target."""
    sources = tuple(sources)
    illegal = [source for source in sources if target not in ARROWS[source]]
    if illegal:
        raise ValueError(f"No arrow leads from {illegal[0]} to {target}.")
    return sources


def _with_events(steps: Mapping[str, Statement], kind: str, data: dict[str, Any], *, via: str = "", also: Statement = _NONE) -> list[Row]:
    """Change rows by steps of which one is named `moved`, and append the event of each; return them."""
    told = [(1, via, "{}"), (0, kind, _text(data))] if via else [(0, kind, _text(data))]
    if db.is_postgres():
        events = [_TELLING_BEFORE if back else _TELLING for back, _, _ in told]
        if "entered" in steps:
            events.append(arrived.EVENTS)
        tell = f"{_EVENT} {' UNION ALL '.join(events)}", [value for _, *event in told for value in event]
        whole = {name: step for name, step in {**steps, "told": tell, "more": also}.items() if step[0]}
        statement = arrived.together({name: step for name, (step, _) in whole.items()}, "SELECT * FROM moved")
        rows = db.rows(statement, [value for _, values in whole.values() for value in values])
    else:
        rows = db.rows(*steps["moved"])
        insert_lines(
            _EVENT,
            [(row["id"], row["seq"] - back, row["attempt"] - back, row["updated_at"], *event) for back, *event in told for row in rows],
        )
    if via:
        _tell([{**row, "attempt": row["attempt"] - 1} for row in rows], via, {})
    _tell(rows, kind, data)
    return rows


def insert_lines(into: str, lines: Sequence[tuple[Any, ...]]) -> None:
    """Insert lines of values, with as many statements as they need."""
    for some in pieces(lines):
        db.rows(f"{into} VALUES {db.tuples(len(some), len(some[0]))}", [value for line in some for value in line])


def move(
    where: Any, sources: Iterable[str], target: str, kind: str, data: dict[str, Any], *, returning: Sequence[str] = (), **changes: Any
) -> list[Row]:
    """Change the status of the rows that still are where they should be, and append the event of each; see `change`."""
    sources = checked(sources, target)
    patience_s = WAITING_TRACE_S if target in (QUEUED, DISPATCHED) else TRACE_S
    rows = list(
        Task.update(
            status=target,
            seq=Task.seq + 1,
            updated_at=db.now(),
            trace_tries=0,
            trace_due_at=db.now() + patience_s,
            **changes,
        )
        .where(where, SQL(_is_one_of(sources)))
        .returning(Task.id, Task.seq, Task.attempt, Task.type, Task.updated_at, *(getattr(Task, name) for name in returning))
        .dicts()
    )
    record(rows, kind, data)
    return rows


def record(rows: Sequence[Row], kind: str, data: dict[str, Any]) -> None:
    """Append an event to each of these rows, which have its number."""
    if not rows:
        return
    text = _text(data)
    TaskEvent.insert_many(
        [
            {"task_id": row["id"], "seq": row["seq"], "attempt": row["attempt"], "at": row["updated_at"], "kind": kind, "data": text}
            for row in rows
        ]
    ).execute()
    _tell(rows, kind, data)


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")) if data else "{}"


def _tell(rows: Sequence[Row], kind: str, data: dict[str, Any]) -> None:
    """Tell the process log, once it is committed."""
    if not rows or not _log.isEnabledFor(logging.INFO):
        return
    told = {name: value for name, value in data.items() if name not in ("message",)}

    def tell() -> None:
        for row in rows:
            _log.info(kind, extra=log.context(row["id"], row["attempt"], **told))

    db.database.after_commit(tell)

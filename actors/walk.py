"""A walk over the waiting tasks, which chooses those that may start."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from peewee import Tuple, ValuesList

from tower import db, lifecycle, load
from tower.decision import (
    CONCURRENCY_KEY,
    KEY,
    QUARANTINE,
    QUEUE_LIMIT,
    RATE_LIMIT,
    TOWER_LIMIT,
    TYPE,
    TYPE_LIMIT,
    Load,
    Row,
    choose,
    obstacle,
    openings,
    restricted,
)
from tower.models import Task, in_line

#: What keeps a task from starting until another one ends, though slots are free.
_UNTIL_AN_END = frozenset({CONCURRENCY_KEY, QUARANTINE, TYPE_LIMIT, QUEUE_LIMIT, TOWER_LIMIT})
#: Waiting tasks looked at together.
PAGE = 200
#: Lanes that are looked at one by one, and tasks at their heads; beyond that all tasks are walked in their order.
LANES = 100
_MOST_HEADS = 10_000
#: Tasks that have arrived and are looked at together, and how many may wait there, since each look goes over all of them.
_ARRIVED_PAGE, _MOST_ARRIVED = 500, 5000


class Walk:
    """One walk over the waiting tasks in their order, which leaves out what it has seen cannot start.

    The load only grows meanwhile, so what could not start once cannot start later in the walk either: one is enough.
    """

    def __init__(self, begin: Load, lanes: Sequence[Row] | None, arrived: Sequence[Row] = ()) -> None:
        self.load = begin
        #: The first task of each lane, if that is known.
        self._lanes = lanes
        #: The first tasks that wait, if these have only arrived, and where they are.
        self.arrived = arrived
        self.places = {row["id"]: row["place"] for row in arrived}
        #: When the first of the rates frees that hold up a task.
        self.frees_at: float | None = None
        #: Whether the end of another task would let one start that was left.
        self.is_held_up = False
        self._is_first = True
        self._is_over = False
        self._after: tuple[float, str] | None = None
        #: The tasks that may start, in their order, and their queues.
        self.chosen, self.queues = list[str](), set[str]()
        self._starts = Counter[str]()
        self._blocked_keys = set[tuple[str, int]]()
        self._blocked_rates = set[tuple[str, int, float]]()

    @property
    def goes_on(self) -> bool:
        """Whether there may be another task that can start."""
        return not self._is_over and bool(self.load.open_queues())

    def step(self) -> None:
        """Choose from the next tasks."""
        heads = self._heads() if self._is_first else None
        self._is_first = False
        rows = self._page() if heads is None else heads
        load.add_starts(self.load, rows, self._starts)
        chosen, self.load = choose(rows, self.load)
        picked = set(chosen)
        taken = [row for row in rows if row["id"] in picked]
        self.chosen += chosen
        self.queues.update(row["queue"] for row in taken)
        self._starts.update(row["rate_key"] for row in taken if row["rate_key"] is not None)
        self._learn(row for row in rows if row["id"] not in picked)
        self._is_over = len(rows) < PAGE if heads is None else len(self.arrived) < _ARRIVED_PAGE
        self._after = (rows[-1]["rank"], rows[-1]["id"]) if rows else None

    def _heads(self) -> Sequence[Row] | None:
        """Return as many tasks of each lane as it has openings, and one more, in order, if the lanes are few; None if they are not.

        Tasks of a lane are restricted alike, so no more of it than these can start, and one that is left tells what the others wait for.
        A crowd behind one full key or rate thus costs one look.
        """
        if self.arrived:
            return self.arrived
        lanes = db.rows(_lanes(), in_order=True) if self._lanes is None else self._lanes
        if len(lanes) > LANES:
            return None
        load.add_starts(self.load, lanes)
        self._learn(lanes)
        wanted = {row["lane"]: count for row in lanes if (count := openings(row, self.load)) > 0}
        if sum(wanted.values()) > _MOST_HEADS:
            return None
        of_lane = _OF_LANE.format(in_line=in_line().sql, in_time=lifecycle.IN_TIME)
        rows = [row for row in lanes if row["lane"] in wanted and row["is_alone"]]
        for lane in wanted.keys() - {row["lane"] for row in rows}:
            rows += db.rows(of_lane, [lane, lane, wanted[lane] + 1], in_order=True)
        return sorted(rows, key=lambda row: (row["rank"], row["id"]))

    def _waiting(self) -> Any:
        return Task.select(*load.COLUMNS).where(in_line(), lifecycle.in_time())

    def _page(self) -> list[dict[str, Any]]:
        if self.arrived:
            db.enter_here()
            self.arrived = ()
        query = self._waiting().where(Task.queue << self.load.open_queues())
        for kind, column in ((TYPE, Task.type), (KEY, Task.concurrency_key)):
            closed = self.load.closed(kind)
            if closed:
                query = query.where(column.is_null() | column.not_in(closed))
        for blocked, columns in (
            (self._blocked_keys, (Task.concurrency_key, Task.concurrency_limit)),
            (self._blocked_rates, (Task.rate_key, Task.rate_limit, Task.rate_per_s)),
        ):
            if blocked:
                query = query.where(columns[0].is_null() | Tuple(*columns).not_in(ValuesList(sorted(blocked))))
        if self._after:
            query = query.where(Tuple(Task.rank, Task.id) > Tuple(*self._after))
        return db.ask(*query.order_by(Task.rank, Task.id).limit(PAGE).sql(), in_order=True)

    def _learn(self, left: Iterable[Row]) -> None:
        """Note what the tasks that were left wait for: others with the same key and limit need not be looked at."""
        for _, alike in groupby(left, restricted):  # all of them are ready, so one tells for those that are restricted alike
            row = next(alike)
            found = obstacle(row, self.load)
            if found is None:
                continue
            self.is_held_up = self.is_held_up or found.reason in _UNTIL_AN_END
            if found.reason == CONCURRENCY_KEY:
                self._blocked_keys.add((row["concurrency_key"], row["concurrency_limit"]))
            elif found.reason == RATE_LIMIT:
                self._blocked_rates.add((row["rate_key"], row["rate_limit"], row["rate_per_s"]))
                self.frees_at = min(found.until or 0.0, self.frees_at or float("inf"))


#: One step along the index of lanes for each lane in which a task waits.
_HEADS = """
WITH RECURSIVE head(id) AS (
    SELECT (SELECT id FROM task WHERE {in_line} ORDER BY lane, rank, id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT id FROM task
        WHERE {in_line} AND lane > (SELECT lane FROM task WHERE id = head.id)
        ORDER BY lane, rank, id LIMIT 1
    ) FROM head WHERE head.id IS NOT NULL
)
SELECT {names}, lane, {in_time} AND NOT EXISTS (
    SELECT 1 FROM task AS other WHERE {in_line} AND other.lane = task.lane AND (other.rank, other.id) > (task.rank, task.id)
) AS is_alone FROM task WHERE {chosen}
"""
#: The first tasks of one lane, whose name is asked for twice: Postgres, which plans for any lane, would go over the queue to find one
#: that it takes for large, and only the index of lanes has this order.
_OF_LANE = f"SELECT {load.NAMES} FROM task WHERE {{in_line}} AND {{in_time}} AND lane >= ? AND lane <= ? ORDER BY lane, rank, id LIMIT ?"


def look(lease_s: float, ahead: float, *, with_lanes: bool = True) -> Walk:
    """Return a walk over what waits now, see `load.read`; with lanes it has what it needs first of all.

    On Postgres tasks may start from where they have arrived. They do if no others wait, since all that wait have one order; else they are
    entered among them before, as they are where they become so many that only an index finds the first.
    """
    begin, lanes, arrived, are_many = _read(lease_s, ahead, with_lanes=with_lanes)
    if arrived and lanes is None and begin.open_queues():
        return look(lease_s, ahead)
    if arrived and (lanes or are_many):
        db.enter_here()
        begin, lanes, *_ = _read(lease_s, ahead, with_lanes=with_lanes)
        arrived = []
    return Walk(begin, lanes, arrived)


def _read(lease_s: float, ahead: float, *, with_lanes: bool) -> tuple[Load, Sequence[Row] | None, Sequence[Row], bool]:
    """Return the load, the first task of each lane if asked for, the first that have arrived, and if there are many more, at one moment."""
    asked = [_lanes()] if with_lanes else []
    if db.is_postgres():
        asked += [_ARRIVED, f"SELECT 1 FROM task_arrived OFFSET {_MOST_ARRIVED} LIMIT 1"]
    begin, found = load.read_beside(lease_s, ahead, *asked)
    lanes = found[0] if with_lanes else None
    if not db.is_postgres():
        return begin, lanes, [], False
    *_, [columns], more = found
    arrived = zip(*(columns[name] or () for name in _NAMES), strict=True)
    return begin, lanes, [{**_AS_ALL, **dict(zip(_NAMES, values, strict=True))} for values in arrived], bool(more)


#: What the decision needs to know of a task that has arrived, and where it is.
_NAMES = ("id", "place", "rank", "queue", "type", "max_losses", "concurrency_limit")
#: The first of them as one row, a list for each column, which is less to write and to read than row by row.
_ARRIVED = f"""
SELECT {", ".join(f"json_agg({name}) AS {name}" for name in _NAMES)} FROM (
    SELECT *, CAST(ctid AS text) AS place FROM task_arrived ORDER BY rank, id LIMIT {_ARRIVED_PAGE}
) AS first
"""
#: What it needs to know beside that: all that have arrived have it alike.
_AS_ALL = {
    "ready_at": 0,
    "attempt": 0,
    "losses": 0,
    **dict.fromkeys(("concurrency_key", "rate_key", "rate_limit", "rate_per_s")),
}


def _lanes() -> str:
    """Return the SELECT of the first task of each lane, and whether it is the only one there; of one lane more than are looked at."""
    chosen = db.found("id", f"SELECT id FROM head WHERE id IS NOT NULL LIMIT {LANES + 1}")
    return _HEADS.format(in_line=in_line().sql, in_time=lifecycle.IN_TIME, chosen=chosen, names=load.NAMES)

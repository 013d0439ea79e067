"""What may start: a pure function of waiting tasks, what is in flight, the rules and a clock.

The orchestrator actor starts tasks by `choose`, and everybody is told why a task waits by `obstacle`, which `choose` asks: so the
reason that is shown is the true one.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

NOT_BEFORE, RETRY_BACKOFF, PAUSED = "not_before", "retry_backoff", "paused"
CONCURRENCY_KEY, RATE_LIMIT, QUARANTINE = "concurrency_key", "rate_limit", "quarantine"
TYPE_LIMIT, QUEUE_LIMIT, TOWER_LIMIT = "type_limit", "queue_limit", "tower_limit"
NO_WORKER, NO_FREE_SLOT = "no_worker", "no_free_slot"

#: What a rule is for. The tower's own has no name.
TOWER, QUEUE, TYPE, KEY, RATE = "tower", "queue", "type", "key", "rate"

#: Tasks that wait at the workers, per slot, so that none idles between two tasks; more where they end faster than passes follow.
PREFETCH = 0.25

Row = Mapping[str, Any]
#: A kind and a name: what rules are for, and what tasks in flight are counted by.
Place = tuple[str, str]


@dataclass(frozen=True)
class Limits:
    """What a rule says of its place."""

    max_running: int | None = None
    rate_limit: int | None = None
    rate_per_s: float | None = None
    paused_at: float | None = None
    paused_by: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Obstacle:
    """Why a task cannot start now, and what would free it."""

    reason: str
    #: Whose limit or pause it is.
    place: Place = (TOWER, "")
    #: How many may be in flight there, or start within `per_s`, and how many are or did.
    limit: int | None = None
    count: int = 0
    per_s: float | None = None
    #: When the clock alone frees it; None if something has to happen.
    until: float | None = None


@dataclass
class Load:
    """What a decision looks at beside the tasks: room, counts, starts, rules, and the time."""

    now: float
    #: How many more may be in flight: in all, and on each queue that a worker serves.
    room: int
    queues: dict[str, int]
    #: How many tasks are in flight in each place.
    running: Counter[Place] = field(default_factory=Counter)
    #: The lowest concurrency limit among the tasks in flight with a key.
    key_limits: dict[str, int] = field(default_factory=dict)
    #: When tasks with a rate key started.
    starts: dict[str, list[float]] = field(default_factory=dict)
    rules: Mapping[Place, Limits] = field(default_factory=dict)
    #: The token of the last decision before this was read, see `models.Decision`.
    token: int = 0
    #: The workers that take tasks, by id.
    workers: frozenset[str] = frozenset()
    #: Queues in which tasks were dispatched that nobody has claimed yet.
    unclaimed: frozenset[str] = frozenset()

    def copy(self) -> "Load":
        """Return one of its own that may change."""
        starts = {key: list(times) for key, times in self.starts.items()}
        return replace(self, queues=dict(self.queues), running=Counter(self.running), key_limits=dict(self.key_limits), starts=starts)

    def add(self, row: Row, count: int = 1) -> None:
        """Count one more task in flight, or so many that are restricted alike, and its start."""
        self._count(row, count)
        key, rate_key = row["concurrency_key"], row["rate_key"]
        if key is not None:
            self.key_limits[key] = min(row["concurrency_limit"], self.key_limits.get(key, row["concurrency_limit"]))
        if rate_key is not None:
            self.starts.setdefault(rate_key, []).extend([self.now] * count)

    def remove(self, row: Row) -> None:
        """Count a task in flight no more; the lowest limit of its key stays until nothing of the key is in flight."""
        self._count(row, -1)
        key = row["concurrency_key"]
        if key is not None and self.running[KEY, key] <= 0:
            self.key_limits.pop(key, None)

    def _count(self, row: Row, by: int) -> None:
        for place in _places(row):
            self.running[place] += by
        self.room -= by
        if row["queue"] in self.queues:
            self.queues[row["queue"]] -= by

    def rule(self, kind: str, name: str) -> Limits:
        """Return what the rules say of a place."""
        return self.rules.get((kind, name), _NO_LIMITS)

    @property
    def is_open(self) -> bool:
        """Whether any task at all could start."""
        whole = self.rule(TOWER, "")
        return self.room > 0 and whole.paused_at is None and not _is_full(self.running[TOWER, ""], whole.max_running)

    def open_queues(self) -> list[str]:
        """Return the queues that can take one more."""
        return [name for name, room in self.queues.items() if room > 0 and not self._is_closed(QUEUE, name)] if self.is_open else []

    def closed(self, kind: str) -> list[str]:
        """Return the names of a kind of which nothing can start, whatever the task says of itself."""
        names = {name for what, name in (*self.rules, *self.running) if what == kind}
        return sorted(name for name in names if self._is_closed(kind, name))

    def _is_closed(self, kind: str, name: str) -> bool:
        rule, limits = self.rule(kind, name), [self.key_limits.get(name)] if kind == KEY else []
        return rule.paused_at is not None or _is_full(self.running[kind, name], rule.max_running, *limits)


_NO_LIMITS = Limits()


def measure(
    now: float, workers: Iterable[Row], in_flight: Iterable[Row], rules: Mapping[Place, Limits], prefetch: float = PREFETCH
) -> Load:
    """Return the load: the workers' slots and a small prefetch, less what is in flight, and what of it counts against which limit.

    Rows of `in_flight` are tasks of one queue, type and concurrency key, with as many losses: their `count`, how many of them are
    `holding` a slot of a worker that stays, and their `lowest` concurrency limit.
    """
    room, queues = 0, dict[str, int]()
    for worker in workers:
        takes = math.ceil(worker["slots"] * (1 + prefetch))
        room += takes
        for queue in worker["queues"] if takes else ():  # a worker that is stopping has no slots left and serves nothing
            queues[queue] = queues.get(queue, 0) + takes
    running, lowest = Counter[Place](), dict[str, int]()
    for row in in_flight:
        room -= row["holding"]
        if row["queue"] in queues:
            queues[row["queue"]] -= row["holding"]
        for place in _places(row):
            running[place] += row["count"]
        key = row["concurrency_key"]
        if key is not None:
            lowest[key] = min(row["lowest"], lowest.get(key, row["lowest"]))
    return Load(now, room, queues, running, lowest, {}, rules)


def choose(candidates: Iterable[Row], load: Load) -> tuple[list[str], Load]:
    """Return the ids of the candidates, which come in order, that may start, and the load when they have."""
    chosen, load = list[str](), load.copy()
    for _, alike in groupby(candidates, restricted):  # what holds for one holds for all of them, and is asked once
        if not load.is_open:
            break
        ready = [row for row in alike if row["ready_at"] <= load.now]
        count = min(openings(ready[0], load), len(ready)) if len(ready) > 1 else int(bool(ready) and obstacle(ready[0], load) is None)
        if count:
            chosen += [row["id"] for row in ready[:count]]
            load.add(ready[0], count)
    return chosen, load


#: All that a task is restricted by, beside its time: whatever `openings` reads of it.
restricted = itemgetter(
    *("queue", "type", "concurrency_key", "concurrency_limit", "rate_key", "rate_limit", "rate_per_s", "losses", "max_losses")
)


def obstacle(row: Row, load: Load) -> Obstacle | None:
    """Return why a queued task cannot start under this load; None if it can."""
    return next(obstacles(row, load), None)


def obstacles(row: Row, load: Load) -> Iterator[Obstacle]:
    """Yield all that keeps a queued task from starting under this load."""
    if row["ready_at"] > load.now:
        yield Obstacle(RETRY_BACKOFF if row["attempt"] else NOT_BEFORE, until=row["ready_at"])
    for place in _places(row):
        if load.rule(*place).paused_at is not None:
            yield Obstacle(PAUSED, place)
    for found in (_quarantine(row, load), _key_limit(row, load), _rate_limit(row, load)):
        if found:
            yield found
    for reason, place, (limit, count) in _uses(row, load):
        if limit is not None and count >= limit:
            yield Obstacle(reason, place, limit, count)
    if row["queue"] not in load.queues:
        yield Obstacle(NO_WORKER, (QUEUE, row["queue"]))
    elif load.room <= 0 or load.queues[row["queue"]] <= 0:
        yield Obstacle(NO_FREE_SLOT, (QUEUE, row["queue"]))


def openings(row: Row, load: Load) -> int:
    """Return how many tasks that are restricted like this one may start under this load."""
    if obstacle(row, load) is not None:
        return 0
    rooms = [load.room, load.queues[row["queue"]]]
    rooms += [limit - count for limit, count in (_key_use(row, load), *(use for _, _, use in _uses(row, load))) if limit is not None]
    rate = rate_of(row, load.rules)
    if rate is not None:
        rooms.append(rate[1] - len(_within(rate, load)))
    if has_last_chance(row):
        rooms.append(1)
    return min(rooms)


def has_last_chance(row: Row) -> bool:
    """Whether a task was lost with its workers twice or more, and fails if that happens once more."""
    return bool(row["losses"] > 1 and row["losses"] >= row["max_losses"] - 1)


def rate_of(row: Row, rules: Mapping[Place, Limits]) -> tuple[str, int, float] | None:
    """Return the rate that a task is held to: its key, how many starts, and within how many seconds; None if it is held to none."""
    key = row["rate_key"]
    if key is None:
        return None
    rule = rules.get((RATE, key), _NO_LIMITS)
    limit, per_s = (rule.rate_limit, rule.rate_per_s) if rule.rate_limit else (row["rate_limit"], row["rate_per_s"])
    return (key, limit, per_s) if limit and per_s else None


def _places(row: Row) -> list[Place]:
    """Return where a task counts."""
    places = [(TOWER, ""), (QUEUE, row["queue"]), (TYPE, row["type"])]
    if row["concurrency_key"] is not None:
        places.append((KEY, row["concurrency_key"]))
    if has_last_chance(row):
        places.append((QUARANTINE, row["queue"]))
    return places


def _quarantine(row: Row, load: Load) -> Obstacle | None:
    """One at a time in a queue: so a task that takes its worker down every time does not end those that were beside it each time."""
    place = (QUARANTINE, row["queue"])
    count = load.running[place] if has_last_chance(row) else 0
    return Obstacle(QUARANTINE, place, 1, count) if count else None


def _key_limit(row: Row, load: Load) -> Obstacle | None:
    limit, count = _key_use(row, load)
    return Obstacle(CONCURRENCY_KEY, (KEY, row["concurrency_key"]), limit, count) if limit is not None and count >= limit else None


def _key_use(row: Row, load: Load) -> tuple[int | None, int]:
    """Return how many tasks with the key of this one may be in flight, None if it has none, and how many are."""
    key = row["concurrency_key"]
    if key is None:
        return None, 0
    limits = (row["concurrency_limit"], load.rule(KEY, key).max_running, load.key_limits.get(key))
    return min(limit for limit in limits if limit is not None), load.running[KEY, key]


def _rate_limit(row: Row, load: Load) -> Obstacle | None:
    rate = rate_of(row, load.rules)
    if rate is None:
        return None
    key, limit, per_s = rate
    within = _within(rate, load)
    if len(within) < limit:
        return None
    return Obstacle(RATE_LIMIT, (RATE, key), limit, len(within), per_s, until=within[-limit] + per_s)


def _within(rate: tuple[str, int, float], load: Load) -> list[float]:
    """Return the starts that count against a rate, in order."""
    key, _, per_s = rate
    # A start that lies ahead shows that the clock was set back: it counts, but not for longer than a window.
    return sorted(at for at in load.starts.get(key, ()) if abs(load.now - at) < per_s)


def _uses(row: Row, load: Load) -> list[tuple[str, Place, tuple[int | None, int]]]:
    """Return how many tasks may be in flight of its type, in its queue and in all, None if nobody has said so, and how many are."""
    named = ((TYPE_LIMIT, (TYPE, row["type"])), (QUEUE_LIMIT, (QUEUE, row["queue"])), (TOWER_LIMIT, (TOWER, "")))
    return [(reason, place, (load.rule(*place).max_running, load.running[place])) for reason, place in named]


def _is_full(count: int, *limits: int | None) -> bool:
    return any(limit is not None and count >= limit for limit in limits)

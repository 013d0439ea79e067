"""The decision what may start, as a pure function: never over a limit, never starving, and nothing idle without a reason."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tower import decision
from tower.decision import (
    KEY,
    NO_FREE_SLOT,
    NO_WORKER,
    QUEUE,
    RATE,
    TOWER,
    TYPE,
    Limits,
    Load,
    Obstacle,
    Place,
    choose,
    measure,
    obstacle,
    obstacles,
    openings,
)

QUEUES, TYPES, KEYS, RATES = ("a", "b", "c"), ("echo", "command"), (None, None, "k1", "k2"), (None, None, "r1", "r2")
Row = dict[str, Any]


def row(number: int = 0, **fields: Any) -> Row:
    """Return a task that nothing restricts, but for the fields given."""
    plain = {
        "id": f"{number:03}",
        "queue": "a",
        "type": "echo",
        "ready_at": 0.0,
        "attempt": 0,
        "losses": 0,
        "max_losses": 3,
        "concurrency_key": None,
        "concurrency_limit": 1,
    }
    return {**plain, "rate_key": None, "rate_limit": None, "rate_per_s": None, "rank": float(number)} | fields


rows = st.builds(
    row,
    queue=st.sampled_from(QUEUES),
    type=st.sampled_from(TYPES),
    concurrency_key=st.sampled_from(KEYS),
    concurrency_limit=st.integers(1, 3),
    rate_key=st.sampled_from(RATES),
    rate_limit=st.integers(1, 4),
    rate_per_s=st.sampled_from([5.0, 20.0]),
    losses=st.sampled_from([0, 0, 0, 1, 2]),
)
candidates = st.lists(rows, max_size=40).map(lambda found: [{**one, "id": f"{n:03}", "rank": float(n)} for n, one in enumerate(found)])

_places = [(TOWER, ""), *((QUEUE, name) for name in "ab"), *((TYPE, name) for name in TYPES), (KEY, "k1")]
limits = st.dictionaries(st.sampled_from(_places), st.builds(Limits, max_running=st.integers(1, 6)), max_size=3)
rates = st.dictionaries(st.just((RATE, "r1")), st.builds(Limits, rate_limit=st.integers(1, 3), rate_per_s=st.just(10.0)))
rules = st.builds(lambda one, other: one | other, limits, rates)
pauses = st.dictionaries(st.sampled_from(_places), st.builds(Limits, paused_at=st.just(1.0)), max_size=1)
workers = st.lists(st.fixed_dictionaries({"slots": st.integers(0, 6), "queues": st.sampled_from([["a"], ["a", "b"]])}), max_size=3)


def grouped(in_flight: Iterable[Row]) -> list[Row]:
    """Return tasks in flight as the rows that `measure` takes, one for each."""
    return [{**one, "count": 1, "holding": 1, "lowest": one["concurrency_limit"]} for one in in_flight]


@st.composite
def loads(draw: st.DrawFn) -> tuple[Load, list[Row]]:
    """Return a load, and the tasks in flight that are part of it: limits may have been set lower meanwhile."""
    in_flight = draw(st.lists(rows, max_size=8))
    load = measure(100.0, draw(workers), grouped(in_flight), draw(rules) | draw(pauses))
    load.starts.update({key: draw(st.lists(st.floats(60, 100), max_size=5)) for key in ("r1", "r2")})
    return load, in_flight


@given(candidates, loads())
def test_a_decision_is_never_over_a_limit(waiting: list[Row], begin: tuple[Load, list[Row]]) -> None:
    """Room, tower, queue, type and key, of several limits the lowest; what is over already starts nothing more."""
    load, in_flight = begin
    chosen, _ = choose(waiting, load)

    picked = [one for one in waiting if one["id"] in chosen]
    assert [one["id"] for one in picked] == chosen
    assert len(chosen) <= max(0, load.room)
    assert all(n <= load.queues.get(name, 0) for name, n in Counter(one["queue"] for one in picked).items())
    for place, rule in load.rules.items():
        there = [one for one in picked if place in _places_of(one)]
        running = [one for one in in_flight if place in _places_of(one)]
        assert not (there and rule.paused_at)
        assert not there or rule.max_running is None or len(there) + len(running) <= rule.max_running
    for key in {one["concurrency_key"] for one in picked} - {None}:
        sharing = [one for one in [*in_flight, *picked] if one["concurrency_key"] == key]
        assert len(sharing) <= min(one["concurrency_limit"] for one in sharing)
    for queue in QUEUES:
        last = [one for one in picked if one["losses"] == 2 and one["queue"] == queue]
        assert len(last) <= (0 if any(one["losses"] == 2 and one["queue"] == queue for one in in_flight) else 1)


def _one_by_one(waiting: Iterable[Row], load: Load) -> tuple[list[str], Load]:
    """What `choose` has to decide, spelled out."""
    chosen, load = list[str](), load.copy()
    for one in waiting:
        if load.is_open and obstacle(one, load) is None:
            chosen.append(one["id"])
            load.add(one)
    return chosen, load


#: Some tasks that are restricted alike, and then some of which each differs from the one before in one thing.
_OTHERS: dict[str, list[Any]] = {
    "queue": list(QUEUES),
    "type": list(TYPES),
    "concurrency_key": [None, "k1", "k2"],
    "concurrency_limit": [1, 2, 3],
    "rate_key": [None, "r1", "r2"],
    "rate_limit": [1, 2, 4],
    "rate_per_s": [5.0, 20.0],
    "losses": [0, 1, 2],
    "max_losses": [1, 2, 3],
    "ready_at": [0.0, 99.0, 101.0],
}


@st.composite
def runs(draw: st.DrawFn) -> list[Row]:
    """Return waiting tasks in runs of such as are alike, or nearly."""
    one, found = draw(rows), list[Row]()
    for _ in range(draw(st.integers(1, 6))):
        found += [one] * draw(st.integers(1, 6))
        name = draw(st.sampled_from(sorted(_OTHERS)))
        one = {**one, name: draw(st.sampled_from(_OTHERS[name]))}
    return [{**one, "id": f"{n:03}", "rank": float(n)} for n, one in enumerate(found)]


@settings(max_examples=1000)
@given(runs(), loads())
def test_alike_tasks_are_chosen_together_as_they_would_be_one_by_one(waiting: list[Row], begin: tuple[Load, list[Row]]) -> None:
    """The same ones, and the load is the same after them."""
    assert choose(waiting, begin[0]) == _one_by_one(waiting, begin[0])


class _Read(dict[str, Any]):
    """A task that remembers what was read of it."""

    def __init__(self, one: Row, read: set[str]) -> None:
        super().__init__(one)
        self.read = read

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


@given(rows, loads())
def test_alike_are_tasks_of_which_all_is_the_same_that_is_asked(one: Row, begin: tuple[Load, list[Row]]) -> None:
    """Whatever may restrict a task one day has to be compared as well."""
    asked, compared = set[str](), set[str]()
    load, seen = begin[0].copy(), _Read(one, asked)
    openings(seen, load)
    list(obstacles(seen, load))
    load.add(seen)
    decision.restricted(_Read(one, compared))
    assert asked - compared <= {"ready_at", "attempt"}


@settings(max_examples=400)
@given(rows, loads())
def test_so_many_of_one_kind_start_as_there_are_openings(one: Row, begin: tuple[Load, list[Row]]) -> None:
    """No more has to be read of a crowd that is restricted alike."""
    load, _ = begin
    crowd = [{**one, "id": f"{n:03}"} for n in range(60)]
    assert openings(one, load) == len(_one_by_one(crowd, load)[0])


def _places_of(one: Row) -> list[Place]:
    return [(TOWER, ""), (QUEUE, one["queue"]), (TYPE, one["type"]), (KEY, one["concurrency_key"])]


@given(candidates, loads())
def test_what_is_left_has_a_reason_and_what_is_chosen_had_none(waiting: list[Row], begin: tuple[Load, list[Row]]) -> None:
    """Work-conserving; and the reason that is shown is the one that was decided by."""
    load, _ = begin
    before = load.copy()
    chosen, after = choose(waiting, load)

    assert load == before
    assert all(obstacle(one, after) is not None for one in waiting if one["id"] not in chosen)
    assert all(obstacle(one, load) is None for one in waiting if one["id"] in chosen)
    assert choose([one for one in waiting if one["id"] not in chosen], after)[0] == []
    for one in waiting[:1]:
        assert (obstacle(one, load) is None) == (chosen[:1] == [one["id"]])


@given(candidates, loads(), st.integers(1, 10))
def test_a_walk_in_pages_decides_as_one_look_does(waiting: list[Row], begin: tuple[Load, list[Row]], size: int) -> None:
    """What could not start on one page cannot start after a later one."""
    load, picked = begin[0], list[str]()
    for first in range(0, len(waiting), size):
        chosen, load = choose(waiting[first : first + size], load)
        picked += chosen
    assert picked == choose(waiting, begin[0])[0]


class History:
    """A tower over simulated time: tasks arrive, start as the decision says, run for a while and end."""

    def __init__(self, fleet: list[Row], ruled: dict[Place, Limits]) -> None:
        self.fleet, self.rules = fleet, ruled
        self.now = 0.0
        self.running: list[tuple[float, Row]] = []
        self.starts: dict[str, list[float]] = {}
        self.started: list[tuple[float, Row]] = []

    def load(self) -> Load:
        found = measure(self.now, self.fleet, grouped(one for _, one in self.running), self.rules)
        found.starts = {key: list(times) for key, times in self.starts.items()}
        return found

    def step(self, waiting: list[Row], runs_s: Callable[[Row], float]) -> list[Row]:
        """Start what may start; return what still waits."""
        self.running = [(end, one) for end, one in self.running if end > self.now]
        chosen, _ = choose(waiting, self.load())
        for one in waiting:
            if one["id"] in chosen:
                self.running.append((self.now + runs_s(one), one))
                self.started.append((self.now, one))
                if one["rate_key"]:
                    self.starts.setdefault(one["rate_key"], []).append(self.now)
        return [one for one in waiting if one["id"] not in chosen]


FLEET = [{"slots": 2, "queues": ["a", "b", "c"]}, {"slots": 1, "queues": ["a"]}]


@settings(deadline=None, max_examples=20)
@given(candidates, rules, st.integers(1, 7))
def test_over_time_no_task_starves_and_no_window_holds_too_many_starts(waiting: list[Row], ruled: dict[Place, Limits], seed: int) -> None:
    """Every task starts one day, though others keep coming; within any window of a rate no more start than it allows."""
    history, late = History(FLEET, ruled), count(100)
    left = list(waiting)
    for tick in range(4000):
        history.now = tick * 0.5
        if tick % seed == 0 and tick < 200:  # the later ones have a later rank, as their time of enqueueing is later
            left.append(row(next(late), type=TYPES[tick % 2], concurrency_key=KEYS[tick % 4], concurrency_limit=2))
        left = history.step(left, lambda one: 0.3 + int(one["id"]) % 5)
        if not left and tick >= 200:
            break
    assert left == []
    for place, (at, one) in enumerate(history.started):
        rule = ruled.get((RATE, str(one["rate_key"])))
        limit, per_s = (rule.rate_limit, rule.rate_per_s) if rule else (one["rate_limit"], one["rate_per_s"])
        if one["rate_key"] and limit and per_s:
            so_far = [start for start, other in history.started[: place + 1] if other["rate_key"] == one["rate_key"]]
            assert sum(start > at - per_s for start in so_far) <= limit


@settings(deadline=None, max_examples=40)
@given(candidates, rules)
def test_of_two_tasks_alike_the_earlier_starts_first(waiting: list[Row], ruled: dict[Place, Limits]) -> None:
    """The order is rank, whatever else waits between them."""
    history, left = History(FLEET, ruled), list(waiting)
    for tick in range(2000):
        history.now = float(tick)
        left = history.step(left, lambda one: 1.5)
        if not left:
            break
    groups: dict[str, list[str]] = {}
    for _, one in history.started:
        alike = {name: value for name, value in one.items() if name not in ("id", "rank")}
        groups.setdefault(repr(alike), []).append(one["id"])
    assert all(ids == sorted(ids) for ids in groups.values())


def test_room_is_the_slots_and_a_small_prefetch_less_what_is_in_flight() -> None:
    """A quarter of the slots waits at the workers, so that none idles between two tasks."""
    in_flight = [row(n, queue="b") for n in range(5)]
    load = measure(0.0, [{"slots": 8, "queues": ["a", "b"]}, {"slots": 1, "queues": ["b"]}], grouped(in_flight), {})
    assert (load.room, load.queues) == (7, {"a": 10, "b": 7})


def test_a_queue_without_workers_has_no_room() -> None:
    """Its tasks wait, and hold up nobody else."""
    fleet = [{"slots": 2, "queues": ["a"]}, {"slots": 0, "queues": ["leaving"]}]
    load = measure(0.0, fleet, grouped([row(queue="gone")]), {})
    assert load.open_queues() == ["a"]
    for queue in ("gone", "leaving"):
        assert obstacle(row(queue=queue), load) == Obstacle(NO_WORKER, (QUEUE, queue))


def test_a_task_that_a_leaving_worker_still_runs_counts_against_limits_but_holds_no_slot() -> None:
    """Its key is taken; the slots of the others are not."""
    group = {**row(concurrency_key="k"), "count": 1, "holding": 0, "lowest": 1}
    load = measure(0.0, [{"slots": 1, "queues": ["a"]}], [group], {})
    assert (load.room, load.running[KEY, "k"]) == (2, 1)


def test_the_lowest_limit_in_flight_holds_for_all_who_share_the_key() -> None:
    """One that wants to be alone keeps even the most generous waiting."""
    load = measure(0.0, [{"slots": 8, "queues": ["a"]}], grouped([row(concurrency_key="k", concurrency_limit=1)]), {})
    found = obstacle(row(concurrency_key="k", concurrency_limit=5), load)
    assert found == Obstacle("concurrency_key", (KEY, "k"), 1, 1)


def test_a_rate_frees_when_its_oldest_start_leaves_the_window() -> None:
    """At that moment and not before; with a lowered limit when enough have left."""
    load = measure(100.0, [{"slots": 8, "queues": ["a"]}], [], {})
    load.starts["r"] = [90.5, 99.0, 93.0]
    limited = row(rate_key="r", rate_limit=3, rate_per_s=10.0)
    found = obstacle(limited, load)
    assert found == Obstacle("rate_limit", (RATE, "r"), 3, 3, 10.0, until=100.5)
    lowered = obstacle({**limited, "rate_limit": 1}, load)
    assert lowered and lowered.until == 109.0
    load.now = 100.5
    assert obstacle(limited, load) is None


def test_a_clock_set_back_holds_up_a_rate_for_a_window_at_most() -> None:
    """Starts far ahead are of another time."""
    load = measure(100.0, [{"slots": 8, "queues": ["a"]}], [], {})
    limited = row(rate_key="r", rate_limit=1, rate_per_s=10.0)
    load.starts["r"] = [3700.0]
    assert obstacle(limited, load) is None
    load.starts["r"] = [104.0]
    assert obstacle(limited, load) == Obstacle("rate_limit", (RATE, "r"), 1, 1, 10.0, until=114.0)


def test_a_rate_key_without_a_limit_restricts_nothing() -> None:
    """Only a task or a rule gives it one."""
    load = measure(100.0, [{"slots": 8, "queues": ["a"]}], [], {(RATE, "other"): Limits(rate_limit=1, rate_per_s=60.0)})
    load.starts["r"] = [100.0] * 50
    assert obstacle(row(rate_key="r"), load) is None


def test_of_those_with_one_chance_left_one_runs_at_a_time() -> None:
    """In each queue. Lost once less they run beside each other, and one lost worker alone puts nobody there."""
    load = measure(0.0, [{"slots": 8, "queues": ["a", "b"]}], grouped([row(1, losses=2)]), {})
    assert obstacle(row(2, losses=2), load) == Obstacle("quarantine", ("quarantine", "a"), 1, 1)
    alike = (row(2, losses=1), row(2), row(2, max_losses=1), row(2, losses=1, max_losses=2), row(2, losses=2, max_losses=9))
    for free in (*alike, row(2, losses=2, queue="b")):
        assert obstacle(free, load) is None
    assert choose([row(n, losses=2) for n in range(3)], measure(0.0, [{"slots": 8, "queues": ["a"]}], [], {}))[0] == ["000"]


def test_all_obstacles_are_told_the_first_of_them_first() -> None:
    """Who takes one away knows what is left."""
    rules = {(TOWER, ""): Limits(paused_at=1.0, max_running=1), (KEY, "k"): Limits(paused_at=2.0), (TYPE, "echo"): Limits(max_running=1)}
    load = measure(100.0, [{"slots": 1, "queues": ["b"]}], grouped([row(1, queue="b", concurrency_key="k")]), rules)
    load.starts["r"] = [99.0]
    restricted = row(2, ready_at=200.0, concurrency_key="k", rate_key="r", rate_limit=1, rate_per_s=10.0)
    found = list(obstacles(restricted, load))
    assert [one.reason for one in found] == [
        *("not_before", "paused", "paused", "concurrency_key", "rate_limit", "type_limit", "tower_limit", "no_worker"),
    ]
    assert [one.place for one in found[1:3]] == [(TOWER, ""), (KEY, "k")]
    assert obstacle(restricted, load) == found[0]


def test_a_full_tower_says_so_last() -> None:
    """A reason of the task's own comes before one that it shares with all."""
    load = measure(0.0, [{"slots": 1, "queues": ["a"]}], grouped([row(1, concurrency_key="k"), row(2)]), {})
    assert obstacle(row(), load) == Obstacle(NO_FREE_SLOT, (QUEUE, "a"))
    assert (found := obstacle(row(concurrency_key="k"), load)) and found.reason == "concurrency_key"

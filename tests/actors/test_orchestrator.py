"""The passes of the orchestrator actor, on both databases."""

import math
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from actors import orchestrator, walk
from actors.orchestrator import Dispatcher, NoSlots
from actors.walk import Walk, look
from actors.worker import WorkerProcess
from tests import rows as r
from tests.servers import wait_for
from tower import db, lifecycle, load, queries
from tower.handler import Registry
from tower.lifecycle import Outcome
from tower.models import Decision, Rule, Task, TaskStart, new_id
from tower.rules import Rules
from tower.settings import Settings
from tower.terms import DISPATCHED, QUEUED, SUCCEEDED


@pytest.fixture
def dispatcher(rows: Settings, nudges: r.Nudges) -> Dispatcher:
    return Dispatcher(rows, nudges)  # type: ignore[arg-type]


def test_one_pass_starts_everything_that_may_start_in_order(dispatcher: Dispatcher, nudges: r.Nudges) -> None:
    """Highest head start first, up to the room; a worker that is idle is nudged once, and takes as many as it has slots."""
    r.add_worker(slots=2)
    late, urgent = r.insert(priority=-100), r.insert(priority=100)
    early, more = r.insert(), r.insert()
    assert dispatcher.run_pass() == 3
    assert nudges.sent == [("handler.echo", urgent)]
    assert [r.row(task_id)["status"] for task_id in (early, more)] == [DISPATCHED, DISPATCHED]
    assert r.row(late)["status"] == QUEUED


def test_every_idle_worker_is_nudged_while_there_are_tasks_for_it(dispatcher: Dispatcher, nudges: r.Nudges) -> None:
    """But not one that is full."""
    r.add_worker("full", slots=1)
    r.running("full")
    for name in ("w1", "w2", "w3"):
        r.add_worker(name, slots=4)
    waiting = [r.insert() for _ in range(2)]
    dispatcher.run_pass()
    assert nudges.sent == [("handler.echo", task_id) for task_id in waiting]
    nudges.sent.clear()
    waiting = [r.insert() for _ in range(9)]
    dispatcher.run_pass()
    assert nudges.sent == [("handler.echo", task_id) for task_id in waiting[:3]]


class _Busy(NoSlots):
    """A worker whose slots have ended so many short tasks before the first pass."""

    def __init__(self, turnover: float) -> None:
        self._turnover = turnover

    def take_turnover(self) -> float:
        turnover, self._turnover = self._turnover, 0.0
        return turnover


@pytest.mark.parametrize(("turnover", "started"), [(0.0, 3), (1.5, 5), (2.0, 6), (1e9, 18)])
def test_as_many_wait_at_the_workers_as_have_ended_since_the_last_pass(rows: Settings, turnover: float, started: int) -> None:
    """So short tasks do not wait for passes, which have a pace; at least a quarter of the slots, and not without end."""
    r.add_worker(slots=2)
    for _ in range(30):
        r.insert()
    dispatcher = Dispatcher(rows, r.Nudges(), _Busy(turnover))  # type: ignore[arg-type]
    assert dispatcher.run_pass() == started
    assert dispatcher.run_pass() == 0


def test_what_ended_while_nothing_waited_lets_no_more_wait_at_the_workers(rows: Settings) -> None:
    """It says little of what comes later."""
    r.add_worker(slots=2)
    dispatcher = Dispatcher(rows, r.Nudges(), _Busy(5.0))  # type: ignore[arg-type]
    assert dispatcher.run_pass() == 0
    for _ in range(30):
        r.insert()
    assert dispatcher.run_pass() == 3


class _Keeping(NoSlots):
    """The only worker, whose slots end so many short tasks from one pass to the next; nothing of what it is given ever starts."""

    def __init__(self, turnover: float) -> None:
        self._turnover = turnover

    def take_turnover(self) -> float:
        return self._turnover

    def start(self, walk: Walk, *, keeps: bool) -> int | None:
        return len(walk.chosen)


@pytest.mark.parametrize(
    ("turnover", "seconds", "chosen"),
    [(1.4, 0.05, 11), (1.4, 0.1, 7), (1.4, 0.15, 5), (0.01, 0.05, 3), (10.0, 0.05, 50), (10.0, 0.15, 18), (0.0, 0.0, 3), (1.0, 0.0, 50)],
)
def test_as_many_are_kept_as_will_end_before_the_next_pass(
    rows: Settings, monkeypatch: pytest.MonkeyPatch, turnover: float, seconds: float, chosen: int
) -> None:
    """Which comes later while enough is kept; what ended in a longer time than that says little, and nothing is kept without end."""
    now = 100.0
    monkeypatch.setattr(orchestrator, "time", SimpleNamespace(monotonic=lambda: now))
    r.add_worker(slots=2)
    for _ in range(60):
        r.insert()
    dispatcher = Dispatcher(rows, r.Nudges(), _Keeping(turnover))  # type: ignore[arg-type]
    dispatcher.run_pass()
    now += seconds
    assert dispatcher.run_pass() == chosen


@pytest.mark.parametrize(
    ("what", "count", "is_held_up"), [({}, 9, False), ({"concurrency_key": "repo"}, 2, True), ({"concurrency_key": "repo"}, 1, False)]
)
def test_no_pass_can_wait_while_the_end_of_a_task_would_let_another_start(
    dispatcher: Dispatcher, what: dict[str, Any], count: int, is_held_up: bool
) -> None:
    """Slots that are busy and have enough to do say nothing of those that wait for a key."""
    r.add_worker(slots=2)
    for _ in range(count):
        r.insert(**what)
    dispatcher.run_pass()
    assert dispatcher.is_held_up is is_held_up


def test_a_pass_can_wait_again_when_what_held_up_others_has_ended(dispatcher: Dispatcher) -> None:
    """It is known from the last pass."""
    r.add_worker(slots=2)
    first, _ = r.insert(concurrency_key="repo"), r.insert(concurrency_key="repo")
    dispatcher.run_pass()
    assert dispatcher.is_held_up
    claim = r.claim(first)
    assert claim
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED), new_id()))
    dispatcher.run_pass()
    assert not dispatcher.is_held_up


class _Steady(_Keeping):
    """One of several workers, for which nothing is kept."""

    def start(self, walk: Walk, *, keeps: bool) -> int | None:
        return None


def test_no_more_is_dispatched_than_has_ended_however_soon_the_next_pass_comes(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dispatched is as good as started: a more urgent task comes after it."""
    now = 100.0
    monkeypatch.setattr(orchestrator, "time", SimpleNamespace(monotonic=lambda: now))
    r.add_worker(slots=2)
    for _ in range(60):
        r.insert()
    dispatcher = Dispatcher(rows, r.Nudges(), _Steady(1.4))  # type: ignore[arg-type]
    assert dispatcher.run_pass() == 5
    now += 0.05
    assert dispatcher.run_pass() == 0


class _Few(NoSlots):
    """A worker that starts one task at most, since somebody holds the others."""

    def start(self, walk: Walk, *, keeps: bool) -> int | None:
        return 1


@pytest.mark.parametrize(("waiting", "is_due"), [(1, False), (2, True)])
def test_what_could_not_be_started_is_looked_at_again_soon(rows: Settings, waiting: int, is_due: bool) -> None:
    """It is queued still, and nobody may ask because of it."""
    r.add_worker()
    for _ in range(waiting):
        r.insert()
    dispatcher = Dispatcher(rows, r.Nudges(), _Few())  # type: ignore[arg-type]
    assert dispatcher.run_pass() == 1
    assert (dispatcher.due_s < 1) is is_due


def test_tasks_with_the_same_key_run_one_after_the_other(dispatcher: Dispatcher) -> None:
    """The next one starts when the first has ended, and says so meanwhile; others pass it by."""
    r.add_worker()
    first, second, other = r.insert(concurrency_key="repo"), r.insert(concurrency_key="repo"), r.insert()
    assert dispatcher.run_pass() == 2
    assert [r.row(task_id)["status"] for task_id in (first, second, other)] == [DISPATCHED, QUEUED, DISPATCHED]
    assert r.row(second)["wait_reason"] == "concurrency_key"

    claim = r.claim(first)
    assert claim and dispatcher.run_pass() == 0
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED), new_id()))
    assert dispatcher.run_pass() == 1
    assert r.row(second)["status"] == DISPATCHED


def test_a_long_line_for_one_key_keeps_nobody_else_waiting(dispatcher: Dispatcher) -> None:
    """However many of them stand in front."""
    r.add_worker(slots=2)
    for _ in range(30):
        r.insert(concurrency_key="repo")
    free = r.insert()
    assert dispatcher.run_pass() == 2
    assert r.row(free)["status"] == DISPATCHED


def test_what_was_lost_with_its_workers_runs_one_by_one_and_holds_up_nobody(dispatcher: Dispatcher) -> None:
    """Those with one chance left wait for each other; the others of their kind pass them by."""
    r.add_worker()
    lost = [r.running() for _ in range(3)]
    db.unit(lambda: Task.update(losses=1).execute())
    assert [r.expire(claim) for claim in lost] == [QUEUED] * 3
    db.unit(lambda: Task.update(ready_at=0).execute())
    others = [r.insert() for _ in range(3)]
    assert dispatcher.run_pass() == 4
    assert [r.row(claim.id)["wait_reason"] for claim in lost] == [None, "quarantine", "quarantine"]
    others.append(r.insert())
    assert dispatcher.run_pass() == 1
    assert {r.row(task_id)["status"] for task_id in others} == {DISPATCHED}
    claim = r.claim(lost[0].id)
    assert claim and dispatcher.run_pass() == 0
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED), new_id()))
    assert dispatcher.run_pass() == 1
    assert r.row(lost[1].id)["status"] == DISPATCHED


def test_a_task_waits_for_its_time(dispatcher: Dispatcher) -> None:
    """`not_before` in the future is a reason to wait."""
    r.add_worker()
    later = r.insert(not_before=db.read(db.clock) + 60)
    assert dispatcher.run_pass() == 0
    assert r.row(later)["wait_reason"] == "not_before"


def test_without_a_worker_nothing_starts_and_the_task_says_why(dispatcher: Dispatcher) -> None:
    """no_worker; and no_free_slot when there is one that is full."""
    task_id = r.insert()
    assert dispatcher.run_pass() == 0
    assert r.row(task_id)["wait_reason"] == "no_worker"
    r.add_worker(slots=1)
    for _ in range(2):
        r.running()
    assert dispatcher.run_pass() == 0
    assert r.row(task_id)["wait_reason"] == "no_free_slot"


def test_nudges_that_arrive_together_are_answered_by_one_pass(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come during a pass return at once, and one more pass speaks for them all."""

    passes, inside, go_on = [], threading.Event(), threading.Event()

    def slow_pass(asked: list[str]) -> int:
        passes.append(1)
        inside.set()
        go_on.wait(10)
        return 0

    monkeypatch.setattr(dispatcher, "run_pass", slow_pass)
    first = threading.Thread(target=dispatcher.answer_one, args=("x",))
    first.start()
    inside.wait(10)
    for _ in range(7):
        dispatcher.answer_one("x")
    assert len(passes) == 1
    go_on.set()
    first.join(10)
    assert len(passes) == 2


def test_who_is_asked_after_an_end_leaves_what_is_new_to_its_own_nudge(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not for long, and not when there was no room the last time: then every end counts."""
    monkeypatch.setattr(orchestrator, "_NEW_S", 60.0)
    r.add_worker(slots=4)
    ended, new = r.running("w1"), r.insert()
    dispatcher.answer_one(ended.id)
    assert r.row(new)["status"] == QUEUED
    assert 0 < dispatcher.due_s <= 60
    monkeypatch.setattr(orchestrator, "_NEW_S", 0.0)
    dispatcher.answer_one(ended.id)
    assert r.row(new)["status"] == DISPATCHED

    more = [r.insert() for _ in range(4)]
    dispatcher.answer_one(more[0])
    assert [r.row(task_id)["status"] for task_id in more] == [DISPATCHED] * 3 + [QUEUED]
    db.unit(lambda: lifecycle.finish(ended, Outcome(SUCCEEDED), new_id()))
    dispatcher.answer_one(ended.id)
    assert r.row(more[3])["status"] == DISPATCHED


LIMITED = [
    ("tower", "", "tower_limit"),
    ("queue", "default", "queue_limit"),
    ("type", "echo", "type_limit"),
    ("key", "repo", "concurrency_key"),
]


@pytest.mark.parametrize(("kind", "name", "reason"), LIMITED)
def test_a_rule_limits_how_many_are_in_flight(dispatcher: Dispatcher, kind: str, name: str, reason: str) -> None:
    """Two of four start, the others say what they wait for; when the limit is lifted they start."""
    r.add_worker()
    r.set_rule(kind, name, max_running=2)
    ids = [r.insert(concurrency_key="repo", concurrency_limit=9) for _ in range(4)]
    assert dispatcher.run_pass() == 2
    assert [r.row(task_id)["wait_reason"] for task_id in ids] == [None, None, reason, reason]
    db.unit(lambda: Rule.delete().execute())
    assert dispatcher.run_pass() == 2


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, _ in LIMITED])
def test_nothing_starts_of_what_is_paused(dispatcher: Dispatcher, kind: str, name: str) -> None:
    """What was handed to the workers before goes on; the rest waits and says why."""
    r.add_worker()
    before, later = r.insert(concurrency_key="repo", concurrency_limit=2), r.insert(concurrency_key="repo", concurrency_limit=2)
    r.dispatch(before)
    r.set_rule(kind, name, paused_at=1.0)
    assert dispatcher.run_pass() == 0
    assert r.row(later)["wait_reason"] == "paused"
    assert r.claim(before) is not None


def test_the_lowest_limit_of_those_in_flight_counts(dispatcher: Dispatcher) -> None:
    """A task that shares its key with nobody is not joined by one that would share it."""
    r.add_worker()
    alone = r.running(concurrency_key="repo", concurrency_limit=1)
    generous = r.insert(concurrency_key="repo", concurrency_limit=5)
    assert dispatcher.run_pass() == 0
    db.unit(lambda: lifecycle.finish(alone, Outcome(SUCCEEDED), new_id()))
    more = r.insert(concurrency_key="repo", concurrency_limit=5)
    assert dispatcher.run_pass() == 2
    assert {r.row(generous)["status"], r.row(more)["status"]} == {DISPATCHED}


def test_a_pass_starts_what_has_become_ready_and_knows_when_the_next_does(dispatcher: Dispatcher) -> None:
    """Without waiting for a sweep, which looks every two seconds: a retry may be due in less."""
    r.add_worker()
    now = db.read(db.clock)
    due, soon = r.insert(not_before=now + 60), r.insert(not_before=now + 30)
    assert dispatcher.run_pass([soon]) == 0
    assert 20 < dispatcher.due_s <= 30
    db.unit(lambda: Task.update(ready_at=now - 1).where(Task.id == due).execute())
    assert db.read(lambda: queries.is_anything_to_do(["default"]))
    assert dispatcher.run_pass() == 1
    assert [r.row(task_id)["status"] for task_id in (due, soon)] == [DISPATCHED, QUEUED]
    assert 20 < dispatcher.due_s <= 30


def test_a_rate_lets_no_more_start_than_its_window_allows(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the starts leave the window the next ones follow, and the dispatcher knows when that is."""
    r.add_worker()
    ids = [r.insert(rate_key="api", rate_limit=2, rate_per_s=600.0) for _ in range(5)]
    other = r.insert()
    assert dispatcher.run_pass() == 3
    assert dispatcher.due_s <= 600
    assert dispatcher.run_pass() == 0
    assert [r.row(task_id)["wait_reason"] for task_id in ids] == [None, None, "rate_limit", "rate_limit", "rate_limit"]
    assert r.row(other)["status"] == DISPATCHED
    db.unit(lambda: TaskStart.update(at=TaskStart.at - 300).execute())
    assert dispatcher.run_pass() == 0
    assert dispatcher.due_s > 0
    later = time.monotonic() + 301
    monkeypatch.setattr("actors.orchestrator.time.monotonic", lambda: later)
    assert dispatcher.due_s <= 0

    db.unit(lambda: TaskStart.update(at=TaskStart.at - 300).execute())
    assert dispatcher.run_pass() == 2
    assert r.row(ids[4])["status"] == QUEUED


def test_a_rule_for_a_rate_key_goes_before_what_its_tasks_say(dispatcher: Dispatcher) -> None:
    """Stricter or looser."""
    r.add_worker()
    for _ in range(5):
        r.insert(rate_key="api", rate_limit=1, rate_per_s=600.0)
    r.set_rule("rate", "api", rate_limit=3, rate_per_s=60.0)
    assert dispatcher.run_pass() == 3


def test_a_start_that_was_not_made_does_not_count(dispatcher: Dispatcher) -> None:
    """The start and the task's new status are one commit."""
    r.add_worker()
    task_id = r.insert(rate_key="api", rate_limit=1, rate_per_s=600.0)
    r.dispatch(task_id, task_id)
    r.dispatch(task_id)
    assert db.read(lambda: TaskStart.select().count()) == 1


def test_a_task_whose_time_to_start_has_passed_is_not_started(dispatcher: Dispatcher) -> None:
    """Even if the sweep has not ended it yet."""
    r.add_worker()
    r.insert(expires_at=db.read(db.clock) - 1)
    assert dispatcher.run_pass() == 0


def fill_up() -> None:
    """Let a key and a rate be full, and one key half full for those that ask for less."""
    r.running(concurrency_key="full")
    r.dispatch(r.insert(rate_key="api", rate_limit=1, rate_per_s=600.0))
    r.running(concurrency_key="half", concurrency_limit=2)


def insert_crowd(size: int) -> None:
    for _ in range(size):
        r.insert(concurrency_key="full")
        r.insert(concurrency_key="half", concurrency_limit=1)
        r.insert(rate_key="api", rate_limit=1, rate_per_s=600.0)


@pytest.mark.parametrize(("lanes", "looks"), [(100, 0), (0, 4)])
def test_a_crowd_behind_full_keys_and_rates_is_not_walked_through(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch, lanes: int, looks: int
) -> None:
    """What is known to be full is left to the database: the tasks looked at do not grow with the crowd."""
    monkeypatch.setattr("actors.walk.LANES", lanes)
    monkeypatch.setattr("actors.walk.PAGE", 5)
    pages, page = [], Walk._page
    monkeypatch.setattr(Walk, "_page", lambda walk: pages.append(1) or page(walk))
    r.add_worker(slots=16)
    fill_up()
    insert_crowd(20)
    for _ in range(4):  # what a connection runs again may be prepared there
        free = r.insert()
        pages.clear()
        assert dispatcher.run_pass() == 1
        assert r.row(free)["status"] == DISPATCHED
        assert len(pages) <= looks


@pytest.mark.parametrize("seed", range(3))
def test_lanes_pages_and_one_look_at_all_decide_alike(rows: Settings, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """However the waiting tasks are read, the same ones start."""
    some = random.Random(seed)
    r.add_worker(slots=some.choice([4, 16]), queues='["default", "other"]')
    fill_up()
    insert_crowd(3)
    for kind, name in (("type", "echo"), ("key", "a"), ("queue", "other")):
        r.set_rule(kind, name, max_running=some.randint(3, 8), paused_at=some.choice([None, None, 1.0]))
    for _ in range(60):
        key, rate = some.choice([None, None, "a", "b", "half"]), some.choice([None, None, "api", "hub"])
        fields = {"rate_key": rate, "rate_limit": some.randint(1, 4), "rate_per_s": 600.0} if rate else {}
        fields |= {"queue": some.choice(["default", "other", "gone"]), "type": some.choice(["echo", "sleep"])}
        r.insert(concurrency_key=key, concurrency_limit=some.randint(1, 3), priority=some.randint(-50, 50), **fields)

    def decide(lanes: int, page: int) -> list[str]:
        monkeypatch.setattr("actors.walk.LANES", lanes)
        monkeypatch.setattr("actors.walk.PAGE", page)
        whole = look(30, 0.25)
        while whole.goes_on:
            whole.step()
        return whole.chosen

    by_lanes, by_pages, at_once = (db.read(partial(decide, lanes, page)) for lanes, page in ((100, 5), (0, 5), (0, 1000)))
    assert by_lanes == by_pages == at_once != []


def test_who_asks_after_a_quiet_moment_is_not_asked_back_what_there_is(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new task starts at once; whether more waits is looked at after that. While passes follow each other, it is before."""
    r.add_worker(slots=9)
    looks, ready = list[str](), queries.ready

    def looked(asked: Any) -> Any:
        looks.append(r.row(new)["status"])
        return ready(asked)

    monkeypatch.setattr(queries, "ready", looked)
    new = r.insert()
    assert dispatcher.run_pass([new]) == 1
    new = r.insert()
    assert dispatcher.run_pass([new]) == 1
    assert dispatcher.run_pass([new]) == 0
    assert looks == [QUEUED, QUEUED, DISPATCHED]

    monkeypatch.setattr(orchestrator, "_NEW_S", -1.0)
    looks.clear()
    new, scheduled = r.insert(), r.insert(not_before=db.read(db.clock) + 60)
    assert dispatcher.run_pass([new]) == 1
    assert looks == [DISPATCHED]
    assert 50 < dispatcher.due_s < 60
    assert r.row(scheduled)["status"] == QUEUED


def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> list[str]:
    """Let something happen once, between a choice and its start; return how often anything was about to be started."""
    starts = list[str]()

    def point(name: str) -> None:
        if name == "dispatch.before_commit":
            starts.append(name)
            if len(starts) == 1:
                happens()

    monkeypatch.setattr(orchestrator, "fault", point)
    return starts


@pytest.mark.parametrize("limit", [{"concurrency_key": "k"}, {"rate_key": "api", "rate_limit": 1, "rate_per_s": 600.0}])
def test_what_others_start_between_a_choice_and_its_start_counts(
    dispatcher: Dispatcher, limit: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes look without a lock; of two that chose by the same state one starts something, and the other looks again."""
    r.add_worker(slots=9)
    chosen, free, urgent = r.insert(**limit), r.insert(), list[str]()

    def start_others() -> None:
        urgent.append(r.insert(priority=100, **limit))
        r.dispatch(*urgent)

    starts = meanwhile(monkeypatch, start_others)
    assert dispatcher.run_pass() == 1
    assert len(starts) == 2
    assert [r.row(task_id)["status"] for task_id in (chosen, free, *urgent)] == [QUEUED, DISPATCHED, DISPATCHED]
    assert len(db.read(lambda: list(TaskStart.select().tuples()))) == ("rate_key" in limit)


def test_a_pause_holds_from_the_moment_it_is_answered(dispatcher: Dispatcher, nudges: r.Nudges, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for what was chosen just before."""
    r.add_worker()
    task_id = r.insert()
    rules = Rules(Registry(), nudges)  # type: ignore[arg-type]
    starts = meanwhile(monkeypatch, lambda: rules.pause("tower", ""))
    assert dispatcher.run_pass() == 0
    assert starts == ["dispatch.before_commit"]
    assert r.row(task_id)["status"] == QUEUED
    rules.resume("tower", "")
    assert dispatcher.run_pass() == 1


def test_what_was_chosen_after_a_decision_that_a_crash_undid_is_void(dispatcher: Dispatcher) -> None:
    """Postgres does not wait for the disk with decisions; another one takes the place of what was lost, and must not look like it."""
    r.add_worker(slots=9)
    before = db.read(load.read).token
    r.dispatch(r.insert())
    lost = db.read(load.read).token
    db.unit(lambda: Decision.update(token=before).execute())
    first, second = r.insert(concurrency_key="k"), r.insert(concurrency_key="k")
    assert dispatcher.run_pass() == 1
    assert db.unit(lambda: lifecycle.dispatch([second], lost)) == []
    assert [r.row(task_id)["status"] for task_id in (first, second)] == [DISPATCHED, QUEUED]


def test_a_full_fleet_is_not_looked_through_for_what_it_could_take(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each end of a task asks for a pass, and most find no room under a backlog."""
    r.add_worker(slots=1)
    for number in range(9):
        r.insert(concurrency_key=f"k{number}")
    looks, lanes = list[bool](), walk._lanes
    monkeypatch.setattr(walk, "_lanes", lambda: looks.append(True) or lanes())
    assert [dispatcher.run_pass() for _ in range(3)] == [2, 0, 0]
    assert len(looks) == 1
    r.add_worker("another", slots=4)
    assert dispatcher.run_pass() == 5
    assert len(looks) == 2


def test_a_pass_that_others_always_forestall_comes_back_soon(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not look for ever."""
    r.add_worker()
    r.insert()
    monkeypatch.setattr(lifecycle, "dispatch", lambda *_: [])
    assert dispatcher.run_pass() == 0
    assert 0 < dispatcher.due_s < 0.06


def test_a_pass_that_finds_nothing_to_start_writes_nothing(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd behind a full rate costs reading only."""
    r.add_worker()
    for _ in range(3):
        r.insert(rate_key="api", rate_limit=1, rate_per_s=600.0)
    assert dispatcher.run_pass() == 1
    monkeypatch.setattr(db, "unit", lambda *_, **__: pytest.fail("a pass without need wrote"))
    assert dispatcher.run_pass() == 0


def test_there_is_something_to_do_when_a_task_may_start_or_waits_for_a_claim(dispatcher: Dispatcher) -> None:
    """On queues that are served; not when it waits for its time, or runs."""

    def anything(queue: str = "default") -> bool:
        return db.read(lambda: queries.is_anything_to_do([queue, "more"]))

    r.add_worker()
    r.insert(not_before=db.read(db.clock) + 60)
    assert not anything()
    task_id = r.insert()
    assert anything()
    assert dispatcher.run_pass() == 1
    assert anything()
    assert not anything("other")
    r.claim(task_id)
    assert not anything()


def test_a_worker_looks_when_a_rate_has_become_free(rows: Settings, nudges: r.Nudges, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though nobody nudges it, and its next look by itself is far away."""
    monkeypatch.setattr("actors.worker._LOOK_S", 1e9)
    worker = WorkerProcess(rows, nudges, slots=1, queues=["default"])  # type: ignore[arg-type]
    looked, due = threading.Event(), threading.Event()
    worker.start(looked.set, lambda: 0.0 if due.is_set() else math.inf, lambda attempt: None)
    try:
        wait_for("its row", lambda: bool(db.read(lambda: queries.live_workers(30))))
        assert not looked.is_set()
        due.set()
        assert looked.wait(20)
    finally:
        worker.stop(0)

"""The passes of the orchestrator actor, on both databases."""

import threading

import pytest

from actors.orchestrator import Dispatcher
from tests import rows as r
from tower import db, lifecycle
from tower.lifecycle import Outcome
from tower.models import DISPATCHED, QUEUED, SUCCEEDED, new_id
from tower.settings import Settings


@pytest.fixture
def dispatcher(rows: Settings, nudges: r.Nudges) -> Dispatcher:
    return Dispatcher(rows, nudges)  # type: ignore[arg-type]


def test_one_pass_starts_everything_that_may_start_in_order(dispatcher: Dispatcher, nudges: r.Nudges) -> None:
    """Highest head start first, up to the room."""
    r.add_worker(slots=2)
    late, urgent, early = r.insert(priority=-100), r.insert(priority=100), r.insert()
    more = r.insert()
    assert dispatcher.run_pass() == 3
    assert set(nudges.sent) == {("handler.echo", task_id) for task_id in (urgent, early, more)}
    assert r.row(late)["status"] == QUEUED


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

    def slow_pass() -> int:
        passes.append(1)
        inside.set()
        go_on.wait(10)
        return 0

    monkeypatch.setattr(dispatcher, "run_pass", slow_pass)
    first = threading.Thread(target=dispatcher.orchestrate, args=("x",))
    first.start()
    inside.wait(10)
    for _ in range(7):
        dispatcher.orchestrate("x")
    assert len(passes) == 1
    go_on.set()
    first.join(10)
    assert len(passes) == 2

"""Many tasks at once: what is meant is changed, once, whoever else does the same at that moment."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import rows as r
from tests.servers import wait_for
from tower import bulk, db, lifecycle, tree
from tower.errors import Conflict, InvalidTask, Unavailable
from tower.lifecycle import NewTask, Outcome
from tower.models import Task, new_id
from tower.orchestrator import EnhancedOrchestrator
from tower.queries import Filter
from tower.settings import Settings
from tower.terms import CANCELLED, FAILED, FINAL, QUEUED, RUNNING, SUCCEEDED

BROKEN = Outcome(FAILED, error={"code": "handler_error", "message": "no"}, may_retry=False)


@pytest.fixture
def orchestrator(rows: Settings, nudges: r.Nudges) -> EnhancedOrchestrator:
    return EnhancedOrchestrator(rows, None, nudges)  # type: ignore[arg-type]


def ended(outcome: Outcome = BROKEN, **fields: Any) -> str:
    claim = r.running(**fields)
    db.unit(lambda: lifecycle.finish(claim, outcome, new_id()))
    return claim.id


def join(parent_id: str, task_id: str | None = None) -> str:
    """Insert a child as an enqueue does."""
    fresh = task_id or new_id()
    values: dict[str, Any] = {"type": "echo", "queue": "default", "payload": "{}", "labels": {}, "priority": 0, "not_before": None}
    values |= {"timeout_s": 60.0, "max_attempts": 1, "max_losses": 3, "correlation_id": fresh, "parent_id": parent_id}
    db.unit(lambda: lifecycle.insert(tree.joined([NewTask(id=fresh, **values)])))
    return fresh


def together(count: int, work: Callable[[], Any]) -> list[Any]:
    """Do the same in so many threads at the same moment."""
    start = threading.Barrier(count)

    def one(_: int) -> Any:
        start.wait(10)
        return work()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def repeats() -> list[str]:
    return [row[0] for row in db.read(lambda: list(Task.select(Task.retry_of).where(Task.retry_of.is_null(False)).tuples()))]


def test_what_waits_is_cancelled_and_what_runs_is_asked_to_stop(orchestrator: EnhancedOrchestrator, nudges: r.Nudges) -> None:
    """Of what fits the filter, once; the rest is left alone."""
    running, waiting, chosen = r.running(type="echo").id, r.insert(type="echo"), r.insert(type="echo")
    other, over = r.insert(type="sleep"), ended(type="echo")
    r.dispatch(chosen)

    done = orchestrator.cancel_all(Filter(types=["echo"]), "alice")

    assert (done.matched, done.changed, set(done.task_ids), done.dry_run) == (3, 3, {running, waiting, chosen}, False)
    assert [r.row(task_id)["status"] for task_id in (running, waiting, chosen, other, over)] == [
        RUNNING,
        CANCELLED,
        CANCELLED,
        QUEUED,
        FAILED,
    ]
    assert r.row(running)["cancel_requested_at"] and r.kinds(running)[-1] == "cancel_requested"
    assert {("tower.trace", task_id) for task_id in done.task_ids} <= set(nudges.sent)
    assert orchestrator.cancel_all(Filter(types=["echo"])).matched == 0


def test_failed_tasks_are_retried_once(orchestrator: EnhancedOrchestrator, nudges: r.Nudges) -> None:
    """Asking again makes nothing again, until the new one has failed as well."""
    old = [ended(), ended()]
    ended(Outcome(SUCCEEDED)), r.insert()  # neither is a dead letter

    done = orchestrator.retry_all(Filter(statuses=FINAL), "alice")

    assert (done.matched, done.changed, len(done.task_ids)) == (2, 2, 2)
    assert [r.row(task_id)["retry_of"] for task_id in done.task_ids] == old
    assert {r.row(task_id)["requested_by"] for task_id in done.task_ids} == {"alice"}
    assert nudges.sent == [("tower.orchestrate", done.task_ids[0])]
    assert orchestrator.retry_all(Filter(statuses=FINAL)).matched == 0


def test_a_dry_run_tells_how_many_and_changes_nothing(orchestrator: EnhancedOrchestrator, nudges: r.Nudges) -> None:
    """The same number that the change then reports."""
    failed, waiting = ended(), r.insert()
    would = orchestrator.retry_all(Filter(statuses=[FAILED]), dry_run=True)
    assert (would.matched, would.changed, would.task_ids, would.dry_run) == (1, 0, [failed], True)
    would = orchestrator.cancel_all(Filter(types=["echo"]), dry_run=True)
    assert (would.matched, would.changed, would.task_ids, would.dry_run) == (1, 0, [waiting], True)
    assert (r.row(waiting)["status"], repeats(), nudges.sent) == (QUEUED, [], [])


@pytest.mark.parametrize("empty", [Filter(), Filter(labels=[]), Filter(retried=False)])
def test_an_empty_filter_is_refused(orchestrator: EnhancedOrchestrator, empty: Filter) -> None:
    """A forgotten filter must not cancel everything, or do everything again."""
    for ask in (orchestrator.cancel_all, orchestrator.retry_all):
        with pytest.raises(InvalidTask, match="created_before"):
            ask(empty)


@pytest.mark.usefixtures("rows")
def test_every_filter_narrows(orchestrator: EnhancedOrchestrator) -> None:
    """Error codes, labels and whether a task was retried among them."""
    labelled = ended(labels={"team": "platform"})
    lost = ended(Outcome(FAILED, error={"code": "worker_lost", "message": "gone"}))
    again = orchestrator.retry_all(Filter(error_codes=["worker_lost"])).task_ids[0]

    def fits(chosen: Filter) -> list[str]:
        return orchestrator.retry_all(chosen, dry_run=True).task_ids

    assert r.row(again)["retry_of"] == lost
    assert fits(Filter(statuses=[FAILED])) == fits(Filter(labels=[("team", "platform")])) == [labelled]
    assert fits(Filter(error_codes=["worker_lost"])) == fits(Filter(statuses=[FAILED], retried=True)) == []


def test_many_are_changed_in_steps(orchestrator: EnhancedOrchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left out or done twice at the seams, and no transaction holds many."""
    monkeypatch.setattr(bulk, "_STEP", 3)
    ids = [r.insert() for _ in range(7)]
    steps: list[int] = []
    cancel_all = lifecycle.cancel_all

    def counted(ids: list[str], by: str | None) -> list[str]:
        steps.append(len(ids))
        return cancel_all(ids, by)

    monkeypatch.setattr(lifecycle, "cancel_all", counted)
    assert orchestrator.cancel_all(Filter(types=["echo"])).task_ids == ids
    assert steps == [3, 3, 1]
    assert orchestrator.retry_all(Filter(types=["echo"])).changed == 7
    assert sorted(repeats()) == ids


def test_a_server_that_stops_changes_no_more(orchestrator: EnhancedOrchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps, and it says how far it came: a hundred thousand tasks take longer than a container is given to stop."""
    monkeypatch.setattr(bulk, "_STEP", 2)
    ids = [r.insert() for _ in range(6)]
    step = lifecycle.cancel_all

    def last_step(some: list[str], by: str | None) -> list[str]:
        orchestrator._stopping.set()
        return step(some, by)

    monkeypatch.setattr(lifecycle, "cancel_all", last_step)
    with pytest.raises(Unavailable, match="The server is stopping; 2 tasks were changed"):
        orchestrator.cancel_all(Filter(statuses=[QUEUED]))
    assert [r.row(task_id)["status"] for task_id in ids] == [CANCELLED] * 2 + [QUEUED] * 4


@pytest.mark.parametrize("by", ["status", "tree"])
def test_what_fails_again_at_once_is_not_retried_by_the_same_request(rows: Settings, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """It would never end."""

    class FailingWorker(r.Nudges):
        def send(self, actor: str, task_id: str) -> bool:
            r.dispatch(task_id)
            claim = r.claim(task_id)
            assert claim and len(self.sent) < 10
            db.unit(lambda: lifecycle.finish(claim, BROKEN, new_id()))
            return super().send(actor, task_id)

    monkeypatch.setattr(bulk, "_STEP", 1)
    old = [ended(), ended()]
    db.unit(lambda: Task.update(correlation_id=old[0]).execute())
    chosen = Filter(statuses=[FAILED]) if by == "status" else Filter(correlation_id=old[0])
    done = EnhancedOrchestrator(rows, None, FailingWorker()).retry_all(chosen)  # type: ignore[arg-type]
    assert (done.changed, repeats()) == (2, old)


def test_retries_at_the_same_moment_make_each_task_once(orchestrator: EnhancedOrchestrator) -> None:
    """The old rows are locked and asked about again."""
    old = [ended() for _ in range(20)]
    done = together(8, lambda: orchestrator.retry_all(Filter(statuses=[FAILED])))
    assert sum(one.changed for one in done) == 20
    assert sorted(repeats()) == sorted(old)


def test_cancels_at_the_same_moment_ask_once(orchestrator: EnhancedOrchestrator) -> None:
    """One event for each task."""
    ids = [r.running().id for _ in range(5)] + [r.insert() for _ in range(15)]
    done = together(8, lambda: orchestrator.cancel_all(Filter(types=["echo"])))
    assert sum(one.changed for one in done) == 20
    for task_id in ids:
        assert sum("cancel" in kind for kind in r.kinds(task_id)) == 1


def test_a_child_waits_for_a_cancel_of_its_parent_and_is_refused(orchestrator: EnhancedOrchestrator) -> None:
    """It is not accepted by what the parent was a moment ago."""
    parent, cancelling, done = r.insert(), threading.Event(), threading.Event()
    told: list[str] = []

    def child() -> None:
        cancelling.wait(10)
        try:
            told.append(join(parent))
        except Conflict as error:
            told.append(error.code)
        done.set()

    def cancel() -> None:
        lifecycle.cancel(parent, None)
        cancelling.set()
        done.wait(0.3)  # it would be through by now if it did not wait

    thread = threading.Thread(target=child)
    thread.start()
    db.unit(cancel)
    thread.join(10)
    assert told == ["parent_cancelled"]


def test_a_tree_cancel_waits_for_a_child_and_takes_it(orchestrator: EnhancedOrchestrator) -> None:
    """A child that was accepted just before is found by the same cancel."""
    parent, fresh, inserting = r.insert(), new_id(), threading.Event()
    told: list[Any] = []

    def cancel() -> None:
        inserting.wait(10)
        told.append(orchestrator.cancel_all(Filter(correlation_id=parent)))

    thread = threading.Thread(target=cancel)
    thread.start()

    def child() -> None:
        join(parent, fresh)
        inserting.set()
        thread.join(0.3)

    db.unit(child)
    thread.join(10)
    assert r.row(parent)["status"] == r.row(fresh)["status"] == CANCELLED
    assert sorted(told[0].task_ids) == sorted([parent, fresh])


def test_a_growing_tree_is_cancelled_whole(orchestrator: EnhancedOrchestrator) -> None:
    """Whatever its tasks enqueue meanwhile is either refused or cancelled with it."""
    root = r.running().id
    accepted: list[str] = [root]
    refused = threading.Event()

    def grow(number: int) -> None:
        parent = root
        while not refused.is_set():
            try:
                parent = join(parent if number % 2 else root)
                accepted.append(parent)
            except Conflict:
                refused.set()

    with ThreadPoolExecutor(4) as pool:
        growing = [pool.submit(grow, number) for number in range(4)]
        wait_for("a tree", lambda: len(accepted) > 12)
        done = orchestrator.cancel_all(Filter(correlation_id=root))
        for one in growing:
            one.result(20)
    left = db.read(lambda: list(Task.select(Task.id).where(Task.correlation_id == root, Task.cancel_requested_at.is_null()).tuples()))
    assert left == []
    assert done.changed == len(accepted)


def test_the_tree_of_a_cancelled_root_takes_no_grandchildren(orchestrator: EnhancedOrchestrator) -> None:
    """Also under a parent that had ended well before."""
    root = r.running().id
    child = join(root)
    r.dispatch(child)
    claim = r.claim(child)
    assert claim
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED), new_id()))
    grandchild = join(child)
    orchestrator.cancel_all(Filter(correlation_id=root))
    for parent in (root, child, grandchild):
        with pytest.raises(Conflict, match="cancelled"):
            join(parent)


def test_what_is_retried_after_a_tree_was_cancelled_begins_anew(orchestrator: EnhancedOrchestrator) -> None:
    """It may have children again, as the root and as a part of the tree."""
    root = r.insert()
    join(root)
    assert orchestrator.cancel_all(Filter(correlation_id=root)).changed == 2
    wait_for("the next millisecond", lambda: db.read(db.clock) > (r.row(root)["cancel_requested_at"] or 0) + 0.002)
    again = orchestrator.retry_all(Filter(correlation_id=root)).task_ids
    assert len(again) == 2
    children = [join(parent) for parent in again]
    assert {r.row(task_id)["correlation_id"] for task_id in children} == {root}

"""The state machine on both databases."""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests import rows as r
from tower import db, leases, lifecycle, load, moves, queries, reminders
from tower.leases import Claim
from tower.lifecycle import LogPart, NewTask, Outcome
from tower.models import Task, TaskEvent, TaskStart, new_id
from tower.moves import ARROWS
from tower.reminders import NUDGE_S
from tower.settings import Settings
from tower.terms import CANCELLED, DISPATCHED, FAILED, FINAL, QUEUED, RUNNING, STATUSES, SUCCEEDED, TIMED_OUT

pytestmark = pytest.mark.usefixtures("rows")

OK = Outcome(SUCCEEDED, result='{"a":1}')
BROKEN = Outcome(FAILED, error={"code": "handler_error", "message": "no"})


def finish(claim: Claim, outcome: Outcome = OK, tail: str = "") -> str | None:
    return db.unit(lambda: lifecycle.finish(claim, outcome, new_id(), [LogPart(1, tail)] if tail else []))


def test_every_status_has_its_arrows_and_final_ones_have_none() -> None:
    """The table of arrows is complete."""
    assert set(ARROWS) == set(STATUSES)
    assert [status for status in STATUSES if not ARROWS[status]] == list(FINAL)


def test_a_task_goes_from_queued_to_its_end_with_an_event_for_each_step() -> None:
    """The straight way."""
    claim = r.running()
    assert finish(claim) == SUCCEEDED
    assert r.kinds(claim.id) == ["queued", "dispatched", "started", "succeeded"]
    ended = r.row(claim.id)
    assert (ended["status"], ended["result"], ended["attempt"]) == (SUCCEEDED, '{"a":1}', 1)
    assert ended["created_at"] <= ended["dispatched_at"] <= ended["started_at"] <= ended["finished_at"]


def test_a_final_state_is_never_changed() -> None:
    """P3: whatever comes later finds nothing to change."""
    claim = r.running()
    finish(claim)
    before = r.row(claim.id)
    assert finish(claim, BROKEN) is None
    assert r.expire(claim) is None
    assert db.unit(lambda: lifecycle.cancel(claim.id, None)) == SUCCEEDED
    assert db.unit(lambda: lifecycle.release(claim, "stop", new_id())) is None
    assert (r.dispatch(claim.id), r.claim(claim.id)) == ([], None)
    assert r.row(claim.id) == before


def test_only_one_of_many_workers_gets_a_task() -> None:
    """P2: the claim is a race with one winner."""
    ids = [r.insert() for _ in range(20)]
    r.dispatch(*ids)
    won: list[str] = []

    def race(worker: str) -> None:
        for task_id in ids:
            if r.claim(task_id, worker):
                won.append(task_id)

    threads = [threading.Thread(target=race, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(ids)


def test_workers_that_ask_for_any_task_get_different_ones_in_order() -> None:
    """The next dispatched task is the one with the lowest rank."""
    slow, urgent = r.insert(), r.insert(priority=60)
    r.dispatch(slow, urgent)
    first, second = r.claim(), r.claim()
    assert first and second
    assert [first.id, second.id] == [urgent, slow]
    assert r.claim() is None


def test_a_late_worker_is_fenced_by_the_attempt_number() -> None:
    """A worker that lost its lease can neither finish, log nor keep files."""
    late = r.running()
    assert r.expire(late) == QUEUED
    r.dispatch(late.id)
    current = r.claim(late.id, "w2")
    assert current and current.attempt == 2
    assert finish(late) is None
    assert not db.unit(lambda: leases.append_log(late, 0, "late\n"))
    assert not db.unit(lambda: leases.keep_artifact(late, "a", 0, b"x"))
    assert finish(current) == SUCCEEDED


def test_a_claim_whose_answer_was_lost_is_recognised() -> None:
    """The worker that asks again with its token holds the same lease, not a second one."""
    task_id = r.insert()
    r.dispatch(task_id)
    claim = db.unit(lambda: lifecycle.claim("w1", "token", task_id=task_id))
    assert db.unit(lambda: lifecycle.claimed("token")) == [claim]
    assert db.unit(lambda: lifecycle.claimed("other")) == []


def test_what_is_chosen_and_leased_at_one_moment_leaves_the_events_of_both() -> None:
    """As if it had been dispatched first, also for a second attempt; in order, and with the start counted that a rate is held to."""
    late, first, again = r.insert(rate_key="api", rate_limit=9, rate_per_s=60.0), r.insert(priority=5), r.running(max_attempts=2)
    assert finish(again, BROKEN._replace(retry_after_s=0.0)) == QUEUED
    claims = _start(late, first, again.id)
    assert [(claim.id, claim.attempt, claim.worker_id, claim.token) for claim in claims] == [
        (first, 1, "w1", "token"),
        (late, 1, "w1", "token"),
        (again.id, 2, "w1", "token"),
    ]
    assert db.unit(lambda: lifecycle.claimed("token")) == claims
    told = [(event["seq"], event["attempt"], event["kind"]) for event in db.read(lambda: queries.events(again.id))]
    assert told[3:] == [(4, 1, "retry_scheduled"), (5, 1, "dispatched"), (6, 2, "started")]
    assert [(event["kind"], event["data"]) for event in db.read(lambda: queries.events(late))][1:] == [
        ("dispatched", "{}"),
        ("started", '{"worker":"w1"}'),
    ]
    row = r.row(late)
    assert (row["status"], row["seq"], row["nudges"]) == (RUNNING, 3, 0)
    assert row["dispatched_at"] <= row["started_at"]
    assert [start.task_id for start in db.read(lambda: list(TaskStart.select()))] == [late]
    assert [finish(claim) for claim in claims] == [SUCCEEDED] * 3


def test_what_is_leased_at_the_moment_it_is_chosen_is_still_held_to_its_decision_and_its_deadline() -> None:
    """After another decision nothing starts, and nothing whose time to start has passed."""
    task_id, late = r.insert(), r.insert(expires_at=db.read(db.clock) - 1)
    decided = db.read(load.read).token
    db.unit(lifecycle.void_decisions)
    assert db.unit(lambda: lifecycle.start([task_id], decided, "w1", "token")) == []
    assert r.kinds(task_id) == ["queued"]
    assert [claim.id for claim in _start(task_id, late)] == [task_id]
    assert _start(task_id, late) == []
    assert r.kinds(late) == ["queued"]


def _start(*ids: str) -> list[Claim]:
    return db.unit(lambda: lifecycle.start(ids, load.read().token, "w1", "token"))


def test_a_finish_whose_answer_was_lost_is_recognised() -> None:
    """The worker that asks again with its token learns what it did."""
    claim = r.running()
    db.unit(lambda: lifecycle.finish(claim, OK, "token"))
    assert db.unit(lambda: lifecycle.finished(claim.id, "token")) == SUCCEEDED
    assert db.unit(lambda: lifecycle.finished(claim.id, "other")) is None


def test_a_failure_is_retried_until_max_attempts() -> None:
    """Each retry waits longer; the last failure is the end."""
    claim = r.running(max_attempts=2)
    assert finish(claim, BROKEN) == QUEUED
    waiting = r.row(claim.id)
    assert waiting["ready_at"] > waiting["queued_at"]
    assert waiting["wait_reason"] == "retry_backoff"
    r.dispatch(claim.id)
    again = r.claim(claim.id)
    assert again is not None
    assert finish(again, BROKEN) == FAILED
    assert r.kinds(claim.id) == ["queued", "dispatched", "started", "retry_scheduled", "dispatched", "started", "failed"]


def test_a_failure_that_may_not_be_retried_is_the_end() -> None:
    """Bad input stays bad."""
    claim = r.running(max_attempts=5)
    assert finish(claim, Outcome(FAILED, error={"code": "invalid_payload", "message": "x"}, may_retry=False)) == FAILED


def test_a_handler_names_its_own_waiting_time() -> None:
    """`Retry(after_s=...)` beats the back-off."""
    claim = r.running(max_attempts=2)
    finish(claim, Outcome(FAILED, error={"code": "handler_error", "message": "x"}, retry_after_s=500))
    waiting = r.row(claim.id)
    assert waiting["ready_at"] - waiting["queued_at"] == pytest.approx(500, abs=1)


def test_backoff_doubles_up_to_its_ceiling() -> None:
    """With a third of jitter."""
    assert all(1.3 < lifecycle.backoff_s(1) <= 2 for _ in range(50))
    assert all(200 < lifecycle.backoff_s(40) <= 300 for _ in range(50))


def test_lost_workers_are_counted_apart_from_failures() -> None:
    """A task with one attempt survives two lost workers, and ends as worker_lost at the third."""
    claim = r.running(max_attempts=1)
    ends = []
    for _ in range(3):
        ends.append(r.expire(claim))
        r.dispatch(claim.id)
        claim = r.claim(claim.id) or claim
    assert ends == [QUEUED, QUEUED, FAILED]
    assert r.row(claim.id)["error_code"] == "worker_lost"


@pytest.mark.parametrize("end", ["expire", "release"])
def test_a_task_that_may_run_at_most_once_fails_with_its_worker(end: str) -> None:
    """P4: whether the worker was lost or stopped, there is no second run."""
    claim = r.running(max_losses=1)
    assert (r.expire(claim) if end == "expire" else db.unit(lambda: lifecycle.release(claim, "its worker was stopped", new_id()))) == FAILED
    assert r.row(claim.id)["error_code"] == "worker_lost"


def test_a_heartbeat_that_came_meanwhile_keeps_the_lease() -> None:
    """The sweep takes only the exact beat it has watched."""
    claim = r.running()
    seen = r.row(claim.id)["beat"]
    assert db.unit(lambda: leases.heartbeat("w1", [claim.id])) == {(claim.id, 1): False}
    assert db.unit(lambda: lifecycle.fence(claim.id, 1, seen)) is None
    assert r.row(claim.id)["status"] == RUNNING


def test_a_heartbeat_renews_only_ones_own_leases() -> None:
    """Of the tasks named, those of others are not in the answer."""
    mine, other = r.running("w1"), r.running("w2")
    assert set(db.unit(lambda: leases.heartbeat("w1", [mine.id, other.id]))) == {(mine.id, 1)}


def test_a_waiting_task_is_cancelled_at_once() -> None:
    """Queued or dispatched."""
    for task_id in (queued := r.insert(), dispatched := r.insert()):
        if task_id == dispatched:
            r.dispatch(task_id)
        assert db.unit(lambda task_id=task_id: lifecycle.cancel(task_id, "alice")) == CANCELLED  # type: ignore[misc]
    assert r.kinds(queued) == ["queued", "cancelled"]
    assert r.claim(dispatched) is None


def test_a_running_task_is_asked_to_stop_once() -> None:
    """The heartbeat brings the request; asking again adds nothing."""
    claim = r.running()
    assert db.unit(lambda: lifecycle.cancel(claim.id, None)) == RUNNING
    assert db.unit(lambda: lifecycle.cancel(claim.id, None)) == RUNNING
    assert db.unit(lambda: leases.heartbeat("w1", [claim.id])) == {(claim.id, 1): True}
    assert r.kinds(claim.id).count("cancel_requested") == 1


@pytest.mark.parametrize("end", ["failure", "release", "expire"])
def test_a_task_that_was_asked_to_stop_never_runs_again(end: str) -> None:
    """A failure, a stopped worker or a lost one end it as cancelled, although attempts are left."""
    claim = r.running(max_attempts=5)
    db.unit(lambda: lifecycle.cancel(claim.id, None))
    ways: dict[str, Callable[[], Any]] = {
        "failure": lambda: finish(claim, BROKEN),
        "release": lambda: db.unit(lambda: lifecycle.release(claim, "stop", new_id())),
        "expire": lambda: r.expire(claim),
    }
    assert ways[end]() == CANCELLED
    assert r.row(claim.id)["error_code"] == "cancelled"


def test_a_released_task_counts_neither_as_failed_nor_as_lost() -> None:
    """A worker that stops orderly hands its tasks back."""
    claim = r.running()
    assert db.unit(lambda: lifecycle.release(claim, "stop", new_id(), [LogPart(0, "half\n")])) == QUEUED
    after = r.row(claim.id)
    assert (after["failures"], after["losses"], after["attempt"]) == (0, 0, 1)
    assert r.kinds(claim.id)[-1] == "released"


def test_a_timeout_is_a_status_of_its_own() -> None:
    """timed_out, not failed."""
    claim = r.running()
    assert finish(claim, Outcome(TIMED_OUT, error={"code": "timeout", "message": "long"})) == TIMED_OUT


def test_the_order_of_events_and_log_chunks_is_one() -> None:
    """Both take the next number of the task."""
    claim = r.running()
    db.unit(lambda: leases.append_log(claim, 0, "one\n"))
    finish(claim, tail="two\n")
    numbers = [row[0] for row in db.read(lambda: list(TaskEvent.select(TaskEvent.seq).order_by(TaskEvent.seq).tuples()))]
    assert numbers == [1, 2, 3, 6]
    assert r.row(claim.id)["seq"] == 6


def test_a_transition_that_has_no_arrow_is_a_mistake_of_ours() -> None:
    """It raises instead of writing."""
    with pytest.raises(ValueError, match="No arrow leads from succeeded to queued"):
        db.unit(lambda: moves.move(Task.id == "x", (SUCCEEDED,), QUEUED, "queued", {}))
    with pytest.raises(ValueError, match="No arrow leads from queued to succeeded"):
        db.unit(lambda: moves.change(SUCCEEDED, (QUEUED,), "succeeded", {}, where="true"))


@pytest.mark.parametrize("way", [lifecycle.insert, lifecycle.enter])
@pytest.mark.parametrize(
    "more", [{}, {"title": "t", "priority": 7, "concurrency_key": "k", "concurrency_limit": 3, "silence_s": 0.5}, {"not_before": 4e9}]
)
def test_a_task_is_the_same_whether_it_comes_alone_or_among_others(way: Callable[[list[NewTask]], object], more: dict[str, Any]) -> None:
    """All that it brings along, and what it gets by the clock of the database."""
    given: dict[str, Any] = {"type": "echo", "queue": "q", "payload": '{"a":"ä"}', "labels": {}, "priority": 0, "not_before": None}
    given |= {"timeout_s": 1.5, "max_attempts": 2, "max_losses": 3, "retry_of": "other", **more}
    alone, one, two = (NewTask(id=task_id, correlation_id=task_id, **given) for task_id in (new_id(), new_id(), new_id()))
    other = NewTask(
        id=new_id(), correlation_id="other", **(given | {"rate_key": "r", "rate_limit": 2, "rate_per_s": 0.5, "requested_by": "me"})
    )
    for some in ([alone], [one, other, two]):
        db.unit(lambda some=some: way(some))  # type: ignore[misc]
    rows = [r.row(task.id) for task in (alone, one, two)]
    for row in rows:
        assert row["created_at"] == row["queued_at"] == row["updated_at"] == row["rank"] + row["priority"]
        assert row["nudge_at"] == (row["not_before"] or row["created_at"] + NUDGE_S)
        assert row["ready_at"] == (row["not_before"] or 0)
        assert {name: row[name] for name in given if name != "labels"} == {name: value for name, value in given.items() if name != "labels"}
    own = ("id", "correlation_id", "rank", "created_at", "queued_at", "updated_at", "trace_due_at", "nudge_at")
    same = [{name: value for name, value in row.items() if name not in own} for row in rows]
    assert same == [same[0]] * 3
    assert [r.row(other.id)[name] for name in ("rate_key", "rate_limit", "rate_per_s", "requested_by")] == ["r", 2, 0.5, "me"]
    assert r.kinds(alone.id) == r.kinds(two.id) == ["queued"]


def test_a_thousand_tasks_are_inserted_together() -> None:
    """The largest batch fits whatever one statement may carry."""
    tasks = [lifecycle.NewTask(new_id(), "echo", "default", "{}", {"n": str(n)}, 0, None, 60, 1, 3, "x") for n in range(1000)]
    assert len(db.unit(lambda: lifecycle.insert(tasks))) == 1000


def test_a_task_without_a_key_enters_as_any_other_is_inserted() -> None:
    """Row and first event are the same, but for their names and times."""
    known = r.insert(priority=7, not_before=4e9, timeout_s=5.0, labels={"a": "b"}, concurrency_key="k", actor="alice")
    given = {"priority": 7, "not_before": 4e9, "timeout_s": 5.0, "labels": {"a": "b"}, "concurrency_key": "k", "actor": "alice"}
    entered = new_id()
    common: dict[str, Any] = {"type": "echo", "queue": "default", "payload": "{}", "max_attempts": 1, "max_losses": 3}
    task = lifecycle.NewTask(id=entered, correlation_id=entered, **common, **given)
    db.unit(lambda: lifecycle.enter([task]), is_one_statement=False)

    own = ("id", "correlation_id", "rank", "created_at", "queued_at", "updated_at", "trace_due_at")
    rows = [{name: value for name, value in r.row(task_id).items() if name not in own} for task_id in (known, entered)]
    assert rows[0] == rows[1]
    assert r.row(entered)["rank"] == r.row(entered)["created_at"] - 7
    told = ("seq", "attempt", "kind", "data")
    events = [db.read(lambda task_id=task_id: queries.events(task_id)) for task_id in (known, entered)]  # type: ignore[misc]
    for [event] in events:
        assert {name: event[name] for name in told} == {"seq": 1, "attempt": 0, "kind": "queued", "data": '{"by":"alice"}'}
    assert events[1][0]["at"] == r.row(entered)["created_at"]


def test_what_is_entered_a_second_time_changes_nothing() -> None:
    """As after a commit whose answer was lost; those beside it enter."""
    task, other = (lifecycle.NewTask(new_id(), "echo", "default", "{}", {}, 0, None, 60, 1, 3, "x") for _ in range(2))
    for tasks in ([task], [task, other]):
        assert lifecycle.is_one_entry(tasks)
        db.unit(lambda tasks=tasks: lifecycle.enter(tasks), is_one_statement=True)  # type: ignore[misc]
    assert [r.kinds(one.id) for one in (task, other)] == [["queued"], ["queued"]]
    labelled = lifecycle.NewTask(new_id(), "echo", "default", "{}", {"a": "b"}, 0, None, 60, 1, 3, "x")
    for _ in range(2):
        db.unit(lambda: lifecycle.enter([labelled]))
    assert r.kinds(labelled.id) == ["queued"]


def test_nudges_of_a_waiting_task_come_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """5, 10, 20, 40 seconds, then once a minute."""
    task_id = r.insert()
    r.dispatch(task_id)
    waits = []
    for _ in range(6):
        db.unit(lambda: Task.update(nudge_at=0).where(Task.id == task_id).execute())
        assert [nudge.id for nudge in db.unit(lambda: reminders.due_to_run(10))] == [task_id]
        waits.append(round(r.row(task_id)["nudge_at"] - db.read(db.clock)))
    assert waits == [5, 10, 20, 40, 60, 60]


def test_a_task_whose_trace_lags_is_named_until_it_is_traced(rows: Settings) -> None:
    """Asked for with back-off, no more once the folder tells all."""
    task_id = r.insert()
    db.unit(lambda: Task.update(trace_due_at=0).execute())
    assert db.unit(lambda: reminders.due_to_trace(10)) == [task_id]
    assert db.unit(lambda: reminders.due_to_trace(10)) == []
    db.unit(lambda: reminders.traced([(task_id, 1, 40)]))
    db.unit(lambda: Task.update(trace_due_at=0).execute())
    assert db.unit(lambda: reminders.due_to_trace(10)) == []


def test_folders_of_tasks_that_ended_come_before_those_of_a_crowd_that_waits() -> None:
    """However long that has waited, and of it only a few at once."""
    for _ in range(30):
        r.insert()
    runs, ended = r.running().id, r.running()
    db.unit(lambda: lifecycle.finish(ended, Outcome(SUCCEEDED), new_id()))
    db.unit(lambda: Task.update(trace_due_at=1).execute())
    db.unit(lambda: Task.update(trace_due_at=2).where(Task.id << [runs, ended.id]).execute())

    due = db.unit(lambda: reminders.due_to_trace(200))
    assert (set(due[:2]), len(due)) == ({runs, ended.id}, 22)
    db.unit(lambda: Task.update(trace_due_at=2).where(Task.id << [runs, ended.id]).execute())
    assert set(db.unit(lambda: reminders.due_to_trace(2))) == {runs, ended.id}
    assert len(db.unit(lambda: reminders.due_to_trace(200))) == 10
    assert db.unit(lambda: reminders.due_to_trace(200)) == []


def test_statuses_fit_the_schema() -> None:
    """The database itself refuses a status that does not exist."""
    task_id = r.insert()
    with pytest.raises(Exception, match=r"(?i)check"):
        db.unit(lambda: Task.update(status="lost").where(Task.id == task_id).execute())
    assert set(itertools.chain.from_iterable(ARROWS.values())) | {QUEUED} >= {DISPATCHED, *FINAL}

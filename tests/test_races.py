"""Races that were found in review, replayed step by step on both databases."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests import rows as r
from tests.servers import wait_for
from tower import db, host, leases, lifecycle, load
from tower.leases import Claim
from tower.lifecycle import LogPart, Outcome
from tower.models import TaskLog, new_id
from tower.settings import Settings
from tower.sweep import Sweep
from tower.terms import CANCELLED, FAILED, QUEUED, RUNNING

BROKEN = Outcome(FAILED, error={"code": "handler_error", "message": "no"})


def _ends(claim: Claim, way: str) -> Callable[[], Any]:
    if way == "failure":
        return lambda: lifecycle.finish(claim, BROKEN, new_id())
    if way == "release":
        return lambda: lifecycle.release(claim, "stop", new_id())
    beat = db.unit(lambda: lifecycle.fence(claim.id, claim.attempt, r.row(claim.id)["beat"]))
    assert beat is not None
    return lambda: lifecycle.expire(claim.id, claim.attempt, beat, "gone")


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("way", ["failure", "release", "expire"])
def test_a_cancel_that_comes_while_a_task_goes_back_to_the_queue_is_not_lost(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two is first, the task never runs again."""
    claim = r.running(max_attempts=5)
    end, move, between = _ends(claim, way), lifecycle.move, threading.Event()
    cancelled: list[str | None] = []
    canceller = threading.Thread(target=lambda: cancelled.append(db.unit(lambda: lifecycle.cancel(claim.id, None))))

    def slow_move(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is not canceller and not between.is_set():
            between.set()
            canceller.start()
            canceller.join(0.3)  # it either waits for us, or slips in between
        return move(*arguments, **options)

    monkeypatch.setattr(lifecycle, "move", slow_move)
    db.unit(end)
    canceller.join(10)
    assert cancelled == [CANCELLED]
    assert r.row(claim.id)["status"] == CANCELLED


@pytest.mark.usefixtures("rows")
def test_a_fenced_worker_can_do_nothing_more() -> None:
    """So its processes may be ended before the task is given on."""
    claim = r.running()
    assert db.unit(lambda: lifecycle.fence(claim.id, claim.attempt, r.row(claim.id)["beat"])) is not None
    assert db.unit(lambda: leases.heartbeat("w1", [claim.id])) == {}
    assert db.unit(lambda: lifecycle.finish(claim, BROKEN, new_id())) is None
    assert not db.unit(lambda: leases.append_log(claim, 0, "late\n"))
    assert r.row(claim.id)["status"] == RUNNING


@pytest.mark.usefixtures("rows")
def test_log_lines_whose_commit_was_not_answered_are_there_once() -> None:
    """Also when they come again with the end of the attempt."""
    claim = r.running()
    db.unit(lambda: leases.append_log(claim, 0, "one\n"))
    assert db.read(lambda: leases.appended(claim, 0))
    tail = [LogPart(0, "one\n", is_doubtful=True), LogPart(1, "two\n")]
    db.unit(lambda: lifecycle.finish(claim, BROKEN, new_id(), tail))
    texts = db.read(lambda: [row[0] for row in TaskLog.select(TaskLog.text).order_by(TaskLog.seq).tuples()])
    assert texts == ["one\n", "two\n"]


def test_a_step_of_the_wall_clock_makes_no_process_look_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its start is told in ticks since boot."""
    import psutil

    me = host.this_process()
    boot = psutil.boot_time()
    for module in {psutil._psplatform, psutil}:
        monkeypatch.setattr(module, "boot_time", lambda: boot + 3600)
    assert not me.is_dead()


def test_tasks_of_a_stopping_worker_take_no_room_from_others(rows: Settings) -> None:
    """They will come back to the queue or end where they are."""
    from actors.orchestrator import Dispatcher

    r.add_worker("leaving", slots=0)
    r.add_worker("staying", slots=2)
    for _ in range(8):
        r.running(worker="leaving")
    waiting = [r.insert() for _ in range(2)]
    assert Dispatcher(rows, r.Nudges()).run_pass() == 2  # type: ignore[arg-type]
    assert {r.row(task_id)["status"] for task_id in waiting} == {"dispatched"}


def test_a_late_beat_keeps_the_processes_of_a_live_worker(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is taken before anything is killed, not after."""
    killed: list[str] = []
    monkeypatch.setattr("tower.sweep.end_marked", lambda task_id, attempt: killed.append(task_id))
    r.add_worker(pid=2**22 + 1, pid_space=host.pid_space(), pid_started=0)
    claim = r.running()
    fence = lifecycle.fence

    def beaten(task_id: str, attempt: int, beat: int) -> int | None:
        leases.heartbeat("w1", [task_id])
        return fence(task_id, attempt, beat)

    monkeypatch.setattr("tower.sweep.lifecycle.fence", beaten)
    Sweep(rows, r.Nudges()).run_once()  # type: ignore[arg-type]
    assert killed == []
    assert r.row(claim.id)["status"] == RUNNING


@pytest.mark.slow
def test_a_task_starts_at_its_time_not_seconds_later(rows: Settings) -> None:
    """The sweep that wakes for it finds its nudge due."""

    nudges = r.Nudges()
    task_id = r.insert(not_before=db.read(db.clock) + 0.4)
    sweep = Sweep(rows, nudges)  # type: ignore[arg-type]
    sweep.run_once()
    assert nudges.sent == []
    wait_for("its time", lambda: db.read(db.clock) > (r.row(task_id)["not_before"] or 0))
    sweep.run_once()
    assert nudges.sent == [("tower.orchestrate", task_id)]
    assert r.row(task_id)["status"] == QUEUED


def test_a_start_does_not_wait_for_a_task_that_somebody_is_about_to_cancel(new_database: Callable[[], str]) -> None:
    """It may hold the row of a task that has ended, which a cancel of both waits for: on Postgres that would be a circle."""
    db.open_database(Settings(database_url=new_database()))
    chosen, other = r.insert(), r.insert()
    token, is_cancelled, go_on = db.read(load.read).token, threading.Event(), threading.Event()

    def cancel() -> None:
        lifecycle.cancel_all([chosen], None)
        is_cancelled.set()
        go_on.wait(20)

    canceller = threading.Thread(target=lambda: db.unit(cancel))
    canceller.start()
    assert is_cancelled.wait(20)
    started = db.unit(lambda: lifecycle.start([chosen, other], token, "w1", "token"))
    assert ([claim.id for claim in started], go_on.is_set()) == ([other], False)
    go_on.set()
    canceller.join(20)
    assert r.row(chosen)["status"] == CANCELLED
    db.close_database()

"""The sweep: what it repairs, and what it leaves alone."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from tests import rows as r
from tests.servers import wait_for
from tower import db, host, lifecycle, lifeline, queries, reminders
from tower.errors import Unavailable
from tower.lifecycle import Outcome
from tower.models import Task, TaskStart, Worker
from tower.settings import Settings
from tower.sweep import Sweep
from tower.terms import FAILED, QUEUED, RUNNING


@pytest.fixture
def sweep(rows: Settings, nudges: r.Nudges) -> Sweep:
    return Sweep(rows, nudges)  # type: ignore[arg-type]


def make_due(**more: Any) -> None:
    """Let every nudge and reminder be due now."""
    db.unit(lambda: Task.update(nudge_at=0, trace_due_at=0, **more).execute())


def test_a_queued_task_whose_nudge_was_lost_is_nudged_again(sweep: Sweep, nudges: r.Nudges) -> None:
    """Once, for the orchestrator actor; not again before its time."""
    task_id = r.insert()
    make_due()
    sweep.run_once()
    sweep.run_once()
    assert nudges.sent.count(("tower.orchestrate", task_id)) == 1


def test_a_dispatched_task_whose_nudge_was_lost_is_nudged_again(sweep: Sweep, nudges: r.Nudges) -> None:
    """To the handler actor of its type."""
    r.add_worker()
    task_id = r.insert()
    r.dispatch(task_id)
    make_due()
    sweep.run_once()
    assert ("handler.echo", task_id) in nudges.sent


def test_every_nudge_is_sent_again_at_once_when_the_broker_has_forgotten_them(sweep: Sweep, nudges: r.Nudges) -> None:
    """Not one by one as each becomes due; and only when its memory changed."""
    r.add_worker()
    dispatched, queued = [r.insert(), r.insert()], r.insert()
    r.dispatch(*dispatched)
    db.unit(lambda: Task.update(nudge_at=db.now() + 60).execute())
    nudges.memory = "before"
    sweep.run_once()
    sweep.run_once()
    assert nudges.sent == []
    nudges.memory = "after"
    sweep.run_once()
    assert sorted(nudges.sent) == sorted([("handler.echo", task_id) for task_id in dispatched] + [("tower.orchestrate", queued)])


def test_a_dispatched_task_without_any_worker_goes_back_to_the_queue(sweep: Sweep) -> None:
    """Its order and its reason are true again."""
    task_id = r.insert()
    r.dispatch(task_id)
    make_due()
    sweep.run_once()
    assert r.row(task_id)["status"] == QUEUED
    assert r.kinds(task_id)[-1] == "undelivered"


def test_a_missing_trace_is_asked_for_again(sweep: Sweep, nudges: r.Nudges) -> None:
    """Also for a task that only waits."""
    task_id = r.insert()
    make_due()
    sweep.run_once()
    assert ("tower.trace", task_id) in nudges.sent


def test_a_lease_is_taken_only_after_we_saw_the_beat_stand_still(sweep: Sweep, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By our own clock: a step of any other clock takes nothing away."""
    now = [1000.0]
    monkeypatch.setattr("tower.sweep.time.monotonic", lambda: now[0])
    r.add_worker()
    claim = r.running()
    step = rows.lease_s / 2
    for _ in range(2):
        sweep.run_once()
        now[0] += step
    assert r.row(claim.id)["status"] == RUNNING
    sweep.run_once()
    assert r.row(claim.id)["status"] == QUEUED
    assert r.kinds(claim.id)[-1] == "worker_lost"


def test_a_sweep_that_was_asleep_itself_starts_watching_anew(sweep: Sweep, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed lid or a database that was away proves nothing about workers."""
    now = [1000.0]
    monkeypatch.setattr("tower.sweep.time.monotonic", lambda: now[0])
    r.add_worker()
    claim = r.running()
    sweep.run_once()
    now[0] += rows.lease_s * 100
    sweep.run_once()
    assert r.row(claim.id)["status"] == RUNNING


def test_a_database_that_takes_no_writes_proves_nothing_about_workers(
    sweep: Sweep, rows: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could not beat either; once it does again, they have a whole lease for it."""
    now = [1000.0]
    monkeypatch.setattr("tower.sweep.time.monotonic", lambda: now[0])
    r.add_worker()
    claim = r.running()

    def pass_after(leases: float) -> None:
        now[0] += rows.lease_s * leases
        sweep.run_once()

    def refuse(*_: Any) -> None:
        raise Unavailable("It is full.", code="database_unavailable")

    for _ in range(2):
        pass_after(0.4)
    with monkeypatch.context() as patched, pytest.raises(Unavailable):
        patched.setattr(lifecycle, "fence", refuse)
        for _ in range(2):
            pass_after(0.4)
    for _ in range(3):
        pass_after(0.4)
    assert r.row(claim.id)["status"] == RUNNING
    pass_after(0.4)
    assert r.row(claim.id)["status"] == QUEUED


def test_tasks_of_a_process_that_died_here_are_taken_back_at_once(sweep: Sweep) -> None:
    """And what it left running is ended first."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    r.add_worker(pid=dead.pid, pid_space=host.pid_space(), pid_started=time.time())
    claim = r.running()
    orphan = subprocess.Popen(["sleep", "60"], env={host.MARK: f"{claim.id}:{claim.attempt}", "PATH": "/usr/bin:/bin"})
    sweep.run_once()
    assert r.row(claim.id)["status"] == QUEUED
    assert orphan.wait(5) == -9
    wait_for("the worker to be forgotten", lambda: not db.read(lambda: Worker.select().exists()), 1)


def test_tasks_of_a_container_that_was_restarted_are_taken_back_at_once(rows: Settings, nudges: r.Nudges, tmp_path: Path) -> None:
    """Its old pids mean nothing any more, its lock does; the file goes with the worker."""
    settings = rows.model_copy(update={"run_dir": tmp_path / "run"})
    sweep = Sweep(settings, nudges)  # type: ignore[arg-type]
    file = lifeline.hold(tmp_path / "run", "w1")
    assert file is not None
    r.add_worker(host=host.hostname())
    claim = r.running()
    sweep.run_once()
    assert r.row(claim.id)["status"] == RUNNING
    os.close(file)
    sweep.run_once()
    assert r.row(claim.id)["status"] == QUEUED
    assert list((tmp_path / "run").iterdir()) == []


def test_a_worker_that_dies_on_this_machine_is_noticed_between_two_passes(rows: Settings, nudges: r.Nudges, tmp_path: Path) -> None:
    """As soon as its lifeline is free, however seldom the passes are."""
    settings = rows.model_copy(update={"run_dir": tmp_path, "sweep_s": 3600.0, "lease_s": 3600.0})
    file = lifeline.hold(tmp_path, "w1")
    assert file is not None
    r.add_worker(pid=2**22 + 1, pid_space=host.pid_space())
    claim = r.running()
    sweep = Sweep(settings, nudges)  # type: ignore[arg-type]
    sweep.start()
    try:
        wait_for("its first look", lambda: sweep._seen == {"w1": True})
        assert r.row(claim.id)["status"] == RUNNING
        os.close(file)
        wait_for("the pass", lambda: r.row(claim.id)["status"] == QUEUED)
    finally:
        sweep.stop()


def test_a_task_waits_until_what_its_lost_worker_left_is_gone(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its commands never overlap, however long that takes."""
    monkeypatch.setattr("tower.sweep.end_marked", lambda task_id, attempt: False)
    r.add_worker(pid=2**22 + 1, pid_space=host.pid_space(), pid_started=0)
    claim = r.running()
    sweep.run_once()
    assert r.row(claim.id)["status"] == RUNNING
    monkeypatch.setattr("tower.sweep.end_marked", lambda task_id, attempt: True)
    sweep.run_once()
    assert r.row(claim.id)["status"] == QUEUED


def test_a_pid_that_was_given_to_another_process_is_not_the_worker(sweep: Sweep) -> None:
    """The start time tells them apart."""
    me = host.this_process()
    r.add_worker(pid=me.pid, pid_space=me.space, pid_started=me.started - 1)
    claim = r.running()
    sweep.run_once()
    assert r.row(claim.id)["status"] == QUEUED


def test_a_live_process_keeps_its_tasks(sweep: Sweep) -> None:
    """Even if it has not beaten yet."""
    me = host.this_process()
    r.add_worker(pid=me.pid, pid_space=me.space, pid_started=me.started)
    claim = r.running()
    sweep.run_once()
    assert r.row(claim.id)["status"] == RUNNING


def test_a_task_that_loses_every_worker_ends_as_worker_lost(sweep: Sweep) -> None:
    """A poison task stops nothing else."""
    r.add_worker(pid=2**22 + 1, pid_space=host.pid_space(), pid_started=0)
    claim = r.running()
    db.unit(lambda: Task.update(losses=2).execute())
    sweep.run_once()
    assert (r.row(claim.id)["status"], r.row(claim.id)["error_code"]) == (FAILED, "worker_lost")


def test_starts_that_no_window_reaches_are_forgotten(sweep: Sweep) -> None:
    """Those of the last day stay."""
    r.dispatch(r.insert(rate_key="old"), r.insert(rate_key="new"))
    db.unit(lambda: TaskStart.update(at=TaskStart.at - 86_401).where(TaskStart.rate_key == "old").execute())
    sweep.run_once()
    assert [start.rate_key for start in db.read(lambda: list(TaskStart.select()))] == ["new"]


def test_tasks_whose_time_has_come_start_however_many_there_are(sweep: Sweep, nudges: r.Nudges, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd with the same start time is not started by and by."""
    monkeypatch.setattr("tower.reminders._WOKEN", 2)
    ids = [r.insert(not_before=4e9) for _ in range(5)]
    later = r.insert(not_before=4e9)
    db.unit(lambda: Task.update(ready_at=db.now() - 1, nudge_at=db.now() - 1).where(Task.id << ids).execute())
    sweep.run_once()
    assert [r.row(task_id)["ready_at"] for task_id in ids] == [0] * 5
    assert r.row(later)["ready_at"] == 4e9
    assert ("tower.orchestrate", ids[0]) in nudges.sent


def test_a_row_that_somebody_locks_keeps_no_other_task_asleep(new_database: Callable[[], str]) -> None:
    """On Postgres, where rows can be locked."""
    url = new_database()
    db.open_database(Settings(database_url=url))
    try:
        locked, other = r.insert(not_before=4e9), r.insert(not_before=4e9)
        db.unit(lambda: Task.update(ready_at=1.0).execute())
        with closing(psycopg2.connect(url)) as somebody:
            somebody.cursor().execute("SELECT id FROM task WHERE id = %s FOR UPDATE", (locked,))
            assert not db.unit(reminders.wake)
        assert [r.row(task_id)["ready_at"] for task_id in (locked, other)] == [1.0, 0.0]
    finally:
        db.close_database()


def test_a_sweep_wakes_for_the_moment_a_task_may_start_no_more(sweep: Sweep, rows: Settings) -> None:
    """And not before the next pass if there is no such moment."""
    assert sweep.run_once() > rows.sweep_s
    r.insert(expires_at=db.read(db.clock) + rows.sweep_s / 2)
    assert sweep.run_once() < rows.sweep_s


def test_nothing_waits_for_a_clock_that_was_set_back(sweep: Sweep, nudges: r.Nudges, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was due in five seconds by the clock of then is due in five seconds by the clock of now; what a client named stays."""
    right = db._now
    with monkeypatch.context() as ahead:
        ahead.setattr(db, "_now", lambda: f"({right()} + 3600)")
        sweep.run_once()
        r.add_worker()
        late = db.read(db.clock) + 60
        named, sent, failed, held = r.insert(not_before=late), r.insert(), r.running(max_attempts=2), r.running()
        r.dispatch(sent)
        outcome = Outcome(FAILED, error={"code": "handler_error", "message": "boom"}, retry_after_s=5.0)
        assert db.unit(lambda: lifecycle.finish(failed, outcome, "t")) == QUEUED
    assert r.row(failed.id)["ready_at"] > db.read(db.clock) + 3600
    sweep.run_once()
    now = db.read(db.clock)
    assert [r.row(named)[time] for time in ("ready_at", "nudge_at")] == [late, late]
    assert now < r.row(failed.id)["ready_at"] < now + 5.1
    assert r.row(sent)["nudge_at"] < now + 5.1
    assert r.row(sent)["trace_due_at"] < now + 61
    db.unit(lambda: lifecycle.release(held, "its worker was stopped", "u"))
    assert [r.row(task_id)["rank"] < now + 1 for task_id in (named, sent, failed.id, held.id)] == [True] * 4
    assert [worker["beat_at"] < now for worker in db.read(queries.live_workers)] == [True]


def test_an_idle_tower_writes_nothing(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that finds nothing due only reads; but for the first one, which cannot know what the clock did before it."""
    sweep.run_once()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pass without need wrote")

    monkeypatch.setattr(db, "unit", refuse)
    sweep.run_once()


def test_two_sweeps_do_no_more_than_one(rows: Settings) -> None:
    """Every statement compares before it sets."""
    nudges, task_id = r.Nudges(), r.insert()
    r.add_worker(pid=2**22 + 1, pid_space=host.pid_space(), pid_started=0)
    claim = r.running()
    make_due()
    for _ in range(2):
        for sweep in (Sweep(rows, nudges), Sweep(rows, nudges)):  # type: ignore[arg-type]
            sweep.run_once()
    assert r.kinds(claim.id).count("worker_lost") == 1
    assert nudges.sent.count(("tower.trace", task_id)) == 1

"""The process that makes the folders of many tasks: what it makes, and that nothing depends on it."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from actors import scribe
from actors.scribe import Scribe
from actors.trace import Tracer
from tests import rows as r
from tests.folders import contents
from tests.processes import scribe_of
from tests.servers import wait_for
from tower import db, lifecycle, trace
from tower.lifecycle import LogPart, Outcome
from tower.models import new_id
from tower.settings import Settings
from tower.terms import FAILED, SUCCEEDED

MANY = 12


@pytest.fixture
def tracer(rows: Settings) -> Iterator[Tracer]:
    made = Tracer(rows)
    yield made
    made.stop()


def ended(count: int = MANY) -> list[str]:
    """Return tasks that have ended, every third of them in failure."""
    claims = [r.running(labels={"team": "a"}) for _ in range(count)]
    failure = Outcome(FAILED, error={"code": "exit_code", "message": "It said no."})
    for number, claim in enumerate(claims):
        outcome = Outcome(SUCCEEDED, result='{"a":1}') if number % 3 else failure
        db.unit(partial(lifecycle.finish, claim, outcome, new_id(), [LogPart(1, "a line\n")]))
    return [claim.id for claim in claims]


def ready(asked: Scribe) -> psutil.Process:
    """Have the scribe started, wait until it works, and return it."""
    ids = ended()
    wait_for("the scribe", lambda: bool(asked.make(ids)))
    found = scribe_of(os.getpid())
    assert found
    return found


def test_it_writes_what_its_worker_would(tracer: Tracer, rows: Settings, tmp_path: Path) -> None:
    """Byte for byte, and says of each what is to be marked."""
    ready(tracer._scribe)
    ids = ended()
    made = tracer._scribe.make(ids)
    assert list(made) == sorted(ids)
    for task_id in ids:
        row = r.row(task_id)
        tracer.rebuild(task_id, tmp_path)
        assert contents(rows.trace_dir / task_id) == contents(tmp_path / task_id)
        mark = made[task_id]
        assert (mark.seq, mark.log_size, mark.ended_at, mark.trace_error) == (
            row["seq"],
            (tmp_path / task_id / "log.txt").stat().st_size,
            row["finished_at"],
            None,
        )
        assert row["traced_seq"] == 0


def test_few_folders_are_not_worth_a_process(tracer: Tracer) -> None:
    tracer.trace_all(ended(3))
    assert scribe_of(os.getpid()) is None


def test_a_tracer_marks_what_it_made_and_makes_the_rest(tracer: Tracer, rows: Settings) -> None:
    """Tasks that go on, or whose folders are there already, are none of its business."""
    ready(tracer._scribe)
    going_on, known = r.running().id, ended(1)[0]
    tracer.trace(known)
    (rows.trace_dir / known / "log.txt").unlink()
    ids = [going_on, known, *ended()]
    tracer.trace_all(ids)
    for task_id in ids:
        assert r.row(task_id)["traced_seq"] == r.row(task_id)["seq"]
        assert (rows.trace_dir / task_id / "log.txt").exists()
    assert trace.is_complete(r.row(known))
    assert not (rows.trace_dir / going_on / "output.json").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_dies_or_hangs_delays_folders_and_harms_none(
    tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """The worker makes them itself, says so once, and starts another after a while."""
    found = ready(tracer._scribe)
    os.kill(found.pid, number)
    ids = ended()
    with caplog.at_level(logging.WARNING), monkeypatch.context() as hasty:
        hasty.setattr(scribe, "_PATIENCE_S", 0.3)
        tracer.trace_all(ids)
        tracer.trace_all(ended())
    assert all(trace.is_complete(r.row(task_id)) for task_id in ids)
    assert len([record for record in caplog.records if "without the scribe" in record.message]) == 1
    wait_for("its end", lambda: scribe_of(os.getpid()) is None)
    monkeypatch.setattr(tracer._scribe, "_rests_until", 0.0)
    assert ready(tracer._scribe).pid != found.pid


def test_it_ends_when_it_has_had_nothing_to_do(tracer: Tracer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """That is no trouble: the next one starts at once."""
    monkeypatch.setattr(scribe, "_IDLE_S", 1.0)
    with caplog.at_level(logging.WARNING):
        found = ready(tracer._scribe)
        wait_for("its end", lambda: tracer._scribe._process is None and not found.is_running())
        ready(tracer._scribe)
    assert caplog.records == []


def test_it_is_told_nothing_that_opens_the_tower(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOWER_KEY", "a key of somebody's")
    monkeypatch.setenv("DATABASE_URL", "postgres://somebody:secret@host/tower")
    found = ready(tracer._scribe)
    assert not {"TOWER_KEY", "DATABASE_URL"} & set(found.environ())
    assert "secret" not in " ".join(found.cmdline())


def test_one_that_hangs_holds_up_nobody_who_stops(tracer: Tracer) -> None:
    """It is killed, and whoever waits for its answer goes on."""
    found = ready(tracer._scribe)
    found.suspend()
    asking = threading.Thread(target=tracer._scribe.make, args=(ended(),))
    asking.start()
    wait_for("the question", tracer._scribe._turn.locked)
    tracer.stop()
    asking.join(2)
    assert not asking.is_alive()
    wait_for("its end", lambda: scribe_of(os.getpid()) is None)


def test_it_ends_with_whoever_started_it(tracer: Tracer) -> None:
    found = ready(tracer._scribe)
    tracer.stop()
    wait_for("its end", lambda: not found.is_running())
    assert tracer._scribe.make(ended()) == {}
    assert scribe_of(os.getpid()) is None


def test_tasks_that_are_gone_are_nothing_to_it(tracer: Tracer) -> None:
    found = ready(tracer._scribe)
    assert tracer._scribe.make([new_id() for _ in range(MANY)]) == {}
    assert found.is_running()

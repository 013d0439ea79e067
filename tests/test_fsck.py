"""fsck: every difference is made for real, found, explained, repaired by its rule, and gone."""

import errno
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest

from actors.trace import Tracer
from tests import rows as r
from tests.folders import contents
from tests.servers import Redis, free_port
from tower import db, fsck, host, leases, lifecycle
from tower.broker import Nudger, open_broker
from tower.cli import main
from tower.folder import open_folder
from tower.fsck import FINDINGS, Result, load
from tower.leases import Claim
from tower.lifecycle import LogPart, Outcome
from tower.models import LOST, STRUCK, Task, TaskEvent, TaskLabel, TaskLog, Worker, new_id
from tower.settings import Settings
from tower.sweep import Sweep
from tower.terms import DISPATCHED, FAILED, RUNNING, SUCCEEDED

_parts = itertools.count()
#: Two databases times every finding is more than the fast part of the suite can wait for.
slow = pytest.mark.slow
_OLD = 3600


@pytest.fixture
def tracer(rows: Settings) -> Tracer:
    return Tracer(rows)


def ended(tracer: Tracer) -> Claim:
    """Bring a task with a log, an artifact and a label to its end, and trace it."""
    claim = r.running(labels={"team": "a"}, payload='{"hello":"é"}')
    assert db.unit(lambda: leases.append_log(claim, next(_parts), "one\n"))
    db.unit(lambda: leases.keep_artifact(claim, "a/b.txt", 0, b"kept"))
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED, result="1"), new_id(), [LogPart(next(_parts), "two\n")]))
    tracer.trace(claim.id)
    return claim


def codes(results: list[Result]) -> set[str]:
    return {result.finding.code for result in results}


def look(settings: Settings) -> list[Result]:
    return list(fsck.run(settings))


def repair(settings: Settings) -> list[Result]:
    return list(fsck.run(settings, Tracer(settings).rebuild))


def everything(settings: Settings) -> Any:
    """Return all rows and files, to see whether anything was changed."""
    tables = (Task, TaskEvent, TaskLog, TaskLabel, Worker)
    return [db.read(lambda table=table: sorted(map(str, table.select().dicts()))) for table in tables], contents(settings.trace_dir)


def is_found_and_repaired(settings: Settings, *expected: str) -> None:
    """Check that fsck finds exactly this, changes nothing until asked, repairs it, and finds nothing then."""
    before = everything(settings)
    assert codes(look(settings)) == set(expected)
    assert everything(settings) == before
    results = repair(settings)
    assert codes(results) == set(expected)
    assert all(result.is_repaired for result in results)
    assert look(settings) == []


def test_a_whole_tower_has_no_differences(tracer: Tracer, rows: Settings) -> None:
    """Tasks that ended, that run, that wait, and that were never traced."""
    claim = ended(tracer)
    me = host.this_process()
    r.add_worker(pid=me.pid, pid_space=me.space, pid_started=me.started)
    failed = r.running(labels={"team": "b"}, max_attempts=2)
    db.unit(lambda: lifecycle.finish(failed, Outcome(FAILED, error={"code": "exit_nonzero", "message": "no"}), new_id()))
    cancelled, running = r.insert(), r.running()
    db.unit(lambda: lifecycle.cancel(cancelled, "me"))
    for task_id in (failed.id, cancelled, running.id):
        tracer.trace(task_id)
    r.insert()
    r.dispatch(r.insert())
    assert look(rows) == []
    assert (rows.trace_dir / claim.id / "output.json").exists()


# Folders


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def change(path: Path) -> None:
    """Change one byte in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ["input.json", "log.txt", "output.json", "events.jsonl", "artifacts/a/b.txt"]


@slow
@pytest.mark.parametrize("name", ["", *FILES, "artifacts"])
def test_what_was_deleted_is_written_again(tracer: Tracer, rows: Settings, name: str) -> None:
    """The folder, or a file of it."""
    folder = rows.trace_dir / ended(tracer).id
    before = contents(folder)
    delete(folder / name)
    is_found_and_repaired(rows, "file_missing" if name else "no_folder")
    assert contents(folder) == before


@slow
@pytest.mark.parametrize("name", FILES[:-1])
def test_what_was_changed_is_written_again(tracer: Tracer, rows: Settings, name: str) -> None:
    """One byte is enough."""
    folder = rows.trace_dir / ended(tracer).id
    before = contents(folder)
    change(folder / name)
    is_found_and_repaired(rows, "file_differs")
    assert contents(folder) == before


@slow
@pytest.mark.parametrize("name", ["log.txt", "artifacts/a/b.txt"])
@pytest.mark.parametrize("data", [b"", b"longer than it was, by far, I would say" * 100])
def test_what_has_another_size_is_written_again(tracer: Tracer, rows: Settings, name: str, data: bytes) -> None:
    """Cut, or with garbage at its end."""
    folder = rows.trace_dir / ended(tracer).id
    before = contents(folder)
    (folder / name).write_bytes(data)
    is_found_and_repaired(rows, "file_differs")
    assert contents(folder) == before


@slow
def test_a_line_cut_out_of_the_events_shows(tracer: Tracer, rows: Settings) -> None:
    """The chain of hashes is compared as it stands."""
    path = rows.trace_dir / ended(tracer).id / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))
    is_found_and_repaired(rows, "file_differs")


@slow
@pytest.mark.parametrize("name", ["", "log.txt", "output.json", "artifacts", "artifacts/a"])
def test_what_stands_in_the_way_is_moved_aside(tracer: Tracer, rows: Settings, tmp_path: Path, name: str) -> None:
    """A link is never followed and never deleted."""
    outside = tmp_path / "outside"
    outside.mkdir()
    claim = ended(tracer)
    folder = rows.trace_dir / claim.id
    before = contents(folder)
    delete(folder / name)
    (folder / name).symlink_to(outside)
    is_found_and_repaired(rows, "in_the_way")
    assert contents(folder) == before
    assert list(outside.iterdir()) == []
    assert [path.name for path in (rows.trace_dir / ".lost").iterdir()] == [claim.id]


@slow
def test_a_folder_where_a_file_should_be_is_moved_aside(tracer: Tracer, rows: Settings) -> None:
    """Twice, so that the second finds its name taken in .lost."""
    claim = ended(tracer)
    for _ in range(2):
        path = rows.trace_dir / claim.id / "output.json"
        path.unlink()
        (path / "mine").mkdir(parents=True)
        is_found_and_repaired(rows, "in_the_way")
    assert sorted(path.name for path in (rows.trace_dir / ".lost").iterdir()) == [claim.id, f"{claim.id}.1"]


@slow
def test_a_temporary_file_of_a_crash_is_removed(tracer: Tracer, rows: Settings) -> None:
    """It takes space and tells nothing."""
    path = rows.trace_dir / ended(tracer).id / ".log.txt.new"
    path.write_text("half")
    is_found_and_repaired(rows, "leftover")
    assert not path.exists()


@slow
def test_an_output_before_the_end_is_removed(tracer: Tracer, rows: Settings) -> None:
    """The database was restored, the folder was not."""
    me = host.this_process()
    r.add_worker(pid=me.pid, pid_space=me.space, pid_started=me.started)
    claim = r.running()
    tracer.trace(claim.id)
    (rows.trace_dir / claim.id / "output.json").write_text("{}")
    is_found_and_repaired(rows, "early_output")


@slow
def test_a_trace_that_nobody_writes_is_written(tracer: Tracer, rows: Settings) -> None:
    """With the reason, if the row has one; a young one is left to the trace actor."""
    claim = ended(tracer)
    shutil.rmtree(rows.trace_dir / claim.id)
    db.unit(lambda: Task.update(traced_seq=0, traced_bytes=0, trace_error="the disk was full").execute())
    assert look(rows) == []
    db.unit(lambda: Task.update(updated_at=Task.updated_at - _OLD).execute())
    assert look(rows)[0].finding.detail == "the disk was full"
    is_found_and_repaired(rows, "trace_late")


@slow
def test_a_mark_beyond_the_last_number_is_set_right(tracer: Tracer, rows: Settings) -> None:
    """Such a task would never be traced again."""
    claim = ended(tracer)
    db.unit(lambda: Task.update(traced_seq=Task.seq + 7).execute())
    is_found_and_repaired(rows, "trace_ahead")
    assert r.row(claim.id)["traced_seq"] == r.row(claim.id)["seq"]


@slow
def test_a_mark_beyond_the_end_of_the_log_is_set_right(tracer: Tracer, rows: Settings) -> None:
    """The log of a running task was cut."""
    me = host.this_process()
    r.add_worker(pid=me.pid, pid_space=me.space, pid_started=me.started)
    claim = r.running()
    tracer.trace(claim.id)
    assert db.unit(lambda: leases.append_log(claim, next(_parts), "one\n"))
    (rows.trace_dir / claim.id / "log.txt").write_text("")
    is_found_and_repaired(rows, "trace_ahead")


def test_a_folder_without_a_task_is_moved_and_not_deleted(tracer: Tracer, rows: Settings) -> None:
    """Only names that are task ids, and only old ones."""
    old, young, other = rows.trace_dir / new_id(), rows.trace_dir / new_id(), rows.trace_dir / "notes"
    for folder in (old, young, other):
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("mine")
    for folder in (old, other):
        os.utime(folder, (time.time() - _OLD,) * 2)
    is_found_and_repaired(rows, "orphan_folder")
    assert (rows.trace_dir / ".lost" / old.name / "log.txt").read_text() == "mine"
    assert young.exists()
    assert other.exists()


@slow
def test_files_that_somebody_added_are_nobody_else_s_business(tracer: Tracer, rows: Settings) -> None:
    """They are no difference, and survive a repair."""
    folder = rows.trace_dir / ended(tracer).id
    (folder / "notes.md").write_text("mine")
    assert look(rows) == []
    (folder / "log.txt").unlink()
    is_found_and_repaired(rows, "file_missing")
    assert (folder / "notes.md").read_text() == "mine"


@slow
def test_a_disk_that_refuses_leaves_the_difference(tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported as left, and the next run repairs it."""
    shutil.rmtree(rows.trace_dir / ended(tracer).id)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    assert [result.is_repaired for result in fsck.run(rows, refuse)] == [False]
    is_found_and_repaired(rows, "no_folder")


@slow
def test_a_folder_that_cannot_be_read_is_said(tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tasks are compared all the same."""
    bad, missing = ended(tracer), ended(tracer)
    shutil.rmtree(rows.trace_dir / missing.id)
    real = open_folder

    def refuse(root: Path, task_id: str, **more: Any) -> Any:
        if task_id == bad.id:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(root, task_id, **more)

    monkeypatch.setattr("tower.fsck.folders.open_folder", refuse)
    results = repair(rows)
    assert {(result.finding.name, result.finding.code, result.is_repaired) for result in results} == {
        (bad.id, "unreadable", False),
        (missing.id, "no_folder", True),
    }


# Rows


def add_event(claim: Claim, kind: str, *, seq: int | None = None, attempt: int = 1) -> None:
    """Append an event behind the others, as a program with a mistake would."""
    number = seq or r.row(claim.id)["seq"] + 1
    db.unit(lambda: TaskEvent.insert(task_id=claim.id, seq=number, attempt=attempt, at=db.clock(), kind=kind, data="{}").execute())
    if seq is None:
        db.unit(lambda: Task.update(seq=number).execute())


def drop_event(claim: Claim, kind: str) -> None:
    db.unit(lambda: TaskEvent.delete().where(TaskEvent.task_id == claim.id, TaskEvent.kind == kind).execute())


def drop_chunk(claim: Claim) -> None:
    first = db.read(lambda: TaskLog.select().order_by(TaskLog.seq).dicts().first())["seq"]
    db.unit(lambda: TaskLog.delete().where(TaskLog.task_id == claim.id, TaskLog.seq == first).execute())


def set_row(**values: Any) -> None:
    db.unit(lambda: Task.update(**values).execute())


def set_label(claim: Claim) -> None:
    db.unit(lambda: TaskLabel.update(value="other").where(TaskLabel.task_id == claim.id).execute())


def move_chunk(claim: Claim) -> None:
    db.unit(lambda: TaskLog.update(attempt=9).where(TaskLog.task_id == claim.id, TaskLog.text == "two\n").execute())


BROKEN_ROWS: list[tuple[Callable[[Claim], object], set[str]]] = [
    (lambda claim: drop_event(claim, "queued"), {"no_first_event"}),
    (lambda claim: drop_event(claim, "dispatched"), {"seq_gap"}),
    (drop_chunk, {"seq_gap"}),
    (lambda _: set_row(seq=Task.seq + 1), {"seq_gap"}),
    (lambda _: set_row(seq=Task.seq - 1), {"seq_beyond"}),
    (lambda claim: drop_event(claim, "succeeded"), {"seq_gap", "no_end"}),
    (lambda _: set_row(status=FAILED), {"no_end", "wrong_end"}),
    (lambda claim: add_event(claim, "failed"), {"wrong_end"}),
    (lambda claim: add_event(claim, "succeeded"), {"wrong_end"}),
    (lambda claim: add_event(claim, "cancel_requested"), {"after_end"}),
    (lambda claim: drop_event(claim, "started"), {"seq_gap", "attempt_untold"}),
    (lambda _: set_row(attempt=3), {"attempt_untold"}),
    (lambda claim: add_event(claim, "started"), {"attempt_twice", "after_end"}),
    (lambda claim: add_event(claim, "started", attempt=2), {"attempt_twice", "after_end"}),
    (move_chunk, {"stray_chunk"}),
    (set_label, {"labels_differ"}),
    (lambda claim: db.unit(lambda: TaskLabel.delete().execute()), {"labels_differ"}),
    (lambda claim: db.unit(lambda: TaskEvent.delete().execute()), {"no_first_event", "seq_gap", "no_end", "attempt_untold"}),
]


@slow
@pytest.mark.parametrize("number", range(len(BROKEN_ROWS)))
def test_rows_that_contradict_each_other_are_put_right(tracer: Tracer, rows: Settings, number: int) -> None:
    """The row of the task is the truth; its folder says afterwards what the rows say."""
    make, expected = BROKEN_ROWS[number]
    other = ended(tracer)
    claim = ended(tracer)
    db.unit(lambda: Task.delete().where(Task.id == other.id).execute())
    shutil.rmtree(rows.trace_dir / other.id)
    make(claim)
    status = r.row(claim.id)["status"]
    found = codes(look(rows))
    assert found - {"file_differs", "trace_ahead"} == expected, "the folder may differ as well"
    assert all(result.is_repaired for result in repair(rows))
    assert look(rows) == []
    assert r.row(claim.id)["status"] == status
    told = [json.loads(line) for line in (rows.trace_dir / claim.id / "events.jsonl").read_text().splitlines()]
    assert [event["seq"] for event in told] == sorted({event["seq"] for event in told})


def test_what_was_wrong_stays_to_be_read(tracer: Tracer, rows: Settings) -> None:
    """An event is struck, with what it said; a chunk too; neither counts as an end of the attempt."""
    claim = ended(tracer)
    add_event(claim, "failed")
    move_chunk(claim)
    repair(rows)
    struck = db.read(lambda: list(TaskEvent.select().where(TaskEvent.kind == STRUCK).order_by(TaskEvent.seq).dicts()))
    assert [json.loads(event["data"]) for event in struck] == [
        {"by": "fsck", "text": "two\n"},
        {"by": "fsck", "kind": "failed", "data": {}},
    ]
    output = json.loads((rows.trace_dir / claim.id / "output.json").read_text())
    assert [attempt["end"] for attempt in output["attempts"]] == ["succeeded"]
    assert "── struck" in (rows.trace_dir / claim.id / "log.txt").read_text()


@slow
def test_what_was_lost_is_marked(tracer: Tracer, rows: Settings) -> None:
    """At its number, so that a reader of the log sees that something is missing."""
    claim = ended(tracer)
    drop_chunk(claim)
    repair(rows)
    assert LOST in r.kinds(claim.id)
    log = (rows.trace_dir / claim.id / "log.txt").read_text()
    assert '[1] ── lost by="fsck"\n' in log
    assert "one\n" not in log


@slow
def test_an_end_of_a_task_that_goes_on_is_struck(tracer: Tracer, rows: Settings) -> None:
    """The row is the truth."""
    me = host.this_process()
    r.add_worker(pid=me.pid, pid_space=me.space, pid_started=me.started)
    claim = r.running()
    add_event(claim, "failed")
    is_found_and_repaired(rows, "wrong_end")
    assert r.row(claim.id)["status"] == RUNNING


@slow
def test_many_tasks_are_walked_page_by_page(tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when their payloads do not fit into memory together."""
    monkeypatch.setattr("tower.fsck.load._PAGE", 2)
    monkeypatch.setattr("tower.fsck.load._MOST_TEXT", 30)
    for _ in range(5):
        ended(tracer)
    db.unit(lambda: TaskLabel.delete().execute())
    results = repair(rows)
    assert len({result.finding.name for result in results}) == 5
    assert look(rows) == []


def test_what_a_task_did_meanwhile_is_no_difference(tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy tower goes on while fsck looks; it looks a second time before it speaks."""
    claim = r.running()
    tracer.trace(claim.id)
    stale = db.read(lambda: load.load([claim.id]))
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED, result="1"), new_id()))
    tracer.trace(claim.id)
    monkeypatch.setattr("tower.fsck.walk.load.cases", lambda: iter(stale))
    assert look(rows) == []


# Leases


@slow
def test_a_task_that_retention_is_removing_is_left_to_it(tracer: Tracer, rows: Settings) -> None:
    """Its folder is gone before its row; and what is kept is looked at as ever."""
    kept, old = ended(tracer).id, ended(tracer).id
    for task_id in (kept, old):
        shutil.rmtree(rows.trace_dir / task_id)
    db.unit(lambda: Task.update(finished_at=db.now() - 31 * 86_400).where(Task.id == old).execute())
    assert {result.finding.name for result in look(rows)} == {kept}


def test_a_task_whose_worker_is_gone_is_left_to_the_sweep(tracer: Tracer, rows: Settings) -> None:
    """Explained, and gone after a pass of it."""
    settings = rows.model_copy(update={"beat_s": 0.01})
    r.add_worker(pid=2**22 + 1, pid_space=host.pid_space(), pid_started=0)
    claim = r.running()
    (result,) = repair(settings)
    assert (result.finding.code, result.finding.name, result.is_repaired) == ("no_worker", claim.id, False)
    Sweep(settings, r.Nudges()).run_once()  # type: ignore[arg-type]
    assert look(settings) == []


def test_a_task_that_beats_has_a_worker(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker's row was forgotten for a moment; what counts is the beat."""
    claim = r.running()
    monkeypatch.setattr("tower.fsck.leases.time.sleep", lambda _: db.unit(lambda: leases.heartbeat("w1", [claim.id])))
    assert look(rows) == []


@slow
def test_a_chosen_task_that_nobody_nudges_is_left_to_the_sweep(rows: Settings) -> None:
    """No process sends nudges: no tower runs."""
    task_id = r.insert()
    r.dispatch(task_id)
    r.add_worker()
    set_row(nudge_at=Task.nudge_at - _OLD)
    (result,) = repair(rows)
    assert (result.finding.code, result.finding.name, result.is_repaired) == ("not_nudged", task_id, False)
    Sweep(rows, r.Nudges()).run_once()  # type: ignore[arg-type]
    assert look(rows) == []
    assert r.row(task_id)["status"] == DISPATCHED


# Messages


@pytest.fixture
def with_redis(rows: Settings, redis_server: Redis) -> Iterator[tuple[Settings, dramatiq.Broker]]:
    """The same database with a broker on Redis, which nobody listens to."""
    settings = rows.model_copy(update={"redis_url": redis_server.url()})
    broker = open_broker(settings)
    for name, queue in (("handler.echo", "default"), ("tower.trace", "trace"), ("tower.orchestrate", "orchestrator")):
        dramatiq.actor(actor_name=name, queue_name=queue, broker=broker)(lambda _: None)
    yield settings, broker
    broker.client.flushall()
    broker.close()


@pytest.fixture
def grown_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tower.fsck.messages._YOUNG_S", -1.0)


@slow
@pytest.mark.usefixtures("grown_old")
def test_messages_that_nobody_needs_are_dropped(tracer: Tracer, with_redis: tuple[Settings, Any]) -> None:
    """Those that somebody needs, or that ask for the next task, stay."""
    settings, broker = with_redis
    claim, nudger = ended(tracer), Nudger(broker)
    waiting = r.insert()
    nudger.send("handler.echo", waiting)
    (dead,) = broker.do_fetch("default", 1)
    broker.do_nack("default", json.loads(dead)["options"]["redis_message_id"])
    for actor in ("handler.echo", "tower.trace", "tower.orchestrate"):
        assert nudger.send(actor, claim.id)
        assert nudger.send(actor, waiting)
    assert nudger.send("tower.trace", new_id())
    broker.do_enqueue("default", "rubbish", b"\xff{not json")
    is_found_and_repaired(settings, "message_of_no_task", "message_of_ended_task", "message_unreadable", "dead_letter")
    left = [json.loads(data) for key in broker.client.scan_iter("tower:*.msgs") for data in broker.client.hvals(key)]
    assert sorted((message["actor_name"], message["args"] == [waiting]) for message in left) == [
        ("handler.echo", True),
        ("tower.orchestrate", False),
        ("tower.orchestrate", True),
        ("tower.trace", False),
        ("tower.trace", True),
    ]
    assert broker.client.llen("tower:default") == 1


@slow
def test_a_young_message_is_left_alone(tracer: Tracer, with_redis: tuple[Settings, Any]) -> None:
    """Its task may be committed, or ended, at this moment."""
    settings, broker = with_redis
    Nudger(broker).send("handler.echo", ended(tracer).id)
    Nudger(broker).send("handler.echo", new_id())
    assert look(settings) == []


@slow
def test_a_broker_that_is_away_is_said_and_the_rest_is_checked(tracer: Tracer, rows: Settings) -> None:
    """The rows and folders are compared all the same."""
    settings = rows.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    shutil.rmtree(rows.trace_dir / ended(tracer).id)
    results = repair(settings)
    assert [(result.finding.code, result.is_repaired) for result in results] == [("no_folder", True), ("broker_away", False)]


# The command and its guide


@pytest.fixture
def run(rows: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command of `tower` on the database of the test."""
    for name in ("REDIS_URL", *(name for name in os.environ if name.startswith("TOWER_"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_URL", rows.database_url)
    monkeypatch.setenv("TRACE_DIR", str(rows.trace_dir))

    def command(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        db.close_database()
        code = main(args)
        db.open_database(rows)
        return (code, *capsys.readouterr())

    return command


def test_the_command_explains_repairs_and_exits_accordingly(tracer: Tracer, rows: Settings, run: Any) -> None:
    """0 for none, 1 for differences, 0 again when they were repaired."""
    claim = ended(tracer)
    assert run("fsck")[:2] == (0, "0 differences found.\n")
    (rows.trace_dir / claim.id / "output.json").unlink()
    code, out, _ = run("fsck")
    meaning, rule = FINDINGS["file_missing"]
    assert (code, out.splitlines()[0]) == (1, f"{claim.id} file_missing: {meaning} (output.json) Repair: {rule}")
    code, out, _ = run("fsck", "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert (code, told[0]["code"], told[0]["name"], told[1]) == (1, "file_missing", claim.id, {"differences": 1, "left": 1})
    code, out, _ = run("fsck", "--repair")
    assert (code, out.splitlines()[-1]) == (0, "1 difference found, 1 repaired, 0 left.")
    assert run("fsck", "--repair", "--json")[:2] == (0, '{"differences": 0, "left": 0}\n')


@slow
def test_rebuild_writes_folders_from_the_database_alone(tracer: Tracer, rows: Settings, run: Any, tmp_path: Path) -> None:
    """One, all, or elsewhere; nothing else is needed."""
    claims = [ended(tracer) for _ in range(3)]
    before = contents(rows.trace_dir)
    shutil.rmtree(rows.trace_dir)
    assert run("trace", "rebuild", claims[0].id)[:2] == (0, "1 folder written, 0 failed.\n")
    assert [path.name for path in rows.trace_dir.iterdir()] == [claims[0].id]
    code, out, _ = run("trace", "rebuild", "--all", "--json")
    assert (code, json.loads(out)) == (0, {"rebuilt": 3, "failed": []})
    assert contents(rows.trace_dir) == before
    assert run("trace", "rebuild", "--all", "--into", str(tmp_path / "other"))[0] == 0
    assert contents(tmp_path / "other") == before


@slow
def test_rebuild_says_what_it_could_not_write(tracer: Tracer, rows: Settings, run: Any) -> None:
    """A task that is not there, or a disk that refuses; the others are written."""
    claim, nobody = ended(tracer), new_id()
    code, out, err = run("trace", "rebuild", claim.id, nobody)
    assert (code, out) == (1, "1 folder written, 1 failed.\n")
    assert nobody in err
    shutil.rmtree(rows.trace_dir)
    rows.trace_dir.write_text("in the way")
    code, _, err = run("trace", "rebuild", "--all")
    assert code == 1
    assert str(rows.trace_dir) in err
    assert run("trace", "rebuild")[0] == 2
    assert run("trace", "rebuild", claim.id, "--all")[0] == 2


def test_no_empty_database_is_made_by_looking(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor is one taken that no tower has prepared."""
    path = tmp_path / "none.db"
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{path}")
    code, _, err = run("fsck")
    assert (code, path.exists()) == (2, False)
    assert str(path) in err
    path.touch()
    assert run("trace", "rebuild", "--all")[0] == 2


def test_the_guide_has_the_findings_of_the_code() -> None:
    """The table of docs/recovery.md, word for word."""
    text = (Path(__file__).parent.parent / "docs" / "recovery.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", text, re.MULTILINE)
    assert {code: (meaning, rule) for code, meaning, rule in told} == FINDINGS


def test_every_finding_is_made_by_a_test() -> None:
    """Else nobody has seen it."""
    text = Path(__file__).read_text()
    assert [code for code in FINDINGS if f'"{code}"' not in text] == []

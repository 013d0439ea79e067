"""Retention: what is old goes with everything that belongs to it, what is young or to be kept for ever stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.trace import Tracer
from tests import rows as r
from tower import db, faults, leases, lifecycle, retention, trace
from tower.lifecycle import Outcome
from tower.models import Audit, Task, TaskArtifact, TaskEvent, TaskLabel, TaskLog, first_id, new_id
from tower.retention import Retention
from tower.settings import Settings
from tower.sweep import Sweep
from tower.terms import CANCELLED, FAILED, FINAL, SUCCEEDED, TIMED_OUT

DAY_S = 86_400.0
ERROR = {"code": "handler_error", "message": "no"}


def ended(settings: Settings, status: str = SUCCEEDED, *, days: float, chunks: int = 1, **fields: Any) -> str:
    """Make a task that ended so many days ago, with a label, log, artifact and folder."""
    claim = r.running(labels={"team": "platform"}, **fields)

    def work() -> None:
        for part in range(chunks):
            leases.append_log(claim, part, "line\n")
            leases.keep_artifact(claim, "a/b.txt", part, b"x")
        lifecycle.finish(claim, Outcome(status, error=ERROR, may_retry=False), new_id())
        Task.update(finished_at=Task.finished_at - days * DAY_S).where(Task.id == claim.id).execute()

    db.unit(work)
    Tracer(settings).trace(claim.id)
    assert (settings.trace_dir / claim.id / "output.json").exists()
    return claim.id


def left(settings: Settings) -> set[str]:
    return {row[0] for row in db.read(lambda: list(Task.select(Task.id).tuples()))}


def traces_of(settings: Settings, task_id: str) -> list[str]:
    """Return where something of the task is left."""
    tables: list[Any] = [TaskLabel, TaskEvent, TaskLog, TaskArtifact]
    found = [table.__name__ for table in tables if db.read(lambda table=table: table.select().where(table.task_id == task_id).exists())]
    return found + [path.name for path in settings.trace_dir.iterdir() if task_id in path.name]


def test_an_old_task_goes_with_everything_and_a_young_one_stays(rows: Settings) -> None:
    """Rows, events, labels, log, artifacts and folder."""
    old, young = ended(rows, days=31), ended(rows, days=29)
    waiting, running = r.insert(), r.running().id

    assert Retention(rows).step() is False

    assert left(rows) == {young, waiting, running}
    assert traces_of(rows, old) == []
    assert traces_of(rows, young) == ["TaskLabel", "TaskEvent", "TaskLog", "TaskArtifact", young]


def test_each_status_has_its_time_and_0_keeps_for_ever(rows: Settings) -> None:
    """A failure is looked into for longer than a success."""
    settings = rows.model_copy(update={"keep_cancelled_days": 0.0, "keep_timed_out_days": 0.5})
    ids = {(status, days): ended(rows, status, days=days) for status in FINAL for days in (0.4, 31.0, 89.0, 91.0)}

    Retention(settings).step()

    gone = {key for key, task_id in ids.items() if task_id not in left(rows)}
    assert gone == {
        *((SUCCEEDED, days) for days in (31.0, 89.0, 91.0)),
        *((TIMED_OUT, days) for days in (31.0, 89.0, 91.0)),
        (FAILED, 91.0),
    }
    assert (CANCELLED, 91.0) in ids.keys() - gone


def test_a_removal_that_was_broken_off_is_completed(rows: Settings) -> None:
    """The folder went first, so the row is still there to be found again."""
    task_id = ended(rows, days=100)
    faults.arm("retention.mid:1:raise")
    try:
        Retention(rows).run_if_due()
    finally:
        faults.arm(None)
    assert left(rows) == {task_id} and not (rows.trace_dir / task_id).exists()

    Retention(rows).run_if_due()

    assert left(rows) == set()
    assert traces_of(rows, task_id) == []


REMOVE = """
import sys
from tower import db, faults, settings
from tower.retention import Retention
loaded = settings.load()
faults.arm(loaded.fault)
db.open_database(loaded)
Retention(loaded).step()
"""


def test_a_removal_survives_kill_9(rows: Settings) -> None:
    """Also with several to remove, one after the other: each kill leaves nothing that the next pass cannot finish."""
    ids = {ended(rows, days=100) for _ in range(3)}
    environment = {"DATABASE_URL": rows.database_url, "TRACE_DIR": str(rows.trace_dir), "TOWER_FAULT": "retention.mid:2:kill"}
    killed = subprocess.run([sys.executable, "-c", REMOVE], env=environment, cwd=Path(__file__).parent.parent, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(left(rows)) == 2

    Retention(rows).step()

    assert left(rows) == set()
    assert [found for task_id in ids for found in traces_of(rows, task_id)] == []


def test_what_is_left_of_a_folder_is_removed_later(rows: Settings) -> None:
    """A kill in the middle of it leaves a hidden folder that no row knows."""
    leftover = rows.trace_dir / f".gone-{new_id()}" / "artifacts"
    leftover.mkdir(parents=True)
    (leftover / "half.txt").write_text("x")
    half_made, being_made = (rows.trace_dir / f".new-{new_id()}" for _ in range(2))
    for folder in (half_made, being_made):
        folder.mkdir()
        (folder / "input.json").write_text("x")
    os.utime(half_made, (0, 0))
    kept = ended(rows, days=1)

    Retention(rows).step()

    assert {path.name for path in rows.trace_dir.iterdir()} == {kept, being_made.name}


def test_a_link_in_the_place_of_a_folder_is_removed_not_followed(rows: Settings, tmp_path: Path) -> None:
    """What it points to is none of ours."""
    task_id = ended(rows, days=100)
    (rows.trace_dir / task_id).rename(tmp_path / "elsewhere")
    (rows.trace_dir / task_id).symlink_to(tmp_path / "elsewhere")

    Retention(rows).step()

    assert traces_of(rows, task_id) == []
    assert (tmp_path / "elsewhere" / "output.json").exists()


def test_large_tasks_and_many_of_them_go_in_slices(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest ended first; a step says that there is more."""
    monkeypatch.setattr(retention, "_SLICE", 2)
    monkeypatch.setattr(retention, "_STEP", 2)
    ids = [ended(rows, days=100 - number, chunks=5) for number in range(3)]
    keeper = Retention(rows)

    assert keeper.step() is True
    assert left(rows) == {ids[2]}
    keeper.run_if_due()
    assert left(rows) == set()


def test_a_folder_that_cannot_be_removed_keeps_its_row(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost to sight, and the sweep goes on."""

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    task_id = ended(rows, days=100)
    monkeypatch.setattr(trace.os, "rename", refuse)
    Retention(rows).run_if_due()
    assert left(rows) == {task_id}


def test_a_folder_that_cannot_be_removed_holds_up_no_other(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many of them are the oldest."""
    monkeypatch.setattr(retention, "_STEP", 1)
    stuck, free = ended(rows, days=60), ended(rows, days=50)
    remove = retention.folder.remove_folder

    def refuse(root: Path, task_id: str) -> None:
        if task_id == stuck:
            raise PermissionError(13, "Permission denied")
        remove(root, task_id)

    monkeypatch.setattr(retention.folder, "remove_folder", refuse)
    old = Retention(rows)
    old.run_if_due()
    old.run_if_due()
    assert left(rows) == {stuck}
    assert traces_of(rows, free) == []


@pytest.mark.parametrize("writes", [True, False])
def test_the_sweep_removes_old_tasks_only_where_folders_are_written(rows: Settings, nudges: r.Nudges, writes: bool) -> None:
    """Others may not see the folders at all."""
    task_id = ended(rows, days=100)
    Sweep(rows, nudges, (lambda _: None) if writes else None).run_once()  # type: ignore[arg-type]
    assert left(rows) == (set() if writes else {task_id})


def test_a_trace_that_is_written_in_the_middle_of_a_removal_goes_too(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the removal of the folder, before that of the row."""
    task_id = ended(rows, days=100)
    db.unit(lambda: Task.update(traced_seq=0, traced_bytes=0).where(Task.id == task_id).execute())
    written: list[bool] = []

    def write(_: str) -> None:
        Tracer(rows).trace(task_id)
        written.append((rows.trace_dir / task_id).exists())

    monkeypatch.setattr(retention, "fault", write)
    Retention(rows).step()
    assert written == [True]
    assert traces_of(rows, task_id) == []


def test_a_late_trace_message_brings_no_folder_back(rows: Settings) -> None:
    """Of a task that is gone."""
    task_id = ended(rows, days=100)
    Retention(rows).step()
    Tracer(rows).trace(task_id)
    assert traces_of(rows, task_id) == []


def test_old_entries_of_the_record_go_though_a_clock_was_behind(rows: Settings) -> None:
    """Ids have the clock of whoever made them; what is kept goes by that of the database."""
    made = {"recent, from a clock that was behind": (400, 1), "old": (200, 200), "old, within a day": (90.5, 91), "recent": (1, 1)}
    for action, (id_days, days) in made.items():
        new = first_id(db.read(db.clock) - id_days * DAY_S)
        entry = Audit.insert(id=new, at=db.now() - days * DAY_S, actor="somebody", action=action, target="", address=None)
        db.unit(entry.execute)
    Retention(rows.model_copy(update={"keep_audit_days": 90.0})).step()
    kept = {row[0] for row in db.read(lambda: list(Audit.select(Audit.action).tuples()))}
    assert kept == {"recent, from a clock that was behind", "recent"}

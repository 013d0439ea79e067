"""The checker itself: what it would find if a promise were broken."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import rows as make
from tests.chaos import journal
from tests.chaos.checker import check
from tests.chaos.load import JOURNAL
from tests.servers import wait_for
from tower import db, lifecycle, queries, trace
from tower.folder import open_folder
from tower.lifecycle import Outcome
from tower.models import Task, TaskEvent, new_id
from tower.settings import Settings


def ended(settings: Settings) -> str:
    """Make a task that has succeeded and is traced."""
    claim = make.running()
    db.unit(lambda: lifecycle.finish(claim, Outcome("succeeded", result="{}"), new_id()))
    task, events = make.row(claim.id), db.read(lambda: queries.events(claim.id))
    with open_folder(settings.trace_dir, claim.id) as folder:
        for name, text in (
            (trace.INPUT, trace.render_input(task)),
            (trace.OUTPUT, trace.render_output(task, events)),
            (trace.EVENTS, trace.render_events(events)),
            (trace.LOG, trace.render_log(events)),
        ):
            folder.replace(name, text.encode())
    db.unit(lambda: Task.update(traced_seq=Task.seq).where(Task.id == claim.id).execute())
    return claim.id


def found(settings: Settings, **more: object) -> list[str]:
    return check(settings.database_url, settings.trace_dir, **more).broken  # type: ignore[arg-type]


def test_it_finds_nothing_where_nothing_is_wrong(rows: Settings) -> None:
    """One task, ended and traced."""
    task_id = ended(rows)
    assert found(rows, accepted=[task_id]) == []


@pytest.fixture
def opened(sqlite_settings: Settings) -> Iterator[Settings]:
    """An open, empty SQLite database: what the checker makes of rows does not depend on where they are."""
    db.open_database(sqlite_settings)
    db.migrate()
    yield sqlite_settings
    db.close_database()


def add_event(task_id: str, kind: str, **changes: object) -> None:
    event = {"task_id": task_id, "seq": 99, "attempt": 1, "at": 0.0, "kind": kind, "data": "{}"}
    db.unit(lambda: TaskEvent.insert(**(event | changes)).execute())


def no_row(task_id: str, settings: Settings) -> None:
    db.unit(lambda: Task.delete().where(Task.id == task_id).execute())


def not_final(task_id: str, settings: Settings) -> None:
    db.unit(lambda: Task.update(status="running").where(Task.id == task_id).execute())


def two_ends(task_id: str, settings: Settings) -> None:
    add_event(task_id, "failed")


def other_end(task_id: str, settings: Settings) -> None:
    db.unit(lambda: Task.update(status="failed").where(Task.id == task_id).execute())


def event_after_the_end(task_id: str, settings: Settings) -> None:
    add_event(task_id, "cancel_requested")


def gap_in_attempts(task_id: str, settings: Settings) -> None:
    db.unit(lambda: Task.update(attempt=3).where(Task.id == task_id).execute())


def changed_log(task_id: str, settings: Settings) -> None:
    with (settings.trace_dir / task_id / "log.txt").open("a") as file:
        file.write("more\n")


def changed_chain(task_id: str, settings: Settings) -> None:
    path = settings.trace_dir / task_id / "events.jsonl"
    path.write_text(path.read_text().replace("queued", "queues"))


def missing_output(task_id: str, settings: Settings) -> None:
    (settings.trace_dir / task_id / "output.json").unlink()


def never_traced(task_id: str, settings: Settings) -> None:
    db.unit(lambda: Task.update(traced_seq=0).where(Task.id == task_id).execute())


def unknown_folder(task_id: str, settings: Settings) -> None:
    (settings.trace_dir / new_id()).mkdir()


BREAKS = {
    "lost": (no_row, not_final),
    "doubled_results": (two_ends, other_end, event_after_the_end, gap_in_attempts),
    "trace_differences": (changed_log, changed_chain, missing_output, never_traced, unknown_folder),
}


@pytest.mark.parametrize(("name", "break_it"), [(name, way) for name, ways in BREAKS.items() for way in ways])
def test_it_finds_what_is_broken(opened: Settings, name: str, break_it: Callable[[str, Settings], None]) -> None:
    """In the rows and in the folder, and says of what kind it is."""
    task_id = ended(opened)
    break_it(task_id, opened)
    assert name in {text.partition(":")[0] for text in found(opened, accepted=[task_id])}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal"


def start_run(folder: Path, task_id: str, attempt: int, seconds: float) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "TOWER_TASK_ID": task_id, "TOWER_ATTEMPT": str(attempt), "TOWER_TASK": f"{task_id}:{attempt}"}
    return subprocess.Popen([sys.executable, "-S", "-E", JOURNAL, folder, str(seconds)], env=environment, stdout=subprocess.DEVNULL)


def test_it_finds_runs_that_overlap_and_processes_that_stay(opened: Settings, runs: Path) -> None:
    """The later run sees the earlier one; a process is found by the mark in its environment."""
    task_id = ended(opened)
    first = start_run(runs, task_id, 1, 60)
    wait_for("its start", (runs / task_id).exists)
    start_run(runs, task_id, 2, 0).wait(20)
    names = [text.partition(":")[0] for text in found(opened, journal=runs)]
    assert names == ["overlapping", "orphans"]
    first.kill()
    first.wait()


def test_what_is_left_of_a_killed_run_is_no_overlap(opened: Settings, runs: Path) -> None:
    """A zombie has ended, although kill -0 says that it is there."""
    task_id = ended(opened)
    first = start_run(runs, task_id, 1, 60)
    wait_for("its start", (runs / task_id).exists)
    first.kill()
    wait_for("its end", lambda: journal.started(first.pid) is None)
    start_run(runs, task_id, 2, 0).wait(20)
    first.wait()
    assert found(opened, journal=runs) == []


@pytest.mark.parametrize("is_released", [True, False])
def test_it_finds_a_second_start_of_what_may_run_once_unless_the_first_was_released(opened: Settings, is_released: bool) -> None:
    """A worker that stops gives back what it has not begun."""
    first = make.running()
    if is_released:
        db.unit(lambda: lifecycle.release(first, "the worker stopped", new_id(), has_run=False))
    else:
        make.expire(first)
    make.dispatch(first.id)
    second = make.claim(first.id)
    assert second
    db.unit(lambda: lifecycle.finish(second, Outcome("succeeded"), new_id()))
    db.unit(lambda: Task.update(max_losses=1).where(Task.id == first.id).execute())
    names = {text.partition(":")[0] for text in found(opened)}
    assert ("at_most_once_broken" in names) != is_released


def test_it_finds_a_second_run_of_what_may_run_once(opened: Settings, runs: Path) -> None:
    """By the journal, even if no event tells of it; and tells recoveries by when the worker was killed."""
    task_id = ended(opened)
    db.unit(lambda: Task.update(max_losses=1).where(Task.id == task_id).execute())
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    lines = [{"attempt": n, "what": "start", "at": now + n, "pid": 1, "parent": 7} for n in (1, 2)]
    lines += [{"attempt": n, "what": "end", "at": now + n + 0.5, "pid": 1} for n in (1, 2)]
    (runs / task_id).write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = check(opened.database_url, opened.trace_dir, journal=runs, kills={7: now + 1.75})
    assert [text.partition(":")[0] for text in report.broken] == ["at_most_once_broken"]
    assert (report.ran_to_end_twice, [round(seconds, 2) for seconds in report.recoveries]) == ([task_id], [0.25])

"""The trace actor on a real disk, and the format it writes."""

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest

from actors.trace import Tracer
from tests import rows as r
from tests.folders import contents
from tower import db, leases, lifecycle, queries, trace
from tower.errors import NotFound
from tower.folder import open_folder
from tower.leases import Claim
from tower.lifecycle import LogPart, Outcome
from tower.models import Task, new_id
from tower.settings import Settings
from tower.terms import SUCCEEDED

_parts = itertools.count()


@pytest.fixture
def tracer(rows: Settings) -> Tracer:
    return Tracer(rows)


def end(claim: Claim, tail: str = "") -> None:
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED, result="1"), new_id(), [LogPart(next(_parts), tail)] if tail else []))


def say(claim: Claim, text: str) -> None:
    assert db.unit(lambda: leases.append_log(claim, next(_parts), text))


def log_of(settings: Settings, task_id: str) -> str:
    return (settings.trace_dir / task_id / "log.txt").read_text()


@pytest.mark.usefixtures("rows")
def test_a_log_of_many_chunks_is_not_held_at_once() -> None:
    """It is read piece by piece then: a chunk may be a quarter of a megabyte."""
    claim = r.running()
    for count in range(1, 6):
        say(claim, f"{count}\n")
        news = db.read(lambda: queries.to_trace([claim.id]))[claim.id]["news"]
        assert (news is None) == (count > 4)
        if news is not None:
            assert [entry["text"] for entry in news if entry["text"]] == [f"{number}\n" for number in range(1, count + 1)]


def test_a_folder_follows_its_task_and_ends_complete(tracer: Tracer, rows: Settings) -> None:
    """input.json first, output.json last, log.txt in between, every line once."""
    claim = r.running(payload='{"hello":"tower"}', labels={"team": "a"})
    folder = rows.trace_dir / claim.id
    tracer.trace(claim.id)
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "input.json", "log.txt"]
    say(claim, "one\n")
    tracer.trace(claim.id)
    tracer.trace(claim.id)
    end(claim, "two\n")
    tracer.trace(claim.id)
    told = json.loads((folder / "input.json").read_text())
    assert (told["id"], told["payload"], told["labels"]) == (claim.id, {"hello": "tower"}, {"team": "a"})
    lines = log_of(rows, claim.id).splitlines()
    assert [line.split("── ")[-1].split(" ")[0] for line in lines] == ["queued", "dispatched", "started", "one", "two", "succeeded"]
    assert trace.is_complete(r.row(claim.id))


def test_every_event_carries_the_hash_of_the_line_before(tracer: Tracer, rows: Settings) -> None:
    """A cut or a change shows."""
    claim = r.running()
    end(claim)
    tracer.trace(claim.id)
    before = ""
    for line in (rows.trace_dir / claim.id / "events.jsonl").read_text().splitlines():
        assert json.loads(line)["previous"] == before
        before = hashlib.sha256(line.encode()).hexdigest()
    assert before


def test_what_a_crash_left_behind_the_known_end_is_cut(tracer: Tracer, rows: Settings) -> None:
    """Lines are never doubled."""
    claim = r.running()
    tracer.trace(claim.id)
    with (rows.trace_dir / claim.id / "log.txt").open("a") as file:
        file.write("half a li")
    say(claim, "whole\n")
    tracer.trace(claim.id)
    assert "half" not in log_of(rows, claim.id)
    assert log_of(rows, claim.id).endswith("whole\n")


@pytest.mark.parametrize("name", ["log.txt", "input.json", "events.jsonl"])
def test_a_file_that_was_taken_away_comes_back_whole(tracer: Tracer, rows: Settings, name: str) -> None:
    """The rows know it all."""
    claim = r.running()
    say(claim, "one\n")
    tracer.trace(claim.id)
    path = rows.trace_dir / claim.id / name
    before = path.read_text()
    path.unlink()
    end(claim)
    tracer.trace(claim.id)
    assert path.read_text().startswith(before)


def test_a_folder_written_at_once_equals_one_that_grew(tracer: Tracer, rows: Settings) -> None:
    """P6: it can be rebuilt from the database at any time."""
    claim = r.running()
    for number in range(40):
        say(claim, f"line {number}\n")
        tracer.trace(claim.id)
    db.unit(lambda: leases.keep_artifact(claim, "a/b.txt", 0, b"kept"))
    end(claim)
    tracer.trace(claim.id)
    folder = rows.trace_dir / claim.id
    grown = contents(folder)
    folder.rename(rows.trace_dir / "old")
    db.unit(lambda: Task.update(traced_seq=0, traced_bytes=0).execute())
    tracer.trace(claim.id)
    assert contents(folder) == grown
    assert "artifacts/a/b.txt" in grown


def test_a_disk_that_fails_delays_the_trace_and_loses_nothing(tracer: Tracer, rows: Settings) -> None:
    """The row says why; when the way is free the folder is written."""
    claim = r.running()
    end(claim)
    rows.trace_dir.write_text("in the way")
    tracer.trace(claim.id)
    assert r.row(claim.id)["status"] == SUCCEEDED
    assert str(rows.trace_dir) in r.row(claim.id)["trace_error"]
    rows.trace_dir.unlink()
    tracer.trace(claim.id)
    assert trace.is_complete(r.row(claim.id))
    assert r.row(claim.id)["trace_error"] is None


@pytest.mark.parametrize("what", ["folder", "log.txt", "output.json", "artifacts"])
def test_a_symbolic_link_in_the_way_is_never_followed(tracer: Tracer, rows: Settings, tmp_path: Path, what: str) -> None:
    """Nothing outside the folder is written."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    claim = r.running()
    db.unit(lambda: leases.keep_artifact(claim, "file", 0, b"kept"))
    end(claim)
    folder = rows.trace_dir / claim.id
    rows.trace_dir.mkdir()
    if what == "folder":
        folder.symlink_to(outside)
    else:
        folder.mkdir()
        (folder / what).symlink_to(outside if what == "artifacts" else outside / "file")
    tracer.trace(claim.id)
    assert (outside / "file").read_text() == "mine"
    assert [path.name for path in outside.iterdir()] == ["file"]


def test_two_writers_at_once_write_it_once(rows: Settings) -> None:
    """The folder's lock makes them take turns."""
    claim = r.running()
    for number in range(30):
        say(claim, f"line {number}\n")
    end(claim)
    threads = [threading.Thread(target=Tracer(rows).trace, args=(claim.id,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = log_of(rows, claim.id).splitlines()
    assert lines.count("line 7") == 1
    assert len(lines) == 34


def test_a_reader_never_sees_half_a_file(tracer: Tracer, rows: Settings) -> None:
    """Beside, then renamed: no other name is left either."""
    claim = r.running()
    end(claim)
    tracer.trace(claim.id)
    assert not [name for name in os.listdir(rows.trace_dir / claim.id) if name.startswith(".")]


@pytest.mark.parametrize("path", ["../x", "..", "", "a//b", "/etc/passwd", ".hidden", "x\x00y", "artifacts", "no", "y" * 300, "log.txt/x"])
def test_only_plain_files_inside_are_found(tracer: Tracer, rows: Settings, path: str) -> None:
    """Everything else is NotFound."""
    claim = r.running()
    db.unit(lambda: leases.keep_artifact(claim, "a", 0, b"kept"))
    end(claim)
    tracer.trace(claim.id)
    assert trace.find_file(rows.trace_dir, claim.id, "artifacts/a").read_bytes() == b"kept"
    with pytest.raises(NotFound):
        trace.find_file(rows.trace_dir, claim.id, path)


def test_a_task_that_is_gone_leaves_no_trouble(tracer: Tracer) -> None:
    """A late nudge finds nothing to do."""
    tracer.trace(new_id())


def test_a_tracer_says_how_late_it_is_and_forgets_it(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots wait for folders that come late, but not for a disk that fails."""
    claim = r.running()
    end(claim)
    db.unit(lambda: Task.update(finished_at=Task.finished_at - 7).execute())
    tracer.trace(claim.id)
    assert 7 <= tracer.lag_s < 60
    seen = time.monotonic()
    monkeypatch.setattr("actors.trace.time.monotonic", lambda: seen + 3)
    assert tracer.lag_s == 0


def test_a_disk_that_fails_for_a_while_is_no_reason_to_wait(tracer: Tracer) -> None:
    """What follows hours later says nothing about the pace of traces; slots would pause after every task."""
    claim = r.running()
    end(claim)
    db.unit(lambda: Task.update(finished_at=Task.finished_at - 3600, trace_error="TRACE_DIR=logs: No space left on device").execute())
    tracer.trace(claim.id)
    assert trace.is_complete(r.row(claim.id))
    assert tracer.lag_s == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["log.txt", "input.json", "events.jsonl", "output.json", "artifacts/a/b.txt", "artifacts", ""])
def test_what_was_taken_from_a_whole_folder_comes_back_when_it_is_touched(tracer: Tracer, rows: Settings, name: str) -> None:
    """A nudge that finds nothing new still looks whether all is there; an empty name is the folder itself."""
    claim = r.running()
    say(claim, "one\n")
    db.unit(lambda: leases.keep_artifact(claim, "a/b.txt", 0, b"kept"))
    end(claim)
    tracer.trace(claim.id)
    folder = rows.trace_dir / claim.id
    before = contents(folder)
    taken = folder / name
    shutil.rmtree(taken) if taken.is_dir() else taken.unlink()
    tracer.trace(claim.id)
    assert contents(folder) == before
    assert trace.is_complete(r.row(claim.id))


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [b"\x00\xff garbage", b""])
def test_a_log_that_was_changed_behind_its_end_or_cut_is_made_whole(tracer: Tracer, rows: Settings, garbage: bytes) -> None:
    """Garbage goes, and what is missing comes back, for a task that has ended too."""
    claim = r.running()
    say(claim, "one\n")
    end(claim)
    tracer.trace(claim.id)
    path = rows.trace_dir / claim.id / "log.txt"
    before = path.read_bytes()
    path.write_bytes(before + garbage if garbage else before[:20])
    tracer.trace(claim.id)
    assert path.read_bytes() == before


def test_a_log_that_a_backup_shares_is_not_written_through(tracer: Tracer, rows: Settings, tmp_path: Path) -> None:
    """`cp -al` makes backups of hard links; what was backed up stays as it was."""
    claim = r.running()
    tracer.trace(claim.id)
    backup = tmp_path / "backup.txt"
    backup.hardlink_to(rows.trace_dir / claim.id / "log.txt")
    before = backup.read_bytes()
    end(claim, "more\n")
    tracer.trace(claim.id)
    assert backup.read_bytes() == before
    assert "more" in log_of(rows, claim.id)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["log.txt", ".output.json.new", ".input.json.new"])
def test_a_link_where_a_file_should_be_is_replaced(tracer: Tracer, rows: Settings, tmp_path: Path, what: str) -> None:
    """The trace follows, and what the link pointed to is as it was."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    claim = r.running()
    end(claim)
    folder = rows.trace_dir / claim.id
    folder.mkdir(parents=True)
    (folder / what).symlink_to(outside)
    tracer.trace(claim.id)
    assert outside.read_text() == "mine"
    assert sorted(contents(folder)) == ["events.jsonl", "input.json", "log.txt", "output.json"]
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert trace.is_complete(r.row(claim.id))


@pytest.mark.parametrize("call", ["write", "close"])
def test_a_disk_that_is_full_leaves_no_half_file(tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Most tell at the write, network disks at the close; no temporary file stays either."""
    claim = r.running()
    say(claim, "one\n")
    tracer.trace(claim.id)
    before = contents(rows.trace_dir / claim.id)
    say(claim, "two\n")
    end(claim)
    with monkeypatch.context() as patched:
        fill_disk(patched, call)
        tracer.trace(claim.id)
    left = contents(rows.trace_dir / claim.id)
    assert "output.json" not in left
    assert {name: left[name][: len(data)] for name, data in before.items()} == before
    assert not [name for name in left if name.startswith(".")]
    assert left["log.txt"].endswith(b"\n")
    assert r.row(claim.id)["trace_error"] == f"TRACE_DIR={rows.trace_dir}: No space left on device"
    tracer.trace(claim.id)
    assert log_of(rows, claim.id).count("two\n") == 1
    assert trace.is_complete(r.row(claim.id))


def fill_disk(patched: pytest.MonkeyPatch, call: str) -> None:
    """Let one system call of the writer fail as on a full disk, after part of the data has arrived."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real_close, real_write = os.close, os.pwrite

    def close(fd: int) -> None:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        real_close(fd)
        if is_file:
            raise full

    def write_some(fd: int, data: memoryview, offset: int) -> int:
        real_write(fd, data[:5], offset)
        raise full

    patched.setattr(f"tower.folder.os.{'close' if call == 'close' else 'pwrite'}", close if call == "close" else write_some)


def test_an_outage_of_the_disk_is_told_once(tracer: Tracer, rows: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """In the process log once, in every row, and once more in the log when it is over."""
    caplog.set_level(logging.INFO, "actors.trace")
    claims = [r.running() for _ in range(3)]
    rows.trace_dir.write_text("in the way")
    for claim in claims * 2:
        tracer.trace(claim.id)
    assert {r.row(claim.id)["trace_error"] for claim in claims} == {f"TRACE_DIR={rows.trace_dir}: Not a directory"}
    assert [record.levelname for record in caplog.records if record.name == "actors.trace"] == ["WARNING"]
    rows.trace_dir.unlink()
    for claim in claims:
        tracer.trace(claim.id)
    assert [record.message for record in caplog.records if record.name == "actors.trace"][1:] == ["traces can be written again"]


def test_one_folder_that_is_barred_is_told_once_and_bars_no_other(tracer: Tracer, rows: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """It is named with its path; the disk is not said to be away."""
    barred, free = r.running(), r.running()
    rows.trace_dir.mkdir()
    (rows.trace_dir / barred.id).write_text("a file where the folder should be")
    for claim in (barred, free, barred):
        tracer.trace(claim.id)
    assert r.row(barred.id)["trace_error"] == f"{rows.trace_dir / barred.id}: Not a directory"
    assert r.row(free.id)["traced_seq"] == r.row(free.id)["seq"]
    told = [record.getMessage() for record in caplog.records if record.name == "actors.trace"]
    assert told == [f"the trace could not be written; it will be tried again: {rows.trace_dir / barred.id}: Not a directory"]


def test_the_folder_of_a_task_that_has_ended_appears_whole(tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody ever sees it with some of its files, nor what it was made of; it is the same that grows file by file."""
    claim, seen = r.running(), list[list[str]]()
    say(claim, "said\n")
    end(claim, "last\n")
    monkeypatch.setattr("tower.folder.fault", lambda _: seen.append(sorted(path.name for path in rows.trace_dir.glob(f"{claim.id}/*"))))
    tracer.trace(claim.id)
    files = ["events.jsonl", "input.json", "log.txt", "output.json"]
    assert seen == [[], [], [], [], files]
    assert os.listdir(rows.trace_dir) == [claim.id]
    assert trace.is_complete(r.row(claim.id))
    assert r.row(claim.id)["traced_bytes"] == (rows.trace_dir / claim.id / "log.txt").stat().st_size
    tracer.rebuild(claim.id, rows.trace_dir / "again")
    for name in files:
        assert (rows.trace_dir / claim.id / name).read_bytes() == (rows.trace_dir / "again" / claim.id / name).read_bytes()


def test_a_folder_that_another_process_makes_at_the_same_time_is_brought_up(
    tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever comes first, it is whole, and nothing is left beside it."""
    claim = r.running()
    end(claim)
    folder = rows.trace_dir / claim.id

    def come_first(name: str) -> None:
        if name == "trace.after_temporary" and not folder.exists():
            folder.mkdir()
            (folder / "input.json").write_text("{")

    monkeypatch.setattr("tower.folder.fault", come_first)
    tracer.trace(claim.id)
    assert sorted(os.listdir(folder)) == ["events.jsonl", "input.json", "log.txt", "output.json"]
    assert os.listdir(rows.trace_dir) == [claim.id]
    assert trace.is_complete(r.row(claim.id))


def test_a_folder_that_is_taken_away_while_it_is_written_is_written_again(
    tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row never says that a folder is complete that is not there."""
    claim = r.running()
    end(claim)
    folder = rows.trace_dir / claim.id

    def take_away(name: str) -> None:
        if name == "trace.after_rename" and (folder / "output.json").exists():
            folder.rename(rows.trace_dir / "elsewhere")

    with monkeypatch.context() as patched:
        patched.setattr("tower.folder.fault", take_away)
        tracer.trace(claim.id)
    assert not trace.is_complete(r.row(claim.id))
    tracer.trace(claim.id)
    assert (folder / "output.json").exists()
    assert trace.is_complete(r.row(claim.id))


@pytest.mark.slow
def test_a_folder_in_other_hands_holds_up_nobody(tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nudges for the same task do not queue up behind each other, and another process is waited for only a moment."""
    monkeypatch.setattr("tower.folder._PATIENCE_S", 0.1)
    claim, other = r.running(), r.running()
    with open_folder(rows.trace_dir, claim.id):
        threads = [threading.Thread(target=tracer.trace, args=(claim.id,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        tracer.trace(other.id)
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    assert r.row(other.id)["traced_seq"] == r.row(other.id)["seq"]
    assert (r.row(claim.id)["traced_seq"], r.row(claim.id)["trace_error"]) == (0, None)
    tracer.trace(claim.id)
    assert r.row(claim.id)["traced_seq"] == r.row(claim.id)["seq"]


def test_what_happens_while_a_folder_is_written_is_traced_at_once(tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that writes looks again for the nudges that came meanwhile."""
    claim = r.running()

    def end_meanwhile(name: str) -> None:
        if name == "trace.before_mark" and r.row(claim.id)["status"] != SUCCEEDED:
            other = threading.Thread(target=lambda: (end(claim), tracer.trace(claim.id)))
            other.start()
            other.join()

    monkeypatch.setattr("actors.trace.fault", end_meanwhile)
    tracer.trace(claim.id)
    assert trace.is_complete(r.row(claim.id))
    assert (rows.trace_dir / claim.id / "output.json").exists()


def test_the_last_folders_are_written_again_after_a_start_of_the_machine(
    tracer: Tracer, rows: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may have taken what the disk did not have yet; what is older it had."""
    old, last = r.running(), r.running()
    for claim in (old, last):
        end(claim)
        tracer.trace(claim.id)
        (rows.trace_dir / claim.id / "output.json").write_text("")
    db.unit(lambda: Task.update(finished_at=Task.finished_at - 120).where(Task.id == old.id).execute())
    runs = r.running()
    tracer.trace(runs.id)
    for boot, emptied in (("one", [old.id]), ("one", [old.id]), ("two", [old.id])):
        monkeypatch.setattr("actors.trace.boot_id", lambda boot=boot: boot)
        Tracer(rows).follow_power_cut()
        for claim in (old, last):
            if r.row(claim.id)["traced_seq"] == 0:
                tracer.trace(claim.id)
        assert [task_id for task_id in (old.id, last.id) if not (rows.trace_dir / task_id / "output.json").read_text()] == emptied
    assert (rows.trace_dir / ".boot").read_text() == "two"
    assert r.row(runs.id)["traced_seq"] == 0


def test_a_late_nudge_for_a_task_that_is_gone_leaves_no_folder(tracer: Tracer, rows: Settings) -> None:
    """Else every deleted task would come back as an empty folder."""
    tracer.trace(new_id())
    assert list(rows.trace_dir.iterdir()) == []


@pytest.mark.slow
def test_a_rebuilt_folder_equals_the_one_that_grew(tracer: Tracer, rows: Settings, tmp_path: Path) -> None:
    """P6, byte for byte, in place and elsewhere; leftovers of a crash are cleaned up."""
    claim = r.running(payload='{"é":"tower"}', labels={"team": "a"})
    for number in range(20):
        say(claim, f"line {number} ü\n")
        tracer.trace(claim.id)
    db.unit(lambda: leases.keep_artifact(claim, "a/b.txt", 0, b"kept" * 1000))
    db.unit(lambda: leases.keep_artifact(claim, "a/b.txt", 1, b"more"))
    end(claim, "last\n")
    tracer.trace(claim.id)
    folder = rows.trace_dir / claim.id
    grown, row = contents(folder), r.row(claim.id)
    assert grown["artifacts/a/b.txt"] == b"kept" * 1000 + b"more"
    tracer.rebuild(claim.id, tmp_path / "elsewhere")
    assert contents(tmp_path / "elsewhere" / claim.id) == grown
    (folder / ".log.txt.new").write_text("half")
    (folder / "log.txt").write_bytes(grown["log.txt"].swapcase())
    tracer.rebuild(claim.id)
    assert contents(folder) == grown
    assert r.row(claim.id)["traced_bytes"] == row["traced_bytes"]
    with pytest.raises(NotFound):
        tracer.rebuild(new_id())


def test_a_task_that_goes_on_after_a_restore_has_no_output_yet(tracer: Tracer, rows: Settings) -> None:
    """The database was restored from before the task's end, the folder was not."""
    claim = r.running()
    tracer.trace(claim.id)
    (rows.trace_dir / claim.id / "output.json").write_text("{}")
    say(claim, "on\n")
    tracer.trace(claim.id)
    assert not (rows.trace_dir / claim.id / "output.json").exists()

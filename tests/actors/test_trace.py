"""The trace actor on a real disk, and the format it writes."""

import hashlib
import itertools
import json
import os
import threading
import time
from pathlib import Path

import pytest

from actors.trace import Tracer
from tests import rows as r
from tower import db, leases, lifecycle, trace
from tower.errors import NotFound
from tower.leases import Claim
from tower.lifecycle import LogPart, Outcome
from tower.models import SUCCEEDED, Task, new_id
from tower.settings import Settings

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
    grown = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    folder.rename(rows.trace_dir / "old")
    db.unit(lambda: Task.update(traced_seq=0, traced_bytes=0).execute())
    tracer.trace(claim.id)
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == grown
    assert Path("artifacts/a/b.txt") in grown


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

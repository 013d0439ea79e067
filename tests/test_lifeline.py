"""Lifelines: what a lock file proves, and what it does not."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import wait_for
from tower import lifeline
from tower.host import ProcessId, hostname, this_process

OLD = ProcessId("before the restart", 7, 0.0)


def test_it_is_held_until_the_last_descriptor_is_closed(tmp_path: Path) -> None:
    """The worker's and its guardian's."""
    file = lifeline.hold(tmp_path, "w")
    assert file is not None
    guardian = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(file,))
    os.close(file)
    assert lifeline.known(tmp_path) == {"w": True}
    assert not lifeline.is_dead(tmp_path, "w", OLD, hostname())
    guardian.communicate(b"\n")
    wait_for("its end", lambda: lifeline.known(tmp_path) == {"w": False})
    assert lifeline.is_dead(tmp_path, "w", OLD, hostname())


def test_a_worker_whose_guardian_still_lives_is_not_dead_yet(tmp_path: Path) -> None:
    """Something of it may still run."""
    gone = ProcessId(this_process().space, 2**22 + 1, 0.0)
    assert lifeline.is_dead(tmp_path, "w", gone, hostname())
    file = lifeline.hold(tmp_path, "w")
    assert not lifeline.is_dead(tmp_path, "w", gone, hostname())
    assert file is not None
    os.close(file)
    assert lifeline.is_dead(tmp_path, "w", gone, hostname())


def test_a_free_lock_does_not_make_a_live_process_dead(tmp_path: Path) -> None:
    """Where its pid can be seen, that counts."""
    file = lifeline.hold(tmp_path, "w")
    assert file is not None
    os.close(file)
    assert not lifeline.is_dead(tmp_path, "w", this_process(), hostname())


def test_no_file_and_a_file_of_another_machine_prove_nothing(tmp_path: Path) -> None:
    """The worker may live where we cannot see it."""
    assert not lifeline.is_dead(tmp_path, "w", OLD, hostname())
    (tmp_path / "w.lock").touch()
    assert not lifeline.is_dead(tmp_path, "w", OLD, "elsewhere")


def test_a_folder_that_others_may_write_to_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They could make any worker look dead; the warning names the cure."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "w.lock").touch()
    assert lifeline.hold(shared, "v") is None
    assert "TOWER_RUN_DIR" in caplog.text
    (tmp_path / "link").symlink_to(tmp_path)
    assert lifeline.hold(tmp_path / "link", "v") is None
    assert not lifeline.is_dead(shared, "w", OLD, hostname())


def test_by_default_it_is_below_the_temporary_folder_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each user."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    where = lifeline.folder(None)
    file = lifeline.hold(where, "w")
    assert (where.name, where.stat().st_mode & 0o777) == (f"devops-control-tower-{os.getuid()}", 0o700)
    lifeline.drop(where, "w", file)
    assert list(where.iterdir()) == []


def test_a_dead_workers_file_is_removed_and_a_live_ones_is_not(tmp_path: Path) -> None:
    """Also one that nobody asked about for a week."""
    for name in ("dead", "old"):
        file = lifeline.hold(tmp_path, name)
        assert file is not None
        os.close(file)
    alive = lifeline.hold(tmp_path, "alive")
    for name in ("dead", "alive"):
        lifeline.forget(tmp_path, name)
    os.utime(tmp_path / "old.lock", (0, 0))
    lifeline.drop(tmp_path, "new", lifeline.hold(tmp_path, "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["alive.lock"]
    lifeline.drop(tmp_path, "alive", alive)


def test_files_that_were_let_go_long_ago_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers whose databases are gone leave them; a young one may be about to be locked."""
    (tmp_path / "old.lock").touch()
    os.utime(tmp_path / "old.lock", (0, 0))
    (tmp_path / "young.lock").touch()
    lifeline.make_own(tmp_path)
    seen: list[str] = []
    real = lifeline._is_held
    monkeypatch.setattr(lifeline, "_is_held", lambda where, worker_id: seen.append(worker_id) or real(where, worker_id))
    assert lifeline.known(tmp_path) == {"old": False, "young": False}
    file = os.open(tmp_path / "young.lock", os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    assert lifeline.known(tmp_path) == {"young": True}
    os.close(file)
    assert sorted(seen) == ["old", "young", "young"]

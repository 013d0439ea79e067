"""Traces under fire: whole towers whose disk is full, read-only or meddled with, and tasks that say too much."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from actors.trace import Tracer
from tests.acceptance.stack import Stack
from tests.conftest import BASE, LOCAL, Tower
from tests.folders import contents
from tests.servers import wait_for
from tower.main import build
from tower.settings import Settings

pytestmark = pytest.mark.slow

SMALL, LARGE = "size=64k", "size=64m"


class Disk:
    """A disk of its own for TRACE_DIR: a small tmpfs, or where nobody may mount one, system calls that fail like a full one's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._patched = pytest.MonkeyPatch()
        path.mkdir()
        self.is_mounted = self._run("mount", "-t", "tmpfs", "-o", SMALL, "trace-fire", str(path))

    @staticmethod
    def _run(*command: str) -> bool:
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0

    def fill(self) -> None:
        """Leave no space."""
        if not self.is_mounted:
            self._refuse(errno.ENOSPC)
            return
        with (self._path / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(b"x" * 512):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def lock(self) -> None:
        """Make it read-only."""
        if not self.is_mounted:
            self._refuse(errno.EROFS)
        else:
            assert self._run("mount", "-o", "remount,ro", str(self._path))

    def _refuse(self, number: int) -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number))

        # A stand-in for the module, since a changed `os` would fail everybody in this process.
        calls = {name: getattr(os, name) for name in dir(os)} | dict.fromkeys(("pwrite", "fsync", "mkdir", "rename"), refuse)
        self._patched.setattr("tower.folder.os", SimpleNamespace(**calls))

    def free(self) -> None:
        """Make it large and writable."""
        self._patched.undo()
        if self.is_mounted:
            assert self._run("mount", "-o", f"remount,rw,{LARGE}", str(self._path))

    def close(self) -> None:
        self._patched.undo()
        if self.is_mounted:
            assert self._run("umount", "-l", str(self._path))


@pytest.fixture
def disk(settings: Settings) -> Iterator[Disk]:
    made = Disk(settings.trace_dir)
    yield made
    made.close()


@pytest.fixture
def own_tower(settings: Settings, disk: Disk) -> Iterator[Tower]:
    """A whole tower on each database, whose traces are on the disk."""
    with TestClient(build(settings), base_url=BASE, client=LOCAL) as client:
        wait_for("a worker", lambda: client.get("/health/ready").json()["workers"] > 0)
        yield Tower(client, settings)


def is_whole(tower: Tower, task_id: str, tmp_path: Path) -> bool:
    """Whether the folder equals one that is written from the database alone."""
    Tracer(tower.settings).rebuild(task_id, tmp_path / "rebuilt")
    return contents(tower.traced(task_id)) == contents(tmp_path / "rebuilt" / task_id)


def say(lines: int) -> dict[str, Any]:
    return {"argv": ["sh", "-c", f"seq {lines}; seq 99 > r.txt"], "artifacts": ["r.txt"]}


def test_a_full_disk_delays_traces_and_nothing_else(own_tower: Tower, disk: Disk, tmp_path: Path) -> None:
    """Results are kept, /health/ready says what is wrong in one line, no half output.json is seen, and all follows when there is space."""
    root = own_tower.settings.trace_dir
    disk.fill()
    tasks = [own_tower.enqueue("command", say(2000)) for _ in range(3)] + [own_tower.enqueue("echo", {"n": n}) for n in range(3)]
    assert {own_tower.wait(task_id)["status"] for task_id in tasks} == {"succeeded"}
    wait_for("the errors", lambda: all(own_tower.task(task_id)["trace_error"] for task_id in tasks))
    assert {own_tower.task(task_id)["trace_error"] for task_id in tasks} == {f"TRACE_DIR={root}: No space left on device"}
    told = own_tower.client.get("/health/ready").json()
    said = f"TRACE_DIR={root}: No space left on device: results are kept, traces follow when there is space (6 tasks)."
    assert (told["status"], told["problems"]) == ("degraded", [said])
    assert not list(root.rglob("output.json"))
    assert not list(root.rglob("*.new"))
    disk.free()
    assert all(is_whole(own_tower, task_id, tmp_path) for task_id in tasks)
    assert {own_tower.task(task_id)["trace_error"] for task_id in tasks} == {None}
    assert own_tower.client.get("/health/ready").json()["problems"] == []


def test_a_disk_that_fills_up_in_the_middle_leaves_no_half_file(own_tower: Tower, disk: Disk, tmp_path: Path) -> None:
    """A log that is larger than the disk: what was there stays, what is too much comes later."""
    if not disk.is_mounted:
        disk.fill()
    task_id = own_tower.enqueue("command", say(20_000))
    assert own_tower.wait(task_id)["status"] == "succeeded"
    wait_for("the error", lambda: bool(own_tower.task(task_id)["trace_error"]))
    folder = own_tower.settings.trace_dir / task_id
    assert not (folder / "output.json").exists()
    assert all(path.read_text().endswith("\n") for path in folder.glob("*.txt") if path.stat().st_size)
    disk.free()
    assert is_whole(own_tower, task_id, tmp_path)


def test_a_read_only_disk_delays_traces_and_nothing_else(own_tower: Tower, disk: Disk, tmp_path: Path) -> None:
    """The same, with its own words."""
    disk.lock()
    task_id = own_tower.enqueue("echo", {"n": 1})
    assert own_tower.wait(task_id)["status"] == "succeeded"
    wait_for("the error", lambda: bool(own_tower.task(task_id)["trace_error"]))
    (problem,) = own_tower.client.get("/health/ready").json()["problems"]
    assert problem.endswith("Read-only file system: results are kept, traces follow when it can be written.")
    disk.free()
    assert is_whole(own_tower, task_id, tmp_path)


def test_a_folder_that_is_barred_delays_no_other(own_tower: Tower, disk: Disk, tmp_path: Path) -> None:
    """A link in place of one task's artifacts; the health names the path and the cure."""
    disk.free()
    go = tmp_path / "go"
    program = f"echo one; until [ -e {go} ]; do sleep 0.05; done; echo two > r.txt"
    barred = own_tower.enqueue("command", {"argv": ["sh", "-c", program], "artifacts": ["r.txt"]})
    folder = own_tower.settings.trace_dir / barred
    wait_for("the folder", (folder / "log.txt").exists)
    (folder / "artifacts").symlink_to(tmp_path)
    go.touch()
    assert own_tower.wait(barred)["status"] == "succeeded"
    assert own_tower.traced(own_tower.enqueue("echo", {"n": 1})).is_dir()
    wait_for("the error", lambda: bool(own_tower.task(barred)["trace_error"]))
    (problem,) = own_tower.client.get("/health/ready").json()["problems"]
    assert str(folder / "artifacts") in problem
    assert "tower fsck --repair" in problem
    assert not (tmp_path / "r.txt").exists()
    (folder / "artifacts").unlink()
    assert is_whole(own_tower, barred, tmp_path)


@pytest.mark.parametrize("name", ["", "log.txt", "input.json", "events.jsonl"])
def test_what_is_taken_away_while_a_task_runs_comes_back(own_tower: Tower, disk: Disk, tmp_path: Path, name: str) -> None:
    """With the next line that the task says."""
    disk.free()
    go = tmp_path / "go"
    task_id = own_tower.enqueue("command", {"argv": ["sh", "-c", f"echo one; until [ -e {go} ]; do sleep 0.05; done; echo two"]})
    folder = own_tower.settings.trace_dir / task_id
    taken, log = folder / name, folder / "log.txt"
    wait_for("the first line", lambda: taken.exists() and log.exists() and "] one\n" in log.read_text())
    shutil.rmtree(taken) if taken.is_dir() else taken.unlink()
    go.touch()
    assert own_tower.wait(task_id)["status"] == "succeeded"
    assert is_whole(own_tower, task_id, tmp_path)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path, TOWER_LOG_LIMIT_MB="1")
    yield made
    made.close()


#: What one task's output may add to the process that runs and traces it, in MB; 200 MB go through it.
MOST_MB = 64


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("head -c 200000000 /dev/zero | tr '\\0' x", id="without a newline"),
        pytest.param("head -c 20000000 /dev/urandom", id="binary"),
        pytest.param("seq 1000000", id="a million lines"),
    ],
)
def test_output_without_end_is_cut_in_bounded_memory(stack: Stack, program: str) -> None:
    """The log keeps its limit with a mark, the task succeeds."""
    server = stack.server()
    stack.wait(stack.enqueue("command", {"argv": ["sh", "-c", "seq 1000"]}))
    before = peak_mb(server.popen.pid)
    task = stack.wait(stack.enqueue("command", {"argv": ["sh", "-c", program]}), seconds=60)
    assert (task["status"], task["result"]) == ("succeeded", {"exit_code": 0})
    assert peak_mb(server.popen.pid) - before < MOST_MB
    folder = stack.folder / "logs" / task["id"]
    log = (folder / "log.txt").read_text()
    assert len(log) < 1_200_000
    assert "the log is cut here: TOWER_LOG_LIMIT_MB=1" in log
    assert log.splitlines()[-1].endswith("── succeeded")
    assert json.loads((folder / "output.json").read_text())["status"] == "succeeded"


def peak_mb(pid: int) -> float:
    """Return the most memory that a process has held."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("only Linux tells the peak of a process")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024

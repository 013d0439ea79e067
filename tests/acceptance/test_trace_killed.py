"""kill -9 at each point of writing a folder: afterwards it is whole."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from actors.trace import Tracer
from tests.acceptance.stack import PROGRAMS, Stack
from tests.folders import contents
from tests.processes import scribe_of
from tests.servers import wait_for
from tower import db, fsck
from tower.faults import POINTS
from tower.models import Task
from tower.settings import Settings
from tower.terms import SUCCEEDED

pytestmark = pytest.mark.slow

TRACE_POINTS = [point for point in POINTS if point.startswith("trace.")]
#: Points that are passed once for each file: at the last passings it is the turn of artifacts and output.json.
PASSINGS = [
    (point, nth) for point in TRACE_POINTS for nth in ((1, 3, 4) if point in ("trace.after_temporary", "trace.after_rename") else (1,))
]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(("point", "nth"), PASSINGS)
def test_a_folder_is_whole_after_a_crash_while_it_was_written(stack: Stack, point: str, nth: int) -> None:
    """No half file is seen, no temporary one stays, and it equals the one that is written from the database alone."""
    stack.environment["TOWER_FAULT"] = f"{point}:{nth}:kill"
    server = stack.server()
    program = "seq 3000; seq 9 > r.txt"
    task_id = stack.enqueue("command", {"argv": ["sh", "-c", program], "artifacts": ["r.txt"]}, max_attempts=5)
    assert server.popen.wait(30) == -signal.SIGKILL
    folder = stack.folder / "logs" / task_id
    left = contents(folder) if folder.exists() else {}
    assert all(data.endswith(b"\n") for name, data in left.items() if not name.startswith("."))
    del stack.environment["TOWER_FAULT"]
    stack.server()
    assert stack.wait(task_id)["status"] == "succeeded"
    whole = contents(folder)
    assert sorted(whole) == ["artifacts/r.txt", "events.jsonl", "input.json", "log.txt", "output.json"]
    with beside(stack) as settings:
        Tracer(settings).rebuild(task_id, stack.folder / "rebuilt")
        assert list(fsck.run(settings)) == []
    assert contents(stack.folder / "rebuilt" / task_id) == whole


@pytest.mark.parametrize("is_server", [True, False])
def test_every_folder_is_whole_after_a_crash_while_many_were_written(stack: Stack, *, is_server: bool) -> None:
    """Whether the server is killed or its scribe, which does not outlive it."""
    server = stack.server()
    ids: list[str] = []

    def is_helped() -> bool:
        ids.extend(stack.enqueue_all("echo", 200))
        return scribe_of(server.popen.pid) is not None

    wait_for("the scribe", is_helped)
    scribe = scribe_of(server.popen.pid)
    assert scribe
    ids += stack.enqueue_all("echo", 200)
    if is_server:
        server.end(signal.SIGKILL)
    else:
        scribe.kill()
    wait_for("the end of the scribe", lambda: not scribe.is_running() or scribe.status() == psutil.STATUS_ZOMBIE)
    if is_server:
        stack.server()
    with beside(stack) as settings:
        told = Task.select().where(Task.status == SUCCEEDED, Task.traced_seq >= Task.seq)
        wait_for("all to succeed", lambda: db.read(told.count) == len(ids), 60)
        assert list(fsck.run(settings)) == []
    assert len([path for path in (stack.folder / "logs").iterdir() if not path.name.startswith(".")]) == len(ids)


def test_a_rebuild_that_is_killed_is_done_again(stack: Stack) -> None:
    """A command that writes folders may be killed like any other process."""
    stack.server()
    task_id = stack.enqueue("command", {"argv": ["seq", "3000"]})
    stack.wait(task_id)
    folder = stack.folder / "logs" / task_id
    before = contents(folder)
    (folder / "log.txt").write_text("changed")
    stack.environment["TOWER_FAULT"] = "trace.after_temporary:2:kill"
    killed = stack._start("rebuild", [str(PROGRAMS / "tower"), "trace", "rebuild", task_id])
    assert killed.popen.wait(30) == -signal.SIGKILL
    del stack.environment["TOWER_FAULT"]
    wait_for("the leftover", (folder / ".log.txt.new").exists)
    with beside(stack) as settings:
        assert {result.is_repaired for result in fsck.run(settings, Tracer(settings).rebuild)} == {True}
    assert contents(folder) == before


@contextmanager
def beside(stack: Stack) -> Iterator[Settings]:
    """Open the database of a running tower in this process too."""
    settings = Settings(database_url=f"sqlite:///{stack.folder}/devops_control_tower.db", trace_dir=stack.folder / "logs", redis_url=None)
    db.open_existing(settings)
    yield settings
    db.close_database()


def test_every_point_of_the_trace_is_tried() -> None:
    """Those of tower/faults.py are all passed by the code."""
    found = subprocess.run(["grep", "-rhoE", r'fault\("trace\.[a-z_]+"\)', "tower", "actors"], capture_output=True, text=True, check=True)
    assert {line.split('"')[1] for line in found.stdout.splitlines()} == set(TRACE_POINTS)

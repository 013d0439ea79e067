"""The embedded tower as a real process: the README's first screen, Ctrl-C, and a crash."""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.acceptance.stack import Stack
from tests.processes import marked
from tests.servers import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield made
    made.close()


def test_the_first_screen_of_the_readme(stack: Stack) -> None:
    """With nothing but Python: health, a first task, its folder, and one with real work."""
    stack.server()
    assert stack.client.get("/health").text == '{"status":"ok"}'
    answer = stack.client.post(
        "/tasks/enqueue", headers={"content-type": "application/json"}, content='{"type":"echo","payload":{"hello":"tower"}}'
    )
    task_id = answer.json()["task_id"]
    assert (answer.status_code, answer.headers["location"], list(answer.json())) == (202, f"/tasks/{task_id}", ["task_id"])
    stack.wait(task_id)
    folder = stack.folder / "logs" / task_id
    assert {path.name for path in folder.iterdir()} == {"input.json", "log.txt", "output.json", "events.jsonl"}
    work = stack.enqueue("command", {"argv": [sys.executable, "-m", "compileall", "."], "cwd": str(stack.folder)})
    assert stack.wait(work)["result"] == {"exit_code": 0}
    assert json.loads((stack.folder / "logs" / work / "output.json").read_text())["result"] == {"exit_code": 0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_and_goes_on_where_it_was(stack: Stack, number: signal.Signals) -> None:
    """No traceback, exit code 0, no process left; the running task is run again by the next life."""
    server = stack.server()
    task_id = stack.enqueue("command", {"argv": ["sh", "-c", f"test -e {stack.folder}/again || sleep 300"]})
    wait_for("the process", lambda: len(marked(task_id)) >= 1)
    assert server.end(number) == 0
    assert "Traceback" not in server.log
    assert marked(task_id) == []
    (stack.folder / "again").touch()
    stack.server()
    task = stack.wait(task_id)
    assert (task["status"], task["attempt"], task["losses"]) == ("succeeded", 2, 0)
    assert "released" in stack.kinds(task_id)


def test_a_crash_loses_nothing_and_leaves_no_orphan(stack: Stack) -> None:
    """kill -9 with one task running and others waiting: the next life ends the orphan and runs them all."""
    server = stack.server()
    running = stack.enqueue("command", {"argv": ["sh", "-c", f"test -e {stack.folder}/again || sleep 300"]}, concurrency_key="one")
    wait_for("the process", lambda: len(marked(running)) >= 1)
    assert list(Path(tempfile.gettempdir()).glob(f"tower-{running}-1-*"))
    waiting = [stack.enqueue("echo", {"n": n}, concurrency_key="one") for n in range(5)]
    server.end(signal.SIGKILL)
    (stack.folder / "again").touch()
    stack.server()
    assert stack.wait(running)["losses"] == 1
    assert {stack.wait(task_id)["status"] for task_id in (running, *waiting)} == {"succeeded"}
    assert len(marked(running)) == 0
    assert list(Path(tempfile.gettempdir()).glob(f"tower-{running}-*")) == []


def test_it_is_open_to_others_only_with_a_key(stack: Stack) -> None:
    """On another address than loopback; the log says how to make the first key."""
    stack.environment |= {"HOST": "0.0.0.0", "TOWER_ALLOWED_HOSTS": "127.0.0.1"}
    server = stack.server()
    answer = httpx2.get(f"http://127.0.0.1:{stack.port}/tasks")
    assert (answer.status_code, answer.json()["code"]) == (401, "key_required")
    assert httpx2.get(f"http://127.0.0.1:{stack.port}/health").status_code == 200
    assert "set TOWER_BOOTSTRAP_KEY" in server.log


def test_a_port_that_is_taken_is_named(stack: Stack) -> None:
    """Without a traceback."""
    stack.server()
    second = stack._start("server", [sys.executable, "-m", "devops_control_tower.main"])
    assert second.popen.wait(20) != 0
    assert str(stack.port) in second.log
    assert "Traceback" not in second.log


def test_settings_that_make_no_sense_are_named(stack: Stack) -> None:
    """With the variable, its value and the cure; a password is not repeated."""
    stack.environment |= {"TOWER_LEASE_S": "soon", "DATABASE_URL": "mysql://u:hunter2@h/d"}
    server = stack._start("server", [sys.executable, "-m", "devops_control_tower.main"])
    assert server.popen.wait(20) == 2
    assert "TOWER_LEASE_S='soon'" in server.log
    assert "sqlite:///path" in server.log
    assert "hunter2" not in server.log

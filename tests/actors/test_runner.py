"""Attempts in a whole embedded tower: how each way of ending is recorded."""

import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from tests.conftest import Tower
from tests.servers import wait_for
from tower.handler import Fail, HandlerType, Retry, TaskContext, registry


class _Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


@pytest.fixture
def handle() -> Iterator[Any]:
    """Replace what `echo` does."""
    echo = registry.get("echo")

    def replace(function: Any, **defaults: Any) -> None:
        values = {"payload": _Anything, "queue": "default", "timeout_s": 60.0, "max_attempts": 1} | defaults
        registry._types["echo"] = HandlerType("echo", function, **values)

    yield replace
    registry._types["echo"] = echo


def test_an_exception_is_handler_error_with_its_traceback_in_the_log(sqlite_tower: Tower, handle: Any) -> None:
    """Whatever a handler raises is the task's failure."""

    def explode(payload: Any, task: TaskContext) -> None:
        raise RuntimeError("it broke")

    handle(explode)
    task = sqlite_tower.wait(sqlite_tower.enqueue("echo"))
    assert (task["status"], task["error"]["code"]) == ("failed", "handler_error")
    assert task["error"]["message"] == "RuntimeError: it broke"
    assert "Traceback" in sqlite_tower.log(task["id"])


def test_a_handler_that_asks_to_exit_fails_its_task_and_nothing_else(sqlite_tower: Tower, handle: Any) -> None:
    """SystemExit is a handler's failure too; the worker goes on."""
    handle(lambda payload, task: sys.exit(3))
    assert sqlite_tower.wait(sqlite_tower.enqueue("echo"))["error"]["message"] == "SystemExit: 3"
    handle(lambda payload, task: "fine")
    assert sqlite_tower.wait(sqlite_tower.enqueue("echo"))["result"] == "fine"


def test_whatever_a_failure_says_can_be_kept(tower: Tower, handle: Any) -> None:
    """Half characters, NUL and endless texts are made storable and short."""

    def refuse(payload: Any, task: TaskContext) -> None:
        raise Fail("odd", "caf\udce9 \x00" + "x" * 100_000, body="y" * 1_000_000, list=list(range(9000)))

    handle(refuse)
    error = tower.wait(tower.enqueue("echo"))["error"]
    assert error["message"].startswith("caf? \ufffdxxx")
    assert len(json.dumps(error)) < 15_000


@pytest.mark.parametrize("after_s", [float("inf"), float("nan"), -1, 1e12])
def test_a_handler_cannot_put_its_task_off_for_ever(sqlite_tower: Tower, handle: Any, after_s: float) -> None:
    """P1: every task reaches a final state."""

    def never(payload: Any, task: TaskContext) -> None:
        raise Retry(after_s)

    handle(never)
    task = sqlite_tower.wait(sqlite_tower.enqueue("echo"))
    assert "takes seconds from 0 to a year" in task["error"]["message"]


def test_a_file_with_a_name_that_cannot_be_kept_fails_the_task_and_says_so(sqlite_tower: Tower, handle: Any) -> None:
    """Written past `artifact()`, straight into the folder."""

    def leave(payload: Any, task: TaskContext) -> None:
        (task.artifact("good").parent / ("n" * 230)).touch()

    handle(leave)
    task = sqlite_tower.wait(sqlite_tower.enqueue("echo"))
    assert task["error"]["code"] == "artifact_name"
    sqlite_tower.traced(task["id"])


def test_the_files_of_a_later_attempt_replace_those_of_earlier_ones(sqlite_tower: Tower, handle: Any) -> None:
    """A file where a folder was stands in nobody's way."""

    def leave(payload: Any, task: TaskContext) -> None:
        task.artifact("out" if task.attempt == 1 else "out/x").write_text(str(task.attempt))
        if task.attempt == 1:
            raise Retry(0.01)

    handle(leave, max_attempts=2)
    folder = sqlite_tower.traced(sqlite_tower.enqueue("echo"))
    assert (folder / "artifacts/out/x").read_text() == "2"


def test_a_handler_fails_with_a_code_and_details_of_its_own(sqlite_tower: Tower, handle: Any) -> None:
    """`Fail` says all; what JSON cannot hold is told as text."""

    def refuse(payload: Any, task: TaskContext) -> None:
        raise Fail("no_quota", "The account is empty.", left=0, who=b"\x00")

    handle(refuse)
    error = sqlite_tower.wait(sqlite_tower.enqueue("echo"))["error"]
    assert (error["code"], error["message"]) == ("no_quota", "The account is empty.")
    assert error["details"] == {"left": 0, "who": "b'\\x00'"}


def test_a_handler_is_tried_again_and_told_which_try_it_is(sqlite_tower: Tower, handle: Any) -> None:
    """`Retry` puts the task back until it has no attempts left."""
    tries: list[int] = []

    def flaky(payload: Any, task: TaskContext) -> dict[str, int]:
        tries.append(task.attempt)
        if task.attempt < 3:
            raise Retry(0.05)
        return {"took": task.attempt}

    handle(flaky, max_attempts=3)
    task = sqlite_tower.wait(sqlite_tower.enqueue("echo"))
    assert (task["status"], task["result"], tries) == ("succeeded", {"took": 3}, [1, 2, 3])
    output = json.loads((sqlite_tower.traced(task["id"]) / "output.json").read_text())
    assert [attempt["end"] for attempt in output["attempts"]] == ["retry_scheduled", "retry_scheduled", "succeeded"]


@pytest.mark.parametrize(
    ("result", "code"), [(object(), "result_not_json"), (float("nan"), "result_not_json"), ("x" * 11_000_000, "result_too_large")]
)
def test_a_result_that_cannot_be_kept_fails_the_task(sqlite_tower: Tower, handle: Any, result: Any, code: str) -> None:
    """With a code that says why."""
    handle(lambda payload, task: result)
    assert sqlite_tower.wait(sqlite_tower.enqueue("echo"))["error"]["code"] == code


def test_artifacts_are_kept_and_traced(tower: Tower, handle: Any) -> None:
    """Also in folders, also large ones, byte for byte."""
    large = bytes(range(256)) * 4000

    def leave(payload: Any, task: TaskContext) -> None:
        task.artifact("report/index.html").write_text("<p>good")
        task.artifact("data.bin").write_bytes(large)
        task.artifact('Bericht "ü";.txt').write_text("gut")

    handle(leave)
    folder = tower.traced(tower.enqueue("echo"))
    assert (folder / "artifacts/report/index.html").read_text() == "<p>good"
    assert (folder / "artifacts/data.bin").read_bytes() == large
    assert (folder / 'artifacts/Bericht "ü";.txt').read_text() == "gut"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", ".hidden", "a//b", "", "x\x00y", "-" * 300])
def test_an_artifact_cannot_leave_its_folder(sqlite_tower: Tower, handle: Any, name: str) -> None:
    """Names are plain."""

    def leave(payload: Any, task: TaskContext) -> None:
        task.artifact(name)

    handle(leave)
    assert sqlite_tower.wait(sqlite_tower.enqueue("echo"))["error"]["code"] == "artifact_name"


@pytest.mark.slow
def test_the_log_of_a_running_task_grows_in_its_folder(tower: Tower, handle: Any) -> None:
    """At least every two seconds, before the task ends."""
    go_on = threading.Event()

    def talk(payload: Any, task: TaskContext) -> None:
        task.log("halfway there")
        go_on.wait(20)

    handle(talk)
    task_id = tower.enqueue("echo")
    path = tower.settings.trace_dir / task_id / "log.txt"
    wait_for("the log to grow", lambda: path.exists() and "halfway there" in path.read_text(), 5)
    assert tower.task(task_id)["status"] == "running"
    assert not (path.parent / "output.json").exists()
    go_on.set()
    tower.traced(task_id)


def test_what_a_task_says_cannot_act_on_a_terminal_or_a_database(tower: Tower, handle: Any) -> None:
    """Colours stay; NUL, cursor moves, titles and surrogates do not."""

    def shout(payload: Any, task: TaskContext) -> None:
        task.log("a\x00b \x1b[31mred\x1b[0m \x1b[2Jgone \x1b]0;title\x07 \udc80 \x9b31m")

    handle(shout)
    task_id = tower.enqueue("echo")
    tower.traced(task_id)
    line = next(line for line in tower.log(task_id).split("\n") if "red" in line)
    assert line.endswith("[1] a�b \x1b[31mred\x1b[0m gone  � �31m")


def test_a_log_over_its_limit_is_cut_with_a_mark(tower: Tower, handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is dropped, the task goes on."""
    monkeypatch.setattr("actors.attempt.Settings.log_limit_mb", property(lambda self: 1), raising=False)

    def flood(payload: Any, task: TaskContext) -> str:
        for _ in range(40):
            task.log("x" * 100_000)
        return "done"

    handle(flood)
    task_id = tower.enqueue("echo")
    folder = tower.traced(task_id)
    text = (folder / "log.txt").read_text()
    assert tower.task(task_id)["result"] == "done"
    assert len(text) < 1_200_000
    assert text.count("the log is cut here: TOWER_LOG_LIMIT_MB") == 1


@pytest.mark.slow
def test_more_tasks_than_slots_run_at_most_so_many_at_once(tower: Tower, handle: Any) -> None:
    """And all of them in the end."""
    lock, now, most = threading.Lock(), [0], [0]
    pause = threading.Event()

    def count(payload: Any, task: TaskContext) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        pause.wait(0.02)
        with lock:
            now[0] -= 1

    handle(count)
    answer = tower.client.post("/tasks/enqueue/batch", json={"tasks": [{"type": "echo"}] * 60})
    ids = answer.json()["task_ids"]
    for task_id in ids:
        assert tower.wait(task_id, seconds=60)["status"] == "succeeded"
    assert 2 <= most[0] <= tower.settings.slots


def _quick(tower: Tower) -> None:
    """Let the worker see that echo is quick, so that several run in one thread."""
    for _ in range(30):
        tower.wait(tower.enqueue("echo", {"n": -1}))


def _together(tower: Tower) -> list[str]:
    answer = tower.client.post("/tasks/enqueue/batch", json={"tasks": [{"type": "echo", "payload": {"n": n}} for n in range(8)]})
    return list(answer.json()["task_ids"])


def test_a_quick_task_that_turns_slow_holds_up_no_other(tower: Tower, handle: Any) -> None:
    """Neither those that wait behind it in its thread nor those that ended before it, which nobody has recorded yet."""
    go_on = threading.Event()
    handle(lambda payload, task: go_on.wait(60) if payload.n == 3 else None)
    _quick(tower)
    ids = _together(tower)
    try:
        for n, task_id in enumerate(ids):
            tower.wait(task_id, *(("running",) if n == 3 else ("succeeded",)))
    finally:
        go_on.set()
    assert tower.wait(ids[3])["status"] == "succeeded"


def test_each_of_the_quick_tasks_of_a_thread_ends_in_its_own_way(tower: Tower, handle: Any) -> None:
    """What fails, leaves a file, or returns what cannot be kept, changes nothing for the others."""

    def vary(payload: Any, task: TaskContext) -> Any:
        task.log(f"number {payload.n}")
        if payload.n == 2:
            raise Fail("odd", "It is two.")
        if payload.n == 4:
            task.artifact("four").write_text("4")
        return {1, 2} if payload.n == 6 else payload.n

    handle(vary)
    _quick(tower)
    ids = _together(tower)
    ends = [tower.wait(task_id) for task_id in ids]
    assert [end["result"] for end in ends] == [0, 1, None, 3, 4, 5, None, 7]
    assert [end["error"] and end["error"]["code"] for end in ends] == [None, None, "odd", None, None, None, "result_not_json", None]
    assert (tower.traced(ids[4]) / "artifacts/four").read_text() == "4"
    for n, task_id in enumerate(ids):
        folder = tower.traced(task_id)
        assert f"number {n}\n" in (folder / "log.txt").read_text()


def test_a_cancelled_handler_in_python_is_told(tower: Tower, handle: Any) -> None:
    """By `cancelled`, and the end is `cancelled` whatever it returns."""
    started = threading.Event()

    def patient(payload: Any, task: TaskContext) -> str:
        started.set()
        wait_for("the cancel", lambda: task.cancelled)
        return "too late"

    handle(patient)
    task_id = tower.enqueue("echo")
    assert started.wait(10)
    answer = tower.client.post(f"/tasks/{task_id}/cancel", params={"by": "alice"})
    assert answer.json()["status"] == "running"
    task = tower.wait(task_id)
    assert (task["status"], task["result"], task["error"]["code"]) == ("cancelled", None, "cancelled")


def test_a_task_of_the_same_key_starts_when_the_first_has_ended(tower: Tower, handle: Any) -> None:
    """They never overlap."""
    spans: list[str] = []
    lock, pause = threading.Lock(), threading.Event()

    def span(payload: Any, task: TaskContext) -> None:
        with lock:
            spans.append("start")
        pause.wait(0.03)
        with lock:
            spans.append("end")

    handle(span)
    ids = [tower.enqueue("echo", concurrency_key="repo:acme") for _ in range(6)]
    for task_id in ids:
        tower.wait(task_id)
    assert spans == ["start", "end"] * 6

"""Retries, time limits and giving up, in a whole embedded tower."""

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
from tower.models import new_id
from tower.trace import rfc3339


class _Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


@pytest.fixture
def handle() -> Iterator[Any]:
    """Replace what `echo` does."""
    echo = registry.get("echo")

    def replace(function: Any, **defaults: Any) -> None:
        values = {"payload": _Anything, "queue": "default", "timeout_s": 60.0, "max_attempts": 1, "backoff_s": 0.01} | defaults
        registry._types["echo"] = HandlerType("echo", function, **values)

    yield replace
    registry._types["echo"] = echo


def ends(tower: Tower, task_id: str) -> list[str]:
    output = json.loads((tower.traced(task_id) / "output.json").read_text())
    return [attempt["end"] for attempt in output["attempts"]]


def fail(code: str, **more: Any) -> Any:
    def refuse(payload: Any, task: TaskContext) -> None:
        raise Fail(code, "no", **more)

    return refuse


def test_a_type_names_the_codes_that_are_not_tried_again(sqlite_tower: Tower, handle: Any) -> None:
    """Others are, up to max_attempts."""
    handle(fail("bad_branch"), max_attempts=3, no_retry=frozenset({"bad_branch"}))
    assert ends(sqlite_tower, sqlite_tower.enqueue("echo")) == ["failed"]
    handle(fail("flaky"), max_attempts=3, no_retry=frozenset({"bad_branch"}))
    assert ends(sqlite_tower, sqlite_tower.enqueue("echo")) == ["retry_scheduled", "retry_scheduled", "failed"]


def test_a_handler_may_say_that_trying_again_is_useless(sqlite_tower: Tower, handle: Any) -> None:
    """`Fail(..., may_retry=False)`; codes that another attempt would only repeat need not even say so."""
    handle(fail("flaky", may_retry=False), max_attempts=3)
    assert ends(sqlite_tower, sqlite_tower.enqueue("echo")) == ["failed"]
    task_id = sqlite_tower.enqueue("command", {"argv": ["no-such-program"]}, max_attempts=3)
    assert ends(sqlite_tower, task_id) == ["failed"]


def test_a_task_says_itself_how_often_it_may_fail(sqlite_tower: Tower, handle: Any) -> None:
    """Over its type's default."""
    handle(fail("flaky"), max_attempts=3)
    assert ends(sqlite_tower, sqlite_tower.enqueue("echo", max_attempts=2)) == ["retry_scheduled", "failed"]


def test_the_next_attempt_is_told_what_the_last_one_left(tower: Tower, handle: Any) -> None:
    """Its error, and the end of its log."""
    told: list[Any] = []

    def learn(payload: Any, task: TaskContext) -> str:
        told.append(task.previous)
        task.log(f"half of attempt {task.attempt}")
        if task.attempt == 1:
            raise Fail("flaky", "the branch moved", branch="main")
        return "done"

    handle(learn, max_attempts=2)
    tower.wait(tower.enqueue("echo"))
    assert told[0] is None
    assert told[1].error == {"code": "flaky", "message": "the branch moved", "branch": "main"}
    assert told[1].log_tail.endswith("[1] half of attempt 1\n")


@pytest.mark.slow
def test_a_program_is_told_what_its_last_attempt_left(sqlite_tower: Tower) -> None:
    """By its environment, so that a coding agent can go on from there."""
    script = (
        "import os,sys; print('so far'); print(os.environ.get('TOWER_PREVIOUS_LOG')); sys.exit('TOWER_PREVIOUS_ERROR' not in os.environ)"
    )
    task_id = sqlite_tower.enqueue("command", {"argv": [sys.executable, "-c", script]}, max_attempts=2)
    assert sqlite_tower.wait(task_id)["status"] == "succeeded"
    assert "[2] " in sqlite_tower.log(task_id).partition("so far")[2].partition("so far")[2]


@pytest.mark.slow
def test_an_attempt_that_falls_silent_is_timed_out(sqlite_tower: Tower, handle: Any) -> None:
    """Output keeps it alive, also output without a newline; then its whole tree ends."""
    script = "import sys,time\nfor _ in range(8): sys.stdout.write('.'); sys.stdout.flush(); time.sleep(0.2)\ntime.sleep(300)"
    task_id = sqlite_tower.enqueue("command", {"argv": [sys.executable, "-c", script]}, silence_s=1.2)
    task = sqlite_tower.wait(task_id)
    assert (task["status"], task["error"]["code"]) == ("timed_out", "silence")
    assert "........" in sqlite_tower.log(task_id)


def test_a_timeout_with_attempts_left_is_tried_again(sqlite_tower: Tower, handle: Any) -> None:
    """Like any other failure."""

    def slow_once(payload: Any, task: TaskContext) -> str:
        if task.attempt == 1:
            task.wait(60)
        return "done"

    handle(slow_once, max_attempts=2)
    task_id = sqlite_tower.enqueue("echo", timeout_s=0.2)
    assert ends(sqlite_tower, task_id) == ["retry_scheduled", "succeeded"]


def test_what_has_not_started_in_time_never_does(tower: Tower, handle: Any) -> None:
    """It is timed_out as `expired`, by the database's clock."""
    go_on = threading.Event()
    handle(lambda payload, task: go_on.wait(20))
    first = tower.enqueue("echo", concurrency_key="one")
    tower.wait(first, "running")
    created = tower.client.get(f"/tasks/{first}").json()["created_at"]
    late = tower.enqueue("echo", concurrency_key="one", expires_at=created)
    task = tower.wait(late)
    go_on.set()
    assert (task["status"], task["error"]["code"], task["attempt"]) == ("timed_out", "expired", 0)
    assert "expires_at" in task["error"]["advice"]
    assert tower.wait(first)["status"] == "succeeded"
    assert tower.traced(late)


def test_what_starts_in_time_may_take_as_long_as_it_needs(sqlite_tower: Tower, handle: Any) -> None:
    """`expires_at` is about starting."""
    import time

    handle(lambda payload, task: task.wait(1.0))
    task_id = sqlite_tower.enqueue("echo", expires_at=rfc3339(time.time() + 0.7))
    assert sqlite_tower.wait(task_id)["status"] == "succeeded"


def test_a_retry_that_would_come_too_late_is_given_up(sqlite_tower: Tower, handle: Any) -> None:
    """`expires_at` holds for every start."""
    import time

    def again(payload: Any, task: TaskContext) -> None:
        raise Retry(3600)

    handle(again, max_attempts=5)
    task_id = sqlite_tower.enqueue("echo", expires_at=rfc3339(time.time() + 1))
    task = sqlite_tower.wait(task_id)
    assert (task["status"], task["error"]["code"], task["attempt"]) == ("timed_out", "expired", 1)


@pytest.mark.slow
def test_a_handler_that_ignores_its_end_is_given_up(sqlite_tower: Tower, handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task ends without it and is not run again beside it; what it says later is not recorded, and the worker goes on."""
    monkeypatch.setattr("actors.attempt._OBEY_S", 0.5)
    go_on = threading.Event()

    def deaf(payload: Any, task: TaskContext) -> str:
        go_on.wait(60)
        return "too late"

    handle(deaf, max_attempts=3)
    task_id = sqlite_tower.enqueue("echo", timeout_s=0.2)
    task = sqlite_tower.wait(task_id)
    assert (task["status"], task["error"]["code"], task["attempt"]) == ("timed_out", "timeout", 1)
    go_on.set()
    handle(lambda payload, task: "fine")
    assert sqlite_tower.wait(sqlite_tower.enqueue("echo"))["result"] == "fine"
    assert sqlite_tower.task(task_id)["result"] is None
    assert "does not end" in sqlite_tower.log(task_id)


def test_a_child_joins_the_tree_of_its_parent(tower: Tower) -> None:
    """And the tree can be listed."""
    parent = tower.enqueue("echo")
    child = tower.enqueue("echo", parent_id=parent)
    grandchild = tower.enqueue("echo", parent_id=child)
    found = tower.client.get("/tasks", params={"correlation_id": parent}).json()["tasks"]
    assert {task["id"] for task in found} == {parent, child, grandchild}
    assert tower.task(grandchild)["parent_id"] == child


def test_a_parent_must_exist_and_not_be_cancelled(tower: Tower) -> None:
    """Else the tree would grow while somebody ends it."""
    stranger = new_id()
    refused = tower.client.post("/tasks/enqueue", json={"type": "echo", "parent_id": stranger})
    assert (refused.status_code, refused.json()["code"], refused.json()["field"]) == (422, "unknown_parent", "parent_id")
    parent = tower.enqueue("sleep", {"seconds": 60})
    tower.client.post(f"/tasks/{parent}/cancel")
    refused = tower.client.post("/tasks/enqueue", json={"type": "echo", "parent_id": parent})
    assert (refused.status_code, refused.json()["code"]) == (409, "parent_cancelled")
    wait_for("its end", lambda: tower.task(parent)["status"] == "cancelled")

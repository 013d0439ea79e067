"""The tower as services: server and `dramatiq tower.actors` on a real Postgres and a real Redis, and each of them killed once."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.acceptance.stack import PROGRAMS, Stack
from tests.processes import marked
from tests.servers import Postgres, Redis, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def servers() -> Iterator[tuple[Postgres, Redis]]:
    """A durable Postgres and a Redis that the test may break."""
    postgres, messages = Postgres(fsync=True).start(), Redis().start()
    yield postgres, messages
    messages.close()
    postgres.close()


@pytest.fixture
def stack(tmp_path: Path, servers: tuple[Postgres, Redis]) -> Iterator[Stack]:
    postgres, messages = servers
    made = Stack(tmp_path, DATABASE_URL=postgres.url(), REDIS_URL=messages.url())
    yield made
    made.close()


def final_events(stack: Stack, task_id: str) -> list[str]:
    return [kind for kind in stack.kinds(task_id) if kind in ("succeeded", "failed", "cancelled", "timed_out")]


def test_a_task_travels_through_all_of_them(stack: Stack) -> None:
    """POST, row, orchestrator actor, handler actor, trace actor, folder."""
    stack.server()
    stack.worker()
    task_id = stack.enqueue("echo", {"hello": "tower"})
    assert stack.wait(task_id)["result"] == {"hello": "tower"}
    assert json.loads((stack.folder / "logs" / task_id / "output.json").read_text())["status"] == "succeeded"
    ready = stack.client.get("/health/ready").json()
    assert (ready["status"], ready["broker"], ready["slots"]) == ("ready", "ok", 4)


@pytest.mark.parametrize("nice", [None, 0, 19])
def test_a_worker_stands_back_for_the_server(stack: Stack, nice: int | None) -> None:
    """So tasks are taken in, and pages come, while others compute."""
    if nice is not None:
        stack.environment["TOWER_WORKER_NICE"] = str(nice)
    server = psutil.Process(stack.server().popen.pid)
    worker = psutil.Process(stack.worker().popen.pid)
    task_id = stack.enqueue("command", {"argv": ["nice"]})
    assert stack.wait(task_id)["status"] == "succeeded"
    expected = min(19, int(server.nice() or 0) + (5 if nice is None else nice))
    assert f"] {expected}\n" in (stack.folder / "logs" / task_id / "log.txt").read_text()
    assert expected in [process.nice() for process in worker.children(recursive=True)]


def test_a_worker_that_is_killed_loses_nothing(stack: Stack) -> None:
    """Its child is ended, its task runs again on another worker long before a lease would have run out."""
    stack.server()
    first = stack.worker()
    script = f"echo $$ >> {stack.folder}/runs; test $(wc -l < {stack.folder}/runs) -gt 1 || sleep 300"
    task_id = stack.enqueue("command", {"argv": ["sh", "-c", script]})
    runs = stack.folder / "runs"
    wait_for("the first run", lambda: runs.exists() and runs.read_text().count("\n") == 1)
    first.end(signal.SIGKILL, group=True)
    stack.worker()
    task = stack.wait(task_id)
    assert (task["status"], task["attempt"], task["losses"]) == ("succeeded", 2, 1)
    assert marked(task_id) == []
    assert final_events(stack, task_id) == ["succeeded"]


def test_a_worker_that_is_asked_to_stop_hands_its_tasks_back(stack: Stack) -> None:
    """After its grace, without counting the attempt, with exit code 0 and no traceback."""
    stack.server()
    worker = stack.worker()
    task_id, once = stack.enqueue("sleep", {"seconds": 300}), stack.enqueue("sleep", {"seconds": 300}, max_attempts=1)
    stack.wait(task_id, lambda task: task["status"] == "running")
    stack.wait(once, lambda task: task["status"] == "running")
    assert worker.end(signal.SIGTERM) == 0
    assert "Traceback" not in worker.log
    assert stack.task(task_id)["status"] == "queued"
    assert stack.task(task_id)["losses"] == 0
    assert stack.task(task_id)["wait_reason"] == "no_worker"
    assert stack.task(once)["error"]["code"] == "worker_lost"


def test_workers_stop_when_the_process_that_started_them_is_killed(stack: Stack) -> None:
    """They hand their tasks back, so that its next life finds no workers beside its own."""
    stack.server()
    master = stack.worker()
    task_id = stack.enqueue("sleep", {"seconds": 300})
    stack.wait(task_id, lambda task: task["status"] == "running")
    worker = psutil.Process(stack.client.get("/workers").json()["workers"][0]["pid"])
    master.end(signal.SIGKILL)
    worker.wait(20)
    task = stack.task(task_id)
    assert (task["status"], task["losses"]) == ("queued", 0)
    assert stack.client.get("/workers").json()["workers"] == []


def test_without_redis_tasks_are_accepted_run_and_traced(stack: Stack, servers: tuple[Postgres, Redis]) -> None:
    """A worker with free slots asks the database itself and writes the traces itself, and readiness says what is wrong."""
    _, messages = servers
    stack.server()
    stack.worker()
    messages.stop(signal.SIGKILL)
    ids = [stack.enqueue("echo", {"n": n}) for n in range(20)]
    for task_id in ids:
        assert stack.wait(task_id)["attempt"] == 1
    ready = stack.client.get("/health/ready")
    assert (ready.status_code, ready.json()["status"], ready.json()["broker"]) == (200, "degraded", "down")
    messages.start()
    wait_for("the broker to be noticed", lambda: stack.client.get("/health/ready").json()["status"] == "ready")
    assert stack.wait(stack.enqueue("echo", {}))["status"] == "succeeded"


def test_messages_that_vanish_are_sent_again(stack: Stack, servers: tuple[Postgres, Redis]) -> None:
    """FLUSHALL, however often."""
    client = redis.Redis.from_url(servers[1].url())
    stack.server()
    stack.worker()
    ids = []
    for n in range(30):
        ids.append(stack.enqueue("echo", {"n": n}))
        client.flushall()
    for task_id in ids:
        stack.wait(task_id)
        assert final_events(stack, task_id) == ["succeeded"]
    client.close()


def test_a_database_that_is_away_for_a_moment_loses_nothing(stack: Stack, servers: tuple[Postgres, Redis]) -> None:
    """What was accepted is kept, what runs ends, and readiness says what is wrong meanwhile."""
    postgres, _ = servers
    stack.server()
    stack.worker()
    ids = [stack.enqueue("sleep", {"seconds": 2}) for _ in range(6)]
    stack.wait(ids[0], lambda task: task["status"] == "running")
    postgres.stop(signal.SIGQUIT)
    ready = stack.client.get("/health/ready")
    assert (ready.status_code, ready.json()["database"]) == (503, "down")
    refused = stack.client.post("/tasks/enqueue", json={"type": "echo"})
    assert (refused.status_code, refused.headers["retry-after"], refused.json()["code"]) == (503, "2", "database_unavailable")
    postgres.start()
    for task_id in ids:
        assert stack.wait(task_id)["status"] == "succeeded"
        assert final_events(stack, task_id) == ["succeeded"]


def test_a_server_that_is_killed_loses_nothing(stack: Stack) -> None:
    """Workers go on without it; its next life serves what happened meanwhile."""
    server = stack.server()
    stack.worker()
    ids = [stack.enqueue("sleep", {"seconds": 0.5}) for _ in range(10)]
    server.end(signal.SIGKILL)
    stack.server()
    assert {stack.wait(task_id)["status"] for task_id in ids} == {"succeeded"}


def test_a_worker_without_a_broker_says_what_it_needs(tmp_path: Path) -> None:
    """REDIS_URL, in a sentence."""
    stack = Stack(tmp_path)
    worker = stack._start("worker", [str(PROGRAMS / "dramatiq"), "tower.actors", "--processes", "1"])
    worker.popen.wait(30)
    assert "needs REDIS_URL" in worker.log
    assert "Traceback" not in worker.log
    stack.close()

"""What breaks under a running tower: what was accepted is kept, what cannot be is refused with 503, and it recovers by itself."""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import redis

from tests.acceptance.stack import Stack
from tests.servers import Postgres, Redis, wait_for

pytestmark = pytest.mark.slow


def refused(stack: Stack) -> dict[str, Any]:
    """Return how a task is refused, once it is."""
    answers: list[Any] = []

    def ask() -> bool:
        answers.append(stack.client.post("/tasks/enqueue", json={"type": "echo", "payload": {"large": "x" * 100_000}}))
        return bool(answers[-1].status_code == 503)

    wait_for("a refusal", ask)
    assert {answer.status_code for answer in answers} <= {202, 503}
    assert answers[-1].headers["retry-after"] == "2"
    assert answers[-1].json()["code"] == "database_unavailable"
    return dict(answers[-1].json())


def ready(stack: Stack) -> dict[str, Any]:
    return dict(stack.client.get("/health/ready").json())


def is_ready(stack: Stack) -> bool:
    return bool(ready(stack)["status"] == "ready")


def told(stack: Stack, words: str) -> int:
    """Return how many lines of the process logs hold these words."""
    return sum(line.count(words) for process in stack.processes for line in process.log.splitlines())


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A small file system of the test's own."""
    place = tmp_path / "volume"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tower-test", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield made
    made.close()


def on_volume(tmp_path: Path, volume: Path) -> Stack:
    return Stack(tmp_path, DATABASE_URL=f"sqlite:///{volume / 'tower.db'}", TRACE_DIR=str(tmp_path / "logs"))


@needs_root
def test_a_full_disk_under_sqlite_refuses_tasks_and_keeps_those_it_has(tmp_path: Path, volume: Path) -> None:
    """A line says so; what little still fits meanwhile is taken."""
    stack = on_volume(tmp_path, volume)
    with contextlib.closing(stack):
        stack.server()
        kept = [stack.enqueue("sleep", {"seconds": 1}) for _ in range(3)]
        filler = volume / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        assert "disk of the database is full" in refused(stack)["detail"]
        wait_for("the problem to be told", lambda: "disk of the database is full" in " ".join(ready(stack)["problems"]))
        filler.unlink()
        for task_id in kept:
            assert stack.wait(task_id)["status"] == "succeeded"
        wait_for("readiness", lambda: is_ready(stack))
        assert stack.wait(stack.enqueue("echo", {}))["status"] == "succeeded"
        assert told(stack, "disk of the database is full") >= 1
        assert told(stack, "Traceback") == 0


@needs_root
def test_a_sqlite_file_that_cannot_be_written_refuses_tasks_until_it_can(tmp_path: Path, volume: Path) -> None:
    """Nothing has to be started again."""
    stack = on_volume(tmp_path, volume)
    with contextlib.closing(stack):
        stack.server()
        kept = stack.enqueue("echo", {})
        stack.wait(kept)
        process = stack.processes[0].popen
        with sqlite3.connect(volume / "tower.db", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert "holds a lock" in refused(stack)["detail"]
            other.execute("ROLLBACK")
        wait_for("readiness", lambda: is_ready(stack))
        assert stack.wait(stack.enqueue("echo", {}))["status"] == "succeeded"
        assert process.poll() is None
        assert told(stack, "Traceback") == 0


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_sqlite_file_that_is_taken_away_refuses_tasks(embedded: Stack, how: str) -> None:
    """They would be written into nowhere; when the file is put back, the tower goes on with it."""
    embedded.server()
    first = embedded.enqueue("echo", {})
    embedded.wait(first)
    file, aside = embedded.folder / "devops_control_tower.db", embedded.folder / "aside.db"
    file.rename(aside)
    if how == "replaced":
        shutil.copy(aside, file)
    assert ("is gone" if how == "deleted" else "was replaced") in refused(embedded)["detail"]
    assert ready(embedded)["database"] == "down"
    file.unlink(missing_ok=True)
    aside.rename(file)
    wait_for("readiness", lambda: is_ready(embedded))
    assert embedded.wait(embedded.enqueue("echo", {}))["status"] == "succeeded"
    assert embedded.task(first)["status"] == "succeeded"
    assert told(embedded, "Traceback") == 0


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Postgres, Redis]]:
    """A durable Postgres and a Redis that each test leaves as it found them."""
    postgres, messages = Postgres(fsync=True).start(), Redis().start()
    yield postgres, messages
    messages.close()
    postgres.close()


@pytest.fixture
def stack(tmp_path: Path, servers: tuple[Postgres, Redis]) -> Iterator[Stack]:
    postgres, messages = servers
    made = Stack(tmp_path, DATABASE_URL=postgres.url(), REDIS_URL=messages.url())
    made.server()
    made.worker()
    wait_for("readiness", lambda: is_ready(made))
    yield made
    made.close()


def finishes(stack: Stack, ids: list[str]) -> None:
    for task_id in ids:
        assert stack.wait(task_id)["status"] == "succeeded"
        assert stack.kinds(task_id).count("succeeded") == 1
    assert told(stack, "Traceback") == 0


BROKEN = {
    "full": (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"]),
    "without its replicas": (["CONFIG", "SET", "min-replicas-to-write", "3"], ["CONFIG", "SET", "min-replicas-to-write", "0"]),
    "a replica of what is gone": (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"]),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_redis_that_takes_nothing_delays_tasks_and_loses_none(stack: Stack, servers: tuple[Postgres, Redis], how: str) -> None:
    """Readiness and one line per process say so when it begins, one when it is over; the work goes on by way of the database."""
    broken, well = BROKEN[how]
    with contextlib.closing(redis.Redis.from_url(servers[1].url())) as client:
        client.execute_command(*broken)
        ids = [stack.enqueue("echo", {"n": n}) for n in range(5)]
        wait_for("the problem to be told", lambda: ready(stack)["broker"] == "down")
        assert "tasks" in " ".join(ready(stack)["problems"]).lower()
        finishes(stack, ids)
        client.execute_command(*well)
        wait_for("readiness", lambda: is_ready(stack))
        finishes(stack, [stack.enqueue("echo", {})])
    begun = [process.log.count("the broker takes no messages") for process in stack.processes]
    assert max(begun) == 1
    wait_for("the end to be told", lambda: [process.log.count("takes messages again") for process in stack.processes] == begun)


def test_a_redis_that_hangs_holds_up_no_request_for_long(stack: Stack, servers: tuple[Postgres, Redis]) -> None:
    """Its tasks are accepted and run."""
    servers[1].send(signal.SIGSTOP)
    try:
        waits, ids = [], []
        for n in range(5):
            began = time.monotonic()
            ids.append(stack.enqueue("echo", {"n": n}))
            waits.append(time.monotonic() - began)
        finishes(stack, ids)
    finally:
        servers[1].send(signal.SIGCONT)
    assert max(waits) < 5  # a hang would be for ever; how fast it is stands in docs/degraded.md
    wait_for("readiness", lambda: is_ready(stack))


def test_a_redis_that_was_wiped_is_told_everything_again(stack: Stack, servers: tuple[Postgres, Redis]) -> None:
    """By the next sweep, not by and by."""
    with contextlib.closing(redis.Redis.from_url(servers[1].url())) as client:
        ids = [stack.enqueue("sleep", {"seconds": 0.3}) for _ in range(12)]
        client.flushall()
        finishes(stack, ids)
    wait_for("the line", lambda: told(stack, "the broker has forgotten its messages") >= 1)


def test_connections_that_are_cut_lose_nothing(stack: Stack, servers: tuple[Postgres, Redis]) -> None:
    """All of them, again and again, while tasks run and come in."""
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'devops-control-tower'"
    ids = []
    for n in range(5):
        ids += [
            stack.enqueue(
                "sleep",
                {
                    "seconds": 0.3,
                },
            )
            for _ in range(3)
        ]
        servers[0].execute(cut)
        ids.append(stack.enqueue("echo", {"n": n}))
    finishes(stack, ids)


def test_a_table_that_somebody_locks_delays_what_needs_it(stack: Stack, servers: tuple[Postgres, Redis]) -> None:
    """Longer than a request waits: 503, and no task lost."""
    running = stack.enqueue("sleep", {"seconds": 1})
    stack.wait(running, lambda task: task["status"] == "running")
    with contextlib.closing(psycopg2.connect(servers[0].url())) as other:
        other.cursor().execute("LOCK TABLE task IN SHARE MODE")
        assert "holds a lock" in refused(stack)["detail"]
        other.rollback()
    wait_for("readiness", lambda: is_ready(stack))
    finishes(stack, [running, stack.enqueue("echo", {})])


def test_a_database_that_is_away_for_longer_than_a_lease_loses_nothing(stack: Stack, servers: tuple[Postgres, Redis]) -> None:
    """What ran is ended and runs again; the outage counts neither as failure nor as lost worker."""
    ids = [stack.enqueue("sleep", {"seconds": 2}) for _ in range(3)]
    stack.wait(ids[0], lambda task: task["status"] == "running")
    servers[0].stop(signal.SIGQUIT)
    refused(stack)
    began = time.monotonic()
    wait_for("more than a lease", lambda: time.monotonic() - began > 4)
    servers[0].start()
    finishes(stack, ids)
    wait_for("readiness", lambda: is_ready(stack))
    assert told(stack, "Nothing accepted is lost") == len(stack.processes)
    wait_for("the end to be told", lambda: told(stack, "the database answers again") == len(stack.processes))

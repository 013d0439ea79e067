"""The fault matrix, what a tower stands on: Redis, Postgres, SQLite's file, its disk, the clock."""

import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx2
import psycopg2
import pytest
import redis
from dramatiq import Message
from dramatiq.brokers.redis import RedisBroker

from tests.acceptance.stack import QUICK
from tests.chaos.checker import rows
from tests.chaos.lab import LONG_S, Lab, lab
from tests.chaos.lives import SERVER
from tests.servers import wait_for

pytestmark = pytest.mark.slow

LEASE_S = float(QUICK["TOWER_LEASE_S"])


def starts(bench: Lab, task_id: str) -> int:
    return len(rows(bench.url, f"SELECT 1 FROM task_event WHERE task_id = '{task_id}' AND kind = 'started'"))


def ended_well(bench: Lab, *ids: str) -> None:
    """Wait for the end of everything; all of these have succeeded, and all promises were kept."""
    bench.settle()
    bench.check()
    assert {bench.task(task_id)["status"] for task_id in ids} == {"succeeded"}


def test_a_redis_that_restarts_empty_loses_nothing(services: Lab) -> None:
    """What runs ends, what waits starts, and tasks are taken in meanwhile."""
    assert services.redis
    services.start_all()
    running = [services.give("sleep", {"seconds": 2}) for _ in range(2)]
    services.wait_status(running[0], "running")
    waiting = [services.give("echo", {"n": n}) for n in range(5)]
    services.redis.stop(signal.SIGKILL)
    meanwhile = [services.give("echo", {"n": n}) for n in range(5)]
    services.redis.start()
    ended_well(services, *running, *waiting, *meanwhile)
    assert {services.task(task_id)["attempt"] for task_id in running} == {1}


def test_nudges_that_come_twice_or_late_or_in_any_order_change_nothing(services: Lab) -> None:
    """For a task that waits, runs and has ended: it runs once, and its row is not touched."""
    assert services.redis
    services.start_all()
    task_id = services.give("sleep", {"seconds": 1})
    services.wait_status(task_id, "running")
    nudge(services, task_id, times=20)
    services.wait_status(task_id, "succeeded")
    services.settle()
    before = services.task(task_id)
    nudge(services, task_id, times=20)
    ended_well(services, services.give("echo"))  # came after them
    assert (services.task(task_id), starts(services, task_id)) == (before, 1)


def nudge(services: Lab, task_id: str, times: int) -> None:
    assert services.redis
    with redis.Redis.from_url(services.redis.url()) as client:
        broker = RedisBroker(client=client, namespace="tower", middleware=[])
        for _ in range(times):
            for actor, queue in (("handler.sleep", "default"), ("tower.trace", "trace"), ("tower.orchestrate", "orchestrator")):
                broker.enqueue(Message(queue_name=queue, actor_name=actor, args=(task_id,), kwargs={}, options={}))


def test_a_postgres_that_stops_under_requests_loses_none_it_answered(services: Lab) -> None:
    """Who got no answer, or 503, asks again with the same key and has one task; nobody's lease is taken for the outage."""
    assert services.postgres
    services.start_all()
    running = services.give("sleep", {"seconds": 3})
    services.wait_status(running, "running")
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(services.give, "echo", {"n": n}, idempotency_key=f"outage-{n}") for n in range(60)]
        services.postgres.stop(signal.SIGQUIT)
        time.sleep(1)  # shorter than a lease: that is the fault
        services.postgres.start()
        ids = [made.result() for made in asked]
    ended_well(services, running, *ids)
    assert len(set(ids)) == 60
    assert rows(services.url, "SELECT COUNT(*) AS n FROM task WHERE idempotency_key LIKE 'outage-%'")[0]["n"] == 60
    assert services.task(running)["losses"] == 0


def test_a_postgres_that_is_away_for_longer_than_leases_last_costs_no_task_a_loss(services: Lab) -> None:
    """What ended meanwhile is recorded as it was; what outlasts its lease is ended, and runs again as soon as Postgres is back."""
    assert services.postgres
    services.start_all()
    short = [services.give("sleep", {"seconds": 1.5}, max_attempts=attempts) for attempts in (1, 3)]
    long = services.give("sleep", {"seconds": 5})
    for task_id in (*short, long):
        services.wait_status(task_id, "running")
    services.postgres.stop(signal.SIGQUIT)
    time.sleep(4 * LEASE_S)  # longer than leases are trusted, and than an end is tried to be written after that: that is the fault
    services.postgres.start()
    ended_well(services, *short, long)
    assert [(services.task(task_id)["attempt"], services.task(task_id)["losses"]) for task_id in (*short, long)] == [(1, 0), (1, 0), (2, 0)]
    kinds = [row["kind"] for row in rows(services.url, f"SELECT kind FROM task_event WHERE task_id = '{long}' ORDER BY seq")]
    assert kinds == ["queued", "dispatched", "started", "released", "dispatched", "started", "succeeded"]


def test_a_row_that_somebody_locks_waits_and_nothing_else_does(services: Lab) -> None:
    """A person with an open transaction in psql: the task ends when the lock is gone."""
    services.start_all()
    task_id = services.give("sleep", {"seconds": 0.5})
    services.wait_status(task_id, "running")
    with closing(psycopg2.connect(services.url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id FROM task WHERE id = %s FOR UPDATE", (task_id,))
        other = services.give("echo")
        services.wait_status(other, "succeeded")
        connection.rollback()
    ended_well(services, task_id, other)


@pytest.mark.parametrize("step", [3600, -3600])
def test_a_clock_that_steps_takes_no_task_from_its_worker(bench: Lab, step: int) -> None:
    """An hour forth or back while tasks run: leases count beats, not time."""
    bench.start_all()
    ids = [bench.give("sleep", {"seconds": 2}) for _ in range(2)]
    for task_id in ids:
        bench.wait_status(task_id, "running")
    bench.step_clock(step)
    try:
        for task_id in ids:
            bench.wait_status(task_id, "succeeded")
        fresh = bench.give("echo")
        bench.wait_status(fresh, "succeeded")
    finally:
        bench.step_clock(0)
    bench.step_clock(abs(step))  # whatever was put off by the step is due now
    ended_well(bench, *ids, fresh)
    bench.end_lives()
    bench.step_clock(0)
    assert {(bench.task(task_id)["attempt"], bench.task(task_id)["losses"]) for task_id in ids} == {(1, 0)}


def test_a_start_time_is_one_of_the_databases_clock(bench: Lab) -> None:
    """A task for tomorrow starts when that clock says tomorrow."""
    bench.start_all()
    tomorrow = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 86_400))
    task_id = bench.give("echo", not_before=tomorrow)
    bench.wait_status(bench.give("echo"), "succeeded")
    assert bench.task(task_id)["status"] == "queued"
    bench.step_clock(86_500)
    ended_well(bench, task_id)
    bench.end_lives()
    bench.step_clock(0)


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Lab]:
    with lab(tmp_path, "sqlite") as made:
        yield made


def test_a_sqlite_file_that_somebody_locks_is_waited_for(embedded: Lab) -> None:
    """Another program writes for a while: requests wait or are told to come again, and the task that runs keeps its lease."""
    embedded.start_all()
    running = embedded.give("sleep", {"seconds": 1})
    embedded.wait_status(running, "running")
    with closing(sqlite3.connect(embedded.folder / "tower.db", isolation_level=None, timeout=20)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        asked: list[str] = []
        asking = threading.Thread(target=lambda: asked.append(embedded.give("echo")))
        asking.start()
        time.sleep(1.5)  # shorter than a lease: that is the fault
        assert asked == []
        connection.execute("ROLLBACK")
        asking.join()
    ended_well(embedded, running, *asked)
    assert (embedded.task(running)["attempt"], embedded.task(running)["losses"]) == (1, 0)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tower-test", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@needs_root
def test_a_database_on_a_disk_that_became_read_only_takes_nothing_and_says_so(small_disk: Path, tmp_path: Path) -> None:
    """Until it can be written to again."""
    with lab(tmp_path, "sqlite", database=small_disk / "tower.db") as tower:
        tower.start_all()
        before = tower.give("echo")
        tower.settle()
        tower.end_lives()
        for mode in ("ro", "rw"):
            subprocess.run(["mount", "-o", f"remount,{mode}", str(small_disk)], check=True)
            if mode == "ro":
                server = tower.start(SERVER)
                wait_for("an answer", lambda: health(tower) == 503, LONG_S)
                assert tower.client.post("/tasks/enqueue", json={"type": "echo"}).status_code == 503
        ended_well(tower, before, tower.give("echo"))
        assert server.alive


def health(tower: Lab) -> int:
    try:
        return tower.client.get("/health/ready").status_code
    except httpx2.TransportError:
        return 0

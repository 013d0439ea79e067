"""No child process outlives its worker or its lease: real processes, killed and frozen at the worst moments."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.stack import ROOT, Stack
from tests.processes import guardian_of, marked
from tests.servers import Postgres, Redis, wait_for
from tower.models import new_id

pytestmark = pytest.mark.slow

#: Forks, leaves the session, and leaves its parent; `ran` tells that it ran, `again` lets the next attempt end at once.
FAMILY = "test -e again && exit; touch ran; sleep 300 & setsid sleep 300 & (setsid sleep 300 &); echo up; sleep 300; true"
SIZE = 5


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """An embedded tower: nobody else on this machine could end what its process leaves."""
    made = Stack(tmp_path)
    yield made
    made.close()


def start_family(stack: Stack) -> str:
    return stack.enqueue("command", {"argv": ["sh", "-c", FAMILY], "cwd": str(stack.folder)})


def is_succeeded_by_next_life(stack: Stack, task_id: str) -> bool:
    stack.environment.pop("TOWER_FAULT", None)
    (stack.folder / "again").touch()
    stack.server()
    task = stack.wait(task_id)
    return (task["status"], task["attempt"], task["losses"]) == ("succeeded", 2, 1)


@pytest.mark.parametrize(
    ("fault", "ran"),
    [
        ("spawn.before:1:kill", False),
        ("spawn.gate:1:kill", False),
        ("spawn.after_gate:1:kill", None),
        ("run.mid:1:sleep=1,run.mid:1:kill", True),
        ("run.child_done:1:kill", True),
    ],
)
def test_a_worker_that_is_killed_leaves_no_process(stack: Stack, fault: str, ran: bool | None) -> None:
    """At any moment; and before the guardian knows of a command, it does not run."""
    stack.environment["TOWER_FAULT"] = fault
    server = stack.server()
    task_id = start_family(stack)
    if "child_done" in fault:
        wait_for("the family", lambda: len(marked(task_id)) == SIZE)
        for pid in marked(task_id):
            os.kill(pid, signal.SIGKILL)
    server.popen.wait(30)
    wait_for("the end of all", lambda: marked(task_id) == [])
    assert ran is None or (stack.folder / "ran").exists() == ran
    assert is_succeeded_by_next_life(stack, task_id)


def test_a_guardian_that_is_killed_is_replaced(stack: Stack) -> None:
    """Its children go on, and do not outlive the worker either."""
    server = stack.server()
    task_id = start_family(stack)
    wait_for("the family", lambda: len(marked(task_id)) == SIZE)
    first = guardian_of(server.popen.pid)
    first.kill()
    guardian_of(server.popen.pid, besides=first)
    assert (len(marked(task_id)), stack.task(task_id)["status"]) == (SIZE, "running")
    server.end(signal.SIGKILL)
    wait_for("the end of all", lambda: marked(task_id) == [])


def test_what_survives_both_is_ended_by_the_next_life(stack: Stack) -> None:
    """Before its task runs again."""
    server = stack.server()
    task_id = start_family(stack)
    wait_for("the family", lambda: len(marked(task_id)) == SIZE)
    server.popen.send_signal(signal.SIGSTOP)  # or it would start another guardian
    guardian_of(server.popen.pid).kill()
    server.end(signal.SIGKILL)
    assert len(marked(task_id)) == SIZE
    assert is_succeeded_by_next_life(stack, task_id)
    assert marked(task_id) == []


def test_a_frozen_worker_is_fenced_by_its_guardian(stack: Stack) -> None:
    """Its command ends with the lease; when it wakes up, it hands the task back, since that end meant nothing."""
    server = stack.server()
    task_id = start_family(stack)
    wait_for("the family", lambda: len(marked(task_id)) == SIZE)
    server.popen.send_signal(signal.SIGSTOP)
    wait_for("the end of all", lambda: marked(task_id) == [])
    (stack.folder / "again").touch()
    server.popen.send_signal(signal.SIGCONT)
    task = stack.wait(task_id)
    assert (task["status"], task["attempt"], task["losses"]) == ("succeeded", 2, 0)


def test_twenty_kills_at_random_moments_leave_no_process(tmp_path: Path) -> None:
    """The worker starts one command after the other, and is killed at any moment of that."""
    chance, ids = random.Random(3), [new_id() for _ in range(20)]
    for task_id in ids:
        program = [sys.executable, "-m", "tests.acceptance.doomed", task_id]
        with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as doomed:
            assert doomed.stdout
            doomed.stdout.readline()
            try:
                doomed.wait(chance.uniform(0, 0.2))
            except subprocess.TimeoutExpired:
                doomed.kill()
        assert doomed.returncode == -signal.SIGKILL
    wait_for("the end of all", lambda: not any(marked(task_id) for task_id in ids))


#: Tells where and when it runs.
JOURNAL = 'import sys, time\nwhile True:\n    print(sys.argv[1], time.monotonic(), file=open("journal", "a"))\n    time.sleep(0.02)\n'


@pytest.fixture
def servers() -> Iterator[tuple[Postgres, Redis]]:
    postgres, messages = Postgres(fsync=True).start(), Redis().start()
    yield postgres, messages
    messages.close()
    postgres.close()


@pytest.fixture
def services(tmp_path: Path, servers: tuple[Postgres, Redis]) -> Iterator[Stack]:
    postgres, messages = servers
    made = Stack(tmp_path, DATABASE_URL=postgres.url(), REDIS_URL=messages.url())
    yield made
    made.close()


def start_journal(stack: Stack) -> str:
    script = 'exec "$0" -c "$1" $TOWER_ATTEMPT'
    return stack.enqueue("command", {"argv": ["sh", "-c", script, sys.executable, JOURNAL], "cwd": str(stack.folder)})


def journal(stack: Stack) -> tuple[list[float], list[float]]:
    """Return the moments at which the first attempt ran, and those of all later ones."""
    path = stack.folder / "journal"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    moments = [(line[0], float(line[1])) for line in lines if len(line) == 2]
    return [at for attempt, at in moments if attempt == "1"], [at for attempt, at in moments if attempt != "1"]


def runs(stack: Stack, *, again: bool = False) -> None:
    """Wait until the first attempt runs, or a later one."""
    wait_for("an attempt", lambda: bool(journal(stack)[again]), 60)


def overlap(stack: Stack) -> bool:
    first, later = journal(stack)
    return max(first) >= min(later)


def test_attempts_do_not_overlap_when_a_worker_freezes(services: Stack) -> None:
    """Another one runs the task meanwhile; what the first one says when it wakes up is not recorded."""
    services.server()
    first = services.worker()
    task_id = start_journal(services)
    runs(services)
    pid = services.client.get("/workers").json()["workers"][0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    services.worker()
    runs(services, again=True)
    os.kill(pid, signal.SIGCONT)
    wait_for("the end of the first", lambda: "what the attempt did is not recorded" in first.log)
    assert not overlap(services)
    task = services.task(task_id)
    assert (task["status"], task["attempt"], task["losses"]) == ("running", 2, 1)
    services.client.post(f"/tasks/{task_id}/cancel")
    assert services.wait(task_id)["status"] == "cancelled"
    assert [kind for kind in services.kinds(task_id) if kind in ("succeeded", "failed", "cancelled")] == ["cancelled"]


def test_a_worker_without_a_database_ends_its_own_work_in_time(services: Stack, servers: tuple[Postgres, Redis]) -> None:
    """Nobody could tell it that its lease is over; its task goes back to the queue when the database is there again."""
    services.server()
    services.worker()
    task_id = start_journal(services)
    runs(services)
    servers[0].stop(signal.SIGQUIT)
    wait_for("its end", lambda: marked(task_id) == [])
    servers[0].start()
    runs(services, again=True)
    assert not overlap(services)
    services.client.post(f"/tasks/{task_id}/cancel")
    assert services.wait(task_id)["status"] == "cancelled"


def test_a_killed_worker_is_noticed_long_before_the_next_pass(services: Stack) -> None:
    """By those of its machine."""
    services.environment |= {"TOWER_SWEEP_S": "3600", "TOWER_LEASE_S": "3600"}
    services.server()
    services.worker()
    task_id = start_journal(services)
    runs(services)
    os.kill(services.client.get("/workers").json()["workers"][0]["pid"], signal.SIGKILL)
    task = services.wait(task_id, lambda task: task["status"] == "queued" and task["wait_reason"] == "no_worker")
    assert (task["losses"], marked(task_id)) == (1, [])

"""The fault matrix, processes: servers and workers that die, freeze or choke at one moment, on both databases."""

import os
import resource
import signal
import time

import psutil
import pytest

from tests.chaos.checker import read_journal, rows
from tests.chaos.lab import LONG_S, Lab
from tests.chaos.lives import SERVER, Life
from tests.chaos.stage import MARK
from tests.servers import free_port, wait_for
from tower.models import new_id
from tower.terms import FINAL

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("point", "is_kept"), [("front.before_insert", False), ("front.after_commit", True), ("front.after_send", True)])
def test_a_server_killed_while_it_accepts_keeps_what_it_committed(bench: Lab, point: str, is_kept: bool) -> None:
    """The client has no answer; it asks again with its key and has one task, which needs no message to start."""
    server, key = bench.start_all(SERVER, f"{point}:1:kill")[SERVER], new_id()
    assert bench.ask("echo", victim=server, idempotency_key=key) is None
    kept = rows(bench.url, f"SELECT id FROM task WHERE idempotency_key = '{key}'")
    assert len(kept) == int(is_kept)
    bench.start(SERVER)
    if is_kept:  # before anybody asks again
        bench.wait_status(kept[0]["id"], "succeeded")
    answer = bench.give("echo", idempotency_key=key)
    assert answer == (kept[0]["id"] if is_kept else answer)
    bench.settle()
    bench.check()
    assert len(rows(bench.url, f"SELECT id FROM task WHERE idempotency_key = '{key}'")) == 1


@pytest.mark.parametrize(
    ("point", "attempts", "runs"),
    [("claim.before", 1, 1), ("claim.after_commit", 2, 1), ("finish.before", 2, 2), ("finish.after_commit", 1, 1)],
)
def test_a_worker_killed_at_one_moment_leaves_a_task_that_ends_once(bench: Lab, point: str, attempts: int, runs: int) -> None:
    """It runs again unless its end was committed, and its command has run only where it could begin."""
    victim = bench.programs[-1]
    life = bench.start_all(victim, f"{point}:1:kill")[victim]
    task_id = bench.give_to(life, "command", max_attempts=3)
    assert life.wait(LONG_S) == -signal.SIGKILL
    bench.start(victim)
    bench.settle()
    bench.check()
    task = bench.task(task_id)
    assert (task["status"], task["attempt"], task["losses"]) == ("succeeded", attempts, attempts - 1)
    assert sum(line["what"] == "start" for line in read_journal(bench.journal, task_id)) == runs


def test_a_task_that_may_run_once_is_not_run_again(bench: Lab) -> None:
    """Killed with its worker it has failed, although it may have done nothing."""
    victim = bench.programs[-1]
    life = bench.start_all(victim, "claim.after_commit:1:kill")[victim]
    task_id = bench.give_to(life, "command", max_attempts=1)
    life.wait(LONG_S)
    bench.start(victim)
    bench.settle()
    bench.check()
    assert (bench.task(task_id)["status"], bench.task(task_id)["error_code"]) == ("failed", "worker_lost")
    assert read_journal(bench.journal, task_id) == []


def restart_until_final(bench: Lab, life: Life, task_id: str) -> None:
    """Do what compose does, until the task is final; then a worker is there."""
    is_final = False
    while not (is_final and life.alive):
        if not life.alive:
            life = bench.start(bench.programs[-1])
        time.sleep(0.05)
        is_final = bool(rows(bench.url, f"SELECT 1 FROM task WHERE id = '{task_id}' AND status IN {FINAL}"))


def test_a_poison_task_ends_and_stops_nothing_else(bench: Lab) -> None:
    """It has killed three workers, then it has failed; whatever else there was to do is done, also what ran beside it each time."""
    life = bench.start_all()[bench.programs[-1]]
    beside = [bench.give("sleep", {"seconds": 2}) for _ in range(2)]
    for task_id in beside:
        bench.wait_status(task_id, "running")
    poison = bench.give_to(life, "chaos.poison")
    others = [bench.ask("echo", {"n": n}, idempotency_key=f"beside-poison-{n}") for n in range(3)] if not bench.is_embedded else []
    restart_until_final(bench, life, poison)
    # Nothing else ends a worker from here on: what ran beside it may have one chance left.
    others += [bench.give("echo", {"n": n}) for n in range(3)]
    bench.settle()
    bench.check()
    task = bench.task(poison)
    assert (task["status"], task["error_code"], task["losses"]) == ("failed", "worker_lost", 3)
    assert {bench.task(task_id)["status"] for task_id in [*beside, *others] if task_id} == {"succeeded"}


def test_a_tower_that_is_frozen_as_a_whole_takes_nothing_from_anybody(bench: Lab) -> None:
    """A laptop whose lid was closed: no loss is counted, since whoever watched was asleep as well."""
    lives = bench.start_all()
    task_id = bench.give("sleep", {"seconds": 2})
    bench.wait_status(task_id, "running")
    frozen = [life.pid for life in lives.values()]
    frozen += [process.pid for life in lives.values() for process in psutil.Process(life.pid).children(recursive=True)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3 * 1.5)  # longer than a lease: that is the fault
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    bench.settle()
    bench.check()
    assert (bench.task(task_id)["status"], bench.task(task_id)["losses"]) == ("succeeded", 0)


def test_a_task_that_outlasts_its_lease_runs_once(bench: Lab) -> None:
    """The heartbeat keeps it."""
    bench.start_all()
    task_id = bench.give("sleep", {"seconds": 4.5})
    bench.settle()
    bench.check()
    assert (bench.task(task_id)["status"], bench.task(task_id)["attempt"]) == ("succeeded", 1)


def test_processes_that_start_at_once_on_an_empty_database_migrate_it_once(bench: Lab) -> None:
    """One does it, slowly; the others wait for it, and all of them work."""
    slow = {"TOWER_FAULT": "migrate.mid:1:sleep=1"}
    bench.empty()
    started = [bench.start(name, **slow, PORT=str(port)) for port in (bench.port, free_port()) for name in bench.programs]
    task_id = bench.give("echo")
    bench.settle()
    bench.check()
    assert bench.task(task_id)["status"] == "succeeded"
    assert all(life.alive for life in started)


def test_a_worker_that_can_open_no_more_files_lives_on(bench: Lab) -> None:
    """What it cannot start fails or waits, with a reason; afterwards it works as before."""
    life = bench.start_all()[bench.programs[-1]]
    bench.wait_status(bench.give("echo"), "succeeded")
    before = resource.prlimit(life.pid, resource.RLIMIT_NOFILE)
    task_id = bench.give("command", max_attempts=1)
    resource.prlimit(life.pid, resource.RLIMIT_NOFILE, (psutil.Process(life.pid).num_fds(), before[1]))
    time.sleep(1)  # a moment in which nothing can be opened: that is the fault
    resource.prlimit(life.pid, resource.RLIMIT_NOFILE, before)
    bench.wait_status(task_id, *FINAL)
    after = bench.give("command")
    bench.settle()
    bench.check()
    assert (bench.task(after)["status"], life.alive) == ("succeeded", True)


def test_a_handler_that_holds_the_interpreter_loses_its_lease_and_its_result(services: Lab) -> None:
    """No thread of its worker runs, so no heartbeat comes; what it returns late is refused."""
    lives = services.start_all()
    count = 22
    while time_of(count) < 0.4:
        count += 1
    task_id = services.give("chaos.frozen", {"count": count + 5}, max_attempts=1)
    services.wait_status(task_id, *FINAL)
    assert services.task(task_id)["error_code"] == "worker_lost"
    wait_for("the worker to come to itself", lambda: "the lease was lost" in lives["worker"].log.read_text(), LONG_S)
    services.wait_status(services.give("echo"), "succeeded")
    services.settle()
    services.check()


def time_of(count: int) -> float:
    import re

    began = time.monotonic()
    re.match(r"(a+)+$", "a" * count + "b")
    return time.monotonic() - began


def test_a_run_is_marked_as_ours(bench: Lab) -> None:
    """Or the checker could find no orphan."""
    bench.start_all()
    task_id = bench.give("command", {"argv": ["sh", "-c", f'test "${MARK}" = {bench.run}']})
    bench.wait_status(task_id, *FINAL)
    assert bench.task(task_id)["status"] == "succeeded"

"""The guardian and its worker's side, with real processes and no tower."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors import guard as guard_module
from actors import guardian as guardian_module
from actors.attempt import LEASE_LOST, UNGUARDED, Attempt
from actors.guard import Guard
from tests.processes import guardian_of, marked
from tests.servers import wait_for
from tower import host, lifeline, proc
from tower.handler import Stopped
from tower.leases import Claim
from tower.models import new_id
from tower.settings import Settings

#: A program with a child, one that left its session, one whose parent is gone, and none of them obeys.
FAMILY = "trap '' TERM; sleep 300 & setsid sleep 300 & (setsid sleep 300 &); sleep 300; true"
SIZE = 5


class Family:
    """A process group as child.py starts it, with those who left it."""

    def __init__(self) -> None:
        self.task_id = new_id()
        self.mark = host.mark(self.task_id, 1)
        environment = {"PATH": os.defpath, host.MARK: self.mark, "TOWER_TASK_ID": self.task_id}
        self.popen = subprocess.Popen(["sh", "-c", FAMILY], env=environment, start_new_session=True)
        self.group = self.popen.pid
        wait_for("the family", lambda: self.size == SIZE)

    @property
    def size(self) -> int:
        return len(marked(self.task_id))

    def is_gone(self) -> bool:
        return self.size == 0


@pytest.fixture
def family() -> Iterator[Family]:
    made = Family()
    yield made
    host.end_marked(made.task_id, 1)
    made.popen.wait(10)


another_family = family


@pytest.fixture
def lost() -> list[str]:
    """What was said to the worker of a guard."""
    return []


@pytest.fixture
def guard(lost: list[str]) -> Iterator[Guard]:
    made = Guard(embedded=True, when_lost=lambda: lost.append("lost"))
    made.start(None)
    yield made
    made.stop()


@pytest.fixture
def guardian() -> Iterator["subprocess.Popen[bytes]"]:
    """A guardian without a worker."""
    program = [sys.executable, "-I", "-S", guardian_module.__file__, str(time.CLOCK_MONOTONIC)]
    with subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True) as made:
        yield made


def tell(guardian: "subprocess.Popen[bytes]", line: str) -> None:
    assert guardian.stdin
    guardian.stdin.write(f"{line}\n".encode())
    guardian.stdin.flush()


def leave(guardian: "subprocess.Popen[bytes]") -> int:
    """Do what the death of the worker does, and return the guardian's exit code."""
    assert guardian.stdin
    guardian.stdin.close()
    return guardian.wait(20)


def in_a_moment(seconds: float = 0) -> float:
    return host.lease_time(embedded=True) + seconds


def test_what_a_dead_worker_leaves_is_ended(guardian: "subprocess.Popen[bytes]", family: Family) -> None:
    """Also what ignores TERM, and what left its group."""
    tell(guardian, f"+ {family.group} {proc.started(family.group)} {family.mark} inf")
    assert leave(guardian) == 0
    assert family.size == 0


def test_a_guardian_outlives_the_signals_of_its_worker(guardian: "subprocess.Popen[bytes]", family: Family) -> None:
    """Ctrl-C and a supervisor's TERM are for the worker."""
    tell(guardian, f"+ {family.group} {proc.started(family.group)} {family.mark} 0")
    wait_for("its first work", family.is_gone)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        guardian.send_signal(number)
    assert leave(guardian) == 0


def test_a_group_number_that_is_somebody_elses_by_now_is_not_signalled(guardian: "subprocess.Popen[bytes]", family: Family) -> None:
    """The leader's start time tells."""
    tell(guardian, f"+ {family.group} {(proc.started(family.group) or 0) - 1} another:1 inf")
    assert leave(guardian) == 0
    assert family.size == SIZE


def test_a_group_whose_lease_runs_out_is_ended(guard: Guard, family: Family) -> None:
    """By the guardian, whatever its worker does."""
    guard.watch(family.group, family.mark, in_a_moment())
    wait_for("its end", family.is_gone)
    family.popen.wait(10)


def test_a_renewed_lease_keeps_its_group(guard: Guard, family: Family, another_family: Family) -> None:
    """While another one is ended."""
    guard.watch(family.group, family.mark, in_a_moment(1))
    guard.renew(family.mark, in_a_moment(300))
    guard.watch(another_family.group, another_family.mark, in_a_moment(1.5))
    wait_for("the end of the other", another_family.is_gone)
    assert family.size == SIZE


def test_a_released_group_is_left_alone(guard: Guard, family: Family) -> None:
    """It has ended, and its number may be anybody's."""
    guard.watch(family.group, family.mark, in_a_moment(300))
    guard.release(family.group)
    guard.stop()
    assert family.size == SIZE


def test_a_guardian_that_is_killed_is_replaced_and_told_everything(guard: Guard, family: Family, lost: list[str]) -> None:
    """Children survive it, and are guarded again."""
    guard.watch(family.group, family.mark, in_a_moment(300))
    first = guardian_of(os.getpid())
    first.kill()
    guardian_of(os.getpid(), besides=first)
    assert (family.size, lost, guard.is_up) == (SIZE, [], True)
    guard.stop()
    assert family.is_gone()


def test_a_worker_is_not_dead_while_its_guardian_is_at_work(lost: list[str], tmp_path: Path) -> None:
    """The guardian keeps the lifeline open, also the one that replaced the first."""
    file = lifeline.hold(tmp_path, "w")
    made = Guard(embedded=True, when_lost=lambda: lost.append("lost"))
    made.start(file)
    first = guardian_of(os.getpid())
    assert file is not None
    first.kill()
    guardian_of(os.getpid(), besides=first)
    os.close(file)
    assert lifeline.known(tmp_path) == {"w": True}
    made.stop()
    assert lifeline.known(tmp_path) == {"w": False}


def test_a_guardian_that_does_not_listen_is_replaced(guard: Guard, family: Family) -> None:
    """A full pipe holds up no heartbeat."""
    guard.watch(family.group, family.mark, in_a_moment(300))
    first = guardian_of(os.getpid())
    first.suspend()
    for _ in range(5000):
        guard.renew(family.mark, in_a_moment(300))
    guardian_of(os.getpid(), besides=first)
    guard.stop()
    assert family.is_gone()


@pytest.mark.parametrize("broken", ["sys.executable", "_PROGRAM"])
def test_without_a_guardian_the_worker_stops_what_runs(
    guard: Guard, lost: list[str], monkeypatch: pytest.MonkeyPatch, broken: str, tmp_path: Path
) -> None:
    """It starts nothing meanwhile, and goes on when there is one again."""
    with monkeypatch.context() as patch:
        patch.setattr(guard_module, "_PAUSE_S", 0.05)
        patch.setattr(f"actors.guard.{broken}", tmp_path / "none")
        guardian = guardian_of(os.getpid())
        guardian.kill()
        wait_for("the word", lambda: bool(lost))
        assert not guard.is_up
        with Attempt(claim(), Settings(), guard) as attempt, pytest.raises(Stopped, match=UNGUARDED):
            attempt.run(["touch", str(tmp_path / "ran")])
    wait_for("a guardian", lambda: guard.is_up)
    assert not (tmp_path / "ran").exists()


def claim(**more: object) -> Claim:
    values: dict[str, object] = {"id": new_id(), "attempt": 1, "token": "t", "worker_id": "w", "type": "command", "payload": "{}"}
    values |= {"timeout_s": 60.0, "silence_s": None, "max_attempts": 1, "max_losses": 1, "failures": 0, "started_at": 0.0}
    return Claim(**(values | more))  # type: ignore[arg-type]


def test_a_lease_that_was_let_go_is_not_taken_up_again(tmp_path: Path) -> None:
    """Its processes may have been ended already, so their end means nothing."""
    settings = Settings(lease_s=10)
    with Attempt(claim(), settings) as attempt:
        now = host.lease_time(embedded=True)
        attempt.trust(now - 7)
        assert attempt.stop_reason is None
        attempt.trust(now - 9)
        attempt.trust(now)
        assert attempt.stop_reason == LEASE_LOST


def test_a_command_that_outstays_its_timeout_is_ended_even_if_its_worker_forgets(guard: Guard, family: Family) -> None:
    """The guardian's deadline is never later than some seconds after the timeout."""
    with Attempt(claim(id=family.task_id, timeout_s=-100.0), Settings(lease_s=3600), guard) as attempt:
        attempt.trust(in_a_moment())
        attempt.watch(family.group)
        wait_for("its end", family.is_gone)


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux has this clock")
def test_the_sleep_of_one_machine_counts_where_others_are_awake() -> None:
    """With services a lease runs out during it; embedded, whoever would take it sleeps as well."""
    asleep = time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
    assert host.lease_time(embedded=True) == pytest.approx(time.monotonic(), abs=5)
    assert host.lease_time(embedded=False) == pytest.approx(time.monotonic() + asleep, abs=5)
    assert host.lease_clock(embedded=False) == time.CLOCK_BOOTTIME


def test_a_zombie_is_dead() -> None:
    """It holds a pid and a start time, and nothing else."""
    with subprocess.Popen(["true"]) as popen:
        started = proc.started(popen.pid)
        wait_for("its end", lambda: psutil.Process(popen.pid).status() == psutil.STATUS_ZOMBIE)
        assert host.ProcessId(host.pid_space(), popen.pid, float(started or 0)).is_dead()

"""Which machine and process this is, and which other processes on it are alive."""

import ctypes
import os
import platform
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tower import proc

#: Set in the environment of every child process: `<task id>:<attempt>`.
MARK = "TOWER_TASK"

#: How long killed processes get to be gone, and the pause between two looks.
_END_S, _PAUSE_S = 2.0, 0.002


@dataclass(frozen=True)
class ProcessId:
    """One process, told apart from a later one with the same pid."""

    #: The kernel's boot and pid namespace: a pid means the same only where this is equal.
    space: str
    pid: int
    #: When it started, by a clock that no step of the wall clock moves: ticks since boot where the kernel tells them.
    started: float

    def is_dead(self) -> bool:
        """Return True only if it ran in our own pid space and is surely gone."""
        return self.space == pid_space() and _started(self.pid) != self.started


def this_process() -> ProcessId:
    """Return the identity of the running process."""
    return ProcessId(pid_space(), os.getpid(), _started(os.getpid()) or 0.0)


def _started(pid: int) -> float | None:
    """Return when a process started; None if there is none, or nothing but its zombie."""
    if proc.EXISTS:
        found = proc.stat(pid)
        return None if found is None or found[0] in "ZX" else float(found[2])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None


def lease_clock(*, embedded: bool) -> int:
    """Return the clock by which a worker trusts its leases, for `time.clock_gettime`; its guardian goes by the same one.

    While a machine sleeps, other machines do not, so it counts that time; embedded, whoever takes leases back sleeps as well.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.CLOCK_MONOTONIC if embedded else time.CLOCK_BOOTTIME
    return getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC) if embedded else time.CLOCK_MONOTONIC


def lease_time(*, embedded: bool) -> float:
    """Return the time on that clock."""
    return time.clock_gettime(lease_clock(embedded=embedded))


def hostname() -> str:
    """Return the machine's name, for people."""
    return socket.gethostname()


def pid_space() -> str:
    """Return what two processes share only if they see each other's pids."""
    try:
        return f"{boot_id()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return boot_id()


def boot_id() -> str:
    """Return what is different after every start of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{hostname()}/{psutil.boot_time():.0f}"


#: How long a turn on a core may last for who stands back, the most that Linux grants: whoever wants shorter ones is let in between.
_TURN_NS = 100_000_000
#: The number of the call `sched_setattr`, which the C library has no name for, by machine; and what it takes, see sched_setattr(2).
_SET_TURN, _TAKES = {"x86_64": 314, "aarch64": 274}, struct.Struct("=IIQiIQQQ")


def stand_back(nice: int) -> None:
    """Let other processes go first on a busy machine: this thread, and whatever it starts from now on. Nothing on Windows.

    Since Linux 6.12 that takes fewer and longer turns as well, unless it has a policy of its own.
    """
    if not nice or not hasattr(os, "nice"):
        return
    value = os.nice(nice)
    number = _SET_TURN.get(platform.machine()) if sys.platform == "linux" else None
    if number and os.sched_getscheduler(0) == os.SCHED_OTHER:
        ctypes.CDLL(None).syscall(number, 0, _TAKES.pack(_TAKES.size, os.SCHED_OTHER, 0, value, 0, _TURN_NS, 0, 0), 0)


def group_lives(leader: int) -> bool:
    """Whether anything but zombies is left in the process group of a leader."""
    try:
        os.killpg(leader, 0)
    except (ProcessLookupError, PermissionError):
        return False
    if proc.EXISTS:
        return any(found[1] == leader and found[0] not in "ZX" for found in map(proc.stat, proc.pids()) if found)
    return any(_in_group(process, leader) for process in psutil.process_iter())


def _in_group(process: psutil.Process, leader: int) -> bool:
    try:
        return os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ProcessLookupError, PermissionError):
        return False


def make_attempt_folder(task_id: str, attempt: int) -> Path:
    """Make a folder of an attempt's own, among the machine's temporary files."""
    return Path(tempfile.mkdtemp(prefix=_folder_prefix(task_id, attempt)))


def remove_attempt_folders(task_id: str, attempt: int) -> None:
    """Remove what an attempt whose worker died has left among the temporary files of this machine."""
    for path in Path(tempfile.gettempdir()).glob(_folder_prefix(task_id, attempt) + "*"):
        shutil.rmtree(path, ignore_errors=True)  # never follows a link that stands in its place


def _folder_prefix(task_id: str, attempt: int) -> str:
    return f"tower-{task_id}-{attempt}-"


def mark(task_id: str, attempt: int) -> str:
    """Return what the processes of an attempt carry as TOWER_TASK."""
    return f"{task_id}:{attempt}"


def end_marked(task_id: str, attempt: int) -> bool:
    """Kill every process on this machine that carries the mark of an attempt; return whether they are gone.

    It finds what left its process group: daemons, double forks, `setsid`.
    """
    deadline, absent = time.monotonic() + _END_S, 0
    while absent < 2:  # once may be chance: in the midst of its exec a process has no environment
        absent = 0 if kill_marked(task_id, attempt) else absent + 1
        if time.monotonic() > deadline:
            return False
        if absent < 2:
            time.sleep(_PAUSE_S)
    return True


def kill_marked(task_id: str, attempt: int) -> int:
    """Look once for processes that carry the mark of an attempt and kill them; return how many there were."""
    found = [pid for pid in _carrying(mark(task_id, attempt)) if pid != os.getpid()]
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue  # it ended meanwhile
    return len(found)


def _carrying(value: str) -> list[int]:
    if proc.EXISTS:
        return proc.carrying(MARK, {value})
    return [process.pid for process in psutil.process_iter() if _carries(process, value)]


def _carries(process: psutil.Process, value: str) -> bool:
    try:
        return process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False  # it ended meanwhile, or belongs to somebody else

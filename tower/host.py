"""Which machine and process this is, and which other processes on it are alive."""

import os
import shutil
import signal
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

#: Set in the environment of every child process: `<task id>:<attempt>`.
MARK = "TOWER_TASK"


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
        if self.space != pid_space():
            return False
        try:
            return _started(self.pid) != self.started or psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def this_process() -> ProcessId:
    """Return the identity of the running process."""
    return ProcessId(pid_space(), os.getpid(), _started(os.getpid()))


def _started(pid: int) -> float:
    """Return when a process started; raise psutil.NoSuchProcess if there is none."""
    try:
        # The 22nd field of proc(5); the second may hold spaces and ends with the last parenthesis.
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return float(psutil.Process(pid).create_time())


def hostname() -> str:
    """Return the machine's name, for people."""
    return socket.gethostname()


def pid_space() -> str:
    """Return what two processes share only if they see each other's pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{hostname()}/{psutil.boot_time():.0f}"


def group_lives(leader: int) -> bool:
    """Whether anything but zombies is left in the process group of a leader."""
    try:
        os.killpg(leader, 0)
    except (ProcessLookupError, PermissionError):
        return False
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


def kill_marked(task_id: str, attempt: int) -> int:
    """Kill every process on this machine that carries the mark of an attempt; return how many there were.

    It finds what left its process group: daemons, double forks, `setsid`.
    """
    mark, killed = f"{task_id}:{attempt}", 0
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                process.send_signal(signal.SIGKILL)
                killed += 1
        except (psutil.Error, OSError):
            continue  # it ended meanwhile, or belongs to somebody else
    return killed

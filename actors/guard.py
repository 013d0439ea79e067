"""The worker's side of its guardian: starts it, tells it what to guard, and replaces it when it dies."""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tower import proc
from tower.host import lease_clock
from tower.log import Outage
from tower.settings import child_environment

_PROGRAM = Path(__file__).with_name("guardian.py")
_PAUSE_S = 1.0
#: So many guardians in a row that lived so short a time mean that another one will not do better.
_SHORT_S, _MOST_SHORT = 1.0, 3
_STOP_S = 5.0

_log = logging.getLogger(__name__)


@dataclass
class _Group:
    started: int
    mark: str
    deadline: float


class Guard:
    """What a worker wants guarded; the guardian knows it too, and whoever replaces a dead one is told anew."""

    def __init__(self, *, embedded: bool, when_lost: Callable[[], None]) -> None:
        self._clock = lease_clock(embedded=embedded)
        self._when_lost = when_lost
        self._lifeline: int | None = None
        self._groups: dict[int, _Group] = {}
        self._guardian: subprocess.Popen[bytes] | None = None
        self._is_up = False
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None
        self._outage = Outage(_log, "child processes are guarded again")

    def start(self, lifeline: int | None) -> None:
        """Start the guardian, which keeps the worker's lifeline open too, and see to it that there is always one."""
        self._lifeline = lifeline
        self._launch()
        self._is_up = self._guardian is not None
        self._keeper = threading.Thread(target=self._keep, name="guard", daemon=True)
        self._keeper.start()

    def stop(self) -> None:
        """Let the guardian end whatever still runs, and itself."""
        self._stopping.set()
        with self._lock:
            if self._guardian and self._guardian.stdin:
                self._guardian.stdin.close()
        if self._keeper:
            self._keeper.join(_STOP_S)

    @property
    def is_up(self) -> bool:
        """Whether there is a guardian, or will be at once; without one no process may be started.

        Once there was none, a new one counts only when it has lived a while.
        """
        return self._is_up

    def watch(self, group: int, mark: str, deadline: float) -> bool:
        """Guard a process group from now on, until a time on the leases' clock; False if there is no guardian."""
        with self._lock:
            self._groups[group] = _Group(proc.started(group) or 0, mark, deadline)
            self._tell_all(group)
            return self._is_up

    def renew(self, mark: str, deadline: float) -> None:
        """Guard what carries a mark for longer."""
        with self._lock:
            for number, group in self._groups.items():
                if group.mark == mark:
                    group.deadline = deadline
                    self._tell(f"= {number} {deadline:.3f}")

    def release(self, group: int) -> None:
        """Guard a process group no longer, because it has ended."""
        with self._lock:
            if self._groups.pop(group, None):
                self._tell(f"- {group}")

    def _tell_all(self, *numbers: int) -> None:
        for number in numbers:
            group = self._groups[number]
            self._tell(f"+ {number} {group.started} {group.mark} {group.deadline:.3f}")

    def _tell(self, line: str) -> None:
        guardian = self._guardian
        if guardian is None or guardian.stdin is None or guardian.stdin.closed:
            return
        try:
            os.write(guardian.stdin.fileno(), f"{line}\n".encode())
        except BlockingIOError:
            guardian.kill()  # it has not listened for hundreds of lines
        except BrokenPipeError:
            pass  # the next one is told everything

    def _launch(self) -> None:
        """Start a guardian and tell it everything."""
        with self._lock:
            if self._stopping.is_set():
                return
            try:
                guardian = subprocess.Popen(  # noqa: S603  # our own program
                    # Without packages it starts in a quarter of the time; it inherits nothing but its input and the lifeline.
                    [sys.executable, "-I", "-S", str(_PROGRAM), str(self._clock)],
                    cwd="/",
                    env=child_environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=() if self._lifeline is None else (self._lifeline,),
                )
            except OSError as error:
                _log.debug("no guardian can be started: %s", error)
                return
            assert guardian.stdin is not None  # noqa: S101  # we asked for a pipe
            os.set_blocking(guardian.stdin.fileno(), False)
            self._guardian = guardian
            self._tell_all(*self._groups)

    def _keep(self) -> None:
        """Wait for the guardian's end, and start another at once; if that does not go, let the worker stop what runs."""
        short = 0
        while True:
            short = 0 if self._outlives() else short + 1
            if self._stopping.is_set():
                return
            _log.warning("the guardian of this worker's child processes ended; another one is started")
            self._launch()
            if self._guardian is None or short >= _MOST_SHORT:
                self._is_up = False
                self._outage.begin("child processes cannot be guarded, so this worker takes no tasks until they can")
                self._when_lost()
                self._stopping.wait(_PAUSE_S)

    def _outlives(self) -> bool:
        """Wait until the guardian ends; return whether it was one that could be relied on."""
        guardian, lived = self._guardian, False
        if guardian is None:
            return False
        try:
            guardian.wait(_SHORT_S)
        except subprocess.TimeoutExpired:
            lived = self._is_up = True
            self._outage.end()
            guardian.wait()
        with self._lock:
            self._guardian = None
            if guardian.stdin:
                guardian.stdin.close()
        return lived

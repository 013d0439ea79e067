"""Keeps worker processes running: one that ends by itself is started again, and the others do not notice."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from types import FrameType

#: How often the processes are looked at, and the pause before one is started again, which doubles for one that ends soon after.
_LOOK_S = 0.2
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
#: Who lived so long had a good start.
_WELL_S = 10.0
#: prctl's PR_SET_PDEATHSIG: the signal that Linux sends when the parent is gone.
_WHEN_PARENT_DIES = 1

_log = logging.getLogger(__name__)


class _Kept:
    """One worker process, in its lives one after the other."""

    def __init__(self, threads: int | None) -> None:
        options = ["--threads", str(threads)] if threads else []
        # One process of dramatiq's each: of several, it ends all when one dies, and what they run with them.
        self._command = [sys.executable, "-m", "dramatiq", "tower.actors", "--processes", "1", *options]
        self._pause_s = _PAUSE_S
        self._began = self._ended = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._began = time.monotonic()
        # In a session of its own, so that Ctrl-C comes from us alone: dramatiq takes a second signal for impatience.
        self.process = subprocess.Popen(self._command, start_new_session=True, preexec_fn=_follow_parent)  # noqa: PLW1509, S603

    def look(self) -> None:
        """Start it again if it has ended, after a pause."""
        if self.process and self.process.poll() is not None:
            code, self.process, self._ended = self.process.returncode, None, time.monotonic()
            self._pause_s = _PAUSE_S if self._ended - self._began > _WELL_S else min(self._pause_s * 2, _LONGEST_PAUSE_S)
            _log.warning(
                "a worker process ended by itself; another takes its place", extra={"fields": {"exit": code, "in_s": self._pause_s}}
            )
        if self.process is None and time.monotonic() - self._ended >= self._pause_s:
            self.start()


def _follow_parent() -> None:
    """Have a worker process end in order when we are killed, where the system can; it hands its tasks back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_WHEN_PARENT_DIES, signal.SIGTERM)


def keep(processes: int | None, threads: int | None) -> int:
    """Run so many worker processes until asked to stop, one for each core if not said; return the exit code."""
    kept = [_Kept(threads) for _ in range(processes or os.cpu_count() or 1)]
    asked: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for one in kept:
        one.start()
    while not asked:
        time.sleep(_LOOK_S)
        for one in kept:
            one.look()
    running = [one.process for one in kept if one.process]
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        process.wait()
    return 0

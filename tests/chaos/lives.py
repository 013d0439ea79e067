"""Processes of the tower that start quickly: forked from one that has imported everything, so that many short lives cost little."""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
# Only what opens nothing when it is imported; the parent's own main module need not be loaded again.
_context.set_forkserver_preload(["tower.main", "dramatiq.cli", "actors.crew", "tests.chaos.lives"])

SERVER, WORKER = "server", "worker"


class Life:
    """One process of the tower, from its start to its end."""

    def __init__(self, program: str, folder: Path, environment: Mapping[str, str], paths: tuple[Path, ...] = ()) -> None:
        self.log = folder / f"{program}.log"
        arguments = (program, str(folder), str(self.log), dict(environment), [str(path) for path in paths])
        self._process = _context.Process(target=_live, args=arguments, name=program)
        self._process.start()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float) -> int | None:
        """Wait for its end, so long at most; return its exit code."""
        self._process.join(seconds)
        return self._process.exitcode

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, and what dramatiq's master forked."""
        if self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if number == signal.SIGKILL else os.kill)(self._process.pid, number)
        self._process.join(30)


def _live(program: str, folder: str, log: str, environment: dict[str, str], paths: list[str]) -> None:
    os.setsid()
    os.chdir(folder)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    for name in [name for name in os.environ if name.startswith("TOWER_")]:
        del os.environ[name]
    os.environ.update(environment)
    sys.path[:0] = paths
    if program == SERVER:
        from tower.main import main
    else:
        from dramatiq.cli import main

        sys.argv = ["dramatiq", "tower.actors", "--processes", "1", "--threads", "2"]
    sys.exit(main())

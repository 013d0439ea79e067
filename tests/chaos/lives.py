"""Processes of the tower that start quickly: forked from one that has imported everything, so that many short lives cost little."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from dramatiq import Worker

_context = multiprocessing.get_context("forkserver")
# Only what opens nothing when it is imported; the parent's own main module need not be loaded again.
_context.set_forkserver_preload(["tower.main", "actors.handlers.http", "tests.chaos.stepped", "tests.chaos.lives"])

SERVER, WORKER = "server", "worker"
#: Names the file whose seconds are added to SQLite's clock.
CLOCK = "CHAOS_CLOCK"


class Life:
    """One process of the tower, from its start to its end."""

    def __init__(self, program: str, folder: Path, environment: Mapping[str, str], paths: tuple[Path, ...] = ()) -> None:
        self.log = folder / f"{program}.log"
        arguments = (program, str(folder), str(self.log), dict(environment), [str(path) for path in paths])
        self._process = _context.Process(target=_live, args=arguments, name=program)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float) -> int | None:
        """Wait for its end, so long at most; return its exit code."""
        self._process.join(seconds)
        return self._process.exitcode

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it."""
        if self._process.pid is not None and self.alive:
            os.kill(self._process.pid, number)
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
    sys.exit(_serve() if program == SERVER else _work())


def _serve() -> int:
    from tests.chaos.stepped import step_with
    from tower.main import main

    if CLOCK in os.environ:
        step_with(Path(os.environ[CLOCK]))
    return main()


def _work() -> int:
    """Do what a process of `dramatiq tower.actors` does; without its master, which takes seconds to come and go."""
    from tower.actors import broker

    worker = Worker(broker, worker_threads=2)
    worker.start()
    signal.pause()
    return 0

"""The tower to be broken: real processes, started again when they end as compose would, on servers, a disk and a clock that can fail."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.acceptance.stack import PROGRAMS, QUICK, ROOT, Process
from tests.chaos import plugin
from tests.chaos.checker import orphans, rows
from tests.servers import Postgres, Redis, free_port, wait_for

#: Marks whatever is ours, so that two runs on one machine do not meet.
MARK = "CHAOS_RUN"
_LEASE_S = float(QUICK["TOWER_LEASE_S"])
_DISK = "32m"

#: Postgres looks for a function in `public` first and finds one whose clock a row can move.
CLOCK_SQL = """
CREATE TABLE public.chaos_clock AS SELECT 0::double precision AS seconds;
CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql AS
  'SELECT pg_catalog.clock_timestamp() + make_interval(secs => (SELECT seconds FROM public.chaos_clock))';
CREATE FUNCTION public.statement_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql AS
  'SELECT pg_catalog.statement_timestamp() + make_interval(secs => (SELECT seconds FROM public.chaos_clock))';
ALTER DATABASE postgres SET search_path = public, pg_catalog;
"""


class Service:
    """One process of the tower that is always started again."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.restarts = 0
        self._start = lambda number: Process(f"{name}-{number}", command, folder, environment)
        self.process = self._start(0)

    @property
    def pid(self) -> int:
        return self.process.popen.pid

    @property
    def ended(self) -> bool:
        return self.process.popen.poll() is not None

    def restart(self) -> None:
        self.restarts += 1
        self.process = self._start(self.restarts)


class Stage:
    """Everything a run needs, in a folder of its own; close it, whatever happens."""

    lease_s = _LEASE_S

    def __init__(self, folder: Path, backend: str, *, say: Callable[[str], None] = lambda text: None, **environment: str) -> None:
        self.folder, self.say = folder, say
        self.is_embedded = backend == "sqlite"
        self.run = uuid.uuid4().hex
        self.traces, self.journal = folder / "logs", folder / "journal"
        self.clock, self.ballast = folder / "clock", self.traces / ".ballast"
        self.postgres = self.redis = None
        self.services: list[Service] = []
        #: When which worker process was killed, by CLOCK_BOOTTIME.
        self.kills: dict[int, float] = {}
        self.has_disk = False
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._environment = environment
        for path in (self.traces, self.journal):
            path.mkdir()
        self.clock.write_text("0")

    def open(self) -> "Stage":
        """Start everything and wait until it answers."""
        self.has_disk = self._mount()
        self.port = free_port()
        path = os.pathsep.join(map(str, (plugin.install(self.folder), ROOT)))
        shared = {MARK: self.run, "PORT": str(self.port), "TRACE_DIR": str(self.traces), "PYTHONPATH": path, **QUICK, **self._environment}
        if self.is_embedded:
            self.database_url = f"sqlite:///{self.folder / 'tower.db'}"
            server = [sys.executable, "-m", "tests.chaos.stepped", str(self.clock)]
            shared |= {"DATABASE_URL": self.database_url}
        else:
            self.postgres, self.redis = Postgres(fsync=True).start(), Redis().start()
            self.postgres.execute(CLOCK_SQL)
            self.database_url = self.postgres.url()
            server = [sys.executable, "-m", "devops_control_tower.main"]
            shared |= {"DATABASE_URL": self.database_url, "REDIS_URL": self.redis.url()}
        self.services.append(Service("server", server, self.folder, shared))
        worker = [str(PROGRAMS / "dramatiq"), "tower.actors", "--processes", "1", "--threads", "4"]
        for number in () if self.is_embedded else (1, 2):
            self.services.append(Service(f"worker{number}", worker, self.folder, shared))
        self._supervisor.start()
        wait_for("a worker", self._has_worker, 40)
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def server(self) -> Service:
        return self.services[0]

    def _has_worker(self) -> bool:
        with contextlib.suppress(Exception):
            return bool(rows(self.database_url, "SELECT id FROM worker"))
        return False

    def _mount(self) -> bool:
        """Put the traces on a small disk of their own, if we may."""
        if os.geteuid() != 0:
            return False
        command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tower-chaos", str(self.traces)]
        mounted = subprocess.run(command, check=False, capture_output=True)
        return mounted.returncode == 0

    def _supervise(self) -> None:
        while not self._ending.wait(0.2):
            for service in self.services:
                with self._lock:
                    if service.ended and not self._ending.is_set():
                        self.say(f"  {service.name} ended with {service.process.popen.returncode}; started again")
                        service.restart()

    def workers(self) -> list[int]:
        """Return the processes that run tasks: the server when it is embedded, else what dramatiq's masters started."""
        if self.is_embedded:
            return [self.server.pid]
        return [child.pid for service in self.services[1:] for child in _children(service.pid) if "dramatiq" in " ".join(_line(child))]

    def is_at_work(self, pid: int) -> bool:
        """Whether a server, or a worker or its master, has come so far that it takes or runs tasks."""
        return any(
            word in service.process.log
            for service in self.services
            for word in ("tower is up", "worker started")
            if pid == service.pid or pid in [child.pid for child in _children(service.pid)]
        )

    def guardians(self) -> list[int]:
        """Return the guardians of our workers."""
        return [process.pid for process in self.ours() if any(word.endswith("guardian.py") for word in _line(process))]

    def ours(self) -> list[psutil.Process]:
        """Return every live process of this run, the tasks' too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.run and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self, pid: int) -> None:
        """Kill a process, and remember when."""
        self.kills[pid] = time.clock_gettime(time.CLOCK_BOOTTIME)
        signal_to(pid, signal.SIGKILL)

    def step_clock(self, seconds: float) -> None:
        """Let the database's clock be so many seconds away from the machine's."""
        if self.postgres:
            self.postgres.execute(f"UPDATE public.chaos_clock SET seconds = {seconds}")
        else:
            beside = self.clock.with_suffix(".new")
            beside.write_text(str(seconds))
            beside.rename(self.clock)

    def fill_disk(self) -> None:
        """Leave no room for traces."""
        with contextlib.suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size) == size:
                        pass

    def empty_disk(self) -> None:
        """Make room for traces."""
        self.ballast.unlink(missing_ok=True)

    def orphans(self) -> list[tuple[int, str, str]]:
        """Return the live processes of tasks."""
        return list(orphans({MARK: self.run}, {row["id"] for row in rows(self.database_url, "SELECT id FROM task")}))

    @property
    def restarts(self) -> int:
        return sum(service.restarts for service in self.services)

    def close(self) -> None:
        """End whatever was started, by its pid."""
        self._ending.set()
        with self._lock:
            for service in self.services:
                service.process.close()
        for process in self.ours():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for server in (self.redis, self.postgres):
            if server:
                server.close()
        if self.has_disk:
            subprocess.run(["umount", "-l", str(self.traces)], check=False)


def signal_to(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def _line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []

"""A whole tower to measure: durable Postgres and Redis with worker processes, or everything in one server process."""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import psutil

from actors.crew import Crew
from actors.handlers import load as load_handlers
from tests.servers import Postgres, Redis, free_port, wait_for
from tower import db
from tower.broker import Nudger, open_broker
from tower.models import behind
from tower.orchestrator import EnhancedOrchestrator
from tower.settings import Settings, load

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
#: Worker processes of the services, and slots of each.
WORKERS, SLOTS = 1, 16
_ENDING = "SELECT COUNT(*) FROM task WHERE status IN ('queued', 'dispatched', 'running')"
_TRACING = f"SELECT COUNT(*) FROM task WHERE {behind()[0].sql}"
PAYLOAD = {"text": "x" * 1000}


class Stack:
    """The processes of a tower in a folder of its own; `mode` is services or embedded."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.folder = Path(tempfile.mkdtemp(prefix="tower-bench-"))
        self.traces = self.folder / "logs"
        self.port = free_port()
        self.processes: dict[str, psutil.Process] = {}
        self._servers: list[Any] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self.environment = {
            "PORT": str(self.port),
            "TRACE_DIR": str(self.traces),
            "TOWER_RUN_DIR": str(self.folder / "run"),
            "TOWER_LOG_LEVEL": "warning",
            "DATABASE_URL": f"sqlite:///{self.folder / 'tower.db'}",
        }

    def prepare(self, *, in_process: bool = False) -> Settings:
        """Start the servers; return the settings of a tower that uses them, here of one that does all its work in this process."""
        if self.mode == "services":
            self._start_servers()
        if in_process:
            self.environment.pop("REDIS_URL", None)
        os.environ.update(self.environment)
        return load()

    def open(self) -> "Stack":
        """Start everything, and wait until a worker is known."""
        self.settings = self.prepare()
        self._start("server", [sys.executable, "-m", "devops_control_tower.main"])
        if self.mode == "services":
            self._start("workers", [str(PROGRAMS / "dramatiq"), "tower.actors", "--processes", str(WORKERS), "--threads", str(SLOTS)])
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        slots = WORKERS * SLOTS if self.mode == "services" else self.settings.slots
        wait_for("the slots", lambda: self._slots() >= slots, 60)
        db.open_database(self.settings)
        return self

    def _start_servers(self) -> None:
        database, broker = os.environ.get("BENCH_DATABASE_URL"), os.environ.get("BENCH_REDIS_URL")
        if not database:
            postgres = Postgres(fsync=True).start()
            postgres.execute("CREATE DATABASE tower")
            self._servers.append(postgres)
            assert postgres.process
            self.processes["postgres"], database = psutil.Process(postgres.process.pid), postgres.url("tower")
        if not broker:
            redis = Redis().start("--appendonly", "yes", "--appendfsync", "everysec")
            self._servers.append(redis)
            assert redis.process
            self.processes["redis"], broker = psutil.Process(redis.process.pid), redis.url()
        self.environment |= {"DATABASE_URL": database, "REDIS_URL": broker}

    def _start(self, name: str, command: list[str]) -> None:
        ours = ("TOWER_", "DATABASE_URL", "REDIS_URL", "TRACE_DIR")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        with (self.folder / f"{name}.log").open("wb") as log:
            started = subprocess.Popen(
                command, cwd=ROOT, env={**clean, **self.environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._started.append(started)
        self.processes[name] = psutil.Process(started.pid)

    def open_bare(self) -> int:
        """Start a bare FastAPI on a database like the tower's; return its port."""
        url, port = self.environment["DATABASE_URL"].replace("/tower.db", "/bare.db"), free_port()
        self.environment["BARE_DATABASE_URL"] = url
        self._start("bare", [sys.executable, "-m", "uvicorn", "benchmarks.bare:app", "--port", str(port), "--log-level", "warning"])
        wait_for("the bare FastAPI", lambda: _listens(port), 30)
        return port

    def _slots(self) -> int:
        try:
            return int(self.client.get("/health/ready").json()["slots"])
        except httpx2.TransportError:
            return 0

    def engine(self) -> EnhancedOrchestrator:
        """Return an engine of this process on the same database and broker, as a client of its own would have it."""
        registry, broker = load_handlers(), open_broker(self.settings)
        Crew(self.settings, registry, broker)  # so that the names of actors are known; nothing runs here
        return EnhancedOrchestrator(self.settings, registry, Nudger(broker))

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds that each part has used, children included."""
        return {name: _cpu_s(process) for name, process in self.processes.items()}

    def memory_mb(self) -> dict[str, float]:
        """Return the resident memory of each process of the tower, in megabytes."""
        found = {}
        for name in ("server", "workers"):
            process = self.processes.get(name)
            for number, one in enumerate([process, *process.children(recursive=True)] if process else []):
                found[f"{name} {number}"] = round(one.memory_info().rss / 1e6, 1)
        return found

    def wait_all_done(self, seconds: float = 600) -> None:
        """Wait until every task has ended and is traced; that costs the same however many there have been."""
        deadline = time.monotonic() + seconds
        while left := self.ask(_ENDING) + self.ask(_TRACING):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{left} tasks were left after {seconds:g} s")
            time.sleep(0.025)

    def ask(self, statement: str) -> Any:
        """Return the one value that a SELECT finds."""
        return db.read(lambda: db.database.execute_sql(statement).fetchone()[0])

    def close(self) -> None:
        """End everything that was started; its folder stays until `remove`."""
        db.close_database()
        if self._started:
            self.client.close()
        for started in reversed(self._started):
            started.terminate()
        for started in self._started:
            started.wait(30)
        for server in self._servers:
            server.close()

    def remove(self) -> None:
        """Remove what it left on the disk; after the last measure, since new files cost more for minutes after that: see `file_ms`."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _cpu_s(process: psutil.Process) -> float:
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            times = one.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def file_ms() -> float:
    """Return how many milliseconds it takes to create a file in a new folder.

    On ext4 it is 0.02, and 0.6 for some minutes after thousands of files were deleted, since their places are not taken again so soon.
    Each folder of a task has four.
    """
    with tempfile.TemporaryDirectory(prefix="tower-bench-files-") as folder:
        times = [timed(Path(folder, str(number)).touch) for number in range(100)]
    return round(statistics.median(times) * 1000, 3)


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds it took."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

"""Kills a process at its n-th fault point, for n = 1, 2, 3 …, until a task passes without any: no moment is left untried.

    python -m tests.chaos.nth [--backend sqlite|postgres] [--type echo|sleep|command|http …] [--step N]

On SQLite the embedded server is killed; on Postgres first the worker, then the server. After each the task must have ended, once.
"""

import argparse
import itertools
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import psutil

from tests.acceptance.stack import QUICK
from tests.chaos.checker import check, rows, unfinished
from tests.chaos.lives import SERVER, WORKER, Life
from tests.chaos.load import JOURNAL
from tests.chaos.stage import MARK
from tests.servers import Postgres, Redis, free_port, wait_for

TYPES = ("echo", "sleep", "command", "http")
#: In the life that is to be killed the sweep passes once, so that its points do not come between those of the task.
_ONE_SWEEP = {"TOWER_SWEEP_S": "60"}
#: How long after its task's end a process may still pass a point.
_AFTERMATH_S = 0.4
_LONG_S = 60


class Loop:
    """One tower that lives many short lives."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.folder, self.is_embedded = folder, backend == "sqlite"
        self.journal, self.traces = folder / "journal", folder / "logs"
        self.journal.mkdir()
        self.run, self.port, self.url = uuid.uuid4().hex, free_port(), f"sqlite:///{folder / 'tower.db'}"
        self._servers: list[Postgres | Redis] = []
        self._lives: list[Life] = []
        more = {}
        if not self.is_embedded:
            postgres, redis = Postgres().start(), Redis().start()
            self._servers = [redis, postgres]
            self.url, more = postgres.url(), {"REDIS_URL": redis.url()}
        self._environment = {
            **QUICK,
            "DATABASE_URL": self.url,
            "PORT": str(self.port),
            "TRACE_DIR": str(self.traces),
            MARK: self.run,
            **more,
        }
        self._web = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
        threading.Thread(target=self._web.serve_forever, name="web", daemon=True).start()
        self._client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10)

    def close(self) -> None:
        """End everything."""
        self._end_lives()
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.run:
                    process.kill()
            except psutil.Error:
                continue
        self._client.close()
        self._web.shutdown()
        self._web.server_close()
        for server in self._servers:
            server.close()

    def kill_at(self, n: int, type_: str, victim: str) -> bool:
        """Let one task travel while the victim dies at its n-th point; return whether it came so far. Raise AssertionError for a
        broken promise."""
        faulty = {"TOWER_FAULT": f"*:{n}:kill", **_ONE_SWEEP}
        lives = {name: self._start(name, faulty if name == victim else {}) for name in self._programs()}
        key = f"{victim}-{type_}-{n}-{uuid.uuid4().hex[:8]}"
        task_id = self._ask(key, type_, lives[victim])
        if task_id:
            wait_for(f"the end of {key}", lambda: not lives[victim].alive or not unfinished(self.url), _LONG_S)
        died = lives[victim].wait(_AFTERMATH_S if task_id else _LONG_S) is not None
        if died:
            lives[victim].end()
            lives[victim] = self._start(victim, {})
            again = self._ask(key, type_, None)
            assert task_id in (None, again), f"{key}: first answered with {task_id}, then with {again}"
            wait_for(f"the end of {key}", lambda: not unfinished(self.url), _LONG_S)
        self._end_lives()
        self._check(key)
        return died

    def _programs(self) -> tuple[str, ...]:
        return (SERVER,) if self.is_embedded else (SERVER, WORKER)

    def _start(self, program: str, more: dict[str, str]) -> Life:
        life = Life(program, self.folder, {**self._environment, **more})
        self._lives.append(life)
        return life

    def _end_lives(self) -> None:
        for life in self._lives:
            life.end()
        self._lives.clear()

    def _ask(self, key: str, type_: str, victim: Life | None) -> str | None:
        """Enqueue the task until there is an answer, or the victim is dead."""
        body = {"type": type_, "payload": self._payload(type_), "idempotency_key": key, "max_attempts": 3}
        deadline = time.monotonic() + _LONG_S
        while time.monotonic() < deadline:
            try:
                answer = self._client.post("/tasks/enqueue", json=body)
                if answer.status_code in (200, 202):
                    return str(answer.json()["task_id"])
                assert answer.status_code == 503, answer.text
            except httpx2.TransportError:
                if victim and not victim.alive:
                    return None
            time.sleep(0.03)
        raise TimeoutError(f"{key} was not answered")

    def _payload(self, type_: str) -> dict[str, Any]:
        run_it = f"echo kept > kept.txt; exec {sys.executable} -S -E {JOURNAL} {self.journal} 0.3 fork"
        payloads: dict[str, dict[str, Any]] = {
            "echo": {"n": 1},
            "sleep": {"seconds": 0.5},
            "command": {"argv": ["sh", "-c", run_it], "artifacts": ["kept.txt"]},
            "http": {"url": f"http://127.0.0.1:{self._web.server_address[1]}/"},
        }
        return payloads[type_]

    def _check(self, key: str) -> None:
        report = check(self.url, self.traces, journal=self.journal, marks={MARK: self.run})
        assert report.broken == [], f"{key}: {report.broken}"
        statuses = {row["idempotency_key"]: row["status"] for row in rows(self.url, "SELECT idempotency_key, status FROM task")}
        assert statuses[key] == "succeeded", f"{key}: {statuses[key]}"


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # the name that http.server asks for
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def loop(folder: Path, backend: str) -> Iterator[Loop]:
    """Open a loop and close it."""
    made = Loop(folder, backend)
    try:
        yield made
    finally:
        made.close()


def kill_at_every(tower: Loop, type_: str, victim: str, *, first: int = 1, step: int = 1) -> int:
    """Kill the victim at its points, one after the other; return how far it goes, at least, before a task passes unharmed."""
    for n in itertools.count(first, step):
        if not tower.kill_at(n, type_, victim):
            return n
    raise AssertionError


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--type", choices=TYPES, action="append", help="all if absent")
    parser.add_argument("--step", type=int, default=1, help="try every so-manieth point only")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tower-nth-") as folder, loop(Path(folder), asked.backend) as tower:
        for victim in (SERVER,) if asked.backend == "sqlite" else (WORKER, SERVER):
            for type_ in asked.type or TYPES:
                began = time.monotonic()
                last = kill_at_every(tower, type_, victim, step=asked.step)
                spent = time.monotonic() - began
                sys.stdout.write(f"{asked.backend}: {victim} killed at points 1 to {last} of one {type_} task, {spent:.0f} s; all kept\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

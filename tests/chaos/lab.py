"""A small tower of quick lives for one fault at a time, embedded on SQLite or as services on Postgres, and what its tasks promise."""

import shutil
import sys
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
from tests.chaos import plugin
from tests.chaos.checker import Report, check, rows, unfinished
from tests.chaos.lives import CLOCK, SERVER, WORKER, Life
from tests.chaos.load import JOURNAL
from tests.chaos.stage import CLOCK_SQL, MARK
from tests.servers import Postgres, Redis, free_port, wait_for
from tower.models import new_id

LONG_S = 60


class Lab:
    """A folder, a database and a broker; processes come and go."""

    def __init__(self, folder: Path, backend: str, *, database: Path | None = None) -> None:
        self.folder, self.is_embedded = folder, backend == "sqlite"
        self.journal, self.traces, self.clock = folder / "journal", folder / "logs", folder / "clock"
        self.journal.mkdir()
        self.clock.write_text("0")
        self._plugin = plugin.install(folder)
        self.run, self.port = uuid.uuid4().hex, free_port()
        self.url = f"sqlite:///{database or folder / 'tower.db'}"
        self.lives: list[Life] = []
        self.postgres = None if self.is_embedded else Postgres(fsync=True).start()
        self.redis = None if self.is_embedded else Redis().start()
        more = {CLOCK: str(self.clock)}
        if self.postgres and self.redis:
            self.postgres.execute(CLOCK_SQL)
            self.url, more = self.postgres.url(), {"REDIS_URL": self.redis.url()}
        self.environment = {
            **QUICK,
            "DATABASE_URL": self.url,
            "PORT": str(self.port),
            "TRACE_DIR": str(self.traces),
            MARK: self.run,
            **more,
        }
        self._web = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
        threading.Thread(target=self._web.serve_forever, name="web", daemon=True).start()
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20, limits=httpx2.Limits(keepalive_expiry=1))

    def close(self) -> None:
        """End everything."""
        self.end_lives()
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.run:
                    process.kill()
            except psutil.Error:
                continue
        self.client.close()
        self._web.shutdown()
        self._web.server_close()
        for server in (self.redis, self.postgres):
            if server:
                server.close()

    @property
    def programs(self) -> tuple[str, ...]:
        """What a whole tower consists of; the last one runs the tasks."""
        return (SERVER,) if self.is_embedded else (SERVER, WORKER)

    def start(self, program: str, **environment: str) -> Life:
        """Start one process."""
        life = Life(program, self.folder, {**self.environment, **environment}, (self._plugin,))
        self.lives.append(life)
        return life

    def start_all(self, victim: str | None = None, fault: str = "", **environment: str) -> dict[str, Life]:
        """Start a whole tower; the victim breaks as the fault says."""
        faulty = {"TOWER_FAULT": fault} if fault else {}
        return {name: self.start(name, **(faulty if name == victim else {}), **environment) for name in self.programs}

    def empty(self) -> None:
        """Begin with a database in which nothing is, not even a table."""
        self.end_lives()
        if self.postgres:
            self.postgres.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            self.postgres.execute(CLOCK_SQL)
        for path in self.folder.glob("tower.db*"):
            path.unlink()
        shutil.rmtree(self.traces, ignore_errors=True)

    def end_lives(self) -> None:
        """Kill every process of the tower."""
        for life in self.lives:
            life.end()
        self.lives.clear()

    def ask(self, type_: str, payload: dict[str, Any] | None = None, *, victim: Life | None = None, **more: Any) -> str | None:
        """Enqueue a task until there is an answer; None if the victim died meanwhile. Without a payload it is one that leaves traces."""
        body = {"type": type_, "payload": self.payload(type_) if payload is None else payload, **more}
        deadline = time.monotonic() + LONG_S
        while time.monotonic() < deadline:
            try:
                answer = self.client.post("/tasks/enqueue", json=body)
                if answer.status_code in (200, 202):
                    return str(answer.json()["task_id"])
                assert answer.status_code == 503, answer.text
            except httpx2.TransportError:
                if victim and not victim.alive:
                    return None
            time.sleep(0.03)
        raise TimeoutError(f"{body} was not answered")

    def give(self, type_: str, payload: dict[str, Any] | None = None, **more: Any) -> str:
        """Enqueue a task at a tower that stays, and return its id."""
        task_id = self.ask(type_, payload, **more)
        assert task_id
        return task_id

    def give_to(self, victim: Life, type_: str, payload: dict[str, Any] | None = None, **more: Any) -> str:
        """Enqueue a task of which the victim may die before there is an answer, and return its id."""
        key = new_id()
        self.ask(type_, payload, victim=victim, idempotency_key=key, **more)
        return str(rows(self.url, f"SELECT id FROM task WHERE idempotency_key = '{key}'")[0]["id"])

    def payload(self, type_: str) -> dict[str, Any]:
        """Return what a task of this type is given: short work that shows what it did."""
        payloads: dict[str, dict[str, Any]] = {
            "echo": {"n": 1},
            "sleep": {"seconds": 0.5},
            "command": {"argv": ["sh", "-c", f"echo kept > kept.txt; exec {self.journaled(0.3)} fork"], "artifacts": ["kept.txt"]},
            "http": {"url": f"http://127.0.0.1:{self._web.server_address[1]}/"},
        }
        return payloads.get(type_, {})

    def journaled(self, seconds: float) -> str:
        """Return a command line that writes the journal and lasts so long."""
        return f"{sys.executable} -S -E {JOURNAL} {self.journal} {seconds}"

    def task(self, task_id: str) -> dict[str, Any]:
        """Return a task's row."""
        return rows(self.url, f"SELECT * FROM task WHERE id = '{task_id}'")[0]

    def wait_status(self, task_id: str, *statuses: str) -> None:
        """Wait until a task has one of these statuses."""
        named = f"SELECT 1 FROM task WHERE id = '{task_id}' AND status IN ({', '.join(map(repr, statuses))})"
        wait_for(f"{statuses} of {task_id}", lambda: rows(self.url, named), LONG_S)

    def settle(self) -> None:
        """Wait until every task is final and traced."""
        wait_for(f"the end of {unfinished(self.url)}", lambda: not unfinished(self.url), LONG_S)

    def step_clock(self, seconds: float) -> None:
        """Let the database's clock be so many seconds away from the machine's."""
        if self.postgres:
            self.postgres.execute(f"UPDATE public.chaos_clock SET seconds = {seconds}")
        else:
            beside = self.clock.with_suffix(".new")
            beside.write_text(str(seconds))
            beside.rename(self.clock)

    def check(self) -> Report:
        """Return what the checker found; raise AssertionError if a promise was broken."""
        report = check(self.url, self.traces, journal=self.journal, marks={MARK: self.run})
        assert report.broken == []
        return report


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@contextmanager
def lab(folder: Path, backend: str, *, database: Path | None = None) -> Iterator[Lab]:
    """Open a lab and close it."""
    made = Lab(folder, backend, database=database)
    try:
        yield made
    finally:
        made.close()

"""Real processes of the tower, for the acceptance tests."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from tests.chaos.checker import arrived, rows
from tests.servers import free_port, wait_for
from tower.terms import FINAL

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = Path(sys.executable).parent

#: Short enough for a test to see a lease run out.
QUICK = {"TOWER_LEASE_S": "3", "TOWER_BEAT_S": "0.3", "TOWER_SWEEP_S": "0.3", "TOWER_SHUTDOWN_GRACE_S": "1"}


class Process:
    """A process of the tower with its log."""

    def __init__(self, name: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.path = folder / f"{name}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TOWER_")}
        with self.path.open("ab") as log:
            self.popen = subprocess.Popen(
                command, cwd=folder, env={**clean, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def log(self) -> str:
        return self.path.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM, *, group: bool = False) -> int:
        """Send a signal, to the whole group if asked, and return the exit code."""
        if group:
            os.killpg(self.popen.pid, number)
        else:
            self.popen.send_signal(number)
        return self.popen.wait(40)

    def close(self) -> None:
        if self.popen.poll() is None:
            self.end(signal.SIGKILL, group=True)


class Stack:
    """A tower of real processes in a folder of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.environment = {"PORT": str(self.port), "TOWER_RUN_DIR": str(folder / "run"), **QUICK, **environment}
        self.processes: list[Process] = []
        # Connections are let go long before the server ends them after 5 s, which could meet a request on its way.
        limits = httpx2.Limits(keepalive_expiry=1)
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, limits=limits)

    def server(self) -> Process:
        """Start the server and wait until it answers."""
        made = self._start("server", [sys.executable, "-m", "devops_control_tower.main"])
        wait_for("the server", self._answers)
        return made

    def worker(self) -> Process:
        """Start `dramatiq tower.actors` with one process and wait until it is known."""
        made = self._start("worker", [str(PROGRAMS / "dramatiq"), "tower.actors", "--processes", "1", "--threads", "4"])
        wait_for("the worker", lambda: "worker started" in made.log)
        return made

    def _start(self, name: str, command: list[str]) -> Process:
        made = Process(f"{name}-{len(self.processes)}", command, self.folder, self.environment)
        self.processes.append(made)
        return made

    def _answers(self) -> bool:
        try:
            return self.client.get("/health").json() == {"status": "ok"}
        except httpx2.TransportError:
            return False

    def enqueue(self, type_: str, payload: dict[str, Any], **more: Any) -> str:
        """Return the id of a new task, also of one that was accepted by a server which a fault kills before it can answer."""
        try:
            answer = self.client.post("/tasks/enqueue", json={"type": type_, "payload": payload, **more})
        except httpx2.TransportError:
            if "TOWER_FAULT" not in self.environment:
                raise
            database = self.environment.get("DATABASE_URL", f"sqlite:///{self.folder / 'devops_control_tower.db'}")
            return max(arrived(database) + [row["id"] for row in rows(database, "SELECT id FROM task")])
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def enqueue_all(self, type_: str, count: int) -> list[str]:
        """Return the ids of as many new tasks, asked for at once."""
        answer = self.client.post("/tasks/enqueue/batch", json={"tasks": [{"type": type_, "payload": {}}] * count})
        assert answer.status_code == 202, answer.text
        return list(answer.json()["task_ids"])

    def task(self, task_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/tasks/{task_id}").json())

    def wait(self, task_id: str, condition: Callable[[dict[str, Any]], bool] | None = None, seconds: float = 30) -> dict[str, Any]:
        """Wait until a condition of the task holds; until it is final and traced if none is given."""
        wanted = condition or (lambda task: task["status"] in FINAL and task["trace_complete"])
        wait_for(f"{task_id}", lambda: wanted(self.task(task_id)), seconds)
        return self.task(task_id)

    def kinds(self, task_id: str) -> list[str]:
        return [event["kind"] for event in self.client.get(f"/tasks/{task_id}/events").json()["events"]]

    def close(self) -> None:
        self.client.close()
        for process in self.processes:
            process.close()

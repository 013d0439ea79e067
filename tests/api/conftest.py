"""Fixtures of the API's tests: one whole tower on each database for all of them, because starting one costs half a second."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dramatiq
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.conftest import BASE, KINDS, LOCAL, QUICK, Tower
from tests.servers import wait_for
from tower import db
from tower.api import create_app
from tower.api.wire import Wire
from tower.broker import Nudger
from tower.handler import Registry
from tower.main import build
from tower.models import Task
from tower.orchestrator import EnhancedOrchestrator
from tower.settings import Settings


@pytest.fixture(scope="package", params=KINDS)
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tower]:
    """A whole embedded tower, once on each database; its rows are shared by all tests here."""
    folder = tmp_path_factory.mktemp("api")
    url = f"sqlite:///{folder / 'tower.db'}"
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        server.execute("CREATE DATABASE api TEMPLATE migrated")
        url = server.url("api")
    settings = Settings(database_url=url, trace_dir=folder / "logs", **(QUICK | {"lease_s": 15}))
    with TestClient(build(settings), base_url=BASE, client=LOCAL) as client:
        tower = Tower(client, settings)
        wait_for("a worker", lambda: client.get("/health/ready").json()["workers"] > 0)
        yield tower
    if request.param == "postgres":
        server.execute("DROP DATABASE api WITH (FORCE)")


@pytest.fixture(scope="package")
def port(api: Tower) -> Iterator[int]:
    """The port of a real server before the same app, for what only sockets show."""
    with serving(api.client.app) as number:
        yield number


@contextmanager
def serving(app: Any, http: type[Wire] = Wire) -> Iterator[int]:
    """Run a real server before an app and give its port."""
    config = uvicorn.Config(app, http=http, port=0, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    wait_for("the server", lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


def bare_app(settings: Settings, registry: Registry | None = None, broker: dramatiq.Broker | None = None) -> FastAPI:
    """An app beside which nothing runs; it opens no database."""
    registry, broker = registry or Registry(), broker or dramatiq.get_broker()
    return create_app(settings, EnhancedOrchestrator(settings, registry, Nudger(broker)), registry, broker)


def forget_all_tasks() -> None:
    """Delete every task, so that a crowd of them does not keep the tower from those of the next test."""
    db.unit(lambda: Task.delete().execute())


def talk(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are and return status, headers and body of the answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        answer = connection.makefile("rb")
        status = int(answer.readline().split()[1])
        headers: dict[str, str] = {}
        while (line := answer.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        return status, headers, answer.read(int(headers.get("content-length", "0")))


def is_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    """Check that an answer is a problem document with this status and code, and return it."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    told: dict[str, Any] = answer.json()
    assert (told["status"], told["code"], told["type"]) == (status, code, "about:blank"), told
    assert told["title"] and told["detail"]
    return told


def count(api: Tower, requested_by: str) -> int:
    """Return how many tasks somebody has asked for."""
    found = api.client.get("/tasks", params={"limit": 500}).json()["tasks"]
    return sum(task["requested_by"] == requested_by for task in found)

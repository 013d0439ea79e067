"""Fixtures: settings for both databases, rows, and whole towers in this process."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from fastapi.testclient import TestClient

from tests.rows import Nudges
from tests.servers import Postgres, Redis, wait_for
from tower import db
from tower.main import build
from tower.models import ApiKey, Audit, Rule, Task, TaskStart, Worker
from tower.settings import Settings
from tower.terms import FINAL

BASE = "http://127.0.0.1"
#: Where its requests come from.
LOCAL = ("127.0.0.1", 50_000)
#: Short enough for tests to see a lease run out.
QUICK: dict[str, Any] = {"lease_s": 2.0, "beat_s": 0.2, "sweep_s": 0.2, "redis_url": None}

#: What a whole tower is tested on; the fast part of the suite leaves Postgres to the tests of rows.
KINDS = [pytest.param("sqlite"), pytest.param("postgres", marks=pytest.mark.slow)]

# How fast a loaded machine makes examples is no property of the tower.
hypothesis.settings.register_profile("tower", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("tower")

_names = itertools.count()

#: For `--hypothesis-profile=long`: half an hour of what the suite tries for seconds.
hypothesis.settings.register_profile(
    "long", max_examples=3000, stateful_step_count=100, deadline=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck)
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that start processes: they wait more than they work, and need something to be done beside them."""
    quick = {item.path for item in items if not item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path in quick)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A Postgres for the session; take a database of your own from `new_database`."""
    server = Postgres().start()
    server.execute("CREATE DATABASE migrated")
    db.open_database(Settings(database_url=server.url("migrated")))
    db.migrate()
    db.close_database()
    yield server
    server.close()


@pytest.fixture
def new_database(postgres: Postgres) -> Callable[[], str]:
    """Make a fresh, migrated Postgres database and return its URL."""

    def make() -> str:
        name = f"test_{next(_names)}"
        postgres.execute(f"CREATE DATABASE {name} TEMPLATE migrated")
        return postgres.url(name)

    return make


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis for the session."""
    server = Redis().start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def shared_database(postgres: Postgres) -> str:
    """A migrated Postgres database for tests that leave nothing running; `rows` empties it after each."""
    postgres.execute("CREATE DATABASE shared TEMPLATE migrated")
    return postgres.url("shared")


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of an embedded tower, once on SQLite and once on a Postgres database of its own."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'tower.db'}"
    else:
        url = request.getfixturevalue("new_database")()
    return Settings(database_url=url, trace_dir=tmp_path / "logs", **QUICK)


@pytest.fixture
def sqlite_settings(tmp_path: Path) -> Settings:
    """Settings of an embedded tower on SQLite, where the database does not matter."""
    return Settings(database_url=f"sqlite:///{tmp_path / 'tower.db'}", trace_dir=tmp_path / "logs", **QUICK)


@pytest.fixture(params=["sqlite", "postgres"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """An open, empty database of each kind; nothing runs.

    A process has one: to open or close it under a whole tower, as a module or package shares one, ends in a crash now and then.
    """
    assert "pulse" not in {thread.name for thread in threading.enumerate()}, "tests of rows stand in modules without a tower"
    is_sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path / 'tower.db'}" if is_sqlite else request.getfixturevalue("shared_database")
    settings = Settings(database_url=url, trace_dir=tmp_path / "logs", **QUICK)
    db.open_database(settings)
    db.migrate()
    yield settings
    if not is_sqlite:
        forget_all_rows()
    db.close_database()


def forget_all_rows() -> None:
    """Delete every task, start, rule and worker."""
    db.unit(lambda: [table.delete().execute() for table in (Task, TaskStart, Rule, Worker, ApiKey, Audit)])


@pytest.fixture
def nudges() -> Nudges:
    """What was sent to a broker that is not there."""
    return Nudges()


class Tower:
    """A whole embedded tower in this process, asked over HTTP."""

    def __init__(self, client: TestClient, settings: Settings) -> None:
        self.client = client
        self.settings = settings

    def enqueue(self, type_: str, payload: dict[str, Any] | None = None, **more: Any) -> str:
        answer = self.client.post("/tasks/enqueue", json={"type": type_, "payload": payload or {}, **more})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def task(self, task_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/tasks/{task_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(self, task_id: str, *statuses: str, seconds: float = 20) -> dict[str, Any]:
        """Wait until the task has one of the statuses; any final one if none is named."""
        wanted = statuses or FINAL
        wait_for(f"{wanted} of {task_id}", lambda: self.task(task_id)["status"] in wanted, seconds)
        return self.task(task_id)

    def traced(self, task_id: str) -> Path:
        """Wait until the task's folder is complete and return it."""
        wait_for(f"the trace of {task_id}", lambda: bool(self.task(task_id)["trace_complete"]))
        return self.settings.trace_dir / task_id

    def log(self, task_id: str) -> str:
        return str(self.client.get(f"/tasks/{task_id}/log").text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for `tower` on each database, one that asks for `sqlite_tower` on SQLite alone."""
    if "tower" in metafunc.fixturenames:
        kinds = KINDS[:1] if "sqlite_tower" in metafunc.fixturenames else KINDS
        metafunc.parametrize("tower", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tower]:
    """A whole embedded tower, shared by the tests of a module: one at a time, since a process has one database."""
    folder = tmp_path_factory.mktemp("tower")
    url = f"sqlite:///{folder / 'tower.db'}"
    if request.param == "postgres":
        server, name = request.getfixturevalue("postgres"), f"tower_{next(_names)}"
        server.execute(f"CREATE DATABASE {name} TEMPLATE migrated")
        url = server.url(name)
    settings = Settings(database_url=url, trace_dir=folder / "logs", **QUICK)
    with TestClient(build(settings), base_url=BASE, client=LOCAL) as client:
        yield _ready(Tower(client, settings))


@pytest.fixture
def sqlite_tower(tower: Tower) -> Tower:
    """The same on SQLite, where the database does not matter."""
    return tower


def _ready(tower: Tower) -> Tower:
    wait_for("a worker", lambda: tower.client.get("/health/ready").json()["workers"] > 0)
    return tower

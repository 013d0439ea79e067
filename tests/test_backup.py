"""Backup and restore: across databases, beside a running tower, and of files that are not whole."""

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests import rows as r
from tests.conftest import BASE, LOCAL, QUICK, Tower
from tests.servers import wait_for
from tower import audit, backup, db, keys, leases, lifecycle, views
from tower.backup import BackupError
from tower.keys import Caller
from tower.lifecycle import Outcome
from tower.main import build
from tower.models import TABLES, Decision, Rule, Task, TaskStart, Worker, new_id
from tower.settings import Settings
from tower.terms import FINAL

KEPT = [table for table in TABLES if table not in (Decision, Worker)]


@pytest.fixture
def database(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], Settings]]:
    """Open a new database of a kind, in place of the one that was open."""
    count = iter(range(100))

    def open_new(kind: str) -> Settings:
        url = f"sqlite:///{tmp_path / f'tower{next(count)}.db'}" if kind == "sqlite" else request.getfixturevalue("new_database")()
        db.close_database()
        settings = Settings(database_url=url, trace_dir=tmp_path / "logs", **QUICK)
        db.open_database(settings)
        db.migrate()
        return settings

    yield open_new
    db.close_database()


def rows_of_every_kind() -> None:
    """Make one of everything that a backup holds, with text and bytes that are not plain."""
    done = r.running(
        title="Grüße 🗼", labels={"team": "platform"}, payload='{"x":"\\u2028 \\""}', rate_key="api", rate_limit=3, rate_per_s=60.0
    )
    db.unit(lambda: leases.append_log(done, 0, "eins\nzwei 🗼\n"))
    db.unit(lambda: leases.keep_artifact(done, "a/b.bin", 0, bytes(range(256))))
    db.unit(lambda: lifecycle.finish(done, Outcome("succeeded", result='{"n":1.5}'), new_id()))
    r.running(worker="of another life", max_losses=1)
    r.insert(concurrency_key="repo", parent_id=done.id, not_before=4e9)
    db.unit(lambda: Rule.insert(kind="queue", name="default", max_running=3, updated_at=db.now()).execute())
    db.unit(lambda: keys.create("ci", "operator", types=["echo"], labels={"team": "platform"}, expires_at=4e9, by="bootstrap"))
    db.unit(lambda: views.save(Caller("ci", "operator", "twr_0000000000"), "what failed", "status=failed&label=team%3Aplatform"))
    db.unit(lambda: audit.note("ci", "POST /pause", "reason=Grüße", "127.0.0.1"))
    db.unit(lambda: TaskStart.insert(rate_key="api", at=1.25, task_id=done.id).on_conflict_ignore().execute())


def everything() -> dict[str, list[dict[str, Any]]]:
    """Return every row but what a new life sets anew."""
    anew = {"traced_seq", "traced_bytes", "trace_tries", "trace_due_at", "trace_error", "nudge_at"}
    found = {}
    for table in KEPT:
        rows = [
            {name: bytes(value) if isinstance(value, memoryview) else value for name, value in row.items() if name not in anew}
            for row in db.read(lambda table=table: list(table.select().dicts()))  # type: ignore[misc]
        ]
        found[table.__name__] = sorted(rows, key=repr)
    return found


def made(tmp_path: Path, database: Callable[[str], Settings], kind: str = "sqlite") -> Path:
    database(kind)
    rows_of_every_kind()
    place = tmp_path / "tower.tar.gz"
    backup.backup(place)
    return place


@pytest.mark.parametrize(
    ("kind", "other"), [("sqlite", "sqlite"), ("sqlite", "postgres"), ("postgres", "sqlite"), ("postgres", "postgres")]
)
def test_a_restored_database_holds_what_was_backed_up(tmp_path: Path, database: Callable[[str], Settings], kind: str, other: str) -> None:
    """Every row of every table, on either database; folders and messages are made anew."""
    place = made(tmp_path, database, kind)
    before = everything()
    assert all(before.values())
    manifest = backup.restore(place, database(other))
    assert everything() == before
    assert {name: table["rows"] for name, table in manifest["tables"].items()} == {
        table._meta.table_name: len(before[table.__name__]) for table in KEPT
    }
    assert db.read(lambda: Task.select().where(Task.traced_seq > 0).count()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_tower_goes_on_with_what_was_backed_up_while_it_ran(tmp_path: Path, database: Callable[[str], Settings], kind: str) -> None:
    """Tasks come in and run meanwhile; each that is in the backup reaches its end in the new life, traced; what may run once ran once."""
    settings = database(kind)
    db.close_database()
    place, stop = tmp_path / "tower.tar.gz", threading.Event()
    with TestClient(build(settings), base_url=BASE, client=LOCAL) as client:
        tower = Tower(client, settings)
        first = tower.enqueue("echo", {"n": 0})
        tower.wait(first)
        sleeping = tower.enqueue("sleep", {"seconds": 300})
        once = tower.enqueue("sleep", {"seconds": 300}, max_attempts=1)
        for running in (sleeping, once):
            tower.wait(running, "running")

        def keep_busy() -> None:
            while not stop.is_set():
                tower.enqueue("echo", {"x": "y" * 2000})

        busy = threading.Thread(target=keep_busy)
        busy.start()
        manifest = backup.backup(place)
        stop.set()
        busy.join()
        for running in (sleeping, once):
            tower.client.post(f"/tasks/{running}/cancel")
    settings = database("sqlite").model_copy(update={"trace_dir": tmp_path / "new logs"})
    backup.restore(place, settings)
    db.unit(lambda: Task.update(payload='{"seconds": 0.1}').where(Task.id == sleeping).execute())
    db.close_database()
    with TestClient(build(settings), base_url=BASE, client=LOCAL) as client:
        tower = Tower(client, settings)
        ids = [task["id"] for task in client.get("/tasks", params={"limit": 500}).json()["tasks"]]
        assert len(ids) == manifest["tables"]["task"]["rows"] >= 2
        wait_for("the end of all", lambda: all(tower.task(task_id)["status"] in FINAL for task_id in ids), 60)
        assert (tower.task(sleeping)["status"], tower.task(sleeping)["attempt"]) == ("succeeded", 2)
        assert (tower.task(once)["error"]["code"], tower.task(once)["attempt"]) == ("worker_lost", 1)
        assert json.loads((tower.traced(first) / "output.json").read_text())["result"] == {"n": 0}


def test_a_file_is_never_replaced(tmp_path: Path, database: Callable[[str], Settings]) -> None:
    """And nothing is left beside it."""
    place = made(tmp_path, database)
    before = place.read_bytes()
    with pytest.raises(BackupError, match="already"):
        backup.backup(place)
    assert place.read_bytes() == before
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".new")] == []


def changed(place: Path, how: str) -> None:
    """Damage a backup."""
    data = place.read_bytes()
    if how == "cut":
        place.write_bytes(data[: len(data) // 2])
        return
    members: dict[str, bytes] = {}
    with tarfile.open(place) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file
            members[member.name] = file.read()
    if how == "a byte":
        members["task.jsonl"] = members["task.jsonl"].replace(b"platform", b"plotform")
    elif how == "no manifest":
        del members["manifest.json"]
    else:
        told = json.loads(members["manifest.json"])
        told["schema"] = [*told["schema"], "9999_future"] if how == "newer" else told["schema"]
        if how == "older":
            told["schema"].remove("0004_lanes")
            columns = told["tables"]["task"]["columns"]
            at = columns.index("lane")
            rows = [json.loads(line) for line in members["task.jsonl"].splitlines()]
            members["task.jsonl"] = b"".join(json.dumps(row[:at] + row[at + 1 :]).encode() + b"\n" for row in rows)
            columns.remove("lane")
            told["tables"]["task"]["sha256"] = hashlib.sha256(members["task.jsonl"]).hexdigest()
        told["format"] = 99 if how == "other format" else told["format"]
        told["tables"] |= {"stranger": {"columns": [], "rows": 0, "sha256": ""}} if how == "a stranger" else {}
        members["manifest.json"] = json.dumps(told).encode()
    with tarfile.open(place, "w:gz") as tar:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "damaged"),
        ("a byte", "task.jsonl is not what its manifest says"),
        ("no manifest", "no whole backup"),
        ("newer", "newer tower"),
        ("other format", "no whole backup"),
        ("a stranger", "no whole backup"),
    ],
)
def test_what_is_not_a_whole_backup_changes_nothing(tmp_path: Path, database: Callable[[str], Settings], how: str, said: str) -> None:
    """It is said what is wrong with it."""
    place = made(tmp_path, database)
    changed(place, how)
    settings = database("sqlite")
    with pytest.raises(BackupError, match=said):
        backup.restore(place, settings)
    assert not any(everything().values())


def test_no_changed_byte_goes_unnoticed(tmp_path: Path, database: Callable[[str], Settings]) -> None:
    """Wherever it stands: the file is refused, or it says the same."""
    place = made(tmp_path, database)
    whole, told = place.read_bytes(), backup._verified(place)
    for at in range(0, len(whole), 37):
        place.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with contextlib.suppress(BackupError):
            assert backup._verified(place) == told
        place.write_bytes(whole[:at])
        with pytest.raises(BackupError):
            backup._verified(place)


def test_a_backup_of_an_older_tower_is_taken(tmp_path: Path, database: Callable[[str], Settings]) -> None:
    """Without the columns that came later; its waiting tasks start all the same."""
    place = made(tmp_path, database)
    changed(place, "older")
    backup.restore(place, database("sqlite"))
    assert db.read(lambda: Task.select().where(Task.lane == "").count()) == 0


def test_a_file_that_is_none_is_refused(tmp_path: Path, database: Callable[[str], Settings]) -> None:
    """A missing one, and one of something else."""
    settings = database("sqlite")
    with pytest.raises(BackupError, match="There is no file"):
        backup.restore(tmp_path / "none", settings)
    (tmp_path / "other").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(BackupError, match=r"no whole backup|damaged"):
        backup.restore(tmp_path / "other", settings)


@pytest.mark.parametrize("used", ["task", "worker"])
def test_nothing_is_restored_into_a_database_in_use(tmp_path: Path, database: Callable[[str], Settings], used: str) -> None:
    """One that holds a task, or on which a tower runs."""
    place = made(tmp_path, database)
    settings = database("sqlite")
    if used == "task":
        r.insert()
    else:
        r.add_worker()
    before = everything()
    with pytest.raises(BackupError, match="not empty" if used == "task" else "stop it first"):
        backup.restore(place, settings)
    assert everything() == before


def test_a_database_that_is_refused_is_not_even_migrated(tmp_path: Path, database: Callable[[str], Settings]) -> None:
    """A wrong DATABASE_URL must not upgrade somebody's database."""
    place = made(tmp_path, database)
    settings = database("sqlite")
    r.insert()
    db.unit(lambda: db.database.execute_sql("DELETE FROM schema_migration WHERE name LIKE '0004%'"))
    with pytest.raises(BackupError, match="not empty"):
        backup.restore(place, settings)
    steps = db.read(lambda: [row[0] for row in db.database.execute_sql("SELECT name FROM schema_migration").fetchall()])
    assert not [name for name in steps if name.startswith("0004")]


def test_a_restore_that_breaks_off_leaves_nothing(tmp_path: Path, database: Callable[[str], Settings]) -> None:
    """It is one transaction."""
    place = made(tmp_path, database)
    settings = database("sqlite")

    def break_off(table: str, count: int) -> None:
        if table == "task_event":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backup.restore(place, settings, break_off)
    assert not any(everything().values())

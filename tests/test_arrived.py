"""On SQLite a task that comes alone only arrives; whoever looks at tasks enters it, and sees it."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from actors.orchestrator import Dispatcher
from tests import rows as r
from tests.engine import OWN
from tower import backup, db, lifecycle, queries
from tower.api.access import check_task
from tower.errors import NotFound, Unavailable
from tower.keys import Caller
from tower.models import Task
from tower.settings import Settings
from tower.terms import CANCELLED, QUEUED


@pytest.fixture(autouse=True)
def place(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An open, empty database, for which nobody is waited long; the path of its file."""
    db.open_database(sqlite_settings)
    db.migrate()
    monkeypatch.setattr("tower.turns.STUCK_S", 0.05)
    monkeypatch.setattr("tower.db.STUCK_S", 0.05)
    monkeypatch.setattr("tower.sqlite._WAIT_MS", 100)
    yield Path(sqlite_settings.database_url.removeprefix("sqlite:///"))
    db.close_database()


def arrive(times: int = 1, **fields: Any) -> str:
    """Let a task arrive, more than once if the answer to its commit was lost; return its id."""
    task = r.new(**fields)
    for _ in range(times):
        db.unit(lambda: lifecycle.enter([task]), is_one_statement=lifecycle.is_one_entry([task]), sees_arrived=False)
    return task.id


def counted(place: Path, table: str) -> int:
    """Return how many rows there are, as somebody else sees it."""
    with closing(sqlite3.connect(place)) as other:
        return int(other.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0])


@pytest.mark.parametrize(
    "look",
    [
        lambda task_id: r.row(task_id)["status"] == QUEUED,
        lambda task_id: db.read(lambda: Task.select().where(Task.status == QUEUED).count()) == 1,
        lambda task_id: db.read(lambda: queries.progress_of([task_id])) == {task_id: (QUEUED, 1)},
        lambda task_id: db.unit(lambda: lifecycle.cancel(task_id, None)) == CANCELLED,
    ],
    ids=["by its id", "in a list", "in a crowd", "to change it"],
)
def test_whoever_looks_sees_what_has_arrived(place: Path, look: Callable[[str], bool]) -> None:
    """Though no pass was made since."""
    task_id = arrive()
    assert (counted(place, "task_arrived"), counted(place, "task")) == (1, 0)
    assert look(task_id)
    assert (counted(place, "task_arrived"), counted(place, "task"), counted(place, "task_label")) == (0, 1, 0)


def test_a_task_that_has_arrived_is_entered_as_any_other() -> None:
    """Its row, with the same values in the same types, and its first event."""
    fields = {
        "type": "echo",
        "payload": '{"text": "ä"}',
        "priority": 7,
        "max_attempts": 4,
        "max_losses": 1,
        "timeout_s": 9.5,
        "actor": "ann",
    }
    arrived, direct = arrive(**fields), r.new(**fields)
    came_at = db.read(lambda: db.rows("SELECT created_at FROM task_arrived"), sees_arrived=False)[0]["created_at"]
    time.sleep(0.02)  # its times are not those of the moment at which it is entered
    db.unit(lambda: lifecycle.insert([direct]))
    first, second = (r.row(task_id) for task_id in (arrived, direct.id))
    assert [(name, first[name], type(first[name])) for name in first if name not in OWN] == [
        (name, second[name], type(second[name])) for name in second if name not in OWN
    ]
    for name in ("rank", "trace_due_at", "nudge_at", "queued_at", "updated_at"):
        assert first[name] - first["created_at"] == pytest.approx(second[name] - second["created_at"], abs=1e-3)
    assert first["correlation_id"] == first["id"]
    events = [db.read(lambda task_id=task_id: queries.events(task_id)) for task_id in (arrived, direct.id)]
    assert [[(e["seq"], e["attempt"], e["kind"], e["data"]) for e in of_one] for of_one in events] == [
        [(1, 0, "queued", events[1][0]["data"])]
    ] * 2
    assert events[0][0]["at"] == first["created_at"] == came_at


@pytest.mark.parametrize(
    "more",
    [
        *({"labels": {"env": "a"}}, {"title": "t"}, {"requested_by": "b"}, {"not_before": 2e9}, {"expires_at": 2e9}),
        *({"concurrency_key": "k"}, {"silence_s": 3.0}, {"rate_key": "k", "rate_limit": 2, "rate_per_s": 3.0}),
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_brings_more_along_is_entered_at_once(place: Path, more: dict[str, Any]) -> None:
    """There is no column for it where tasks arrive."""
    task_id = arrive(**more)
    assert (counted(place, "task_arrived"), counted(place, "task")) == (0, 1)
    row = r.row(task_id)
    assert {name: json.loads(row[name]) if name == "labels" else row[name] for name in more} == more


def test_a_task_that_arrives_twice_is_entered_once(place: Path) -> None:
    """After a commit whose answer was lost, before or after it was entered."""
    task = arrive(times=2)
    assert counted(place, "task_arrived") == 2
    assert r.kinds(task) == [QUEUED]
    arrive(id=task)
    assert r.kinds(task) == [QUEUED]
    assert (counted(place, "task_arrived"), counted(place, "task")) == (0, 1)


def test_tasks_keep_the_order_in_which_they_arrived() -> None:
    """And a priority is a head start."""
    ids = [arrive(priority=priority) for priority in (0, 0, 5)]
    found = db.read(lambda: [row.id for row in Task.select().order_by(Task.rank, Task.id)])
    assert found == [ids[2], *ids[:2]]


def test_a_pass_enters_what_has_arrived(sqlite_settings: Settings, place: Path) -> None:
    """Though all that it reads is read in turn with what is written."""
    arrive()
    Dispatcher(sqlite_settings, r.Nudges()).run_pass()  # type: ignore[arg-type]
    assert (counted(place, "task_arrived"), counted(place, "task")) == (0, 1)


def test_who_cannot_enter_it_still_reads(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else holds the lock: lists show what there was, and nobody is told that an accepted task does not exist."""
    before, task_id = r.insert(), arrive()
    with closing(sqlite3.connect(place)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert db.read(lambda: [row.id for row in Task.select()]) == [before]
        with monkeypatch.context() as nobody:  # once that is known nobody tries again
            nobody.setattr(db.database.obj, "enter_arrived", pytest.fail)
            assert db.read(lambda: Task.select().count()) == 1
        with pytest.raises(Unavailable, match=rf"{task_id}.* is accepted.*lock"):
            r.row(task_id)
        with pytest.raises(NotFound):
            r.row("0" * 32)
        other.rollback()
    r.insert()  # so it is known that writing works
    assert r.kinds(task_id) == [QUEUED]


def test_a_task_that_is_entered_while_it_is_looked_for_is_not_called_unknown() -> None:
    """It was not there at first, and has not only arrived after that."""
    task_id = arrive()
    db.enter_arrived()
    assert isinstance(db.read(lambda: queries.missing(task_id)), Unavailable)
    assert isinstance(db.read(lambda: queries.missing("0" * 32)), NotFound)


def test_who_stands_behind_one_that_is_stuck_reads(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment, and whoever comes after that goes straight on: here one would wait for ever."""
    monkeypatch.setattr("tower.turns._PATIENCE_S", 60.0)
    task_id, is_stuck, goes_on = arrive(), threading.Event(), threading.Event()

    def be_stuck() -> None:
        with db._turn(20.0, writing=True):
            is_stuck.set()
            goes_on.wait(20)

    stuck = threading.Thread(target=be_stuck)
    stuck.start()
    assert is_stuck.wait(20)
    try:
        assert db.read(lambda: Task.select().count()) == 0
        with monkeypatch.context() as nobody:
            nobody.setattr(db._writer, "acquire", pytest.fail)
            assert db.read(lambda: Task.select().count()) == 0
        with pytest.raises(Unavailable, match=r"is accepted, and cannot be shown yet; ask again\. It could not be entered"):
            r.row(task_id)
        with pytest.raises(NotFound):
            db.read(lambda: check_task(Caller("ann", "viewer", types=("sleep",)), task_id))
        db.read(lambda: check_task(Caller("ann", "viewer", types=("echo",)), task_id))
    finally:
        goes_on.set()
        stuck.join()
    db._writer._avoided_until = 0.0
    assert r.kinds(task_id) == [QUEUED]


def test_who_stands_behind_others_that_get_on_waits_for_his_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long they take together."""
    monkeypatch.setattr("tower.turns._PATIENCE_S", 20.0)
    monkeypatch.setattr("tower.turns.STUCK_S", 5.0)
    task_id, has_begun, is_done = arrive(), threading.Event(), threading.Event()

    def write() -> None:
        while not is_done.is_set():
            with db._turn(20.0, writing=True):
                has_begun.set()
                time.sleep(0.02)

    other = threading.Thread(target=write)
    other.start()
    assert has_begun.wait(20)
    threading.Timer(0.3, is_done.set).start()
    assert r.kinds(task_id) == [QUEUED]
    other.join()


def test_it_outlives_the_process(sqlite_settings: Settings) -> None:
    """The next one that looks enters it."""
    task_id = arrive()
    db.close_database()
    db.open_existing(sqlite_settings)
    assert r.kinds(task_id) == [QUEUED]


def test_it_is_in_a_backup(place: Path, tmp_path: Path) -> None:
    """That was begun after it had arrived."""
    r.insert()
    task_id = arrive(times=2)
    with closing(sqlite3.connect(place)) as other:  # nothing has to be written for that
        other.execute("BEGIN IMMEDIATE")
        told = backup.backup(tmp_path / "kept.tar")["tables"]
        other.rollback()
    assert (told["task"]["rows"], told["task_event"]["rows"]) == (2, 2)
    due = {"nudge_at": 0.0, "trace_due_at": 0.0}  # a restored task is due at once
    was = {**r.row(task_id), "events": db.read(lambda: queries.events(task_id)), **due}
    db.close_database()
    db.open_database(Settings(database_url=f"sqlite:///{tmp_path / 'other.db'}"))
    backup.restore(tmp_path / "kept.tar", Settings(database_url=f"sqlite:///{tmp_path / 'other.db'}"))
    assert {**r.row(task_id), "events": db.read(lambda: queries.events(task_id))} == was
    assert counted(tmp_path / "other.db", "task_arrived") == 0


def test_before_there_are_tables_nothing_has_arrived(tmp_path: Path) -> None:
    """Whoever looks is told what he was told before."""
    db.close_database()
    db.open_database(Settings(database_url=f"sqlite:///{tmp_path / 'empty.db'}"))
    assert not db.has_tables()
    with pytest.raises(Unavailable, match="not prepared"):
        db.read(lambda: Task.select().count())

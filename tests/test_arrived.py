"""A task that comes alone only arrives; whoever looks at tasks enters it, and sees it, or it starts from there."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from actors.handlers import load as load_handlers
from actors.orchestrator import Dispatcher
from actors.walk import look
from tests import rows as r
from tests.chaos.checker import rows
from tests.engine import OWN
from tests.servers import wait_for
from tower import backup, db, lifecycle, load, queries, why
from tower.api.access import check_task
from tower.arrived import ENTRY
from tower.errors import NotFound, Unavailable
from tower.keys import Caller
from tower.leases import Claim
from tower.models import Task, new_id
from tower.reminders import NUDGE_S, TRACE_S
from tower.rules import Rules
from tower.settings import Settings
from tower.sweep import Sweep
from tower.terms import CANCELLED, DISPATCHED, QUEUED


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for others."""
    monkeypatch.setattr("tower.turns.STUCK_S", 0.05)
    monkeypatch.setattr("tower.db.STUCK_S", 0.05)
    monkeypatch.setattr("tower.sqlite._WAIT_MS", 100)


@pytest.fixture
def place(settings: Settings) -> Iterator[str]:
    """An open, empty database of each kind; its address."""
    with _opened(settings):
        yield settings.database_url


@pytest.fixture
def file(sqlite_settings: Settings) -> Iterator[Path]:
    """An open, empty database of SQLite; the path of its file."""
    with _opened(sqlite_settings):
        yield Path(sqlite_settings.database_url.removeprefix("sqlite:///"))


@contextmanager
def _opened(settings: Settings) -> Iterator[None]:
    db.open_database(settings)
    db.migrate()
    yield
    db.close_database()


@pytest.fixture
def postgres_place(new_database: Callable[[], str]) -> Iterator[str]:
    """An open, empty database of Postgres; its address."""
    url = new_database()
    with _opened(Settings(database_url=url)):
        yield url


def arrive(times: int = 1, **fields: Any) -> str:
    """Let a task arrive, more than once if the answer to its commit was lost; return its id."""
    task = r.new(**fields)
    for _ in range(times):
        db.unit(lambda: lifecycle.enter([task]), is_one_statement=lifecycle.is_one_entry([task]), sees_arrived=False)
    return task.id


def counted(url: str, table: str) -> int:
    """Return how many rows there are, as somebody else sees it."""
    return int(rows(url, f"SELECT COUNT(*) AS count FROM {table}")[0]["count"])


def there(url: str) -> tuple[int, int]:
    """Return how many tasks have arrived, and how many were entered."""
    return counted(url, "task_arrived"), counted(url, "task")


@contextmanager
def nobody_writes(url: str) -> Iterator[None]:
    """Hold the tasks meanwhile."""
    is_sqlite = url.startswith("sqlite")
    with closing(sqlite3.connect(url.removeprefix("sqlite:///")) if is_sqlite else psycopg2.connect(url)) as other:
        other.cursor().execute("BEGIN IMMEDIATE" if is_sqlite else "LOCK TABLE task IN EXCLUSIVE MODE")
        yield
        other.rollback()


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
def test_whoever_looks_sees_what_has_arrived(place: str, look: Callable[[str], bool]) -> None:
    """Though no pass was made since."""
    task_id = arrive()
    assert there(place) == (1, 0)
    assert look(task_id)
    assert there(place) == (0, 1)
    assert counted(place, "task_label") == 0


@pytest.mark.usefixtures("place")
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
def test_what_brings_more_along_is_entered_at_once(place: str, more: dict[str, Any]) -> None:
    """There is no column for it where tasks arrive."""
    task_id = arrive(**more)
    assert there(place) == (0, 1)
    row = r.row(task_id)
    assert {name: json.loads(row[name]) if name == "labels" else row[name] for name in more} == more


def test_a_task_that_arrives_twice_is_entered_once(place: str) -> None:
    """After a commit whose answer was lost, before or after it was entered."""
    task = arrive(times=2)
    assert counted(place, "task_arrived") == 2
    assert r.kinds(task) == [QUEUED]
    arrive(id=task)
    assert r.kinds(task) == [QUEUED]
    assert there(place) == (0, 1)


@pytest.mark.usefixtures("place")
def test_tasks_keep_the_order_in_which_they_arrived() -> None:
    """And a priority is a head start."""
    ids = [arrive(priority=priority) for priority in (0, 0, 5)]
    found = db.read(lambda: [row.id for row in Task.select().order_by(Task.rank, Task.id)])
    assert found == [ids[2], *ids[:2]]


def test_a_pass_enters_what_has_arrived(sqlite_settings: Settings, file: Path) -> None:
    """Though all that it reads is read in turn with what is written."""
    arrive()
    Dispatcher(sqlite_settings, r.Nudges()).run_pass()  # type: ignore[arg-type]
    assert there(f"sqlite:///{file}") == (0, 1)


def test_who_cannot_enter_it_still_reads(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else holds the lock: lists show what there was, and nobody is told that an accepted task does not exist."""
    before, task_id = r.insert(), arrive()
    with nobody_writes(place):
        assert db.read(lambda: [row.id for row in Task.select()]) == [before]
        with monkeypatch.context() as nobody:  # once that is known nobody tries again
            nobody.setattr(db.database.obj, "enter_arrived", pytest.fail)
            assert db.read(lambda: Task.select().count()) == 1
        with pytest.raises(Unavailable, match=rf"{task_id}.* is accepted.*lock"):
            r.row(task_id)
        with pytest.raises(NotFound):
            r.row("0" * 32)
    r.insert()  # so it is known that writing works
    assert r.kinds(task_id) == [QUEUED]


@pytest.mark.usefixtures("place")
def test_a_task_that_is_entered_while_it_is_looked_for_is_not_called_unknown() -> None:
    """It was not there at first, and has not only arrived after that."""
    task_id = arrive()
    db.enter_arrived()
    assert isinstance(db.read(lambda: queries.missing(task_id)), Unavailable)
    assert isinstance(db.read(lambda: queries.missing("0" * 32)), NotFound)


def test_who_stands_behind_one_that_is_stuck_reads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.usefixtures("file")
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


@pytest.mark.usefixtures("place")
def test_it_outlives_the_process(settings: Settings) -> None:
    """The next one that looks enters it."""
    task_id = arrive()
    db.close_database()
    db.open_existing(settings)
    assert r.kinds(task_id) == [QUEUED]


def test_it_is_in_a_backup(place: str, tmp_path: Path) -> None:
    """That was begun after it had arrived; nothing has to be written for that."""
    arrive(id=r.insert())  # it is there already
    task_id = arrive(times=2, priority=3, actor="ann")
    with nobody_writes(place):
        told = backup.backup(tmp_path / "kept.tar")["tables"]
    assert (told["task"]["rows"], told["task_event"]["rows"]) == (2, 2)
    due = {"nudge_at": 0.0, "trace_due_at": 0.0}  # a restored task is due at once
    was = {**r.row(task_id), "events": db.read(lambda: queries.events(task_id)), **due}
    db.close_database()
    url = f"sqlite:///{tmp_path / 'other.db'}"
    db.open_database(Settings(database_url=url))
    backup.restore(tmp_path / "kept.tar", Settings(database_url=url))
    assert {**r.row(task_id), "events": db.read(lambda: queries.events(task_id))} == was
    assert counted(url, "task_arrived") == 0


def test_before_there_are_tables_nothing_has_arrived(tmp_path: Path) -> None:
    """Whoever looks is told what he was told before."""
    db.close_database()
    db.open_database(Settings(database_url=f"sqlite:///{tmp_path / 'empty.db'}"))
    assert not db.has_tables()
    with pytest.raises(Unavailable, match="not prepared"):
        db.read(lambda: Task.select().count())


# On Postgres it starts from where it has arrived.


def test_who_writes_something_else_does_not_wait_for_the_table_of_tasks(postgres_place: str) -> None:
    """Whoever wants to pause what is wrong, say."""
    with nobody_writes(postgres_place):
        arrive()
        assert Rules(load_handlers(), r.Nudges()).pause("type", "echo")  # type: ignore[arg-type]
    assert there(postgres_place) == (1, 0)


@pytest.mark.usefixtures("postgres_place")
def test_who_writes_something_else_enters_what_has_arrived_if_that_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No longer than who only reads, whatever others wait for a lock."""
    arrive()
    told, ask = list[dict[str, str]](), "SELECT current_setting('lock_timeout') AS waits"
    monkeypatch.setattr(db.database.obj, "enter_arrived", lambda: told.extend(db.rows(ask)))
    db.unit(lambda: None)
    assert told == [{"waits": "50ms"}]


def test_a_large_payload_is_not_written_twice(place: str) -> None:
    """It is entered at once."""
    arrive(payload=json.dumps("x" * 1498))
    assert there(place) == (1, 0)
    db.enter_arrived()
    arrive(payload=json.dumps("x" * 1499))
    assert there(place) == (0, 2)


#: What each attempt has of its own.
_OF_ATTEMPT = ("claim_token", "started_at", "dispatched_at")


def places() -> dict[str, str]:
    """Return where tasks have arrived."""
    found = db.read(lambda: db.rows("SELECT id, CAST(ctid AS text) AS place FROM task_arrived"), sees_arrived=False)
    return {row["id"]: row["place"] for row in found}


def start(*ids: str, token: int | None = None, seen: dict[str, str] | None = None) -> list[Claim]:
    """Start tasks by a decision that is made now, or by an earlier one, where they are now, or were seen before."""
    decided = db.read(load.read, in_turn=True).token if token is None else token
    begin = partial(lifecycle.start, ids, decided, "w1", new_id(), None, places() if seen is None else seen)
    return db.unit(begin, is_one_statement=True, sees_arrived=False)


def chosen(ahead: float = 0.25, *, with_lanes: bool = True) -> list[str]:
    """Return what a walk chooses now."""

    def choose() -> list[str]:
        walk = look(30, ahead, with_lanes=with_lanes)
        while walk.goes_on:
            walk.step()
        return walk.chosen

    return db.read(choose, in_turn=True)


@pytest.mark.usefixtures("postgres_place")
def test_a_task_that_starts_from_where_it_has_arrived_is_as_any_other() -> None:
    """Its row, its events, and what its worker is told."""
    fields = {"payload": '{"text": "ä"}', "priority": 7, "max_attempts": 4, "timeout_s": 9.5, "actor": "ann"}
    first, second = arrive(**fields), arrive(**fields)
    came_at = {row["id"]: row["created_at"] for row in db.read(lambda: db.rows("SELECT * FROM task_arrived"), sees_arrived=False)}
    [from_there] = start(first)
    assert db.read(lambda: Task.select().count()) == 2
    [entered] = start(second)
    own = {"id", "token", "started_at"}
    assert [value for name, value in from_there._asdict().items() if name not in own] == [
        value for name, value in entered._asdict().items() if name not in own
    ]
    rows_of = [r.row(task_id) for task_id in (first, second)]
    assert [(name, rows_of[0][name]) for name in rows_of[0] if name not in (*OWN, *_OF_ATTEMPT)] == [
        (name, rows_of[1][name]) for name in rows_of[1] if name not in (*OWN, *_OF_ATTEMPT)
    ]
    for row in rows_of:
        assert row["created_at"] == row["queued_at"] == came_at[row["id"]]
        assert row["created_at"] < row["started_at"]
        later = {"dispatched_at": 0, "updated_at": 0, "trace_due_at": TRACE_S, "nudge_at": NUDGE_S}
        assert {name: row[name] - row["started_at"] for name in later} == pytest.approx(later, abs=1e-3)
        told = db.read(lambda row=row: queries.events(row["id"]))
        assert [(event["seq"], event["attempt"], event["kind"], event["data"]) for event in told] == [
            (1, 0, QUEUED, '{"by":"ann"}'),
            (2, 0, DISPATCHED, "{}"),
            (3, 1, "started", '{"worker":"w1"}'),
        ]
        assert [event["at"] for event in told] == [row["created_at"], row["updated_at"], row["updated_at"]]


def test_a_task_that_arrives_twice_starts_once(postgres_place: str) -> None:
    """Whether the second comes before it or after it; it is not there for long."""
    task_id = arrive(times=2)
    assert [claim.id for claim in start(task_id)] == [task_id]
    assert there(postgres_place) == (1, 1)
    assert start(task_id) == []
    assert there(postgres_place) == (0, 1)
    arrive(id=task_id)
    assert r.kinds(task_id) == [QUEUED, DISPATCHED, "started"]
    assert there(postgres_place) == (0, 1)


def test_those_that_were_entered_start_with_those_that_were_not(postgres_place: str) -> None:
    """By one statement, in one order."""
    entered = [arrive(priority=1), arrive(priority=3)]
    seen = places()
    assert db.read(lambda: Task.select().count()) == 2
    arrived = [arrive(priority=0), arrive(priority=2)]
    assert [claim.id for claim in start(*entered, *arrived, seen=seen | places())] == [entered[1], arrived[1], entered[0], arrived[0]]
    assert there(postgres_place) == (0, 4)


def test_another_task_in_the_place_of_one_does_not_start(postgres_place: str) -> None:
    """What has left a place was removed from it, and somebody else came there."""
    first, other = arrive(), r.new()
    seen = places()
    db.enter_arrived()
    db.unit(lambda: db.database.execute_sql("VACUUM task_arrived"), is_one_statement=True, sees_arrived=False)
    arrive(id=other.id)
    assert places() == {other.id: seen[first]}
    assert [claim.id for claim in start(first, seen=seen)] == [first]
    assert start(first, other.id, seen={other.id: "(0,9)"}) == []
    assert there(postgres_place) == (1, 1)


def test_nothing_starts_from_there_once_something_else_was_decided(postgres_place: str) -> None:
    """It stays where it is."""
    before = db.read(load.read).token
    db.unit(lifecycle.void_decisions)
    task_id = arrive()
    assert start(task_id, token=before) == []
    assert there(postgres_place) == (1, 0)
    assert [claim.id for claim in start(task_id)] == [task_id]


def test_who_starts_does_not_wait_for_one_that_somebody_is_entering(postgres_place: str) -> None:
    """Who enters it may wait for others in turn."""
    first, second = arrive(), arrive()
    with closing(psycopg2.connect(postgres_place)) as other, other.cursor() as cursor:
        cursor.execute("DELETE FROM task_arrived WHERE id = %s", (first,))
        assert [claim.id for claim in start(first, second)] == [second]
        other.rollback()
    assert [claim.id for claim in start(first)] == [first]


def test_who_looks_while_it_starts_sees_it_started(postgres_place: str) -> None:
    """He waits for the commit of whoever is about to start it."""
    task_id, seen = arrive(), list[int]()
    with closing(psycopg2.connect(postgres_place)) as other, other.cursor() as cursor:
        cursor.execute(ENTRY)
        looking = threading.Thread(target=lambda: seen.append(db.read(lambda: Task.select().count())))
        looking.start()
        wait_for("him to wait", lambda: bool(rows(postgres_place, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'")))
        other.commit()
        looking.join()
    assert seen == [1]
    assert r.kinds(task_id) == [QUEUED]


def test_tasks_that_have_arrived_start_in_one_order_with_all_that_wait(postgres_place: str) -> None:
    """None before one that came earlier, wherever that is."""
    r.add_worker(slots=4)
    ids = [arrive(priority=priority) for priority in (0, 5, 0)]
    assert chosen() == [ids[1], ids[0], ids[2]]
    assert there(postgres_place) == (3, 0)
    labelled = r.insert(labels={"a": "b"})
    assert chosen() == [ids[1], ids[0], ids[2], labelled]
    assert there(postgres_place) == (0, 4)


def test_where_there_was_no_room_before_those_that_wait_come_first(postgres_place: str) -> None:
    """Though a pass reads no more than the load then."""
    r.add_worker(slots=4)
    first = r.insert(labels={"a": "b"})
    second = arrive()
    assert chosen(with_lanes=False) == [first, second]


def test_as_many_start_from_there_as_limits_let(postgres_place: str) -> None:
    """The others stay, unless they become so many that only an index finds the first."""
    r.add_worker(slots=4)
    r.set_rule("type", "echo", max_running=2)
    ids = [arrive() for _ in range(4)]
    assert chosen() == ids[:2]
    assert there(postgres_place) == (4, 0)
    assert db.read(lambda: why.why(ids[3], 30))["summary"].startswith("3 ahead")


def test_a_crowd_that_has_arrived_is_entered(postgres_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And starts in its order."""
    monkeypatch.setattr("actors.walk._MOST_ARRIVED", 3)
    r.add_worker(slots=2)
    ids = [arrive() for _ in range(4)]
    assert chosen() == ids[:3]
    assert there(postgres_place) == (0, 4)


def test_others_are_looked_at_behind_the_first_that_have_arrived(postgres_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are entered for that, unless those fill all slots."""
    monkeypatch.setattr("actors.walk._ARRIVED_PAGE", 3)
    r.add_worker(slots=4)
    ids = [arrive() for _ in range(4)]
    assert chosen(-0.5) == ids[:2]
    assert there(postgres_place) == (4, 0)
    r.set_rule("type", "echo", max_running=1)
    other = arrive(type="sleep")
    assert there(postgres_place) == (5, 0)
    assert chosen() == [ids[0], other]
    assert there(postgres_place) == (0, 5)


def test_a_pass_dispatches_what_has_arrived_where_it_has_no_slots(postgres_place: str) -> None:
    """It is entered before."""
    r.add_worker(slots=4)
    ids = [arrive(), arrive()]
    nudges = r.Nudges()
    assert Dispatcher(Settings(database_url=postgres_place), nudges).run_pass(ids) == 2  # type: ignore[arg-type]
    assert [(r.row(task_id)["status"], r.kinds(task_id)) for task_id in ids] == [(DISPATCHED, [QUEUED, DISPATCHED])] * 2


def test_what_has_left_is_removed_or_none_arrives_there(postgres_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks at what has arrived goes over all that is there: it may not grow while somebody still wants to see what left."""
    monkeypatch.setattr("tower.postgres._MOST_BYTES", 30_000)
    sweep = Sweep(Settings(database_url=postgres_place), r.Nudges())  # type: ignore[arg-type]
    with closing(psycopg2.connect(postgres_place)) as other, other.cursor() as cursor:
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        cursor.execute("SELECT COUNT(*) FROM task")
        for _ in range(40):
            arrive(payload=json.dumps("x" * 1000))
        db.enter_arrived()
        sweep.run_once()
        arrive()
        assert there(postgres_place) == (0, 41)
        other.rollback()
    sweep.run_once()
    arrive()
    assert there(postgres_place) == (1, 41)
    assert rows(postgres_place, "SELECT pg_relation_size('task_arrived') AS size")[0]["size"] < 30_000


def test_what_has_left_is_removed_soon(postgres_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whichever sweep sees that it is much; and once it is gone, tasks arrive again at all servers."""
    monkeypatch.setattr("tower.postgres._MOST_LEFT", 5)
    sweep = Sweep(Settings(database_url=postgres_place), r.Nudges())  # type: ignore[arg-type]
    for _ in range(10):
        arrive()
    db.enter_arrived()
    db.read(lambda: db.rows("SELECT pg_stat_force_next_flush()"))
    counted = "SELECT vacuum_count AS times FROM pg_stat_user_tables WHERE relname = 'task_arrived'"

    def is_tidy() -> bool:
        sweep.run_once()
        return bool(rows(postgres_place, counted)[0]["times"])

    wait_for("a sweep to see it", is_tidy)
    db.database.obj.takes_arrivals = False  # as a sweep of this process found before another one tidied up
    sweep.run_once()
    assert db.takes_arrivals()


def test_one_that_nobody_looked_for_is_entered_by_the_sweep(place: str) -> None:
    """A nudge may have been lost; what has just come is left to the pass that it asked for."""
    sweep = Sweep(Settings(database_url=place), r.Nudges())  # type: ignore[arg-type]
    sweep.run_once()
    arrive()
    sweep.run_once()
    assert there(place) == (1, 0)
    db.unit(lambda: db.rows("UPDATE task_arrived SET created_at = created_at - 2"), sees_arrived=False)
    sweep.run_once()
    assert there(place) == (0, 1)

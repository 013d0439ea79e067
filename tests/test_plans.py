"""What the database reads for the life of a task, and again and again: not all there is.

Postgres plans statements while the tables are empty, and keeps the plans; SQLite takes the index of statuses wherever one is named.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from actors.orchestrator import Dispatcher
from actors.walk import Walk
from tests import rows as r
from tower import audit, db, due, lifecycle, load, overview, queries, reminders, sqlite
from tower.lifecycle import Ending, Outcome
from tower.models import Task, TaskStart, new_id
from tower.queries import Filter
from tower.retention import Retention
from tower.settings import Settings
from tower.terms import FAILED, SUCCEEDED

_HISTORY = 3000
_COPY = """
WITH RECURSIVE number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < {count})
INSERT INTO {table} ({columns}) SELECT {values} FROM {table}, number WHERE {which}
"""


def _live(dispatcher: Dispatcher) -> str:
    """Bring some tasks from their request to their folders, together; return the id of one."""
    ids = [r.insert() for _ in range(3)]
    assert dispatcher.run_pass(ids) == 3
    claims = db.unit(lambda: lifecycle.claim_some("w1", new_id(), 3, ["default"]))
    assert [claim.id for claim in claims] == ids
    db.unit(lambda: lifecycle.finish_all([Ending(claim, Outcome(SUCCEEDED), new_id()) for claim in claims]))
    told = db.read(lambda: queries.to_trace(ids))
    db.unit(lambda: reminders.traced([(task_id, told[task_id]["task"]["seq"], 1) for task_id in ids]))
    return ids[0]


def _copy(model: str, count: int = _HISTORY) -> None:
    """Make many tasks like one."""
    names = [field.column_name for field in Task._meta.sorted_fields]
    differ = {"id": "id || n", "rank": "rank + n"}
    values = ", ".join(differ.get(name, name) for name in names)
    db.unit(
        lambda: db.database.execute_sql(
            _COPY.format(table="task", columns=", ".join(names), values=values, count=count, which=f"id = '{model}'")
        )
    )


def _read_so_far() -> int:
    """Return how many entries and blocks of indexes and rows of tables were read, by this connection and those before it."""
    db.rows("SELECT pg_stat_force_next_flush()")
    indexes = "SELECT coalesce(sum(idx_tup_read), 0) FROM pg_stat_user_indexes"
    tables = "SELECT coalesce(sum(seq_tup_read), 0) FROM pg_stat_user_tables"
    blocks = "SELECT coalesce(sum(idx_blks_hit + idx_blks_read), 0) FROM pg_statio_user_indexes"
    return int(db.rows(f"SELECT ({indexes}) + ({tables}) + ({blocks}) AS count")[0]["count"])


@pytest.mark.parametrize("others", ["ended", "waiting", "scheduled"])
def test_the_life_of_a_task_reads_neither_what_has_ended_nor_all_that_waits(new_database: Callable[[], str], others: str) -> None:
    """However little there was when its statements were planned."""
    settings = Settings(database_url=new_database())
    db.open_database(settings)
    try:
        db.migrate()
        r.add_worker(slots=3)
        dispatcher = Dispatcher(settings, r.Nudges())  # type: ignore[arg-type]
        for _ in range(4):
            model = _live(dispatcher)
        if others == "waiting":
            model = r.insert(queue="of nobody")
        elif others == "scheduled":
            model = r.insert(not_before=4e9)
        _copy(model)
        before = db.read(_read_so_far)
        _live(dispatcher)
        assert db.read(_read_so_far) - before < _HISTORY / 2
    finally:
        db.close_database()


def test_who_asks_because_of_tasks_that_ended_does_not_go_through_all_that_waits(new_database: Callable[[], str]) -> None:
    """Whether one of them is queued again is told by their ids; Postgres went over the index of the whole queue for it."""
    db.open_database(Settings(database_url=new_database()))
    try:
        db.migrate()
        _copy(r.insert(), 30_000)
        before = db.read(_read_so_far)
        ready = db.read(lambda: queries.ready([new_id() for _ in range(20)]))
        assert ready.waits_s is not None
        assert not ready.is_asked
        assert db.read(_read_so_far) - before < 100
    finally:
        db.close_database()


def test_a_few_tasks_behind_a_crowd_of_another_kind_are_found_without_going_over_it(new_database: Callable[[], str]) -> None:
    """Also once Postgres knows how large the crowd is: it plans for any lane, and took every one for as large."""
    settings = Settings(database_url=new_database())
    db.open_database(settings)
    try:
        db.migrate()
        r.add_worker()
        _copy(r.insert(queue="of nobody", priority=1_000_000), 30_000)
        db.unit(lambda: db.database.execute_sql("ANALYZE task"))
        for _ in range(3):  # what is asked a second time is planned for any lane
            new = [r.insert() for _ in range(3)]
            before = db.read(_read_so_far)
            assert Dispatcher(settings, r.Nudges()).run_pass(new) == 3  # type: ignore[arg-type]
        assert db.read(_read_so_far) - before < 1000
    finally:
        db.close_database()


@pytest.mark.parametrize("count", [60, 110, 400])
def test_the_first_in_line_are_found_without_a_look_at_the_others_however_many_those_were_when_it_was_planned(
    new_database: Callable[[], str], count: int
) -> None:
    """With some hundred that waited, Postgres took it for as dear to go along an index as to read all and sort them, and kept to that."""
    settings = Settings(database_url=new_database())
    db.open_database(settings)
    try:
        db.migrate()
        r.add_worker(slots=3)
        model = r.insert(queue="of nobody")
        db.unit(lambda: Task.update(nudge_at=0).execute())
        _copy(model, count)

        def read_for_a_round() -> int:
            before = db.read(_read_so_far)
            assert Dispatcher(settings, r.Nudges()).run_pass() == 0  # type: ignore[arg-type]
            db.unit(reminders.due_to_start)
            db.read(queries.oldest_waiting_s)
            due.look()
            room_for_one = replace(db.read(load.read), room=1, queues={"of nobody": 1})
            assert db.read(Walk(room_for_one, None)._page)
            return db.read(_read_so_far) - before

        few = [read_for_a_round() for _ in range(3)][-1]  # it is planned when it is asked a second time
        _copy(r.insert(queue="of nobody"), _HISTORY)
        assert read_for_a_round() - few < 1000
    finally:
        db.close_database()


@pytest.fixture(params=["sqlite", "postgres"])
def read_so_far(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An open database, and what tells how much was read, some five units a row."""
    steps = [0]

    class Counted(sqlite._Session):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)

    monkeypatch.setattr(sqlite, "_Session", Counted)
    is_sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path / 'tower.db'}" if is_sqlite else request.getfixturevalue("new_database")()
    db.open_database(Settings(database_url=url))
    db.migrate()
    yield (lambda: steps[0]) if is_sqlite else (lambda: 5 * db.read(_read_so_far))
    db.close_database()


def test_a_pass_does_not_go_over_what_is_scheduled_for_later(read_so_far: Callable[[], int]) -> None:
    """Nor does the look of the sweep, or what asks how long tasks have waited."""
    _copy(r.insert(not_before=4e9))
    r.add_worker()
    new = r.insert()
    dispatcher = Dispatcher(Settings(), r.Nudges())  # type: ignore[arg-type]
    before = read_so_far()
    assert dispatcher.run_pass([new]) == 1
    assert dispatcher.run_pass([new]) == 0
    look = due.look()
    assert (look.wakes, look.queued, look.next_s is not None) == (False, False, True)
    assert db.unit(reminders.due_to_start) is None
    assert db.read(queries.oldest_waiting_s) is None
    assert not db.read(lambda: queries.is_anything_to_do(["nothing"]))
    assert read_so_far() - before < _HISTORY * 5


def test_what_is_asked_every_second_does_not_go_over_all_that_waits(read_so_far: Callable[[], int]) -> None:
    """A pass of the sweep, and whether the tower is well: with a crowd in a queue each took 0.1 s, and held up those that write."""
    model = r.insert(queue="of nobody")
    db.unit(lambda: Task.update(trace_due_at=0, nudge_at=0).execute())
    _copy(model)
    before = read_so_far()
    look = due.look()
    assert (look.queued, look.untraced, look.late) == (True, True, False)
    assert db.unit(reminders.due_to_start)
    assert len(db.unit(lambda: reminders.due_to_trace(200))) == 20
    assert db.unit(lambda: lifecycle.give_up_late(200)) == []
    assert db.read(lambda: queries.trace_errors(10)) == []
    assert db.read(queries.oldest_waiting_s) is not None
    assert len(db.read(lambda: overview.waiting(Filter()))) == overview.MOST
    assert read_so_far() - before < _HISTORY * 5


def test_the_last_ends_are_found_without_going_over_all(read_so_far: Callable[[], int]) -> None:
    """Though that was planned before there were any; of all outcomes, and for somebody who sees one type only."""
    own = Filter(within_types=("echo",))
    for _ in range(3):
        assert db.read(lambda: (overview.just_ended(Filter(), 3), overview.just_ended(own, 3))) == ([], [])
    first = r.running()
    db.unit(lambda: lifecycle.finish(first, Outcome(SUCCEEDED), new_id()))
    _copy(first.id)
    failed, other = r.running(), r.running(type="other")
    db.unit(lambda: lifecycle.finish(failed, Outcome(FAILED, error={"code": "handler_error", "message": "no"}), new_id()))
    db.unit(lambda: lifecycle.finish(other, Outcome(SUCCEEDED), new_id()))
    before = read_so_far()
    assert db.read(lambda: overview.just_ended(Filter(), 3))[:2] == [other.id, failed.id]
    assert db.read(lambda: overview.just_ended(own, 3))[0] == failed.id
    assert read_so_far() - before < _HISTORY


def test_what_is_old_is_looked_for_without_going_over_what_is_not(read_so_far: Callable[[], int], tmp_path: Path) -> None:
    """Once a minute, or a second: tasks to remove, starts that no rate counts any more, entries of the record."""
    claim = r.running()
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED), new_id()))
    _copy(claim.id)
    db.unit(lambda: audit.note("somebody", "cancel"))
    db.unit(lambda: TaskStart.insert(rate_key="k", at=db.now(), task_id="t").execute())
    for table, same, own in (("task_start", "rate_key, at", "task_id"), ("audit", "at, actor, action, target", "id")):
        values = f"{same}, {own} || n"
        copy = _COPY.format(table=table, columns=f"{same}, {own}", values=values, count=_HISTORY, which="true")
        db.unit(partial(db.database.execute_sql, copy))
    before = read_so_far()
    assert not due.look().old_starts
    assert not Retention(Settings(trace_dir=tmp_path / "traces")).step()
    db.unit(lambda: audit.forget(10))
    assert read_so_far() - before < _HISTORY


def test_what_failed_is_found_without_going_over_what_succeeded(read_so_far: Callable[[], int]) -> None:
    """The first page shows what failed within a week; where one task in four does, Postgres went over all others."""
    failed, claim = r.running(), r.running()
    db.unit(lambda: lifecycle.finish(failed, Outcome(FAILED, error={"code": "handler_error", "message": "no"}), new_id()))
    db.unit(lambda: lifecycle.finish(claim, Outcome(SUCCEEDED), new_id()))
    _copy(failed.id, _HISTORY // 3)
    _copy(claim.id)
    if db.is_postgres():
        db.unit(lambda: db.database.execute_sql("ANALYZE task"))
    before = read_so_far()
    assert len(db.read(lambda: overview.broken(Filter(), 0))) == overview.MOST
    assert read_so_far() - before < _HISTORY * 2

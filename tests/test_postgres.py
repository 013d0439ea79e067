"""What is special about Postgres: transactions begin with their first statement, and an event loop waits for a connection by itself.

Nothing is lost or done twice when that cannot be.
"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from functools import partial
from typing import Any

import peewee
import psycopg2.extensions  # type: ignore[import-untyped]
import pytest
from playhouse.pool import PooledPostgresqlDatabase

from tests import rows as r
from tests.engine import OWN, Engine, run
from tests.servers import wait_for
from tower import db, lifecycle, moves, queries, reminders
from tower import postgres as module
from tower.errors import Unavailable
from tower.lifecycle import Ending, LogPart, Outcome
from tower.models import Task, new_id
from tower.settings import Settings
from tower.terms import QUEUED, SUCCEEDED


class OnPostgres(Engine):
    """An engine on Postgres."""

    def __init__(self, url: str) -> None:
        super().__init__(Settings(database_url=url, redis_url=None))
        self.url = url

    async def warm(self) -> None:
        """Enqueue until the loop has its connection."""
        async with asyncio.timeout(20):
            while (await self.enqueue()) in self.in_thread:
                await asyncio.sleep(0.02)
        self.in_thread.clear()

    def execute(self, statement: str, url: str = "") -> list[Any]:
        """Run a statement as somebody else."""
        with closing(psycopg2.connect(url or self.url)) as connection, connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Let no task arrive meanwhile."""
        with closing(psycopg2.connect(self.url)) as connection, connection.cursor() as cursor:
            cursor.execute("LOCK TABLE task_arrived IN EXCLUSIVE MODE")
            yield
            connection.rollback()

    async def waits(self) -> None:
        """Wait until somebody waits to write tasks."""
        waiting = "SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        async with asyncio.timeout(20):
            while not (await asyncio.to_thread(self.execute, waiting))[0][0]:
                await asyncio.sleep(0.01)


_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


@pytest.fixture
def engine(new_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> Iterator[OnPostgres]:
    """On a Postgres that lets everybody else wait long for a lock."""
    monkeypatch.setattr(db, "_LIMITS", db._LIMITS.replace("lock_timeout=5000", "lock_timeout=60000"))
    url = new_database()
    db.open_database(Settings(database_url=url))
    yield OnPostgres(url)
    db.close_database()


def _sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is sent to the server from now on."""
    sent = list[str]()
    execute = PooledPostgresqlDatabase.execute_sql

    def noted(database: Any, sql: str, params: Any = None) -> Any:
        sent.append(sql)
        return execute(database, sql, params)

    monkeypatch.setattr(PooledPostgresqlDatabase, "execute_sql", noted)
    return sent


@pytest.fixture
def strict(engine: OnPostgres) -> OnPostgres:
    """Where a commit waits for the disk unless something else is said."""
    engine.execute("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = on', current_database()); END $$")
    return engine


@pytest.mark.usefixtures("engine")
def test_who_has_a_patience_of_his_own_waits_so_long_for_a_lock() -> None:
    """And whoever comes after him on that connection as long as all do."""
    ask = "SELECT current_setting('lock_timeout') AS told"
    with db.database.connection_context():
        with db.database.obj.scope(is_one_statement=True, waits=True, patience_s=0.4):
            assert db.rows(ask) == [{"told": "400ms"}]
        assert db.rows(ask) == [{"told": "1min"}]


@pytest.mark.usefixtures("strict")
def test_a_transaction_begins_with_its_first_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without any is not begun at all."""
    sent = _sent(monkeypatch)
    ask = "SELECT now()::text AS began, current_setting('synchronous_commit') AS waits"

    def work() -> list[dict[str, str]]:
        return db.rows(ask) + db.rows(ask)

    for is_promise, waits in ((True, "on"), (False, "off"), (True, "on")):
        first, second = db.unit(work, is_promise=is_promise, sees_arrived=False)
        assert (first["began"], first["waits"]) == (second["began"], waits)
    assert [statement.split(" ")[0] for statement in sent] == ["BEGIN;", "PREPARE", "BEGIN;", "EXECUTE", "BEGIN;", "EXECUTE"]
    sent.clear()
    assert db.unit(lambda: 5, sees_arrived=False) == 5
    with pytest.raises(ZeroDivisionError):
        db.unit(lambda: 1 // 0, sees_arrived=False)
    assert sent == []


@pytest.mark.usefixtures("strict")
def test_a_statement_by_itself_waits_for_the_disk_if_it_promises_something() -> None:
    """Whatever came before it on its connection, or did not."""

    def waits() -> str:
        return str(db.rows("SELECT current_setting('synchronous_commit') AS waits")[0]["waits"])

    db.unit(lambda: None, is_one_statement=True, is_promise=False)
    told = [db.unit(waits, is_one_statement=True, is_promise=is_promise) for is_promise in (True, False, False, False, True)]
    assert told == ["on", "off", "off", "off", "on"]


def test_a_statement_that_never_came_to_the_server_leaves_the_transaction_to_be_begun(engine: OnPostgres) -> None:
    """Else what follows it in the same work would be committed one by one."""

    def work() -> None:
        with pytest.raises(ValueError, match="NUL"):
            db.rows("SELECT ?", ["a\0b"])
        db.rows("UPDATE rule SET reason = 'changed'")
        raise KeyError

    engine.execute("INSERT INTO rule (kind, name, updated_at, reason) VALUES ('tower', '', 0, 'as it was')")
    with pytest.raises(KeyError):
        db.unit(work)
    assert engine.execute("SELECT reason FROM rule") == [("as it was",)]


def test_one_statement_within_a_transaction_leaves_its_beginning_alone(engine: OnPostgres) -> None:
    """Also if it is none after all."""

    def work() -> None:
        db.unit(lambda: None, is_one_statement=True, is_promise=False)
        db.rows("UPDATE decision SET token = 5")
        raise KeyError

    with pytest.raises(KeyError):
        db.unit(work)
    assert engine.execute("SELECT token FROM decision") == [(0,)]


def test_a_statement_that_could_not_be_prepared_is_prepared_the_next_time(engine: OnPostgres) -> None:
    """A value that cannot be sent is not sent; nor is what would have gone with it."""
    ask = "SELECT ?::text AS said"

    def work() -> list[dict[str, str]]:
        said = db.rows(ask, ["a"])
        for _ in range(2):
            with pytest.raises(ValueError, match="NUL"):
                db.rows(ask, ["\0"])
            said += db.rows(ask, ["b"])
        return said

    assert db.read(work) == [{"said": "a"}, {"said": "b"}, {"said": "b"}]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The statements that were run."""
    found = set[str]()
    run = module.Postgres.run

    def told(self: module.Postgres, statement: str, values: Sequence[Any], **how: bool) -> Any:
        found.add(statement)
        return run(self, statement, values, **how)

    monkeypatch.setattr(module.Postgres, "run", told)
    return found


def test_one_plan_does_for_any_number_of_tasks(engine: OnPostgres, said: set[str]) -> None:
    """To plan costs as much as to do, and is done for each connection and each statement that it has not seen before."""

    def live(count: int) -> set[str]:
        said.clear()
        new = [r.new() for _ in range(count)]
        db.unit(lambda: lifecycle.enter(new))
        ids = [task.id for task in new]
        db.read(lambda: queries.ready(ids))
        assert len(r.dispatch(*ids)) == count
        claims = db.unit(lambda: lifecycle.claim_some("w1", new_id(), count, ["default"]))
        endings = [Ending(claim, Outcome(SUCCEEDED, result="{}"), new_id(), [LogPart(1, "a line\n")]) for claim in claims]
        assert db.unit(lambda: lifecycle.finish_all(endings)) == [SUCCEEDED] * count
        told = db.read(lambda: queries.to_trace(ids))
        db.unit(lambda: reminders.traced([(task_id, told[task_id]["task"]["seq"], 7) for task_id in ids]))
        assert {(row["traced_seq"], row["traced_bytes"]) for row in map(r.row, ids)} == {(5, 7)}
        return set(said)

    assert live(2) == live(9)


def test_clients_cannot_make_ever_more_plans(engine: OnPostgres, said: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection keeps so many; whatever fields tasks bring along, there are three, and a few for what many tasks share."""
    monkeypatch.setattr(moves, "_shapes", {})
    monkeypatch.setattr(moves, "_MOST_SHAPES", 3)
    fields: list[dict[str, Any]] = [{}, {"labels": {"a": "b"}}, {"title": "t"}, {"silence_s": 2.0}, {"not_before": 4e9}]
    fields.append({"title": "t", "concurrency_key": "k"})
    for more in [*fields, *({"priority": number} for number in range(9)), *({"timeout_s": number + 0.5} for number in range(9))]:
        db.unit(partial(lifecycle.enter, [r.new(**more)]), sees_arrived=False)
    assert len(said) == 3 + 3


@pytest.mark.parametrize("odd", ["it's", "a?b", "100%s", "{now}", "{}", 'a"b', "a\\b", "é", "--", "", "$1"])
def test_a_row_holds_what_its_task_shares_with_others_whatever_that_is(engine: OnPostgres, odd: str) -> None:
    """It may stand in the statement, where another text could end it."""
    given: list[dict[str, Any]] = [
        {"priority": -5, "timeout_s": 1e-07},
        {"queue": odd},
        {"type": odd, "payload": odd},
        {"priority": 2**31 - 1},
        {"timeout_s": math.inf},
    ]
    for fields in given * 3:  # also once it is prepared
        task = r.new(**fields)
        db.unit(partial(lifecycle.enter, [task]))
        row = r.row(task.id)
        assert {name: row[name] for name in fields} == fields
        assert (row["labels"], row["correlation_id"], row["max_losses"]) == ("{}", task.id, task.max_losses)
        assert r.kinds(task.id) == ["queued"]


def test_a_statement_that_fails_undoes_what_was_begun_with_it(engine: OnPostgres) -> None:
    """And the connection is as good as before."""
    with pytest.raises(peewee.ProgrammingError):
        db.unit(lambda: db.rows("SELECT nothing FROM rule"))
    assert db.unit(lambda: db.rows("SELECT 1 AS one")) == [{"one": 1}]
    assert engine.execute("SELECT COUNT(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'") == [(0,)]


def test_a_task_is_the_same_whether_the_loop_waits_for_it_or_a_thread(engine: OnPostgres) -> None:
    """Its row and its first event; also once the statement is prepared, and for several at once."""

    async def work() -> None:
        by_thread = await engine.enqueue(priority=3)
        assert engine.in_thread == [by_thread]
        await engine.warm()
        ids = [by_thread, *[await engine.enqueue(priority=3) for _ in range(3)]]
        ids += await asyncio.gather(*(engine.enqueue(priority=3) for _ in range(20)))
        assert engine.in_thread == []

        found = [{name: value for name, value in r.row(task_id).items() if name not in OWN} for task_id in ids]
        assert found == [found[0]] * len(ids)
        assert all(r.kinds(task_id) == ["queued"] for task_id in ids)

    run(work)


def test_what_does_not_fit_goes_through_the_thread(engine: OnPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are other rows, and a loop is not kept busy with large texts."""

    async def work() -> None:
        await engine.warm()
        labelled = await engine.enqueue(labels={"team": "red"})
        monkeypatch.setattr("tower.lifecycle._MOST_SENT", 5)
        large = await engine.enqueue()
        assert engine.in_thread == [labelled, large]

    run(work)


@pytest.mark.parametrize("idle", [True, False])
def test_a_connection_that_ends_is_replaced_and_nothing_is_lost_or_doubled(
    engine: OnPostgres, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Postgres ends it between two tasks, or while it is asked for one."""
    monkeypatch.setattr(module, "_REST_S", 0.05)
    monkeypatch.setattr(module, "_LOCK_LIMIT", "")

    async def work() -> None:
        await engine.warm()
        if idle:
            await asyncio.to_thread(engine.execute, _END)
            await asyncio.sleep(0.05)
            task_id = await engine.enqueue()
        else:
            async with engine.held():
                asked = asyncio.create_task(engine.enqueue())
                await engine.waits()
                await asyncio.to_thread(engine.execute, f"{_END} AND wait_event_type = 'Lock'")
                await engine.until_in_thread()
            task_id = await asked
        assert engine.in_thread == [task_id]
        assert (r.row(task_id)["status"], r.kinds(task_id)) == (QUEUED, ["queued"])
        await engine.warm()

    run(work)


def test_who_holds_the_table_is_waited_for_in_a_thread(engine: OnPostgres) -> None:
    """The loop gives up soon; others may wait there as long as always."""

    async def work() -> None:
        await engine.warm()
        async with engine.held():
            asked = asyncio.create_task(engine.enqueue())
            await engine.until_in_thread()
            await engine.waits()
        assert engine.in_thread == [await asked]
        assert r.kinds(await asked) == ["queued"]

    run(work)


def test_a_commit_whose_answer_is_lost_enters_the_task_once(engine: OnPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread does it again, and finds it there."""

    async def work() -> None:
        await engine.warm()
        line = db.database.obj.in_loop._line
        session = line._session

        class Losing:
            closed = 0
            spell = session.spell

            def poll(self) -> int:
                if session.poll() == module.POLL_OK:
                    raise psycopg2.OperationalError("the answer is lost")
                return int(psycopg2.extensions.POLL_READ)

            def close(self) -> None:
                self.closed = 1
                session.close()

        line._session = Losing()
        task_id = await engine.enqueue()
        assert engine.in_thread == [task_id]
        assert r.kinds(task_id) == ["queued"]

    run(work)


def test_a_database_that_is_away_is_told_of_as_always(engine: OnPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first task that it takes again ends the outage, whoever brought it."""
    monkeypatch.setattr("tower.orchestrator._PATIENCE_S", 0.3)
    monkeypatch.setattr(module, "_REST_S", 0.05)

    server, name = engine.url.rsplit("/", 1)

    async def work() -> None:
        await engine.warm()
        for is_on in (True, False):
            engine.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = {is_on}", f"{server}/postgres")
            await asyncio.to_thread(engine.execute, _END)
            if is_on:
                with pytest.raises(Unavailable, match="only be read"):
                    await engine.enqueue()
                assert "only be read" in (db.trouble.now() or "")
        while (await _tried(engine)) in (None, *engine.in_thread):
            await asyncio.sleep(0.05)
        db.trouble.begin(peewee.OperationalError("away"), writing=True, tried_at=time.monotonic())
        engine.in_thread.clear()
        await engine.enqueue()
        assert (engine.in_thread, db.trouble.now()) == ([], None)

    run(work)


def _noted() -> tuple["asyncio.Future[Exception | None]", db.Then]:
    """Return a future, and what tells it once that something was committed, or what went wrong."""
    told: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    return told, told.set_result


async def _tried(engine: OnPostgres) -> str | None:
    try:
        return await engine.enqueue()
    except Unavailable:
        return None


def test_a_large_statement_is_sent_as_the_socket_takes_it(engine: OnPostgres) -> None:
    """Several megabytes do not go at once."""

    async def work() -> None:
        await engine.warm()
        connection = db.database.obj.in_loop
        for size in (20_000_000, 10):
            sent, told = _noted()
            assert connection.run("INSERT INTO saved_view VALUES (?, 'o', ?, ?, 0)", [f"v{size}", f"n{size}", "q" * size], told)
            # A small one may have been answered already.
            assert sent.done() or not connection.run("SELECT 1", [], told)
            assert await asyncio.wait_for(sent, 20) is None
        assert db.read(lambda: db.rows("SELECT length(query) AS n FROM saved_view ORDER BY n")) == [{"n": 10}, {"n": 20_000_000}]

    run(work)


def test_each_loop_gets_a_connection_of_its_own(engine: OnPostgres) -> None:
    """The one of a loop that has ended, or that is closed from elsewhere, is no use to another."""
    for _ in range(2):
        run(engine.warm)
    engine.orchestrator._gathering._loop = None

    async def work() -> None:
        await engine.warm()
        line = db.database.obj.in_loop._line
        end, ended_by = line.end, list[threading.Thread]()
        line.end = lambda *told: (ended_by.append(threading.current_thread()), end(*told))
        closer = threading.Thread(target=db.close_database)
        closer.start()
        await asyncio.to_thread(closer.join)
        async with asyncio.timeout(20):
            while not line.is_closed:
                await asyncio.sleep(0.01)
        assert ended_by == [threading.main_thread()]
        assert await engine.enqueue() in engine.in_thread

    run(work)
    others = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    db.close_database()
    wait_for("the end of the others", lambda: engine.execute(others)[0][0] == 0)


def test_a_loop_that_cannot_wait_for_a_connection_leaves_it_to_the_thread(engine: OnPostgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the default one of Windows."""

    def refuse(*_: Any) -> None:
        raise NotImplementedError

    async def work() -> None:
        asked = list[int]()
        monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", lambda *_: asked.append(1) or refuse())
        async with asyncio.timeout(20):
            while not asked:
                await engine.enqueue()
                await asyncio.sleep(0.01)
        before = len(engine.in_thread)
        for _ in range(3):
            await engine.enqueue()
        assert (len(engine.in_thread) - before, len(asked)) == (3, 1)

    run(work)
    assert db.read(lambda: Task.select().count()) == len(engine.in_thread)


@pytest.mark.parametrize("is_sent", [True, False])
def test_what_is_not_sent_or_not_answered_costs_the_connection(engine: OnPostgres, is_sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has prepared is not known any more; another one comes after a rest."""
    monkeypatch.setattr(module, "_ANSWER_S", 0.1)

    async def work() -> None:
        await engine.warm()
        connection = db.database.obj.in_loop
        line = connection._line
        sent, told = _noted()
        assert connection.run("SELECT ?::text, pg_sleep(?)", ["x" if is_sent else "\x00", 60], told) == is_sent
        if is_sent:
            assert isinstance(await asyncio.wait_for(sent, 20), psycopg2.OperationalError)
        assert line.is_closed
        before = len(engine.in_thread)
        for _ in range(3):
            await engine.enqueue()
        assert len(engine.in_thread) - before == 3
        assert connection._opening_for is None

    run(work)


def test_a_connection_that_nobody_wants_any_more_is_closed(engine: OnPostgres) -> None:
    """As when the database is closed while it is still coming."""

    async def work() -> None:
        connection = db.database.obj.in_loop
        connect, came, is_closed = connection._connect, list[Any](), threading.Event()

        def slow() -> Any:
            assert is_closed.wait(20)
            came.append(connect())
            return came[0]

        connection._connect = slow
        await engine.enqueue()
        connection.close()
        is_closed.set()
        async with asyncio.timeout(20):
            while not (came and came[0].closed):
                await asyncio.sleep(0.01)
        assert connection._line is None

    run(work)


def test_a_second_loop_leaves_the_connection_to_the_first(engine: OnPostgres) -> None:
    """Whoever works with two loops at once works in threads with one of them."""

    async def work() -> None:
        await engine.warm()
        line, other = db.database.obj.in_loop._line, list[bool]()

        async def ask() -> None:
            other.append(db.can_send(is_alone=True))

        await asyncio.to_thread(lambda: asyncio.run(ask()))
        assert (other, db.can_send(is_alone=True), db.database.obj.in_loop._line) == ([False], True, line)

    run(work)


def test_who_stops_in_another_loop_does_not_wait_for_what_an_ended_one_has_sent(engine: OnPostgres) -> None:
    """Nobody would ever tell him."""

    with closing(psycopg2.connect(engine.url)) as connection, connection.cursor() as cursor:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(engine.warm())
        cursor.execute("LOCK TABLE task_arrived IN EXCLUSIVE MODE")
        asked = loop.create_task(engine.enqueue())
        loop.run_until_complete(asyncio.sleep(0.05))
        assert engine.orchestrator._gathering._sent
        asked.cancel()
        loop.run_until_complete(asyncio.wait([asked]))
        asyncio.run(asyncio.wait_for(engine.orchestrator._gathering.stop(), 20))
        loop.close()
        # Nor is that done once more, when the database is closed.
        before = len(engine.in_thread)
        db.close_database()
        assert (engine.orchestrator._gathering._inbox.qsize(), len(engine.in_thread)) == (0, before)


def test_who_stops_waits_for_what_was_sent(engine: OnPostgres) -> None:
    """It is answered; whoever waits behind it is left out."""

    async def work() -> None:
        await engine.warm()
        async with engine.held():
            first = asyncio.create_task(engine.enqueue())
            await engine.waits()
            second = asyncio.create_task(engine.enqueue())
            await asyncio.sleep(0)
            stopping = asyncio.create_task(engine.orchestrator.stop())
            await asyncio.sleep(0.05)
            assert not stopping.done()
        await stopping
        assert r.kinds(await first) == ["queued"]
        with pytest.raises(asyncio.CancelledError):
            await second

    run(work)


_ID = "0192f0c1-2345-7abc-8def-0123456789ab"
_AMONG = "SELECT item FROM (VALUES ('a'), ('b'), ('null'), ('NULL'), (NULL), ('')) AS given (item) WHERE {named}"


@pytest.mark.parametrize(
    "items",
    [
        *([_ID, _ID], [3], [-5, 0], ["a"], ["a", "b-c", 7], [1 << 70]),
        *([], [""], ["a", ""], ["", ""], ["a", None], [None], ["null"], ["a", "Null", "b"], ["a,b"], ["a", "b,c"], [","], ["-", "a"]),
        *(['"'], ["a", "{}"], ["a\\b"], [" a "], ["a", "ä"], ["²"], ["a\nb"], ["a", "x'y"], ["a", "%s"], [True], [2.5, 3.0]),
    ],
    ids=str,
)
def test_an_array_has_the_items_that_it_was_made_of(new_database: Callable[[], str], items: list[Any]) -> None:
    """Whether it goes as one text or item by item, and both before its statement is prepared and after."""
    db.open_database(Settings(database_url=new_database()))
    told = ["true" if item is True else None if item is None else str(item) for item in items]
    array = partial(db.rows, "SELECT item FROM unnest(CAST(? AS text[])) AS item", [module.array(items)])
    named, values = db.among("item", items)
    for _ in range(3):
        assert [row["item"] for row in db.read(array)] == told
        if all(isinstance(item, str) for item in items):
            rows = db.read(partial(db.rows, _AMONG.format(named=named), values))
            assert {row["item"] for row in rows} == {"a", "b", "null", "NULL", ""} & set(items)


@pytest.mark.parametrize(("items", "is_one"), [([_ID, _ID], True), ([1, 2], True), (["a", "{"], False), (["null"], False)])
def test_a_plain_array_is_one_text(items: list[Any], is_one: bool) -> None:
    """As the ids and numbers of all statements that write many tasks are."""
    assert isinstance(module.array(items), str) == is_one

"""DATABASE_URL to database: the one place that knows which it is, and how to outlive its failures."""

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import peewee
from playhouse.db_url import parse
from playhouse.migrations import Runner
from playhouse.pool import MaxConnectionsExceeded

from tower import arrived, postgres
from tower.errors import SettingsError, Unavailable
from tower.faults import fault
from tower.settings import Settings
from tower.sqlite import File, Sqlite
from tower.trouble import Trouble, explain, is_outage
from tower.turns import STUCK_S, NoTurn, Turns

T = TypeVar("T")
#: See `send`.
Then = postgres.Then

database = peewee.DatabaseProxy()

#: What this process knows of its database's failures.
trouble = Trouble()

_MIGRATIONS = Path(__file__).parent / "migrations"
_LIMITS = "-c statement_timeout=30000 -c lock_timeout=5000 -c idle_in_transaction_session_timeout=60000"
_MIGRATION_LOCK = 8_236_141_775_210_118_337  # any number of our own, the same in every process
_writer = Turns()
#: How long who only reads waits for his turn.
_READ_TURN_S = 0.05
#: How long a pass tries to enter what has arrived until that counts as an outage.
_ENTER_S = 4.0
_log = logging.getLogger(__name__)


def open_database(settings: Settings) -> None:
    """Point the models at the database of the settings; it connects when first used."""
    global _file  # noqa: PLW0603  # like `database`, one for the process
    _file.close()
    trouble.end(writing=True)
    _file = File(_path(settings) if settings.database_url.startswith("sqlite") else None)
    if settings.database_url.startswith("sqlite"):
        database.initialize(_sqlite(settings))
    else:
        database.initialize(_postgres(settings))


def open_existing(settings: Settings) -> None:
    """Open a database that a tower has prepared, for a command that looks after it; raise SettingsError for any other."""
    path = Path(settings.database_url.removeprefix("sqlite:///"))
    if settings.database_url.startswith("sqlite") and not path.is_file():
        raise SettingsError(f"DATABASE_URL names {path}, but there is no such file; go to the tower's folder, or set DATABASE_URL.")
    open_database(settings)
    steps = read(lambda: Runner(database.obj, str(_MIGRATIONS)).status(), sees_arrived=False)
    _refuse_newer(steps)
    if not all(step.applied for step in steps):
        raise SettingsError("The database was made by an older tower, or by none yet; start this tower once.")


def _refuse_newer(steps: Iterable[Any]) -> None:
    strangers = [step.name for step in steps if step.path is None]
    if strangers:
        raise SettingsError(f"The database was made by a newer tower ({', '.join(strangers)}); upgrade this one.")


def close_database() -> None:
    """Close every connection of this process."""
    if database.obj is not None:
        database.close_all()
    _file.close()


def is_postgres() -> bool:
    """Whether rows live in Postgres."""
    return isinstance(database.obj, postgres.Postgres)


def _path(settings: Settings) -> Path:
    return Path(settings.database_url.removeprefix("sqlite:///"))


def _sqlite(settings: Settings) -> peewee.Database:
    path = _path(settings)
    if not path.parent.is_dir():
        raise SettingsError(f"DATABASE_URL names {path}, but there is no folder {path.parent}; make it first.")
    return Sqlite(path, _file, connections=settings.db_pool)


def _postgres(settings: Settings) -> peewee.Database:
    if not urlsplit(settings.database_url).path.strip("/"):
        raise SettingsError("DATABASE_URL names no database; add it at the end, as in postgres://host/tower.")
    options: dict[str, Any] = {
        "connect_timeout": 3,
        # Plans are kept, and the first is made while the tables are empty: no index would ever be used.
        "options": f"{_LIMITS} -c enable_seqscan=off -c enable_bitmapscan=off -c jit=off -c plan_cache_mode=force_generic_plan",
        "tcp_user_timeout": 10_000,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "application_name": "devops-control-tower",
        **parse(settings.database_url, unquote_user=True, unquote_password=True),
    }
    return postgres.Postgres(settings.db_pool, **options)


def unit(
    work: Callable[[], T],
    *,
    patience_s: float = 10.0,
    recognise: Callable[[], T | None] | None = None,
    is_one_statement: bool = False,
    is_promise: bool | Callable[[T], bool] = True,
    insists: Callable[[], bool] = bool,
    sees_arrived: bool = True,
) -> T:
    """Run `work` in one transaction, again after a lost connection or a lock; raise Unavailable when patience ends.

    It begins anew for whoever still insists then.

    If it is one statement, it is a transaction by itself. If it is no promise, nobody waits until the disk has it: a power cut, or the end
    of Postgres, may undo it, and the state from before must do as well; with SQLite that may depend on what it returns. A commit whose
    answer was lost makes it run a second time. Work that may not happen twice gives `recognise`, which is asked before each further run for
    what an earlier one has done. Work that may miss tasks which have just arrived need not see them; see `enter_arrived`.
    """
    looks = sees_arrived and database.is_closed()
    runs, committed = itertools.count(), list[T]()

    def once_more() -> T:
        if committed:  # only the disk is still waited for
            return committed[0]
        if looks and database.obj.is_any_arrived():
            _enter_first()
        with database.obj.scope(is_one_statement=is_one_statement, waits=is_promise is not False):
            done = recognise() if next(runs) and recognise else None
            done = work() if done is None else done
        committed.append(done)
        return done

    return _patiently(once_more, patience_s, writing=True, is_promise=is_promise, insists=insists)


def read(work: Callable[[], T], *, patience_s: float = 5.0, in_turn: bool = False, sees_arrived: bool = True) -> T:
    """Run `work`, which only reads, outside a transaction, so that it waits for no writer, unless a task has just arrived.

    In turn, it is one of the many short steps between the writes of this process: on SQLite these take turns with those, unless that takes
    long. At once, each would have to get Python's lock back from the others after every statement, which took a fifth of the CPU. These
    steps miss tasks that have just arrived, as any work may that says so; see `enter_arrived`.
    """

    def look() -> T:
        if database.obj.is_any_arrived():
            raise _Arrived
        return work()

    if sees_arrived and not in_turn and database.is_closed():
        try:
            return _patiently(look, patience_s, writing=False)
        except _Arrived:
            _see_arrived()
    return _patiently(work, patience_s, writing=False, in_turn=in_turn)


def enter_arrived() -> None:
    """Enter the tasks that have arrived; raise Unavailable if that cannot be done.

    A task that comes alone only arrives at first: it is written down where that costs least, and accepted. Whoever looks at tasks enters it
    among the others before, as each pass of the orchestrator does, unless it starts the task from there.
    """
    if read(database.obj.is_any_arrived, in_turn=True):
        unit(database.obj.enter_arrived, patience_s=_ENTER_S, is_one_statement=True, is_promise=False, sees_arrived=False)


def enter_here(*, patience_s: float | None = None) -> None:
    """Enter the tasks that have arrived, on the connection of the work that goes on, by a transaction of their own."""
    with database.obj.scope(is_one_statement=True, waits=False, patience_s=patience_s):
        database.obj.enter_arrived()


def _enter_first() -> None:
    """Enter what has arrived before other work that writes: on Postgres that may need none of the tables that somebody holds."""
    if not is_postgres():
        enter_here()
    elif not trouble.suspected():
        with _suspecting():
            enter_here(patience_s=STUCK_S)


def accepted(task_id: str) -> dict[str, Any] | None:
    """Return type and labels, as JSON, of a task that there is or will be, by one statement: two could miss one that is being entered."""
    places = " UNION ALL ".join(f"SELECT type, {labels} AS labels FROM {place} WHERE id = ?" for place, labels in _PLACES.items())
    found = read(lambda: rows(places, [task_id] * 2), sees_arrived=False)
    return found[0] if found else None


def takes_arrivals() -> bool:
    """Whether a new task may only arrive; else it is entered at once."""
    return bool(database.obj.takes_arrivals)


def tidy_arrivals(left: int, size: int) -> None:
    """Have Postgres remove what has left the place where tasks arrive, if that is much; see `due.Look`."""
    if is_postgres() and database.obj.is_untidy(left, size):
        unit(lambda: database.obj.tidy_arrivals(size), is_one_statement=True, sees_arrived=False)


_PLACES = {"task": "labels", "task_arrived": "'{}'"}


def _see_arrived() -> None:
    """Enter what has arrived for somebody who only reads, unless that takes long; else he sees what there was before.

    He stands behind others while they get on. If one is stuck, or somebody else has the file, nobody waits for that again so soon.
    """
    if trouble.suspected() or _writer.are_avoided:
        return
    with _suspecting(), suppress(NoTurn, MaxConnectionsExceeded), _writer.while_others_get_on(), _connected(writing=True):
        enter_here(patience_s=STUCK_S)


@contextmanager
def _suspecting() -> Iterator[None]:
    """Go on after an outage of what need not be done now, and note it."""
    try:
        yield
    except peewee.PeeweeException as error:
        if not is_outage(error):
            raise
        trouble.suspect(error)


class _Arrived(Exception):
    """Tasks have arrived, so nothing was read yet."""


def can_send(*, is_alone: bool) -> bool:
    """Whether `send` can be done now by the event loop that runs, for one who comes alone or for several.

    SQLite works in the thread that calls it: while the loop is busy with one, others cannot even come, and do better in a thread, together.
    """
    return bool(database.obj.in_loop.is_free) if is_postgres() else is_alone and _file.is_quick


def send(statement: str, values: Sequence[Any], then: Then) -> bool:
    """Run a statement that is a transaction by itself without a thread, for the event loop that runs; see `LoopConnection.run`.

    Returns False if that cannot be done. Then, and if `then` gets an error, it has to be done by `unit`. With SQLite it is told at once.
    """
    if not is_postgres():
        if not _written_here(statement, values):
            return False
        postgres.tell(then)
        return True

    def done(error: Exception | None) -> None:
        if error is None:
            trouble.end(writing=True)
        then(error)

    return bool(database.obj.in_loop.run(_spelled(statement), values, done))


def _written_here(statement: str, values: Sequence[Any]) -> bool:
    """Run a statement on SQLite and wait until the disk has it, and for nobody else; return whether that was done.

    If it was not, nothing is closed or tried again: a thread meets the same, has patience, and says what it means.
    """
    pool: Sqlite = database.obj
    if not _writer.acquire(blocking=False):
        return False
    try:
        # Something may be under way in this thread, or the connection would have to be opened.
        if not pool.is_closed() or not pool.take_pen(has_time=False):
            return False
        try:
            _file.check()
            with pool.scope(is_one_statement=True, waits=True, patience_s=0):
                rows(statement, values)
        finally:
            pool.close()
    except peewee.PeeweeException:
        return False
    finally:
        _writer.release()
    try:
        _file.settle(has_time=False)
    except peewee.OperationalError:
        return False
    trouble.end(writing=True)
    return True


def _patiently(
    work: Callable[[], T],
    patience_s: float,
    *,
    writing: bool,
    in_turn: bool = False,
    is_promise: bool | Callable[[T], bool] = False,
    insists: Callable[[], bool] = bool,
) -> T:
    if not database.obj.is_closed():  # inside other work: only the outermost can start over on a connection that is whole
        with _turn(patience_s, writing=writing, in_turn=in_turn):
            done = work()
        if not database.obj.in_transaction():
            _settle(done, is_promise)
        return done
    deadline, pause = time.monotonic() + patience_s, 0.05
    while True:
        tried_at = time.monotonic()
        try:
            with _turn(deadline - tried_at, writing=writing, in_turn=in_turn), _connected(writing=writing):
                done = work()
            _settle(done, is_promise)
            trouble.end(writing=writing)
            return done
        except (peewee.PeeweeException, MaxConnectionsExceeded) as error:
            if _has_no_tables(error):
                raise Unavailable("The database is not prepared yet.", code="database_unavailable") from error
            if not is_outage(error):
                raise
            if writing and not isinstance(error, NoTurn):
                trouble.suspect(error)
            if time.monotonic() + pause > deadline:
                cause = (trouble.suspected() if isinstance(error, NoTurn) else None) or error
                trouble.begin(cause, writing=writing, tried_at=tried_at)
                if not insists():
                    raise Unavailable(explain(cause), code="database_unavailable") from error
                deadline = time.monotonic() + patience_s
            _log.debug("trying again: %s", explain(error))
        time.sleep(pause * random.uniform(0.5, 1.5))  # so that many threads do not come back in step
        pause = min(pause * 2, 1.0)


@contextmanager
def _connected(*, writing: bool) -> Iterator[None]:
    """Take a connection; after an outage do not keep it: one that SQLite opened on a read-only disk would never write again."""
    pool: Sqlite | postgres.Postgres = database.obj
    try:
        pool.take(writing=writing)
        _file.check()
        yield
    except peewee.PeeweeException as error:
        if is_outage(error):
            pool.manual_close()
            pool.close_idle()  # they are as old
        raise
    finally:
        pool.close()


@contextmanager
def _turn(seconds: float, *, writing: bool, in_turn: bool = False) -> Iterator[None]:
    """Let the threads of this process write to SQLite one by one: its own waiting is a sleep that grows, and starves somebody.

    Who reads in turn waits for it a moment at most.
    """
    if is_postgres() or not (writing or in_turn):
        yield
        return
    has_it = _writer.acquire(timeout=max(0.0, seconds if writing else min(seconds, _READ_TURN_S)))
    if writing and not has_it:
        raise NoTurn
    try:
        yield
    finally:
        if has_it:
            _writer.release()


_file = File()


def _settle(done: T, is_promise: bool | Callable[[T], bool]) -> None:
    """Wait until the disk has what was promised; Postgres has done so already."""
    if is_postgres() or not (is_promise(done) if callable(is_promise) else is_promise):
        return
    if not _file.has_failed:
        _file.settle()
        return
    with _turn(1.0, writing=True), nullcontext() if not database.is_closed() else _connected(writing=True):
        _file.checkpoint(database.obj)


def _has_no_tables(error: BaseException) -> bool:
    return "no such table" in str(error) or type(error.__cause__ or error.__context__).__name__ == "UndefinedTable"


def now() -> peewee.SQL:
    """Return the database's own clock, in seconds since the epoch, as a piece of SQL."""
    return peewee.SQL(_now())


def _now() -> str:
    if is_postgres():
        return "date_part('epoch', clock_timestamp())"  # extract makes a number of any length, at twice the cost
    return "((julianday('now') - 2440587.5) * 86400.0)"


def moment() -> peewee.SQL:
    """Return the time at which the database got the statement, as SQL: the same wherever it stands, and however long that waits."""
    return peewee.SQL(_moment(_now()))


def _moment(now: str) -> str:
    return now.replace("clock_timestamp", "statement_timestamp")


def clock() -> float:
    """Ask the database for its time, in seconds since the epoch."""
    return float(database.execute_sql(f"SELECT {now().sql}").fetchone()[0])


def rows(statement: str, values: Sequence[Any] = (), *, in_order: bool = False) -> list[dict[str, Any]]:
    """Run a statement written by hand, with a question mark for each value, {now} and {moment} for what they return; return its rows.

    With `in_order` one that takes the first of an order goes along an index that has it, and what comes later is not even read.
    """
    return _dicts(database.obj.run(_spelled(statement), values, in_order=in_order))


def _dicts(cursor: Any) -> list[dict[str, Any]]:
    if cursor.description is None:
        return []
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _spelled(statement: str) -> str:
    return _with_times(statement, _now()) if "{" in statement else statement


@lru_cache(maxsize=100)
def _with_times(statement: str, now: str) -> str:
    return statement.replace("{moment}", _moment(now)).replace("{now}", now)


def ask(statement: str, values: Sequence[Any], *, in_order: bool = False) -> list[dict[str, Any]]:
    """Run a SELECT as Peewee has spelled it for this database; it is planned each time, for its values. For `in_order` see `rows`."""
    return _dicts(database.execute_sql(database.obj.in_order(statement) if in_order else statement, values))


def several(statements: Sequence[str]) -> tuple[float, list[list[dict[str, Any]]]]:
    """Run SELECTs without values, as `rows` does with `in_order`; return the database's time, and the rows of each.

    From Postgres they come with one answer.
    """
    if not is_postgres():
        return clock(), [rows(statement) for statement in statements]
    columns = [f"(SELECT json_agg(found) FROM ({statement}) AS found) AS answer{number}" for number, statement in enumerate(statements)]
    answer = rows(f"SELECT {{now}} AS now, {', '.join(columns)}", in_order=True)[0]
    return answer["now"], [answer[f"answer{number}"] or [] for number in range(len(statements))]


def among(column: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    """Return the condition that a column holds one of these values, as SQL, and its values, which to Postgres are one."""
    if is_postgres():
        return f"{column} = ANY (?)", [postgres.array(values)]
    return f"{column} IN ({', '.join('?' * len(values))})", list(values)


def found(column: str, statement: str) -> str:
    """Return the condition that a column holds what a SELECT finds, as SQL; in Postgres as an array, so that it is looked for once."""
    return f"{column} = ANY (ARRAY({statement}))" if is_postgres() else f"{column} IN ({statement})"


def listed(lines: Sequence[Sequence[Any]]) -> tuple[str, list[Any]]:
    """Return lines of values as SQL that can stand behind FROM, with their columns named column1, column2, …, and the values.

    Postgres gets a list for each column, of texts, so that one plan does for any number of lines.
    """
    if not is_postgres():
        return f"(VALUES {tuples(len(lines), len(lines[0]))}) AS given", [value for line in lines for value in line]
    columns = [postgres.array(column) for column in zip(*lines, strict=True)]
    names = ", ".join(f"column{number}" for number, _ in enumerate(columns, 1))
    return f"unnest({', '.join(['CAST(? AS text[])'] * len(columns))}) AS given ({names})", columns


def tuples(count: int, columns: int) -> str:
    """Return so many rows of question marks, as they stand behind VALUES."""
    return ", ".join([f"({', '.join('?' * columns)})"] * count)


def likely(condition: str) -> peewee.SQL:
    """Return a condition that most rows meet: SQLite, which keeps no statistics, would take an index on it before one that orders."""
    return peewee.SQL(condition if is_postgres() else f"likely({condition})")


def aside(column: str) -> str:
    """Return a text column as it stands in a condition by which no row is to be looked for.

    Postgres keeps a plan that it made while the table was empty: it would read the whole of an index for rows that are named by their id.
    """
    return f"({column} || '')" if is_postgres() else column


def place_of(text: str, column: Any) -> Any:
    """Return where a text stands in a column, from 1 on, 0 if nowhere, as SQL; case counts, which takes Postgres a fraction of the time."""
    return (peewee.fn.STRPOS if is_postgres() else peewee.fn.INSTR)(column, text)


#: Takes a table and columns and yields its rows, a few held in memory at a time.
Rows = Callable[[str, Sequence[str]], Iterator[tuple[Any, ...]]]

_FETCHED = 200


@contextmanager
def snapshot() -> Iterator[Rows]:
    """Let many tables be read as they are at this one moment, however long that takes; nobody is held up meanwhile.

    A task that has only arrived stands among the others there, so nothing has to be written for it.
    """
    with database.connection_context():
        database.execute_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY" if is_postgres() else "BEGIN DEFERRED")
        try:
            if is_postgres():
                database.execute_sql("SET LOCAL idle_in_transaction_session_timeout = 0")  # whoever reads may be busy for long with a table
            yield _from_postgres if is_postgres() else _from_sqlite
        finally:
            database.execute_sql("ROLLBACK")


def _from_sqlite(table: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    cursor = database.execute_sql(_kept(table, columns, "SELECT * FROM task_arrived GROUP BY id"))
    while rows := cursor.fetchmany(_FETCHED):
        yield from rows


def _from_postgres(table: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    database.execute_sql(
        f"DECLARE snapshot_rows NO SCROLL CURSOR FOR {_kept(table, columns, 'SELECT DISTINCT ON (id) * FROM task_arrived')}"
    )
    while rows := database.execute_sql(f"FETCH {_FETCHED} FROM snapshot_rows").fetchall():
        yield from rows
    database.execute_sql("CLOSE snapshot_rows")


def _kept(table: str, columns: Sequence[str], once: str) -> str:
    """Return a SELECT of the rows of a table, and of those that tasks would get there which have only arrived."""
    more = f" UNION ALL {arrived.arriving(table, columns, once)}" if table in ("task", "task_event") else ""
    return f"SELECT {', '.join(columns)} FROM {table}{more}"


def instant() -> peewee.SQL:
    """Return `now` as one value for all of a statement, by which rows can be looked for: Postgres reads its clock anew for each."""
    return peewee.SQL(f"(SELECT {now().sql})")


def has_tables() -> bool:
    """Whether a tower has prepared the database, this one or an older."""
    return read(lambda: bool(database.table_exists("task")), sees_arrived=False)


def schema() -> list[str]:
    """Return the names of the steps that this tower's schema is made of, in order."""
    return sorted(path.stem for path in _MIGRATIONS.glob("[0-9]*.py"))


def _forget_statistics() -> None:
    """Drop what an ANALYZE left in SQLite: it has averages only, by which a million ended tasks make the few that run look like many."""
    if rows("SELECT name FROM sqlite_master WHERE name = 'sqlite_stat1'"):
        database.execute_sql("DROP TABLE sqlite_stat1")


def migrate(*, patience_s: float = 30.0) -> list[str]:
    """Bring the schema up to date, once, however many processes start together; return what was applied."""

    def work() -> list[str]:
        if is_postgres():
            database.execute_sql("SELECT pg_advisory_xact_lock(%s)", (_MIGRATION_LOCK,))
        runner = Runner(database.obj, str(_MIGRATIONS))
        _refuse_newer(runner.status())
        applied = list(runner.up())
        if not is_postgres():
            _forget_statistics()
        fault("migrate.mid")
        return applied

    return unit(work, patience_s=patience_s, sees_arrived=False)

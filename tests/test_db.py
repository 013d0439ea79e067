"""The database: migrations, retries, and what a failure looks like."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import peewee
import pytest

from tests import rows as r
from tests.conftest import QUICK
from tests.servers import Postgres, wait_for
from tower import db, sqlite
from tower.errors import SettingsError, Unavailable
from tower.models import TABLES, Task, new_id
from tower.settings import Settings
from tower.trouble import Trouble

#: How many migrations there are.
STEPS = len(list((Path(db.__file__).parent / "migrations").glob("0*.py")))


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A Postgres that the test may break."""
    server = Postgres(fsync=True).start()
    yield server
    db.close_database()
    server.close()


def test_the_models_fit_the_migrated_schema(rows: Settings) -> None:
    """Every table has exactly the columns that its model has."""
    for model in TABLES:
        with db.database.connection_context():
            columns = {column.name: column.null for column in db.database.get_columns(model._meta.table_name)}
        assert columns == {field.column_name: field.null for field in model._meta.sorted_fields}, model


def test_postgres_compares_names_and_ids_by_their_bytes(new_database: Callable[[], str]) -> None:
    """All but titles, which people look for without regard to case: the rules of a language took a quarter of what a task cost."""
    db.open_database(Settings(database_url=new_database()))
    db.migrate()
    texts = """
    SELECT attrelid::regclass::text AS of, attname AS name, collname AS rules
    FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid JOIN pg_collation ON pg_collation.oid = attcollation
    WHERE atttypid = 'text'::regtype AND attnum > 0 AND relkind = 'r' AND relnamespace = 'public'::regnamespace
    """
    found = db.read(lambda: db.rows(texts))
    by_rules = {(row["of"], row["name"]) for row in found if row["rules"] != "C"}
    assert by_rules == {("task", "title")}
    assert {row["of"] for row in found} >= {model._meta.table_name for model in TABLES} - {"decision"}


def test_a_view_in_the_way_of_an_upgrade_is_named(new_database: Callable[[], str]) -> None:
    """Postgres changes no column that a view shows, and somebody may have made one for his reports."""
    db.open_database(Settings(database_url=new_database()))
    db.migrate()
    step = import_module("tower.migrations.0012_bytewise")
    db.unit(lambda: db.database.execute_sql("CREATE VIEW report AS SELECT status, COUNT(*) FROM task GROUP BY status"))
    with pytest.raises(SettingsError, match=r"drop them, start the tower, and create them again\. They are: report$"):
        db.unit(lambda: step.up(None, db.database.obj))
    db.unit(lambda: db.database.execute_sql("DROP VIEW report"))
    db.unit(lambda: step.up(None, db.database.obj))


@pytest.mark.slow
def test_processes_that_start_together_migrate_once(settings: Settings) -> None:
    """One does it, the others wait for it."""
    code = f"""
from tower import db; from tower.settings import Settings
db.open_database(Settings(database_url={settings.database_url!r})); print(len(db.migrate()))
"""
    if settings.database_url.startswith("postgres"):
        db.open_database(settings)
        with db.database.connection_context():
            db.database.execute_sql("DROP SCHEMA public CASCADE")
            db.database.execute_sql("CREATE SCHEMA public")
        db.close_database()
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(process.communicate(timeout=60)[0].strip() for process in started) == ["0", "0", "0", str(STEPS)]


def test_a_database_of_a_newer_tower_is_refused(settings: Settings) -> None:
    """Rather than used wrongly."""
    db.open_database(settings)
    db.migrate()
    db.unit(lambda: db.database.execute_sql("INSERT INTO schema_migration (name, applied) VALUES ('9999_future', '2031-01-01')"))
    with pytest.raises(SettingsError, match="9999_future"):
        db.migrate()
    db.close_database()


def test_statistics_that_mislead_are_dropped_at_the_start(rows: Settings) -> None:
    """After an ANALYZE among ended tasks, SQLite would walk all of them to find those that run."""
    r.insert()
    db.unit(lambda: db.database.execute_sql("ANALYZE"))
    db.migrate()
    if not db.is_postgres():
        assert db.read(lambda: db.rows("SELECT name FROM sqlite_master WHERE name LIKE 'sqlite_stat%'")) == []


def test_a_unit_that_fails_leaves_nothing(rows: Settings) -> None:
    """All of it or none."""

    def work() -> None:
        r.insert()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        db.unit(work)
    assert db.read(lambda: Task.select().count()) == 0


def test_what_runs_again_after_a_lost_answer_is_asked_first_what_it_did(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """`recognise` is called on every run but the first."""
    calls = []

    def work() -> str:
        calls.append("work")
        raise peewee.OperationalError("the answer was lost")

    def recognise() -> str:
        calls.append("recognise")
        return "done before"

    assert db.unit(work, recognise=recognise) == "done before"
    assert calls == ["work", "recognise"]


def test_a_mistake_in_a_statement_is_no_outage(rows: Settings) -> None:
    """It is raised at once, not tried again."""
    with pytest.raises(peewee.PeeweeException):
        db.read(lambda: db.database.execute_sql("SELECT nothing FROM"))


def test_a_database_without_tables_is_unavailable(settings: Settings) -> None:
    """Until somebody has migrated it."""
    db.open_database(settings)
    if settings.database_url.startswith("postgres"):
        db.unit(lambda: db.database.execute_sql("DROP TABLE worker"))
    from tower.models import Worker

    with pytest.raises(Unavailable, match="not prepared"):
        db.read(lambda: Worker.select().count())
    db.close_database()


def test_many_threads_write_at_once(rows: Settings) -> None:
    """Without an error, and without losing one."""
    threads = [threading.Thread(target=lambda: [r.insert() for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert db.read(lambda: Task.select().count()) == 80


@pytest.mark.slow
def test_postgres_may_restart_under_us(own_postgres: Postgres) -> None:
    """A unit waits for it; every connection that broke is replaced."""
    db.open_database(Settings(database_url=own_postgres.url(), **QUICK))
    db.migrate()
    r.insert()
    own_postgres.stop(signal.SIGQUIT)
    restarted = threading.Thread(target=own_postgres.start)
    restarted.start()
    r.insert()
    restarted.join()
    own_postgres.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )
    r.insert()
    assert db.read(lambda: Task.select().count()) == 3


@pytest.mark.slow
def test_work_inside_other_work_starts_over_with_it(own_postgres: Postgres) -> None:
    """On a new connection: the one they share may be the one that broke."""
    db.open_database(Settings(database_url=own_postgres.url(), **QUICK))
    db.migrate()
    runs = []

    def outer() -> str:
        runs.append("outer")
        if len(runs) == 1:
            own_postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'devops-control-tower'")
        return r.insert()

    assert db.read(outer, patience_s=20)
    assert runs == ["outer", "outer"]
    assert db.read(lambda: Task.select().count()) == 1


@pytest.mark.slow
def test_patience_ends_with_a_clear_word(own_postgres: Postgres) -> None:
    """Unavailable, with the database's own first line."""
    db.open_database(Settings(database_url=own_postgres.url(), **QUICK))
    own_postgres.stop(signal.SIGQUIT)
    with pytest.raises(Unavailable, match="does not answer: connection to server"):
        db.unit(lambda: 1, patience_s=0.2)


def test_a_try_that_ends_badly_is_no_news_if_a_later_one_went_well() -> None:
    """Only if no answer came: that somebody holds a lock is true whatever else works."""
    trouble, before = Trouble(), time.monotonic()
    trouble.end(writing=False)
    trouble.begin(peewee.OperationalError("server closed the connection"), writing=True, tried_at=before)
    assert trouble.now() is None
    trouble.begin(peewee.OperationalError("database is locked"), writing=True, tried_at=before)
    assert "holds a lock" in str(trouble.now())
    trouble.end(writing=True)
    trouble.begin(peewee.OperationalError("server closed the connection"), writing=True, tried_at=time.monotonic())
    assert "does not answer" in str(trouble.now())


def test_sqlite_waits_for_another_writer(sqlite_settings: Settings) -> None:
    """Rather than failing with 'database is locked'."""
    db.open_database(sqlite_settings)
    db.migrate()
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with db.database.connection_context(), db.database.atomic():
            locked.set()
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait(10)
    threading.Timer(0.3, release.set).start()
    r.insert()
    holder.join()
    db.close_database()


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """With the cure."""
    with pytest.raises(SettingsError, match=r"there is no folder .*nowhere; make it first"):
        db.open_database(Settings(database_url=f"sqlite:///{tmp_path}/nowhere/tower.db"))


def test_sqlite_is_durable_and_never_blocks_readers(sqlite_settings: Settings) -> None:
    """WAL, synchronous FULL."""
    db.open_database(sqlite_settings)
    with db.database.connection_context():
        assert (db.database.journal_mode, db.database.synchronous, db.database.foreign_keys) == ("wal", 2, 1)
    db.close_database()
    wait_for("the connections to close", lambda: not Path(sqlite_settings.database_url.removeprefix("sqlite:///") + "-wal").exists(), 2)


def test_a_transaction_that_sqlite_has_ended_itself_says_why(sqlite_settings: Settings) -> None:
    """Its disk is full: that is an outage with a name, and no mistake of ours, although there is nothing left to roll back."""
    db.open_database(sqlite_settings)
    db.migrate()
    task_id = r.insert()
    with db.database.connection_context():
        pages = db.database.execute_sql("PRAGMA page_count").fetchone()[0]

    def work() -> None:
        db.database.execute_sql(f"PRAGMA max_page_count = {pages}")
        db.database.execute_sql("INSERT INTO task_event VALUES (?, 2, 0, 0, 'more', zeroblob(1000000))", (task_id,))

    with pytest.raises(Unavailable, match="disk is full"):
        db.unit(work, patience_s=0.1)
    r.insert(payload="{}")


def test_a_connection_that_failed_is_not_used_again(sqlite_settings: Settings) -> None:
    """One that SQLite opened while the disk was read-only would never write again."""
    db.open_database(sqlite_settings)
    db.migrate()

    def work() -> None:
        db.database.execute_sql("PRAGMA query_only = 1")  # stands in for the disk: it holds for this connection
        db.database.execute_sql("CREATE TABLE small (number INTEGER)")

    with pytest.raises(Unavailable, match="readonly"):
        db.unit(work, patience_s=0.1)
    r.insert()


SAID_BY_POSTGRES = {
    "40001": "holds a lock",
    "40P01": "holds a lock",
    "55P03": "holds a lock",
    "57014": "holds a lock",
    "53100": "disk of the database is full",
    "25006": "can only be read",
    "XX001": "is damaged",
    "XX002": "is damaged",
    "53300": "no more connections",
    "25P03": "does not answer",
    "25P04": "does not answer",
    "53200": "does not answer",
    "57P01": "does not answer",
    "57P03": "does not answer",
    "58030": "does not answer",
    "XX000": "does not answer",
}


@pytest.fixture
def postgres_rows(shared_database: str) -> Iterator[None]:
    """The database that tests of rows share, on Postgres alone."""
    db.open_database(Settings(database_url=shared_database, **QUICK))
    yield
    db.close_database()


@pytest.mark.usefixtures("postgres_rows")
@pytest.mark.parametrize("code", SAID_BY_POSTGRES)
def test_what_postgres_says_is_understood_in_any_language(code: str) -> None:
    """By its code; the same work may succeed a moment later, and a client is told to come again."""
    runs = []

    def once() -> int:
        runs.append(1)
        if len(runs) == 1:
            fail()
        return len(runs)

    def fail() -> None:
        db.database.execute_sql(f"DO $$ BEGIN RAISE EXCEPTION 'nanu' USING ERRCODE = '{code}'; END $$")

    assert db.unit(once) == 2
    with pytest.raises(Unavailable, match=SAID_BY_POSTGRES[code]):
        db.unit(fail, patience_s=0)


@pytest.mark.usefixtures("postgres_rows")
@pytest.mark.parametrize("code", ["22012", "23505", "42601", "25P02"])
def test_a_mistake_of_ours_is_not_taken_for_an_outage(code: str) -> None:
    """It would be tried again without end."""
    with pytest.raises(peewee.DatabaseError):
        db.unit(lambda: db.database.execute_sql(f"DO $$ BEGIN RAISE EXCEPTION 'nanu' USING ERRCODE = '{code}'; END $$"))


@pytest.mark.slow
@pytest.mark.usefixtures("postgres_rows")
def test_two_that_wait_for_each_other_both_get_their_turn() -> None:
    """Postgres ends one of a deadlock, which starts over."""
    first, second = r.insert(), r.insert()
    both = threading.Barrier(2)
    runs = []

    def touch(one: str, other: str) -> None:
        runs.append(one)
        Task.update(title=one).where(Task.id == one).execute()
        if len(runs) <= 2:
            both.wait(10)
        Task.update(title=one).where(Task.id == other).execute()

    threads = [threading.Thread(target=db.unit, args=(lambda pair=pair: touch(*pair),)) for pair in ((first, second), (second, first))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(runs) == 3
    assert r.row(first)["title"] == r.row(second)["title"]
    db.unit(lambda: Task.delete().execute())


def test_who_waits_behind_a_write_that_fails_is_told_why_it_does(sqlite_settings: Settings) -> None:
    """As long as others fail, and no longer: on a full disk each of them takes its time, and he has tried nothing himself."""
    db.open_database(sqlite_settings)
    db.migrate()

    def fail() -> None:
        raise peewee.OperationalError("database or disk is full")

    def told() -> str:
        with pytest.raises(Unavailable) as refused, ThreadPoolExecutor(1) as other, db._turn(1, writing=True):
            other.submit(db.unit, r.insert, patience_s=0.1).result()
        return refused.value.message

    assert told().startswith("Somebody holds a lock")
    with pytest.raises(Unavailable):
        db.unit(fail, patience_s=0.01)
    assert told().startswith("The disk of the database is full")
    db.unit(r.insert)
    assert told().startswith("Somebody holds a lock")


def test_a_pool_without_a_free_connection_is_no_hang(sqlite_settings: Settings) -> None:
    """Whoever waits for one is told to come again."""
    db.open_database(sqlite_settings.model_copy(update={"db_pool": 1}))
    db.migrate()
    db.database.obj._wait_timeout = 0.1
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with db.database.connection_context():
            taken.set()
            done.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(10)
    with pytest.raises(Unavailable, match="TOWER_DB_POOL"):
        db.read(lambda: Task.select().count(), patience_s=0)
    done.set()
    holder.join(10)
    assert db.read(lambda: Task.select().count()) == 0
    db.close_database()


def test_small_statements_are_not_compiled(rows: Settings) -> None:
    """Postgres would, since plans without an index count as dear: it took 70 ms for a task."""
    if db.is_postgres():
        with db.database.connection_context():
            assert db.database.execute_sql("SHOW jit").fetchone() == ("off",)


def test_threads_that_write_to_sqlite_share_a_connection(rows: Settings) -> None:
    """And whoever only reads leaves it to them, also after it was closed by an outage."""
    if db.is_postgres():
        return
    writing, reading = set[int](), set[int]()

    def work() -> None:
        for _ in range(5):
            db.unit(lambda: writing.add(id(db.database.connection())))
            db.read(lambda: reading.add(id(db.database.connection())))

    for _ in range(2):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(writing) == 1 and not writing & reading
        db.database.close_idle()
        writing.clear()
        reading.clear()


@pytest.fixture(params=["a file", "a link to one"])
def waits(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What others saw whenever the log of SQLite was waited for; the disk fails once for each time that is said here."""
    found: list[str] = []
    real, path, named = sqlite._sync, tmp_path / "real" / "tower.db", tmp_path / "tower.db"

    def sync(file: int) -> None:
        assert os.path.samestat(os.fstat(file), (path.parent / "tower.db-wal").stat())
        if "fail" in found:
            found.remove("fail")
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        seen = threading.Thread(target=lambda: found.append(str(db.read(lambda: Task.select().count()))))
        seen.start()
        seen.join()
        real(file)

    path.parent.mkdir()
    if request.param == "a link to one":
        path.touch()
        named.symlink_to(path)
    db.open_database(Settings(database_url=f"sqlite:///{path if request.param == 'a file' else named}"))
    db.migrate()
    monkeypatch.setattr(sqlite, "_sync", sync)
    yield found
    db.close_database()


def test_what_sqlite_has_promised_waits_for_the_disk_after_its_commit(waits: list[str]) -> None:
    """Others go on meanwhile; what is no promise goes to the disk with the next that is."""
    r.insert()
    assert waits == ["1"]
    db.unit(lambda: Task.update(title="a").execute(), is_promise=False)
    assert waits == ["1"]
    db.unit(lambda: [r.insert(), r.insert()])
    assert waits == ["1", "3"]
    db.read(r.insert)
    assert waits == ["1", "3", "4"]
    assert [db.unit(lambda number=number: number, is_promise=lambda found: found > 1) for number in (1, 2)] == [1, 2]
    assert waits == ["1", "3", "4", "4"]
    assert db.unit(lambda: db.database.execute_sql("PRAGMA synchronous").fetchone()) == (1,)


def test_what_is_written_in_the_midst_of_reading_waits_for_the_disk_no_other_way(waits: list[str]) -> None:
    """By a connection that was not opened for writing: after its commit, and only if something was promised."""
    r.insert()
    mark = partial(db.unit, lambda: [r.insert(), db.database.execute_sql("PRAGMA synchronous").fetchone()][1], is_promise=False)
    assert db.read(mark) == (1,)
    assert waits == ["1"]


def test_the_log_that_is_waited_for_is_the_one_of_now(waits: list[str]) -> None:
    """When the last connection closes SQLite deletes it, and begins another."""
    for close in (lambda: None, db.database.close_idle):
        db.read(partial(db.unit, r.insert))
        close()
        db.unit(r.insert)
        close()
    assert waits == ["1", "2", "3", "4"]


def test_a_file_that_is_gone_is_not_made_anew_by_who_only_reads(waits: list[str], tmp_path: Path) -> None:
    """However he reads."""
    r.insert()
    db.database.close_idle()
    path = (tmp_path / "real" / "tower.db").rename(tmp_path / "elsewhere")
    with pytest.raises(peewee.OperationalError, match="is gone"), db.snapshot():
        pass
    assert not (tmp_path / "real" / "tower.db").exists()
    path.rename(tmp_path / "real" / "tower.db")
    assert db.read(lambda: Task.select().count()) == 1
    assert waits == ["1"]


def test_one_wait_for_the_disk_serves_all_who_came_before_it(waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is served by one that had begun before he came."""
    begun, go_on, count = threading.Event(), threading.Event(), list[int]()

    def sync(file: int) -> None:
        count.append(file)
        begun.set()
        go_on.wait(20)

    monkeypatch.setattr(sqlite, "_sync", sync)
    threads = [threading.Thread(target=r.insert) for _ in range(6)]
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    wait_for("the others", lambda: db.read(lambda: Task.select().count()) == 6)
    wait_for("them all to wait", lambda: sum("settle" in _frames(thread) for thread in threads) == 6)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(count) == 2


def _frames(thread: threading.Thread) -> list[str]:
    """Return the functions that a thread is in."""
    frame, names = sys._current_frames().get(thread.ident or 0), []
    while frame:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_a_disk_that_did_not_take_the_log_has_to_take_the_file(waits: list[str]) -> None:
    """Asked again it would only say that there is nothing left to write. What was committed is not done again."""
    runs: list[str] = []
    waits.append("fail")
    db.unit(lambda: runs.append(r.insert()))
    assert (waits, len(runs)) == ([], 1)
    assert Path(f"{os.path.realpath(db.database.obj.database)}-wal").stat().st_size == 0
    assert r.row(runs[0])["status"] == "queued"
    r.insert()
    assert waits == ["2"]


def test_a_commit_that_failed_is_done_again(waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was worked out before it counts for nothing."""
    real, failures = db.database.obj.commit, ["once"]

    def commit() -> None:
        if failures:
            failures.pop()
            raise peewee.OperationalError("disk I/O error")
        real()

    monkeypatch.setattr(db.database.obj, "commit", commit)
    task_id = r.insert()
    assert r.row(task_id)["status"] == "queued"


def test_nothing_is_promised_while_neither_log_nor_file_can_be_written(waits: list[str]) -> None:
    """Somebody reads what the log would have to be brought over."""
    r.insert()
    reader = sqlite3.connect(db.database.obj.database, isolation_level=None)
    reader.execute("PRAGMA busy_timeout = 0")
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM task").fetchone()
    waits[:] = ["fail"]
    with pytest.raises(Unavailable, match=r"disk I/O error|log could not be brought"):
        db.unit(lambda: Task.update(title="b").execute(), patience_s=0.2)
    with pytest.raises(Unavailable, match=r"disk I/O error|log could not be brought"):
        db.unit(lambda: Task.update(title="c").execute(), patience_s=0.2)
    reader.close()
    db.unit(lambda: Task.update(title="d").execute())
    assert waits == []


def test_a_process_without_free_descriptors_is_no_broken_disk(waits: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The log cannot be opened for a moment: nothing is promised, and nothing done twice."""
    runs: list[str] = []
    real, failures = os.open, ["once"]

    def no_more(*arguments: Any, **options: Any) -> int:
        if failures and str(arguments[0]).endswith("-wal"):
            failures.pop()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*arguments, **options)

    db._file.close()
    monkeypatch.setattr(os, "open", no_more)
    db.unit(lambda: runs.append(r.insert()))
    assert (len(runs), waits, failures, db._file.has_failed) == (1, ["1"], [], False)


def test_who_reads_in_turn_waits_for_a_writer_a_moment_only(waits: list[str]) -> None:
    """It is one with the writers of this process, but a writer that hangs holds it up no longer than it has to."""
    inside, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        inside.set()
        go_on.wait(20)
        order.append("written")

    writer = threading.Thread(target=lambda: db.unit(work))
    writer.start()
    assert inside.wait(20)
    db.read(lambda: order.append("read"), in_turn=True)
    threading.Timer(0.01, go_on.set).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "_READ_TURN_S", 20)
        db.read(lambda: order.append("read"), in_turn=True)
    writer.join()
    assert order == ["read", "written", "read"]


def test_ids_sort_by_when_they_were_made() -> None:
    """Also those of one millisecond: whatever is listed or started in order goes by them."""
    made = []
    for _ in range(2000):
        made.append(new_id())
        until = time.perf_counter_ns() + 2000
        while time.perf_counter_ns() < until:
            pass
    assert made == sorted(made)
    assert {(uuid.UUID(one).version, uuid.UUID(one).variant) for one in made} == {(7, uuid.RFC_4122)}

"""What is special about SQLite: an event loop takes a task in by itself, if nobody and nothing has to be waited for."""

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from tests import rows as r
from tests.engine import OWN, Engine, run
from tower import db, moves
from tower import sqlite as module
from tower.models import Task
from tower.settings import Settings
from tower.terms import QUEUED


class OnSqlite(Engine):
    """An engine on SQLite, and in which threads the disk was waited for."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.path = settings.database_url.removeprefix("sqlite:///")
        self.waited = list[threading.Thread]()
        #: The time by which the disk is measured, how long it takes, and what goes wrong there the next time.
        self.now, self.takes_s, self.error = 0.0, 0.0, 0
        #: Whether it answers.
        self.answers = threading.Event()
        self.answers.set()

    def sync(self, file: int) -> None:
        """Stand for the disk."""
        self.waited.append(threading.current_thread())
        self.now += self.takes_s
        assert self.answers.wait(20)
        error, self.error = self.error, 0
        if error:
            raise OSError(error, os.strerror(error))

    async def warm(self) -> None:
        """Enqueue until it is clear that nobody else does."""
        ids = [await self.enqueue() for _ in range(2)]
        assert self.in_thread == ids[:1]
        self.in_thread.clear()
        self.waited.clear()

    async def hang(self) -> threading.Thread:
        """Return a thread that writes, once the disk does not answer it."""
        self.answers.clear()
        hanging = threading.Thread(target=r.insert)
        hanging.start()
        async with asyncio.timeout(20):
            while not self.waited:
                await asyncio.sleep(0.01)
        return hanging


@pytest.fixture
def engine(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnSqlite]:
    """On a file that has been written to, and a disk that takes no time."""
    db.open_database(sqlite_settings)
    made = OnSqlite(sqlite_settings)
    monkeypatch.setattr(module, "_sync", made.sync)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr("tower.group._ALONE", 2)
    monkeypatch.setattr("tower.group._TURN_S", 0.0)
    db.migrate()
    yield made
    db.close_database()


def _is_there_once(task_id: str) -> bool:
    return (r.row(task_id)["status"], r.kinds(task_id)) == (QUEUED, ["queued"])


def test_a_task_is_the_same_whether_the_loop_or_a_thread_has_written_it(engine: OnSqlite) -> None:
    """Its row and its first event; and the disk is waited for each time."""

    async def work() -> None:
        await engine.warm()
        ids = [await engine.enqueue(priority=3) for _ in range(3)]
        assert engine.waited == [threading.main_thread()] * 3
        ids += await asyncio.gather(*(engine.enqueue(priority=3) for _ in range(20)))
        assert engine.in_thread == ids[4:]
        assert len(engine.waited) == 5
        after = [await engine.enqueue(priority=3) for _ in range(3)]
        assert engine.in_thread == [*ids[4:], after[0]]  # more of them may come
        ids += after

        found = [{name: value for name, value in r.row(task_id).items() if name not in OWN} for task_id in ids]
        assert found == [found[0]] * len(ids)
        assert all(r.kinds(task_id) == ["queued"] for task_id in ids)

    run(work)


@pytest.mark.parametrize(("turn_s", "most"), [(0.0, 1), (0.002, 1000)])
def test_others_have_their_turn_between_tasks_that_the_loop_writes(
    engine: OnSqlite, monkeypatch: pytest.MonkeyPatch, turn_s: float, most: int
) -> None:
    """Whoever asks for one after the other does not keep the loop for himself: at once, or after two milliseconds."""
    monkeypatch.setattr("tower.group._TURN_S", turn_s)

    async def work() -> None:
        await engine.warm()
        await engine.enqueue()
        turns = asyncio.create_task(asyncio.sleep(0))
        for _ in range(most):
            await engine.enqueue()
            if turns.done():
                break
        assert turns.done()
        assert engine.in_thread == []

    run(work)


def test_whoever_asks_again_at_once_is_answered_without_a_turn(engine: OnSqlite, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of the loop costs as much as to take a task in; others come a moment later, and are then seen."""
    monkeypatch.setattr("tower.group._TURN_S", 60.0)

    async def work() -> None:
        await engine.warm()
        await engine.enqueue()
        others = asyncio.create_task(engine.enqueue())
        ids = [await engine.enqueue() for _ in range(3)]
        assert not others.done()
        assert engine.in_thread == []
        assert all(_is_there_once(task_id) for task_id in [*ids, await others])

    run(work)


def test_a_crowd_is_seen_though_the_loop_was_busy_when_it_came(engine: OnSqlite) -> None:
    """Who comes in the turn of the loop that comes next goes together with the others, in a thread."""

    async def work() -> None:
        await engine.warm()
        loop, asked = asyncio.get_running_loop(), list[asyncio.Task[str]]()
        first = asyncio.create_task(engine.enqueue())

        def come() -> None:
            asked.extend(asyncio.create_task(engine.enqueue()) for _ in range(3))

        loop.call_soon(come)
        await first
        others = await asyncio.gather(*asked)
        assert engine.in_thread == others

    run(work)


def test_a_disk_that_is_slow_holds_no_loop_up(engine: OnSqlite) -> None:
    """But the first who meets it; and once it is quick again for a while, the loop waits for it as before."""

    async def work() -> None:
        await engine.warm()
        engine.takes_s = 0.02
        await engine.enqueue()
        ids = [await engine.enqueue() for _ in range(3)]
        assert engine.in_thread == ids
        engine.takes_s = 0.0
        async with asyncio.timeout(20):
            while (await engine.enqueue()) in engine.in_thread:
                pass

    run(work)


def test_a_disk_that_hangs_is_known_as_slow_before_it_answers(engine: OnSqlite) -> None:
    """A thread waits for it; the loop goes on."""

    async def work() -> None:
        await engine.warm()
        hanging = await engine.hang()
        engine.now += 1.0
        asked = asyncio.create_task(engine.enqueue())
        await engine.until_in_thread()
        engine.answers.set()
        assert engine.in_thread == [await asked]
        await asyncio.to_thread(hanging.join)

    run(work)


def test_a_writer_in_another_process_is_waited_for_in_a_thread(engine: OnSqlite) -> None:
    """With the patience that the loop does not have."""

    async def work() -> None:
        await engine.warm()
        with closing(sqlite3.connect(engine.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            pen = db.database.obj._pen
            asked = asyncio.create_task(engine.enqueue())
            await engine.until_in_thread(2)
            other.execute("ROLLBACK")
            assert await asked
            assert db.database.obj._pen is pen  # it is as good as before
            assert engine.in_thread == [await asked]
        assert _is_there_once(await asked)

    run(work)


def test_a_writer_of_this_process_is_waited_for_in_a_thread(engine: OnSqlite) -> None:
    """It has the connection for writing in hand."""

    async def work() -> None:
        await engine.warm()
        inside, go_on = threading.Event(), threading.Event()
        writer = threading.Thread(target=lambda: db.unit(lambda: (inside.set(), go_on.wait(20))))
        writer.start()
        await asyncio.to_thread(inside.wait, 20)
        asked = asyncio.create_task(engine.enqueue())
        await engine.until_in_thread()
        go_on.set()
        assert engine.in_thread == [await asked]
        await asyncio.to_thread(writer.join)

    run(work)


@pytest.mark.parametrize("why", ["it is closed", "somebody opens one", "something is under way"])
def test_a_connection_that_is_not_at_hand_is_left_to_a_thread(engine: OnSqlite, why: str) -> None:
    """To open one takes its time, and to wait for one as well."""
    pool = db.database.obj

    async def work() -> None:
        await engine.warm()
        if why == "it is closed":
            pool.close_idle()
            task_id = await engine.enqueue()
        elif why == "somebody opens one":
            held, go_on = threading.Event(), threading.Event()

            def hold() -> None:
                with pool._pool_lock:
                    held.set()
                    assert go_on.wait(20)

            holder = threading.Thread(target=hold)
            holder.start()
            await asyncio.to_thread(held.wait, 20)
            asked = asyncio.create_task(engine.enqueue())
            await engine.until_in_thread()
            go_on.set()
            task_id = await asked
        else:
            with db.database.connection_context():
                task_id = await engine.enqueue()
                assert not db.database.is_closed()
        assert engine.in_thread == [task_id]
        assert _is_there_once(task_id)

    run(work)


def test_a_wait_of_another_that_begins_to_hang_holds_no_loop_up(engine: OnSqlite) -> None:
    """It has waited for less than a moment: the disk still counts as quick."""

    async def work() -> None:
        await engine.warm()
        hanging = await engine.hang()
        assert db._file.is_quick
        asked = asyncio.create_task(engine.enqueue())
        await engine.until_in_thread()
        engine.answers.set()
        assert engine.in_thread == [await asked]
        assert _is_there_once(await asked)
        await asyncio.to_thread(hanging.join)

    run(work)


def test_what_goes_wrong_after_the_commit_is_done_again_by_a_thread(engine: OnSqlite, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the task there, and nobody waits for ever."""

    async def work() -> None:
        await engine.warm()
        real, failures = moves._tell_new, ["once"]

        def tell(*told: Any) -> None:
            if failures:
                raise RuntimeError(failures.pop())
            real(*told)

        monkeypatch.setattr(moves, "_tell_new", tell)
        async with asyncio.timeout(20):
            task_id = await engine.enqueue()
        assert (engine.in_thread, failures) == ([task_id], [])
        assert _is_there_once(task_id)
        async with asyncio.timeout(20):
            await engine.enqueue()
            await engine.orchestrator._gathering.stop()

    run(work)


def test_a_task_that_the_disk_did_not_take_is_brought_there_by_a_thread(engine: OnSqlite) -> None:
    """It is entered once, and promised only when the file has it."""

    async def work() -> None:
        await engine.warm()
        engine.error, engine.takes_s = errno.EIO, 20.0
        task_id = await engine.enqueue()
        assert not db._file.is_quick
        assert engine.in_thread == [task_id]
        assert os.stat(f"{engine.path}-wal").st_size == 0
        assert _is_there_once(task_id)

    run(work)


def test_a_file_that_is_gone_is_told_of_as_always(engine: OnSqlite) -> None:
    """The loop writes nothing into nowhere."""

    async def work() -> None:
        await engine.warm()
        os.rename(engine.path, f"{engine.path}.away")
        asked = asyncio.create_task(engine.enqueue())
        await engine.until_in_thread()
        assert not os.path.exists(engine.path)
        os.rename(f"{engine.path}.away", engine.path)
        assert _is_there_once(await asked)

    run(work)


def test_the_loop_leaves_it_to_others_to_bring_the_log_into_the_file(engine: OnSqlite, monkeypatch: pytest.MonkeyPatch) -> None:
    """That waits for the disk for long. And whoever has time has it again after a turn of the loop."""
    monkeypatch.setattr(module, "_CHECKPOINT_PAGES", 1)
    asked = ("busy_timeout", "wal_autocheckpoint")

    def pragmas() -> list[int]:
        pen = db.database.obj._pen
        return [pen.execute(f"PRAGMA {name}").fetchone()[0] for name in asked]

    async def work() -> None:
        await engine.warm()
        before = os.stat(engine.path).st_size
        for _ in range(20):
            await engine.enqueue()
        assert (engine.in_thread, os.stat(engine.path).st_size) == ([], before)
        assert pragmas() == [0, 0]
        db.unit(lambda: Task.update(title="a").execute())
        assert os.stat(engine.path).st_size > before
        assert pragmas() == [module._WAIT_MS, 1]

    run(work)

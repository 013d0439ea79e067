"""The same key means the same task, however many ask for it at the same moment and whatever happens in between."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from actors.handlers import load
from tests import rows as r
from tower import db, faults, queries
from tower.errors import Conflict
from tower.models import Task, new_id
from tower.orchestrator import Accepted, EnhancedOrchestrator
from tower.settings import Settings
from tower.spec import TaskSpec

THREADS = 16


@pytest.fixture
def front(rows: Settings, nudges: r.Nudges) -> EnhancedOrchestrator:
    return EnhancedOrchestrator(rows, load(), nudges)  # type: ignore[arg-type]


@pytest.fixture
def all_look_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every thread look for its keys before any inserts; where writers take turns anyway, nobody waits for long."""
    looked, seen = threading.Barrier(THREADS), queries.by_idempotency_key

    def slowly(wanted: Any) -> Any:
        found = seen(wanted)
        with suppress(threading.BrokenBarrierError):
            looked.wait(0.3)
        return found

    monkeypatch.setattr(queries, "by_idempotency_key", slowly)


def spec(key: str | None, **payload: Any) -> TaskSpec:
    return TaskSpec(type="echo", payload=payload, idempotency_key=key)


def together(work: Callable[[int], Any]) -> list[Any]:
    """Do it in every thread at the same moment; return what came of each, also a Conflict."""
    start = threading.Barrier(THREADS)

    def one(number: int) -> Any:
        start.wait(20)
        try:
            return work(number)
        except Conflict as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


def keys() -> list[str]:
    return sorted(row[0] for row in db.read(lambda: list(Task.select(Task.idempotency_key).tuples())))


@pytest.mark.usefixtures("all_look_first")
def test_the_same_request_at_the_same_moment_makes_one_task(front: EnhancedOrchestrator, nudges: r.Nudges) -> None:
    """One is told that it is new, the others get the same id, and one nudge is sent."""
    told: list[Accepted] = together(lambda _: front.accept(spec("once", a=1)))
    assert len({one.id for one in told}) == 1
    assert sum(one.new for one in told) == 1
    assert keys() == ["once"]
    assert r.kinds(told[0].id) == ["queued"]
    assert len(nudges.sent) == 1


@pytest.mark.usefixtures("all_look_first")
def test_of_different_requests_with_one_key_exactly_one_wins(front: EnhancedOrchestrator) -> None:
    """The others are told which task has the key."""
    told = together(lambda number: front.accept(spec("once", number=number)))
    won = [one for one in told if isinstance(one, Accepted)]
    lost = [one for one in told if isinstance(one, Conflict)]
    assert (len(won), won[0].new, len(lost)) == (1, True, THREADS - 1)
    assert {(error.code, error.extra["task_id"]) for error in lost} == {("idempotency_conflict", won[0].id)}
    assert keys() == ["once"]


@pytest.mark.usefixtures("all_look_first")
def test_batches_that_share_keys_make_each_task_once(front: EnhancedOrchestrator) -> None:
    """Keys twice in a batch, in every batch, and in different orders."""
    names = [f"key-{number}" for number in range(20)]

    def turned(number: int) -> list[str]:
        return names[number:] + names[:number]

    def batch(number: int) -> list[Accepted]:
        return front.enqueue_all([spec(name, name=name) for name in (*turned(number), *turned(number)[:3])])

    told: list[list[Accepted]] = together(batch)
    ids = [{name: one.id for name, one in zip(turned(number), some, strict=False)} for number, some in enumerate(told)]
    assert all(one == ids[0] for one in ids)
    assert [one.id for one in told[0][20:]] == [one.id for one in told[0][:3]]
    assert keys() == sorted(names)


def test_of_batches_with_one_conflicting_key_one_is_taken_whole_and_the_others_not_at_all(front: EnhancedOrchestrator) -> None:
    """All or none also holds when others are as fast."""
    told = together(lambda number: front.enqueue_all([spec(f"own-{number}"), spec("shared", number=number)]))
    won = [number for number, one in enumerate(told) if not isinstance(one, Conflict)]
    assert len(won) == 1
    assert keys() == sorted([f"own-{won[0]}", "shared"])


def test_a_conflict_within_a_batch_takes_nothing(front: EnhancedOrchestrator) -> None:
    """Even if nobody else has the key."""
    with pytest.raises(Conflict, match="another body"):
        front.enqueue_all([spec("twice", a=1), spec(None), spec("twice", a=2)])
    assert db.read(lambda: Task.select().count()) == 0


def test_a_commit_whose_answer_was_lost_makes_no_second_task(front: EnhancedOrchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is done again, and finds its own row; without a key likewise."""
    unit = db.unit

    def doubled(work: Callable[[], Any], **options: Any) -> Any:
        unit(work, **options)
        return unit(work, **options)

    monkeypatch.setattr(db, "unit", doubled)
    told = [front.accept(spec("once", a=1)), front.accept(spec(None, a=2))]
    assert [one.new for one in told] == [True, True]
    assert db.read(lambda: Task.select().count()) == 2
    assert [r.kinds(one.id) for one in told] == [["queued"]] * 2


def test_a_key_whose_task_is_removed_at_that_moment_is_taken_anew(front: EnhancedOrchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told of a task that has no row."""
    old, seen = front.accept(spec("once")).id, queries.by_idempotency_key
    answers = [{}]  # it is not seen at first, stands in the way, and is gone when looked for again

    def removed(wanted: Any) -> Any:
        if answers:
            return answers.pop()
        Task.delete().where(Task.id == old).execute()
        return seen(wanted)

    monkeypatch.setattr(queries, "by_idempotency_key", removed)
    told = front.accept(spec("once", a=1))
    assert told.new and told.id != old
    assert r.row(told.id)["idempotency_key"] == "once"


ASK = """
import sys
from actors.handlers import load
from tower import db, faults, settings
from tower.orchestrator import EnhancedOrchestrator
from tower.spec import TaskSpec
class Quiet:
    def send(self, actor, task_id): return True
loaded = settings.load()
faults.arm(loaded.fault)
db.open_database(loaded)
told = EnhancedOrchestrator(loaded, load(), Quiet()).accept(TaskSpec(type="echo", idempotency_key="once"))
print(told.id, told.new)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("point", "kept"), [("front.before_insert", 0), ("front.after_commit", 1), ("front.after_send", 1)])
def test_a_client_that_asks_again_after_kill_9_gets_one_task(rows: Settings, front: EnhancedOrchestrator, point: str, kept: int) -> None:
    """Wherever the server died, and whether or not the first request was kept."""
    environment = {"DATABASE_URL": rows.database_url, "TRACE_DIR": str(rows.trace_dir), "TOWER_FAULT": f"{point}:1:kill"}
    asked = [sys.executable, "-c", ASK]
    died = subprocess.run(asked, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, check=False)
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, b""), died.stderr
    assert db.read(lambda: Task.select().count()) == kept

    again = front.accept(TaskSpec(type="echo", idempotency_key="once"))

    assert again.new is not bool(kept)
    assert keys() == ["once"]


def test_the_points_of_the_front_are_passed(front: EnhancedOrchestrator) -> None:
    """Each of them, once for a request."""
    for point, kept in (("front.before_insert", 0), ("front.after_commit", 1), ("front.after_send", 1)):
        faults.arm(f"{point}:1:raise")
        try:
            with pytest.raises(OSError, match="asked for"):
                front.accept(spec(new_id()))
        finally:
            faults.arm(None)
        assert db.read(lambda: Task.select().count()) == kept
        db.unit(lambda: Task.delete().execute())

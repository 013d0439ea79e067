"""The slots of a worker, beside a dispatcher that nothing wakes but nudges and ends: what is dispatched finds them at once."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peewee
import pytest
from pydantic import BaseModel, ConfigDict

from actors.orchestrator import Dispatcher
from actors.runner import Runner
from actors.walk import Walk, look
from actors.worker import WorkerProcess
from tests import rows as r
from tests.servers import wait_for
from tower import db, lifecycle, load, queries, sqlite
from tower.broker import ORCHESTRATE
from tower.errands import Errand
from tower.handler import Fail, HandlerType, Registry, TaskContext
from tower.models import Task, Worker
from tower.settings import Settings
from tower.terms import CANCELLED, DISPATCHED, FAILED, FINAL, QUEUED, RUNNING, SUCCEEDED


class _Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Nudges(r.Nudges):
    """Nudges that reach the dispatcher of this process."""

    errand: Errand

    def send(self, actor_name: str, *task_ids: str) -> bool:
        if actor_name == ORCHESTRATE:
            self.errand.ask(*task_ids)
        return super().send(actor_name, *task_ids)


class _Crew:
    """A worker whose type `echo` does what a test says."""

    def __init__(self, settings: Settings, slots: int, lag_s: Callable[[], float]) -> None:
        nudges, registry = _Nudges(), Registry()
        registry._types["echo"] = HandlerType("echo", self._handle, payload=_Anything, queue="default", timeout_s=60.0, max_attempts=1)
        self.act: Callable[[Any, TaskContext], object] = lambda payload, task: None
        self.worker = WorkerProcess(settings, nudges, slots=slots, queues=["default"])  # type: ignore[arg-type]
        self.dispatcher = Dispatcher(settings, nudges)  # type: ignore[arg-type]
        self.runner = Runner(settings, registry, nudges, self.worker, self.dispatcher.run_pass, None, lag_s)  # type: ignore[arg-type]
        self.dispatcher.slots = self.runner
        nudges.errand = Errand("test", self._decide)
        self.errand = nudges.errand

    def _handle(self, payload: Any, task: TaskContext) -> object:
        return self.act(payload, task)

    def _decide(self, asked: Any) -> None:
        self.dispatcher.answer(asked)
        self.runner.fill()

    def be_busy(self) -> None:
        """Have ended so many short tasks that a pass chooses more than there are free slots."""
        self.runner._tempo._short = 100

    def be_quick(self) -> None:
        """Have seen that echo is quick."""
        self.runner._tempo.note("echo", 0.0)


@contextmanager
def _crew(settings: Settings, slots: int, lag_s: Callable[[], float] = float) -> Iterator[_Crew]:
    crew = _Crew(settings, slots, lag_s)
    crew.worker.start(crew.runner.look, lambda: crew.dispatcher.due_s, crew.runner.abandon)
    crew.errand.start()
    try:
        wait_for("its row", lambda: bool(db.read(lambda: queries.live_workers(30))))
        yield crew
    finally:
        if crew.worker.id in {worker["id"] for worker in db.read(lambda: queries.live_workers(30))}:
            crew.worker.stop(0)
        crew.errand.stop()


@pytest.fixture(autouse=True)
def _blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker looks by itself."""
    monkeypatch.setattr("actors.worker._LOOK_S", 1e9)


def _statuses(ids: list[str]) -> list[str]:
    return [r.row(task_id)["status"] for task_id in ids]


def _wait_for_ends(ids: list[str]) -> list[str]:
    wait_for("the ends", lambda: all(status in FINAL for status in _statuses(ids)))
    return _statuses(ids)


def test_one_nudge_is_enough_for_more_tasks_than_there_are_slots(rows: Settings) -> None:
    """Each slot goes on with what another process has dispatched."""
    with _crew(rows, 2) as crew:
        ids = [r.insert() for _ in range(8)]
        r.dispatch(*ids)
        crew.runner.handle()
        assert _wait_for_ends(ids) == [SUCCEEDED] * 8


@pytest.mark.usefixtures("no_pass")
def test_what_fits_into_free_slots_starts_with_the_commit_that_chooses_it(rows: Settings, dispatched: list[str]) -> None:
    """Not with a second one; what does not fit, or is of a queue that this worker does not serve, is dispatched first."""
    with _crew(rows, 2) as crew:
        r.add_worker("w2", queues='["other"]')
        few = [r.insert(), r.insert()]
        assert crew.dispatcher.run_pass() == 2
        assert _wait_for_ends(few) == [SUCCEEDED] * 2
        assert dispatched == []
        wait_for("the slots to be free", lambda: crew.worker.free_slots == 2)
        many = [r.insert() for _ in range(3)]
        crew.dispatcher.run_pass()
        assert dispatched == many
        assert _wait_for_ends(many) == [SUCCEEDED] * 3
        elsewhere = r.insert(queue="other")
        crew.dispatcher.run_pass()
        assert (dispatched[3:], _statuses([elsewhere])) == ([elsewhere], [DISPATCHED])


def test_what_was_dispatched_before_starts_before_what_is_chosen_now(rows: Settings) -> None:
    """Though nobody has claimed it yet, and there is a free slot for each of those that are chosen."""
    go_on = threading.Event()
    with _crew(rows, 2) as crew:
        crew.act = lambda payload, task: go_on.wait(60)
        first = r.insert()
        assert r.dispatch(first) == [first]
        ids = [first, r.insert(), r.insert()]
        crew.dispatcher.run_pass()
        wait_for("two to run", lambda: _statuses(ids) == [RUNNING, RUNNING, DISPATCHED])
        go_on.set()
        assert _wait_for_ends(ids) == [SUCCEEDED] * 3


def _look() -> Walk:
    def chosen() -> Walk:
        walk = look(30, 8)
        walk.step()
        return walk

    return db.read(chosen)


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """No end asks for a pass."""
    monkeypatch.setattr("actors.runner.ORCHESTRATE", "nobody")


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the tasks that a pass dispatches for whoever claims them."""
    made, really = list[str](), lifecycle.dispatch
    monkeypatch.setattr(lifecycle, "dispatch", lambda ids, token: made.extend(ids) or really(ids, token))  # type: ignore[func-returns-value]
    return made


@pytest.mark.usefixtures("no_pass")
def test_what_is_kept_starts_with_the_ends_that_free_slots_for_it(rows: Settings, dispatched: list[str]) -> None:
    """In its order, and dispatched at that moment only: until then it can be held up or passed."""
    ran, go_on = list[str](), threading.Event()
    with _crew(rows, 1) as crew:
        crew.act = lambda payload, task: ran.append(task.id) or go_on.wait(60)  # type: ignore[func-returns-value]
        ids = [r.insert() for _ in range(8)]
        assert crew.runner.start(_look(), keeps=True) == 8
        wait_for("one to run", lambda: ran == ids[:1])
        assert _statuses(ids) == [RUNNING] + [QUEUED] * 7
        assert crew.runner.start(_look(), keeps=True) == 7
        go_on.set()
        assert _wait_for_ends(ids) == [SUCCEEDED] * 8
    assert ran == ids
    assert dispatched == []
    assert all(r.kinds(task_id) == ["queued", "dispatched", "started", "succeeded"] for task_id in ids)


@pytest.mark.usefixtures("no_pass")
def test_there_is_plenty_while_a_task_is_kept_for_each_slot(rows: Settings) -> None:
    """Then another pass is not needed soon."""
    go_on = threading.Semaphore(0)
    with _crew(rows, 2) as crew:
        crew.act = lambda payload, task: go_on.acquire(timeout=60)
        ids = [r.insert() for _ in range(4)]
        assert not crew.runner.has_plenty()
        assert crew.runner.start(_look(), keeps=True) == 4
        assert crew.runner.has_plenty()
        go_on.release()
        wait_for("the next to start", lambda: _statuses(ids).count(QUEUED) == 1)
        assert not crew.runner.has_plenty()
        go_on.release(3)
        assert _wait_for_ends(ids) == [SUCCEEDED] * 4
        crew.runner._desk.keep([r.insert() for _ in range(4)], 0)
        assert not crew.runner.has_plenty(), "slots are free"


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize(("joins", "dispatched"), [(False, 1), (True, 2 + 8 * 4)])
def test_no_more_is_dispatched_than_before_for_what_was_kept(rows: Settings, joins: bool, dispatched: int) -> None:
    """Next to nothing while the only worker could keep it but for what was dispatched earlier, else it could never keep any again."""
    go_on = threading.Event()
    with _crew(rows, 2) as crew:
        crew.act = lambda payload, task: go_on.wait(60)
        for _ in range(120):
            r.insert()
        crew.be_busy()
        assert crew.dispatcher.run_pass() == 2 + 8 * 2
        if joins:
            r.add_worker("w2", slots=2)
        else:
            r.dispatch(r.insert())
        crew.be_busy()
        crew.dispatcher.run_pass()
        assert db.read(lambda: Task.select().where(Task.status == DISPATCHED).count()) == dispatched
        crew.worker.take_no_more()
        go_on.set()


def test_nothing_is_kept_where_it_could_start_elsewhere(rows: Settings) -> None:
    """Nor by a worker that is not known any more, or about to stop."""
    with _crew(rows, 1) as crew:
        for _ in range(3):
            r.insert()
        r.add_worker("w2")
        assert crew.runner.start(_look(), keeps=True) is None
        db.unit(lambda: Worker.update(slots=0).where(Worker.id == crew.worker.id).execute())
        assert crew.runner.start(_look(), keeps=True) is None
        db.unit(lambda: Worker.delete().where(Worker.id == "w2").execute())
        db.unit(lambda: Worker.update(slots=1).where(Worker.id == crew.worker.id).execute())
        crew.worker.take_no_more()
        assert crew.runner.start(_look(), keeps=True) is None


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize("change", [lambda crew: db.unit(lifecycle.void_decisions), lambda crew: crew.runner.recall()])
def test_what_is_kept_does_not_start_after_another_decision(rows: Settings, change: Any) -> None:
    """As that of whoever pauses something, or the next pass of this worker, which may have seen something more urgent."""
    go_on = threading.Event()
    with _crew(rows, 1) as crew:
        crew.act = lambda payload, task: go_on.wait(60)
        first, kept = r.insert(), r.insert()
        assert crew.runner.start(_look(), keeps=True) == 2
        wait_for("it to run", lambda: _statuses([first]) == [RUNNING])
        change(crew)
        go_on.set()
        assert _wait_for_ends([first]) == [SUCCEEDED]
        wait_for("its slot", lambda: crew.worker.free_slots == 1)
        assert (_statuses([kept]), crew.runner._desk.kept) == ([QUEUED], 0)
        crew.dispatcher.run_pass()
        assert _wait_for_ends([kept]) == [SUCCEEDED]


def test_what_was_cancelled_while_it_was_kept_holds_up_nothing_behind_it(rows: Settings) -> None:
    """A pass that follows chooses again."""
    go_on = threading.Event()
    with _crew(rows, 1) as crew:
        crew.act = lambda payload, task: go_on.wait(60)
        first, gone, last = r.insert(), r.insert(), r.insert()
        assert crew.runner.start(_look(), keeps=True) == 3
        db.unit(lambda: lifecycle.cancel(gone, None))
        go_on.set()
        assert _wait_for_ends([first, gone, last]) == [SUCCEEDED, CANCELLED, SUCCEEDED]


def test_a_pass_chooses_anew_and_not_what_is_kept(rows: Settings) -> None:
    """Else what is more urgent would come behind it."""
    ran, go_on = list[str](), threading.Event()
    with _crew(rows, 1) as crew:
        crew.act = lambda payload, task: ran.append(task.id) or go_on.wait(60)  # type: ignore[func-returns-value]
        first, kept = r.insert(), r.insert()
        assert crew.runner.start(_look(), keeps=True) == 2
        wait_for("it to run", lambda: ran == [first])
        urgent = r.insert(priority=3600)
        crew.be_busy()
        assert crew.dispatcher.run_pass() == 2
        go_on.set()
        assert _wait_for_ends([first, kept, urgent]) == [SUCCEEDED] * 3
    assert ran == [first, urgent, kept]


@pytest.mark.usefixtures("no_pass")
def test_an_end_while_a_pass_chooses_starts_nothing_that_was_kept_before(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """That would be a decision, and the pass would have to look again."""
    go_on, seen = threading.Event(), list[str]()
    with _crew(rows, 1) as crew:
        crew.act = lambda payload, task: go_on.wait(60)
        ids = [r.insert(), r.insert()]
        assert crew.runner.start(_look(), keeps=True) == 2

        def end_meanwhile(name: str) -> None:
            if name == "dispatch.before_commit" and not go_on.is_set():
                go_on.set()
                wait_for("the slot", lambda: crew.worker.free_slots == 1)
                seen.append(_statuses(ids)[1])

        monkeypatch.setattr("actors.orchestrator.fault", end_meanwhile)
        crew.be_busy()
        assert crew.dispatcher.run_pass() == 1
        assert _wait_for_ends(ids) == [SUCCEEDED] * 2
    assert seen == [QUEUED]


@pytest.mark.usefixtures("no_pass")
def test_nothing_is_kept_after_a_write_that_failed(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the decision was made nobody knows; a pass finds out."""
    with _crew(rows, 1) as crew:
        r.insert(), r.insert()
        monkeypatch.setattr(lifecycle, "start", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            crew.runner.start(_look(), keeps=True)
        assert (crew.runner._desk.kept, crew.worker.free_slots) == (0, 1)


@pytest.mark.usefixtures("no_pass")
def test_a_pass_does_not_wait_for_a_start_that_cannot_be_written(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the pulse that runs it, and to know that the database is away for all, who waits with an end needs its beats."""
    go_on, is_away = threading.Event(), threading.Event()
    start, waits = lifecycle.start, threading.Event()

    def be_away(*arguments: Any) -> Any:
        if is_away.is_set():
            waits.set()
            raise peewee.OperationalError("could not extend file")
        return start(*arguments)

    with _crew(rows, 1) as crew:
        crew.act = lambda payload, task: go_on.wait(60)
        ids = [r.insert() for _ in range(3)]
        assert crew.runner.start(_look(), keeps=True) == 3
        monkeypatch.setattr(lifecycle, "start", be_away)
        is_away.set()
        go_on.set()
        assert waits.wait(20)
        began = time.monotonic()
        crew.runner.recall()
        assert crew.runner.start(_look(), keeps=True) == 2
        assert time.monotonic() - began < 1.0
        is_away.clear()
        assert _wait_for_ends(ids[:1]) == [SUCCEEDED]
        crew.dispatcher.run_pass()
        assert _wait_for_ends(ids) == [SUCCEEDED] * 3


@pytest.mark.usefixtures("no_pass")
def test_a_slot_that_becomes_free_while_a_pass_chooses_starts_what_that_keeps(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had found nothing kept when its end was recorded."""
    really = lifecycle.finish_all
    with _crew(rows, 1) as crew:
        first, kept = r.insert(), r.insert()
        r.dispatch(first)

        def choose_meanwhile(endings: Any) -> Any:
            if endings and not crew.runner._desk.kept and _statuses([kept]) == [QUEUED]:
                crew.runner._desk.keep([kept], load.read().token)
            return really(endings)

        monkeypatch.setattr(lifecycle, "finish_all", choose_meanwhile)
        crew.runner.handle()
        assert _wait_for_ends([first, kept]) == [SUCCEEDED] * 2


@pytest.mark.usefixtures("no_pass")
def test_a_start_of_what_is_kept_whose_answer_was_lost_is_recognised(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs once, and what is kept behind it goes on."""
    start, tries = lifecycle.start, list[int]()

    def lose_second(*arguments: Any) -> Any:
        claims = start(*arguments)
        tries.append(len(claims))
        if len(tries) == 2:
            db.database.commit()
            raise peewee.OperationalError("server closed the connection unexpectedly")
        return claims

    with _crew(rows, 1) as crew:
        ids = [r.insert() for _ in range(3)]
        monkeypatch.setattr(lifecycle, "start", lose_second)
        assert crew.runner.start(_look(), keeps=True)
        assert _wait_for_ends(ids) == [SUCCEEDED] * 3
    assert all(r.kinds(task_id) == ["queued", "dispatched", "started", "succeeded"] for task_id in ids)


def test_who_was_forestalled_still_knows_that_more_was_dispatched(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A nudge found no free slot while a pass had taken them, and what the pass had chosen was decided by somebody else meanwhile."""
    ran = list[str]()
    with _crew(rows, 1) as crew:
        crew.act = lambda payload, task: ran.append(task.id)
        chosen = r.insert()
        monkeypatch.setattr("actors.desk.fault", lambda name: crew.runner.handle() if name == "claim.before" else None)
        walk = _look()
        assert walk.chosen == [chosen]
        dispatched = [r.insert()]
        r.dispatch(*dispatched)
        assert crew.runner.start(walk, keeps=False) == 0
        assert _wait_for_ends(dispatched) == [SUCCEEDED]
        assert ran[:1] == dispatched


@pytest.mark.usefixtures("no_pass")
def test_a_worker_tells_how_often_its_slots_have_ended_a_short_task(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; the next pass asks for what has ended since."""
    monkeypatch.setattr("actors.batch._SHORT_S", 1e9)
    with _crew(rows, 2) as crew:
        ids = [r.insert() for _ in range(8)]
        r.dispatch(*ids)
        crew.runner.handle()
        _wait_for_ends(ids)
        told = list[float]()
        wait_for("all to be told", lambda: told.append(crew.runner.take_turnover()) or sum(told) == 4.0)  # type: ignore[func-returns-value]
        assert crew.runner.take_turnover() == 0


@pytest.mark.usefixtures("no_pass")
def test_long_tasks_that_end_together_let_no_more_wait_at_the_workers(rows: Settings) -> None:
    """Else an urgent one that comes next would wait behind them for as long again."""
    with _crew(rows, 4) as crew:
        crew.act = lambda payload, task: time.sleep(0.2)
        ids = [r.insert() for _ in range(4)]
        r.dispatch(*ids)
        crew.runner.handle()
        _wait_for_ends(ids)
        assert crew.runner.take_turnover() == 0


def test_what_was_dispatched_while_a_worker_was_full_is_found_when_a_slot_is_free(rows: Settings) -> None:
    """Though nobody nudges a full worker."""
    go_on = threading.Event()
    with _crew(rows, 4) as crew:
        crew.act = lambda payload, task: go_on.wait(60)
        crew.dispatcher.answer([r.insert() for _ in range(4)])
        one = r.insert()
        Dispatcher(rows, r.Nudges()).run_pass()  # type: ignore[arg-type]
        assert _statuses([one]) == [DISPATCHED]
        go_on.set()
        assert _wait_for_ends([one]) == [SUCCEEDED]


class _Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize("failure", [Fail("odd", 404), _Unspeakable()])  # type: ignore[arg-type]
def test_a_failure_that_cannot_be_told_spoils_nothing_for_the_others_of_its_batch(rows: Settings, failure: Exception) -> None:
    """It fails its own task, and all slots are free again."""

    def fail(payload: Any, task: TaskContext) -> None:
        if payload.n == 2:
            raise failure

    with _crew(rows, 4) as crew:
        crew.act = fail
        crew.be_quick()
        ids = [r.insert(payload=f'{{"n":{n}}}') for n in range(4)]
        crew.dispatcher.answer(ids)
        assert _wait_for_ends(ids) == [SUCCEEDED, SUCCEEDED, FAILED, SUCCEEDED]
        wait_for("the slots", lambda: crew.worker.free_slots == 4)
        assert crew.worker.attempts() == []


def test_a_worker_that_stops_gives_back_what_it_has_not_begun(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what may run only once: it has not run."""
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr("actors.batch._LOOK_S", 1e6)  # nobody takes away what waits

    def act(payload: Any, task: TaskContext) -> None:
        begun.set()
        go_on.wait(60)

    with _crew(rows, 4) as crew:
        crew.act = act
        crew.be_quick()
        ids = [r.insert(max_losses=1) for _ in range(4)]
        crew.dispatcher.answer(ids)
        assert begun.wait(20)
        stopping = threading.Thread(target=crew.worker.stop, args=(30,))
        stopping.start()
        wait_for("the stop", lambda: crew.worker.stopping)
        go_on.set()
        stopping.join(30)
        assert _statuses(ids) == [SUCCEEDED, QUEUED, QUEUED, QUEUED]
        assert r.kinds(ids[1])[-1] == "released"


def test_a_worker_that_takes_no_more_goes_on_with_what_runs(rows: Settings) -> None:
    """As while a server still waits for those who follow a log."""
    begun, go_on = threading.Event(), threading.Event()

    def act(payload: Any, task: TaskContext) -> None:
        begun.set()
        go_on.wait(60)

    with _crew(rows, 1) as crew:
        crew.act = act
        ids = [r.insert() for _ in range(2)]
        crew.dispatcher.answer(ids)
        assert begun.wait(20)
        crew.worker.take_no_more()
        go_on.set()
        wait_for("the first", lambda: _statuses(ids)[0] == SUCCEEDED)
        crew.runner.handle()
        crew.worker.stop(10)
        assert _statuses(ids)[1] in (QUEUED, DISPATCHED)


def test_a_worker_that_was_stopped_while_folders_were_late_takes_nothing_more(rows: Settings) -> None:
    """It waits a moment for the folders, and looks again before it goes on."""
    lag_s = 0.0
    with _crew(rows, 1, lambda: lag_s) as crew:
        lag_s = 2.0
        ids = [r.insert() for _ in range(2)]
        crew.dispatcher.answer(ids)
        wait_for("the first", lambda: _statuses(ids)[0] == SUCCEEDED)
        crew.worker.stop(10)
        assert _statuses(ids)[1] in (QUEUED, DISPATCHED)


@pytest.mark.parametrize(
    ("is_quick", "max_losses", "waits"),
    [(True, 3, False), (True, 1, True), (False, 3, True)],
    ids=["again if need be", "at most once", "not known to be quick"],
)
def test_a_beginning_is_on_the_disk_before_it_could_count(
    sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch, *, is_quick: bool, max_losses: int, waits: bool
) -> None:
    """A power cut may make a quick task begin again that may, until the next beat: so one that takes its machine down is found as lost."""
    db.open_database(sqlite_settings)
    db.migrate()
    waited, found, begun, go_on = list[str](), list[str](), threading.Event(), threading.Event()
    real = sqlite._sync

    def act(payload: Any, task: TaskContext) -> None:
        found.extend(waited)
        begun.set()
        go_on.wait(20)

    def sync(file: int) -> None:
        waited.append("disk")
        real(file)

    with _crew(sqlite_settings, 4) as crew:
        crew.act = act
        if is_quick:
            crew.be_quick()
        one = r.insert(max_losses=max_losses)
        monkeypatch.setattr(sqlite, "_sync", sync)
        crew.dispatcher.answer([one])
        assert begun.wait(20)
        assert found == ["disk"] * waits
        wait_for("the next beat", lambda: bool(waited))
        go_on.set()
        assert _wait_for_ends([one]) == [SUCCEEDED]
    db.close_database()


def test_a_claim_that_had_to_be_tried_again_counts_from_its_last_try(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database may have been away for longer than a lease: from the first try on it would be over before it began."""
    claim_some, tries, clock = lifecycle.claim_some, list[int](), itertools.count(100)

    def fail_first(*arguments: Any) -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise peewee.OperationalError("database is locked")
        return claim_some(*arguments)

    with _crew(rows, 1) as crew:
        monkeypatch.setattr(lifecycle, "claim_some", fail_first)
        monkeypatch.setattr("actors.desk.lease_time", lambda **_: float(next(clock)))
        answer = crew.runner._desk.claim(1)
    assert (len(tries), answer.leased_at) == (2, 101.0)

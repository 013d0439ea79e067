"""The state machine under interleaved actors: random lives of tasks against a simple model, on both databases.

Workers claim, come back late and lose the answers to their commits; sweeps, cancellers, dispatchers and tracers come in between. For a
longer run than the suite's:

    pytest tests/test_machine.py --hypothesis-profile=long
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import peewee
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from tests import rows as r
from tests.conftest import forget_all_rows
from tower import db, leases, lifecycle, load, reminders
from tower.leases import Claim
from tower.lifecycle import LogPart, Outcome
from tower.models import Task, TaskEvent, TaskLog, new_id
from tower.moves import ARROWS
from tower.terms import CANCELLED, DISPATCHED, FAILED, FINAL, QUEUED, RUNNING, SUCCEEDED, TIMED_OUT

pytestmark = pytest.mark.slow

SHORT = settings(
    max_examples=30, stateful_step_count=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

#: What each event says of the status that it led to; the others change none.
LEADS_TO = {
    "queued": QUEUED,
    "dispatched": DISPATCHED,
    "started": RUNNING,
    **dict.fromkeys(("retry_scheduled", "released", "undelivered", "worker_lost"), QUEUED),
    **{status: status for status in FINAL},
}
OUTCOMES = {
    "succeeded": Outcome(SUCCEEDED, result="1"),
    "failed": Outcome(FAILED, error={"code": "handler_error", "message": "no"}),
    "failed for good": Outcome(FAILED, error={"code": "invalid_payload", "message": "no"}, may_retry=False),
    "timed out": Outcome(TIMED_OUT, error={"code": "timeout", "message": "too slow"}),
    "cancelled": lifecycle.WAS_CANCELLED,
}
#: So few that late workers meet the tasks they had.
MOST_TASKS = 3
T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]

WORKERS = st.sampled_from(["w1", "w2"])
LOST = st.sampled_from([False, False, True])


def pick(draw: Draw, some: Sequence[T]) -> T:
    """Draw one by its place, which says more in a report than a random id."""
    return some[draw(st.integers(0, len(some) - 1))]


@dataclass
class Life:
    """What a task must look like."""

    max_attempts: int
    max_losses: int
    is_late: bool
    tree: str
    status: str = QUEUED
    attempt: int = 0
    failures: int = 0
    losses: int = 0
    is_asked: bool = False
    #: The only claim that still counts, and the worker that it belongs to.
    lease: Claim | None = None
    #: Grows with every beat and every fence.
    beat: int = 0
    kinds: list[str] = field(default_factory=lambda: ["queued"])
    logged: list[tuple[int, int]] = field(default_factory=list)

    def move(self, status: str, kind: str) -> None:
        assert status in ARROWS[self.status], f"{self.status} -> {status}"
        self.status = status
        self.kinds.append(kind)
        if status != RUNNING:
            self.lease = None

    def end(self, claim: Claim, outcome: Outcome) -> str | None:
        """Do what a finish shall do; return what it shall answer."""
        if self.lease != claim:
            return None
        failed = outcome.status in (FAILED, TIMED_OUT)
        if failed and self.is_asked:
            self.move(CANCELLED, CANCELLED)
        elif failed and outcome.may_retry and self.failures + 1 < self.max_attempts:
            self.failures += 1
            self.move(QUEUED, "retry_scheduled")
        else:
            self.failures += int(failed)
            self.move(outcome.status, outcome.status)
        return self.status

    def release(self, claim: Claim) -> str | None:
        if self.lease != claim:
            return None
        if self.is_asked:
            self.move(CANCELLED, CANCELLED)
        elif self.max_losses == 1:
            self.failures += 1
            self.move(FAILED, FAILED)
        else:
            self.move(QUEUED, "released")
        return self.status

    def lose(self) -> str:
        self.losses += 1
        if self.is_asked:
            self.move(CANCELLED, CANCELLED)
        elif self.losses < self.max_losses:
            self.move(QUEUED, "worker_lost")
        else:
            self.move(FAILED, FAILED)
        return self.status

    def cancel(self) -> str:
        if self.status in (QUEUED, DISPATCHED):
            self.is_asked = True
            self.move(CANCELLED, CANCELLED)
        elif self.status == RUNNING and not self.is_asked:
            self.is_asked = True
            self.kinds.append("cancel_requested")
        return self.status


@contextmanager
def answer_lost(is_lost: bool) -> Iterator[None]:
    """Let the first commit go through and its answer get lost."""
    if not is_lost:
        yield
        return
    real, commit = db.database.obj, db.database.obj.commit

    def once() -> None:
        commit()
        del real.commit
        raise peewee.OperationalError("the answer to a commit was lost")

    real.commit = once
    try:
        yield
    finally:
        vars(real).pop("commit", None)


def _first(claims: Sequence[Claim]) -> Claim | None:
    return next(iter(claims), None)


class Lifecycle(RuleBasedStateMachine):
    """All that may happen to a few tasks, in any order; each rule says what must come of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lives: dict[str, Life] = {}
        self.claims: list[Claim] = []
        self.sightings: list[tuple[str, int, int]] = []
        self.fences: list[tuple[str, int, int]] = []
        self.ends: dict[str, tuple[Any, ...]] = {}
        self.parts = itertools.count()

    def teardown(self) -> None:
        forget_all_rows()

    # Whom an actor turns to: most often to what lives, so that lives get long; now and then to what is over.

    @property
    def tasks(self) -> list[str]:
        live = [task for task, life in self.lives.items() if life.status not in FINAL]
        return [*live, *live, *list(self.lives)[-2:]]

    @property
    def holders(self) -> list[Claim]:
        """The claims that count, then those of workers that come back late, then any."""
        running = [claim for claim in self.claims if self.lives[claim.id].status == RUNNING]
        return [*(claim for claim in running if self.lives[claim.id].lease == claim), *running, *self.claims[-2:]]

    @property
    def running(self) -> list[tuple[str, int, int]]:
        return [(task, life.attempt, life.beat) for task, life in self.lives.items() if life.status == RUNNING]

    @rule(data=st.data())
    def act(self, data: st.DataObject) -> None:
        """Let somebody do what makes sense now. One rule for all: of several, hypothesis would leave some out for a whole life."""
        who = ["take"] * 16 + ["dispatch", "undeliver", "nudge", "trace", "end_early"]
        if sum(life.status not in FINAL for life in self.lives.values()) < MOST_TASKS:
            who += ["enqueue"] * 2
        if self.claims:
            who += ["finish"] * 8 + ["beat"] * 5 + ["log", "release"] * 2
        if self.running:
            who += ["see"] * 5 + ["fence"] * 3 + ["expire", "lose", "lose_twice", "stop"] * 2
        getattr(self, data.draw(st.sampled_from(who)))(data.draw)

    # What clients do.

    @initialize()
    def begin(self) -> None:
        self._insert(5, 5, False, None, None)

    def enqueue(self, draw: Draw) -> None:
        parent = pick(draw, self.tasks) if draw(st.booleans()) else None
        expires_at = draw(st.sampled_from([None, None, None, 4e9, 1.0]))
        self._insert(draw(st.integers(1, 4)), draw(st.integers(1, 4)), expires_at == 1.0, parent, expires_at)

    def _insert(self, attempts: int, losses: int, is_late: bool, parent: str | None, expires_at: float | None) -> None:
        task_id = new_id()
        tree = self.lives[parent].tree if parent else task_id
        more = {"parent_id": parent, "correlation_id": tree, "expires_at": expires_at}
        r.insert(id=task_id, max_attempts=attempts, max_losses=losses, **more)
        self.lives[task_id] = Life(attempts, losses, is_late, tree)

    def end_early(self, draw: Draw) -> None:
        """Seldom, or no life would get long."""
        {0: self.cancel, 1: self.cancel_tree, 2: self.give_up_late}.get(draw(st.integers(0, 5)), self.nudge)(draw)

    def cancel(self, draw: Draw) -> None:
        task = pick(draw, self.tasks)
        assert db.unit(lambda: lifecycle.cancel(task, "alice")) == self.lives[task].cancel()

    def stop(self, draw: Draw) -> None:
        task = pick(draw, self.running)[0]
        assert db.unit(lambda: lifecycle.cancel(task, None)) == self.lives[task].cancel() == RUNNING

    def cancel_tree(self, draw: Draw) -> None:
        of = self.lives[pick(draw, self.tasks)].tree
        tree = [name for name, life in self.lives.items() if life.tree == of]
        asked = [name for name in tree if self.lives[name].status not in FINAL and not self.lives[name].is_asked]
        assert sorted(db.unit(lambda: lifecycle.cancel_all(tree, None))) == sorted(asked)
        for name in tree:
            self.lives[name].cancel()

    # What the orchestrator actor does.

    def dispatch(self, draw: Draw) -> None:
        self._dispatch(pick(draw, self.tasks))

    def _dispatch(self, task: str) -> None:
        life = self.lives[task]
        assert r.dispatch(task) == ([task] if life.status == QUEUED else [])
        if life.status == QUEUED:
            life.move(DISPATCHED, "dispatched")

    def undeliver(self, draw: Draw) -> None:
        task = pick(draw, self.tasks)
        life = self.lives[task]
        assert db.unit(lambda: lifecycle.undeliver([task])) == ([task] if life.status == DISPATCHED else [])
        if life.status == DISPATCHED:
            life.move(QUEUED, "undelivered")

    # What workers do, also those that come back late.

    def take(self, draw: Draw) -> None:
        waiting = [task for task, life in self.lives.items() if life.status in (QUEUED, DISPATCHED)]
        task, worker, is_lost = pick(draw, [*waiting, *waiting, *self.tasks]), draw(WORKERS), draw(LOST)
        how = draw(st.sampled_from(["dispatch and claim", "start", "claim", "claim the first"]))
        if how == "dispatch and claim":
            self._dispatch(task)
        if how == "start":
            life = self.lives[task]
            may_start = life.status == QUEUED and not life.is_late
            if may_start:
                life.move(DISPATCHED, "dispatched")
            decided = db.read(load.read).token
            self._lease(worker, lambda token: _first(lifecycle.start([task], decided, worker, token)), task if may_start else None, is_lost)
            return
        if how == "claim the first":
            order = [row[0] for row in db.read(lambda: list(Task.select(Task.id).order_by(Task.rank, Task.id).tuples()))]
            startable = (task for task in order if self._may_start(task))
            self._claim(worker, None, next(startable, None), is_lost)
        else:
            self._claim(worker, task, task if self._may_start(task) else None, is_lost)

    def _may_start(self, task: str) -> bool:
        return self.lives[task].status == DISPATCHED and not self.lives[task].is_late

    def _claim(self, worker: str, asked: str | None, expected: str | None, is_lost: bool) -> None:
        self._lease(worker, lambda token: lifecycle.claim(worker, token, task_id=asked, queues=["default"]), expected, is_lost)

    def _lease(self, worker: str, take: Callable[[str], Claim | None], expected: str | None, is_lost: bool) -> None:
        token = new_id()
        with answer_lost(is_lost):
            claim = db.unit(lambda: take(token), recognise=lambda: _first(lifecycle.claimed(token)))
        assert (claim and claim.id) == expected
        if claim is None:
            return
        life = self.lives[claim.id]
        life.move(RUNNING, "started")
        life.attempt += 1
        life.beat += 1
        life.lease, life.is_asked = claim, False
        assert (claim.attempt, claim.token, claim.worker_id, claim.failures) == (life.attempt, token, worker, life.failures)
        assert (claim.previous is None) == (life.failures + life.losses == 0)
        self.claims.append(claim)

    def finish(self, draw: Draw) -> None:
        claim, is_lost, speaks = pick(draw, self.holders), draw(LOST), draw(st.booleans())
        how = draw(st.sampled_from(["failed", "failed", "failed", *OUTCOMES]))
        tail = [LogPart(next(self.parts), "last words\n")] if speaks else []
        if tail and self.lives[claim.id].lease == claim:
            self.lives[claim.id].logged.append((claim.attempt, tail[0].part))
        self._end(
            claim, lambda token: lifecycle.finish(claim, OUTCOMES[how], token, tail), is_lost, lambda life: life.end(claim, OUTCOMES[how])
        )

    def _end(self, claim: Claim, end: Callable[[str], str | None], is_lost: bool, model: Callable[[Life], str | None]) -> None:
        token = new_id()
        with answer_lost(is_lost):
            said = db.unit(lambda: end(token), recognise=lambda: lifecycle.finished(claim.id, token))
        assert said == model(self.lives[claim.id])

    def release(self, draw: Draw) -> None:
        claim, is_lost = pick(draw, self.holders), draw(LOST)
        self._end(claim, lambda token: lifecycle.release(claim, "it stops", token), is_lost, lambda life: life.release(claim))

    def beat(self, draw: Draw) -> None:
        worker = draw(WORKERS)
        told = db.unit(lambda: leases.heartbeat(worker, list(self.lives)))
        held = [life for life in self.lives.values() if life.lease and life.lease.worker_id == worker]
        assert told == {(life.lease.id, life.attempt): life.is_asked for life in held if life.lease}
        for life in held:
            life.beat += 1

    def log(self, draw: Draw) -> None:
        claim, is_lost = pick(draw, self.holders), draw(LOST)
        part, is_held = next(self.parts), self.lives[claim.id].lease == claim
        with answer_lost(is_lost):
            said = db.unit(lambda: leases.append_log(claim, part, "words\n"), recognise=lambda: leases.appended(claim, part))
        assert said == is_held
        if is_held:
            self.lives[claim.id].logged.append((claim.attempt, part))

    # What sweeps do; between what one sees and what it does anything may happen.

    def see(self, _: Draw) -> None:
        self.sightings += self.running

    def fence(self, draw: Draw) -> None:
        self._fence(pick(draw, [*self.running, *self.sightings[-5:]]))

    def expire(self, draw: Draw) -> None:
        if self.fences:
            self._expire(pick(draw, self.fences[-3:]))

    def lose(self, draw: Draw) -> None:
        self._fence(pick(draw, self.running))
        self._expire(self.fences[-1])

    def lose_twice(self, draw: Draw) -> None:
        """Two sweeps take the lease one after the other, and the first of them goes on first."""
        seen = pick(draw, self.running)
        for _ in range(2):
            self._fence(seen)
            seen = self.fences[-1]
        self._expire(self.fences[-2])

    def _fence(self, seen: tuple[str, int, int]) -> None:
        task, attempt, beat = seen
        life = self.lives[task]
        still_so = life.status == RUNNING and (life.attempt, life.beat) == (attempt, beat)
        stands_at = db.unit(lambda: lifecycle.fence(task, attempt, beat))
        assert stands_at == (beat + 1 if still_so else None)
        if stands_at is not None:
            life.beat, life.lease = stands_at, None
            self.fences.append((task, attempt, stands_at))

    def _expire(self, fenced: tuple[str, int, int]) -> None:
        task, attempt, beat = fenced
        life = self.lives[task]
        still_so = life.status == RUNNING and (life.attempt, life.beat) == (attempt, beat)
        assert db.unit(lambda: lifecycle.expire(task, attempt, beat, "it is gone")) == (life.lose() if still_so else None)

    # What comes in between.

    def give_up_late(self, _: Draw) -> None:
        late = {task for task, life in self.lives.items() if life.is_late and life.status in (QUEUED, DISPATCHED)}
        assert set(db.unit(lambda: lifecycle.give_up_late(100))) == late
        for task in late:
            self.lives[task].move(TIMED_OUT, TIMED_OUT)

    def nudge(self, _: Draw) -> None:
        db.unit(lambda: Task.update(nudge_at=0).execute())
        due = {nudge.id for nudge in db.unit(lambda: reminders.due_to_run(100))}
        assert due == {task for task, life in self.lives.items() if life.status == DISPATCHED}

    def trace(self, draw: Draw) -> None:
        task = pick(draw, self.tasks)
        db.unit(lambda: reminders.traced([(task, r.row(task)["seq"], 0)]))

    # What holds at all times.

    @invariant()
    def every_task_is_as_it_must_be(self) -> None:
        tasks, events, logs = db.read(
            lambda: (
                list(Task.select().dicts()),
                list(TaskEvent.select().order_by(TaskEvent.seq).dicts()),
                list(TaskLog.select().order_by(TaskLog.seq).dicts()),
            )
        )
        assert {row["id"] for row in tasks} == self.lives.keys()
        for row in tasks:
            of = [event for event in events if event["task_id"] == row["id"]]
            said = [log for log in logs if log["task_id"] == row["id"]]
            self._is_as_the_model_says(row, of, said)
            self._is_what_its_events_tell(row, of, said)

    def _is_as_the_model_says(self, row: dict[str, Any], events: list[dict[str, Any]], logs: list[dict[str, Any]]) -> None:
        life = self.lives[row["id"]]
        for name in ("status", "attempt", "failures", "losses", "beat"):
            assert row[name] == getattr(life, name), name
        assert [event["kind"] for event in events] == life.kinds
        assert [(log["attempt"], log["part"]) for log in logs] == life.logged
        valid = [
            claim
            for claim in self.claims
            if (row["id"], row["status"], row["attempt"], row["claim_token"]) == (claim.id, RUNNING, claim.attempt, claim.token)
        ]
        assert valid == ([life.lease] if life.lease else [])

    def _is_what_its_events_tell(self, row: dict[str, Any], events: list[dict[str, Any]], logs: list[dict[str, Any]]) -> None:
        assert sorted(item["seq"] for item in events + logs) == list(range(1, row["seq"] + 1))
        assert row["traced_seq"] <= row["seq"]
        path = [LEADS_TO[event["kind"]] for event in events if event["kind"] in LEADS_TO]
        assert path[0] == QUEUED and path[-1] == row["status"]
        assert all(after in ARROWS[before] for before, after in itertools.pairwise(path))
        assert sum(status in FINAL for status in path) == (row["status"] in FINAL)
        assert [event["attempt"] for event in events if event["kind"] == "started"] == list(range(1, row["attempt"] + 1))
        assert (row["finished_at"] is not None) == (row["status"] in FINAL)
        assert row["failures"] <= row["max_attempts"] and row["losses"] <= row["max_losses"]
        if row["status"] in FINAL:
            end = tuple(row[name] for name in ("status", "result", "error", "finished_at", "finish_token"))
            assert self.ends.setdefault(row["id"], end) == end


@pytest.mark.usefixtures("rows")
def test_no_order_of_actors_breaks_the_life_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statuses follow the arrows, attempts count from one, one end that stays, at most one lease, numbers without gaps."""
    monkeypatch.setattr("tower.db.time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None))
    if not db.is_postgres():  # a power cut is not among the actors
        db.read(lambda: db.database.pragma("synchronous", 0, permanent=True))
    is_long = settings.get_current_profile_name() == "long"
    run_state_machine_as_test(Lifecycle, settings=settings() if is_long else SHORT)

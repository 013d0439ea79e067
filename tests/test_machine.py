"""The state machine under interleaved actors: random lives of tasks against a simple model, on both databases.

Workers claim, come back late and lose the answers to their commits; sweeps, cancellers, dispatchers and tracers come in between. For a
longer run than the suite's:

    pytest tests/test_machine.py --hypothesis-profile=long
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import peewee
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests import rows as r
from tests.conftest import forget_all_rows
from tower import db, leases, lifecycle, reminders
from tower.leases import Claim
from tower.lifecycle import ARROWS, LogPart, Outcome
from tower.models import CANCELLED, DISPATCHED, FAILED, FINAL, QUEUED, RUNNING, SUCCEEDED, TIMED_OUT, Task, TaskEvent, TaskLog, new_id

pytestmark = pytest.mark.slow

SHORT = settings(
    max_examples=25, stateful_step_count=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
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
WORKERS = st.sampled_from(["w1", "w2"])
LOST = st.sampled_from([False, False, True])


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


class Lifecycle(RuleBasedStateMachine):
    """All that may happen to a few tasks, in any order; each rule says what must come of it."""

    tasks = Bundle("tasks")
    claims = Bundle("claims")
    sightings = Bundle("sightings")
    fences = Bundle("fences")

    def __init__(self) -> None:
        super().__init__()
        self.lives: dict[str, Life] = {}
        self.all_claims: list[Claim] = []
        self.ends: dict[str, tuple[Any, ...]] = {}
        self.parts = itertools.count()

    def teardown(self) -> None:
        forget_all_rows()

    # What clients do.

    @initialize(target=tasks)
    def begin(self) -> str:
        return self._insert(5, 5, False, None, None)

    @precondition(lambda self: len(self.lives) < MOST_TASKS)
    @rule(target=tasks, attempts=st.integers(1, 4), losses=st.integers(1, 4), starts=st.sampled_from(["any time", "in time", "late"]))
    def enqueue(self, attempts: int, losses: int, starts: str) -> str:
        return self._insert(attempts, losses, starts == "late", None, {"late": 1.0, "in time": 4e9}.get(starts))

    @precondition(lambda self: len(self.lives) < MOST_TASKS)
    @rule(target=tasks, parent=tasks)
    def enqueue_child(self, parent: str) -> str:
        return self._insert(2, 2, False, parent, None)

    def _insert(self, attempts: int, losses: int, is_late: bool, parent: str | None, expires_at: float | None) -> str:
        task_id = new_id()
        tree = self.lives[parent].tree if parent else task_id
        more = {"parent_id": parent, "correlation_id": tree, "expires_at": expires_at}
        r.insert(id=task_id, max_attempts=attempts, max_losses=losses, **more)
        self.lives[task_id] = Life(attempts, losses, is_late, tree)
        return task_id

    @rule(task=tasks, whole_tree=st.booleans())
    def cancel(self, task: str, whole_tree: bool) -> None:
        tree = [name for name, life in self.lives.items() if life.tree == self.lives[task].tree] if whole_tree else [task]
        said = db.unit(lambda: [lifecycle.cancel(name, "alice") for name in tree])
        assert said == [self.lives[name].cancel() for name in tree]

    # What the orchestrator actor does.

    @rule(task=tasks)
    def dispatch(self, task: str) -> None:
        life = self.lives[task]
        assert r.dispatch(task) == ([task] if life.status == QUEUED else [])
        if life.status == QUEUED:
            life.move(DISPATCHED, "dispatched")

    def undeliver(self, task: str) -> None:
        life = self.lives[task]
        assert db.unit(lambda: lifecycle.undeliver([task])) == ([task] if life.status == DISPATCHED else [])
        if life.status == DISPATCHED:
            life.move(QUEUED, "undelivered")

    # What workers do, also those that come back late: a claim stays in the bundle whatever became of it.

    @rule(target=claims, task=tasks, worker=WORKERS, is_lost=LOST)
    def claim(self, task: str, worker: str, is_lost: bool) -> Any:
        life = self.lives[task]
        return self._claim(worker, task, task if life.status == DISPATCHED and not life.is_late else None, is_lost)

    @rule(target=claims, task=tasks, worker=WORKERS)
    def dispatch_and_claim(self, task: str, worker: str) -> Any:
        self.dispatch(task)
        return self.claim(task, worker, False)

    @rule(target=claims, worker=WORKERS, is_lost=LOST)
    def claim_the_first(self, worker: str, is_lost: bool) -> Any:
        order = [row[0] for row in db.read(lambda: list(Task.select(Task.id).order_by(Task.rank, Task.id).tuples()))]
        startable = (task for task in order if self.lives[task].status == DISPATCHED and not self.lives[task].is_late)
        return self._claim(worker, None, next(startable, None), is_lost)

    def _claim(self, worker: str, asked: str | None, expected: str | None, is_lost: bool) -> Any:
        token = new_id()
        with answer_lost(is_lost):
            claim = db.unit(
                lambda: lifecycle.claim(worker, token, task_id=asked, queues=["default"]), recognise=lambda: lifecycle.claimed(token)
            )
        assert (claim and claim.id) == expected
        if claim is None:
            return multiple()
        life = self.lives[claim.id]
        life.move(RUNNING, "started")
        life.attempt += 1
        life.beat += 1
        life.lease, life.is_asked = claim, False
        assert (claim.attempt, claim.token, claim.worker_id, claim.failures) == (life.attempt, token, worker, life.failures)
        assert (claim.previous is None) == (life.failures + life.losses == 0)
        self.all_claims.append(claim)
        return claim

    @rule(claim=claims, how=st.sampled_from(["failed", "failed", *OUTCOMES]), is_lost=LOST, speaks=st.booleans())
    def finish(self, claim: Claim, how: str, is_lost: bool, speaks: bool) -> None:
        tail = [LogPart(next(self.parts), "last words\n")] if speaks else []
        if tail and self.lives[claim.id].lease == claim:
            self.lives[claim.id].logged.append((claim.attempt, tail[0].part))
        self._end(
            claim, lambda token: lifecycle.finish(claim, OUTCOMES[how], token, tail), is_lost, lambda life: life.end(claim, OUTCOMES[how])
        )

    @rule(claim=claims, is_lost=LOST)
    def release(self, claim: Claim, is_lost: bool) -> None:
        self._end(claim, lambda token: lifecycle.release(claim, "it stops", token), is_lost, lambda life: life.release(claim))

    def _end(self, claim: Claim, end: Callable[[str], str | None], is_lost: bool, model: Callable[[Life], str | None]) -> None:
        token = new_id()
        with answer_lost(is_lost):
            said = db.unit(lambda: end(token), recognise=lambda: lifecycle.finished(claim.id, token))
        assert said == model(self.lives[claim.id])

    @rule(worker=WORKERS)
    def heartbeat(self, worker: str) -> None:
        told = db.unit(lambda: leases.heartbeat(worker, list(self.lives)))
        held = [life for life in self.lives.values() if life.lease and life.lease.worker_id == worker]
        assert told == {(life.lease.id, life.attempt): life.is_asked for life in held if life.lease}
        for life in held:
            life.beat += 1

    @rule(claim=claims, is_lost=LOST)
    def log(self, claim: Claim, is_lost: bool) -> None:
        part, is_held = next(self.parts), self.lives[claim.id].lease == claim
        with answer_lost(is_lost):
            said = db.unit(lambda: leases.append_log(claim, part, "words\n"), recognise=lambda: leases.appended(claim, part))
        assert said == is_held
        if is_held:
            self.lives[claim.id].logged.append((claim.attempt, part))

    # What sweeps do; between what one sees and what it does anything may happen.

    @rule(target=sightings, claim=claims)
    def see(self, claim: Claim) -> tuple[str, int, int]:
        return claim.id, self.lives[claim.id].attempt, self.lives[claim.id].beat

    @rule(target=fences, seen=sightings)
    def fence(self, seen: tuple[str, int, int]) -> Any:
        task, attempt, beat = seen
        life = self.lives[task]
        still_so = life.status == RUNNING and (life.attempt, life.beat) == (attempt, beat)
        stands_at = db.unit(lambda: lifecycle.fence(task, attempt, beat))
        assert stands_at == (beat + 1 if still_so else None)
        if stands_at is None:
            return multiple()
        life.beat, life.lease = stands_at, None
        return task, attempt, stands_at

    @rule(fenced=fences)
    def expire(self, fenced: tuple[str, int, int]) -> None:
        task, attempt, beat = fenced
        life = self.lives[task]
        still_so = life.status == RUNNING and (life.attempt, life.beat) == (attempt, beat)
        assert db.unit(lambda: lifecycle.expire(task, attempt, beat, "it is gone")) == (life.lose() if still_so else None)

    @rule(fenced=sightings)
    def lose(self, fenced: tuple[str, int, int]) -> None:
        task, attempt, beat = fenced
        life = self.lives[task]
        if life.lease and (life.attempt, life.beat) == (attempt, beat):
            self.fence(fenced)
            self.expire((task, attempt, beat + 1))

    @rule(task=tasks, chore=st.sampled_from(["give_up_late", "nudge", "trace", "undeliver"]))
    def do_a_chore(self, task: str, chore: str) -> None:
        getattr(self, chore)(task)

    def give_up_late(self, _: str) -> None:
        late = {task for task, life in self.lives.items() if life.is_late and life.status in (QUEUED, DISPATCHED)}
        assert set(db.unit(lambda: lifecycle.give_up_late(100))) == late
        for task in late:
            self.lives[task].move(TIMED_OUT, TIMED_OUT)

    def nudge(self, _: str) -> None:
        db.unit(lambda: Task.update(nudge_at=0).execute())
        due = {nudge.id for nudge in db.unit(lambda: reminders.due_to_run(100))}
        assert due == {task for task, life in self.lives.items() if life.status == DISPATCHED}

    def trace(self, task: str) -> None:
        db.unit(lambda: reminders.traced(task, r.row(task)["seq"], 0))

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
            for claim in self.all_claims
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

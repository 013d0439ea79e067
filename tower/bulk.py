"""Many tasks at once: cancel or retry whatever fits a filter, in short transactions, exact whoever else does the same."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tower import db, lifecycle, queries
from tower.broker import ORCHESTRATE, TRACE, Nudger
from tower.errors import InvalidTask, Unavailable
from tower.lifecycle import NewTask
from tower.models import Task, new_id
from tower.queries import Filter
from tower.terms import BROKEN, DISPATCHED, QUEUED, RUNNING

#: Tasks changed by one transaction, so that nobody waits long for it.
_STEP = 200
#: Ids told of one request.
_TOLD = 1000


@dataclass(frozen=True)
class Done:
    """What came of it: how many tasks fitted, how many of them changed, and the ids of the first thousand.

    The ids are those of the tasks that were cancelled or made; of those that fitted if it was only asked how many.
    """

    matched: int
    changed: int
    task_ids: list[str]
    dry_run: bool


@dataclass(frozen=True)
class Pace:
    """How long each step waits for a database that is away, and what ends a walk between two steps."""

    patience_s: float
    is_stopping: Callable[[], bool]


def cancel(chosen: Filter, by: str | None, nudger: Nudger, pace: Pace, *, dry_run: bool) -> Done:
    """Cancel what waits and ask to stop what runs. A whole tree (`correlation_id`) is gone over until nothing of it is left."""
    found = _Found(chosen, (_can_be_cancelled(),), pace, is_closing=chosen.correlation_id is not None)
    if dry_run:
        return found.count()

    def tell(ids: list[str]) -> None:
        nudger.send(TRACE, *ids)
        nudger.send(ORCHESTRATE, ids[0])

    step = partial(lifecycle.cancel_all, by=by)
    whole = done = found.walk(step, tell)
    while done.matched and chosen.correlation_id:  # what a task of the tree asked for until it was told to stop
        done = found.walk(step, tell)
        whole = _sum(whole, done)
    return whole


def retry(chosen: Filter, by: str | None, nudger: Nudger, pace: Pace, *, dry_run: bool) -> Done:
    """Enqueue again what did not succeed and has not been repeated yet; asking twice makes nothing twice."""
    found = _Found(chosen, (Task.status << BROKEN, ~queries.is_repeated()), pace)
    if dry_run:
        return found.count()

    def step(ids: list[str]) -> list[str]:
        query = Task.select().where(Task.id << ids).order_by(Task.id)
        old = list((query.for_update() if db.is_postgres() else query).dicts())
        # Asked for only now that they are locked: whoever was faster has committed, and is seen.
        repeated = {row[0] for row in Task.select(Task.retry_of).where(Task.retry_of << ids).tuples()}
        new = [repeat(row, by, new_id()) for row in old if row["id"] not in repeated]
        if new:
            lifecycle.insert(new)
        return [task.id for task in new]

    return found.walk(step, lambda ids: nudger.send(ORCHESTRATE, ids[0]))


def repeat(old: dict[str, Any], by: str | None, fresh: str) -> NewTask:
    """Return a task that does again what an old one should have done, in the same tree."""
    names = ("type", "queue", "payload", "priority", "timeout_s", "silence_s", "max_attempts", "max_losses")
    more = ("correlation_id", "parent_id", "title", "concurrency_key", "concurrency_limit", "rate_key", "rate_limit", "rate_per_s")
    return NewTask(
        id=fresh,
        **{name: old[name] for name in (*names, *more)},
        labels=json.loads(old["labels"]),
        not_before=None,
        requested_by=by or old["requested_by"],
        retry_of=old["id"],
    )


def _can_be_cancelled() -> Any:
    return (Task.status << (QUEUED, DISPATCHED)) | ((Task.status == RUNNING) & Task.cancel_requested_at.is_null())


class _Found:
    """The tasks that a request is about, found a step at a time."""

    def __init__(self, chosen: Filter, conditions: tuple[Any, ...], pace: Pace, *, is_closing: bool = False) -> None:
        if chosen.is_empty:
            raise InvalidTask(
                'An empty filter would mean every task; narrow it as in {"status": ["failed"]} or, for all until then, by created_before.',
                code="empty_filter",
                field="filter",
            )
        self._pace = pace
        self._conditions = (*queries.conditions(chosen), *conditions)
        if not is_closing:
            # What comes in later was not meant, and the walk must have an end. A tree that is cancelled has one: it takes no more.
            self._conditions = (*self._conditions, Task.created_at <= db.read(db.clock, patience_s=pace.patience_s))

    def count(self) -> Done:
        """Say how many there are and change nothing."""

        def work() -> Done:
            ids = [row[0] for row in self._select().limit(_TOLD).tuples()]
            return Done(self._select().count() if len(ids) == _TOLD else len(ids), 0, ids, dry_run=True)

        return db.read(work, patience_s=self._pace.patience_s)

    def walk(self, step: Callable[[list[str]], list[str]], tell: Callable[[list[str]], object]) -> Done:
        """Change them all, oldest first; `step` returns the ids it changed or made, and `tell` is given them after the commit."""
        whole, last = Done(0, 0, [], dry_run=False), ""
        while ids := db.read(partial(self._after, last), patience_s=self._pace.patience_s):
            if self._pace.is_stopping():
                raise Unavailable(f"The server is stopping; {whole.changed} tasks were changed, ask again for the rest.", code="stopping")
            changed = db.unit(partial(step, ids), patience_s=self._pace.patience_s)
            if changed:
                tell(changed)
            whole, last = _sum(whole, Done(len(ids), len(changed), changed, dry_run=False)), ids[-1]
        return whole

    def _after(self, last: str) -> list[str]:
        return [row[0] for row in self._select().where(Task.id > last).limit(_STEP).tuples()]

    def _select(self) -> Any:
        return Task.select(Task.id).where(*self._conditions).order_by(Task.id)


def _sum(first: Done, second: Done) -> Done:
    told = [*first.task_ids, *second.task_ids][:_TOLD]
    return replace(first, matched=first.matched + second.matched, changed=first.changed + second.changed, task_ids=told)

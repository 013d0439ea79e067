"""EnhancedOrchestrator: takes tasks in, and keeps the promise that each reaches a final state."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool

from tower import bulk, db, jsontext, lifecycle, queries, trace, tree
from tower.broker import ORCHESTRATE, TRACE, Nudger
from tower.bulk import Done, Pace
from tower.errands import Errand
from tower.errors import Conflict, InvalidTask, TowerError, Unavailable
from tower.faults import fault
from tower.group import Gathering, Group, Told
from tower.handler import HandlerType, Registry
from tower.leases import locked
from tower.lifecycle import NewTask
from tower.log import Outage
from tower.models import Task, new_id
from tower.queries import Filter
from tower.rules import Rules
from tower.settings import Settings
from tower.spec import MAX_BATCH, TaskSpec
from tower.sweep import Sweep
from tower.terms import CANCELLED, FINAL, RUNNING

#: How long a client is kept waiting for a database that is away, before it is told to come back.
_PATIENCE_S = 5.0

_log = logging.getLogger(__name__)


class Accepted(NamedTuple):
    """A task that has a row; `new` is False if an earlier request with the same idempotency key made it."""

    id: str
    new: bool


class EnhancedOrchestrator:
    """The front of the spine: enqueue, cancel and retry, and the sweep behind them."""

    def __init__(self, settings: Settings, registry: Registry, nudger: Nudger, write_trace: Callable[[str], None] | None = None) -> None:
        self._settings = settings
        self._registry = registry
        self._nudger = nudger
        #: Limits, rates and pauses.
        self.rules = Rules(registry, nudger)
        self._sweep = Sweep(settings, nudger, write_trace)
        #: One commit for all requests that come at the same time: to threads, and to the event loop.
        self._entry = Group(self._enter)
        self._gathering = Gathering(self._enter, self._send)
        self._stopping = threading.Event()
        self._prepared = threading.Event()
        self._preparing: threading.Thread | None = None
        self._pacing: Errand | None = None
        #: A change of very many tasks goes on only as long as the server does.
        self._pace = Pace(_PATIENCE_S, self._stopping.is_set)

    async def start(self) -> None:
        """Prepare the database, recover what an earlier life left, and start the sweep.

        A database that is down does not stop the server: it goes on trying, and /health/ready says so.
        """
        if not self._settings.embedded:
            self._pacing = self._nudger.pace(ORCHESTRATE)
        self._preparing = threading.Thread(target=self._prepare, name="prepare", daemon=True)
        self._preparing.start()
        await asyncio.to_thread(self._prepared.wait, 10)

    def _prepare(self) -> None:
        pause, outage = 0.0, Outage(_log, "the database is ready")
        while not self._stopping.wait(pause):
            try:
                applied = db.migrate(patience_s=_PATIENCE_S)
                if applied:
                    _log.info("the database schema is up to date", extra={"fields": {"applied": ",".join(applied)}})
                self._process_events()
                break
            except Unavailable:  # `db` has said so
                pause = 1.0
            except Exception as error:
                outage.begin("The database cannot be used, tasks are refused until it can: %s", error)
                pause = 5.0
        if not self._stopping.is_set():
            outage.end()
            self._prepared.set()
            self._sweep.start()

    async def stop(self) -> None:
        """Stop the sweep; rows stay as they are, so the next life goes on from them."""
        self._stopping.set()
        await self._gathering.stop()
        if self._preparing:
            await asyncio.to_thread(self._preparing.join, 5)
        await asyncio.to_thread(self._sweep.stop)
        if self._pacing:
            await asyncio.to_thread(self._nudger.end_pace, ORCHESTRATE)

    @property
    def prepared(self) -> bool:
        """Whether the database has been brought up to date."""
        return self._prepared.is_set()

    def _process_events(self) -> None:
        """Do one pass of the sweep."""
        self._sweep.run_once()

    async def enqueue(self, spec: TaskSpec) -> str:
        """Insert a task and its event in one transaction, nudge the orchestrator actor, and return the task's id.

        Raises InvalidTask, Conflict for a known idempotency key with another body, and Unavailable.
        """
        return (await self.take(spec)).id

    async def take(self, spec: TaskSpec, by: str | None = None) -> Accepted:
        """Enqueue one task, for whoever showed a key of this name; see `enqueue`."""
        if not self._registry.is_own(spec.type):  # its check may take its time
            return await run_in_threadpool(self.accept, spec, by)
        task = self._checked(spec, by)
        if _depends([task]):
            return (await run_in_threadpool(self._accept, [task]))[0]
        await self._gathering.do([task])
        return self._announced([Accepted(task.id, new=True)])[0]

    def accept(self, spec: TaskSpec, by: str | None = None) -> Accepted:
        """Do what `take` does, from a thread."""
        return self._accept([self._checked(spec, by)])[0]

    def enqueue_all(self, specs: Sequence[TaskSpec], by: str | None = None) -> list[Accepted]:
        """Enqueue up to a thousand tasks, all or none; see `accept`."""
        if not 1 <= len(specs) <= MAX_BATCH:
            raise InvalidTask(f"A batch holds 1 to {MAX_BATCH} tasks, got {len(specs)}; split it.", code="invalid_batch")
        return self._accept([self._checked(spec, by, f"tasks.{place}.") for place, spec in enumerate(specs)])

    def _accept(self, tasks: list[NewTask]) -> list[Accepted]:
        if not _depends(tasks):
            self._entry.do(tasks)
            return self._announced([Accepted(task.id, new=True) for task in tasks])
        fault("front.before_insert")
        accepted = db.unit(lambda: _insert(tasks), patience_s=_PATIENCE_S)
        fault("front.after_commit")
        return self._announced(accepted)

    def _announced(self, accepted: list[Accepted]) -> list[Accepted]:
        """Nudge the orchestrator actor if any of these tasks is new."""
        fresh = next((task for task in accepted if task.new), None)
        if fresh:
            self._nudger.send(ORCHESTRATE, fresh.id)
        fault("front.after_send")
        return accepted

    def _enter(self, requests: list[list[NewTask]]) -> list[None]:
        """Insert the tasks of all requests that wait; none of them depends on another row."""
        tasks = [task for request in requests for task in request]
        fault("front.before_insert")
        db.unit(lambda: lifecycle.enter(tasks), patience_s=_PATIENCE_S, is_one_statement=lifecycle.is_one_entry(tasks), sees_arrived=False)
        fault("front.after_commit")
        return [None] * len(requests)

    def _send(self, requests: list[list[NewTask]], told: "Told[None]") -> bool:
        """Do what `_enter` does without a thread, if that can be done."""

        def sent(error: Exception | None) -> None:
            if error is None:
                fault("front.after_commit")
            told(None if error else [None] * len(requests))

        tasks = [task for request in requests for task in request]
        if not lifecycle.can_send(tasks, is_alone=self._gathering.is_alone):
            return False
        fault("front.before_insert")
        return lifecycle.send(tasks, sent)

    def _checked(self, spec: TaskSpec, by: str | None, where: str = "") -> NewTask:
        try:
            kind = self._registry.get(spec.type)
            checked = kind.check(spec.payload)
            payload = jsontext.dumps(spec.payload)
        except jsontext.BadJson as error:
            raise InvalidTask(str(error), code="invalid_payload", field=f"{where}payload") from None
        except InvalidTask as error:
            error.field = f"{where}{error.field}"
            raise
        _refuse_vain(spec, kind, where)
        task_id = new_id()
        return NewTask(
            id=task_id,
            type=kind.name,
            queue=kind.queue,
            payload=payload,
            labels=spec.labels,
            priority=spec.priority,
            not_before=spec.earliest_start(),
            timeout_s=spec.timeout_s or kind.timeout_s,
            max_attempts=spec.max_attempts or kind.max_attempts,
            # Who says 1 wants no second run, whatever happens; a type's default of 1 only means that failures are not repeated.
            max_losses=1 if spec.max_attempts == 1 else self._settings.max_losses,
            correlation_id=task_id,
            title=spec.title,
            requested_by=spec.requested_by or by,
            actor=by,
            idempotency_key=spec.idempotency_key,
            idempotency_hash=spec.digest() if spec.idempotency_key else None,
            parent_id=spec.parent_id,
            expires_at=spec.latest_start(),
            silence_s=spec.silence_s or kind.silence_s,
            **kind.shares(checked, spec),
        )

    def cancel(self, task_id: str, by: str | None = None) -> str:
        """Cancel a waiting task at once, ask a running one to stop; return its status.

        Raises NotFound, and Conflict if it ended in another way.
        """

        def work() -> str:
            status = lifecycle.cancel(task_id, by) or str(queries.task(task_id)["status"])
            if status in FINAL and status != CANCELLED:
                raise Conflict(f"Task {task_id} is {status}; a final state is never changed.", code="already_final", task_status=status)
            return status

        status = db.unit(work, patience_s=_PATIENCE_S)
        if status != RUNNING:
            self._nudger.send(TRACE, task_id)
            self._nudger.send(ORCHESTRATE, task_id)
        return status

    def retry(self, task_id: str, by: str | None = None) -> Accepted:
        """Enqueue a final task again as a new task of the same tree. Raises NotFound, and Conflict if it is not final."""

        def work() -> Accepted:
            locked(Task.id == task_id)  # so that a bulk retry at the same time either sees this one, or is seen
            old = queries.task(task_id)
            if old["status"] not in FINAL:
                raise Conflict(
                    f"Task {task_id} is {old['status']}; wait for its end, or cancel it first.", code="not_final", task_status=old["status"]
                )
            new = bulk.repeat(old, by, fresh)
            lifecycle.insert([new])
            return Accepted(new.id, new=True)

        fresh = new_id()
        accepted = db.unit(work, patience_s=_PATIENCE_S)
        self._nudger.send(ORCHESTRATE, accepted.id)
        return accepted

    def cancel_all(self, chosen: Filter, by: str | None = None, *, dry_run: bool = False) -> Done:
        """Cancel every task that fits and has not ended; see `cancel`. Raises InvalidTask for an empty filter."""
        return bulk.cancel(chosen, by, self._nudger, self._pace, dry_run=dry_run)

    def retry_all(self, chosen: Filter, by: str | None = None, *, dry_run: bool = False) -> Done:
        """Retry every task that fits, did not succeed and has not been retried. Raises InvalidTask for an empty filter."""
        return bulk.retry(chosen, by, self._nudger, self._pace, dry_run=dry_run)

    def readiness(self) -> dict[str, Any]:
        """Return what accepts and runs tasks right now, and what is wrong with the rest, in words."""
        told: dict[str, Any] = {"database": "ok", "broker": "embedded" if self._settings.embedded else "ok"}
        problems = []
        told["workers"], told["slots"], told["oldest_waiting_s"] = 0, 0, None
        try:
            if not self.prepared:
                raise Unavailable("The database is still being prepared.")
            wrong = db.trouble.now()
            workers, oldest = db.read(lambda: (queries.live_workers(self._settings.lease_s), queries.oldest_waiting_s()), patience_s=1.0)
            told["workers"], told["slots"] = len(workers), sum(worker["slots"] for worker in workers)
            told["oldest_waiting_s"] = None if oldest is None else round(oldest, 3)
            if wrong:
                raise Unavailable(wrong)
            if not workers:
                problems.append("No worker is alive: tasks are accepted and wait; start one with `tower worker`.")
            elif not told["slots"]:
                problems.append("Every worker is stopping: tasks are accepted and wait for others to start.")
            if untraced := db.read(queries.trace_errors, patience_s=1.0):
                problems.append(trace.explain_delay(untraced))
        except TowerError as error:
            told["database"] = "down"
            problems.append(f"{error.message} Tasks cannot be accepted.")
        broken = self._nudger.ping()
        if broken:
            told["broker"] = "down"
            then = "start up to two seconds late" if told["slots"] else "wait"
            problems.append(f"The broker does not answer ({broken}): tasks are accepted and {then}.")
        told["status"] = "unavailable" if told["database"] == "down" else "degraded" if problems else "ready"
        return {"status": told.pop("status"), **told, "problems": problems}


def _refuse_vain(spec: TaskSpec, kind: HandlerType, where: str) -> None:
    """Raise InvalidTask for what each field allows and all of them together make pointless."""
    if spec.expires_at and spec.not_before and spec.expires_at <= spec.not_before:
        said = f"expires_at={spec.expires_at} is not after not_before={spec.not_before}: it could never start. Give a later one."
        raise InvalidTask(said, code="invalid_field", field=f"{where}expires_at")
    limit = spec.concurrency_limit or 1
    if limit > 1 and not (spec.concurrency_key or kind.concurrency_key):
        said = f"concurrency_limit={limit} is for tasks that share a concurrency_key, and there is none: give one, or limit the type with:"
        raise InvalidTask(
            f"{said} tower limit type {kind.name} --max-running {limit}", code="invalid_field", field=f"{where}concurrency_limit"
        )


def _depends(tasks: Sequence[NewTask]) -> bool:
    """Whether something has to be read before these tasks are inserted."""
    return any(task.idempotency_key or task.parent_id for task in tasks)


def _insert(tasks: list[NewTask]) -> list[Accepted]:
    """Insert the tasks whose keys are new, and return for each the task that stands for it."""
    tasks = tree.joined(tasks)
    named: dict[str, NewTask] = {}
    for task in tasks:
        first = named.setdefault(task.idempotency_key, task) if task.idempotency_key else task
        _refuse_other_body(task, first.idempotency_hash, first.id)
    known = queries.by_idempotency_key(list(named)) if named else {}
    fresh = [
        task
        for task in tasks
        if task.idempotency_key is None or (named[task.idempotency_key] is task and task.idempotency_key not in known)
    ]
    fresh.sort(key=lambda task: task.idempotency_key or "")  # two batches with the same keys do not wait for each other in a circle
    made: set[str] = set()
    while missing := [task for task in fresh if task.id not in made and task.idempotency_key not in known]:
        made |= lifecycle.insert(missing)
        late = [task.idempotency_key for task in missing if task.idempotency_key and task.id not in made]
        if not late:
            break
        # Somebody else inserted these keys meanwhile. If retention has removed that task since, the key is ours after all.
        known.update(queries.by_idempotency_key(late))
    accepted = []
    for task in tasks:
        task_id, digest = known.get(
            task.idempotency_key or "", (named[task.idempotency_key].id if task.idempotency_key else task.id, task.idempotency_hash)
        )
        _refuse_other_body(task, digest, task_id)
        accepted.append(Accepted(task_id, new=task.id == task_id))  # the id was made for this request
    return accepted


def _refuse_other_body(task: NewTask, digest: str | None, first: str) -> None:
    if task.idempotency_key and task.idempotency_hash != digest:
        raise Conflict(
            f"The idempotency key {task.idempotency_key!r} belongs to task {first}, which was asked for with another body; take a new key.",
            code="idempotency_conflict",
            task_id=first,
        )

"""The body shared by all handler actors: claim, run, finish, and on to the next."""

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from actors.attempt import CANCEL, LEASE_LOST, SHUTDOWN, TIMEOUT, Attempt
from actors.worker import WorkerProcess
from tower import db, jsontext, leases, lifecycle, log, queries
from tower.broker import ORCHESTRATE, TRACE, Nudger
from tower.errors import InvalidTask, Unavailable
from tower.handler import Fail, Registry, Retry, Stopped
from tower.leases import CHUNK, Claim
from tower.lifecycle import Outcome
from tower.models import FAILED, QUEUED, SUCCEEDED, TIMED_OUT, Task, new_id
from tower.settings import Settings

_log = logging.getLogger(__name__)


class Runner:
    """Runs tasks in the slots of one worker process."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        nudger: Nudger,
        worker: WorkerProcess,
        run_pass: Callable[[], object],
        write_trace: Callable[[str], None] | None = None,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._nudger = nudger
        self._worker = worker
        self._run_pass = run_pass
        self._write_trace = write_trace

    def handle(self, task_id: str) -> None:
        """Run the task if it may be run and a slot is free, then whatever else was dispatched; else drop the nudge."""
        if self._worker.take_slot():
            self._use_slot(task_id)

    def look(self) -> None:
        """Fill free slots from the database, without any nudge: so work goes on when the broker does not."""
        self._run_pass()
        while self._worker.take_slot():
            claim, leased_at = None, 0.0
            try:
                claim, leased_at = self._claim(None)
            finally:
                if claim is None:
                    self._worker.give_slot()
            if claim is None:
                return
            threading.Thread(target=self._use_slot, args=(None, claim, leased_at), name=f"task-{claim.id}", daemon=True).start()

    def _use_slot(self, task_id: str | None, claim: Claim | None = None, leased_at: float = 0.0) -> None:
        try:
            if claim is None:
                claim, leased_at = self._claim(task_id)
            while claim is not None:
                self._run(claim, leased_at)
                claim, leased_at = (None, 0.0) if self._worker.stopping else self._claim(None)
        except Unavailable as error:
            _log.warning("%s The slot waits for a nudge.", error.message)
        finally:
            self._worker.give_slot()

    def _claim(self, task_id: str | None) -> tuple[Claim | None, float]:
        token, sent = new_id(), time.monotonic()
        if not db.read(partial(queries.is_dispatched, task_id, self._worker.queues)):
            return None, sent  # a nudge that somebody answered already must not make writers wait
        me, queues = self._worker.id, self._worker.queues
        claim = db.unit(lambda: lifecycle.claim(me, token, task_id=task_id, queues=queues), recognise=lambda: lifecycle.claimed(token))
        return claim, sent

    # ---- one attempt

    def _run(self, claim: Claim, leased_at: float) -> None:
        with Attempt(claim, self._settings) as attempt:
            self._worker.add(attempt, leased_at)
            try:
                self._settle(attempt, self._perform(attempt))
            finally:
                self._worker.remove(attempt)

    def _perform(self, attempt: Attempt) -> Outcome:
        """Call the handler and say how it ended; it never raises."""
        try:
            kind = self._registry.get(attempt.claim.type)
            result = kind.function(kind.check(json.loads(attempt.claim.payload)), attempt)
            outcome = self._succeeded(result)
        except InvalidTask as error:
            outcome = _failed(error.code, error.message, may_retry=False)
        except Stopped as stopped:
            outcome = _failed("handler_error", f"The handler stopped: {stopped}")
        except Retry as retry:
            outcome = _failed("handler_error", retry.message, retry_after_s=retry.after_s)
        except Fail as failure:
            outcome = Outcome(FAILED, error={"code": failure.code, "message": failure.message, **_plain(failure.details)})
        except Exception as error:  # whatever a handler raises is the task's failure, not ours
            attempt.log(traceback.format_exc())
            outcome = _failed("handler_error", f"{type(error).__name__}: {error}")
        return _stopped(attempt, outcome)

    def _succeeded(self, result: object) -> Outcome:
        try:
            text = jsontext.dumps(result)
        except jsontext.BadJson as error:
            return _failed("result_not_json", str(error), may_retry=False)
        limit = self._settings.max_body_mb * 1_000_000
        if len(text) > limit:
            return _failed("result_too_large", f"The result has {len(text)} characters, {limit} are allowed.", may_retry=False)
        return Outcome(SUCCEEDED, result=text)

    def _settle(self, attempt: Attempt, outcome: Outcome) -> None:
        """Record the end, patiently: while the lease lasts nobody else will."""
        token, claim = new_id(), attempt.claim
        outcome = self._keep_artifacts(attempt, outcome)
        tail = attempt.take_tail()
        if attempt.stop_reason == SHUTDOWN and outcome.status != SUCCEEDED:
            end = partial(lifecycle.release, claim, "its worker was stopped", token, tail)
        else:
            end = partial(lifecycle.finish, claim, outcome, token, tail)
        try:
            status = db.unit(end, patience_s=self._settings.lease_s, recognise=partial(lifecycle.finished, claim.id, token))
        except Unavailable as error:
            _log.warning("%s The task will be taken back and run again.", error.message, extra=log.context(claim.id, claim.attempt))
            return
        if status is None:
            _log.warning("the lease was lost; what the attempt did is not recorded", extra=log.context(claim.id, claim.attempt))
            return
        self._tell(claim.id)

    def _tell(self, task_id: str) -> None:
        if not self._nudger.send(TRACE, task_id) and self._write_trace:
            self._write_trace(task_id)
        if _somebody_waits() and not self._nudger.send(ORCHESTRATE, task_id) and not self._worker.stopping:
            self._run_pass()

    def _keep_artifacts(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        files = attempt.kept_files()
        size = sum(path.stat().st_size for path in files)
        if size > self._settings.artifact_limit_mb * 1_000_000:
            message = f"The files to keep have {size} bytes, TOWER_ARTIFACT_LIMIT_MB={self._settings.artifact_limit_mb} are allowed."
            attempt.log(message)
            return outcome if outcome.error else _failed("artifact_too_large", message, may_retry=False)
        for path in files:
            self._keep_file(attempt, path)
        return outcome

    def _keep_file(self, attempt: Attempt, path: Path) -> None:
        name = path.relative_to(attempt.artifacts).as_posix()
        for part, data in enumerate(_parts(path)):
            while attempt.stop_reason != LEASE_LOST:
                try:
                    db.unit(partial(leases.keep_artifact, attempt.claim, name, part, data))
                    break
                except Unavailable:
                    continue


def _failed(code: str, message: str, *, may_retry: bool = True, retry_after_s: float | None = None) -> Outcome:
    return Outcome(FAILED, error={"code": code, "message": _storable(message)}, may_retry=may_retry, retry_after_s=retry_after_s)


def _stopped(attempt: Attempt, outcome: Outcome) -> Outcome:
    """Let the reason for which an attempt had to stop decide its end."""
    if attempt.stop_reason == CANCEL:
        return lifecycle.WAS_CANCELLED
    if attempt.stop_reason == TIMEOUT:
        return Outcome(TIMED_OUT, error={"code": "timeout", "message": f"It ran longer than timeout_s={attempt.claim.timeout_s:g}."})
    return outcome


def _somebody_waits() -> bool:
    return db.read(lambda: bool(Task.select(Task.id).where(Task.status == QUEUED, Task.ready_at <= db.now()).exists()))


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield file.read(CHUNK)
        while data := file.read(CHUNK):
            yield data


def _plain(details: dict[str, object]) -> dict[str, object]:
    return {name: _storable(value) if isinstance(value, str) else _json_or_text(value) for name, value in details.items()}


def _json_or_text(value: object) -> object:
    try:
        jsontext.dumps(value)
    except jsontext.BadJson:
        return _storable(repr(value))
    return value


def _storable(text: str) -> str:
    """Return text that every database and JSON reader can hold."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()

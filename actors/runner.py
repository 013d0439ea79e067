"""The body shared by all handler actors: claim, run, finish, and on to the next."""

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from actors.attempt import CANCEL, LEASE_LOST, SHUTDOWN, SILENCE, TIMEOUT, UNGUARDED, Attempt
from actors.worker import WorkerProcess
from tower import db, jsontext, leases, lifecycle, log, queries
from tower.broker import ORCHESTRATE, TRACE, Nudger
from tower.errands import Threads
from tower.errors import InvalidTask, Unavailable
from tower.faults import fault
from tower.group import Group
from tower.handler import Fail, HandlerType, Registry, Retry, Stopped
from tower.host import lease_time
from tower.leases import CHUNK, Claim
from tower.lifecycle import Ending, LogPart, Outcome
from tower.models import FAILED, SUCCEEDED, TIMED_OUT, new_id
from tower.reminders import Nudge
from tower.settings import Settings

#: Characters kept of an error's message, and of each of its details.
_MESSAGE, _DETAIL = 2000, 4000

#: A folder should be complete a second after its task's end: from this lag on slots wait a moment before their next task.
_LATE_S, _PAUSE_S = 0.3, 1.0

#: What is said of a task that its worker cannot go on with.
_HANDED_BACK = {
    SHUTDOWN: "its worker was stopped",
    LEASE_LOST: "its worker could not renew its lease",
    UNGUARDED: "its worker could not guard its processes",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Turn:
    """What a slot has to write: how its attempt ended, and whether it wants another task."""

    ending: Ending | None = None
    takes: bool = False


@dataclass(frozen=True)
class _Answer:
    """The status that an attempt ended with, None if its lease was gone; and the next claim, with when it was asked for."""

    status: str | None = None
    claim: Claim | None = None
    leased_at: float = 0.0


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
        trace_lag: Callable[[], float] = float,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._nudger = nudger
        self._worker = worker
        self._run_pass = run_pass
        self._write_trace = write_trace
        self._trace_lag = trace_lag
        self._desk = Group(self._write)
        self._slots = Threads("slot")
        #: Whether more was dispatched than slots were free: then an end is recorded together with the next claim.
        self._is_behind = False

    def handle(self, task_id: str) -> None:
        """Run the task, or the first that was dispatched, and then the next, if a slot is free; drop a nudge that was answered already."""
        if not db.read(partial(queries.is_dispatched, task_id)):
            return
        if self._worker.take_slots(1):
            self._use_slot()
        else:
            self._is_behind = True

    def offer(self, nudges: Sequence[Nudge]) -> list[Nudge]:
        """Give tasks that were dispatched to free slots of this process; return those for which there are none."""
        ours = [nudge for nudge in nudges if nudge.queue in self._worker.queues]
        slots = self._worker.take_slots(len(ours))
        if slots < len(ours):
            self._is_behind = True
        if slots:
            self._start(slots)
        given = set(ours[:slots])
        return [nudge for nudge in nudges if nudge not in given]

    def look(self) -> None:
        """Start what may start, without any nudge: so work goes on when the broker does not."""
        self._run_pass()
        self.fill()

    def fill(self) -> None:
        """Give free slots what was dispatched while none was free."""
        if not self._worker.free_slots:
            return
        waiting = db.read(lambda: queries.dispatched_count(self._worker.queues))
        slots = self._worker.take_slots(waiting)
        if slots:
            self._start(slots)

    def _start(self, slots: int) -> None:
        """Claim, with one commit, a task for each of these slots, which are taken; one that gets none looks for itself."""
        answers = [_Answer()] * slots
        try:
            answers = self._write([_Turn(takes=True)] * slots)
        finally:
            for answer in answers:
                self._slots.run(partial(self._use_slot, answer))

    def _use_slot(self, first: "_Answer | None" = None) -> None:
        """Run one dispatched task after the other, and give the slot back when there is none."""
        ran = None
        try:
            try:
                ran = self._run_in_turn(first or _Answer())
            finally:
                self._worker.give_slot()
            # Only now: it looks for what found no slot while this was not free.
            if ran:
                self._ask_for_more(ran)
        except Unavailable as error:
            _log.warning("%s The slot waits for a nudge.", error.message)

    def _run_in_turn(self, first: "_Answer") -> str | None:
        """Run tasks as long as there are any; return the id of the last, if the orchestrator actor has not been told of it."""
        claim, leased_at = (first.claim, first.leased_at) if first.claim else self._claim()
        last = None
        while claim is not None:
            last = claim.id
            claim, leased_at = self._run(claim, leased_at)
            if claim is not None or self._late_s() > 0:
                self._ask_for_more(last)
            if claim is None and self._late_s() > 0:
                time.sleep(min(self._late_s(), _PAUSE_S))
                claim, leased_at = self._claim()
        return last

    def _late_s(self) -> float:
        """How long a slot should wait before its next task, so that short tasks do not outrun their traces for ever."""
        return self._trace_lag() - _LATE_S

    def _claim(self) -> tuple[Claim | None, float]:
        if self._worker.stopping:
            return None, 0.0
        answer = self._desk.do(_Turn(takes=True))
        return answer.claim, answer.leased_at

    def _run(self, claim: Claim, leased_at: float) -> tuple[Claim | None, float]:
        """Run an attempt and record its end; return the next claim, which came with that."""
        with Attempt(claim, self._settings, self._worker.guard) as attempt:
            self._worker.add(attempt, leased_at)
            try:
                return self._settle(attempt, self._perform(attempt))
            finally:
                self._worker.remove(attempt)

    def abandon(self, attempt: Attempt) -> None:
        """Record the end of an attempt whose handler does not end; its slot stays taken until it does.

        It is not tried again: the code that ignores its end could still be at work beside the next attempt.
        """
        claim = attempt.claim
        outcome = replace(_stopped(attempt, _failed("handler_error", "The handler ignored its end.")), may_retry=False)
        attempt.log("── the handler does not end; its worker has given it up, and a slot with it until it does")
        _log.error(
            "a handler ignores its end: its slot is lost until it returns", extra=log.context(claim.id, claim.attempt, type=claim.type)
        )
        self._record(attempt, outcome)
        self._ask_for_more(claim.id)

    def _perform(self, attempt: Attempt) -> Outcome:
        """Call the handler and say how it ended; it never raises."""
        kind: HandlerType | None = None
        try:
            kind = self._registry.get(attempt.claim.type)
            result = kind.function(kind.check(json.loads(attempt.claim.payload)), attempt)
            outcome = self._succeeded(attempt.mask.value(result))
        except InvalidTask as error:
            outcome = _failed(error.code, error.message, may_retry=False)
        except Stopped as stopped:
            outcome = _failed("handler_error", f"The handler stopped: {stopped}")
        except Retry as retry:
            outcome = _failed("handler_error", retry.message, retry_after_s=retry.after_s)
        except Fail as failure:
            outcome = _failed(failure.code, failure.message, details=failure.details, may_retry=failure.may_retry)
        except BaseException as error:  # whatever a handler raises, SystemExit too, is the task's failure and not the worker's
            attempt.log(traceback.format_exc())
            outcome = _failed("handler_error", f"{type(error).__name__}: {error}")
        return _as_type_says(kind, _stopped(attempt, replace(outcome, error=attempt.mask.value(outcome.error))))

    def _succeeded(self, result: object) -> Outcome:
        try:
            text = jsontext.dumps(result)
        except jsontext.BadJson as error:
            return _failed("result_not_json", str(error), may_retry=False)
        limit = self._settings.max_body_mb * 1_000_000
        if len(text) > limit:
            return _failed("result_too_large", f"The result has {len(text)} characters, {limit} are allowed.", may_retry=False)
        return Outcome(SUCCEEDED, result=text)

    def _settle(self, attempt: Attempt, outcome: Outcome) -> tuple[Claim | None, float]:
        """Record the end, and take the next task with the same commit if one is to be had."""
        takes = self._is_behind and not self._worker.stopping and self._late_s() <= 0
        answer = self._record(attempt, self._keep_artifacts(attempt, outcome), takes=takes)
        return answer.claim, answer.leased_at

    def _record(self, attempt: Attempt, outcome: Outcome, *, takes: bool = False) -> "_Answer":
        """Record the end, patiently: while the lease lasts nobody else will."""
        claim, token, tail = attempt.claim, new_id(), attempt.take_tail()
        try:
            if attempt.stop_reason in _HANDED_BACK and outcome.status != SUCCEEDED:
                answer = self._hand_back(claim, _HANDED_BACK[attempt.stop_reason], token, tail)
            else:
                answer = self._desk.do(_Turn(Ending(claim, outcome, token, tail), takes))
        except Unavailable as error:
            _log.warning("%s The task will be taken back and run again.", error.message, extra=log.context(claim.id, claim.attempt))
            return _Answer()
        if answer.status is None:
            _log.warning("the lease was lost; what the attempt did is not recorded", extra=log.context(claim.id, claim.attempt))
        else:
            self._ask_for_trace(claim.id)
        return answer

    def _hand_back(self, claim: Claim, reason: str, token: str, tail: list[LogPart]) -> "_Answer":
        fault("finish.before")
        end = partial(lifecycle.release, claim, reason, token, tail)
        status = db.unit(end, patience_s=self._settings.lease_s, recognise=partial(lifecycle.finished, claim.id, token))
        fault("finish.after_commit")
        return _Answer(status)

    def _write(self, turns: "list[_Turn]") -> "list[_Answer]":
        """Record the ends of attempts and claim as many tasks as slots want one, in one transaction."""
        token, sent = new_id(), lease_time(embedded=self._settings.embedded)
        endings = [turn.ending for turn in turns if turn.ending]
        takers = sum(turn.takes for turn in turns)

        def work() -> tuple[list[str | None], list[Claim]]:
            statuses = lifecycle.finish_all(endings)
            return statuses, lifecycle.claim_some(self._worker.id, token, takers, self._worker.queues) if takers else []

        def recognise() -> tuple[list[str | None], list[Claim]] | None:
            statuses = [lifecycle.finished(ending.claim.id, ending.token) for ending in endings]
            claims = lifecycle.claimed(token)
            return (statuses, claims) if claims or any(statuses) else None

        if endings:
            fault("finish.before")
        if takers:
            fault("claim.before")
            was_behind, self._is_behind = self._is_behind, False  # before we look: who finds no slot after that says so again
        # Both together take two statements, and one commit.
        is_one = not endings or (not takers and all(ending.is_plain for ending in endings))
        statuses, claims = db.unit(work, patience_s=self._settings.lease_s, recognise=recognise, is_one_statement=is_one)
        if takers and len(claims) == takers:
            self._is_behind = self._is_behind or was_behind
        if endings:
            fault("finish.after_commit")
        if claims:
            fault("claim.after_commit")
        ended, taken = iter(statuses), iter(claims)
        return [_Answer(next(ended) if turn.ending else None, next(taken, None) if turn.takes else None, sent) for turn in turns]

    def _ask_for_trace(self, task_id: str) -> None:
        if not self._nudger.send(TRACE, task_id) and self._write_trace:
            self._write_trace(task_id)

    def _ask_for_more(self, task_id: str) -> None:
        """Have the orchestrator actor start what may start now that this task has ended."""
        if not self._nudger.send(ORCHESTRATE, task_id) and not self._worker.stopping:
            self.look()

    def _keep_artifacts(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        """Keep the files that the attempt left; what cannot be kept fails an attempt that succeeded."""
        try:
            files = attempt.kept_files()
            self._check_size(files)
            if files:
                db.unit(partial(leases.forget_artifacts, attempt.claim), patience_s=self._settings.lease_s)
            for name, path in files.items():
                for part, data in enumerate(attempt.mask.stream(_parts(path))):
                    db.unit(
                        partial(leases.keep_artifact, attempt.claim, attempt.mask.text(name), part, data), patience_s=self._settings.lease_s
                    )
                    fault("artifact.after_commit")
        except Fail as failure:
            problem = _failed(failure.code, failure.message, may_retry=False)
        except OSError as error:
            problem = _failed("artifact_missing", f"A file to keep could not be read: {error.strerror}.", may_retry=False)
        except Unavailable as error:
            problem = _failed("artifact_missing", f"The files to keep could not be stored. {error.message}")
        else:
            return outcome
        attempt.log(str((problem.error or {})["message"]))
        return problem if outcome.status == SUCCEEDED else outcome

    def _check_size(self, files: dict[str, Path]) -> None:
        size, limit = sum(path.stat().st_size for path in files.values()), self._settings.artifact_limit_mb
        if size > limit * 1_000_000:
            raise Fail("artifact_too_large", f"The files to keep have {size} bytes, TOWER_ARTIFACT_LIMIT_MB={limit} are allowed.")


def _failed(
    code: str, message: str, *, details: dict[str, object] | None = None, may_retry: bool = True, retry_after_s: float | None = None
) -> Outcome:
    error = {**_plain(details or {}), "code": code, "message": _storable(message, _MESSAGE)}
    return Outcome(FAILED, error=error, may_retry=may_retry, retry_after_s=retry_after_s)


def _as_type_says(kind: HandlerType | None, outcome: Outcome) -> Outcome:
    """Apply the type's rules of when to try again."""
    if kind is None or outcome.error is None:
        return outcome
    may_retry = outcome.may_retry and kind.may_retry(outcome.error["code"])
    return replace(outcome, may_retry=may_retry, backoff=(kind.backoff_s, kind.backoff_ceiling_s))


def _stopped(attempt: Attempt, outcome: Outcome) -> Outcome:
    """Let the reason for which an attempt had to stop decide its end."""
    if attempt.stop_reason == CANCEL:
        return lifecycle.WAS_CANCELLED
    if attempt.stop_reason == TIMEOUT:
        return _timed_out("timeout", f"It ran longer than timeout_s={attempt.claim.timeout_s:g}.", outcome)
    if attempt.stop_reason == SILENCE:
        return _timed_out("silence", f"It said nothing for silence_s={attempt.claim.silence_s:g} seconds.", outcome)
    return outcome


def _timed_out(code: str, message: str, outcome: Outcome) -> Outcome:
    return replace(outcome, status=TIMED_OUT, result=None, error={"code": code, "message": message}, may_retry=True, retry_after_s=None)


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield file.read(CHUNK)
        while data := file.read(CHUNK):
            yield data


def _plain(details: dict[str, object]) -> dict[str, object]:
    """Return details as every database and JSON reader can hold them, none of them long."""
    return {_storable(name, 80): _json_or_text(value) for name, value in details.items()}


def _json_or_text(value: object) -> object:
    try:
        if len(jsontext.dumps(value)) <= _DETAIL:
            return value
    except jsontext.BadJson:
        pass
    return _storable(value if isinstance(value, str) else repr(value), _DETAIL)


def _storable(text: str, longest: int) -> str:
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    return cut.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()

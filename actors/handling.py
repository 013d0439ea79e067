"""Calls the handler of an attempt, and says how it ended."""

import json
import logging
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from actors.attempt import CANCEL, SILENCE, TIMEOUT, Attempt
from tower import db, jsontext, leases, lifecycle, log
from tower.errors import InvalidTask, Unavailable
from tower.faults import fault
from tower.handler import Fail, HandlerType, Registry, Retry, Stopped
from tower.leases import CHUNK
from tower.lifecycle import Outcome
from tower.settings import Settings
from tower.terms import FAILED, SUCCEEDED, TIMED_OUT

#: Characters kept of an error's message, and of each of its details.
_MESSAGE, _DETAIL = 2000, 4000

_log = logging.getLogger(__name__)


def perform(attempt: Attempt, registry: Registry, settings: Settings) -> Outcome:
    """Run an attempt to its end and keep the files that it left; it never raises."""
    try:
        return _keep_artifacts(attempt, _call(attempt, registry, settings), settings)
    except BaseException as error:  # of a failure that cannot be told as it is, or files that no database takes
        _log.exception("how an attempt ended cannot be told", extra=log.context(attempt.id, attempt.attempt))
        return _failed("handler_error", f"{type(error).__name__}: how it ended cannot be told; the worker's log has more.")


def given_up(attempt: Attempt) -> Outcome:
    """Return the end of an attempt whose handler ignores that it should end.

    It is not tried again: the code that goes on could still be at work beside the next attempt.
    """
    return _stopped(attempt, _failed("handler_error", "The handler ignored its end."))._replace(may_retry=False)


def _call(attempt: Attempt, registry: Registry, settings: Settings) -> Outcome:
    kind: HandlerType | None = None
    try:
        kind = registry.get(attempt.claim.type)
        result = kind.function(kind.check(json.loads(attempt.claim.payload)), attempt)
        outcome = _succeeded(attempt.mask.value(result), settings.max_body_mb * 1_000_000)
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
    return _as_type_says(kind, _stopped(attempt, outcome._replace(error=attempt.mask.value(outcome.error)) if outcome.error else outcome))


def _succeeded(result: object, limit: int) -> Outcome:
    try:
        text = jsontext.dumps(result)
    except jsontext.BadJson as error:
        return _failed("result_not_json", str(error), may_retry=False)
    if len(text) > limit:
        return _failed("result_too_large", f"The result has {len(text)} characters, {limit} are allowed.", may_retry=False)
    return Outcome(SUCCEEDED, result=text)


def _keep_artifacts(attempt: Attempt, outcome: Outcome, settings: Settings) -> Outcome:
    """Keep the files that the attempt left; what cannot be kept fails an attempt that succeeded."""
    try:
        files = attempt.kept_files()
        _check_size(files, settings.artifact_limit_mb)
        if files:
            db.unit(partial(leases.forget_artifacts, attempt.claim), patience_s=settings.lease_s)
        for name, path in files.items():
            for part, data in enumerate(attempt.mask.stream(_parts(path))):
                db.unit(partial(leases.keep_artifact, attempt.claim, attempt.mask.text(name), part, data), patience_s=settings.lease_s)
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


def _check_size(files: dict[str, Path], limit: int) -> None:
    size = sum(path.stat().st_size for path in files.values())
    if size > limit * 1_000_000:
        raise Fail("artifact_too_large", f"The files to keep have {size} bytes, TOWER_ARTIFACT_LIMIT_MB={limit} are allowed.")


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield file.read(CHUNK)
        while data := file.read(CHUNK):
            yield data


def _failed(
    code: str, message: str, *, details: dict[str, object] | None = None, may_retry: bool = True, retry_after_s: float | None = None
) -> Outcome:
    error = {**_plain(details or {}), "code": code, "message": _storable(str(message), _MESSAGE)}
    return Outcome(FAILED, error=error, may_retry=may_retry, retry_after_s=retry_after_s)


def _as_type_says(kind: HandlerType | None, outcome: Outcome) -> Outcome:
    """Apply the type's rules of when to try again."""
    if kind is None or outcome.error is None:
        return outcome
    may_retry = outcome.may_retry and kind.may_retry(outcome.error["code"])
    return outcome._replace(may_retry=may_retry, backoff=(kind.backoff_s, kind.backoff_ceiling_s))


def _stopped(attempt: Attempt, outcome: Outcome) -> Outcome:
    """Let the reason for which an attempt had to stop decide its end."""
    reason = attempt.stop_reason
    if reason == CANCEL:
        return lifecycle.WAS_CANCELLED
    if reason == TIMEOUT:
        return _timed_out("timeout", f"It ran longer than timeout_s={attempt.claim.timeout_s:g}.", outcome)
    if reason == SILENCE:
        return _timed_out("silence", f"It said nothing for silence_s={attempt.claim.silence_s:g} seconds.", outcome)
    return outcome


def _timed_out(code: str, message: str, outcome: Outcome) -> Outcome:
    return outcome._replace(status=TIMED_OUT, result=None, error={"code": code, "message": message}, may_retry=True, retry_after_s=None)


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

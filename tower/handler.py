"""What a handler is: a plain function for one task type, its registration, and the context it is given."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from tower.errors import InvalidTask
from tower.lifecycle import BACKOFF_CEILING_S, BACKOFF_S
from tower.spec import Rate, TaskSpec

#: Queues that carry the tower's own messages.
RESERVED_QUEUES = ("orchestrator", "trace")

#: Codes of failures that another attempt would only repeat.
NEVER_RETRIED = frozenset(
    {
        "artifact_missing",
        "artifact_name",
        "artifact_too_large",
        "command_not_found",
        "invalid_payload",
        "redirect_refused",
        "response_too_large",
        "result_not_json",
        "result_too_large",
        "unknown_type",
    }
)

#: Errors told of one payload.
_MOST_ERRORS = 5

_YEAR_S = 366 * 86400.0

_NAME = re.compile(r"^[a-z][a-z0-9_.-]{0,63}$")
_CODE = re.compile(r"^[a-z][a-z0-9_]{0,63}$")

HandlerFunction = Callable[[Any, "TaskContext"], Any]
F = TypeVar("F", bound=HandlerFunction)


class Fail(Exception):
    """Raised by a handler to end its attempt with a code of its own; `details` go into the task's error.

    With `may_retry=False` it is not tried again, whatever attempts are left.
    """

    def __init__(self, code: str, message: str, *, may_retry: bool = True, **details: Any) -> None:
        if not _CODE.match(code):
            raise ValueError(f"A failure code is lower case with underscores, as in exit_nonzero; got {code!r}.")
        super().__init__(message)
        self.code, self.message, self.may_retry, self.details = code, message, may_retry, details


class Retry(Exception):
    """Raised by a handler to be tried again `after_s` seconds from now, if it has attempts left."""

    def __init__(self, after_s: float, message: str = "The handler asked to be tried again.") -> None:
        if not 0 <= after_s <= _YEAR_S:
            raise ValueError(f"Retry(after_s) takes seconds from 0 to a year; got {after_s!r}.")
        super().__init__(message)
        self.after_s, self.message = after_s, message


class Stopped(Exception):
    """Raised inside a handler when its attempt must end now: cancelled, timed out, or its lease is gone."""


@dataclass(frozen=True)
class Finished:
    """How a child process ended."""

    #: The exit code; minus the signal's number if a signal ended it.
    exit_code: int
    #: The last lines of its output.
    tail: str


@dataclass(frozen=True)
class Previous:
    """What the attempt before this one left behind."""

    #: Why it ended: `code`, `message` and what else its handler told.
    error: dict[str, Any]
    #: The last lines of its log.
    log_tail: str


#: What a value begins with that names a secret of the worker, and how such names look.
SECRET, SECRET_NAME = "secret://", re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


class TaskContext(Protocol):
    """What a handler is given beside its payload."""

    #: The task's id, and the number of this try. Together they name one side effect.
    id: str
    attempt: int

    @property
    def previous(self) -> Previous | None:
        """What the attempt before left; None on the first."""

    def log(self, text: str) -> None:
        """Add lines to log.txt."""

    def secret(self, name: str) -> str:
        """Return a secret of the worker; from now on it is hidden in all that the task says. Raises Fail if there is none to use."""

    def artifact(self, name: str) -> Path:
        """Return where to write a file that shall be kept in the trace as artifacts/<name>."""

    @property
    def folder(self) -> Path:
        """The attempt's own folder; it is removed at the end."""

    @property
    def cancelled(self) -> bool:
        """Whether the attempt should stop as soon as it can."""

    @property
    def remaining_s(self) -> float:
        """Seconds until the attempt times out."""

    def wait(self, seconds: float) -> None:
        """Sleep; raise Stopped when the attempt must end first."""

    def run(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None, stdin: str | None = None
    ) -> Finished:
        """Run a child process whose output streams into log.txt; its whole tree ends with the attempt.

        Raises Fail if it cannot start and Stopped if the attempt must end first.
        """


@dataclass(frozen=True)
class HandlerType:
    """A registered handler: the function and the defaults of its type."""

    #: The task type it runs.
    name: str
    function: HandlerFunction
    payload: type[BaseModel]
    queue: str
    timeout_s: float
    max_attempts: int
    silence_s: float | None = None
    #: A failed attempt is repeated after so many seconds, then after twice as many, up to the ceiling.
    backoff_s: float = BACKOFF_S
    backoff_ceiling_s: float = BACKOFF_CEILING_S
    #: Failure codes after which it is not tried again.
    no_retry: frozenset[str] = frozenset()
    #: What a task shares with others of its type, unless it says so itself.
    concurrency_key: Callable[[Any], str | None] | None = None
    concurrency_limit: int = 1
    rate: Callable[[Any], Rate | None] | None = None

    def may_retry(self, code: str) -> bool:
        """Whether an attempt that failed with this code may be repeated."""
        return code not in self.no_retry and code not in NEVER_RETRIED

    def shares(self, payload: BaseModel, spec: TaskSpec) -> dict[str, Any]:
        """Return the concurrency key and the rate of a task, with their limits: its own, or else what the type's rules make of it."""
        key = spec.concurrency_key or (self.concurrency_key(payload) if self.concurrency_key else None)
        rate = spec.rate or (self.rate(payload) if self.rate else None)
        return {
            "concurrency_key": key,
            "concurrency_limit": spec.concurrency_limit or self.concurrency_limit,
            "rate_key": rate.key if rate else None,
            "rate_limit": rate.limit if rate else None,
            "rate_per_s": rate.per_s if rate else None,
        }

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    def check(self, payload: dict[str, Any]) -> BaseModel:
        """Return the payload as the handler's model; raise InvalidTask naming the field, the value and the cure."""
        try:
            return self.payload.model_validate(payload)
        except ValidationError as error:
            told = error.errors(include_url=False)[:_MOST_ERRORS]
            raise InvalidTask(
                f"The payload does not fit type '{self.name}'. " + " ".join(_explain(item) for item in told),
                code="invalid_payload",
                field=".".join(["payload", *(str(part)[:80] for part in told[0]["loc"])]),
            ) from None


class Registry:
    """The handlers this process knows, by type."""

    def __init__(self) -> None:
        self._types: dict[str, HandlerType] = {}

    def add(self, made: HandlerType) -> None:
        """Register a handler; raise ValueError for a second one of the same type."""
        known = self._types.get(made.name)
        if known and known.function.__module__ != made.function.__module__:
            raise ValueError(f"Type '{made.name}' has two handlers, in {known.function.__module__} and {made.function.__module__}.")
        self._types[made.name] = made

    def get(self, name: str) -> HandlerType:
        """Return the handler of a type; raise InvalidTask with the nearest name."""
        if name in self._types:
            return self._types[name]
        near = difflib.get_close_matches(name, self._types, n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        raise InvalidTask(
            f"No handler for type {_quoted(name)}.{guess} Known: {', '.join(sorted(self._types))}.", code="unknown_type", field="type"
        )

    def is_own(self, name: str) -> bool:
        """Whether no other package has brought this type, so that to check its payload never waits for anything."""
        return name not in self._types or self._types[name].function.__module__.startswith("actors.")

    def __iter__(self) -> Iterator[HandlerType]:
        return iter(sorted(self._types.values(), key=lambda made: made.name))

    @property
    def queues(self) -> list[str]:
        """The queues of all types."""
        return sorted({made.queue for made in self._types.values()})


registry = Registry()


def handler(
    name: str,
    *,
    payload: type[BaseModel],
    queue: str = "default",
    timeout_s: float = 3600.0,
    max_attempts: int = 1,
    silence_s: float | None = None,
    backoff_s: float = BACKOFF_S,
    backoff_ceiling_s: float = BACKOFF_CEILING_S,
    no_retry: Iterable[str] = (),
    concurrency_key: Callable[[Any], str | None] | None = None,
    concurrency_limit: int = 1,
    rate: Callable[[Any], Rate | None] | None = None,
) -> Callable[[F], F]:
    """Register the decorated function as the handler of a task type, with the type's defaults; see HandlerType for their meaning."""
    for word, value in (("type", name), ("queue", queue)):
        if not _NAME.match(value):
            raise ValueError(f"A {word} is lower-case letters, digits, '.', '-' and '_', as in run_tests; got {value!r}.")
    if queue in RESERVED_QUEUES:
        raise ValueError(f"The queue {queue!r} is the tower's own; take another.")

    def register(function: F) -> F:
        shared = (concurrency_key, concurrency_limit, rate)
        retries = (backoff_s, backoff_ceiling_s, frozenset(no_retry))
        registry.add(HandlerType(name, function, payload, queue, timeout_s, max_attempts, silence_s, *retries, *shared))
        return function

    return register


def _explain(item: Any) -> str:
    where = ".".join(str(part)[:80] for part in item["loc"]) or "the payload"
    given = "" if item["type"] == "missing" else f", got {_quoted(item['input'])}"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{given}."


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"

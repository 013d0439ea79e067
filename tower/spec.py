"""TaskSpec: what a client may ask for, checked before any row exists."""

import hashlib
import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from tower import jsontext

#: The largest batch of one request.
MAX_BATCH = 1000

#: The longest window of a rate, in seconds, and the most starts within one.
MAX_WINDOW_S, MAX_STARTS = 86_400.0, 1_000_000

_YEAR_S = 366 * 86400.0
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
#: Times outside could not be written down again in every zone.
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)


def _one_line(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("should be one line without control characters")
    return text


def _rfc3339(value: Any) -> Any:
    if not (isinstance(value, datetime) or (isinstance(value, str) and _RFC3339.fullmatch(value))):
        raise ValueError("should be a time with a zone, as in 2031-05-01T08:00:00Z (in a URL write + as %2B)")
    return value


def _in_utc(value: datetime) -> datetime:
    if not _FIRST <= value < _LAST:
        raise ValueError("should be a time from 1970 to 9998")
    return value.astimezone(UTC)


Time = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_rfc3339), AfterValidator(_in_utc)]
Line = Annotated[str, StringConstraints(min_length=1, max_length=200), AfterValidator(_one_line)]
Key = Annotated[str, StringConstraints(min_length=1, max_length=255), AfterValidator(_one_line)]
LabelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,62}$")]

Labels = dict[LabelName, Annotated[str, StringConstraints(max_length=255), AfterValidator(_one_line)]]

ParentId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
Status = Literal["queued", "dispatched", "running", "succeeded", "failed", "cancelled", "timed_out"]


def _plain(text: str) -> str:
    if "\x00" in text:
        raise ValueError("should not hold a NUL character")
    return text


#: What a filter looks for.
Text = Annotated[str, Field(max_length=400), AfterValidator(_plain)]


class Rate(BaseModel):
    """A limit on how often tasks start, over a sliding window."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    key: Key = Field(description="Tasks with the same key share the limit.", examples=["api:github"])
    limit: int = Field(ge=1, le=MAX_STARTS, description="Starts at most within any `per_s` seconds.", examples=[10])
    per_s: float = Field(gt=0, le=MAX_WINDOW_S, description="The length of the window, in seconds.", examples=[60])


class TaskSpec(BaseModel):
    """A task as a client asks for it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Annotated[str, StringConstraints(min_length=1, max_length=64)] = Field(
        description="Which handler runs it; GET /handlers lists them.", examples=["echo"]
    )
    payload: dict[str, Any] = Field(
        default_factory=dict, description="What the handler is given, as its schema says.", examples=[{"hello": "tower"}]
    )
    title: Line | None = Field(None, description="A name for people.", examples=["Say hello"])
    priority: int = Field(
        0, ge=-2_592_000, le=2_592_000, description="Seconds of head start over tasks enqueued at the same moment.", examples=[60]
    )
    not_before: Time | None = Field(
        None, description="It may not start before this time (RFC 3339, with a zone).", examples=["2031-05-01T08:00:00Z"]
    )
    expires_at: Time | None = Field(
        None, description="It may not start after this time: what has not by then is timed_out.", examples=["2031-05-01T09:00:00Z"]
    )
    timeout_s: float | None = Field(
        None, gt=0, le=_YEAR_S, description="Seconds one attempt may run; the type's default if absent.", examples=[600]
    )
    silence_s: float | None = Field(
        None, gt=0, le=_YEAR_S, description="Seconds an attempt may go without output; the type's default if absent.", examples=[300]
    )
    max_attempts: int | None = Field(
        None,
        ge=1,
        le=100,
        description="Attempts that may fail before the task has; the type's default if absent. 1: at most once, whatever happens.",
        examples=[3],
    )
    idempotency_key: Key | None = Field(
        None, description="Your name for this request: the same key and body give the same task.", examples=["release-42"]
    )
    concurrency_key: Key | None = Field(
        None, description="At most concurrency_limit tasks with the same key run at once.", examples=["repo:acme/api"]
    )
    concurrency_limit: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="How many with its concurrency_key, one if absent; where they differ, the lowest of those that run counts.",
        examples=[1],
    )
    rate: Rate | None = Field(None, description="How often tasks with the same rate key may start.")
    parent_id: ParentId | None = Field(
        None, description="The task that asks for it: the new one joins its tree.", examples=["0192f0c1-2345-7abc-8def-0123456789ab"]
    )
    labels: Labels = Field(default_factory=dict, max_length=32, description="Names to find it by.", examples=[{"team": "platform"}])
    requested_by: Line | None = Field(None, description="Who or what asked for it.", examples=["alice"])

    def digest(self) -> str:
        """Return a digest that is equal for equal requests; the key itself is not part of it."""
        body = self.model_dump(mode="json", exclude={"idempotency_key"}, exclude_defaults=True)
        return hashlib.sha256(jsontext.canonical(body).encode()).hexdigest()

    def earliest_start(self) -> float | None:
        """Return `not_before` in seconds since the epoch."""
        return self.not_before.timestamp() if self.not_before else None

    def latest_start(self) -> float | None:
        """Return `expires_at` in seconds since the epoch."""
        return self.expires_at.timestamp() if self.expires_at else None


class TaskFilter(BaseModel):
    """Which tasks are meant: those that fit every member given."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    status: list[Status] = Field(default_factory=list, max_length=20, description="Only these statuses.", examples=[["failed"]])
    type: list[Text] = Field(default_factory=list, max_length=100, description="Only these types.", examples=[["echo"]])
    label: list[Text] = Field(
        default_factory=list, max_length=32, description="Only with all these labels, as `name:value`.", examples=[["team:platform"]]
    )
    text: Text | None = Field(None, description="Only with this in the title, type or id.", examples=["release"])
    error_code: list[Text] = Field(
        default_factory=list, max_length=100, description="Only with one of these codes as their last error.", examples=[["worker_lost"]]
    )
    correlation_id: ParentId | None = Field(None, description="Only of this tree.", examples=["0192f0c1-2345-7abc-8def-0123456789ab"])
    created_after: Time | None = Field(None, description="Only created at this time or later.", examples=["2031-05-01T08:00:00Z"])
    created_before: Time | None = Field(None, description="Only created before this time.", examples=["2031-05-02T08:00:00Z"])
    retried: bool | None = Field(None, description="Only those that a later task repeats, or does not.", examples=[False])


class BulkRequest(BaseModel):
    """A change of many tasks."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    filter: TaskFilter = Field(description="Which tasks; an empty filter is refused.")
    dry_run: bool = Field(False, description="Only say how many there are.")
    by: Line | None = Field(None, description="Who asks, for the record.", examples=["alice"])

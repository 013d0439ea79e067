"""/rules, and pause and resume of the tower, its queues, types and keys."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tower import db
from tower.api.access import actor_of
from tower.api.errors import problems
from tower.api.strict import StrictRoute
from tower.decision import KEY, QUEUE, TOWER, TYPE
from tower.rules import MAX_RUNNING, RuleRow, Rules, listed
from tower.spec import MAX_STARTS, MAX_WINDOW_S, Key, Line
from tower.trace import rfc3339

router = APIRouter(tags=["rules"], route_class=StrictRoute)

Kind = Literal["queue", "type", "key", "rate"]

_KIND = Path(description="What is limited: a queue, a type, a concurrency key or a rate key.", examples=["key"])
_NAME = Path(description="Its name.", examples=["repo:acme/api"])
By = Annotated[Line | None, Query(description="Who asks, for the record.", examples=["alice"])]
Reason = Annotated[Line | None, Query(description="Why, for those who wait.", examples=["The test server is being upgraded."])]
_CHANGE = problems(403, 404, 413, 415, 422, 503)


class StartRate(BaseModel):
    """How often tasks may start, over a sliding window."""

    model_config = ConfigDict(extra="forbid", strict=True)

    limit: int = Field(ge=1, le=MAX_STARTS, description="Starts at most within any `per_s` seconds.", examples=[10])
    per_s: float = Field(gt=0, le=MAX_WINDOW_S, description="The length of the window, in seconds.", examples=[60])


class Limit(BaseModel):
    """A limit: `rate` for a rate key, `max_running` for everything else."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_running: int | None = Field(None, ge=1, le=MAX_RUNNING, description="Tasks in flight at most.", examples=[3])
    rate: StartRate | None = Field(None, description="Only for a rate key; it counts instead of what its tasks say.", examples=[None])

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        unknown = [name for name in given if name not in cls.model_fields] if isinstance(given, dict) else []
        if unknown:
            raise ValueError(f"there is no field {unknown[0][:80]!r}; a limit has max_running, or rate for a rate key")
        return given


class RuleInfo(BaseModel):
    """What restricts the starting of tasks beside slots."""

    kind: Literal["tower", "queue", "type", "key", "rate"] = Field(examples=["key"])
    name: str = Field(description="Empty for the tower itself.", examples=["repo:acme/api"])
    max_running: int | None = Field(description="Tasks in flight at most.", examples=[3])
    rate: StartRate | None = Field(description="How often tasks with this rate key may start.", examples=[None])
    paused_at: str | None = Field(description="Since when nothing of it starts.", examples=[None])
    paused_by: str | None = Field(examples=[None])
    reason: str | None = Field(description="Why it is paused.", examples=[None])
    updated_at: str = Field(examples=["2031-05-01T08:00:00.000Z"])


class RuleList(BaseModel):
    """Every rule, by kind and name."""

    rules: list[RuleInfo]


def _rules(request: Request) -> Rules:
    found: Rules = request.app.state.orchestrator.rules
    return found


def _told(row: RuleRow) -> dict[str, Any]:
    rate = {"limit": row["rate_limit"], "per_s": row["rate_per_s"]} if row["rate_limit"] else None
    return {**row, "rate": rate, "paused_at": rfc3339(row["paused_at"]), "updated_at": rfc3339(row["updated_at"])}


@router.get("/rules", response_model=RuleList, responses=problems(422, 503), summary="The limits, rates and pauses in force")
def rule_list() -> dict[str, Any]:
    """List what people have set; GET /tasks/{task_id}/why says which of it a task waits for."""
    return {"rules": [_told(row) for row in db.read(listed)]}


def _set(request: Request, kind: str, name: str, limit: Limit) -> dict[str, Any]:
    rate = (limit.rate.limit, limit.rate.per_s) if limit.rate else None
    return _told(_rules(request).set_limit(kind, name, max_running=limit.max_running, rate=rate))


@router.put("/rules/tower", response_model=RuleInfo, responses={**problems(400), **_CHANGE}, summary="Limit the whole tower")
def limit_tower(request: Request, limit: Limit) -> dict[str, Any]:
    """Let no more tasks than `max_running` be in flight at once, however many slots there are; replaces the limit before."""
    return _set(request, TOWER, "", limit)


@router.delete("/rules/tower", response_model=RuleInfo, responses=_CHANGE, summary="Lift the limit of the whole tower")
def lift_tower(request: Request) -> dict[str, Any]:
    """Take the limit off; a pause stays."""
    return _told(_rules(request).lift_limit(TOWER, ""))


@router.put(
    "/rules/{kind}/{name:path}", response_model=RuleInfo, responses={**problems(400), **_CHANGE}, summary="Limit a queue, type, key or rate"
)
def limit_one(request: Request, kind: Annotated[Kind, _KIND], name: Annotated[Key, _NAME], limit: Limit) -> dict[str, Any]:
    """Let no more tasks than `max_running` be in flight at once, or start no more often than `rate`; replaces the limit before."""
    return _set(request, kind, name, limit)


@router.delete("/rules/{kind}/{name:path}", response_model=RuleInfo, responses=_CHANGE, summary="Lift a limit")
def lift_one(request: Request, kind: Annotated[Kind, _KIND], name: Annotated[Key, _NAME]) -> dict[str, Any]:
    """Take the limit off; a pause stays."""
    return _told(_rules(request).lift_limit(kind, name))


@router.post("/pause", response_model=RuleInfo, responses=_CHANGE, summary="Pause the whole tower")
def pause_tower(request: Request, by: By = None, reason: Reason = None) -> dict[str, Any]:
    """Start nothing until it is resumed; tasks are accepted and wait, and those that run go on."""
    return _told(_rules(request).pause(TOWER, "", actor_of(request, by), reason))


@router.post("/resume", response_model=RuleInfo, responses=_CHANGE, summary="Resume the whole tower")
def resume_tower(request: Request, by: By = None) -> dict[str, Any]:
    """Start tasks again; what is paused by itself stays so."""
    return _told(_rules(request).resume(TOWER, "", actor_of(request, by)))


@router.post("/queues/{name}/pause", response_model=RuleInfo, responses=_CHANGE, summary="Pause a queue")
def pause_queue(request: Request, name: Annotated[Key, _NAME], by: By = None, reason: Reason = None) -> dict[str, Any]:
    """Start nothing of the queue until it is resumed; those of its tasks that run go on."""
    return _told(_rules(request).pause(QUEUE, name, actor_of(request, by), reason))


@router.post("/queues/{name}/resume", response_model=RuleInfo, responses=_CHANGE, summary="Resume a queue")
def resume_queue(request: Request, name: Annotated[Key, _NAME], by: By = None) -> dict[str, Any]:
    """Start tasks of the queue again."""
    return _told(_rules(request).resume(QUEUE, name, actor_of(request, by)))


@router.post("/types/{name}/pause", response_model=RuleInfo, responses=_CHANGE, summary="Pause a type")
def pause_type(request: Request, name: Annotated[Key, _NAME], by: By = None, reason: Reason = None) -> dict[str, Any]:
    """Start nothing of the type until it is resumed; those of its tasks that run go on."""
    return _told(_rules(request).pause(TYPE, name, actor_of(request, by), reason))


@router.post("/types/{name}/resume", response_model=RuleInfo, responses=_CHANGE, summary="Resume a type")
def resume_type(request: Request, name: Annotated[Key, _NAME], by: By = None) -> dict[str, Any]:
    """Start tasks of the type again."""
    return _told(_rules(request).resume(TYPE, name, actor_of(request, by)))


@router.post("/keys/{name:path}/pause", response_model=RuleInfo, responses=_CHANGE, summary="Pause a concurrency key")
def pause_key(request: Request, name: Annotated[Key, _NAME], by: By = None, reason: Reason = None) -> dict[str, Any]:
    """Start nothing with this concurrency key until it is resumed; those of its tasks that run go on."""
    return _told(_rules(request).pause(KEY, name, actor_of(request, by), reason))


@router.post("/keys/{name:path}/resume", response_model=RuleInfo, responses=_CHANGE, summary="Resume a concurrency key")
def resume_key(request: Request, name: Annotated[Key, _NAME], by: By = None) -> dict[str, Any]:
    """Start tasks with this concurrency key again."""
    return _told(_rules(request).resume(KEY, name, actor_of(request, by)))

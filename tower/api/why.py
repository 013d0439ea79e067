"""GET /tasks/{task_id}/why: what a task waits for, and when it will start."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from tower import db
from tower.api.answers import WaitReason
from tower.api.errors import problems
from tower.api.strict import StrictRoute
from tower.api.tasks import TaskId
from tower.spec import Status
from tower.trace import rfc3339
from tower.why import why

router = APIRouter(prefix="/tasks", tags=["tasks"], route_class=StrictRoute)

_ID = "0192f0c1-2345-7abc-8def-0123456789ab"
_HELD = f"key repo:acme/api held by {_ID}, running 42 s"


class Link(BaseModel):
    """One thing that the task waits for."""

    reason: str = Field(
        description="A wait reason, `ahead`, `next`, `expires`, or the status of a task that does not wait.", examples=["concurrency_key"]
    )
    message: str = Field(examples=[_HELD])
    frees: str = Field(description="What would free it.", examples=["when it ends; tasks of type command usually take 60 s"])
    task_id: str | None = Field(description="The task that holds it up.", examples=[_ID])


class Estimate(BaseModel):
    """What the estimated start is built on."""

    basis: Literal["simulation", "throughput", "unknown"] = Field(examples=["simulation"])
    message: str = Field(
        description="How it was found, or why it cannot be known.",
        examples=["8 running and 3 ahead of it, each taken to last as long as its type usually does"],
    )
    ahead: int = Field(description="Tasks that are before it, on all queues.", examples=[3])
    typical_s: dict[str, float] = Field(description="How long tasks usually run, by type.", examples=[{"command": 60}])


class Why(BaseModel):
    """Why a task has not started, in order of what must happen first."""

    task_id: str = Field(examples=[_ID])
    status: Status = Field(examples=["queued"])
    reason: WaitReason | None = Field(description="The same as `wait_reason` of the task.", examples=["concurrency_key"])
    summary: str = Field(examples=[f"{_HELD}; then 3 ahead of it in queue default"])
    chain: list[Link]
    estimated_start_at: str | None = Field(
        description="Null when it cannot be known, or does not wait.", examples=["2031-05-01T08:00:00.000Z"]
    )
    estimate: Estimate | None = Field(description="Null when it does not wait.", examples=[None])


@router.get("/{task_id}/why", response_model=Why, responses=problems(404, 422, 503), summary="Why a task waits, and until when")
def explain(request: Request, task_id: TaskId) -> dict[str, Any]:
    """Tell what a task waits for by the decision that starts tasks, who holds that, how many are ahead, and when it will start."""
    told = db.read(lambda: why(task_id, request.app.state.settings.lease_s))
    at = told["estimate"]["at"] if told["estimate"] else None
    return {**told, "estimated_start_at": rfc3339(at)}

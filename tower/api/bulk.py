"""/tasks/cancel and /tasks/retry: whatever fits a filter, at once."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request

from tower.api.access import actor_of
from tower.api.answers import Changed
from tower.api.errors import problems
from tower.api.strict import StrictRoute
from tower.api.tasks import labels, orchestrator_of, seconds, within
from tower.bulk import Done
from tower.queries import Filter
from tower.spec import BulkRequest, TaskFilter

router = APIRouter(prefix="/tasks", tags=["tasks"], route_class=StrictRoute)

_TREE = {"summary": "A whole tree", "value": {"filter": {"correlation_id": "0192f0c1-2345-7abc-8def-0123456789ab"}}}
_LOST = {"summary": "How many would it be?", "value": {"filter": {"error_code": ["worker_lost"]}, "dry_run": True}}
_TEAM = {"summary": "All of a team", "value": {"filter": {"status": ["failed", "timed_out"], "label": ["team:platform"]}, "by": "alice"}}


@router.post(
    "/cancel", response_model=Changed, responses=problems(400, 403, 413, 415, 422, 503), summary="Cancel every task that fits a filter"
)
def cancel_all(request: Request, asked: Annotated[BulkRequest, Body(openapi_examples={"tree": _TREE, "dry_run": _LOST})]) -> dict[str, Any]:
    """End what waits at once and ask what runs to stop. With a correlation_id the whole tree ends: it takes no new children meanwhile."""
    by = actor_of(request, asked.by)
    return _told(request, orchestrator_of(request).cancel_all(_chosen(request, asked.filter), by, dry_run=asked.dry_run))


@router.post(
    "/retry", response_model=Changed, responses=problems(400, 403, 413, 415, 422, 503), summary="Retry every task that fits a filter"
)
def retry_all(request: Request, asked: Annotated[BulkRequest, Body(openapi_examples={"team": _TEAM, "dry_run": _LOST})]) -> dict[str, Any]:
    """Enqueue again what failed, timed out or was cancelled, and has not been retried yet: asking twice makes nothing twice."""
    by = actor_of(request, asked.by)
    return _told(request, orchestrator_of(request).retry_all(_chosen(request, asked.filter), by, dry_run=asked.dry_run))


def _chosen(request: Request, asked: TaskFilter) -> Filter:
    return within(
        request,
        statuses=asked.status,
        types=asked.type,
        labels=labels(asked.label),
        text=asked.text or None,
        error_codes=asked.error_code,
        correlation_id=asked.correlation_id,
        created_after=seconds(asked.created_after),
        created_before=seconds(asked.created_before),
        retried=asked.retried,
    )


def _told(request: Request, done: Done) -> dict[str, Any]:
    """Return the answer, and leave for the record how many were changed; a trial changes none and is not recorded."""
    request.state.recorded = None if done.dry_run else f"{done.changed} of {done.matched} tasks"
    return asdict(done)

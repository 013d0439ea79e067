"""GET /health and /health/ready."""

from typing import Any

from fastapi import APIRouter, Request, Response

from tower.api.answers import Health, Readiness
from tower.api.errors import problems

router = APIRouter(tags=["health"])  # a probe may add whatever it likes to the query


@router.get("/health", response_model=Health, responses=problems(is_public=True), summary="Does the process live?")
async def health() -> dict[str, str]:
    """Answer as long as the server process lives, whatever else is down."""
    return {"status": "ok"}


@router.get(
    "/health/ready",
    response_model=Readiness,
    responses={**problems(is_public=True), 503: {"model": Readiness, "description": "Tasks cannot be accepted."}},
    summary="Can tasks be accepted, and will they run?",
)
def ready(request: Request, response: Response) -> dict[str, Any]:
    """Tell what accepts and runs tasks right now; 503 when tasks cannot be accepted."""
    told: dict[str, Any] = request.app.state.orchestrator.readiness()
    if told["status"] == "unavailable":
        response.status_code = 503
        response.headers["retry-after"] = "2"
    return told

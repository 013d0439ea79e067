"""GET /handlers, /workers and /queues: what can run, where, and how much of it waits."""

from typing import Any

from fastapi import APIRouter, Request

from tower import db, load, queries
from tower.api.answers import Handlers, Queues, Workers
from tower.api.errors import problems
from tower.api.strict import StrictRoute
from tower.decision import QUEUE, TOWER
from tower.handler import Registry
from tower.trace import rfc3339

router = APIRouter(tags=["fleet"], route_class=StrictRoute)


@router.get("/handlers", response_model=Handlers, responses=problems(422), summary="The task types, their schemas and defaults")
def handlers(request: Request) -> dict[str, Any]:
    """List every type that can be enqueued."""
    registry: Registry = request.app.state.registry
    return {
        "handlers": [
            {
                "type": kind.name,
                "summary": kind.summary,
                "queue": kind.queue,
                "timeout_s": kind.timeout_s,
                "max_attempts": kind.max_attempts,
                "payload_schema": kind.payload.model_json_schema(),
            }
            for kind in registry
        ]
    }


@router.get("/workers", response_model=Workers, responses=problems(422, 503), summary="The live workers")
def workers(request: Request) -> dict[str, Any]:
    """List the workers that renewed their row within a lease, and how many tasks each runs."""
    rows, running = db.read(lambda: (queries.live_workers(request.app.state.settings.lease_s), queries.running_counts()))
    return {"workers": [_worker(row, running.get(row["id"], 0)) for row in rows]}


def _worker(row: dict[str, Any], running: int) -> dict[str, Any]:
    return {**row, "running": running, "started_at": rfc3339(row["started_at"]), "beat_at": rfc3339(row["beat_at"])}


@router.get("/queues", response_model=Queues, responses=problems(422, 503), summary="The queues and what is in them")
def queue_list(request: Request) -> dict[str, Any]:
    """List every queue of a known type or a waiting task, with the workers that serve it."""
    registry: Registry = request.app.state.registry
    lease_s: float = request.app.state.settings.lease_s
    counts, live, paused = db.read(lambda: (queries.queues(), queries.live_workers(lease_s), load.paused()))
    return {
        "queues": [
            {
                "name": name,
                "types": [kind.name for kind in registry if kind.queue == name],
                "queued": 0,
                "dispatched": 0,
                "running": 0,
                **counts.get(name, {}),
                "paused": bool({(TOWER, ""), (QUEUE, name)} & paused),
                "workers": sum(name in worker["queues"] for worker in live),
                "slots": sum(worker["slots"] for worker in live if name in worker["queues"]),
            }
            for name in sorted({*registry.queues, *counts})
        ]
    }

"""/tasks/{id}/log and /tasks/{id}/files: the trace, read back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from tower import db, queries, trace
from tower.api.answers import Files
from tower.api.errors import problems
from tower.api.files import MEDIA_TYPES, beginning, send_file, send_pieces
from tower.api.follow import Watch
from tower.api.strict import StrictRoute
from tower.api.tasks import TaskId
from tower.errors import NotFound, Unavailable
from tower.trace import LOG

router = APIRouter(prefix="/tasks", tags=["traces"], route_class=StrictRoute)

_PAUSE_S = 0.5
_KEEP_ALIVE_S = 15.0
_BATCH = 16

Range = Annotated[
    str | None,
    Header(
        alias="Range", description="One range of bytes, for a part of it; several are answered with the whole.", examples=["bytes=0-1023"]
    ),
]

_LOG_EXAMPLE = "2031-05-01T08:00:00.000Z [0] ── queued\n2031-05-01T08:00:00.012Z [1] echo\n"
_TEXT = {"text/plain": {"schema": {"type": "string"}, "example": _LOG_EXAMPLE}}
_STREAM = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "One server-sent event: some lines of the log, or its end.",
            "properties": {"event": {"enum": ["log", "end"]}, "data": {"type": "string"}, "id": {"type": "string"}},
            "required": ["event", "data"],
            "example": {"event": "log", "data": "2031-05-01T08:00:00.012Z [1] echo", "id": "3"},
        }
    }
}
#: Bytes, whatever the type; a JSON file has no schema, because a part of one is no JSON.
_BINARY = {
    kind: {"example": "…"} | ({} if kind == "application/json" else {"schema": {"type": "string", "format": "binary"}})
    for kind in MEDIA_TYPES
}
_PART = "The bytes that the Range header asked for."


@router.get(
    "/{task_id}/log",
    response_class=Response,
    responses={
        200: {"description": "The log, or a stream of it.", "content": _TEXT | _STREAM},
        206: {"description": _PART, "content": _TEXT},
        **problems(404, 416, 422, 503),
    },
    summary="Read or follow a task's log",
)
async def log(
    request: Request,
    task_id: TaskId,
    follow: Annotated[bool, Query(description="Stream as server-sent events until the task's end.")] = False,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=2**31 - 1, description="Go on after this event of an earlier stream.", examples=[3])
    ] = None,
    range_: Range = None,
) -> Response:
    """Return the log as it is now, or a byte range of what is traced; or stream it live, each `log` event some lines, `end` the last."""
    if not follow:
        return await run_in_threadpool(_whole_log, request, task_id)
    status, seq = await run_in_threadpool(lambda: db.read(lambda: queries.progress(task_id)))
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    lines = _follow(request.app.state.watch, task_id, status, seq, last_event_id or 0)
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


def _whole_log(request: Request, task_id: str) -> Response:
    seq, traced, size = db.read(lambda: queries.log_extent(task_id))
    task = {"id": task_id, "seq": seq}
    try:
        path = trace.find_file(request.app.state.settings.trace_dir, task_id, LOG)
        if traced >= seq or "range" in request.headers:
            return send_file(request, path)
        told = beginning(path, size)  # the folder lags behind: what it lacks is in the rows
    except NotFound:  # not traced yet, or on a disk that this server does not see: the rows say the same
        told = None
    return send_pieces(trace.log_pieces(task, 0) if told is None else chain(told, trace.log_pieces(task, traced)), LOG)


def _entries(task_id: str, seq: int, after: int) -> list[dict[str, Any]]:
    """Return some log entries up to what the row knew: of those that come meanwhile, a later one may show before an earlier."""
    return [entry for entry in queries.log_entries(task_id, after, _BATCH) if entry["seq"] <= seq] if after < seq else []


async def _follow(watch: Watch, task_id: str, status: str, seq: int, after: int) -> AsyncIterator[bytes]:
    with watch.on(task_id, status, seq) as task:
        while not task.is_gone:
            entries: list[dict[str, Any]] = []
            if task.seq > after:
                with suppress(Unavailable):  # the stream outlives the database's absence
                    entries = await task.entries(after, partial(run_in_threadpool, db.read, partial(_entries, task_id, task.seq, after)))
            for entry in entries:
                after = entry["seq"]
                yield format_sse_event(data_str=trace.render_log([entry]).rstrip("\n"), event="log", id=str(after))
            if task.is_final and task.seq <= after:
                yield format_sse_event(data_str=json.dumps({"status": task.status}), event="end")
                return
            if task.seq > after and not entries:
                await asyncio.sleep(_PAUSE_S)  # the database is away
            elif not await task.wait(after, _KEEP_ALIVE_S):
                yield format_sse_event(comment="still there")


@router.get("/{task_id}/files", response_model=Files, responses=problems(404, 422, 503), summary="List the files of a task's trace")
def files(request: Request, task_id: TaskId) -> dict[str, Any]:
    """List what is in the task's folder; empty until something was traced."""
    db.read(lambda: queries.progress(task_id))
    return {"files": trace.list_files(request.app.state.settings.trace_dir, task_id)}


@router.get(
    "/{task_id}/files/{path:path}",
    response_class=Response,
    responses={
        200: {"description": "The file.", "content": _BINARY},
        206: {"description": _PART, "content": _BINARY},
        **problems(404, 416, 422, 503),
    },
    summary="Read a file of a task's trace",
)
def file(
    request: Request,
    task_id: TaskId,
    path: Annotated[str, Path(description="Its path in the folder.", examples=["output.json"])],
    range_: Range = None,
) -> Response:
    """Return one file, whole or by byte range; what a browser could run is sent as a download."""
    db.read(lambda: queries.progress(task_id))
    return send_file(request, trace.find_file(request.app.state.settings.trace_dir, task_id, path))

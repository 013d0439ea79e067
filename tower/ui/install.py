"""The routes of the pages, and the files that they load."""

import mimetypes
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from tower import db, queries
from tower.errors import NotFound, TowerError
from tower.overview import Pace
from tower.ui import acts, bundle, facts, preview, task
from tower.ui.forms import form, local
from tower.ui.live import Live
from tower.ui.logpage import LOG, lines
from tower.ui.new import NEW, make
from tower.ui.page import THEME, THEMES, Page, Visit, refusal
from tower.ui.words import templates

router = APIRouter(include_in_schema=False)

_YEAR_S = 365 * 86_400
_SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")

_PAGES = {
    "/": Page("tower.html", facts.tower),
    "/ui/tasks": Page("tasks.html", facts.tasks, facts.ASKS),
    "/ui/tasks/{task_id}": Page("task.html", task.task),
    "/ui/tasks/{task_id}/log": LOG,
    "/ui/tasks/{task_id}/files/{path:path}": Page("file.html", preview.file),
    "/ui/new": NEW,
    "/ui/handlers": Page("handlers.html", facts.handlers),
    "/ui/fleet": Page("fleet.html", facts.fleet),
    "/ui/settings": Page("settings.html", facts.settings),
    "/ui/keys": acts.KEYS,
    "/ui/audit": Page("audit.html", facts.record),
    "/docs": Page("docs.html", lambda visit: {"title": "API"}),
}
_FORMS = {
    "/ui/tasks/{task_id}/cancel": acts.cancel,
    "/ui/tasks/{task_id}/retry": acts.retry,
    "/ui/many": acts.change_many,
    "/ui/new": make,
    "/ui/pauses": acts.pause,
    "/ui/limits": acts.limit,
    "/ui/keys": acts.make_key,
    "/ui/keys/{key_id}/revoke": acts.revoke_key,
    "/ui/views": acts.save_view,
}


def install(app: FastAPI) -> APIRouter:
    """Add the pages to the app, and return their routes."""
    app.state.live, app.state.pace = Live(), Pace()
    app.include_router(router)
    return router


async def as_page(request: Request, error: TowerError) -> Response:
    """Answer with a page that tells what is wrong."""
    return await refusal(Visit.of(request), error)


def _endpoint(page: Page) -> Any:
    async def show(request: Request) -> Response:
        return await page(request)

    return show


for _path, _page in _PAGES.items():
    router.add_api_route(_path, _endpoint(_page))
for _path, _act in _FORMS.items():
    router.add_api_route(_path, form(_act), methods=["POST"])


@router.get("/ui/find")
async def find(request: Request) -> Response:
    """Answer with the tasks that the palette offers."""
    return JSONResponse(await run_in_threadpool(facts.find, Visit.of(request)))


@router.get("/ui/tasks/{task_id}/lines")
async def log_lines(request: Request) -> Response:
    """Answer with some lines of a log as a piece of a page."""
    return await lines(Visit.of(request))


@router.get("/ui/tasks/{task_id}/trace.tar")
async def trace_tar(request: Request) -> Response:
    """Answer with the folder of a task as one file."""
    visit = Visit.of(request)
    task_id = visit.values["task_id"]
    try:
        await run_in_threadpool(db.read, lambda: queries.progress(task_id))
    except TowerError as error:
        return await refusal(visit, error)
    headers = {"content-disposition": f'attachment; filename="{task_id}.tar"'}
    return StreamingResponse(bundle.tar(visit.settings.trace_dir, task_id), media_type="application/x-tar", headers=headers)


@router.post("/ui/theme")
async def theme(request: Request) -> Response:
    """Remember in the browser whether the pages are light or dark."""
    sent = parse_qs((await request.body())[:2000].decode("utf-8", "replace"))
    chosen = sent.get("theme", [""])[-1]
    answer = RedirectResponse(local(sent.get("next", ["/"])[-1], "/"), 303)
    answer.set_cookie(THEME, chosen if chosen in THEMES else "system", max_age=_YEAR_S, path="/", httponly=True, samesite="strict")
    return answer


@router.get("/ui/static/{name}")
async def static(request: Request, name: str) -> Response:
    """Answer with a file that the pages load: for good under an address that changes with it, else as long as it stays the same."""
    content = _static().get(name)
    if content is None:
        raise NotFound(f"There is no file {name[:100]!r} here.", code="not_found")
    digest = _digest(name)
    is_kept = request.url.query == digest
    headers = {"etag": f'"{digest}"', "cache-control": f"public, max-age={_YEAR_S}, immutable" if is_kept else "no-cache"}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    kind = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0]
    return Response(content, media_type=kind or "application/octet-stream", headers=headers)


@cache
def _static() -> dict[str, bytes]:
    """Return the content of every file: our own, and Swagger UI from the package that brings it."""
    brought = files("fastapi_swagger.resources")
    found = [*(files("tower.ui") / "static").iterdir(), *(brought / name for name in _SWAGGER)]
    return {file.name: file.read_bytes() for file in found if file.is_file()}


@cache
def _digest(name: str) -> str:
    return sha256(_static()[name]).hexdigest()[:12]


def _asset(name: str) -> str:
    """Return the address of a file that a page loads."""
    return f"/ui/static/{name}?{_digest(name)}"


templates.globals["asset"] = _asset

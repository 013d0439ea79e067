"""/dashboard: dramatiq-dashboard behind a guard of our own, or a word on why it is not there."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

import dramatiq
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tower.api.errors import problem
from tower.settings import Settings

PATH = "/dashboard"

_COOKIE = re.compile(r"(?:^|;)\s*__dd_csrf=([^;]*)")
_TOKEN = re.compile(r"^[0-9a-f]{64}$")
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'"
    ),
    "cache-control": "no-store",
}

_log = logging.getLogger(__name__)


def mount(app: FastAPI, settings: Settings, broker: dramatiq.Broker) -> None:
    """Put the dashboard of dramatiq at /dashboard if Redis is the broker and the package is there."""
    if settings.embedded:
        _explain(
            app, "There is no message broker to look into: this tower is embedded. Set REDIS_URL to get one; GET /queues shows the tasks."
        )
        return
    try:
        from a2wsgi import WSGIMiddleware
        from dramatiq_dashboard import DashboardApp
    except ImportError as error:
        _explain(app, f"The dashboard is not installed ({error.name}); pip install --no-deps -r requirements-dashboard.txt.")
        return
    app.mount(PATH, _DashboardGuard(WSGIMiddleware(_errors_as_400(DashboardApp(broker=broker, prefix=PATH)))))  # type: ignore[arg-type]


def _explain(app: FastAPI, why: str) -> None:
    async def absent(request: Request) -> Response:
        return problem(404, "no_dashboard", why)

    for path in (PATH, PATH + "/{path:path}"):
        app.add_api_route(path, absent, include_in_schema=False)


class _DashboardGuard:
    """Keeps a cookie that is not the dashboard's own out of its pages, and its pages out of frames.

    The app's guard before it has refused foreign hosts and origins already.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what must be refused; pass the rest on."""
        headers = Headers(scope=scope)
        cookies = _COOKIE.findall(headers.get("cookie", ""))
        if any(not _TOKEN.match(cookie) for cookie in cookies) or len(cookies) > 1:
            await problem(400, "bad_cookie", "The cookie __dd_csrf is not one that the dashboard set; remove it.")(scope, receive, send)
            return
        if scope["method"] == "POST" and headers.get("sec-fetch-site") is None and headers.get("origin") is None:
            await problem(403, "foreign_origin", "The dashboard's buttons work from its own pages only.")(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    answered[name] = value
            await send(message)

        await self._app(scope, receive, send_guarded)


def _errors_as_400(app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """Answer what the dashboard cannot handle as the caller's mistake: its own errors all come from bad queries and forms."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            parse_qs(environ.get("QUERY_STRING", ""), strict_parsing=bool(environ.get("QUERY_STRING")))
            return app(environ, start_response)
        except Exception as error:
            _log.debug("the dashboard could not answer: %s", error)
            start_response("400 Bad Request", [("content-type", "text/plain; charset=utf-8")])
            return [b"The dashboard cannot answer this request; go back to its first page.\n"]

    return guarded

"""/dashboard: dramatiq-dashboard behind a guard of our own, or a word on why it is not there."""

import importlib.util
import logging
import re

import dramatiq
import redis
from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tower.api.errors import problem
from tower.settings import Settings

PATH = "/dashboard"

_PACKAGES = ("a2wsgi", "dramatiq_dashboard")
_COOKIE = "__dd_csrf"
_TOKEN = re.compile(r"[0-9a-f]{64}")
_METHODS = ("GET", "POST")
#: Its style sheet stands in the page; it has no scripts.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"

_log = logging.getLogger(__name__)


def exists(settings: Settings) -> bool:
    """Say whether a tower with these settings has the dashboard."""
    return not settings.embedded and all(importlib.util.find_spec(name) for name in _PACKAGES)


def mount(app: FastAPI, settings: Settings, broker: dramatiq.Broker) -> None:
    """Put the dashboard of dramatiq at /dashboard if Redis is the broker and the package is there."""
    if settings.embedded:
        _explain(
            app, "There is no message broker to look into: this tower is embedded. Set REDIS_URL to get one; GET /queues shows the tasks."
        )
        return
    if not exists(settings):
        _explain(app, "The dashboard is not installed; pip install --no-deps -r requirements-dashboard.txt.")
        return
    from a2wsgi import WSGIMiddleware
    from dramatiq_dashboard import DashboardApp

    app.add_api_route(PATH, _first_page, include_in_schema=False)
    app.mount(PATH, _DashboardGuard(WSGIMiddleware(DashboardApp(broker=broker, prefix=PATH))))  # type: ignore[arg-type]


def _explain(app: FastAPI, why: str) -> None:
    async def absent(request: Request) -> Response:
        return problem(404, "no_dashboard", why)

    for path in (PATH, PATH + "/{path:path}"):
        app.add_api_route(path, absent, include_in_schema=False)


async def _first_page() -> RedirectResponse:
    return RedirectResponse(PATH + "/")


class _DashboardGuard:
    """Gives the dashboard only requests it can stand, and answers for it where it cannot.

    The app's guard before it has refused foreign hosts and origins already.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what must be refused; pass the rest on."""
        headers = Headers(scope=scope)
        tokens = _tokens(headers)
        refusal = _refuse(scope["method"], headers, tokens)
        if refusal:
            await refusal(scope, receive, send)
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _dress(MutableHeaders(scope=message))
            await send(message)

        try:
            await self._app({**scope, "headers": _plain(headers, tokens)}, receive, send_guarded)
        except HTTPException:
            raise
        except Exception as error:
            if started:
                raise
            await _sorry(error)(scope, receive, send)


def _tokens(headers: Headers) -> list[str]:
    """Return every value of the dashboard's cookie."""
    pairs = [pair.strip().partition("=") for cookies in headers.getlist("cookie") for pair in cookies.split(";")]
    return [value for name, _, value in pairs if name.strip() == _COOKIE]


def _refuse(method: str, headers: Headers, tokens: list[str]) -> Response | None:
    if method not in _METHODS:
        allow = ", ".join(_METHODS)
        return problem(405, "method_not_allowed", "The dashboard takes GET and POST.", headers={"allow": allow})
    if len(tokens) > 1 or not all(map(_TOKEN.fullmatch, tokens)):
        return problem(400, "bad_cookie", f"The cookie {_COOKIE} is not one that the dashboard set; remove it.")
    if method == "POST" and "sec-fetch-site" not in headers and "origin" not in headers:
        return problem(403, "foreign_origin", "The dashboard's buttons work from its own pages only.")
    return None


def _plain(headers: Headers, tokens: list[str]) -> list[tuple[bytes, bytes]]:
    """Return the headers the dashboard needs: it finds its cookie in others too, and writes it into the page as it is."""
    kept = [(name, value) for name, value in headers.raw if name in (b"content-length", b"content-type")]
    return kept + [(b"cookie", f"{_COOKIE}={token}".encode()) for token in tokens]


def _dress(headers: MutableHeaders) -> None:
    headers["content-security-policy"] = _POLICY
    cookie = headers.get("set-cookie")
    if cookie:
        headers["set-cookie"] = f"{cookie}; SameSite=Strict"


def _sorry(error: Exception) -> Response:
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError)):
        return problem(503, "broker_unavailable", f"Redis does not answer: {error}", headers={"retry-after": "2"})
    # Its own errors all come from queries and forms that it did not make.
    _log.debug("the dashboard could not answer", exc_info=error)
    return problem(400, "bad_request", "The dashboard cannot answer this request; go back to its first page.")

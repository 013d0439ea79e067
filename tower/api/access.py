"""Who asks, and whether that may be: every route has a rule, and a request without a fitting key goes no further."""

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tower import audit, db, keys, queries
from tower.api.errors import answer_to, nothing_at, problem
from tower.api.session import COOKIE, Sessions
from tower.errors import InvalidTask, Refused, TowerError, Unavailable
from tower.keys import ANONYMOUS, BOOTSTRAP, Caller
from tower.settings import LOOPBACK, Settings
from tower.terms import ADMIN, OPERATOR, VIEWER

PUBLIC = "public"
LOGIN, LOGOUT = "/login", "/logout"

#: What each route takes. A route that is not here is refused to everybody, and the app does not start with it.
RULES: dict[str, dict[str, str]] = {
    "/health": {"GET": PUBLIC},
    "/health/ready": {"GET": PUBLIC},
    LOGIN: {"GET": PUBLIC, "POST": PUBLIC},
    LOGOUT: {"POST": PUBLIC},
    "/": {"GET": VIEWER},
    "/docs": {"GET": VIEWER},
    "/openapi.json": {"GET": VIEWER, "HEAD": VIEWER},
    "/me": {"GET": VIEWER},
    "/tasks": {"GET": VIEWER},
    "/tasks/enqueue": {"POST": OPERATOR},
    "/tasks/enqueue/batch": {"POST": OPERATOR},
    "/tasks/cancel": {"POST": OPERATOR},
    "/tasks/retry": {"POST": OPERATOR},
    "/tasks/{task_id}": {"GET": VIEWER},
    "/tasks/{task_id}/events": {"GET": VIEWER},
    "/tasks/{task_id}/log": {"GET": VIEWER},
    "/tasks/{task_id}/files": {"GET": VIEWER},
    "/tasks/{task_id}/files/{path:path}": {"GET": VIEWER},
    "/tasks/{task_id}/why": {"GET": VIEWER},
    "/tasks/{task_id}/cancel": {"POST": OPERATOR},
    "/tasks/{task_id}/retry": {"POST": OPERATOR},
    "/handlers": {"GET": VIEWER},
    "/workers": {"GET": VIEWER},
    "/queues": {"GET": VIEWER},
    "/rules": {"GET": VIEWER},
    "/rules/tower": {"PUT": ADMIN, "DELETE": ADMIN},
    "/rules/{kind}/{name:path}": {"PUT": ADMIN, "DELETE": ADMIN},
    **{f"/{act}": {"POST": OPERATOR} for act in ("pause", "resume")},
    **{f"/queues/{{name}}/{act}": {"POST": OPERATOR} for act in ("pause", "resume")},
    **{f"/types/{{name}}/{act}": {"POST": OPERATOR} for act in ("pause", "resume")},
    **{f"/keys/{{name:path}}/{act}": {"POST": OPERATOR} for act in ("pause", "resume")},
    "/access/keys": {"GET": ADMIN, "POST": ADMIN},
    "/access/keys/{key_id}": {"DELETE": ADMIN},
    "/access/audit": {"GET": ADMIN},
    "/ui/find": {"GET": VIEWER},
    "/ui/tasks": {"GET": VIEWER},
    "/ui/tasks/{task_id}": {"GET": VIEWER},
    "/ui/tasks/{task_id}/log": {"GET": VIEWER},
    "/ui/tasks/{task_id}/lines": {"GET": VIEWER},
    "/ui/tasks/{task_id}/trace.tar": {"GET": VIEWER},
    "/ui/tasks/{task_id}/files/{path:path}": {"GET": VIEWER},
    "/ui/tasks/{task_id}/cancel": {"POST": OPERATOR},
    "/ui/tasks/{task_id}/retry": {"POST": OPERATOR},
    "/ui/many": {"POST": OPERATOR},
    "/ui/new": {"GET": OPERATOR, "POST": OPERATOR},
    "/ui/handlers": {"GET": VIEWER},
    "/ui/fleet": {"GET": VIEWER},
    "/ui/pauses": {"POST": OPERATOR},
    "/ui/limits": {"POST": ADMIN},
    "/ui/settings": {"GET": ADMIN},
    "/ui/keys": {"GET": ADMIN, "POST": ADMIN},
    "/ui/keys/{key_id}/revoke": {"POST": ADMIN},
    "/ui/audit": {"GET": ADMIN},
    "/ui/views": {"POST": VIEWER},
    "/ui/theme": {"POST": PUBLIC},
    "/ui/static/{name}": {"GET": PUBLIC},
    "/dashboard": {"GET": ADMIN},
    "/dashboard/{path:path}": {"GET": ADMIN, "POST": ADMIN},
}
#: What a key that is limited to some tasks may do beside looking: what looks after the limits itself.
_KNOWS_LIMITS = (
    *("/tasks", "/tasks/enqueue", "/tasks/enqueue/batch", "/tasks/cancel", "/tasks/retry"),
    *("/ui/new", "/ui/many", "/ui/views"),
)
#: What the record need not tell, because the task's row does.
_TOLD_ELSEWHERE = ("/tasks/enqueue", "/tasks/enqueue/batch", LOGIN, LOGOUT)
#: Forms of pages, which carry the token of their session as a field, look at it themselves, and say more for the record.
_FORMS = ("/ui/", "/dashboard/")
_CHANGES = ("POST", "PUT", "PATCH", "DELETE")

#: Wrong keys that an address may try within so many seconds.
_TRIES, _WINDOW_S = 10, 60.0
_ADDRESSES = 1000
_PATIENCE_S = 2.0

_log = logging.getLogger(__name__)


def caller_of(request: Request) -> Caller:
    """Return who asks."""
    found: Caller = request.state.caller
    return found


def actor_of(request: Request, claimed: str | None) -> str | None:
    """Return who does it, for the record: whose key was shown, else who the request says."""
    return caller_of(request).actor or claimed


def check_rules(routes: Iterable[BaseRoute]) -> None:
    """Raise RuntimeError if a route has no rule."""
    for route in routes:
        path, methods = _called(route)
        missing = [method for method in methods if method not in RULES.get(path, {})]
        if missing:
            raise RuntimeError(f"{missing[0]} {path} has no rule in tower.api.access.RULES: who may ask for it?")


def _called(route: BaseRoute) -> tuple[str, Iterable[str]]:
    path, methods = getattr(route, "path", ""), getattr(route, "methods", None)
    return (path, methods) if methods else (f"{path}/{{path:path}}", ("GET", "POST"))  # another application below it


_BEHIND = {"/ui/many": "/ui/tasks", "/ui/views": "/ui/tasks", "/ui/pauses": "/ui/fleet", "/ui/limits": "/ui/fleet", "/ui/theme": "/"}


def behind(method: str, path: str) -> str:
    """Return the address of the page that a form is on: where to go on when it cannot be taken."""
    if method == "GET":
        return path
    if path.startswith("/ui/tasks/"):
        return path.rpartition("/")[0]
    return "/ui/keys" if path.startswith("/ui/keys/") else _BEHIND.get(path, path)


#: What tells somebody before a browser what a program is told as a problem.
AsPage = Callable[[Request, TowerError], Awaitable[Response]]


class Access:
    """Recognises who asks, refuses what may not be, and keeps a record of what was changed.

    What is none of `routes` is nowhere: a route that was added without a rule cannot be reached.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, sessions: Sessions, routes: Sequence[BaseRoute], as_page: AsPage) -> None:
        self._app = app
        self._as_page = as_page
        self._settings = settings
        self._sessions = sessions
        self._routes = routes
        #: When addresses tried a wrong key.
        self._failures: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what must be refused; pass the rest on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, values = self._route(scope)
        scope.setdefault("state", {})["access"] = self
        try:
            caller = await self._admit(scope, path, values)
        except TowerError as error:
            refusal = await self._refusal(scope, path, error)
            await refusal(scope, receive, send)
            return
        if path is None:
            absent = await self._refusal(scope, path, nothing_at(scope["path"]))
            await absent(scope, receive, send)
            return
        if scope["method"] in _CHANGES and path not in _TOLD_ELSEWHERE and not scope["path"].startswith("/ui/"):
            await self._recorded(scope, receive, send, caller)
        else:
            await self._app(scope, receive, send)

    def _route(self, scope: Scope) -> tuple[str | None, dict[str, Any]]:
        """Return the rule's path of the route that will answer, and the values in the address."""
        for route in self._routes:
            match, child = route.matches(scope)
            if match is not Match.NONE:
                return _called(route)[0], child.get("path_params", {})
        return None, {}

    async def _admit(self, scope: Scope, path: str | None, values: dict[str, Any]) -> Caller:
        """Return who asks; raise TowerError if that may not be."""
        rules = RULES.get(path or "", {})
        needed = rules.get(scope["method"], VIEWER)  # what does not exist is told to those who may look
        if needed == PUBLIC:
            return Caller(ANONYMOUS, VIEWER)
        caller = scope["state"]["caller"] = await self._recognise(scope)
        if not caller.may(needed):
            raise Refused(f"This takes the role {needed}, and {caller.name!r} is {caller.role}; use another key.", code="role_required")
        if _is_page(path) and ("\x00" in scope["path"] or b"%00" in scope["query_string"]):
            raise InvalidTask("The address holds the character NUL, which nothing here has in its name; leave it out.", code="bad_request")
        if caller.is_limited:
            await self._check_limits(caller, scope["method"], path, values)
        return caller

    async def _check_limits(self, caller: Caller, method: str, path: str | None, values: dict[str, Any]) -> None:
        task_id = values.get("task_id")
        if task_id is not None:
            await run_in_threadpool(db.read, partial(check_task, caller, task_id), patience_s=_PATIENCE_S)
        elif method in _CHANGES and path not in _KNOWS_LIMITS:
            said = f"The key of {caller.name!r} is limited to some tasks, and this is about all; use another key."
            raise Refused(said, code="key_limited")

    async def _recognise(self, scope: Scope) -> Caller:
        headers = Headers(scope=scope)
        key, cookie = _shown(headers), cookie_parser(headers.get("cookie", "")).get(COOKIE)
        if key is not None:
            return await self.check_key(scope, key)
        if cookie and (key_id := self._sessions.key_of(cookie)):
            if scope["method"] in _CHANGES and not scope["path"].startswith(_FORMS):
                self._check_token(headers, cookie)
            return await run_in_threadpool(self._remembered, key_id)
        role = self.anonymous_role(scope)
        if role is None:
            raise Refused(
                "This tower takes requests with a key only: send Authorization: Bearer KEY, or set TOWER_KEY for the command line.",
                code="key_required",
            )
        return Caller(ANONYMOUS, role)

    def _check_token(self, headers: Headers, cookie: str) -> None:
        if not self._sessions.is_token(cookie, headers.get("x-csrf-token", "")):
            raise Refused("A change from a browser session must carry its token as X-CSRF-Token; GET /me tells it.", code="csrf_token")

    def _remembered(self, key_id: str) -> Caller:
        if key_id == BOOTSTRAP:
            if not self._settings.bootstrap_key:
                raise Refused("The bootstrap key of this session is gone; log in again.", code="invalid_key")
            return Caller(BOOTSTRAP, ADMIN, BOOTSTRAP)
        return db.read(partial(keys.remembered, key_id), patience_s=_PATIENCE_S, sees_arrived=False)

    async def check_key(self, scope: Scope, key: str) -> Caller:
        """Return whose key this is; raise Refused, and soon nothing else, to an address that tries wrong ones."""
        address = _address(scope)
        tries = self._failures.get(address, deque())
        while tries and time.monotonic() - tries[0] > _WINDOW_S:
            tries.popleft()
        if len(tries) >= _TRIES:
            wait = int(_WINDOW_S - (time.monotonic() - tries[0])) + 1
            said = f"{_TRIES} wrong keys came from {address} within a minute; wait {wait} s."
            raise Unavailable(said, code="too_many_tries", retry_after_s=wait)
        bootstrap = self._settings.bootstrap_key
        try:
            secret = bootstrap.get_secret_value() if bootstrap else None
            return await run_in_threadpool(db.read, partial(keys.recognise, key, secret), patience_s=_PATIENCE_S, sees_arrived=False)
        except Refused:
            self._note_failure(address, tries)
            raise

    def _note_failure(self, address: str, tries: deque[float]) -> None:
        if address not in self._failures and len(self._failures) >= _ADDRESSES:
            del self._failures[next(iter(self._failures))]
        tries.append(time.monotonic())
        self._failures[address] = tries
        _log.warning("a key that opens nothing was shown", extra={"fields": {"address": address}})

    def anonymous_role(self, scope: Scope) -> str | None:
        """Return what whoever shows no key may do; None if nothing."""
        if self._settings.anonymous != "loopback":
            return None if self._settings.anonymous == "nobody" else self._settings.anonymous
        is_proxied = "x-forwarded-for" in Headers(scope=scope) or "forwarded" in Headers(scope=scope)
        return ADMIN if self._settings.host in LOOPBACK and _address(scope) in LOOPBACK and not is_proxied else None

    async def _refusal(self, scope: Scope, path: str | None, error: TowerError) -> Response:
        headers = Headers(scope=scope)
        wants_page = (scope["method"] == "GET" or _is_page(path)) and "text/html" in headers.get("accept", "")
        if error.code in ("key_required", "invalid_key", "key_revoked", "key_expired"):
            if wants_page:
                query = scope["query_string"].decode("ascii", "replace") if scope["method"] == "GET" else ""
                place = behind(scope["method"], scope["path"]) + (f"?{query}" if query else "")
                return RedirectResponse(f"{LOGIN}?next={quote(place, safe='/')}", 303)
            return problem(401, error.code, error.message, headers={"www-authenticate": "Bearer"})
        if error.code == "too_many_tries" and isinstance(error, Unavailable):
            return problem(429, error.code, error.message, headers={"retry-after": str(error.retry_after_s)})
        if wants_page and _is_page(path) and "caller" in scope["state"]:
            return await self._as_page(Request(scope), error)
        return answer_to(error)

    async def _recorded(self, scope: Scope, receive: Receive, send: Send, caller: Caller) -> None:
        """Pass a change on, and keep a record of it if it was made."""

        async def send_noted(message: Message) -> None:
            target = scope["state"].get("recorded", "")  # a route says what the address does not, or None if nothing was changed
            if message["type"] == "http.response.start" and message["status"] < 400 and target is not None:
                await self.record(scope, caller, f"{scope['method']} {scope['path']}", target)
            await send(message)

        await self._app(scope, receive, send_noted)

    async def record(self, scope: Scope, caller: Caller, action: str, target: str = "") -> None:
        """Note who did what; a database that is away has it told in the process log only."""
        more = target or scope.get("query_string", b"").decode("utf-8", "replace")[:500]
        try:
            await run_in_threadpool(db.unit, partial(audit.note, caller.name, action, more, _address(scope)), patience_s=_PATIENCE_S)
        except Unavailable:
            _log.warning("who did what could not be recorded", extra={"fields": {"actor": caller.name, "action": action}})


def _is_page(path: str | None) -> bool:
    """Whether a browser asks there; also where nothing is."""
    return path is None or path in ("/", "/docs") or path.startswith("/ui/")


def check_task(caller: Caller, task_id: str) -> None:
    """Raise NotFound for a task that does not exist, or not for whoever asks. Runs inside `db.read`."""
    type_name, labels = queries.kind_and_labels(task_id)
    if not caller.covers(type_name, labels):
        raise queries.not_found(task_id)


def _shown(headers: Headers) -> str | None:
    """Return the key that a request carries."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"

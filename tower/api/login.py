"""/login and /logout: a key, shown once by a person, becomes a session of the browser."""

from base64 import b64encode
from hashlib import sha256
from html import escape
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from tower.api.access import LOGIN, LOGOUT, Access
from tower.api.session import COOKIE, LASTS_S, Sessions
from tower.errors import TowerError, Unavailable

#: What the browser may load for this page: nothing, and it may send its form to this tower alone.
_POLICY = "default-src 'none'; style-src 'sha256-{style}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
_STYLE = """
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
main { max-width: 24rem; margin: 15vh auto; padding: 0 1rem }
label, input, button { display: block; width: 100%; box-sizing: border-box; font: inherit }
input, button { padding: .6rem; margin: .3rem 0 1rem; border: 1px solid GrayText; border-radius: .3rem }
[role=alert] { border-left: .25rem solid #b3261e; padding-left: .75rem }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Log in · DevOps Control Tower</title><style>{style}</style></head>
<body><main><h1>DevOps Control Tower</h1>{said}
<form method="post" action="{login}"><input type="hidden" name="next" value="{next}">
<label for="key">Your key</label>
<input id="key" name="key" type="password" required autocomplete="current-password" spellcheck="false" autofocus>
<button>Log in</button></form></main></body></html>
"""
_NOBODY = "<p>This tower takes whoever has a key. An admin makes one with <code>tower keys create</code>.</p>"
_ANYBODY = "<p>Here nobody needs a key: whoever reaches this address may do what the role {role} may. A key tells who it was.</p>"
_MOST = 10_000


def install(app: FastAPI) -> None:
    """Add the pages to the app."""
    app.add_api_route(LOGIN, _show, include_in_schema=False)
    app.add_api_route(LOGIN, _log_in, methods=["POST"], include_in_schema=False)
    app.add_api_route(LOGOUT, _log_out, methods=["POST"], include_in_schema=False)


async def _show(request: Request) -> Response:
    return _page(request, _local(request.query_params.get("next", "/")))


async def _log_in(request: Request) -> Response:
    form = await _form(request)
    place, key = _local(form.get("next", "/")), form.get("key", "").strip()
    access: Access = request.state.access
    try:
        caller = await access.check_key(request.scope, key)
    except TowerError as error:
        headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, Unavailable) else {}
        status = 503 if error.code == "database_unavailable" else 429 if headers else 401
        return _page(request, place, error.message, status, headers)
    answer = RedirectResponse(place, 303)
    sessions: Sessions = request.app.state.sessions
    secure = request.url.scheme == "https"
    answer.set_cookie(
        COOKIE, sessions.begin(str(caller.key_id)), max_age=LASTS_S, path="/", secure=secure, httponly=True, samesite="strict"
    )
    await access.record(request.scope, caller, "log in", str(caller.key_id))
    return answer


async def _log_out(request: Request) -> Response:
    """End the session of whoever sends the token of its forms."""
    cookie, sessions = request.cookies.get(COOKIE, ""), request.app.state.sessions
    token = (await _form(request)).get("csrf_token", request.headers.get("x-csrf-token", ""))
    answer = RedirectResponse(LOGIN, 303)
    if cookie and sessions.is_token(cookie, token):
        answer.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
    return answer


def _page(request: Request, place: str, alert: str | None = None, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    role = request.state.access.anonymous_role(request.scope)
    said = _ANYBODY.format(role=role) if role else _NOBODY
    if alert:
        said += f'<p role="alert">{escape(alert)}</p>'
    page = _PAGE.format(style=_STYLE, said=said, login=LOGIN, next=escape(place, quote=True))
    return HTMLResponse(page, status, headers={**(headers or {}), "content-security-policy": _POLICY.format(style=_digest())})


def _digest() -> str:
    """Return what the policy knows the style sheet by."""
    return b64encode(sha256(_STYLE.encode()).digest()).decode()


async def _form(request: Request) -> dict[str, Any]:
    """Return the fields of a form; what is no form has none."""
    body = (await request.body())[:_MOST]
    return {name: values[-1] for name, values in parse_qs(body.decode("utf-8", "replace")).items()}


def _local(place: str) -> str:
    """Return an address of this tower; whatever leads elsewhere leads to the first page."""
    return place if place.startswith("/") and not place.startswith(("//", "/\\")) and place.isprintable() else "/"

"""What stands before every route: who may ask (Host, Origin), how a body must be declared and how large it may be, security headers."""

import asyncio
import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tower.api.errors import TOO_LARGE, problem, unexpected
from tower.settings import LOOPBACK

_CHANGES = ("POST", "PUT", "PATCH", "DELETE")
_SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    # Not no-referrer: with that a browser names no origin for the forms of our own pages.
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
STOPPING = "The server is stopping; ask again in a moment, with the same idempotency key if you gave one."
_SOON = {"retry-after": "2"}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class Guard:
    """Refuses requests a browser could be tricked into sending, and bodies that are not plain JSON of a bounded size."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: Iterable[str], max_body: int, forms_below: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = {*LOOPBACK, *(host.strip("[]") for host in allowed_hosts)}
        self._max_body = max_body
        self._forms_below = forms_below

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what must be refused; pass the rest on."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":  # no route speaks it
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, taken = False, 0

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = list(message.get("headers", ()))
                named = {name for name, _ in headers}
                message["headers"] = headers + [header for header in _SECURITY if header[0] not in named]
            await send(message)

        async def receive_limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body:  # a body sent in chunks does not say before how large it is
                raise HTTPException(413)
            return message

        try:
            refusal = self._refuse(scope, Headers(scope=scope))
            await (refusal or self._app)(scope, receive_limited, send_guarded)
        except (Exception, asyncio.CancelledError) as error:
            if started:
                raise
            # Cancelled: the server stops and has waited long enough; whether the request did its work, nobody knows here.
            if isinstance(error, asyncio.CancelledError):
                answer = problem(503, "stopping", STOPPING, headers=_SOON)
            elif isinstance(error, HTTPException) and error.status_code == 413:
                answer = problem(413, "body_too_large", TOO_LARGE)
            else:
                answer = unexpected(scope, error)
            await answer(scope, receive, send_guarded)

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            return problem(421, "unknown_host", f"The request has {len(hosts)} Host headers; send one.")
        if _name(hosts[0]) not in self._hosts:
            # A foreign page whose name was re-bound to this address still sends its own name.
            return problem(421, "unknown_host", f"This tower does not answer for {hosts[0][:100]!r}; add it to TOWER_ALLOWED_HOSTS.")
        if not (_is_text(scope.get("raw_path") or b"") and _is_text(scope.get("query_string", b""))):
            # They would become one and the same character, and name what they do not mean.
            return problem(400, "bad_request", "The address holds bytes that are not UTF-8; encode what it names as UTF-8.")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return problem(400, "bad_request", f"The Content-Length is {length[:100]!r}; send a number.")
        if int(length[:20]) > self._max_body:
            return problem(413, "body_too_large", TOO_LARGE)
        return self._refuse_change(scope, headers, hosts[0]) if scope["method"] in _CHANGES else None

    def _refuse_change(self, scope: Scope, headers: Headers, host: str) -> Response | None:
        sites, origins = headers.getlist("sec-fetch-site"), headers.getlist("origin")
        if any(site not in ("same-origin", "none") for site in sites) or any(origin.partition("://")[2] != host for origin in origins):
            return problem(403, "foreign_origin", "Changes are taken from this tower's own pages and from programs, not from other sites.")
        if any(encoding.lower() != "identity" for encoding in headers.getlist("content-encoding")):
            return problem(415, "unsupported_encoding", "The body is compressed; send it as it is.")
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        types = headers.getlist("content-type")
        if has_body and not scope["path"].startswith(self._forms_below) and not (len(types) == 1 and _is_json(types[0])):
            declared = repr(", ".join(types)[:100]) if types else "nothing"
            return problem(415, "unsupported_media_type", f"The body is declared as {declared}; send application/json in UTF-8.")
        return None


def _is_text(quoted: bytes) -> bool:
    try:
        unquote_to_bytes(quoted).decode()
    except UnicodeDecodeError:
        return False
    return True


def _name(host: str) -> str | None:
    """Return the name in a Host header, without its port; None if it is no host at all."""
    match = _HOST.fullmatch(host)
    return match[1].strip("[]").lower() if match else None


def _is_json(content_type: str) -> bool:
    kind, *options = (part.strip().lower() for part in content_type.split(";"))
    charsets = [option.partition("=")[2].strip(' "') for option in options if option.partition("=")[0].strip() == "charset"]
    return kind == "application/json" and all(charset in ("utf-8", "utf8") for charset in charsets)

"""What stands before every route: who may ask (Host, Origin), how a body must be declared, and security headers."""

from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tower.api.errors import problem
from tower.settings import LOOPBACK

_CHANGES = ("POST", "PUT", "PATCH", "DELETE")
_SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Refuses requests a browser could be tricked into sending, and bodies that are not plain JSON."""

    def __init__(self, app: ASGIApp, *, allowed_hosts: Iterable[str], forms_below: str) -> None:
        self._app = app
        self._hosts = {*LOOPBACK, *allowed_hosts}
        self._forms_below = forms_below

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what must be refused; pass the rest on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refuse(scope, Headers(scope=scope))
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refuse(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            # A foreign page whose name was re-bound to this address still sends its own name.
            return problem(
                421, "unknown_host", f"This tower does not answer for {(hosts or [''])[0][:100]!r}; add it to TOWER_ALLOWED_HOSTS."
            )
        if scope["method"] in _CHANGES:
            return self._refuse_change(scope, headers, hosts[0])
        return None

    def _refuse_change(self, scope: Scope, headers: Headers, host: str) -> ASGIApp | None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") or (origin is not None and origin.partition("://")[2] != host):
            return problem(403, "foreign_origin", "Changes are taken from this tower's own pages and from programs, not from other sites.")
        if headers.get("content-encoding", "identity") != "identity":
            return problem(415, "unsupported_encoding", "The body is compressed; send it as it is.")
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if has_body and not scope["path"].startswith(self._forms_below) and not _is_json(headers.get("content-type", "")):
            return problem(
                415,
                "unsupported_media_type",
                f"The body is declared as {headers.get('content-type', 'nothing')[:100]!r}; send application/json.",
            )
        return None


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host[1 : host.find("]")].lower()
    return host.partition(":")[0].lower()


def _is_json(content_type: str) -> bool:
    kind, _, options = content_type.lower().partition(";")
    charset = options.partition("charset=")[2].strip(' "')
    return kind.strip() == "application/json" and charset in ("", "utf-8", "utf8")

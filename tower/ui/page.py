"""A page: a template with the facts it is made from, answered once as HTML, or as a stream of the parts that change."""

import json
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams

from tower import __version__, db, keys
from tower.api.access import behind, caller_of
from tower.api.errors import problem, status_of
from tower.api.session import COOKIE
from tower.errors import TowerError, Unavailable
from tower.handler import Registry
from tower.keys import BOOTSTRAP, Caller
from tower.orchestrator import EnhancedOrchestrator
from tower.overview import Pace
from tower.queries import Filter
from tower.settings import Settings
from tower.terms import ROLES
from tower.ui.live import Live, Part, Parts
from tower.ui.words import templates

#: Scripts, styles and pictures of this tower alone; nothing inline, nothing framed.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
THEME = "tower_theme"
THEMES = ("system", "light", "dark")
_STREAM = "text/event-stream"
#: Parts of a page that are sent anew when they change have names that begin so.
_LIVE = "live_"
_KEEP_ALIVE_S = 15.0


@dataclass(frozen=True)
class Visit:
    """Who looks at which address, and the tower it is about."""

    #: Scheme and host, as whoever looks reached this tower.
    origin: str
    method: str
    path: str
    query: QueryParams
    values: Mapping[str, str]
    caller: Caller
    #: What a form of this visit carries; empty if nobody logged in.
    token: str
    theme: str
    settings: Settings
    orchestrator: EnhancedOrchestrator
    registry: Registry
    pace: Pace
    said: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request, **said: Any) -> "Visit":
        """Return the visit that a request is."""
        state, cookie, caller = request.app.state, request.cookies.get(COOKIE, ""), caller_of(request)
        theme = request.cookies.get(THEME, "")
        return cls(
            origin=str(request.base_url).rstrip("/"),
            method=request.method,
            path=request.url.path,
            query=request.query_params,
            values={name: str(value) for name, value in request.path_params.items()},
            caller=caller,
            token=state.sessions.token(cookie) if cookie and caller.key_id else "",
            theme=theme if theme in THEMES else "system",
            settings=state.settings,
            orchestrator=state.orchestrator,
            registry=state.registry,
            pace=state.pace,
            said=said,
        )

    @property
    def address(self) -> str:
        """The address of the page with its query; of a form the page that it is on."""
        place = behind(self.method, self.path)
        return f"{place}?{self.query}" if self.query and self.method == "GET" else place

    @property
    def key(self) -> Hashable:
        """What tells it from others: two visits with the same key are shown the same."""
        return self.origin, self.path, str(self.query), self.caller, self.token

    @property
    def within(self) -> Filter:
        """What whoever looks may see."""
        return Filter(within_types=self.caller.types, within_labels=self.caller.labels)

    def may(self, role: str) -> bool:
        """Whether whoever looks may do what takes this role."""
        return self.caller.may(role)

    def may_for_all(self, role: str) -> bool:
        """Whether whoever looks may do what takes this role and is about the tasks of everybody."""
        return self.may(role) and not self.caller.is_limited

    def check(self) -> None:
        """Raise Refused if the key of this visit opens nothing any more. Runs inside `db.read`."""
        if self.caller.key_id and self.caller.key_id != BOOTSTRAP:
            keys.remembered(self.caller.key_id)


Facts = Callable[[Visit], dict[str, Any]]


@dataclass(frozen=True)
class Page:
    """A template and what finds its facts; `facts` runs in a thread and may ask the database."""

    template: str
    facts: Facts
    #: Parameters of the address that make a difference.
    asks: frozenset[str] = frozenset()

    async def __call__(self, request: Request) -> Response:
        """Answer as HTML, or as a stream to a browser that shows the page already."""
        if _STREAM in request.headers.get("accept", ""):
            known = request.headers.get("last-event-id") or request.query_params.get("live", "")
            live: Live = request.app.state.live
            visit = self._narrowed(Visit.of(request))
            if not live.has_room_for(visit.key):
                return problem(
                    503, "busy", "Too many different pages are open; this one is kept up to date later.", headers={"retry-after": "5"}
                )
            stream = self._stream(live, visit, known.split("."))
            headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
            return StreamingResponse(stream, media_type=_STREAM, headers=headers)
        return await self.answer(Visit.of(request))

    def _narrowed(self, visit: Visit) -> Visit:
        """Return a visit whose query holds only what this page asks for, so that the same is not made twice."""
        query = QueryParams([(name, value) for name, value in visit.query.multi_items() if name in self.asks])
        return replace(visit, query=query)

    async def answer(self, visit: Visit, status: int = 200) -> Response:
        """Return the page as a response; what goes wrong is a page as well."""
        try:
            text = await run_in_threadpool(self._render, visit)
        except TowerError as error:
            return await refusal(visit, error)
        return HTMLResponse(text, status, headers={"content-security-policy": POLICY})

    def _render(self, visit: Visit) -> str:
        template, context = templates.get_template(self.template), self._context(visit)
        parts = self._parts(context)
        made = template.new_context({**context, "live": ".".join(part.digest for part in parts.values())})
        for name, part in parts.items():  # which are made already
            made.blocks[name] = [lambda _, text=part.text: iter((text,))]  # type: ignore[misc]
        return "".join(template.root_render_func(made))

    def _context(self, visit: Visit) -> dict[str, Any]:
        return {"visit": visit, "version": __version__, "themes": THEMES, "roles": ROLES, **self.facts(visit)}

    def _parts(self, context: dict[str, Any]) -> Parts:
        template = templates.get_template(self.template)
        made = template.new_context(context)
        return {name: Part.of("".join(block(made))) for name, block in sorted(template.blocks.items()) if name.startswith(_LIVE)}

    def parts(self, visit: Visit) -> Parts:
        """Return the parts that change, as they are now; raise Refused if whoever looks may not any more."""
        db.read(visit.check)
        return self._parts(self._context(visit))

    async def _stream(self, live: Live, visit: Visit, known: list[str]) -> AsyncIterator[bytes]:
        with live.on(visit.key, lambda: self.parts(visit)) as shown:
            while True:
                try:
                    parts = await shown.wait(known, _KEEP_ALIVE_S)
                except TowerError:
                    yield format_sse_event(data_str="", event="gone")
                    return
                if parts is None:
                    yield format_sse_event(comment="still there")
                    continue
                old = known if len(known) == len(parts) else [""] * len(parts)
                changed = {name: part.text for (name, part), was in zip(parts.items(), old, strict=True) if part.digest != was}
                known = [part.digest for part in parts.values()]
                yield format_sse_event(data_str=json.dumps(changed), event="parts", id=".".join(known))


async def refusal(visit: Visit, error: TowerError) -> Response:
    """Return an error as a page."""
    retry = error.retry_after_s if isinstance(error, Unavailable) else None
    context = {
        "visit": visit,
        "version": __version__,
        "themes": THEMES,
        "error": error,
        "status": status_of(error),
        "live": "",
        "retry_after_s": retry,
    }
    text = templates.get_template("error.html").render(context)
    headers = {"content-security-policy": POLICY, **({"retry-after": str(retry)} if retry else {})}
    return HTMLResponse(text, status_of(error), headers=headers)

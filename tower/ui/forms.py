"""What forms send: read, checked to come from this tower's own pages, done, recorded, and answered with where to go on."""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from tower.api.access import Access
from tower.errors import InvalidTask, Refused, TowerError
from tower.ui.page import Page, Visit, refusal

_KIND = "application/x-www-form-urlencoded"
#: Fields of one form at most.
_MOST = 2000


class Fields:
    """The fields of a form, as they were sent."""

    def __init__(self, values: dict[str, list[str]]) -> None:
        self._values = values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def one(self, name: str, default: str = "") -> str:
        """Return the value of a field, without the space around it."""
        return self._values.get(name, [default])[-1].strip()

    def all(self, name: str) -> list[str]:
        """Return every value of a field."""
        return self._values.get(name, [])

    def text(self, name: str) -> str:
        """Return the value of a text area, with lines that end as elsewhere."""
        return self._values.get(name, [""])[-1].replace("\r\n", "\n")


@dataclass(frozen=True)
class Done:
    """What a form did: where to go on, and what the record says of it; nothing if the rows tell it anyway."""

    place: str
    action: str | None = None
    target: str = ""


@dataclass(frozen=True)
class Again:
    """A page to answer with at once: what was wrong with the form, what is to be confirmed, or what is told only once."""

    page: Page
    said: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    action: str | None = None
    target: str = ""


Act = Callable[[Visit, Fields], Done | Again]


def form(act: Act) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """Return the endpoint of a form; `act` runs in a thread."""

    async def endpoint(request: Request) -> Response:
        visit = Visit.of(request)
        try:
            fields = await _read(request)
            _check_origin(request, visit, fields)
            done = await run_in_threadpool(act, visit, fields)
        except TowerError as error:
            return await refusal(visit, error)
        if done.action:
            access: Access = request.state.access
            await access.record(request.scope, visit.caller, done.action, done.target)
        if isinstance(done, Again):
            return await done.page.answer(replace(visit, said=done.said), done.status)
        return RedirectResponse(done.place, 303)

    endpoint.__name__ = act.__name__
    return endpoint


async def _read(request: Request) -> Fields:
    if request.headers.get("content-type", _KIND).partition(";")[0].strip().lower() != _KIND:
        raise Refused("A form of these pages is sent as application/x-www-form-urlencoded.", code="unsupported_form")
    try:
        read = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=_MOST, errors="strict")
    except ValueError:
        raise Refused(f"The form is not UTF-8, or has more than {_MOST} fields.", code="unsupported_form") from None
    if any("\x00" in value for values in read.values() for value in values):
        raise InvalidTask("A field holds the character NUL, which no database keeps; leave it out.", code="invalid_field")
    return Fields(read)


def _check_origin(request: Request, visit: Visit, fields: Fields) -> None:
    """Raise Refused unless the form is one of ours: by the token of its session or, where nobody logged in, by what the browser says."""
    headers: Headers = request.headers
    if visit.token:
        sessions = request.app.state.sessions
        is_ours = sessions.is_token(request.cookies.get("tower_session", ""), fields.one("csrf_token"))
    else:  # the guard has refused every other origin already, so that one is named is enough
        is_ours = "origin" in headers or headers.get("sec-fetch-site") == "same-origin" or "authorization" in headers
    if not is_ours:
        raise Refused("This form does not come from a page of this session; load the page again and send it from there.", code="csrf_token")


def local(place: str, otherwise: str) -> str:
    """Return an address of this tower; `otherwise` for whatever leads elsewhere."""
    return place if place.startswith("/") and not place.startswith(("//", "/\\")) and place.isprintable() else otherwise

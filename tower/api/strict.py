"""Routes that take nothing they do not know: JSON bodies are read strictly, and so are the names in the query; none is passed over."""

import difflib
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tower import jsontext
from tower.errors import InvalidTask

_LARGE = 16_000


def is_large(body: bytes) -> bool:
    """Whether a body takes long enough to read, and what it holds to check, to keep every other request waiting."""
    return len(body) > _LARGE


class _RefusedBody(HTTPException):
    """FastAPI passes this kind on as it is; `errors` answers it as any other bad JSON."""

    def __init__(self, error: jsontext.BadJson) -> None:
        super().__init__(400, str(error))


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            return await run_in_threadpool(jsontext.loads, body) if is_large(body) else jsontext.loads(body)
        except jsontext.BadJson as error:
            raise _RefusedBody(error) from None


class StrictRoute(APIRoute):
    """A route that takes only JSON that every reader understands alike, and only parameters that it has."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Hand the strict request to FastAPI's own handler."""
        handle = super().get_route_handler()
        takes_body = self.body_field is not None
        known = [field.alias for field in get_flat_params(self.dependant) if isinstance(field.field_info, Query)]

        async def strictly(request: Request) -> Response:
            _refuse_unknown(request.query_params.keys(), known)
            if not takes_body:
                try:
                    body = await request.body()
                except ClientDisconnect:
                    raise HTTPException(400, "The request ended before its body did.") from None
                _refuse_body(body, known)
            try:
                return await handle(_StrictRequest(request.scope, request.receive))
            except _RefusedBody as error:
                raise jsontext.BadJson(error.detail) from None

        return strictly


def _refuse_unknown(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InvalidTask for a parameter that the route would ignore: a filter that is misspelt must not list everything."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name[:100], known, n=1)
            cure = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known) or 'none'}."
            raise InvalidTask(f"There is no parameter {name[:100]!r}. {cure}", code="invalid_field", field=name[:100])


def _refuse_body(body: bytes, known: Sequence[str]) -> None:
    """Raise InvalidTask for a body that the route would ignore; many clients send an empty object where nothing is asked for."""
    if b"".join(body.split()) not in (b"", b"{}", b"null"):
        cure = f"in the query: {', '.join(known)}" if known else "without one"
        raise InvalidTask(f"This takes no body; say what it needs {cure}.", code="invalid_field", field="body")

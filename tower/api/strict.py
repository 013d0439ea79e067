"""Routes whose JSON bodies are read strictly."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from tower import jsontext

_LARGE = 100_000


class _RefusedBody(HTTPException):
    """FastAPI passes this kind on as it is; `errors` answers it as any other bad JSON."""

    def __init__(self, error: jsontext.BadJson) -> None:
        super().__init__(400, str(error))


class _StrictRequest(Request):
    async def json(self) -> Any:
        body = await self.body()
        try:
            # A large body takes long enough to keep every other request waiting.
            return await run_in_threadpool(jsontext.loads, body) if len(body) > _LARGE else jsontext.loads(body)
        except jsontext.BadJson as error:
            raise _RefusedBody(error) from None


class StrictRoute(APIRoute):
    """A route that takes only JSON that every reader understands alike."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Hand the strict request to FastAPI's own handler."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            try:
                return await handle(_StrictRequest(request.scope, request.receive))
            except _RefusedBody as error:
                raise jsontext.BadJson(error.detail) from None

        return strictly

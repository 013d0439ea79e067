"""The short way in: a plain task is taken without FastAPI's way around it, which costs as much as all the rest of a request."""

from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tower import jsontext
from tower.api.errors import answer_to
from tower.api.strict import is_large
from tower.api.tasks import check_covered, enqueued
from tower.errors import TowerError
from tower.keys import Caller
from tower.orchestrator import EnhancedOrchestrator
from tower.spec import TaskSpec

_PATH = "/tasks/enqueue"


class ShortWay:
    """Answers POST /tasks/enqueue for what came whole, is small and valid, as most are; everything else goes the long way, errors too."""

    def __init__(self, app: ASGIApp, *, orchestrator: EnhancedOrchestrator) -> None:
        self._app = app
        self._orchestrator = orchestrator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a plain task in, or pass the request on as it came."""
        if not _may_be_plain(scope):
            await self._app(scope, receive, send)
            return
        first = await receive()
        spec = _plain(first)
        if spec is None:
            await self._app(scope, _again(first, receive), send)
            return
        caller: Caller = scope["state"]["caller"]
        try:
            check_covered(caller, [spec])
            answer = enqueued(await self._orchestrator.take(spec, by=caller.actor))
        except TowerError as error:
            answer = answer_to(error)
        await answer(scope, receive, send)


def _may_be_plain(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["path"] != _PATH or scope["method"] != "POST" or scope["query_string"]:
        return False
    return "idempotency-key" not in Headers(scope=scope)


def _plain(message: Message) -> TaskSpec | None:
    """Return the task that a message holds; None if it has to be looked at with more care."""
    body = message.get("body", b"")
    if message["type"] != "http.request" or message.get("more_body") or is_large(body):
        return None
    try:
        spec = TaskSpec.model_validate(jsontext.loads(body))
    except (jsontext.BadJson, ValidationError):
        return None
    return None if spec.parent_id else spec


def _again(first: Message, receive: Receive) -> Receive:
    """Return what receives a message once more, and then what follows it."""
    left = [first]

    async def replayed() -> Message:
        return left.pop() if left else await receive()

    return replayed

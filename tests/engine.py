"""An orchestrator whose event loop takes tasks in by itself, and what it leaves to its thread."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from actors.handlers import load as load_handlers
from tests import rows as r
from tower.orchestrator import EnhancedOrchestrator
from tower.settings import Settings
from tower.spec import TaskSpec

#: What names a task, or tells when it came.
OWN = ("id", "correlation_id", "rank", "created_at", "queued_at", "updated_at", "trace_due_at", "nudge_at")


class Engine:
    """An orchestrator, and which requests it did in its thread."""

    def __init__(self, settings: Settings) -> None:
        self.orchestrator = EnhancedOrchestrator(settings, load_handlers(), r.Nudges())  # type: ignore[arg-type]
        self.in_thread = list[str]()
        work = self.orchestrator._gathering._work

        def noted(requests: list[Any]) -> list[None]:
            self.in_thread += [task.id for request in requests for task in request]
            return work(requests)

        self.orchestrator._gathering._work = noted

    async def enqueue(self, **more: Any) -> str:
        return await self.orchestrator.enqueue(TaskSpec(type="echo", payload={"text": "x"}, **more))

    async def until_in_thread(self, seconds: float = 20) -> None:
        """Wait until the thread has been asked."""
        async with asyncio.timeout(seconds):
            while not self.in_thread:
                await asyncio.sleep(0.01)


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run coroutines in a loop of their own; what none of them has handled fails the test."""
    wrong = list[dict[str, Any]]()

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: wrong.append(context))
        await work()

    asyncio.run(watched())
    assert wrong == []

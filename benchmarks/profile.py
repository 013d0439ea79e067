"""Where a task's CPU goes: the steps of its life, each timed by the clock of its thread, in a tower in this process."""

import asyncio
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors import handling
from actors.attempt import Attempt
from actors.desk import Desk
from actors.orchestrator import Dispatcher
from actors.runner import Runner
from actors.trace import Tracer
from benchmarks.stack import PAYLOAD, Stack
from tower import db, queries, reminders
from tower.main import build
from tower.orchestrator import EnhancedOrchestrator
from tower.spec import TaskSpec
from tower.sweep import Sweep

#: What is timed, and what it is called; what one calls of another counts for that alone.
_STEPS: tuple[tuple[Any, str, str], ...] = (
    (EnhancedOrchestrator, "_checked", "check the request"),
    (EnhancedOrchestrator, "_send", "insert"),
    (EnhancedOrchestrator, "_enter", "insert"),
    (Dispatcher, "run_pass", "decide and dispatch"),
    (Desk, "_write", "claim and finish"),
    (Runner, "_run", "the attempt around the handler"),
    (handling, "perform", "check the payload and call the handler"),
    (Attempt, "log", "lines of the log"),
    (Tracer, "trace_all", "the folder"),
    (queries, "to_trace", "read what the folder tells"),
    (reminders, "traced", "mark the folder as told"),
    (Sweep, "run_once", "sweep"),
)


@dataclass
class _Step:
    calls: int = 0
    cpu_s: float = 0.0


class _Clock:
    """Times wrapped functions by the CPU of their thread, less that of wrapped ones inside them."""

    def __init__(self) -> None:
        self.steps: dict[str, _Step] = defaultdict(_Step)
        self._thread = threading.local()
        self._lock = threading.Lock()

    def wrap(self, owner: Any, name: str, step: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            outer, self._thread.inner = getattr(self._thread, "inner", 0.0), 0.0
            began = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                whole = time.thread_time() - began
                with self._lock:
                    self.steps[step].calls += 1
                    self.steps[step].cpu_s += whole - self._thread.inner
                self._thread.inner = outer + whole

        setattr(owner, name, timed)


def profile(mode: str, tasks: int) -> str:
    """Run tasks through a tower in this process, on SQLite or, as services, on Postgres; return a table of what each step cost."""
    stack, clock = Stack(mode), _Clock()

    async def work() -> float:
        app = build(stack.prepare(in_process=True))
        async with app.router.lifespan_context(app):
            await _enqueue(app.state.orchestrator, 200)
            clock.steps.clear()
            began = sum(os.times()[:2])
            await _enqueue(app.state.orchestrator, tasks)
            return sum(os.times()[:2]) - began

    for owner, name, step in _STEPS:
        clock.wrap(owner, name, step)
    try:
        cpu_s = asyncio.run(work())
    finally:
        stack.close()
        stack.remove()
    lines = ["| step | calls | tasks a call | CPU ms/task |", "|---|--:|--:|--:|"]
    for name, step in sorted(clock.steps.items(), key=lambda item: -item[1].cpu_s):
        lines.append(f"| {name} | {step.calls} | {tasks / step.calls:.1f} | {step.cpu_s / tasks * 1000:.3f} |")
    rest = cpu_s - sum(step.cpu_s for step in clock.steps.values())
    lines.append(f"| everything else: event loop, threads handing over | | | {rest / tasks * 1000:.3f} |")
    lines.append(f"| this process in all | | | {cpu_s / tasks * 1000:.3f} |")
    return "\n".join(lines)


async def _enqueue(orchestrator: EnhancedOrchestrator, tasks: int) -> None:
    """Enqueue tasks one by one, and wait until all have ended and are traced."""
    spec = TaskSpec.model_validate({"type": "echo", "payload": json.loads(json.dumps(PAYLOAD))})
    for _ in range(tasks):
        await orchestrator.enqueue(spec)
    left = "SELECT COUNT(*) FROM task WHERE status <> 'succeeded' OR traced_seq < seq"
    while await asyncio.to_thread(db.read, lambda: db.database.execute_sql(left).fetchone()[0]):
        await asyncio.sleep(0.05)

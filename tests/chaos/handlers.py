"""Handlers that only break things; never imported by the tests themselves, since importing registers them."""

import os
import re
import signal
from typing import Any

from pydantic import BaseModel, ConfigDict

from tower.handler import Retry, TaskContext, handler


class Again(BaseModel):
    """How often to ask for another try."""

    model_config = ConfigDict(extra="forbid", strict=True)

    times: int = 1


class Nothing(BaseModel):
    """No fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Letters(BaseModel):
    """How many letters the pattern is asked to fail on; the time doubles with each."""

    model_config = ConfigDict(extra="forbid", strict=True)

    count: int


@handler("chaos.retry", payload=Again, max_attempts=5, backoff_s=0.3)
def retry(payload: Again, task: TaskContext) -> dict[str, Any]:
    """Ask to be tried again a few times, then succeed."""
    if task.attempt <= payload.times:
        raise Retry(0.2)
    return {"attempt": task.attempt}


@handler("chaos.flaky", payload=Again, max_attempts=5, backoff_s=0.3)
def flaky(payload: Again, task: TaskContext) -> dict[str, Any]:
    """Raise a few times, then leave a file."""
    if task.attempt <= payload.times:
        raise RuntimeError("flaky")
    task.artifact("notes/left.txt").write_text(f"{task.id} {task.attempt}\n" * 1000)
    return {"attempt": task.attempt}


@handler("chaos.poison", payload=Nothing)
def poison(payload: Nothing, task: TaskContext) -> dict[str, Any]:
    """Kill the worker that runs it."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@handler("chaos.frozen", payload=Letters)
def frozen(payload: Letters, task: TaskContext) -> dict[str, Any]:
    """Hold the interpreter in one C call, so that no other thread of the worker runs."""
    re.match(r"(a+)+$", "a" * payload.count + "b")
    return {"attempt": task.attempt}

"""Kills a process at its n-th fault point, for n = 1, 2, 3 …, until a task passes without any: no moment is left untried.

    python -m tests.chaos.nth [--backend sqlite|postgres] [--type echo|sleep|command|http …] [--step N]

On SQLite the embedded server is killed; on Postgres first the worker, then the server. After each the task must have ended, once.
"""

import argparse
import itertools
import sys
import tempfile
import time
import uuid
from pathlib import Path

from tests.chaos.checker import unfinished
from tests.chaos.lab import LONG_S, Lab, lab
from tests.chaos.lives import SERVER, WORKER
from tests.servers import wait_for

TYPES = ("echo", "sleep", "command", "http")
#: In the life that is to be killed the sweep passes once, so that its points do not come between those of the task.
_ONE_SWEEP = "60"
#: How long after its task's end a process may still pass a point.
_AFTERMATH_S = 0.4


def kill_at(tower: Lab, n: int, type_: str, victim: str) -> bool:
    """Let one task travel while the victim dies at its n-th point, and live again; return whether it came so far.

    Raises AssertionError for a broken promise.
    """
    life = tower.start_all(victim, f"*:{n}:kill", TOWER_SWEEP_S=_ONE_SWEEP)[victim]
    key = f"{victim}-{type_}-{n}-{uuid.uuid4().hex[:8]}"
    task_id = tower.ask(type_, victim=life, idempotency_key=key, max_attempts=3)
    if task_id:
        wait_for(f"the end of {key}", lambda: not life.alive or not unfinished(tower.url), LONG_S)
    died = life.wait(_AFTERMATH_S if task_id else LONG_S) is not None
    if died:
        tower.start(victim)
        again = tower.give(type_, idempotency_key=key, max_attempts=3)
        assert task_id in (None, again), f"{key}: first answered with {task_id}, then with {again}"
        tower.settle()
        task_id = again
    tower.end_lives()
    tower.check()
    assert task_id and tower.task(task_id)["status"] == "succeeded", key
    return died


def kill_at_every(tower: Lab, type_: str, victim: str, *, first: int = 1, step: int = 1) -> int:
    """Kill the victim at its points, one after the other; return the first n at which a task passed unharmed."""
    return next(n for n in itertools.count(first, step) if not kill_at(tower, n, type_, victim))


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--type", choices=TYPES, action="append", help="all if absent")
    parser.add_argument("--step", type=int, default=1, help="try every so-manieth point only")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tower-nth-") as folder, lab(Path(folder), asked.backend) as tower:
        for victim in (SERVER,) if asked.backend == "sqlite" else (WORKER, SERVER):
            for type_ in asked.type or TYPES:
                began = time.monotonic()
                last = kill_at_every(tower, type_, victim, step=asked.step)
                spent = time.monotonic() - began
                sys.stdout.write(f"{asked.backend}: {victim} killed at points 1 to {last} of one {type_} task, {spent:.0f} s; all kept\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

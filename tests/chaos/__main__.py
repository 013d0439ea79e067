"""Breaks a running tower by a seed, and checks that it kept every promise.

    python -m tests.chaos --seconds 60 --seed 7 --backend sqlite|postgres

Exits 1 if a task was lost, overlapped, had two results or left a process. Everything runs on loopback and in a temporary folder, and is
ended by its pid.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.chaos.checker import HEADER, Report, check, rows, unfinished
from tests.chaos.load import Load
from tests.chaos.nemesis import Nemesis
from tests.chaos.stage import MARK, Stage

#: Tasks per second, if not said otherwise: what two cores can do beside the faults.
_RATE = 5
_SHOWN = 20


def run(folder: Path, *, backend: str, seed: int, seconds: float, tasks: int, say: Callable[[str], None]) -> Report:
    """Run a tower in this folder, break it for so long, wait until all work has ended, and return what was found."""
    stage = Stage(folder, backend, say=say)
    try:
        stage.open()
        load = Load(stage.url, stage.run[:8], stage.journal, seed, tasks, seconds * 0.9)
        nemesis = Nemesis(stage, seed, say)
        load.start()
        nemesis.run(seconds)
        say(f"faults: {dict(nemesis.done)}; left out: {'; '.join(nemesis.left_out) or 'none'}")
        began = time.monotonic()
        load.finish(60)
        _drain(stage, load, began)
        drained = time.monotonic() - began
        report = check(
            stage.database_url,
            stage.traces,
            accepted=list(load.accepted.values()),
            journal=stage.journal,
            marks={MARK: stage.run},
            kills=stage.kills,
        )
        report.refused, report.unanswered, report.restarts, report.drain_s = load.refused, load.unanswered, stage.restarts, drained
        _check_answers(report, load, stage.database_url)
        return report
    finally:
        stage.close()


def _drain(stage: Stage, load: Load, began: float) -> None:
    """Wait until every accepted task is final and traced and nothing of it runs, a minute and a bit per hundred tasks at most."""
    limit = 30 + 5 * stage.lease_s + len(load.accepted) / 4
    while time.monotonic() - began < limit:
        if len(load.accepted) and not unfinished(stage.database_url) and not stage.orphans():
            return
        time.sleep(0.3)


def _check_answers(report: Report, load: Load, url: str) -> None:
    """Add what the answers promised and the rows do not keep."""
    report.lost += [f"a wrong answer: {text}" for text in load.wrong]
    report.lost += [f"task {number} was never answered" for number in sorted(load.asked - load.accepted.keys())]
    if len(set(load.accepted.values())) != len(load.accepted):
        report.doubled_results.append("two requests were answered with one id")
    plain = Counter(json.loads(row["payload"])["number"] for row in rows(url, "SELECT payload FROM task WHERE idempotency_key IS NULL"))
    twice = [number for number in plain if plain[number] > load.posts[number]]
    report.doubled_results += [f"{plain[number]} rows for {load.posts[number]} requests of task {number}" for number in twice]
    with_key = sum(report.statuses.values()) - plain.total()
    if with_key != len(load.accepted.keys() - load.posts.keys()):
        report.doubled_results.append(f"{with_key} rows for {len(load.accepted.keys() - load.posts.keys())} requests with a key")


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="any number; the same one chooses the same faults")
    parser.add_argument("--backend", choices=["sqlite", "postgres"], default="sqlite", help="sqlite: embedded; postgres: as services")
    parser.add_argument("--tasks", type=int, help=f"{_RATE} for each second if absent")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each fault")
    asked = parser.parse_args()
    seed = random.SystemRandom().randrange(10_000) if asked.seed is None else asked.seed
    tasks = asked.tasks or int(asked.seconds * _RATE)
    folder = Path(tempfile.mkdtemp(prefix="tower-chaos-"))
    say(f"seed {seed}, {asked.backend}, {asked.seconds:g} s, {tasks} tasks, in {folder}")
    told = say if asked.verbose else (lambda text: say(text) if text.startswith("faults") else None)
    try:
        report = run(folder, backend=asked.backend, seed=seed, seconds=asked.seconds, tasks=tasks, say=told)
    finally:
        if not asked.keep:
            shutil.rmtree(folder, ignore_errors=True)
    say(f"ended as {dict(report.statuses)}")
    for text in report.broken[:_SHOWN]:
        say(f"BROKEN {text}")
    say(HEADER)
    say(report.row(f"{asked.backend} {seed}, {asked.seconds:g} s"))
    return 1 if report.broken else 0


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Measures a tower, embedded and as services, and compares it with the last time.

    python -m benchmarks run
    python -m benchmarks run --mode services --only throughput,latency --tasks 5000
    python -m benchmarks run --only backlog,history,big,pages     # minutes each, with --waiting and --finished as long as you like
    python -m benchmarks profile --mode embedded            # where a task's CPU goes, by step

Servers come from wheels, or are those of BENCH_DATABASE_URL and BENCH_REDIS_URL (an empty database, please). Figures drift with the
machine: compare what was measured within minutes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import looking, measures, scale
from benchmarks.measures import Figures
from benchmarks.profile import profile
from benchmarks.stack import Stack, file_ms

#: From here on a tower's own work is not what is measured.
_SLOW_FILE_MS = 0.2
#: What is measured if nothing is named.
SHORT = ("throughput", "connections", "batches", "latency", "many_clients", "idle")


def all_of(asked: argparse.Namespace) -> dict[str, Callable[[Stack], Figures]]:
    """Return every measure by name."""
    return {
        "throughput": lambda stack: measures.throughput(stack, asked.tasks),
        "connections": lambda stack: measures.connections(stack, asked.tasks),
        "batches": lambda stack: measures.batches(stack, asked.tasks),
        "latency": measures.latency,
        "many_clients": lambda stack: measures.many_clients(stack, asked.tasks),
        "idle": measures.idle,
        "backlog": lambda stack: scale.backlog(stack, asked.waiting),
        "history": lambda stack: scale.history(stack, asked.finished, asked.tasks),
        "big": scale.big,
        "pages": looking.pages,
    }


def run(modes: list[str], chosen: dict[str, Callable[[Stack], Figures]]) -> dict[str, Any]:
    """Measure, each on a stack of its own; return the figures by measure and mode."""
    cost = file_ms()
    if cost > _SLOW_FILE_MS:
        say(f"A new file costs {cost:g} ms here: were many deleted lately? Figures are better some five minutes after that.")
    found: dict[str, Any] = {"files": {"ms to create one": cost}}
    stacks: list[Stack] = []
    try:
        for mode in modes:
            for name, measure in chosen.items():
                stacks.append(Stack(mode))
                try:
                    found[f"{name}, {mode}"] = measure(stacks[-1].open())
                finally:
                    stacks[-1].close()
                say(f"{name}, {mode}: {json.dumps(found[f'{name}, {mode}'])}")
    finally:
        for stack in stacks:
            stack.remove()
    return found


def table(found: dict[str, Any], before: dict[str, Any]) -> str:
    """Return the figures as a Markdown table, beside those of the last time."""
    lines = ["| measure | figure | now | last time |", "|---|---|--:|--:|"]
    for name, figures in found.items():
        for figure, value in figures.items():
            lines.append(f"| {name} | {figure} | {value} | {before.get(name, {}).get(figure, '–')} |")
    return "\n".join(lines)


def main() -> int:
    """Do what the command line says; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "profile"])
    parser.add_argument("--mode", choices=["embedded", "services"], action="append", help="both if absent")
    parser.add_argument("--only", default=",".join(SHORT), help="measures, by comma; beside those also backlog, history, big")
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--waiting", type=int, default=100_000, help="tasks in the long queue of backlog")
    parser.add_argument("--finished", type=int, default=1_000_000, help="tasks in the long history of history")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="where the figures go, and those of the last time are")
    asked = parser.parse_args()
    modes, known = asked.mode or ["embedded", "services"], all_of(asked)
    if asked.what == "profile":
        for mode in modes:
            say(f"{mode}\n\n{profile(mode, asked.tasks)}\n")
        return 0
    names = [name for name in asked.only.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"there is no measure {unknown[0]!r}; there are {', '.join(known)}")
    before = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    found = run(modes, {name: known[name] for name in names})
    asked.json.write_text(json.dumps({**before, **found}, indent=2) + "\n")
    say(table(found, before))
    return 0


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Measures a tower, embedded and as services, and compares it with the last time.

    python -m benchmarks run
    python -m benchmarks run --mode services --only throughput,latency --tasks 5000

Servers come from wheels, or are those of BENCH_DATABASE_URL and BENCH_REDIS_URL (an empty database, please). Figures drift with the
machine: compare what was measured within minutes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measures import all_of
from benchmarks.stack import Stack


def run(modes: list[str], names: list[str], tasks: int) -> dict[str, Any]:
    """Measure, each on a stack of its own; return the figures by measure and mode."""
    measures, found = all_of(tasks), {}
    for mode in modes:
        for name in names or list(measures):
            stack = Stack(mode).open()
            try:
                found[f"{name}, {mode}"] = measures[name](stack)
            finally:
                stack.close()
            say(f"{name}, {mode}: {json.dumps(found[f'{name}, {mode}'])}")
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
    parser.add_argument("what", choices=["run"])
    parser.add_argument("--mode", choices=["embedded", "services"], action="append", help="both if absent")
    parser.add_argument("--only", default="", help="measures, by comma: " + ", ".join(all_of(1)))
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="where the figures go, and those of the last time are")
    asked = parser.parse_args()
    names = [name for name in asked.only.split(",") if name]
    unknown = [name for name in names if name not in all_of(1)]
    if unknown:
        parser.error(f"there is no measure {unknown[0]!r}; there are {', '.join(all_of(1))}")
    before = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    found = run(asked.mode or ["embedded", "services"], names, asked.tasks)
    asked.json.write_text(json.dumps({**before, **found}, indent=2) + "\n")
    say(table(found, before))
    return 0


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

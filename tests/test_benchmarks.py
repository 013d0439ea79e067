"""The benchmarks run; what they find is nothing for a test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["embedded", "services"])
def test_a_measure_gives_its_figures(tmp_path: Path, mode: str) -> None:
    """In a table beside those of the last time, and in a file to compare the next time with."""
    kept = tmp_path / "figures.json"
    kept.write_text(json.dumps({f"throughput, {mode}": {"tasks/s": 0.5}}))
    command = [sys.executable, "-m", "benchmarks", "run", "--mode", mode, "--only", "throughput,many_clients", "--tasks", "64"]
    done = subprocess.run([*command, "--json", str(kept)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(kept.read_text())
    figures = found[f"throughput, {mode}"]
    assert figures["tasks/s"] > 0.5
    assert f"| throughput, {mode} | tasks/s | {figures['tasks/s']} | 0.5 |" in done.stdout
    assert found[f"many_clients, {mode}"]["requests/s, a bare FastAPI"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["embedded", "services"])
def test_the_profile_tells_what_each_step_costs(mode: str) -> None:
    """Whatever the steps are called in the code by now."""
    command = [sys.executable, "-m", "benchmarks", "profile", "--mode", mode, "--tasks", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = {line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines()}
    assert {"check the request", "insert", "decide and dispatch", "claim and finish", "the folder", "this process in all"} <= told


def test_an_unknown_measure_is_refused() -> None:
    """With the names of those that there are."""
    command = [sys.executable, "-m", "benchmarks", "run", "--only", "thruput"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no measure 'thruput'; there are throughput, " in done.stderr

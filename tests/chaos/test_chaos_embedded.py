"""Forty seconds of faults against the embedded tower; apart from the other one, so that both run at once."""

from pathlib import Path

import pytest

from tests.chaos.__main__ import run, say

pytestmark = pytest.mark.slow


def test_an_embedded_tower_keeps_its_promises_under_fire(tmp_path: Path) -> None:
    """Nothing is lost, runs twice at once, ends twice or stays behind, and every folder says what the rows say."""
    report = run(tmp_path, backend="sqlite", seed=7, seconds=40, tasks=160, say=say)
    say(report.row("sqlite 7"))
    assert report.broken == []
    assert report.accepted > 70

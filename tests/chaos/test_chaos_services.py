"""Forty seconds of faults against the tower as services; apart from the other one, so that both run at once."""

from pathlib import Path

import pytest

from tests.chaos.__main__ import run, say

pytestmark = pytest.mark.slow


def test_services_keep_their_promises_under_fire(tmp_path: Path) -> None:
    """Nothing is lost, runs twice at once, ends twice or stays behind, and every folder says what the rows say."""
    report = run(tmp_path, backend="postgres", seed=11, seconds=40, tasks=160, say=say)
    say(report.row("postgres 11"))
    assert report.broken == []
    assert report.accepted > 70

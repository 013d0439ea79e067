"""What a handler is given, without a tower around it."""

import json
import time

import pytest

from actors.attempt import CANCEL, Attempt
from tests import rows as r
from tower.settings import Settings

PLANTED = 'geheim/+"\\n=ü 🗼 1234567'


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TOWER_SECRET_PLANTED", PLANTED)
    return PLANTED


def test_a_handler_of_ones_own_hides_what_it_asked_for(rows: Settings, planted: str) -> None:
    """In its log from then on, wherever it says it."""
    attempt = Attempt(r.running(), rows)
    assert attempt.secret("PLANTED") == planted
    attempt.log(f"the token is {planted}.\nAgain: {json.dumps(planted)}")
    assert [line.partition("] ")[2] for part in attempt.take_tail() for line in part.text.splitlines()] == [
        "the token is ***.",
        'Again: "***"',
    ]


def test_only_a_handler_that_still_runs_ignores_its_end(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has returned may wait long until the database takes its end."""
    monkeypatch.setattr("actors.attempt._OBEY_S", 0.0)
    with Attempt(r.running(), rows) as attempt:
        attempt.stop(CANCEL)
        time.sleep(0.001)
        assert attempt.ignores_its_end
    assert not attempt.ignores_its_end

"""How the actors of a process are put together."""

import pytest
from fastapi.testclient import TestClient

from tests.conftest import BASE, LOCAL, Tower
from tower.main import build
from tower.settings import Settings


def test_a_folder_waits_for_no_others_when_no_more_tasks_end(sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far batches of folders are apart."""
    monkeypatch.setattr("actors.crew._TRACE_S", 1e9)
    monkeypatch.setattr("actors.crew._LOADED_S", 1e9)
    with TestClient(build(sqlite_settings), base_url=BASE, client=LOCAL) as client:
        tower = Tower(client, sqlite_settings)
        for _ in range(2):
            assert (tower.traced(tower.enqueue("echo")) / "output.json").is_file()

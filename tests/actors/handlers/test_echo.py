"""echo and sleep."""

import pytest

from tests.conftest import Tower


def test_echo_returns_its_payload(sqlite_tower: Tower) -> None:
    """Whatever it is."""
    payload = {"a": [1, 2.5, None, True, {"ü": "✓"}]}
    assert sqlite_tower.wait(sqlite_tower.enqueue("echo", payload))["result"] == payload


@pytest.mark.slow
def test_sleep_waits_and_can_be_cancelled(sqlite_tower: Tower) -> None:
    """For trying the tower."""
    assert sqlite_tower.wait(sqlite_tower.enqueue("sleep", {"seconds": 0.1}))["result"] == {"slept_s": 0.1}
    task_id = sqlite_tower.enqueue("sleep", {"seconds": 300})
    sqlite_tower.wait(task_id, "running")
    sqlite_tower.client.post(f"/tasks/{task_id}/cancel")
    assert sqlite_tower.wait(task_id, seconds=5)["status"] == "cancelled"


@pytest.mark.slow
def test_sleep_times_out(sqlite_tower: Tower) -> None:
    """After timeout_s."""
    task = sqlite_tower.wait(sqlite_tower.enqueue("sleep", {"seconds": 300}, timeout_s=0.5))
    assert (task["status"], task["error"]["code"]) == ("timed_out", "timeout")

"""GET /handlers, /workers and /queues."""

from tests.conftest import Tower


def test_every_type_is_listed_with_its_schema_and_defaults(api: Tower) -> None:
    """What a client needs to make a valid payload is told by the tower."""
    found = {kind["type"]: kind for kind in api.client.get("/handlers").json()["handlers"]}

    assert sorted(found) == ["command", "echo", "http", "sleep"]
    assert all(kind["summary"] and kind["payload_schema"]["type"] == "object" for kind in found.values())
    assert found["command"]["payload_schema"]["required"] == ["argv"]
    assert (found["echo"]["queue"], found["echo"]["timeout_s"], found["echo"]["max_attempts"]) == ("default", 60, 1)


def test_a_live_worker_is_listed_with_what_it_serves(api: Tower) -> None:
    """The embedded tower has one worker: itself."""
    (worker,) = api.client.get("/workers").json()["workers"]

    assert (worker["slots"], worker["queues"]) == (api.settings.slots, ["default"])
    assert worker["started_at"] <= worker["beat_at"]


def test_a_queue_counts_what_waits_and_what_runs(api: Tower) -> None:
    """A task in flight is counted in the state that it has."""
    before = _default_queue(api)
    task_id = api.enqueue("sleep", {"seconds": 60})
    api.wait(task_id, "running")
    waiting = api.enqueue("echo", not_before="2500-01-01T00:00:00Z")

    queue = _default_queue(api)
    for ended in (task_id, waiting):
        api.client.post(f"/tasks/{ended}/cancel")
    api.wait(task_id, "cancelled")

    assert (queue["running"] - before["running"], queue["queued"] - before["queued"]) == (1, 1)
    assert (queue["types"], queue["workers"], queue["slots"]) == (["command", "echo", "http", "sleep"], 1, api.settings.slots)


def _default_queue(api: Tower) -> dict[str, int]:
    (queue,) = [queue for queue in api.client.get("/queues").json()["queues"] if queue["name"] == "default"]
    return dict(queue)

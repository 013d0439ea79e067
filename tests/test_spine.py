"""The whole way of a task through an embedded tower, on both databases."""

import json

from tests.conftest import Tower


def test_a_task_is_accepted_run_and_traced(tower: Tower) -> None:
    """The README's first task."""
    answer = tower.client.post("/tasks/enqueue", json={"type": "echo", "payload": {"hello": "tower"}})

    task_id = answer.json()["task_id"]
    assert (answer.status_code, answer.headers["location"]) == (202, f"/tasks/{task_id}")
    folder = tower.traced(task_id)
    assert sorted(path.name for path in folder.iterdir()) == ["events.jsonl", "input.json", "log.txt", "output.json"]
    output = json.loads((folder / "output.json").read_text())
    assert (output["status"], output["result"]) == ("succeeded", {"hello": "tower"})

"""/tasks/cancel and /tasks/retry, and the filters of dead letters."""

from typing import Any

import pytest

from tests.api.conftest import is_problem
from tests.conftest import Tower
from tower.models import new_id

LATER = "2500-01-01T00:00:00Z"


def waiting(api: Tower, **more: Any) -> str:
    return api.enqueue("echo", not_before=LATER, **more)


def failed(api: Tower, **more: Any) -> str:
    task_id = api.enqueue("command", {"argv": ["/no/such/program"]}, **more)
    assert api.wait(task_id)["status"] == "failed"
    return task_id


def ask(api: Tower, what: str, filter_: Any, **more: Any) -> Any:
    answer = api.client.post(f"/tasks/{what}", json={"filter": filter_, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_tree_is_cancelled_by_its_correlation_id(api: Tower) -> None:
    """The root and all below it, and nothing else; a dry run says what it would be."""
    root, other = waiting(api), waiting(api)
    tree = [root, waiting(api, parent_id=root)]

    would = ask(api, "cancel", {"correlation_id": root}, dry_run=True)
    done = ask(api, "cancel", {"correlation_id": root}, by="alice")

    assert would == {"matched": 2, "changed": 0, "task_ids": tree, "dry_run": True}
    assert done == {"matched": 2, "changed": 2, "task_ids": tree, "dry_run": False}
    assert [api.task(task_id)["status"] for task_id in (*tree, other)] == ["cancelled", "cancelled", "queued"]
    event = api.client.get(f"/tasks/{root}/events").json()["events"][-1]
    assert event["data"]["by"] == "alice"
    told = api.client.post("/tasks/enqueue", json={"type": "echo", "parent_id": tree[1]})
    is_problem(told, 409, "parent_cancelled")


def test_dead_letters_are_found_and_retried_by_what_they_have_in_common(api: Tower) -> None:
    """Their label, their error code; each of them once."""
    batch = f"batch-{new_id()}"
    old = failed(api, labels={"batch": batch}, max_attempts=1)
    chosen = {"label": [f"batch:{batch}"], "error_code": ["command_not_found"], "status": ["failed"]}

    assert [task["id"] for task in api.client.get("/tasks", params={**chosen, "retried": "false"}).json()["tasks"]] == [old]
    done = ask(api, "retry", chosen)
    again = ask(api, "retry", {**chosen, "created_before": api.task(done["task_ids"][0])["created_at"]})

    assert (done["matched"], done["changed"], again["matched"]) == (1, 1, 0)
    assert api.task(done["task_ids"][0])["retry_of"] == old
    assert [task["id"] for task in api.client.get("/tasks", params={**chosen, "retried": "true"}).json()["tasks"]] == [old]
    assert api.client.get("/tasks", params={**chosen, "error_code": "timeout"}).json()["tasks"] == []


@pytest.mark.parametrize("what", ["cancel", "retry"])
@pytest.mark.parametrize(
    ("body", "code", "field", "said"),
    [
        ({"filter": {}}, "empty_filter", "filter", "narrow it"),
        ({"filter": {"status": []}}, "empty_filter", "filter", "narrow it"),
        ({"filter": {"statuss": ["failed"]}}, "invalid_field", "filter.statuss", "Did you mean 'status'? A filter has: status,"),
        ({"filter": {"text": "x"}, "dryrun": True}, "invalid_field", "dryrun", "Did you mean 'dry_run'?"),
        ({"filter": {"label": ["team"]}}, "invalid_field", "label", "name:value"),
        ({"filter": {"status": ["done"]}}, "invalid_field", "filter.status.0", "'queued'"),
        ({"filter": {"correlation_id": "42"}}, "invalid_field", "filter.correlation_id", "is not a task id"),
        ({}, "invalid_field", "filter", "Field required"),
    ],
)
def test_a_filter_that_is_not_meant_so_is_refused(api: Tower, what: str, body: Any, code: str, field: str, said: str) -> None:
    """A slip must not reach tasks that nobody had in mind; the answer says the cure."""
    told = is_problem(api.client.post(f"/tasks/{what}", json=body), 422, code)

    assert told["field"] == field
    assert said in told["detail"]

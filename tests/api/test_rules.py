"""/rules, pause and resume, and what they do to tasks."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.conftest import is_problem
from tests.conftest import Tower
from tower import db
from tower.models import Rule


@pytest.fixture(autouse=True)
def no_rules(api: Tower) -> Iterator[None]:
    """Leave no rule behind for the other tests here."""
    yield
    db.unit(lambda: Rule.delete().execute())
    api.client.post("/resume")


def rules(api: Tower) -> list[dict[str, Any]]:
    return list(api.client.get("/rules").json()["rules"])


def test_a_limit_is_set_replaced_and_lifted(api: Tower) -> None:
    """The last one counts; without a limit and a pause there is no rule."""
    path = "/rules/key/repo:acme/api"
    told = api.client.put(path, json={"max_running": 3}).json()
    assert (told["kind"], told["name"], told["max_running"], told["rate"]) == ("key", "repo:acme/api", 3, None)
    api.client.put(path, json={"max_running": 2})
    assert [(rule["name"], rule["max_running"]) for rule in rules(api)] == [("repo:acme/api", 2)]

    assert api.client.delete(path).json()["max_running"] is None
    assert rules(api) == []
    is_problem(api.client.delete(path), 404, "rule_not_found")


def test_a_rate_is_set_for_a_rate_key(api: Tower) -> None:
    """Ten a minute, whatever its tasks say."""
    told = api.client.put("/rules/rate/api:github", json={"rate": {"limit": 10, "per_s": 60}}).json()
    assert told["rate"] == {"limit": 10, "per_s": 60}
    assert rules(api)[0] == told


def test_the_tower_itself_has_a_limit_without_a_name(api: Tower) -> None:
    """Set and lifted at its own address."""
    assert api.client.put("/rules/tower", json={"max_running": 1}).json()["name"] == ""
    assert api.client.delete("/rules/tower").status_code == 200
    is_problem(api.client.delete("/rules/tower"), 404, "rule_not_found")


def test_lifting_a_limit_leaves_the_pause(api: Tower) -> None:
    """They are two things that people set apart."""
    api.client.put("/rules/queue/default", json={"max_running": 3})
    api.client.post("/queues/default/pause", params={"by": "alice"})
    assert api.client.delete("/rules/queue/default").json()["paused_by"] == "alice"
    assert [rule["paused_by"] for rule in rules(api)] == ["alice"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/rules/queue/default", {"rate": {"limit": 1, "per_s": 1}}, "set on a rate key"),
        ("/rules/rate/api", {"max_running": 1}, "takes a rate"),
        ("/rules/rate/api", {"rate": {"limit": 0, "per_s": 1}}, "greater than or equal to 1"),
        ("/rules/type/echo", {}, "To start nothing of a type, pause it"),
        ("/rules/type/echo", {"max_runing": 1}, "no field 'max_runing'"),
        ("/rules/colour/red", {"max_running": 1}, "'queue', 'type', 'key' or 'rate'"),
        ("/rules/key/a%00b", {"max_running": 1}, "one line"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_the_cure(api: Tower, path: str, body: dict[str, Any], said: str) -> None:
    """And nothing is kept of it."""
    answer = api.client.put(path, json=body)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]
    assert rules(api) == []


@pytest.mark.parametrize("path", ["/queues/defualt/pause", "/types/ehco/pause", "/queues/defualt/resume"])
def test_an_unknown_queue_or_type_is_not_found_and_the_nearest_is_named(api: Tower, path: str) -> None:
    """A pause that is misspelt must not seem to work."""
    kind = "queue" if "queues" in path else "type"
    told = is_problem(api.client.post(path), 404, f"{kind}_not_found")
    assert ("Did you mean 'default'?" if kind == "queue" else "Did you mean 'echo'?") in told["detail"]


@pytest.mark.parametrize("what", ["", "/queues/default", "/types/echo", "/keys/repo:acme/api"])
def test_what_is_paused_waits_until_it_is_resumed(api: Tower, what: str) -> None:
    """It says why meanwhile, and starts at once then."""
    told = api.client.post(f"{what}/pause", params={"by": "alice", "reason": "upgrade"}).json()
    assert (told["paused_by"], told["reason"]) == ("alice", "upgrade")
    task_id = api.enqueue("echo", concurrency_key="repo:acme/api")
    assert api.task(task_id)["wait_reason"] == "paused"
    why = api.client.get(f"/tasks/{task_id}/why").json()
    assert (why["reason"], why["estimated_start_at"], why["estimate"]["basis"]) == ("paused", None, "unknown")
    assert "by alice: upgrade" in why["summary"]

    assert api.client.post(f"{what}/resume").json()["paused_at"] is None
    assert api.wait(task_id)["status"] == "succeeded"


def test_a_queue_says_that_it_is_paused(api: Tower) -> None:
    """By itself or with the whole tower."""
    shown = lambda: {queue["name"]: queue["paused"] for queue in api.client.get("/queues").json()["queues"]}["default"]  # noqa: E731
    assert not shown()
    for path in ("", "/queues/default"):
        api.client.post(f"{path}/pause")
        assert shown()
        api.client.post(f"{path}/resume")
        assert not shown()


def test_each_change_is_told_in_the_process_log(api: Tower, caplog: pytest.LogCaptureFixture) -> None:
    """Who paused what and why is on record."""
    with caplog.at_level(logging.INFO, logger="tower.rules"):
        api.client.put("/rules/type/echo", json={"max_running": 3})
        api.client.post("/types/echo/pause", params={"by": "alice", "reason": "upgrade"})
        api.client.post("/types/echo/resume", params={"by": "bob"})
        api.client.delete("/rules/type/echo")
    told = [(record.getMessage(), record.fields) for record in caplog.records if record.name == "tower.rules"]  # type: ignore[attr-defined]
    place = {"kind": "type", "name": "echo"}
    assert told == [
        ("limit set", {**place, "max_running": 3}),
        ("paused", {**place, "by": "alice", "reason": "upgrade"}),
        ("resumed", {**place, "by": "bob"}),
        ("limit lifted", place),
    ]


def test_a_limited_rate_goes_on_by_itself_when_its_window_frees(api: Tower) -> None:
    """Nobody has to nudge: the last of five starts two windows after the first."""
    rate = {"key": f"test:{__name__}", "limit": 2, "per_s": 0.5}
    ids = [api.enqueue("echo", rate=rate) for _ in range(5)]
    started = sorted(api.wait(task_id)["dispatched_at"] for task_id in ids)
    at = [float(moment[17:23]) + 60 * float(moment[14:16]) for moment in started]
    assert all((later - earlier) % 3600 >= 0.499 for earlier, later in zip(at, at[2:], strict=False))


def test_a_task_that_runs_or_has_ended_says_so_when_asked_why(api: Tower) -> None:
    """The question is answered in every status."""
    task_id = api.enqueue("sleep", {"seconds": 60})
    api.wait(task_id, "running")
    why = api.client.get(f"/tasks/{task_id}/why").json()
    assert (why["status"], why["reason"], why["estimate"]) == ("running", None, None)
    assert why["summary"].startswith("runs on worker ")
    api.client.post(f"/tasks/{task_id}/cancel")
    api.wait(task_id)
    assert "it ended as cancelled at " in api.client.get(f"/tasks/{task_id}/why").json()["summary"]

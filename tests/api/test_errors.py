"""Error documents: what, why, and what to do about it."""

import json
import logging
from typing import Any

import dramatiq
import peewee
import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import bare_app, count, is_problem
from tests.conftest import BASE, LOCAL, Tower
from tower import db, queries
from tower.api.errors import problem
from tower.broker import open_broker
from tower.settings import Settings

NOBODY = "00000000-0000-7000-8000-000000000000"


def test_an_unknown_type_names_the_nearest_and_all_known(api: Tower) -> None:
    """The message holds the fact, the value and the next step."""
    told = is_problem(api.client.post("/tasks/enqueue", json={"type": "ehco"}), 422, "unknown_type")

    assert told["detail"] == "No handler for type 'ehco'. Did you mean 'echo'? Known: command, echo, http, sleep."
    assert (told["field"], told["title"]) == ("type", "Unprocessable Content")


def test_a_type_that_resembles_nothing_gets_no_guess(api: Tower) -> None:
    """A wild guess would mislead."""
    told = is_problem(api.client.post("/tasks/enqueue", json={"type": "zzzzzz"}), 422, "unknown_type")

    assert told["detail"] == "No handler for type 'zzzzzz'. Known: command, echo, http, sleep."


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"type": "echo", "priority": "7"}, "priority", "Input should be a valid integer, got '7'."),
        ({"type": "echo", "priority": True}, "priority", "valid integer, got True"),
        ({"type": "echo", "timeout_s": 0}, "timeout_s", "greater than 0, got 0"),
        ({"type": "echo", "max_attempts": 0}, "max_attempts", "greater than or equal to 1, got 0"),
        ({"type": "echo", "not_before": "2031-05-01T08:00:00"}, "not_before", "as in 2031-05-01T08:00:00Z"),
        ({"type": "echo", "titel": "x"}, "titel", "There is no such field. Did you mean 'title'? A task has: type, payload, title"),
        ({"type": "echo", "labels": {"a b": "c"}}, "labels.a b.[key]", "pattern"),
        ({"type": "echo", "labels": {"path": 1}}, "labels.path", "valid string, got 1"),
        ({"type": "echo", "payload": []}, "payload", "Input should be an object, as in {...}."),
        ({"payload": {}}, "type", "Field required."),
        ({"type": "echo", "labels": "a"}, "labels", "Input should be an object, as in {...}, got 'a'."),
        ([], "body", "Input should be an object, as in {...}."),
        ("text", "body", "Input should be an object, as in {...}, got 'text'."),
        (None, "body", "Input should be an object, as in {...}"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_the_cure(api: Tower, body: Any, field: str, said: str) -> None:
    """A person can mend the request from the answer alone."""
    answer = api.client.post("/tasks/enqueue", content=json.dumps(body), headers={"content-type": "application/json"})
    told = is_problem(answer, 422, "invalid_field")

    assert told["field"] == field == told["errors"][0]["field"]
    assert said in told["errors"][0]["message"]
    assert f"{field}: " in told["detail"]


@pytest.mark.parametrize(
    ("type_", "payload", "field", "said"),
    [
        ("command", {}, "payload.argv", "argv: Field required."),
        ("command", {"argv": []}, "payload.argv", "at least 1 item"),
        (
            "command",
            {"argv": ["x"], "env": {"A=B": "c"}},
            "payload.env.A=B.[key]",
            "should be letters, digits and '_', as in PYTHONPATH, got 'A=B'.",
        ),
        ("sleep", {"seconds": "7"}, "payload.seconds", "valid number, got '7'"),
        ("http", {"url": "file:///etc/passwd"}, "payload.url", "should start with http:// or https:// and name a host"),
    ],
)
def test_a_bad_payload_names_the_field_in_it(api: Tower, type_: str, payload: Any, field: str, said: str) -> None:
    """The handler's own model is checked before any row exists."""
    body = {"type": type_, "payload": payload, "requested_by": "nobody"}
    told = is_problem(api.client.post("/tasks/enqueue", json=body), 422, "invalid_payload")

    assert told["field"] == field
    assert said in told["detail"] and type_ in told["detail"]
    assert count(api, "nobody") == 0


@pytest.mark.parametrize("bad", ["xyz", "0192F0C1-2345-7ABC-8DEF-0123456789AB", "x" * 5000])
def test_a_malformed_id_is_said_to_be_none(api: Tower, bad: str) -> None:
    """In words with the next step; nobody can read a pattern."""
    shown = repr(bad) if len(bad) < 80 else "'xxx"
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/log"), ("GET", "/files"), ("POST", "/cancel"), ("POST", "/retry")):
        told = is_problem(api.client.request(method, f"/tasks/{bad}{path}"), 422, "invalid_field")
        assert told["detail"].startswith(f"task_id: {shown}") and told["field"] == "task_id"
        assert told["detail"].endswith(" is not a task id; GET /tasks lists them.")
        assert "[0-9a-f]" not in told["detail"] and len(told["detail"]) < 200


def test_every_wrong_field_is_told_at_once(api: Tower) -> None:
    """Nobody should have to send a request three times to learn of three mistakes."""
    told = is_problem(api.client.post("/tasks/enqueue", json={"type": "", "priority": 1.5, "max_attempts": 101}), 422, "invalid_field")

    assert [error["field"] for error in told["errors"]] == ["type", "priority", "max_attempts"]


def test_a_body_that_nothing_reads_is_refused(api: Tower) -> None:
    """It would be ignored, as the reason of a pause that belongs into the query; clients that always send an empty object may."""
    told = is_problem(api.client.post("/types/echo/pause", json={"reason": "upgrade"}), 422, "invalid_field")
    assert (told["field"], told["detail"]) == ("body", "This takes no body; say what it needs in the query: by, reason.")
    assert "echo" not in [rule["name"] for rule in api.client.get("/rules").json()["rules"]]
    task_id = api.enqueue("echo", not_before="2500-01-01T00:00:00Z")
    assert api.client.post(f"/tasks/{task_id}/cancel", json={}).status_code == 200


@pytest.mark.parametrize("payload_of", ["echo", "command"])
def test_a_flood_of_mistakes_gets_a_short_answer(api: Tower, payload_of: str) -> None:
    """The answer's size does not follow the request's."""
    wrong = {f"field {number}": "x" * 50 for number in range(10_000)}
    body = {"type": "echo", **wrong} if payload_of == "echo" else {"type": "command", "payload": wrong}
    answer = api.client.post("/tasks/enqueue", json=body)

    assert answer.status_code == 422
    assert len(answer.content) < 20_000


def test_a_path_that_does_not_exist_is_a_problem_document(api: Tower) -> None:
    """It says where to look."""
    told = is_problem(api.client.get("/taks"), 404, "not_found")

    assert told["detail"] == "There is nothing at /taks; GET /openapi.json lists what there is."


def test_a_task_that_does_not_exist_is_named(api: Tower) -> None:
    """Every route below a task says the same."""
    for path in ("", "/events", "/log", "/files", "/files/log.txt"):
        told = is_problem(api.client.get(f"/tasks/{NOBODY}{path}"), 404, "task_not_found")
        assert NOBODY in told["detail"]
    for path in ("/cancel", "/retry"):
        is_problem(api.client.post(f"/tasks/{NOBODY}{path}"), 404, "task_not_found")
    is_problem(api.client.get(f"/tasks/{NOBODY}/log?follow=true"), 404, "task_not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/tasks", "GET"),
        ("POST", "/tasks", "GET"),
        ("POST", "/health", "GET"),
        ("PUT", "/tasks/enqueue", "POST"),
        ("PATCH", f"/tasks/{NOBODY}", "GET"),
        ("GET", f"/tasks/{NOBODY}/cancel", "POST"),
        ("HEAD", "/health", "GET"),
        ("OPTIONS", "/tasks/enqueue", "POST"),
        ("TRACE", "/health", "GET"),
        ("BREW", "/health", "GET"),
    ],
)
def test_a_wrong_method_says_which_are_right(api: Tower, method: str, path: str, allow: str) -> None:
    """RFC 9110 wants the Allow header."""
    answer = api.client.request(method, path)

    assert answer.status_code == 405
    assert answer.headers["allow"] == allow
    assert answer.headers["content-type"] == "application/problem+json"


def test_more_members_never_hide_the_documents_own() -> None:
    """A conflict may tell the task's status, but not in place of the HTTP status."""
    told = json.loads(bytes(problem(409, "not_final", "Wait.", status="running", task_status="running").body))

    assert (told["status"], told["task_status"]) == (409, "running")


_URL = "postgresql://tower:s3cr3t-word@127.0.0.1:1/tower?sslpassword=s3cr3t-too"


def _broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(queries, "tasks", fail)


def test_an_unforeseen_failure_is_a_problem_document_without_its_details(
    api: Tower, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the traceback, the client does not."""
    _broken(monkeypatch, RuntimeError(f"no luck with {_URL}"))
    with caplog.at_level(logging.ERROR, "tower"):
        answer = api.client.get("/tasks")

    is_problem(answer, 500, "internal_error")
    assert "no luck" not in answer.text and "s3cr3t" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "no luck" in caplog.text


def test_a_database_that_is_gone_is_answered_with_when_to_try_again(api: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 and Retry-After, and patience before."""
    read = db.read
    monkeypatch.setattr(db, "read", lambda work: read(work, patience_s=0.1))
    _broken(monkeypatch, peewee.OperationalError("connection refused"))
    answer = api.client.get("/tasks")

    told = is_problem(answer, 503, "database_unavailable")
    assert answer.headers["retry-after"] == "2"
    assert "connection refused" in told["detail"]


def test_no_answer_tells_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither readiness nor any error shows what DATABASE_URL and REDIS_URL carry."""
    settings = Settings(database_url=_URL, redis_url="redis://:s3cr3t-word@127.0.0.1:1/0")
    database, broker = db.database.obj, dramatiq.get_broker()
    db.open_database(settings)
    monkeypatch.setattr(db, "_patiently", _impatient(db._patiently))
    try:
        with TestClient(bare_app(settings, broker=open_broker(settings)), base_url=BASE, client=LOCAL) as client:
            client.app.state.orchestrator._prepared.set()  # type: ignore[attr-defined]
            answers = [
                client.get("/health/ready"),
                client.get("/tasks"),
                client.get(f"/tasks/{NOBODY}"),
                client.get(f"/tasks/{NOBODY}/log"),
                client.get("/workers"),
                client.get("/queues"),
                client.post(f"/tasks/{NOBODY}/cancel"),
                client.post(f"/tasks/{NOBODY}/retry"),
            ]
    finally:
        db.database.initialize(database)
        dramatiq.set_broker(broker)

    assert [answer.status_code for answer in answers] == [503] * 8
    assert "s3cr3t" not in "".join(answer.text for answer in answers)


def _impatient(patiently: Any) -> Any:
    return lambda work, patience_s, **more: patiently(work, 0.0, **more)

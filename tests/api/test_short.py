"""The short way in: who takes it, and that nobody can tell it from the long one."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import Tower
from tower.api import tasks
from tower.errors import Unavailable
from tower.models import new_id

#: Read as the same task, and too large for the short way.
SPACE = " " * 20_000


class LongWay(Exception):
    """Somebody took it."""


@pytest.fixture
def short(api: Tower, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tower]:
    """A tower that lets nobody take the long way."""

    async def taken(*_: Any) -> None:
        raise LongWay

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "_taken", taken)
        yield api


def took_the_long_way(tower: Tower, **request: Any) -> bool:
    answer = tower.client.post(**({"url": "/tasks/enqueue"} | request))
    assert answer.status_code in (202, 500), answer.text
    return bool(answer.status_code == 500)


def test_a_plain_task_takes_it(short: Tower) -> None:
    answer = short.client.post("/tasks/enqueue", json={"type": "echo", "payload": {"a": 1}, "labels": {"b": "c"}, "priority": 3})
    assert (answer.status_code, list(answer.json())) == (202, ["task_id"])
    assert answer.headers["location"] == f"/tasks/{answer.json()['task_id']}"
    assert answer.headers["x-content-type-options"] == "nosniff"
    told = short.task(answer.json()["task_id"])
    assert (told["payload"], told["labels"], told["priority"]) == ({"a": 1}, {"b": "c"}, 3)


@pytest.mark.parametrize(
    "request_",
    [
        {"content": b'{"type": "echo"' + SPACE.encode() + b"}", "headers": {"content-type": "application/json"}},
        {"json": {"type": "echo"}, "headers": {"idempotency-key": "a key of its own"}},
    ],
    ids=["large", "key in a header"],
)
def test_what_needs_more_care_takes_the_long_way(short: Tower, request_: dict[str, Any]) -> None:
    assert took_the_long_way(short, **request_)


def test_what_comes_in_pieces_takes_the_long_way(short: Tower, port: int) -> None:
    """And every piece arrives there."""
    head = b"POST /tasks/enqueue HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        for piece in (head + b'{"type": ', b'"echo"}'):
            connection.sendall(piece)
            time.sleep(0.1)  # so that it comes by itself
        assert connection.recv(12) == b"HTTP/1.1 500"


def test_a_body_without_a_length_has_its_limit_on_both_ways(api: Tower) -> None:
    def too_much() -> Iterator[bytes]:
        for _ in range(11):
            yield b" " * 1_000_000

    for path in ("/tasks/enqueue", "/tasks/enqueue/batch"):
        answer = api.client.post(path, content=too_much(), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_a_child_takes_the_long_way(short: Tower) -> None:
    """Its parent is looked up."""
    parent = short.enqueue("echo")
    assert took_the_long_way(short, json={"type": "echo", "parent_id": parent})


def both(tower: Tower, body: str, **headers: str) -> list[Any]:
    """Return what is answered on each way."""
    head = {"content-type": "application/json", **headers}
    answers = [tower.client.post("/tasks/enqueue", content=text.encode(), headers=head) for text in (body, body + SPACE)]
    return [
        (answer.status_code, answer.json() if answer.is_error else list(answer.json()), set(answer.headers) - {"content-length"})
        for answer in answers
    ]


@pytest.mark.parametrize(
    "body",
    [
        '{"type": "echo"}',
        '{"type": "ehco"}',
        '{"type": "echo", "priority": "high"}',
        '{"type": "echo", "prioritty": 1}',
        '{"type": "echo", "payload": []}',
        '{"type": "command", "payload": {"argv": []}}',
        '{"type": "echo", "payload": {"a": "\\u0000"}}',
        '{"type": "echo", "type": "echo"}',
        '{"type": "echo", "payload": {"a": 1e999}}',
        '{"type": "echo", "expires_at": "2031-01-01T00:00:00Z", "not_before": "2032-01-01T00:00:00Z"}',
        '{"type": "echo", "parent_id": "0192f0c1-2345-7abc-8def-0123456789ab"}',
        "[]",
    ],
)
def test_both_ways_answer_alike(api: Tower, body: str) -> None:
    """Errors too, to the last word."""
    short, long = both(api, body)
    assert short == long


def test_a_key_in_the_body_is_known_on_both_ways(api: Tower) -> None:
    key = new_id()
    first = api.client.post("/tasks/enqueue", json={"type": "echo", "idempotency_key": key})
    short, long = both(api, f'{{"type": "echo", "idempotency_key": "{key}"}}')
    assert (first.status_code, short[0], long[0]) == (202, 200, 200)
    short, long = both(api, f'{{"type": "sleep", "payload": {{"seconds": 0}}, "idempotency_key": "{key}"}}')
    assert (short[0], short) == (409, long)


def test_a_database_that_is_away_is_told_on_both_ways(api: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise Unavailable("The database rests.", code="database_unavailable")

    orchestrator = api.client.app.state.orchestrator  # type: ignore[attr-defined]
    monkeypatch.setattr(orchestrator, "_checked", away)
    short, long = both(api, '{"type": "echo"}')
    assert (short[0], short) == (503, long)
    assert "retry-after" in short[2]

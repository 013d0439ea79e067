"""The client, against servers that misbehave."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tower import client
from tower.client import Client, Refused, Unreachable

ID = "0192f0c1-2345-7abc-8def-0123456789ab"


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Serve GET on loopback with one function; yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)
            self.close_connection = True

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # an answer may break off
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _stream(request: BaseHTTPRequestHandler, *events: str, cut: bool = False) -> None:
    request.send_response(200)
    request.send_header("content-type", "text/event-stream")
    request.send_header("transfer-encoding", "chunked")
    request.end_headers()
    body = "".join(events).encode()
    request.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) + (b"" if cut else b"0\r\n\r\n"))


def _problem(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("content-length", str(len(body)))
    request.send_header("connection", "close")
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_RESUME_PAUSE_S", 0.01)
    monkeypatch.setattr(client, "_PAUSE_S", 0.01)


def test_a_cut_stream_goes_on_after_the_last_whole_event() -> None:
    """Half an event is asked for again, a whole one is not; a busy server is asked once more."""
    asked: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.headers["last-event-id"])
        if len(asked) == 1:
            _stream(request, "event: log\ndata: one\ndata: two\nid: 7\n\n", "event: log\ndata: thr", cut=True)
        elif len(asked) == 2:
            _problem(request, 503, b'{"detail": "Not now.", "code": "unavailable"}')
        elif len(asked) == 3:
            _stream(request, ": still there\n\n")
        else:
            _stream(request, "event: log\ndata: three\nid: 8\n\n", 'event: end\ndata: {"status": "succeeded"}\n\n')

    with serving(answer) as url, Client(url) as tower:
        assert list(tower.follow(ID)) == ["one", "two", "three"]
    assert asked == [None, "7", "7", "7"]


def test_following_gives_up_when_the_tower_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """After many tries in vain nobody is left waiting."""
    monkeypatch.setattr(client, "_RESUME_TRIES", 3)
    asked: list[int] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(1)
        if len(asked) == 1:
            _stream(request, "event: log\ndata: one\nid: 1\n\n", cut=True)

    with serving(answer) as url, Client(url) as tower, pytest.raises(Unreachable):
        list(tower.follow(ID))
    assert len(asked) == 3


def test_an_error_is_not_asked_again() -> None:
    """A task that is not there will not come."""
    asked: list[int] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(1)
        _problem(request, 404, b'{"detail": "There is no such task.", "code": "task_not_found"}')

    with serving(answer) as url, Client(url) as tower, pytest.raises(Refused, match="no such task") as refused:
        list(tower.follow(ID))
    assert (refused.value.code, refused.value.status, len(asked)) == ("task_not_found", 404, 1)


@pytest.mark.parametrize(("status", "body"), [(200, b"<html>"), (200, b'{"hello": 1}'), (200, b"[]"), (404, b"\xff"), (302, b"")])
def test_what_is_not_a_tower_is_told_apart(status: int, body: bytes) -> None:
    """Another service behind the URL gives a sentence about the URL, whatever it answers."""
    with serving(lambda request: _problem(request, status, body)) as url, Client(url) as tower:
        for ask in (lambda: tower.task(ID), lambda: tower.tasks(10)):
            with pytest.raises(Refused, match=f"answered {status}, but not as a tower does") as refused:
                ask()
            assert refused.value.code == "not_a_tower"


def test_a_list_longer_than_a_page_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit counts tasks, not pages."""
    monkeypatch.setattr(client, "_PAGE", 2)
    pages = {None: '{"tasks": [4, 3], "next_cursor": "3"}', "3": '{"tasks": [2], "next_cursor": "2"}'}

    def answer(request: BaseHTTPRequestHandler) -> None:
        cursor = "3" if "cursor=3" in request.path else None
        assert ("limit=1" if cursor else "limit=2") in request.path
        _problem(request, 200, pages[cursor].encode())

    with serving(answer) as url, Client(url) as tower:
        assert tower.tasks(3) == {"tasks": [4, 3, 2], "next_cursor": "2"}


def _told(request: BaseHTTPRequestHandler, status: int, body: dict[str, Any], **headers: str) -> None:
    data = json.dumps(body).encode()
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("content-length", str(len(data)))
    request.send_header("connection", "close")
    request.end_headers()
    request.wfile.write(data)


def _received(request: BaseHTTPRequestHandler) -> dict[str, Any]:
    return dict(json.loads(request.rfile.read(int(request.headers["content-length"]))))


BUSY = {"detail": "Not now.", "code": "unavailable"}


@pytest.mark.parametrize("status", [429, 503])
def test_it_waits_as_long_as_it_is_told(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives up when that is longer than its patience, with what the tower said."""
    waited = list[float]()
    monkeypatch.setattr(client.time, "sleep", waited.append)
    answers = iter([7, 2])

    def answer(request: BaseHTTPRequestHandler) -> None:
        _received(request)
        wait = next(answers, None)
        _told(request, status, BUSY, retry_after=str(wait)) if wait else _told(request, 202, {"task_id": ID})

    with serving(answer) as url, Client(url) as tower:
        assert tower.enqueue({"type": "echo"}) == (ID, True)
        assert waited == [7, 2]
        answers = iter([40])
        with pytest.raises(Refused, match="Not now") as refused:
            tower.enqueue({"type": "echo"})
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (status, "unavailable", 40)


def test_a_task_is_enqueued_once_however_often_it_is_asked_for() -> None:
    """The tower made it, but its answer was lost on the way: asked again, it is the same task, and new to whoever asked."""
    made, asked = dict[str, str](), list[int]()

    def answer(request: BaseHTTPRequestHandler) -> None:
        spec = _received(request)
        is_new = spec["idempotency_key"] not in made
        made.setdefault(spec["idempotency_key"], f"{ID[:-1]}{len(made)}")
        asked.append(len(made))
        if len(asked) in (2, 3):
            request.connection.close()  # after the work, before the answer
            raise ConnectionAbortedError
        _told(request, 202 if is_new else 200, {"task_id": made[spec["idempotency_key"]]})

    with serving(answer) as url, Client(url) as tower:
        assert tower.enqueue({"type": "echo"}) == (f"{ID[:-1]}0", True)
        assert tower.enqueue({"type": "echo"}) == (f"{ID[:-1]}1", True)
        assert tower.enqueue({"type": "echo", "idempotency_key": "mine"}) == (f"{ID[:-1]}2", True)
        assert tower.enqueue({"type": "echo", "idempotency_key": "mine"}) == (f"{ID[:-1]}2", False)
    assert asked == [1, 2, 2, 2, 3, 3]


def test_what_could_be_done_twice_is_asked_once() -> None:
    """A retry makes a new task each time: when the server stops nobody knows whether it has."""
    asked = list[str]()

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        _told(request, 503, {"detail": "The server is stopping.", "code": "stopping"}, retry_after="0")

    with serving(answer) as url, Client(url) as tower, pytest.raises(Refused, match="stopping"):
        tower.retry(ID)
    assert len(asked) == 1


def test_a_tower_that_restarts_is_waited_for_and_one_that_is_not_there_is_not() -> None:
    """Whoever mistypes an address wants to know at once."""
    answers = iter([True, False, False, True])

    def answer(request: BaseHTTPRequestHandler) -> None:
        if not next(answers):
            request.connection.close()
            raise ConnectionAbortedError
        _told(request, 200, {"id": ID, "status": "succeeded"})

    with serving(answer) as url, Client(url) as tower:
        assert [tower.task(ID)["id"], tower.task(ID)["id"]] == [ID, ID]
    with Client(url) as tower, pytest.raises(Unreachable):
        tower.task(ID)


def test_waiting_for_a_task_has_an_end() -> None:
    """It returns the task when it has ended, and raises when that takes too long; the task goes on."""
    statuses = iter(["queued", "running", "succeeded"])

    def answer(request: BaseHTTPRequestHandler) -> None:
        _told(request, 200, {"id": ID, "status": next(statuses, "running")})

    with serving(answer) as url, Client(url) as tower:
        assert tower.wait(ID)["status"] == "succeeded"
        with pytest.raises(TimeoutError, match=r"is running after 0\.2 s; it goes on"):
            tower.wait(ID, timeout_s=0.2)


def test_the_key_is_shown_and_told_nobody() -> None:
    """Not even when the tower cannot be reached."""
    seen = list[str | None]()

    def answer(request: BaseHTTPRequestHandler) -> None:
        seen.append(request.headers["authorization"])
        _told(request, 401, {"detail": "The key is not known here.", "code": "invalid_key"})

    with serving(answer) as url, Client(url, key="twr_geheim") as tower, pytest.raises(Refused, match="not known here"):
        tower.me()
    assert seen == ["Bearer twr_geheim"]
    with Client(url, key="twr_geheim") as tower, pytest.raises(Unreachable) as error:
        tower.me()
    assert "geheim" not in str(error.value)

"""The client, against servers that misbehave."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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

"""What a client may do to a connection: slowly, by halves, without end, many at once, all at once."""

import contextlib
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.conftest import serving, talk
from tests.conftest import Tower
from tests.servers import wait_for
from tower import db
from tower.api.wire import Wire
from tower.models import Task
from tower.terms import FINAL

pytestmark = pytest.mark.slow

HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
POST = b"POST /tasks/enqueue HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BODY = b'{"type":"echo","requested_by":"wire"}'


class Hasty(Wire):
    """Waits for a request no longer than a test can."""

    receive_s = 0.5


@pytest.fixture(scope="module")
def hasty(api: Tower) -> Iterator[int]:
    with serving(api.client.app, Hasty) as number:
        yield number


@pytest.fixture
def unchanged(api: Tower) -> Iterator[None]:
    before = tasks()
    yield
    assert tasks() == before


def tasks(*conditions: Any) -> int:
    return int(db.read(lambda: Task.select().where(True, *conditions).count()))


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10)


def is_well(port: int) -> bool:
    return talk(port, HEALTH + b"Connection: close\r\n\r\n")[0] == 200


def drip(port: int, start: bytes, drop: bytes) -> bytes:
    """Send a byte now and then, as long as the server lets us; return what it said."""
    with connect(port) as connection:
        connection.sendall(start)
        connection.settimeout(0.05)
        said = b""
        for _ in range(400):
            with contextlib.suppress(TimeoutError):
                try:
                    got = connection.recv(65536)
                except ConnectionResetError:
                    return said
                said += got
                if not got:
                    return said
            with contextlib.suppress(OSError):
                connection.sendall(drop)
        raise AssertionError(f"the server still listens; it said {said!r}")


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("start", "drop", "status"),
    [
        pytest.param(b"", b"", b"", id="nothing"),
        pytest.param(b"", b"\r\n", b"", id="empty lines"),
        pytest.param(b"GE", b"", b"408", id="half a method"),
        pytest.param(HEALTH + b"X: ", b"x", b"408", id="a header without end"),
        pytest.param(HEALTH, b"X: x\r\n", b"408", id="headers without end"),
        pytest.param(POST + b"Content-Length: 5000\r\n\r\n", b"[", b"408", id="a slow body"),
        pytest.param(POST + b"Content-Length: 5000\r\n\r\n", b"", b"408", id="a body that never comes"),
        pytest.param(POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n[\r\n", b"408", id="chunks without end"),
        pytest.param(POST + b"Content-Length: 99999999\r\n\r\n", b"x", b"413", id="a slow body after its refusal"),
        pytest.param(HEALTH + b"\r\n" + POST + b"Content-Length: 50\r\n\r\n", b"", b"408", id="a slow body behind another request"),
        pytest.param(HEALTH + b"\r\n", b"\r\n", b"200", id="empty lines after a request"),
    ],
)
def test_who_is_slow_is_cut_off(hasty: int, start: bytes, drop: bytes, status: bytes) -> None:
    """With a word on why, if a request had begun; meanwhile others are answered."""
    assert is_well(hasty)
    said = drip(hasty, start, drop)
    assert (b"HTTP/1.1 " + status in said) if status else said == b""
    assert is_well(hasty)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("piece", [b"x" * 1024, b"X: x\r\n" * 170], ids=["one header", "many headers"])
def test_a_head_without_end_is_cut_off_whatever_its_speed(port: int, piece: bytes) -> None:
    """It would be collected in memory."""
    with connect(port) as connection:
        connection.sendall(HEALTH + b"X: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 20_000_000:
                connection.sendall(piece)
                sent += len(piece)
        assert sent < 20_000_000
    assert is_well(port)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("sent", [POST[:40], POST, POST + b"Content-Length: 37\r\n\r\n" + BODY[:20], HEALTH], ids=len)
def test_half_a_request_is_none(port: int, sent: bytes) -> None:
    """The client closed its side; nobody waits for the rest."""
    with connect(port) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert connection.makefile("rb").read() == b""
    assert is_well(port)


def test_an_answer_that_takes_long_is_not_cut_off(hasty: int, api: Tower) -> None:
    """The clock is for requests: who follows a log may do so for hours, also if empty lines came behind the request."""
    task_id = api.enqueue("sleep", {"seconds": 1.5})
    with connect(hasty) as connection:
        connection.sendall(
            f"GET /tasks/{task_id}/log?follow=true HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n\r\n".encode()
        )
        said = b""
        while b"event: end" not in said:
            got = connection.recv(65536)
            assert got, said
            said += got


def test_pipelined_requests_are_answered_in_order(port: int, api: Tower) -> None:
    """All of them, also when they come in one packet with bodies between."""
    post = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    bad = POST + b"Content-Length: 2\r\n\r\n{}"
    before = tasks()
    with connect(port) as connection:
        connection.sendall((HEALTH + b"\r\n" + post + bad) * 10 + HEALTH + b"Connection: close\r\n\r\n")
        said = connection.makefile("rb").read()
    statuses = re.findall(rb"HTTP/1.1 (\d{3})", said)
    assert statuses == [b"200", b"202", b"422"] * 10 + [b"200"]
    assert tasks() == before + 10


@pytest.mark.usefixtures("unchanged")
def test_a_thousand_idle_connections_keep_nobody_waiting(port: int) -> None:
    """Each costs a file and no thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard) if hard > 0 else 8192, hard))
    wait_for("the slots of earlier tasks", lambda: not tasks(Task.status.not_in(FINAL), Task.ready_at < time.time()))
    threads = threading.active_count()
    with contextlib.ExitStack() as opened:
        for number in range(1000):
            connection = opened.enter_context(connect(port))
            connection.sendall((b"", HEALTH, POST + b"Content-Length: 37\r\n\r\n{")[number % 3])
        assert is_well(port)
        assert threading.active_count() <= threads + 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_for("an answer after them", lambda: is_well(port))


@pytest.mark.usefixtures("unchanged")
def test_who_does_not_read_the_answer_holds_up_nobody(port: int) -> None:
    """A thousand requests whose answers nobody takes."""
    with connect(port) as connection:
        connection.settimeout(1)
        with contextlib.suppress(TimeoutError):
            connection.sendall((b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") * 1000)
        assert is_well(port)
    assert is_well(port)

"""Who may ask, how a body must come, and the headers of every answer."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import bare_app, count, is_problem, talk
from tests.conftest import BASE, LOCAL, Tower
from tower.api.guard import Guard
from tower.settings import Settings

pytestmark = pytest.mark.slow  # a walk over a whole surface

ECHO = b'{"type":"echo","requested_by":"nobody"}'


@pytest.fixture
def client() -> Iterator[TestClient]:
    """An app that also answers for tower.example and fe80::1, on a name of its own."""
    with TestClient(bare_app(Settings(redis_url=None, allowed_hosts=("tower.example", "fe80::1"))), base_url=BASE, client=LOCAL) as made:
        yield made


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8000",
        "localhost:1",
        "LOCALHOST",
        "[::1]",
        "[::1]:8000",
        "tower.example",
        "Tower.Example:443",
        "[fe80::1]:80",
    ],
)
def test_a_loopback_or_allowed_host_is_answered(client: TestClient, host: str) -> None:
    """The port does not matter, nor does the case."""
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example:8000",
        "0.0.0.0",
        "[::2]",
        "[::1",
        "[::1x",
        "[::1]evil",
        "::1",
        "127.0.0.1:evil",
        "127.0.0.1:8000/evil",
        "evil.example@127.0.0.1",
        "127.0.0.1 evil.example",
        "",
        "ö.example",
    ],
)
def test_a_foreign_or_broken_host_is_refused(client: TestClient, host: str) -> None:
    """A page whose name was re-bound to this address still sends its own name (DNS rebinding)."""
    told = is_problem(client.get("/health", headers={"host": host.encode()}), 421, "unknown_host")
    assert "TOWER_ALLOWED_HOSTS" in told["detail"]


@pytest.mark.parametrize("hosts", [b"", b"Host: 127.0.0.1\r\nHost: evil.example\r\n", b"Host: 127.0.0.1\r\nHost: 127.0.0.1\r\n"])
def test_no_host_or_several_are_refused(port: int, hosts: bytes) -> None:
    """Two readers could take different ones; uvicorn's parser passes them on."""
    status, headers, _ = talk(port, b"GET /health HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")

    assert status in (400, 421)
    assert status == 400 or headers["x-content-type-options"] == "nosniff"


def test_a_whole_url_as_target_does_not_get_around_the_host_check(port: int) -> None:
    """An absolute request target names a host a second time; what counts is the header, and nothing breaks."""
    status, _, _ = talk(port, b"GET http://127.0.0.1/health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")

    assert status in (400, 404, 421)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "127.0.0.1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1"},
        {"sec-fetch-site": "same-origin", "origin": "http://evil.example"},
    ],
)
def test_a_change_asked_for_by_another_site_is_refused(api: Tower, headers: dict[str, str]) -> None:
    """A browser says who asks; no page but our own may enqueue, cancel or retry."""
    sent = {"content-type": "application/json", **headers}
    is_problem(api.client.post("/tasks/enqueue", content=ECHO, headers=sent), 403, "foreign_origin")
    is_problem(api.client.post(f"/tasks/{_NOBODY}/cancel", headers=headers), 403, "foreign_origin")
    assert count(api, "nobody") == 0


@pytest.mark.parametrize("headers", [{}, {"sec-fetch-site": "same-origin", "origin": BASE}, {"sec-fetch-site": "none"}])
def test_a_change_asked_for_by_a_program_or_our_own_page_is_taken(api: Tower, headers: dict[str, str]) -> None:
    """Programs send neither header, our own pages send themselves."""
    assert api.client.post("/tasks/enqueue", json={"type": "echo"}, headers=headers).status_code == 202


def test_several_origins_must_all_be_ours(port: int) -> None:
    """A second header must not hide behind the first."""
    head = b"POST /tasks/enqueue HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    origins = b"Origin: http://127.0.0.1\r\nOrigin: http://evil.example\r\n"
    status, _, _ = talk(port, head + origins + b"Content-Length: %d\r\n\r\n" % len(ECHO) + ECHO)

    assert status == 403


def test_reading_from_another_site_gets_no_permission_to_see_it(api: Tower) -> None:
    """There is no CORS: a foreign page may send a GET, and its browser keeps the answer from it."""
    answer = api.client.get("/tasks", headers={"origin": "http://evil.example", "sec-fetch-site": "cross-site"})

    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "text/json",
        "application/merge-patch+json",
        "application/json; charset=utf-16",
        "application/json; charset=latin-1",
        "application/json, text/plain",
        "",
    ],
)
def test_a_body_that_is_not_declared_as_json_is_refused(api: Tower, content_type: str | None) -> None:
    """The types a foreign page can send without asking first are among them."""
    headers = {} if content_type is None else {"content-type": content_type}

    told = is_problem(api.client.post("/tasks/enqueue", content=ECHO, headers=headers), 415, "unsupported_media_type")
    assert "application/json" in told["detail"]
    assert count(api, "nobody") == 0


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; Charset=UTF-8", 'application/json; charset="utf-8"; x=y'])
def test_a_body_declared_as_json_is_taken(api: Tower, content_type: str) -> None:
    """Case, quotes and other parameters do not matter."""
    answer = api.client.post("/tasks/enqueue", content=b'{"type":"echo"}', headers={"content-type": content_type})

    assert answer.status_code == 202


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "GZIP"])
def test_a_compressed_body_is_refused(api: Tower, encoding: str) -> None:
    """A few bytes could unpack to more than the limit."""
    headers = {"content-type": "application/json", "content-encoding": encoding}

    is_problem(api.client.post("/tasks/enqueue", content=ECHO, headers=headers), 415, "unsupported_encoding")


def test_a_body_over_the_limit_is_refused_before_it_is_read(port: int) -> None:
    """Content-Length is enough to know; nobody waits for ten megabytes."""
    head = b"POST /tasks/enqueue HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 10000001\r\n\r\n"
    status, headers, body = talk(port, head)

    assert (status, headers["content-type"]) == (413, "application/problem+json")
    assert b'"code":"body_too_large"' in body and b"TOWER_MAX_BODY_MB" in body


def test_a_body_over_the_limit_in_chunks_is_refused_as_soon_as_it_is(port: int) -> None:
    """Chunks do not say how many more will come: they are counted."""
    head = b"POST /tasks/enqueue HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n" % 1_000_000 + b" " * 1_000_000 + b"\r\n"
    status, headers, body = talk(port, head + chunk * 11)

    assert (status, headers["content-type"], headers["x-frame-options"]) == (413, "application/problem+json", "DENY")
    assert b'"code":"body_too_large"' in body


def test_a_body_just_under_the_limit_is_taken_and_kept_whole(api: Tower) -> None:
    """Ten megabytes are ten million bytes."""
    text = "x" * 9_999_900
    task_id = api.enqueue("echo", {"text": text}, not_before="2500-01-01T00:00:00Z")

    assert api.task(task_id)["payload"] == {"text": text}
    api.client.post(f"/tasks/{task_id}/cancel")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/docs", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/", 200),
        ("GET", "/dashboard/", 404),
        ("GET", "/tasks", 200),
        ("GET", "/nowhere", 404),
        ("PUT", "/tasks", 405),
        ("GET", "/tasks/none", 422),
        ("GET", "/dashboard", 404),
        ("POST", "/tasks/enqueue", 422),
    ],
)
def test_every_answer_carries_the_security_headers(api: Tower, method: str, path: str, status: int) -> None:
    """Also when it is an error, a redirect or a page."""
    answer = api.client.request(method, path, follow_redirects=False)

    assert answer.status_code == status
    for name, value in _SECURITY.items():
        assert answer.headers[name] == value
    assert "server" not in answer.headers


def test_a_refusal_carries_the_security_headers_too(api: Tower) -> None:
    """What the guard itself answers is no exception."""
    for headers in (
        {"host": "evil.example"},
        {"origin": "http://evil.example"},
        {"content-encoding": "gzip"},
        {"content-length": "99999999"},
    ):
        answer = api.client.post("/tasks/enqueue", headers=headers)
        assert 400 <= answer.status_code < 500
        assert {name: answer.headers[name] for name in _SECURITY} == _SECURITY


def test_a_websocket_is_closed_politely(port: int) -> None:
    """No route speaks WebSocket, and the guard of the routes does not look at it."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    status, _, _ = talk(port, b"GET /dashboard/x HTTP/1.1\r\nHost: evil.example\r\n" + upgrade + b"\r\n")

    assert status == 403


_NOBODY = "00000000-0000-7000-8000-000000000000"
_SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def test_a_request_that_a_stopping_server_ends_is_told_to_come_again() -> None:
    """503, as whenever it is unknown what was done; not 500, which would say that it is nobody's turn to ask again."""
    sent: list[dict[str, Any]] = []

    async def never(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    async def cancelled() -> None:
        guard = Guard(never, allowed_hosts=(), max_body=1, forms_below="/dashboard/")
        scope = {"type": "http", "method": "GET", "path": "/tasks", "headers": [(b"host", b"localhost")]}
        request = asyncio.ensure_future(guard(scope, never, send))
        await asyncio.sleep(0)
        request.cancel()
        await request

    asyncio.run(cancelled())
    assert (sent[0]["status"], json.loads(sent[1]["body"])["code"]) == (503, "stopping")
    assert (b"retry-after", b"2") in sent[0]["headers"]

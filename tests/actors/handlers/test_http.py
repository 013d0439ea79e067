"""http: against a real server on this machine."""

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from tests.conftest import Tower
from tests.servers import free_port, wait_for


class _Site(BaseHTTPRequestHandler):
    """A page for each behaviour."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/hop":
            self._answer(302, b"", location="/fine")
        elif path == "/around":
            self._answer(302, b"", location="/around")
        elif path == "/elsewhere":
            self._answer(302, b"", location="file:///etc/passwd")
        elif path == "/tls":
            self._answer(302, b"", location="https://127.0.0.1/")
        elif path == "/broken":
            self._answer(500, b"oh no")
        elif path == "/bomb":
            self._answer(200, gzip.compress(bytes(100_000_000), 6), content_encoding="gzip")
        elif path == "/garbled":
            self._answer(200, b"this is not packed", content_encoding="gzip")
        elif path == "/flood":
            self._answer(200, b"", **{f"x-{number}": "y" * 1000 for number in range(90)}, x_long="z" * 300_000)
        elif path == "/drip":
            self._drip()
        else:
            self._answer(200, f"hello {self.headers.get('x-name', '')}".encode(), set_cookie="a=b")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self._answer(201, body)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(300):
            try:
                self.wfile.write(b".")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(tower: Tower, url: str, timeout_s: float = 20, **more: Any) -> dict[str, Any]:
    return tower.wait(tower.enqueue("http", {"url": url, **more}, timeout_s=timeout_s))


def test_a_good_answer_is_the_result(sqlite_tower: Tower, site: str) -> None:
    """Status, headers without cookies, and the body."""
    result = ask(sqlite_tower, f"{site}/fine", headers={"x-name": "tower"})["result"]
    assert (result["status"], result["body"]) == (200, "hello tower")
    assert "set-cookie" not in result["headers"]


def test_a_body_is_sent(sqlite_tower: Tower, site: str) -> None:
    """With the method that was asked for."""
    result = ask(sqlite_tower, f"{site}/", method="POST", body="héllo")["result"]
    assert (result["status"], result["body"]) == (201, "héllo")


def test_another_status_than_expected_fails_with_the_answer(sqlite_tower: Tower, site: str) -> None:
    """Any 2xx is good unless the payload says which."""
    error = ask(sqlite_tower, f"{site}/broken?token=hunter2")["error"]
    assert (error["code"], error["details"]["body"]) == ("unexpected_status", "oh no")
    assert "hunter2" not in error["message"]
    assert ask(sqlite_tower, f"{site}/broken", expect_status=[500])["status"] == "succeeded"


@pytest.mark.parametrize(
    ("path", "code"), [("/elsewhere", "redirect_refused"), ("/tls", "redirect_refused"), ("/around", "redirect_refused")]
)
def test_a_redirect_to_another_scheme_or_without_end_is_refused(sqlite_tower: Tower, site: str, path: str, code: str) -> None:
    """It could lead anywhere."""
    assert ask(sqlite_tower, site + path)["error"]["code"] in (code, "http_error")


def test_a_redirect_on_the_same_scheme_is_followed(sqlite_tower: Tower, site: str) -> None:
    """As a browser does."""
    assert ask(sqlite_tower, f"{site}/hop")["result"]["body"] == "hello "


def test_an_answer_over_the_limit_is_refused(sqlite_tower: Tower, site: str) -> None:
    """Before it fills the memory."""
    assert ask(sqlite_tower, f"{site}/fine", max_bytes=3)["error"]["code"] == "response_too_large"


@pytest.mark.parametrize(("path", "code"), [("/bomb", "response_too_large"), ("/garbled", "http_error"), ("/flood", "http_error")])
def test_an_answer_that_is_meant_to_harm_fails_its_task(sqlite_tower: Tower, site: str, path: str, code: str) -> None:
    """A hundred megabytes in a hundred kilobytes, though we asked for nothing packed; what cannot be unpacked; headers without end."""
    before = psutil.Process().memory_info().rss
    assert ask(sqlite_tower, f"{site}{path}")["error"]["code"] == code
    assert psutil.Process().memory_info().rss - before < 300_000_000


@pytest.mark.slow
def test_the_deadline_holds_for_the_whole_exchange(sqlite_tower: Tower, site: str) -> None:
    """A server that sends a byte now and then does not hold a slot for ever."""
    began = time.monotonic()
    assert ask(sqlite_tower, f"{site}/drip", timeout_s=1)["status"] == "timed_out"
    assert time.monotonic() - began < 8


@pytest.mark.slow
def test_a_cancel_ends_a_request_under_way(sqlite_tower: Tower, site: str) -> None:
    """Wherever it is."""
    task_id = sqlite_tower.enqueue("http", {"url": f"{site}/drip"})
    sqlite_tower.wait(task_id, "running")
    sqlite_tower.client.post(f"/tasks/{task_id}/cancel")
    assert sqlite_tower.wait(task_id, seconds=5)["status"] == "cancelled"


def test_nobody_answers(sqlite_tower: Tower) -> None:
    """http_error, with the reason."""
    assert ask(sqlite_tower, f"http://127.0.0.1:{free_port()}/")["error"]["code"] == "http_error"


@pytest.mark.parametrize("url", ["ftp://example.org/", "file:///etc/passwd", "http://", "javascript:alert(1)", "http://[::1", "x" * 9000])
def test_what_is_no_web_address_is_refused_at_enqueue(sqlite_tower: Tower, url: str) -> None:
    """422 before any row exists."""
    answer = sqlite_tower.client.post("/tasks/enqueue", json={"type": "http", "payload": {"url": url}})
    assert (answer.status_code, answer.json()["field"]) == (422, "payload.url")


@pytest.mark.slow
def test_the_server_that_waits_is_still_asked_in_time(sqlite_tower: Tower, site: str) -> None:
    """Requests run side by side."""
    slow = [sqlite_tower.enqueue("http", {"url": f"{site}/drip"}) for _ in range(3)]
    assert ask(sqlite_tower, f"{site}/fine")["status"] == "succeeded"
    for task_id in slow:
        sqlite_tower.client.post(f"/tasks/{task_id}/cancel")
    wait_for("the cancels", lambda: all(sqlite_tower.task(task_id)["status"] == "cancelled" for task_id in slow))

"""What a client may send by mistake or malice to the routes beside enqueue: 4xx that names the value, and no rule or task changed."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.api.conftest import talk
from tests.conftest import Tower
from tests.servers import wait_for
from tower import db
from tower.models import Rule, Task, TaskEvent

pytestmark = pytest.mark.slow  # a walk over a whole surface

JSON = {"content-type": "application/json"}
ID = "0192f0c1-2345-7abc-8def-0123456789ab"

#: Bodies that nothing takes.
NO_JSON: dict[str, str | bytes] = {
    "nothing": "",
    "not JSON": "max_running=3",
    "cut": '{"max_running":',
    "two values": "{}{}",
    "null": "null",
    "a list": "[1]",
    "a number": "3",
    "a key twice": '{"max_running":1,"max_running":2,"filter":{},"filter":{}}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "invalid UTF-8": b'{"max_running":"\xff"}',
    "UTF-16": '{"max_running":3}'.encode("utf-16"),
    "NaN": '{"max_running":NaN}',
    "infinity": '{"max_running":Infinity}',
    "an endless number": '{"max_running":' + "9" * 5000 + "}",
    "too deep": '{"filter":' * 200 + "1" + "}" * 200,
    "an unknown field": '{"max_runing":3}',
    "a half character": r'{"by":"\ud800","filter":{"text":"\ud800"},"max_running":"\ud800"}',
}
BAD_LIMITS = {
    "none": "{}",
    "zero": '{"max_running":0}',
    "negative": '{"max_running":-1}',
    "too many": '{"max_running":1000001}',
    "more than a database holds": '{"max_running":9223372036854775808}',
    "a float": '{"max_running":1.5}',
    "a float that is whole": '{"max_running":1.0}',
    "a text": '{"max_running":"3"}',
    "a truth": '{"max_running":true}',
    "a rate for what has none": '{"rate":{"limit":1,"per_s":60}}',
    "both": '{"max_running":1,"rate":{"limit":1,"per_s":60}}',
}
BAD_RATES = {
    "none": "{}",
    "a limit": '{"max_running":1}',
    "no start": '{"rate":{"limit":0,"per_s":60}}',
    "no window": '{"rate":{"limit":1,"per_s":0}}',
    "a window into the past": '{"rate":{"limit":1,"per_s":-60}}',
    "an endless window": '{"rate":{"limit":1,"per_s":1e300}}',
    "half": '{"rate":{"limit":1}}',
    "a text": '{"rate":"1/60"}',
    "a list": '{"rate":[1,60]}',
    "an unknown field": '{"rate":{"limit":1,"per_s":60,"burst":5}}',
}
BAD_FILTERS = {
    "no filter": "{}",
    "an empty filter": '{"filter":{}}',
    "a filter that leaves all": '{"filter":{"status":[],"text":""}}',
    "an unknown field": '{"filter":{"state":["failed"]}}',
    "an unknown status": '{"filter":{"status":["lost"]}}',
    "a status as text": '{"filter":{"status":"failed"}}',
    "a type that is none": '{"filter":{"type":[1]}}',
    "a label without a value": '{"filter":{"label":["team"]}}',
    "an odd time": '{"filter":{"created_after":"yesterday"}}',
    "a time without a zone": '{"filter":{"created_after":"2031-05-01T08:00:00"}}',
    "NUL": r'{"filter":{"text":"\u0000"}}',
    "a text without end": '{"filter":{"text":"' + "x" * 100_000 + '"}}',
    "many types": '{"filter":{"type":[' + ",".join(['"x"'] * 5000) + "]}}",
    "dry_run as text": '{"filter":{"status":["failed"]},"dry_run":"yes"}',
    "by of two lines": r'{"filter":{"status":["failed"]},"by":"a\nb"}',
}
BODIES = [
    *(("PUT", "/rules/key/a", name, body) for name, body in {**NO_JSON, **BAD_LIMITS}.items()),
    *(("PUT", "/rules/tower", name, body) for name, body in BAD_LIMITS.items()),
    *(("PUT", "/rules/rate/a", name, body) for name, body in BAD_RATES.items()),
    *(("POST", "/tasks/cancel", name, body) for name, body in {**NO_JSON, **BAD_FILTERS}.items()),
    *(("POST", "/tasks/retry", name, body) for name, body in {**NO_JSON, **BAD_FILTERS}.items()),
]


def everything() -> Any:
    """Return what a request could change."""
    return db.read(lambda: (list(Rule.select().order_by(Rule.kind, Rule.name).dicts()), Task.select().count(), TaskEvent.select().count()))


@pytest.fixture
def unchanged(api: Tower) -> Iterator[None]:
    """Check that the test changes nothing."""
    task_id = api.enqueue("echo")
    api.wait(task_id)
    api.traced(task_id)
    before = everything()
    yield
    wait_for("the same rows", lambda: everything() == before, 2)


def refused(answer: Any, *statuses: int) -> None:
    assert answer.status_code in statuses, answer.text[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]
    assert len(answer.content) < 5000


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("method", "path"), sorted({(method, path) for method, path, _, _ in BODIES}))
def test_a_bad_body_changes_nothing(api: Tower, method: str, path: str) -> None:
    """Each of them, one by one; the answer says what is wrong."""
    for of, where, name, body in BODIES:
        if (of, where) == (method, path):
            answer = api.client.request(method, path, content=body, headers=JSON)
            assert answer.status_code in (400, 422), f"{name}: {answer.status_code} {answer.text[:300]}"
            refused(answer, 400, 422)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("method", "path"), sorted({(method, path) for method, path, _, _ in BODIES}))
def test_a_body_of_another_kind_or_too_large_changes_nothing(api: Tower, method: str, path: str) -> None:
    """Forms, packed bodies, and eleven megabytes."""
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/json", "content-encoding": "gzip"}):
        refused(api.client.request(method, path, content=b'{"max_running":1}', headers=headers), 415)
    refused(api.client.request(method, path, content=b'{"a":"' + b"x" * 11_000_000 + b'"}', headers=JSON), 413)


#: Names that nothing can have, as they stand in a path.
BAD_NAMES = ["", "%00", "a%00b", "%0a", "%ff", "%ed%a0%80", "x" * 300]
#: Names of queues and types that do not exist, and odd ones.
UNKNOWN = ["no-such", "%2e%2e%2f", quote("größer"), quote("' OR 1=1 --"), "<script>"]


@pytest.mark.usefixtures("unchanged")
def test_a_name_that_cannot_be_changes_nothing(api: Tower) -> None:
    """Empty, control characters, bytes that are no text, too long; and what is no kind of rule."""
    for name in BAD_NAMES:
        for method, path in (
            ("PUT", f"/rules/key/{name}"),
            ("DELETE", f"/rules/key/{name}"),
            ("POST", f"/queues/{name}/pause"),
            ("POST", f"/types/{name}/resume"),
            ("POST", f"/keys/{name}/pause"),
        ):
            body = b'{"max_running":1}' if method == "PUT" else None
            answer = api.client.request(method, path, content=body, headers=JSON if body else {})
            refused(answer, 400, 404, 405, 422)
    refused(api.client.put("/rules/colour/red", json={"max_running": 1}), 404, 422)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_queue_or_type_is_not_limited_or_paused(api: Tower, name: str) -> None:
    """A typing error would otherwise be a rule that holds nothing."""
    for kind in ("queue", "type"):
        refused(api.client.put(f"/rules/{kind}/{name}", json={"max_running": 1}), 404, 405, 422)
        refused(api.client.post(f"/{kind}s/{name}/pause"), 404, 405, 422)
        refused(api.client.delete(f"/rules/{kind}/{name}"), 404, 405, 422)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("path", ["/pause", "/queues/default/pause", "/types/echo/pause", "/keys/a/pause", "/resume"])
def test_a_bad_query_changes_nothing(api: Tower, path: str) -> None:
    """Who and why are single lines; an unknown parameter is a typing error."""
    for query in ("by=a%0ab", "by=%00", "reason=%1b[31m", "by=" + "x" * 5000, "by=%ff", "bye=alice"):
        if path == "/resume" and "reason" in query:
            continue
        refused(api.client.post(f"{path}?{query}"), 400, 422)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("task_id", ["x", "%00", "%ff", ID[:-1], ID + "0", "{" + ID + "}", quote("' OR 1=1 --"), "a" * 5000])
def test_what_is_no_id_has_no_reason_to_wait(api: Tower, task_id: str) -> None:
    """Nor has a task that does not exist."""
    refused(api.client.get(f"/tasks/{task_id}/why"), 400, 404, 422)
    refused(api.client.get(f"/tasks/{ID}/why"), 404)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "path", ["/rules", "/rules/tower", "/rules/key/a", "/pause", "/queues/default/pause", f"/tasks/{ID}/why", "/tasks/cancel"]
)
def test_an_odd_method_changes_nothing(api: Tower, path: str) -> None:
    """Whatever is not in the document is 405 or 404, in the form of every error."""
    for method in ("TRACE", "PATCH", "FOO", "CONNECT"):
        refused(api.client.request(method, path), 404, 405)


@pytest.mark.usefixtures("unchanged")
def test_odd_bytes_in_a_path_are_answered(port: int) -> None:
    """Past what a client library would send."""
    for path in (b"/rules/key/\xff\xfe", b"/tasks/%/why", b"/rules//key//a", b"/queues/%%%/pause", b"/rules/key/" + b"a" * 70_000):
        host = f"127.0.0.1:{port}".encode()
        status, _, body = talk(port, b"PUT " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        assert 400 <= status < 500, (path[:50], status, body[:200])

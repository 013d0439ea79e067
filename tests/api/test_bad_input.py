"""Everything a client may send by mistake or malice: an answer of 4xx or a harmless 2xx, never 5xx, and nothing half done."""

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.conftest import talk
from tests.conftest import Tower
from tower import db
from tower.models import Task, TaskEvent, TaskLabel

pytestmark = pytest.mark.slow  # a walk over a whole surface

ENQUEUE, BATCH = "/tasks/enqueue", "/tasks/enqueue/batch"
JSON = {"content-type": "application/json"}


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def rows() -> tuple[int, int]:
    """Return how many tasks and labels there are."""
    return db.read(lambda: (Task.select().count(), TaskLabel.select().count()))


@pytest.fixture
def unchanged(api: Tower) -> Iterator[None]:
    """Check that the test leaves no row behind."""
    before = rows()
    yield
    assert rows() == before


def with_payload(text: str) -> str:
    return f'{{"type":"echo","payload":{text}}}'


def with_field(name: str, text: str) -> str:
    return f'{{"type":"echo","{name}":{text}}}'


def with_rate(name: str, text: str) -> str:
    members = ",".join(f'"{key}":{value}' for key, value in {**RATE, name: text}.items())
    return with_field("rate", f"{{{members}}}")


RATE = {"key": '"a"', "limit": "1", "per_s": "60"}

BAD_BODIES: dict[str, str | bytes] = {
    "nothing": "",
    "not JSON": "type=echo",
    "cut": '{"type":"echo"',
    "two values": '{"type":"echo"}{"type":"echo"}',
    "a comment": '{"type":"echo"} // hello',
    "null": "null",
    "a list": '[{"type":"echo"}]',
    "a number": "1",
    "no type": "{}",
    "NUL in a payload": with_payload(r'{"a":"\u0000"}'),
    "NUL in a payload's key": with_payload(r'{"\u0000":1}'),
    "a raw NUL": with_payload('{"a":"\x00"}'),
    "NUL in type": r'{"type":"echo\u0000"}',
    "NUL in title": with_field("title", r'"a\u0000b"'),
    "NUL in a label": with_field("labels", r'{"a":"\u0000"}'),
    "NUL in a key": with_field("idempotency_key", r'"a\u0000"'),
    "a lone surrogate": with_payload(r'{"a":"\ud800"}'),
    "a lone low surrogate": with_payload(r'{"a":"\udfff x"}'),
    "a lone surrogate as key": with_payload(r'{"\ud800":1}'),
    "a lone surrogate in type": r'{"type":"\ud800"}',
    "a lone surrogate as field": r'{"type":"echo","\ud800":1}',
    "a lone surrogate in title": with_field("title", r'"\udbff"'),
    "NaN": with_payload('{"a":NaN}'),
    "Infinity": with_payload('{"a":Infinity}'),
    "-Infinity": with_field("timeout_s", "-Infinity"),
    "1e999": with_payload('{"a":1e999}'),
    "1e999 as timeout": with_field("timeout_s", "1e999"),
    "an int over 64 bits": with_payload('{"a":9223372036854775808}'),
    "an int over 64 bits as priority": with_field("priority", str(2**64)),
    "an int over 32 bits as priority": with_field("priority", str(2**31)),
    "an int over 32 bits as attempts": with_field("max_attempts", str(2**40)),
    "5,000 digits": with_payload('{"a":%s}' % ("7" * 5000)),
    "5,000 digits as priority": with_field("priority", "7" * 5000),
    "5,000 digits of a float": with_field("timeout_s", "7" * 5000 + ".5"),
    "200 levels": with_payload(deep(200)),
    "2,000 levels": with_payload(deep(2000)),
    "100,000 levels": with_payload(deep(100_000)),
    "100,000 open lists": "[" * 100_000,
    "100,000 levels of list": with_payload('{"a":%s}' % ("[" * 100_000 + "]" * 100_000)),
    "a type of 100,000 characters": json.dumps({"type": "e" * 100_000}),
    "a title of 201": with_field("title", json.dumps("t" * 201)),
    "an empty title": with_field("title", '""'),
    "a key of 256": with_field("idempotency_key", json.dumps("k" * 256)),
    "a concurrency key of 256": with_field("concurrency_key", json.dumps("k" * 256)),
    "a label name of 64": with_field("labels", json.dumps({"l" * 64: ""})),
    "a label value of 256": with_field("labels", json.dumps({"l": "v" * 256})),
    "33 labels": with_field("labels", json.dumps({f"l{number}": "" for number in range(33)})),
    "an odd label name": with_field("labels", '{"../x":""}'),
    "a label name with a newline": with_field("labels", r'{"a\n":""}'),
    "a path as type": '{"type":"../../etc/passwd"}',
    "an id of one's own": with_field("id", '"../../etc/passwd"'),
    "a status of one's own": with_field("status", '"succeeded"'),
    "a type twice": '{"type":"echo","type":"command"}',
    "a payload's key twice": with_payload('{"a":1,"a":2}'),
    "a label twice": with_field("labels", '{"a":"1","a":"2"}'),
    '"7" for 7': with_field("priority", '"7"'),
    "true for 1": with_field("max_attempts", "true"),
    "7.0 for 7": with_field("priority", "7.0"),
    "1 for text": with_field("title", "1"),
    "null for text in a label": with_field("labels", '{"a":null}'),
    "a number as time": with_field("not_before", "1700000000"),
    "a time without zone": with_field("not_before", '"2031-05-01T08:00:00"'),
    "a time without seconds": with_field("not_before", '"2031-05-01T08:00Z"'),
    "a time before 1970": with_field("not_before", '"0001-01-01T00:00:00+23:59"'),
    "a time after 9998": with_field("not_before", '"9999-12-31T23:59:59.999999-23:59"'),
    "a time that is none": with_field("not_before", '"2031-02-30T25:61:61Z"'),
    "ANSI in a title": with_field("title", r'"\u001b[31mred"'),
    "8-bit ANSI in a title": with_field("title", r'"\u009b31mred"'),
    "CRLF in a title": with_field("title", r'"a\r\nb"'),
    "a line separator in a title": with_field("title", r'"a\u2028b"'),
    "a newline in requested_by": with_field("requested_by", r'"alice\nbob"'),
    "a newline in a key": with_field("idempotency_key", r'"a\nb"'),
    "ANSI in a label": with_field("labels", r'{"a":"\u001b[2J"}'),
    "a rate of text": with_field("rate", '"10/min"'),
    "a rate without a window": with_field("rate", '{"key":"a","limit":1}'),
    "a rate of nothing": with_rate("limit", "0"),
    "a rate below zero": with_rate("limit", "-1"),
    "a rate of half a start": with_rate("limit", "1.5"),
    "a rate over a million": with_rate("limit", "1000001"),
    "a rate of 5,000 digits": with_rate("limit", "7" * 5000),
    "a window of no length": with_rate("per_s", "0"),
    "a window below zero": with_rate("per_s", "-0.0"),
    "a window of over a day": with_rate("per_s", "86400.5"),
    "a window without end": with_rate("per_s", "1e999"),
    "a window of NaN": with_rate("per_s", "NaN"),
    "an empty rate key": with_rate("key", '""'),
    "a rate key of 256": with_rate("key", json.dumps("k" * 256)),
    "a rate key with NUL": with_rate("key", r'"a\u0000"'),
    "ANSI in a rate key": with_rate("key", r'"\u001b[31m"'),
    "a lone surrogate in a rate key": with_rate("key", r'"\ud800"'),
    "a rate with more": with_field("rate", '{"key":"a","limit":1,"per_s":1,"burst":9}'),
    "a rate key twice": with_field("rate", '{"key":"a","key":"b","limit":1,"per_s":1}'),
    "a limit of no key": with_field("concurrency_limit", "2"),
    "a limit of none": with_field("concurrency_limit", "0"),
    "a limit below zero": with_field("concurrency_limit", "-1"),
    "a limit over 10,000": with_field("concurrency_limit", "10001"),
    "a limit over 64 bits": with_field("concurrency_limit", str(2**64)),
    "a limit as text": with_field("concurrency_limit", '"1"'),
    "a limit of true": with_field("concurrency_limit", "true"),
    "a silence of nothing": with_field("silence_s", "0"),
    "a silence below zero": with_field("silence_s", "-5"),
    "a silence without end": with_field("silence_s", "1e999"),
    "a silence of over a year": with_field("silence_s", "1e9"),
    "a silence as text": with_field("silence_s", '"5"'),
    "a parent of another form": with_field("parent_id", '"../../etc/passwd"'),
    "a parent in capitals": with_field("parent_id", '"0192F0C1-2345-7ABC-8DEF-0123456789AB"'),
    "a parent with a newline": with_field("parent_id", r'"0192f0c1-2345-7abc-8def-0123456789ab\n"'),
    "a parent that is not there": with_field("parent_id", '"0192f0c1-2345-7abc-8def-0123456789ab"'),
    "an empty parent": with_field("parent_id", '""'),
    "a number as end": with_field("expires_at", "1700000000"),
    "an end without zone": with_field("expires_at", '"2031-05-01T08:00:00"'),
    "an end before 1970": with_field("expires_at", '"0001-01-01T00:00:00+23:59"'),
    "an end after 9998": with_field("expires_at", '"9999-12-31T23:59:59.999999-23:59"'),
    "an end with NUL": with_field("expires_at", r'"2031-05-01T08:00:00Z\u0000"'),
    "a rate key of another task's": with_field("rate_key", '"a"'),
    "a tree of one's own": with_field("correlation_id", '"0192f0c1-2345-7abc-8def-0123456789ab"'),
    "a field of JavaScript objects": with_field("__proto__", '{"type":"command"}'),
    "a field of Python objects": with_field("__class__", '"Rate"'),
    "UTF-16": '{"type":"echo"}'.encode("utf-16"),
    "UTF-16 without a mark": '{"type":"echo"}'.encode("utf-16-le"),
    "UTF-32": '{"type":"echo"}'.encode("utf-32"),
    "a byte order mark": b'\xef\xbb\xbf{"type":"echo"}',
    "invalid UTF-8": b'{"type":"echo","title":"\xff"}',
    "overlong UTF-8": b'{"type":"echo","title":"\xc0\xaf"}',
    "a surrogate in UTF-8": b'{"type":"echo","title":"\xed\xa0\x80"}',
    "Latin-1": '{"type":"echo","title":"ü"}'.encode("latin-1"),
    "gzip that does not say so": gzip.compress(b'{"type":"echo"}'),
    "an env name with =": '{"type":"command","payload":{"argv":["true"],"env":{"A=B":"c"}}}',
    "an env name with NUL": r'{"type":"command","payload":{"argv":["true"],"env":{"A\u0000":"c"}}}',
    "an empty env name": '{"type":"command","payload":{"argv":["true"],"env":{"":"c"}}}',
    "an env value with NUL": r'{"type":"command","payload":{"argv":["true"],"env":{"A":"\u0000"}}}',
    "an argument with NUL": r'{"type":"command","payload":{"argv":["true","\u0000"]}}',
    "a command line as text": '{"type":"command","payload":{"argv":"rm -rf /"}}',
    "a handler's own setting": '{"type":"command","payload":{"argv":["true"],"env":{"TOWER_TASK":"x"}}}',
    "a file URL": '{"type":"http","payload":{"url":"file:///etc/passwd"}}',
    "CRLF in a header": r'{"type":"http","payload":{"url":"http://127.0.0.1/","headers":{"a":"b\r\nc: d"}}}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
@pytest.mark.usefixtures("unchanged")
def test_a_bad_body_is_refused_and_leaves_nothing(api: Tower, name: str) -> None:
    """Alone, and as the second of a batch whose first is good."""
    body = BAD_BODIES[name]
    data = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    alone = api.client.post(ENQUEUE, content=data, headers=JSON)
    batch = api.client.post(BATCH, content=b'{"tasks":[{"type":"echo"},' + data + b"]}", headers=JSON)

    for answer in (alone, batch):
        assert answer.status_code in (400, 422), answer.text[:500]
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"]
        assert len(answer.content) < 5000


HARMLESS: dict[str, Any] = {
    "keys of JavaScript objects": {"__proto__": {"admin": True}, "constructor": {"prototype": 1}, "toString": None, "hasOwnProperty": 0},
    "keys of Python objects": dict.fromkeys(("__class__", "__dict__", "__init__", "self", "copy"), 1),
    "keys of Pydantic models": {name: {} for name in ("model_dump", "model_config", "model_fields", "__pydantic_extra__")},
    "keys of templates": {"": 1, " ": 2, "a.b": 3, "$ref": "#/x", "{{7*7}}": "${7*7}", "%s%n": "%(x)s"},
    "markup": {"html": "<script>alert(1)</script>", "sql": "'; DROP TABLE task; --", "shell": "$(reboot) `reboot`"},
    "control characters": {"ansi": "\x1b[31mred\x1b[0m", "crlf": "a\r\nb\x85c\u2028d", "bell": "\x07", "c1": "\x9b", "bidi": "\u202eevil"},
    "far planes": {"emoji": "👩‍👩‍👧‍👦", "nonchars": "\uffff\U0010ffff\ufeff", "combining": "e" + "\u0301" * 500, "private": "\ue000"},
    "numbers at their limits": {"max": 2**63 - 1, "min": -(2**63), "tiny": 5e-324, "huge": 1.7976931348623157e308, "zero": -0.0},
    "97 levels": json.loads(deep(97)),
    "a command line's traps": {
        "argv": ["-rf", "--", "-", "", "~", "$HOME", "*"],
        "cwd": "../../../..",
        "env": {"A=B": "c", "LD_PRELOAD": "x"},
    },
    "a long string": {"text": "x" * 1_000_000},
    "many keys": {str(number): number for number in range(10_000)},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_an_odd_payload_is_kept_run_and_traced_as_it_is(api: Tower, name: str) -> None:
    """The whole way: accepted, echoed, shown, listed, logged."""
    payload = HARMLESS[name]
    task_id = api.enqueue("echo", payload, requested_by="odd", title="😀 größer <b>")
    task = api.wait(task_id)

    assert (task["status"], task["error"]) == ("succeeded", None)
    assert task["payload"] == task["result"] == payload
    folder = api.traced(task_id)
    assert json.loads((folder / "input.json").read_bytes())["payload"] == payload
    assert json.loads((folder / "output.json").read_bytes())["result"] == payload
    assert api.client.get("/tasks", params={"limit": 1, "text": "größer"}).status_code == 200


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=b"}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json; charset=utf-7"}, 415),
        ({"content-type": "application/json", "idempotency-key": "x" * 300}, 422),
        ({"content-type": "application/json", "idempotency-key": "\x80\xff".encode("latin-1") * 200}, 422),
    ],
)
def test_bad_headers_are_refused_and_leave_nothing(api: Tower, headers: dict[str, Any], status: int) -> None:
    """Whatever a form or a foreign page can send."""
    assert api.client.post(ENQUEUE, content=b'{"type":"echo"}', headers=headers).status_code == status


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "CONNECT", "FOO"])
def test_odd_methods_are_refused_everywhere(api: Tower, method: str) -> None:
    """And nothing is sent back that was sent, as TRACE would."""
    for path in ("/health", "/tasks", ENQUEUE, BATCH, "/tasks/x/cancel", "/handlers", "/openapi.json", "/docs", "/", "/dashboard/"):
        answer = api.client.request(method, path, headers={"x-secret": "s3cr3t"}, follow_redirects=False)

        allowed = (200, 307, 404, 405) if method == "HEAD" else (404, 405)
        assert answer.status_code in allowed, path
        assert "s3cr3t" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"


def get(target: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: 127.0.0.1", *headers, b"", body])


def post(*headers: bytes, body: bytes = b"") -> bytes:
    head = [b"POST /tasks/enqueue HTTP/1.1", b"Host: 127.0.0.1", b"Content-Type: application/json"]
    return b"\r\n".join([*head, *headers, b"", body])


RAW: dict[str, tuple[bytes, set[int]]] = {
    "nonsense": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", {400}),
    "a header of 100 KB": (get(b"/health", b"X: " + b"x" * 100_000), {200, 400, 431}),
    "a path of 60 KB": (get(b"/tasks/" + b"a" * 60_000), {400, 404, 414, 422}),
    "a query of 60 KB": (get(b"/tasks?" + b"label=a:b&" * 6000), {400, 414, 422}),
    "raw bytes in the path": (get(b"/tasks/\xff\xfe"), {400, 404, 422}),
    "raw bytes in the query": (get(b"/tasks?text=\xff\xfe"), {200, 400, 422}),
    "escaped rubbish in the query": (get(b"/tasks?text=%ff%ed%a0%80%zz"), {400}),
    "raw bytes in a header": (get(b"/health", b"Last-Event-ID: \xff"), {200, 400}),
    "a length below zero": (post(b"Content-Length: -1"), {400}),
    "a length that is none": (post(b"Content-Length: ten"), {400}),
    "a length of 5,000 digits": (post(b"Content-Length: " + b"9" * 5000), {400, 413}),
    "two lengths": (post(b"Content-Length: 2", b"Content-Length: 3", body=b"{} "), {400}),
    "a length and chunks": (post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), {400, 422}),
    "broken chunks": (post(b"Transfer-Encoding: chunked", body=b"zz\r\n\r\n"), {400}),
    "a large body that waits to be asked for": (post(b"Expect: 100-continue", b"Content-Length: 99999999"), {413}),
    "a body where none is expected": (get(b"/health", b"Content-Type: text/plain", b"Content-Length: 5", body=b"hello"), {200}),
    "HTTP/1.0 without a host": (b"GET /health HTTP/1.0\r\n\r\n", {421}),
    "an asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", {400, 404, 405}),
    "CONNECT": (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", {400, 404, 405}),
}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", RAW)
def test_odd_bytes_on_the_wire_are_answered(port: int, name: str) -> None:
    """What no client library would send; the server goes on."""
    request, expected = RAW[name]

    assert talk(port, request)[0] in expected
    assert talk(port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")[2] == b'{"status":"ok"}'


@pytest.mark.usefixtures("unchanged")
def test_a_client_that_goes_away_in_the_middle_leaves_nothing(port: int) -> None:
    """Half a body is no task."""
    for sent in (b'{"type":"ec', b""):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            head = b"POST /tasks/enqueue HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
            connection.sendall(head + sent)
    assert talk(port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")[0] == 200


def test_every_task_has_its_first_event(api: Tower) -> None:
    """After all this: no task without the event that tells of it, no label without its task."""
    without = Task.select().where(Task.id.not_in(TaskEvent.select(TaskEvent.task_id).where(TaskEvent.seq == 1))).count
    orphans = TaskLabel.select().where(TaskLabel.task_id.not_in(Task.select(Task.id))).count

    assert db.read(lambda: (without(), orphans())) == (0, 0)

"""The log and the files of a trace, read back."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.api.conftest import is_problem, talk
from tests.conftest import Tower
from tower import db, queries, trace
from tower.api import files, traces
from tower.errors import NotFound, Unavailable
from tower.models import Task, TaskEvent

ODD = 'artifacts/out/ü ;".txt'


@pytest.fixture(scope="module")
def traced(api: Tower) -> str:
    """A finished task with some files of its own."""
    script = "mkdir -p out; echo hello; printf 'a\\rb\\n'; echo '<script>' > out/page.html; echo data > out/data.bin"
    payload = {"argv": ["sh", "-c", script], "artifacts": ["out/*"]}
    task_id = api.enqueue("command", payload)
    assert api.wait(task_id)["status"] == "succeeded"
    (api.traced(task_id) / ODD).write_text("ü")
    return task_id


def get(api: Tower, path: str, **headers: str) -> Any:
    return api.client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_the_log_is_the_file_of_the_trace(api: Tower, traced: str) -> None:
    """Whole, as text, and not to be run as a page."""
    answer = get(api, f"/tasks/{traced}/log")

    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert answer.content == (api.settings.trace_dir / traced / "log.txt").read_bytes()
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "hello" in answer.text
    assert answer.headers["content-security-policy"].startswith("sandbox")
    assert answer.headers["content-disposition"] == "inline; filename*=utf-8''log.txt"


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-9", slice(0, 10)),
        ("bytes=5-5", slice(5, 6)),
        ("bytes=10-", slice(10, None)),
        ("bytes=-20", slice(-20, None)),
        ("bytes=-99999999", slice(0, None)),
        ("bytes=3-99999999", slice(3, None)),
    ],
)
def test_a_part_of_the_log_is_answered_with_just_that(api: Tower, traced: str, asked: str, part: slice) -> None:
    """206, and Content-Range says which bytes of how many."""
    whole = get(api, f"/tasks/{traced}/log").content
    answer = get(api, f"/tasks/{traced}/log", range=asked)

    assert (answer.status_code, answer.content) == (206, whole[part])
    first, last, size = map(int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers["content-range"]).groups())  # type: ignore[union-attr]
    assert (whole[first : last + 1], size) == (answer.content, len(whole))


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0", "bytes=99999999-99999999"])
def test_bytes_that_are_not_there_cannot_be_had(api: Tower, traced: str, asked: str) -> None:
    """416 as a problem document that says how many there are."""
    size = len(get(api, f"/tasks/{traced}/log").content)
    answer = get(api, f"/tasks/{traced}/log", range=asked)

    is_problem(answer, 416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{size}"


@pytest.mark.parametrize(
    "asked",
    [
        "lines=1-2",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=5-2",
        "bytes=99999999-1",
        "bytes=0-1,3-4",
        "bytes=²-",
        "bytes=" + "9" * 5000 + "-",
        "x" * 999,
    ],
)
def test_a_range_that_makes_no_sense_is_ignored(api: Tower, traced: str, asked: str) -> None:
    """As RFC 9110 wants: the answer is the whole."""
    answer = api.client.get(f"/tasks/{traced}/log", headers={"range": asked.encode()})

    assert (answer.status_code, answer.content) == (200, (api.settings.trace_dir / traced / "log.txt").read_bytes())


def test_a_range_of_a_file_that_has_changed_is_the_whole_file(api: Tower, traced: str) -> None:
    """If-Range keeps a client from joining halves of two files."""
    etag = get(api, f"/tasks/{traced}/log").headers["etag"]

    assert get(api, f"/tasks/{traced}/log", range="bytes=0-1", if_range=etag).status_code == 206
    assert get(api, f"/tasks/{traced}/log", range="bytes=0-1", if_range='"other"').status_code == 200


def test_a_log_that_is_not_traced_yet_comes_from_the_rows(api: Tower, traced: str) -> None:
    """A server that does not see the trace folder says the same; its size is not known before its end, so it has no ranges."""
    whole = get(api, f"/tasks/{traced}/log").text
    state = api.client.app.state  # type: ignore[attr-defined]
    state.settings = api.settings.model_copy(update={"trace_dir": Path("/nowhere")})
    try:
        answer, part, listed = (
            get(api, f"/tasks/{traced}/{path}", range=asked) for path, asked in (("log", ""), ("log", "bytes=2-5"), ("files", ""))
        )
    finally:
        state.settings = api.settings

    for told in (answer, part):
        assert (told.status_code, told.text, told.headers["content-type"]) == (200, whole, "text/plain; charset=utf-8")
        assert not {"accept-ranges", "content-range", "content-length", "etag"} & {*told.headers}
        assert told.headers["content-security-policy"].startswith("sandbox")
    assert listed.json() == {"files": []}


def test_a_log_whose_folder_lags_behind_is_told_to_its_end(api: Tower) -> None:
    """A task that has ended is asked for its log at once: what the file lacks comes from the rows, and all of it if the file was cut."""
    task_id = api.enqueue("command", {"argv": ["echo", "hello"]})
    api.wait(task_id)
    path = api.traced(task_id) / "log.txt"
    file, last = path.read_text(), db.read(lambda: queries.progress(task_id))[1]
    event = {"task_id": task_id, "seq": last + 1, "at": 0.0, "attempt": 1, "kind": "note", "data": "{}"}
    later = "1970-01-01T00:00:00.000Z [1] ── note\n"

    def lag() -> None:  # and let no sweep catch up
        TaskEvent.insert(**event).execute()
        Task.update(seq=last + 1, trace_due_at=4e9).where(Task.id == task_id).execute()

    db.unit(lag)
    answer, part = get(api, f"/tasks/{task_id}/log"), get(api, f"/tasks/{task_id}/log", range="bytes=-6")
    path.write_text("hell")
    cut = get(api, f"/tasks/{task_id}/log")

    assert "hello" in file
    assert (answer.status_code, answer.text, cut.text) == (200, file + later, file + later)
    assert (part.status_code, part.text) == (206, file[-6:])


def test_a_log_of_the_rows_is_sent_a_few_entries_at_a_time(api: Tower, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be larger than what the server can hold; what comes meanwhile is not part of the answer."""
    task_id = api.enqueue("echo", not_before="2500-01-01T00:00:00Z")
    log_entries, asked = queries.log_entries, []

    def add(count: int) -> None:
        first = db.read(lambda: queries.progress(task_id))[1] + 1
        rows = [{"task_id": task_id, "seq": first + n, "at": 0.0, "attempt": 1, "kind": "note", "data": "{}"} for n in range(count)]
        db.unit(lambda: (TaskEvent.insert_many(rows).execute(), Task.update(seq=first + count - 1).where(Task.id == task_id).execute()))

    def few(task_id: str, after: int, limit: int) -> list[dict[str, Any]]:
        assert 0 < limit <= 16
        if len(asked) == 1:
            add(1)
        asked.append(after)
        return log_entries(task_id, after, limit)

    add(49)
    whole = trace.render_log(db.read(lambda: queries.log_entries(task_id, 0, 50)))
    monkeypatch.setattr(queries, "log_entries", few)
    monkeypatch.setattr(trace, "find_file", no_file)
    answer = get(api, f"/tasks/{task_id}/log")

    assert (answer.status_code, answer.text, answer.text.count("\n")) == (200, whole, 50)
    assert asked == [0, 16, 32, 48]
    api.client.post(f"/tasks/{task_id}/cancel")


def no_file(*_: Any) -> Path:
    raise NotFound("It is not traced yet.", code="file_not_found")


@pytest.mark.parametrize("path", ["log?follow=true", "log", "files", "files/log.txt", "events"])
def test_what_is_below_a_task_is_answered_without_reading_it_whole(
    api: Tower, traced: str, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A follower looks twice a second: payload, result and the workers are not read for that."""
    monkeypatch.delattr(queries, "task")
    monkeypatch.delattr(queries, "live_workers")

    assert get(api, f"/tasks/{traced}/{path}").status_code == 200


def test_a_log_that_grows_while_it_is_sent_is_answered_as_it_was(api: Tower, traced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More bytes than Content-Length says would break the connection."""
    path = api.settings.trace_dir / traced / "log.txt"
    before = path.read_bytes()
    pieces = files._pieces

    def pieces_of_more(*args: Any) -> Any:
        with path.open("ab") as file:
            file.write(b"more")
        return pieces(*args)

    monkeypatch.setattr(files, "_pieces", pieces_of_more)
    answer = get(api, f"/tasks/{traced}/log")
    grown = path.read_bytes()
    path.write_bytes(before)

    assert (answer.content, grown) == (before, before + b"more")


def stream(text: str) -> list[tuple[str, str, str | None]]:
    """Return the event, data and id of each server-sent event."""
    found = []
    for block in filter(None, text.split("\n\n")):
        lines = [line.partition(": ") for line in block.split("\n")]
        fields = {name: value for name, _, value in lines if name in ("event", "id")}
        data = "\n".join(value for name, _, value in lines if name == "data")
        found.append((fields.get("event", ""), data, fields.get("id")))
    return found


def test_a_finished_log_is_streamed_whole_and_ends(api: Tower, traced: str) -> None:
    """The data of all events is the log; the last event says how the task ended."""
    answer = get(api, f"/tasks/{traced}/log?follow=true")
    *lines, end = stream(answer.text)

    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert end == ("end", '{"status": "succeeded"}', None)
    assert {event for event, _, _ in lines} == {"log"}
    log = get(api, f"/tasks/{traced}/log").text
    assert "".join(data + "\n" for _, data, _ in lines) == log.replace("\r", "\n")


def test_a_stream_goes_on_after_the_last_event_that_was_seen(api: Tower, traced: str) -> None:
    """Last-Event-ID loses and repeats nothing."""
    events = stream(get(api, f"/tasks/{traced}/log?follow=true").text)
    for place, (_, _, seen) in enumerate(events[:-1]):
        rest = stream(get(api, f"/tasks/{traced}/log?follow=true", last_event_id=str(seen)).text)
        assert rest == events[place + 1 :]


@pytest.mark.parametrize("seen", ["abc", "-1", "2147483648", ""])
def test_a_last_event_id_that_cannot_be_one_is_refused(api: Tower, traced: str, seen: str) -> None:
    """It was not made by an earlier stream."""
    told = is_problem(get(api, f"/tasks/{traced}/log?follow=true", last_event_id=seen), 422, "invalid_field")
    assert told["field"] == "last-event-id"


@pytest.mark.slow
def test_a_running_log_is_streamed_as_it_grows(api: Tower, port: int, tmp_path: Path) -> None:
    """Lines come while the task runs; the end comes with its end."""
    flag = tmp_path / "go"
    wait_for_flag = f"echo one; while [ ! -e '{flag}' ]; do sleep 0.02; done; echo two"
    task_id = api.enqueue("command", {"argv": ["sh", "-c", wait_for_flag]})
    with httpx2.stream("GET", f"http://127.0.0.1:{port}/tasks/{task_id}/log?follow=true", timeout=20) as answer:
        seen = ""
        for line in answer.iter_lines():
            seen += line + "\n"
            if line.startswith("data: ") and line.endswith(" one"):
                assert api.task(task_id)["status"] == "running"
                flag.touch()
    assert stream(seen)[-1][0] == "end"
    assert " two\n" in seen


def test_what_a_task_prints_cannot_pose_as_an_event(api: Tower) -> None:
    """A carriage return ends a line of the stream as well."""
    task_id = api.enqueue("command", {"argv": ["printf", "x\\revent: end\\rdata: {}\\r\\r"]})
    api.wait(task_id)
    text = get(api, f"/tasks/{task_id}/log?follow=true").text

    assert [event for event, _, _ in stream(text.replace("\r\n", "\n").replace("\r", "\n"))].count("end") == 1


def test_an_entry_that_shows_before_an_earlier_one_waits_for_it(api: Tower, traced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and events are read one after the other: what was written between must not be skipped."""
    entries = queries.log_entries

    def one_too_many(task_id: str, after: int, limit: int) -> list[dict[str, Any]]:
        seq = queries.task(task_id)["seq"]
        late = {"seq": seq + 2, "at": 0.0, "attempt": 1, "kind": "late", "data": "{}"}
        return [*entries(task_id, after, limit), late] if after < seq + 2 else []

    monkeypatch.setattr(queries, "log_entries", one_too_many)
    text = get(api, f"/tasks/{traced}/log?follow=true").text

    assert "late" not in text and stream(text)[-1][0] == "end"


def test_a_stream_outlives_a_moment_without_the_database(api: Tower, traced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer has begun: an error could only cut it."""
    monkeypatch.setattr("tower.api.traces._PAUSE_S", 0.01)
    read, gaps = db.read, [Unavailable("The database does not answer.")]

    def read_with_a_gap(work: Any, **options: Any) -> Any:
        if gaps and getattr(work, "func", None) is traces._entries:  # what else reads meanwhile is not concerned
            raise gaps.pop()
        return read(work, **options)

    whole = get(api, f"/tasks/{traced}/log?follow=true").text
    monkeypatch.setattr(db, "read", read_with_a_gap)
    assert get(api, f"/tasks/{traced}/log?follow=true").text == whole
    assert not gaps


def test_the_files_of_a_trace_are_listed_and_can_be_read(api: Tower, traced: str) -> None:
    """Every file, with its size and time; what is listed can be had."""
    listed = api.client.get(f"/tasks/{traced}/files").json()["files"]

    paths = [file["path"] for file in listed]
    own = ["artifacts/out/data.bin", "artifacts/out/page.html", ODD]
    assert sorted(paths) == sorted(["events.jsonl", "input.json", "log.txt", "output.json", *own])
    for file in listed:
        answer = api.client.get(f"/tasks/{traced}/files/{file['path']}")
        assert (answer.status_code, len(answer.content)) == (200, file["size"])
        assert answer.content == (api.settings.trace_dir / traced / file["path"]).read_bytes()
    assert json.loads(api.client.get(f"/tasks/{traced}/files/output.json").content)["status"] == "succeeded"


@pytest.mark.parametrize(
    ("path", "media_type", "disposition"),
    [
        ("output.json", "application/json", "inline; filename*=utf-8''output.json"),
        ("events.jsonl", "text/plain; charset=utf-8", "inline; filename*=utf-8''events.jsonl"),
        ("artifacts/out/page.html", "application/octet-stream", "attachment; filename*=utf-8''page.html"),
        ("artifacts/out/data.bin", "application/octet-stream", "attachment; filename*=utf-8''data.bin"),
        (ODD, "text/plain; charset=utf-8", "inline; filename*=utf-8''%C3%BC%20%3B%22.txt"),
    ],
)
def test_nothing_a_task_wrote_runs_in_a_browser(api: Tower, traced: str, path: str, media_type: str, disposition: str) -> None:
    """Text and pictures are shown in a sandbox, the rest is downloaded."""
    answer = api.client.get(f"/tasks/{traced}/files/{path}")

    assert (answer.headers["content-type"], answer.headers["content-disposition"]) == (media_type, disposition)
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_files_have_ranges_too(api: Tower, traced: str) -> None:
    """A large artifact can be fetched in parts."""
    answer = get(api, f"/tasks/{traced}/files/artifacts/out/data.bin", range="bytes=1-2")

    assert (answer.status_code, answer.content, answer.headers["content-range"]) == (206, b"at", "bytes 1-2/5")


def test_an_empty_file_is_answered(api: Tower, traced: str) -> None:
    """It has no ranges."""
    (api.settings.trace_dir / traced / "empty.txt").touch()

    assert (get(api, f"/tasks/{traced}/files/empty.txt").status_code, get(api, f"/tasks/{traced}/files/empty.txt").content) == (200, b"")
    assert get(api, f"/tasks/{traced}/files/empty.txt", range="bytes=0-").status_code == 416
    (api.settings.trace_dir / traced / "empty.txt").unlink()


@pytest.fixture(scope="module")
def trapped(api: Tower, traced: str) -> Iterator[str]:
    """The same task, its folder full of traps; a secret lies beside it."""
    folder = api.settings.trace_dir / traced
    (folder.parent / "secret.txt").write_text("SECRET")
    (folder / ".hidden").write_text("SECRET")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("SECRET")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "up").symlink_to(folder.parent)
    (folder / "loop").symlink_to("loop")
    (folder / "inside.txt").symlink_to("log.txt")
    os.mkfifo(folder / "pipe")
    (folder / os.fsdecode(b"\xff\xfe.txt")).write_text("SECRET")
    yield traced
    for name in ("link.txt", "up", "loop", "inside.txt", "pipe", ".hidden", ".git/config", os.fsdecode(b"\xff\xfe.txt")):
        (folder / name).unlink()
    (folder / ".git").rmdir()


def test_only_plain_files_with_plain_names_are_listed(api: Tower, trapped: str) -> None:
    """No hidden file, link, pipe, or name that is not text."""
    answer = api.client.get(f"/tasks/{trapped}/files")

    assert answer.status_code == 200
    assert not [
        file["path"]
        for file in answer.json()["files"]
        if not re.match(r"artifacts/|(input|output)\.json|log\.txt|events\.jsonl", file["path"])
    ]


#: Bytes that are not UTF-8.
NO_TEXT = ("%ff", "%ed")


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "%2e%2e%2fsecret.txt",
        "..%252fsecret.txt",
        "..\\secret.txt",
        "..%5csecret.txt",
        "artifacts/../../secret.txt",
        "artifacts/%2e%2e/%2e%2e/secret.txt",
        "./log.txt",
        "%2e/log.txt",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "//etc/passwd",
        "file:///etc/passwd",
        "~root/.profile",
        ".hidden",
        ".git/config",
        "%2ehidden",
        "link.txt",
        "up/secret.txt",
        "up",
        "loop",
        "loop/x",
        "inside.txt",
        "pipe",
        "artifacts",
        "artifacts/",
        "artifacts/out",
        "log.txt/",
        "log.txt/x",
        "log.txt%00",
        "%00",
        "log.txt%00.png",
        "%ff%fe.txt",
        "%ed%a0%80",
        "log.txt%20",
        "LOG.TXT",
        "a" * 300,
        "ü" * 200,
        "a/" * 3000 + "a",
        "a" * 50_000,
        "nothing",
        " ",
        "%0d%0aset-cookie:x=y",
        "*",
        "?",
    ],
)
def test_no_path_leads_out_of_the_folder(api: Tower, port: int, trapped: str, path: str) -> None:
    """Whatever is asked for, and however it is written: there is no such file. Sent as it is: a client would resolve `..` itself."""
    target = f"/tasks/{trapped}/files/{path}".replace(" ", "%20").replace("ü", "%C3%BC")
    status, headers, body = talk(port, f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())

    assert (status, headers["content-type"]) == (400 if path.startswith(NO_TEXT) else 404, "application/problem+json"), body
    assert b"SECRET" not in body and b"root:" not in body
    assert len(body) < 2000


def test_a_folder_that_is_a_link_is_no_trace(api: Tower) -> None:
    """The task's folder itself is checked as well."""
    task_id = api.enqueue("echo")
    folder = api.traced(task_id)
    real = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(real)

    assert api.client.get(f"/tasks/{task_id}/files").json() == {"files": []}
    is_problem(api.client.get(f"/tasks/{task_id}/files/input.json"), 404, "file_not_found")
    folder.unlink()
    real.rename(folder)


def test_a_file_replaced_while_it_is_listed_does_no_harm(api: Tower, traced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace actor writes beside and renames: a name may be gone a moment later."""
    walk = os.walk

    def walk_with_a_ghost(*args: Any, **more: Any) -> Any:
        for folder, folders, names in walk(*args, **more):
            yield folder, folders, [*names, "ghost.txt"]

    monkeypatch.setattr(trace.os, "walk", walk_with_a_ghost)
    answer = api.client.get(f"/tasks/{traced}/files")

    assert answer.status_code == 200
    assert "ghost.txt" not in answer.text

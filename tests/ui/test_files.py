"""What a task left, shown: files as what they are, logs line by line, colours, and the files of the pages themselves."""

import os
import re
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests import rows as r
from tests.ui.pages import ended, log_in
from tower import db, leases, queries
from tower.errors import Unavailable
from tower.settings import Settings
from tower.terms import ADMIN, VIEWER
from tower.ui import log
from tower.ui.ansi import coloured, plain


def test_files_that_pages_load_are_kept_by_the_browser(client: TestClient) -> None:
    """For good under the address that a page names, and asked for again where a script names another."""
    page = client.get("/login")
    assert page.status_code == 200
    log_in(client, VIEWER)
    place = re.search(r'href="(/ui/static/app.css\?[0-9a-f]{12})"', client.get("/").text)
    assert place
    answer = client.get(place[1])
    assert "immutable" in answer.headers["cache-control"] and answer.headers["content-type"].startswith("text/css")
    script = client.get("/ui/static/times.js")
    assert (script.headers["cache-control"], script.headers["content-type"].partition(";")[0]) == ("no-cache", "text/javascript")
    assert client.get("/ui/static/times.js", headers={"if-none-match": script.headers["etag"]}).status_code == 304
    assert client.get("/ui/static/..%2fpage.py").status_code == 404
    weight = sum(
        len(client.get(f"/ui/static/{name}").content)
        for name in ("app.css", "app.js", "live.js", "keys.js", "log.js", "times.js", "request.js", "icon.svg")
    )
    assert weight + len(client.get("/").content) < 100_000


def test_a_page_allows_nothing_inline(client: TestClient) -> None:
    """Its policy says so, and it holds no script, style or handler that would need it."""
    ended("failed")
    log_in(client, ADMIN)
    for place in ("/", "/ui/tasks", "/ui/new", "/ui/fleet", "/ui/keys", "/ui/nothing"):
        answer = client.get(place, headers={"accept": "text/html"})
        if place != "/ui/nothing":
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
        assert not re.search(r"<style|<script(?! type=\"module\" src=)| style=| on[a-z]+=", answer.text)


def test_a_folder_is_one_file(client: TestClient, settings_of_pages: Settings) -> None:
    """A tar with all that the task left."""
    task_id = ended()
    folder = settings_of_pages.trace_dir / task_id
    (folder / "artifacts").mkdir(parents=True)
    (folder / "log.txt").write_text("one\n")
    (folder / "artifacts" / "grüße.txt").write_bytes(b"x" * 1000)
    log_in(client, VIEWER)
    answer = client.get(f"/ui/tasks/{task_id}/trace.tar")
    with tarfile.open(fileobj=BytesIO(answer.content)) as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert found == {f"{task_id}/log.txt": b"one\n", f"{task_id}/artifacts/grüße.txt": b"x" * 1000}


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("a.md", "# Hi <b>x</b> [y](javascript:alert(1))", "<h1>Hi &lt;b&gt;x&lt;/b&gt;"),
        ("a.csv", "a,b\n<i>,2\n", "<td>&lt;i&gt;</td><td>2</td>"),
        ("a.json", '{"a":[1]}', "&#34;a&#34;: [\n    1\n  ]"),
        ("a.json", "{", "<pre tabindex=\"0\">{</pre>"),
        ("a.diff", "+new\n-old\n", 'class="d-added">+new'),
        ("a.png", "no picture", '<img class="picture" src="/tasks/'),
        ("a.svg", "<svg onload=x>", "&lt;svg onload=x&gt;"),
        ("a.bin", "\x00", "It is not text"),
        ("a.txt", "", "It is empty."),
    ],
)  # fmt: skip
def test_a_file_is_shown_as_what_it_is(client: TestClient, settings_of_pages: Settings, name: str, content: str, shown: str) -> None:
    """And nothing in it is run."""
    task_id = ended()
    (settings_of_pages.trace_dir / task_id / "artifacts").mkdir(parents=True)
    (settings_of_pages.trace_dir / task_id / "artifacts" / name).write_text(content)
    log_in(client, VIEWER)
    text = client.get(f"/ui/tasks/{task_id}/files/artifacts/{name}").text
    assert shown in text
    assert 'href="javascript:' not in text and "<svg onload" not in text


@examples(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=300), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=3),
    first=st.integers(1, 70),
    count=st.integers(1, 70),
)
def test_any_lines_of_a_log_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], cuts: list[int], first: int, count: int
) -> None:
    """However long its lines are, wherever its blocks end, and however it has grown."""
    monkeypatch.setattr(log, "_BLOCK", 64)
    monkeypatch.setattr(queries, "log_entries", lambda *asked: [])
    monkeypatch.setattr(log.trace, "find_file", lambda root, task_id, name: path)
    path = tmp_path / f"{os.urandom(8).hex()}.txt"
    whole = "".join(text + "\n" for text in texts)
    for end in (*sorted(cuts), len(texts)):
        path.write_text("".join(text + "\n" for text in texts[:end]))
        row = {"id": "x", "traced_bytes": path.stat().st_size, "traced_seq": 1, "seq": 1}
        found = log.Log(tmp_path, row)
        try:
            assert found.count == min(end, len(texts))
            assert [line.text for line in found.lines(first, count)] == texts[:end][first - 1 : first - 1 + count]
        finally:
            found.close()
    assert path.read_text() == whole


def test_a_log_goes_on_behind_its_file(rows: Settings) -> None:
    """What the rows know and the file does not yet is shown behind it; without a file the rows tell everything."""
    claim = r.running()
    db.unit(lambda: leases.append_log(claim, 0, "2031-05-01T08:00:00.000Z [1] \x1b[31mone\x1b[0m\n"))
    row = db.read(lambda: queries.task(claim.id))
    window = log.window(db.read(lambda: log.Log(rows.trace_dir, row)), None, 10)
    assert [str(line["text"]) for line in window["lines"]][-1] == '<span class="a-f1">one</span>'
    assert window["count"] == 4
    folder = rows.trace_dir / claim.id
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("traced 1\ntraced 2\nhalf a")
    behind = {**row, "traced_bytes": 18, "traced_seq": row["seq"] - 1}
    shown = db.read(lambda: log.Log(rows.trace_dir, behind))
    window = log.window(shown, 1, 10)
    assert [str(line["text"]) for line in window["lines"]] == ["traced 1", "traced 2", '<span class="a-f1">one</span>']
    assert [hit["number"] for hit in log.search(shown, "ONE", 1)["hits"]] == [3]
    shown.close()


def test_a_log_is_known_by_its_task_whoever_looked_before(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a number of the disk that another file had, nor further than whoever looks may see."""
    monkeypatch.setattr(log, "_BLOCK", 64)
    first, second = ended(), ended()
    for task_id, lines in ((first, 500), (second, 30)):
        path = rows.trace_dir / task_id / "log.txt"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"line {number}\n" for number in range(lines)))
    row = {**r.row(first), "traced_seq": 99, "traced_bytes": 10_000}
    whole, early = log.Log(rows.trace_dir, row), log.Log(rows.trace_dir, {**row, "traced_bytes": 70})
    assert (whole.count, early.count) == (500, 10)
    assert [line.text for line in early.lines(9, 5)] == ["line 8", "line 9"]
    whole.close()
    early.close()
    with monkeypatch.context() as patch:  # as when the first is gone and the disk gives its number to the next
        known = os.fstat(os.open(rows.trace_dir / first / "log.txt", os.O_RDONLY))
        patch.setattr(log.os, "fstat", lambda file: known)
        other = log.Log(rows.trace_dir, {**r.row(second), "traced_seq": 99, "traced_bytes": 10 + 20 * 8 + 60})
        assert [line.text for line in other.lines(28, 9)] == ["line 27", "line 28", "line 29"]
        other.close()


def test_a_search_takes_a_second_and_says_where_to_go_on(rows: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than two search at once."""
    task_id = ended()
    path = rows.trace_dir / task_id / "log.txt"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"line {number} \x1b[31mfoo\x1b[0mbar\n" for number in range(50)))
    shown = log.Log(rows.trace_dir, {**r.row(task_id), "traced_seq": 99, "traced_bytes": 1_000_000})
    assert len(log.search(shown, "FOOBAR", 1)["hits"]) == 50
    monkeypatch.setattr(log, "_SEARCHED", 10)
    monkeypatch.setattr(log, "_SEARCH_S", 0.0)
    assert log.search(shown, "line 49", 1) == {"hits": [], "following": 11}
    assert [hit["number"] for hit in log.search(shown, "line 49", 41)["hits"]] == [50]
    for _ in range(log._SEARCHES):
        log._searching.acquire()
    with pytest.raises(Unavailable, match="Others search"):
        log.search(shown, "x", 1)
    for _ in range(log._SEARCHES):
        log._searching.release()
    shown.close()


@pytest.mark.parametrize(
    ("line", "html"),
    [
        ("a <b> & c", "a &lt;b&gt; &amp; c"),
        ("\x1b[1;31mred\x1b[0m plain", '<span class="a-b a-f1">red</span> plain'),
        ("\x1b[38;5;196mx\x1b[39my", '<span class="a-f1">x</span>y'),
        ("\x1b[48;2;0;170;0mx", '<span class="a-g2">x</span>'),
        ("\x1b[92mx", '<span class="a-f10">x</span>'),
        ("\x1b]0;title\x07x\x1b[2Jy\x1b[", "xy"),
        ("a\x00b\u202ec", "a�b�c"),
        ("\x1b[999999999999999999mx\x1b[38;5mx", "xx"),
    ],
)
def test_colours_are_classes_and_nothing_else_of_a_line_acts(line: str, html: str) -> None:
    assert str(coloured(line)) == html


@given(st.text())
def test_no_line_makes_an_element_of_its_own(line: str) -> None:
    """Whatever it holds."""
    assert re.sub(r'<span class="[a-z0-9 -]+">|</span>', "", str(coloured(line))).count("<") == 0
    assert "\x1b" not in plain(line)

"""The pages as the server makes them: who is offered what, forms from elsewhere, limits, filters, and what each part is made of."""

import json
import os
import re
import tarfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from dramatiq.brokers.stub import StubBroker
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from actors.handlers import load
from tests import rows as r
from tests.api.conftest import bare_app
from tests.conftest import BASE, LOCAL
from tower import db, keys, leases, lifecycle, overview, queries, rules, views
from tower.api.access import RULES
from tower.errors import InvalidTask, Unavailable
from tower.handler import Registry
from tower.keys import ADMIN, ANONYMOUS, OPERATOR, ROLES, VIEWER, Caller
from tower.lifecycle import Outcome
from tower.models import SavedView, Task, new_id
from tower.queries import Filter
from tower.settings import Settings
from tower.ui import log, schema
from tower.ui.ansi import coloured, plain
from tower.ui.charts import phases
from tower.ui.forms import Fields

KEY = "a-bootstrap-key-for-tests"
SAME = {"origin": BASE}


@pytest.fixture
def settings_of_pages(rows: Settings) -> Settings:
    return rows.model_copy(update={"anonymous": "nobody", "bootstrap_key": Settings(bootstrap_key=KEY).bootstrap_key})


@pytest.fixture
def registry() -> Registry:
    return load()


@pytest.fixture
def app(settings_of_pages: Settings, registry: Registry) -> FastAPI:
    broker = StubBroker()
    for name in ("orchestrate", "trace"):
        broker.declare_queue(name)
    return bare_app(settings_of_pages, registry, broker)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    yield TestClient(app, base_url=BASE, client=LOCAL, follow_redirects=False)


def log_in(client: TestClient, role: str, **limits: Any) -> str:
    """Begin a session of a new key, and return the token of its forms."""
    key = db.unit(lambda: keys.create(f"the {role}", role, **limits))[1]
    client.cookies.clear()
    assert client.post("/login", data={"key": key}).status_code == 303
    return str(client.get("/me").json()["csrf_token"])


def ended(status: str = "succeeded", **fields: Any) -> str:
    claim = r.running(**fields)
    error = None if status == "succeeded" else {"code": "handler_error", "message": "It broke."}
    db.unit(lambda: lifecycle.finish(claim, Outcome(status, result="{}", error=error), "t"))
    return claim.id


def _rule(path: str, method: str) -> str | None:
    for known, methods in RULES.items():
        pattern = re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(known).replace(":path", ""))
        if re.fullmatch(pattern, path) and method in methods:
            return methods[method]
    return None


@pytest.mark.parametrize("role", ROLES)
def test_nobody_is_offered_what_he_may_not_do(client: TestClient, role: str) -> None:
    """Every form and link of every page leads where its reader may go."""
    waiting, broken = r.insert(title="waits"), ended("failed")
    db.unit(lambda: keys.create("other", VIEWER))
    log_in(client, role)
    places = [path for path, methods in RULES.items() if path.startswith("/ui/") and "GET" in methods and "{" not in path]
    looked = 0
    for place in ("/", *places, f"/ui/tasks/{waiting}", f"/ui/tasks/{broken}", f"/ui/tasks/{waiting}/log", "/ui/tasks?view=board"):
        answer = client.get(place)
        needed = _rule(place.partition("?")[0], "GET")
        assert needed is not None
        if needed != "public" and ROLES.index(role) < ROLES.index(needed):
            assert answer.status_code == 403
            continue
        assert answer.status_code == 200, place
        found = [("POST", action) for action in re.findall(r'method="post" action="([^"?]*)', answer.text)]
        found += [("GET", link) for link in re.findall(r'<a [^>]*href="(/[^"?#]*)', answer.text)]
        for method, path in found:
            rule = _rule(path, method)
            assert rule is not None, f"{place} leads to {method} {path}, which is nowhere"
            assert rule == "public" or ROLES.index(role) >= ROLES.index(rule), f"{place} offers {method} {path} to a {role}"
        looked += len(found)
    assert looked > 50


FORMS = sorted(path for path, methods in RULES.items() if path.startswith("/ui/") and "POST" in methods and path != "/ui/theme")


@pytest.mark.parametrize("path", FORMS)
def test_a_form_from_elsewhere_does_nothing(client: TestClient, path: str) -> None:
    """Without the token of its session, or, where nobody needs a key, without an origin that is ours."""
    path = path.replace("{task_id}", r.insert()).replace("{key_id}", db.unit(lambda: keys.create("x", VIEWER))[0]["id"])
    log_in(client, ADMIN)
    before = _everything()
    sent = {"do": "pause", "kind": "tower", "type": "echo", "payload": "{}", "name": "x", "role": "viewer", "id": "x"}
    for token in ("", "0" * 64):
        answer = client.post(path, data={**sent, "csrf_token": token}, headers=SAME)
        assert (answer.status_code, "<code>csrf_token</code>" in answer.text) == (403, True)
    assert client.post(path, data=sent, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post(path, json=sent, headers=SAME).status_code in (403, 415)
    assert _everything() == before


@pytest.mark.parametrize(
    "place", ["//evil.example", "https://evil.example", "/\\evil.example", "/ok\r\nset-cookie: a=b", "evil", "javascript:alert(1)"]
)
def test_no_form_leads_elsewhere(client: TestClient, place: str) -> None:
    """By where it says to go on."""
    task_id = r.insert()
    token = log_in(client, OPERATOR)
    answer = client.post(f"/ui/tasks/{task_id}/cancel", data={"csrf_token": token, "next": place}, headers=SAME)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/tasks/{task_id}")
    answer = client.post("/ui/theme", data={"theme": "dark", "next": place}, headers=SAME)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_where_nobody_needs_a_key_a_form_still_says_where_it_comes_from(settings_of_pages: Settings, registry: Registry) -> None:
    """A browser always does; what does not is no browser's form."""
    app = bare_app(settings_of_pages.model_copy(update={"anonymous": "loopback"}), registry, StubBroker())
    client = TestClient(app, base_url=BASE, client=LOCAL, follow_redirects=False)
    sent = {"type": "echo", "payload": '{"a": 1}'}
    assert client.post("/ui/new", data=sent).status_code == 403
    assert client.post("/ui/new", data=sent, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.post("/ui/new", data=sent, headers=SAME).status_code == 303


def _everything() -> str:
    tables = ("task", "rule", "api_key", "saved_view")
    names = {"api_key": "id, name, revoked_at"}
    return repr([db.read(lambda table=table: db.rows(f"SELECT {names.get(table, '*')} FROM {table} ORDER BY 1")) for table in tables])


def test_a_limited_key_sees_and_changes_only_its_tasks(client: TestClient) -> None:
    """On the first page, in lists, trees and counts, and by every button."""
    mine = r.insert(title="mine indeed", labels={"team": "a"})
    other = r.insert(title="of others", labels={"team": "b"}, correlation_id=mine)
    broken = ended("failed", title="of others too", labels={"team": "b"})
    token = log_in(client, OPERATOR, labels={"team": "a"})
    for place in ("/", "/ui/tasks", "/ui/tasks?view=board", f"/ui/tasks/{mine}"):
        text = client.get(place).text
        assert "mine indeed" in text and "of others" not in text, place
    assert [found["name"] for found in client.get("/ui/find?text=e").json()] == ["mine indeed"]
    assert client.get(f"/ui/tasks/{other}").status_code == 404
    assert client.get(f"/ui/new?from={other}").status_code == 404
    for path in (f"/ui/tasks/{other}/cancel", f"/ui/tasks/{broken}/retry"):
        assert client.post(path, data={"csrf_token": token}, headers=SAME).status_code == 404
    sent = {"csrf_token": token, "do": "cancel", "id": [mine, other], "confirmed": "yes"}
    assert client.post("/ui/many", data=sent, headers=SAME).headers["location"].endswith("said=cancel-1")
    assert (r.row(mine)["status"], r.row(other)["status"]) == ("cancelled", "queued")
    new = {"csrf_token": token, "type": "echo", "payload": "{}", "labels": "team:b"}
    assert client.post("/ui/new", data=new, headers=SAME).status_code == 403
    assert client.post("/ui/pauses", data={"csrf_token": token, "kind": "tower", "do": "pause"}, headers=SAME).status_code == 403


@pytest.mark.parametrize(
    ("path", "status", "told"), [("/ui/keys", 403, "You may not do this"), ("/nowhere", 404, "There is no such thing")]
)
def test_whoever_looks_is_refused_with_a_page_and_a_program_with_a_problem(client: TestClient, path: str, status: int, told: str) -> None:
    """By what is asked for."""
    log_in(client, VIEWER)
    page, answer = client.get(path, headers={"accept": "text/html,*/*"}), client.get(path)
    assert (page.status_code, answer.status_code) == (status, status)
    assert told in page.text and "the viewer" in page.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/tasks/none", headers={"accept": "text/html"}).headers["content-type"] == "application/problem+json"


def test_a_form_that_cannot_be_taken_says_so_on_a_page_and_leads_back(client: TestClient) -> None:
    """Or to the login, once the session is over."""
    task_id, html = ended(), {**SAME, "accept": "text/html"}
    token = log_in(client, VIEWER)
    for path, back in ((f"/ui/tasks/{task_id}/retry", f"/ui/tasks/{task_id}"), ("/ui/many", "/ui/tasks"), ("/ui/limits", "/ui/fleet")):
        answer = client.post(path, data={"csrf_token": token}, headers=html)
        assert answer.status_code == 403
        assert "You may not do this" in answer.text and f'<a href="{back}">' in answer.text
    client.cookies.clear()
    answer = client.post(f"/ui/tasks/{task_id}/retry", data={"csrf_token": token}, headers=html)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next=/ui/tasks/{task_id}")


@pytest.mark.parametrize(
    ("path", "sent", "told"),
    [
        ("/ui/limits", {"kind": "key", "name": "a" * 256, "max_running": "1"}, "1 to 255 characters"),
        ("/ui/limits", {"kind": "key", "name": "", "max_running": "1"}, "1 to 255 characters"),
        ("/ui/limits", {"kind": "key", "name": "a", "max_running": "2.7"}, "not a whole number"),
        ("/ui/limits", {"kind": "key", "name": "a", "max_running": "inf"}, "not a number"),
        ("/ui/limits", {"kind": "rate", "name": "a", "max_running": "1", "per_s": "nan"}, "not a number"),
        ("/ui/limits", {"kind": "key", "name": "a", "max_running": "9" * 5000}, "payload|max_running"),
        ("/ui/pauses", {"kind": "key", "name": "a\nb", "do": "pause"}, "on one line"),
        ("/ui/pauses", {"kind": "key", "name": "a\x00", "do": "pause"}, "NUL"),
        ("/ui/new", {"type": "echo", "payload": '{"a": "\\ud800"}'}, "payload"),
        ("/ui/new", {"type": "echo", "payload": '{"a": 1, "a": 2}'}, "payload"),
        ("/ui/new", {"type": "echo", "payload": '{"a": 99999999999999999999}'}, "payload"),
    ],
)
def test_a_form_takes_only_what_the_api_takes(client: TestClient, path: str, sent: dict[str, str], told: str) -> None:
    """And nothing of it is kept."""
    token, before = log_in(client, ADMIN), _everything()
    answer = client.post(path, data={**sent, "csrf_token": token}, headers=SAME)
    assert answer.status_code == 422, answer.text
    assert re.search(told, answer.text)
    assert _everything() == before


def test_a_name_beside_the_tower_means_nothing(client: TestClient) -> None:
    """A rule of the tower has none."""
    token = log_in(client, ADMIN)
    client.post("/ui/pauses", data={"csrf_token": token, "kind": "tower", "name": "oops", "do": "pause"}, headers=SAME)
    assert [(rule["kind"], rule["name"]) for rule in db.read(rules.listed)] == [("tower", "")]


@pytest.mark.parametrize(
    "place",
    [
        *("/?a=%00", "/ui/tasks?correlation_id=%00", "/ui/tasks?label=a:%00", "/ui/audit?cursor=%00", "/ui/new?from=%00"),
        *("/ui/tasks/%00", "/ui/tasks/%00/log", "/ui/tasks/%00/trace.tar", "/ui/tasks?label=" + ",".join(["a:b"] * 1500)),
    ],
)
def test_an_address_that_cannot_be_is_refused_in_words(client: TestClient, place: str) -> None:
    """Not by the database."""
    log_in(client, ADMIN)
    answer = client.get(place, headers={"accept": "text/html"})
    assert answer.status_code == 422, answer.text
    assert "That cannot be used" in answer.text


def test_a_limited_operator_is_not_offered_what_is_about_all(client: TestClient) -> None:
    """Nor would it be taken."""
    log_in(client, OPERATOR, types=["echo"])
    for place in ("/ui/fleet", "/ui/handlers"):
        assert "/ui/pauses" not in client.get(place).text
    log_in(client, OPERATOR)
    for place in ("/ui/fleet", "/ui/handlers"):
        assert "/ui/pauses" in client.get(place).text


def test_a_button_leads_to_a_record(client: TestClient) -> None:
    """Who pressed what is in the audit, by the name of the key."""
    task_id = r.insert()
    token = log_in(client, ADMIN)
    for path, sent in (
        (f"/ui/tasks/{task_id}/cancel", {}),
        ("/ui/pauses", {"kind": "queue", "name": "default", "do": "pause", "reason": "release"}),
        ("/ui/limits", {"kind": "key", "name": "repo", "max_running": "3"}),
        ("/ui/keys", {"name": "ci", "role": "operator", "days": "7"}),
    ):
        assert client.post(path, data={**sent, "csrf_token": token}, headers=SAME).status_code in (201, 303), path
    text = client.get("/ui/audit").text
    for told in ("the admin", "cancel", task_id, "queue default", "key repo: 3", "make key"):
        assert told in text
    key = re.search(
        r"twr_[0-9a-f]{10}_[A-Za-z0-9_-]{43}",
        client.post("/ui/keys", data={"csrf_token": token, "name": "x", "role": "viewer"}, headers=SAME).text,
    )
    assert key and key[0] not in client.get("/ui/keys").text + client.get("/ui/audit").text


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ({"type": "sleep", "payload.seconds": "soon"}, "is not a number"),
        ({"type": "sleep", "payload.seconds": "-1"}, "greater than or equal to 0"),
        ({"type": "sleep"}, "Field required"),
        ({"type": "echo", "payload": "{"}, "is not JSON"),
        ({"type": "echo", "payload": "[1]"}, "is a JSON object"),
        ({"type": "echo", "labels": "nothing"}, "has no colon"),
        ({"type": "echo", "not_before": "tomorrow"}, "as in 2031-05-01T08:00:00Z"),
        ({"type": "echo", "priority": "1.5"}, "priority"),
        ({"type": "nothing"}, "No handler for type"),
    ],
)
def test_a_form_that_cannot_be_is_shown_again_with_what_is_wrong(client: TestClient, sent: dict[str, str], told: str) -> None:
    """And with what was typed."""
    token = log_in(client, OPERATOR)
    answer = client.post("/ui/new", data={**sent, "title": "typed before", "csrf_token": token}, headers=SAME)
    assert answer.status_code == 422
    assert told in answer.text
    assert sent["type"] == "nothing" or "typed before" in answer.text
    assert db.read(lambda: Task.select().count()) == 0


def test_the_filter_is_the_address(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """By status, type, label, text, time and worker; a search goes only so far at once, and says how to go on."""
    first = r.insert(title="the first of all", labels={"team": "a"})
    later = [r.insert(title=f"later {number}") for number in range(5)]
    log_in(client, VIEWER)
    for query, titles in (
        ("status=queued&label=team:a", {"the first of all"}),
        ("text=LATER+3", {"later 3"}),
        (
            "text=" + first[:20],
            {"the first of all"} | {f"later {number}" for number in range(5)} if first[:20] == later[0][:20] else {"the first of all"},
        ),
        ("status=failed", set()),
        ("worker=nobody", set()),
        ("after=2020-01-01T00:00&before=2020-02-01", set()),
        ("type=echo&after=2020-01-01", {"the first of all"} | {f"later {number}" for number in range(5)}),
    ):
        text = client.get(f"/ui/tasks?{query}").text
        assert {title for title in ("the first of all", *(f"later {number}" for number in range(5))) if f">{title}<" in text} == titles, (
            query
        )
    for query in ("status=lost", "label=nothing", "after=soon"):
        assert client.get(f"/ui/tasks?{query}").status_code == 422
    monkeypatch.setattr("tower.ui.facts._SEARCHED", 3)
    text = client.get("/ui/tasks?text=first+of").text
    assert "The 3 newest were searched" in text
    place = re.search(r'rel="next" href="([^"]*)"', text)
    assert place and ">the first of all<" in client.get(place[1].replace("&amp;", "&")).text


@pytest.mark.parametrize("clock", [0, -80_000, 80_000])
def test_a_time_finds_what_it_says_whatever_the_clock_that_made_the_id(rows: Settings, monkeypatch: pytest.MonkeyPatch, clock: int) -> None:
    """To the millisecond, and for times that no task can have."""
    made = time.time_ns() + clock * 1_000_000_000
    with monkeypatch.context() as patch:
        patch.setattr("tower.models.time.time_ns", lambda: made)
        task_id = new_id()
    at = r.row(r.insert(id=task_id))["created_at"]

    def found(**asked: float) -> list[str]:
        return [row["id"] for row in db.read(lambda: queries.tasks(Filter(**asked), before=None, limit=10))]  # type: ignore[arg-type]

    assert found(created_after=at) == found(created_before=at + 0.001) == found(created_after=-1e17, created_before=1e17) == [task_id]
    assert found(created_after=at + 0.001) == found(created_before=at) == found(created_after=1e17) == found(created_before=-1e17) == []


def test_views_belong_to_a_key(client: TestClient) -> None:
    """And there are only so many."""
    token = log_in(client, VIEWER)
    sent = {"csrf_token": token, "name": "mine", "filters": "status=failed"}
    assert client.post("/ui/views", data=sent, headers=SAME).headers["location"] == "/ui/tasks?status=failed"
    client.post("/ui/views", data={**sent, "filters": "status=queued"}, headers=SAME)
    assert 'href="/ui/tasks?status=queued">mine' in client.get("/ui/tasks").text
    log_in(client, ADMIN)
    assert ">mine<" not in client.get("/ui/tasks").text
    me = Caller(ANONYMOUS, VIEWER)
    for number in range(50):
        db.unit(lambda number=number: views.save(me, str(number), ""))  # type: ignore[misc]
    with pytest.raises(InvalidTask, match="50 views already"):
        db.unit(lambda: views.save(me, "one more", ""))
    assert db.read(lambda: SavedView.select().where(SavedView.owner == ANONYMOUS).count()) == 50


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


@pytest.mark.parametrize("name", ["command", "echo", "http", "sleep"])
def test_a_form_means_the_payload_it_was_filled_with(registry: Registry, name: str) -> None:
    """For the examples of every type."""
    made = registry.get(name).payload.model_json_schema()
    for payload in made["examples"]:
        sent = Fields({field.name: [field.value] for field in schema.fields(made, payload)})
        told = schema.read(made, sent)
        assert registry.get(name).check(told) == registry.get(name).check(payload)


def test_the_pace_counts_every_end_once(rows: Settings) -> None:
    """Also when most of it was counted before."""
    pace, now = overview.Pace(), db.read(db.clock)
    for number in range(12):
        task_id = ended("failed" if number % 3 == 0 else "succeeded", labels={"team": "a", "odd": str(number % 2)})
        at = now - 200 * number
        db.unit(
            lambda task_id=task_id, at=at: (
                Task.update(finished_at=at, queued_at=at - 5, started_at=at - 3).where(Task.id == task_id).execute()
            )
        )  # type: ignore[misc]
    for _ in range(2):
        for found, length in zip(db.read(lambda: pace.read(Filter(), now)), (60, 48), strict=True):
            assert (sum(bucket.succeeded for bucket in found), sum(bucket.broken for bucket in found)) == (8, 4)
            assert {round(bucket.waited_s, 3) for bucket in found} == {0, 2.0}
            assert len(found) == length
    for labels, count in (((("team", "a"),), 12), ((("team", "a"), ("odd", "1")), 6), ((("team", "b"),), 0)):
        for found in db.read(lambda labels=labels: overview.Pace().read(Filter(within_labels=labels), now)):  # type: ignore[misc]
            assert sum(bucket.ended for bucket in found) == count
            assert {round(bucket.waited_s, 3) for bucket in found} == ({0, 2.0} if count else {0})
    late = ended()
    assert late
    assert [sum(bucket.succeeded for bucket in found) for found in db.read(lambda: pace.read(Filter(), db.clock()))] == [9, 9]
    narrowed = db.read(lambda: overview.Pace().read(Filter(within_types=("sleep",)), now))
    assert [sum(bucket.ended for bucket in found) for found in narrowed] == [0, 0]


def test_what_turns_text_around_is_seen_and_kept(client: TestClient) -> None:
    """In titles, labels and values; a form and a request mean exactly what the task had."""
    token = log_in(client, OPERATOR)
    task_id = r.insert(title="a\u202eb", payload='{"c": "d\u202ee"}', labels={"f": "g\u202eh"})
    for place in ("/", "/ui/tasks", "/ui/tasks?view=board", f"/ui/tasks/{task_id}"):
        page = client.get(place).text
        assert "a\ufffdb" in page and "\u202e" not in page, place
    assert "d\\u202ee" in client.get(f"/ui/tasks/{task_id}").text
    form = client.get(f"/ui/new?from={task_id}").text
    assert 'value="a\u202eb"' in form and "d\\u202ee" in form and "f:g\u202eh</textarea>" in form
    sent = {"csrf_token": token, "type": "echo", "title": "a\u202eb", "payload": '{"c": "d\\u202ee"}', "labels": "f:g\u202eh"}
    made = client.post("/ui/new", data=sent, headers=SAME).headers["location"].rpartition("/")[2]
    assert json.loads(r.row(made)["payload"]) == json.loads(r.row(task_id)["payload"])


def test_a_rate_is_kept_when_a_task_is_edited(client: TestClient) -> None:
    """And a wrong one is refused."""
    token = log_in(client, OPERATOR)
    first = r.insert(rate_key="api", rate_limit=3, rate_per_s=60.0)
    form = client.get(f"/ui/new?from={first}").text
    sent = {name: re.search(f'name="{name}"[^>]*value="([^"]*)"', form)[1] for name in ("rate_key", "rate_limit", "rate_per_s")}  # type: ignore[index]
    sent |= {"csrf_token": token, "type": "echo", "payload": "{}"}
    made = client.post("/ui/new", data=sent, headers=SAME).headers["location"].rpartition("/")[2]
    assert [r.row(made)[name] for name in ("rate_key", "rate_limit", "rate_per_s")] == ["api", 3, 60.0]
    assert client.post("/ui/new", data={**sent, "rate_limit": ""}, headers=SAME).status_code == 422


def test_code_in_a_message_is_code_and_nothing_more(client: TestClient) -> None:
    """Messages of errors are of tasks."""
    claim = r.running()
    error = {"code": "handler_error", "message": "no `<b>` in <i>", "advice": "add `<b>`"}
    db.unit(lambda: lifecycle.finish(claim, Outcome("failed", error=error), "t"))
    log_in(client, VIEWER)
    for place in ("/", f"/ui/tasks/{claim.id}"):
        page = client.get(place).text
        assert "no <code>&lt;b&gt;</code> in &lt;i&gt;" in page or place != "/"
        assert "<b>" not in page and "<i>" not in page


def test_a_queue_that_nobody_takes_needs_somebody(client: TestClient) -> None:
    """As long as something waits on it."""
    log_in(client, VIEWER)
    assert "which no worker takes" not in client.get("/").text
    r.insert(queue="gpu")
    assert re.search("1 wait on the queue.*gpu.*, which no worker takes", client.get("/").text)
    r.add_worker(queues='["gpu"]')
    page = client.get("/")
    assert page.status_code == 200 and "which no worker takes" not in page.text


def test_what_runs_shows_its_last_line(client: TestClient) -> None:
    """Of each task its own, without what a terminal would do with it."""
    claims = [r.running(worker=f"w{number}") for number in range(3)]
    for number, claim in enumerate(claims[:2]):
        for part, said in enumerate(("early", f"{'x' * 400 * number}step \x1b[32m{number}\x1b[0m<b>")):
            lines = f"2026-11-25T10:00:00.000Z [1] before\n2026-11-25T10:00:00.000Z [1] {said}\n"
            db.unit(lambda claim=claim, part=part, lines=lines: leases.append_log(claim, part, lines))  # type: ignore[misc]
    log_in(client, VIEWER)
    page = client.get("/").text
    assert 'step <span class="a-f2">0</span>&lt;b&gt;' in page and 'step <span class="a-f2">1</span>&lt;b&gt;' in page
    assert "early" not in page and "before" not in page and page.count('class="doing"') == 2


def test_a_life_is_drawn_to_scale() -> None:
    """Every stretch between two events, attempt by attempt."""
    kinds = [
        ("queued", 0, 0.0),
        ("dispatched", 0, 5.0),
        ("started", 1, 6.0),
        ("cancel_requested", 1, 7.0),
        ("retry_scheduled", 1, 8.0),
        ("dispatched", 1, 9.0),
        ("started", 2, 9.5),
        ("succeeded", 2, 10.0),
    ]
    told = [{"kind": kind, "attempt": attempt, "at": at, "data": json.dumps({})} for kind, attempt, at in kinds]
    drawn = phases(told, 10.0)
    assert [(phase.kind, phase.start, phase.seconds) for phase in drawn] == [
        ("queued", 0.0, 5.0),
        ("dispatched", 500.0, 1.0),
        ("running", 600.0, 2.0),
        ("queued", 800.0, 1.0),
        ("dispatched", 900.0, 0.5),
        ("running", 950.0, 0.5),
    ]
    assert not any(phase.is_open for phase in drawn)

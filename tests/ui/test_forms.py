"""Who is offered what, and what becomes of forms: of others, wrong ones, and those that mean something."""

import re

import pytest
from dramatiq.brokers.stub import StubBroker
from fastapi.testclient import TestClient

from tests import rows as r
from tests.api.conftest import bare_app
from tests.conftest import BASE, LOCAL
from tests.ui.pages import SAME, ended, log_in
from tower import db, keys, rules
from tower.api.access import RULES
from tower.handler import Registry
from tower.models import Task
from tower.settings import Settings
from tower.terms import ADMIN, OPERATOR, ROLES, VIEWER
from tower.ui import schema
from tower.ui.forms import Fields


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
    for place in ("/", path):
        assert client.get(place).status_code == 401
        assert client.get(place, headers={"accept": "text/html"}).headers["location"] == f"/login?next={place}"
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


@pytest.mark.parametrize("name", ["command", "echo", "http", "sleep"])
def test_a_form_means_the_payload_it_was_filled_with(registry: Registry, name: str) -> None:
    """For the examples of every type."""
    made = registry.get(name).payload.model_json_schema()
    for payload in made["examples"]:
        sent = Fields({field.name: [field.value] for field in schema.fields(made, payload)})
        told = schema.read(made, sent)
        assert registry.get(name).check(told) == registry.get(name).check(payload)


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

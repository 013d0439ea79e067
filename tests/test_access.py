"""Who may come in, and how far: every route by every role, keys, sessions, limits, and the record of it all."""

import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.routing import Route

from actors.handlers import load
from tests import rows as r
from tests.api.conftest import bare_app, is_problem
from tests.conftest import BASE, LOCAL
from tower import db, keys
from tower.api import access
from tower.api.access import LOGIN, LOGOUT, PUBLIC, RULES, check_rules
from tower.api.session import COOKIE, LASTS_S, Sessions, kept_secret
from tower.errors import SettingsError
from tower.models import ApiKey, new_id
from tower.settings import Settings
from tower.terms import ADMIN, OPERATOR, ROLES, VIEWER

BOOTSTRAP = "a-bootstrap-key-for-tests"
AWAY = ("192.0.2.7", 50_000)


@pytest.fixture
def settings_of_doors(rows: Settings) -> Settings:
    return rows.model_copy(update={"anonymous": "nobody", "bootstrap_key": Settings(bootstrap_key=BOOTSTRAP).bootstrap_key})


@pytest.fixture
def app(settings_of_doors: Settings) -> FastAPI:
    return bare_app(settings_of_doors, load())


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    yield TestClient(app, base_url=BASE, client=LOCAL, follow_redirects=False)


def made(role: str, **limits: Any) -> str:
    return db.unit(lambda: keys.create(f"the {role}", role, **limits))[1]


def shown(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


CALLS = sorted((path, method) for path, methods in RULES.items() for method in methods)
#: A form without a key is refused by itself; what tells of readiness asks a broker that is not there, which takes seconds.
OTHERS = [call for call in CALLS if call not in (("/login", "POST"), ("/health/ready", "GET"), ("/", "GET"))]


def _address(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "0192f0c1-2345-7abc-8def-0123456789ab", path).replace("/access/keys/0192", "/access/keys/twr_0192")


def test_every_route_of_the_app_has_a_rule_and_every_rule_a_route(app: FastAPI) -> None:
    """And an app with a route that nobody has thought of does not start; nor could it be reached."""
    documented = {(path, method.upper()) for path, methods in app.openapi()["paths"].items() for method in methods}
    ruled = {(path.replace(":path", ""), method) for path, method in CALLS}
    assert documented <= ruled
    aside = {"/", "/login", "/logout", "/docs", "/openapi.json", "/dashboard", "/dashboard/{path}"}
    assert {path for path, _ in ruled - documented if not path.startswith("/ui/")} == aside
    with pytest.raises(RuntimeError, match=r"/new has no rule in tower\.api\.access\.RULES"):
        check_rules([Route("/new", lambda request: None)])
    app.add_api_route("/new", lambda: "in")
    answer = TestClient(app, base_url=BASE).get("/new", headers=shown(BOOTSTRAP))
    assert answer.status_code == 404


def test_a_viewer_changes_only_what_is_his_own_and_an_operator_no_rules() -> None:
    """Whatever the table of rules says: that is what the words mean."""
    changes = {(path, RULES[path][method]) for path, method in CALLS if method not in ("GET", "HEAD")}
    assert {path for path, role in changes if role in (PUBLIC, VIEWER)} == {LOGIN, LOGOUT, "/ui/theme", "/ui/views"}
    for path, role in changes:
        about_all = ("/access/", "/rules/", "/ui/keys", "/ui/limits", "/dashboard")
        assert not path.startswith(about_all) or role == ADMIN, path


@pytest.mark.parametrize("who", ["nobody", "a wrong key", "a revoked key", "an expired key", *ROLES])
def test_a_route_takes_who_its_rule_says_and_nobody_else(app: FastAPI, who: str) -> None:
    """Before anything of the request is looked at."""
    for number, (path, method) in enumerate(OTHERS, 1):  # each from elsewhere: an address that shows wrong keys is soon not heard any more
        client = TestClient(app, base_url=BASE, client=(f"127.0.0.{number}", 50_000), follow_redirects=False)
        _is_taken_as_ruled(client, path, method, who)


def _is_taken_as_ruled(client: TestClient, path: str, method: str, who: str) -> None:
    headers = {}
    if who in ROLES:
        headers = shown(made(who))
    elif who == "a wrong key":
        headers = shown(made(ADMIN)[:-1] + "?")
    elif who == "a revoked key":
        key = made(ADMIN)
        db.unit(lambda: keys.revoke(key[:14]))
        headers = shown(key)
    elif who == "an expired key":
        key = made(ADMIN, expires_at=db.read(db.clock) + 60)
        db.unit(lambda: ApiKey.update(expires_at=1.0).where(ApiKey.id == key[:14]).execute())
        headers = shown(key)
    answer = client.request(method, _address(path), headers=headers)
    rule = RULES[path][method]
    assert method != "HEAD" or (answer.status_code in (200, 401) and not answer.content)
    if rule == PUBLIC or (who in ROLES and ROLES.index(who) >= ROLES.index(rule)):
        assert answer.status_code not in (401, 403), answer.text
    elif method == "HEAD":
        assert answer.status_code == 401
    elif who in ROLES:
        is_problem(answer, 403, "role_required")
        assert f"takes the role {rule}" in answer.json()["detail"]
    else:
        codes = {"nobody": "key_required", "a wrong key": "invalid_key", "a revoked key": "key_revoked", "an expired key": "key_expired"}
        is_problem(answer, 401, codes[who])
        assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["referrer-policy"] == "same-origin"


def test_a_key_is_told_once_and_the_rows_do_not_hold_it(client: TestClient) -> None:
    """Whoever steals the database cannot come in with it."""
    answer = client.post("/access/keys", json={"name": "ci", "role": "operator"}, headers=shown(BOOTSTRAP))
    assert answer.status_code == 201
    key = answer.json()["key"]
    secret = key.partition("_")[2].partition("_")[2]
    listed = client.get("/access/keys", headers=shown(BOOTSTRAP))
    assert [one["id"] for one in listed.json()["keys"]] == [key[:14]]
    assert listed.json()["keys"][0]["created_by"] == "bootstrap"
    everything = repr(db.read(lambda: list(ApiKey.select().dicts()))) + listed.text
    assert secret not in everything and BOOTSTRAP not in everything
    me = client.get("/me", headers=shown(key)).json()
    assert (me["name"], me["role"], me["key_id"]) == ("ci", "operator", key[:14])
    assert client.get("/access/keys", headers=shown(BOOTSTRAP)).json()["keys"][0]["used_at"]


def test_keys_are_compared_in_constant_time(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose beginning nobody knows: how long it takes tells nothing."""
    compared = list[tuple[Any, Any]]()
    compare = keys.hmac.compare_digest

    def seen(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(keys.hmac, "compare_digest", seen)
    key = made(VIEWER)
    for tried in (key, key[:-1] + "?", "twr_0000000000_" + "A" * 43):
        client.get("/tasks", headers=shown(tried))
    assert len(compared) == 3 * 2


def test_a_revoked_key_is_refused_at_once(client: TestClient, settings_of_doors: Settings) -> None:
    """By every server: none of them remembers a key."""
    key = made(OPERATOR)
    other = TestClient(bare_app(settings_of_doors, load()), base_url=BASE)
    assert [one.get("/tasks", headers=shown(key)).status_code for one in (client, other)] == [200, 200]
    told = client.delete(f"/access/keys/{key[:14]}", headers=shown(BOOTSTRAP))
    assert told.json()["revoked_at"]
    assert [one.get("/tasks", headers=shown(key)).status_code for one in (client, other)] == [401, 401]
    assert client.delete(f"/access/keys/{key[:14]}", headers=shown(BOOTSTRAP)).json()["revoked_at"] == told.json()["revoked_at"]


def test_an_address_that_tries_wrong_keys_is_not_listened_to(client: TestClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a minute, not even if it then finds the right one; others are, and so is it afterwards."""
    key, other, now = made(VIEWER), TestClient(app, base_url=BASE, client=AWAY), [1000.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: now[0])
    answers = [client.get("/tasks", headers=shown("wrong")) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [401] * 10 + [429]
    assert answers[-1].headers["retry-after"] == "61"
    is_problem(client.get("/tasks", headers=shown(key)), 429, "too_many_tries")
    assert client.post("/login", data={"key": key}).status_code == 429
    assert other.get("/tasks", headers=shown(key)).status_code == 200
    now[0] += 61
    assert client.get("/tasks", headers=shown(key)).status_code == 200


@pytest.mark.parametrize(
    ("anonymous", "host", "address", "headers", "role"),
    [
        ("loopback", "127.0.0.1", LOCAL, {}, ADMIN),
        ("loopback", "127.0.0.1", AWAY, {}, None),
        ("loopback", "127.0.0.1", LOCAL, {"x-forwarded-for": "192.0.2.7"}, None),
        ("loopback", "0.0.0.0", LOCAL, {}, None),
        ("nobody", "127.0.0.1", LOCAL, {}, None),
        ("viewer", "0.0.0.0", AWAY, {}, VIEWER),
        ("admin", "0.0.0.0", AWAY, {}, ADMIN),
    ],
)
def test_who_shows_no_key_may_do_what_the_setting_says(
    rows: Settings, anonymous: str, host: str, address: tuple[str, int], headers: dict[str, str], role: str | None
) -> None:
    """Everything on loopback alone, unless something stands before the tower; and the page to log in says so."""
    client = TestClient(bare_app(rows.model_copy(update={"anonymous": anonymous, "host": host})), base_url=BASE, client=address)
    told = client.get("/me", headers=headers)
    assert (told.json().get("role"), told.json().get("key_id")) == (role, None)
    assert ("nobody needs a key" in client.get("/login", headers=headers).text) == (role is not None)


def log_in(client: TestClient, key: str, place: str = "/docs") -> httpx2.Response:
    return client.post("/login", data={"key": key, "next": place})


def test_a_browser_logs_in_with_a_key_and_out_again(client: TestClient) -> None:
    """The cookie is out of reach of scripts and other sites, and does not hold the key."""
    key = made(OPERATOR)
    asked = client.get("/tasks", headers={"accept": "text/html"})
    assert (asked.status_code, asked.headers["location"]) == (303, "/login?next=/tasks")
    page = client.get("/login?next=/tasks")
    assert 'value="/tasks"' in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    answer = log_in(client, key, "/tasks")
    assert (answer.status_code, answer.headers["location"]) == (303, "/tasks")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={LASTS_S}"} <= set(re.split("; ", cookie))
    assert key[15:] not in cookie
    me = client.get("/me").json()
    assert (me["name"], me["role"]) == ("the operator", "operator")
    assert client.post("/logout").headers["location"] == "/login"
    assert client.get("/me").status_code == 200, "without its token nobody is logged out"
    client.post("/logout", data={"csrf_token": me["csrf_token"]})
    assert client.get("/me").status_code == 401


def test_a_change_from_a_session_carries_its_token(client: TestClient) -> None:
    """Another page can send a cookie along, but cannot read the token."""
    log_in(client, made(OPERATOR))
    token = client.get("/me").json()["csrf_token"]
    is_problem(client.post("/pause"), 403, "csrf_token")
    is_problem(client.post("/pause", headers={"x-csrf-token": "0" * 64}), 403, "csrf_token")
    assert client.post("/pause", headers={"x-csrf-token": token}).status_code == 200


@pytest.mark.parametrize("key", ["wrong", "", "twr_0123456789_" + "A" * 43])
def test_a_wrong_key_logs_nobody_in(client: TestClient, key: str) -> None:
    """And the page says so, without the key."""
    answer = log_in(client, key)
    assert answer.status_code == 401
    assert 'role="alert"' in answer.text and "set-cookie" not in answer.headers
    assert not key or key not in answer.text


@pytest.mark.parametrize(
    "place", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "/a\r\nset-cookie: x=1"]
)
def test_logging_in_leads_to_this_tower_alone(client: TestClient, place: str) -> None:
    """Wherever the address that one clicked on says."""
    assert log_in(client, made(VIEWER), place).headers["location"] == "/"


def test_a_session_ends_with_its_key(client: TestClient) -> None:
    """At once, and so does one that was signed by somebody else, or is old."""
    key = made(OPERATOR)
    log_in(client, key)
    db.unit(lambda: keys.revoke(key[:14]))
    is_problem(client.get("/me"), 401, "key_revoked")
    sessions = Sessions("a secret of this tower")
    assert sessions.key_of(sessions.begin("twr_0123456789")) == "twr_0123456789"
    assert sessions.key_of(Sessions("another secret").begin("twr_0123456789")) is None
    assert sessions.key_of(Sessions("a secret of this tower", lambda: 0.0).begin("twr_0123456789")) is None
    altered = sessions.begin("twr_0123456789").replace("twr_0", "twr_1")
    assert sessions.key_of(altered) is None and sessions.key_of("nonsense") is None


def test_the_secret_of_sessions_is_made_once_and_for_one_user(tmp_path: Any) -> None:
    """Whoever can read it can log in as anybody."""
    first = kept_secret(tmp_path / "run")
    assert kept_secret(tmp_path / "run") == first and len(first) > 40
    assert (tmp_path / "run" / "session.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["session.key"]


def test_a_secret_that_somebody_else_may_have_put_there_signs_nothing(tmp_path: Any) -> None:
    """Whoever knows it could log in as anybody: the folder must be this user's own."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "session.key").write_text("known to all")
    (tmp_path / "run").chmod(0o777)
    with pytest.raises(SettingsError, match=r"is not a folder of this user's.*Set TOWER_SESSION_SECRET"):
        kept_secret(tmp_path / "run")


ECHO: dict[str, Any] = {"type": "echo", "payload": {}}


def test_a_key_may_be_limited_to_types_and_labels(client: TestClient) -> None:
    """It finds, runs and stops nothing else: other tasks do not exist for it."""
    mine = r.insert(type="echo", labels={"team": "a"})
    others = r.insert(type="echo", labels={"team": "b"}), r.insert(type="sleep", labels={"team": "a"})
    key = shown(made(OPERATOR, types=["echo"], labels={"team": "a"}))
    assert [task["id"] for task in client.get("/tasks", headers=key).json()["tasks"]] == [mine]
    assert client.get(f"/tasks/{mine}", headers=key).status_code == 200
    for task_id in others:
        for call in ("", "/events", "/log", "/files", "/files/log.txt", "/why"):
            is_problem(client.get(f"/tasks/{task_id}{call}", headers=key), 404, "task_not_found")
        for call in ("/cancel", "/retry"):
            is_problem(client.post(f"/tasks/{task_id}{call}", headers=key), 404, "task_not_found")
    refused = client.post("/tasks/enqueue", json=ECHO, headers=key)
    is_problem(refused, 403, "key_limited")
    assert "limited to tasks of type echo, with the label team=a" in refused.json()["detail"]
    is_problem(
        client.post("/tasks/enqueue/batch", json={"tasks": [{**ECHO, "labels": {"team": "a"}}, ECHO]}, headers=key), 403, "key_limited"
    )
    for parent, status in ((others[0], 422), (new_id(), 422), (mine, 202)):  # the answers do not tell what exists elsewhere
        child = {**ECHO, "labels": {"team": "a"}, "parent_id": parent}
        assert client.post("/tasks/enqueue", json=child, headers=key).status_code == status
    told = client.post("/tasks/cancel", json={"filter": {"status": ["queued"]}}, headers=key).json()
    assert told["changed"] == 2 and mine in told["task_ids"]
    assert [r.row(task_id)["status"] for task_id in others] == ["queued", "queued"]
    is_problem(client.post("/pause", headers=key), 403, "key_limited")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "x", "role": "boss"}, "role"),
        ({"name": "", "role": "admin"}, "name"),
        ({"name": "x", "role": "admin", "types": ["echo"]}, "role"),
        ({"name": "x", "role": "viewer", "expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"name": "x", "role": "viewer", "limit": 1}, "limit"),
    ],
)
def test_a_key_that_cannot_be_is_refused(client: TestClient, body: dict[str, Any], field: str) -> None:
    """By the field at fault."""
    assert is_problem(client.post("/access/keys", json=body, headers=shown(BOOTSTRAP)), 422, "invalid_field")["field"] == field


def test_it_is_on_record_who_did_what(client: TestClient) -> None:
    """By the name of the key, whatever the request says of itself; what was refused did not happen."""
    key = made(OPERATOR)
    task_id = client.post("/tasks/enqueue", json={**ECHO, "requested_by": "mallory"}, headers=shown(key)).json()["task_id"]
    client.post(f"/tasks/{task_id}/cancel?by=mallory", headers=shown(key))
    client.post("/pause?reason=release", headers=shown(key))
    client.post("/tasks/nonsense/cancel", headers=shown(key))
    client.put("/rules/tower", json={"max_running": 3}, headers=shown(key))
    events = {event["kind"]: event["data"] for event in client.get(f"/tasks/{task_id}/events", headers=shown(key)).json()["events"]}
    assert events["queued"] == {"by": "the operator"}
    assert events["cancelled"]["by"] == "the operator"
    page = client.get("/access/audit", headers=shown(BOOTSTRAP)).json()
    told = [(entry["actor"], entry["action"], entry["target"]) for entry in page["entries"]]
    assert told == [("the operator", "POST /pause", "reason=release"), ("the operator", f"POST /tasks/{task_id}/cancel", "by=mallory")]
    assert page["entries"][0]["address"] == "127.0.0.1"
    first = client.get("/access/audit?limit=1", headers=shown(BOOTSTRAP)).json()
    rest = client.get(f"/access/audit?limit=1&cursor={first['next_cursor']}", headers=shown(BOOTSTRAP)).json()
    assert (first["entries"] + rest["entries"], rest["next_cursor"]) == (page["entries"], None)


def test_the_record_tells_which_key_was_made_and_nothing_of_a_trial(client: TestClient) -> None:
    """A trial changes nothing."""
    headers = shown(made(ADMIN))
    key = client.post("/access/keys", json={"name": "ci", "role": "viewer"}, headers=headers).json()["id"]
    for dry_run in (True, False):
        client.post("/tasks/cancel", json={"filter": {"type": ["echo"]}, "dry_run": dry_run}, headers=headers)
    told = [(entry["action"], entry["target"]) for entry in client.get("/access/audit", headers=headers).json()["entries"]]
    assert told == [("POST /tasks/cancel", "0 of 0 tasks"), ("POST /access/keys", f"{key} ci")]


def test_a_session_of_the_bootstrap_key_ends_with_it(rows: Settings, client: TestClient) -> None:
    """Unset it, and whoever came in by it has to show another."""
    log_in(client, BOOTSTRAP)
    assert client.get("/me").json()["name"] == "bootstrap"
    without = TestClient(bare_app(rows.model_copy(update={"anonymous": "nobody"})), base_url=BASE, cookies={COOKIE: client.cookies[COOKIE]})
    assert without.get("/me").status_code == 401

"""/dashboard: dramatiq's own view of the messages, behind our guard, on a real Redis."""

import re
from collections.abc import Iterator
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.message import Message
from fastapi.testclient import TestClient

from tests.api.conftest import bare_app, is_problem
from tests.conftest import BASE, LOCAL
from tests.servers import Redis
from tower import db
from tower.broker import open_broker
from tower.settings import Settings

#: The dashboard of 2022 asks the clock in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utc:DeprecationWarning")

OURS = {"sec-fetch-site": "same-origin", "origin": BASE}
TOKEN = "0123456789abcdef" * 4
SECURITY = ("x-content-type-options", "x-frame-options", "referrer-policy", "cache-control")


@pytest.fixture(scope="module")
def broker(redis_server: Redis) -> Iterator[RedisBroker]:
    """A broker with one queue and one actor, as a server with REDIS_URL has it."""
    before = dramatiq.get_broker()
    made = open_broker(Settings(redis_url=redis_server.url()))
    dramatiq.actor(actor_name="handler.echo", queue_name="default", broker=made)(print)
    yield made  # type: ignore[misc]
    made.flush("default")
    made.close()
    dramatiq.set_broker(before)


@pytest.fixture(scope="module")
def client(broker: RedisBroker, redis_server: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The app on Redis, with a database for the record of changes; no worker takes the messages."""
    database_url = f"sqlite:///{tmp_path_factory.mktemp('dashboard') / 'tower.db'}"
    settings = Settings(database_url=database_url, redis_url=redis_server.url())
    db.open_database(settings)
    db.migrate()
    with TestClient(bare_app(settings, broker=broker), base_url=BASE, client=LOCAL) as made:
        yield made
    db.close_database()


@pytest.fixture
def message(broker: RedisBroker) -> str:
    """Send a message and return its id in Redis."""
    broker.flush("default")
    sent: Message[Any] = broker.get_actor("handler.echo").send("<b>task</b>")
    return str(sent.options["redis_message_id"])


def press(client: TestClient, page: str, button: str, **headers: str) -> Any:
    """Send the form of a page that holds a button, as a browser does."""
    html = client.get(page).text
    form = next(part for part in re.findall(r"<form.*?</form>", html, re.S) if f">{button}</button>" in part)
    action = re.search(r'action="([^"]+)"', form)
    fields = dict(re.findall(r'name="([^"]+)" value="([^"]*)"', form))
    assert action and fields
    return client.post(action[1], data=fields, headers={**OURS, **headers}, follow_redirects=False)


def test_the_address_without_a_slash_leads_there_too(client: TestClient) -> None:
    """Nobody types the slash."""
    answer = client.get("/dashboard", follow_redirects=False)

    assert (answer.status_code, answer.headers["location"]) == (307, "/dashboard/")
    assert client.get("/dashboard").status_code == 200


def test_the_pages_show_queues_and_messages(client: TestClient, message: str) -> None:
    """The first page, a queue, each of its tabs, one message."""
    for page, shown in (
        ("/dashboard/", "default"),
        ("/dashboard/queues/default", message),
        ("/dashboard/queues/default/standard", message),
        ("/dashboard/queues/default/delayed", "Delayed"),
        ("/dashboard/queues/default/failed", "Failed"),
        (f"/dashboard/queues/default/standard/{message}", "handler.echo"),
        ("/dashboard/queues/unknown", "unknown"),
    ):
        answer = client.get(page)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8"), page
        assert shown in answer.text, page
        assert "<b>task</b>" not in answer.text, page


def test_every_link_of_a_page_leads_to_a_page(client: TestClient, message: str) -> None:
    """The prefix is right everywhere."""
    seen, todo = set[str](), ["/dashboard/"]
    while todo:
        page = todo.pop()
        seen.add(page)
        answer = client.get(page)
        assert answer.status_code == 200, page
        todo += [link for link in re.findall(r'href="([^"]+)"', answer.text) if link not in seen and link not in todo]
    assert f"/dashboard/queues/default/standard/{message}" in seen
    assert all(page.startswith("/dashboard/") for page in seen)


def test_the_delete_button_works(client: TestClient, broker: RedisBroker, message: str) -> None:
    """A message is only a nudge: the sweep sends another."""
    answer = press(client, f"/dashboard/queues/default/standard/{message}", "Delete")

    assert (answer.status_code, answer.headers["location"]) == (302, "/dashboard/queues/default/standard")
    assert broker.client.hlen("tower:default.msgs") == 0


def test_the_requeue_button_works(client: TestClient, broker: RedisBroker, message: str) -> None:
    """A failed message is queued again."""
    broker.client.rename("tower:default.msgs", "tower:default.XQ.msgs")
    answer = press(client, "/dashboard/queues/default/failed", "Requeue")

    assert answer.status_code == 302
    assert (broker.client.hlen("tower:default.XQ.msgs"), broker.client.hlen("tower:default.msgs")) == (0, 1)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"origin": "http://evil.example"}, "foreign_origin"),
        ({"sec-fetch-site": "cross-site"}, "foreign_origin"),
        ({"sec-fetch-site": "same-site"}, "foreign_origin"),
    ],
)
def test_a_button_pressed_from_another_site_does_nothing(
    client: TestClient, broker: RedisBroker, message: str, headers: dict[str, str], code: str
) -> None:
    """Even with the right cookie and field: the dashboard alone would take any pair that is equal."""
    answer = press(client, f"/dashboard/queues/default/standard/{message}", "Delete", **headers)

    is_problem(answer, 403, code)
    assert broker.client.hlen("tower:default.msgs") == 1


def test_a_form_from_nowhere_does_nothing(client: TestClient, broker: RedisBroker, message: str) -> None:
    """A browser says where a form comes from; a program has no business here."""
    fields = {"queue": "default", "id": message, "__dd_csrf": TOKEN}
    answer = client.post("/dashboard/delete-message", data=fields, headers={"cookie": f"__dd_csrf={TOKEN}"})

    is_problem(answer, 403, "foreign_origin")
    assert broker.client.hlen("tower:default.msgs") == 1


def test_a_form_without_the_cookie_does_nothing(client: TestClient, broker: RedisBroker, message: str) -> None:
    """The dashboard's own check goes on working behind ours."""
    client.cookies.clear()
    answer = client.post("/dashboard/delete-message", data={"queue": "default", "id": message, "__dd_csrf": TOKEN}, headers=OURS)

    assert answer.status_code == 403
    assert broker.client.hlen("tower:default.msgs") == 1


@pytest.mark.parametrize(
    "cookie",
    [
        '__dd_csrf="><script>alert(1)</script>',
        "__dd_csrf=",
        "__dd_csrf=abc",
        f"__dd_csrf={TOKEN}0",
        f"a=b; __dd_csrf={TOKEN.upper()}",
        f"__dd_csrf={TOKEN}; __dd_csrf={TOKEN[::-1]}",
        "a=b;__dd_csrf=<script>",
        " __dd_csrf =<script>",
    ],
)
def test_a_cookie_that_the_dashboard_did_not_set_is_refused(client: TestClient, message: str, cookie: str) -> None:
    """It would be written into the page as it is."""
    client.cookies.clear()
    answer = client.get("/dashboard/queues/default", headers={"cookie": cookie})

    is_problem(answer, 400, "bad_cookie")
    assert "<script>" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        [("cookie", 'x__dd_csrf="><script>alert(1)</script>')],
        [("cookie", 'a=b, __dd_csrf="><script>alert(1)</script>')],
        [("http-cookie", '__dd_csrf="><script>alert(1)</script>')],
        [("cookie", "a=b"), ("http-cookie", '__dd_csrf="><script>alert(1)</script>')],
    ],
)
def test_a_cookie_that_only_the_dashboard_takes_for_its_own_does_not_reach_it(
    client: TestClient, message: str, headers: list[tuple[str, str]]
) -> None:
    """It looks for its name anywhere in the header, and for the header under other names."""
    client.cookies.clear()
    answer = client.get(f"/dashboard/queues/default/standard/{message}", headers=headers)

    assert answer.status_code == 200
    assert "<script>" not in answer.text


def test_a_bad_cookie_in_a_second_header_is_refused(client: TestClient) -> None:
    """Two Cookie headers count as one."""
    client.cookies.clear()
    is_problem(client.get("/dashboard/", headers=[("cookie", "a=b"), ("cookie", "__dd_csrf=<script>")]), 400, "bad_cookie")


def test_its_cookie_is_kept_from_other_sites(client: TestClient) -> None:
    """HttpOnly by itself, SameSite by us."""
    client.cookies.clear()
    cookie = client.get("/dashboard/queues/default").headers["set-cookie"]

    assert re.fullmatch(r"__dd_csrf=[0-9a-f]{64}; HttpOnly; Path=/; SameSite=Strict", cookie)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/dashboard/queues/default?cursor=abc", 400),
        ("GET", "/dashboard/queues/default?cursor=-1", 400),
        ("GET", "/dashboard/queues/default?cursor=" + "9" * 5000, 400),
        ("GET", "/dashboard/queues/default?cursor", 200),
        ("GET", "/dashboard/queues/default?%ff=%zz&&==", 400),
        ("GET", "/dashboard/queues/%00", 200),
        ("GET", "/dashboard/a%0ab", 404),
        ("GET", "/dashboard/nowhere", 404),
        ("POST", "/dashboard/delete-message", 400),
        ("POST", "/dashboard/requeue-message", 400),
        ("POST", "/dashboard/queues/default", 403),
        ("GET", "/dashboard/delete-message", 405),
        ("PUT", "/dashboard/", 405),
        ("DELETE", "/dashboard/queues/default", 405),
        ("TRACE", "/dashboard/", 405),
        ("HEAD", "/dashboard/", 405),
    ],
)
def test_a_request_it_cannot_stand_is_the_callers_mistake(client: TestClient, method: str, path: str, status: int) -> None:
    """What would be a 500 of the dashboard is a 4xx of ours, and it goes on working."""
    client.cookies.clear()
    body = (
        {"data": {"__dd_csrf": TOKEN}, "headers": {**OURS, "cookie": f"__dd_csrf={TOKEN}"}}
        if status == 400 and method == "POST"
        else {"headers": OURS}
    )
    answer = client.request(method, path, **body)  # type: ignore[arg-type]

    assert answer.status_code == status, answer.text
    assert all(name in answer.headers for name in SECURITY)
    assert client.get("/dashboard/").status_code == 200


def test_a_form_over_the_limit_is_refused(client: TestClient) -> None:
    """Also where JSON is not asked for, and also in chunks."""

    def chunks() -> Iterator[bytes]:
        for _ in range(11):
            yield b"a" * 1_000_000

    headers = {**OURS, "content-type": "application/x-www-form-urlencoded"}
    is_problem(client.post("/dashboard/delete-message", content=b"a" * 10_000_001, headers=headers), 413, "body_too_large")
    assert client.post("/dashboard/delete-message", content=chunks(), headers=headers).status_code in (400, 403, 413)


def test_its_pages_carry_security_headers_and_need_no_script(client: TestClient, message: str) -> None:
    """Its policy allows what its pages use: a style sheet in the page, forms to itself, nothing else."""
    for page in ("/dashboard/", "/dashboard/queues/default", f"/dashboard/queues/default/standard/{message}"):
        answer = client.get(page)
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert all(name in answer.headers for name in SECURITY)
        assert (policy["default-src"], policy["style-src"], policy["form-action"]) == ("'none'", "'unsafe-inline'", "'self'")
        assert policy["frame-ancestors"] == "'none'"
        assert "<style>" in answer.text
        assert not re.search(r"<script|\son\w+=|<link|<img|url\(|@import|src=", answer.text)


def test_without_redis_for_a_moment_it_says_so(client: TestClient, broker: RedisBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 and when to try again: that is nobody's mistake."""

    def gone(*args: Any, **more: Any) -> Any:
        raise redis.ConnectionError("Connection refused.")

    monkeypatch.setattr(broker.client, "evalsha", gone)
    answer = client.get("/dashboard/")

    told = is_problem(answer, 503, "broker_unavailable")
    assert "Connection refused" in told["detail"] and answer.headers["retry-after"] == "2"


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/", "/dashboard/queues/default"])
def test_an_embedded_tower_says_why_it_is_not_there(path: str) -> None:
    """And what shows the same."""
    with TestClient(bare_app(Settings(redis_url=None)), base_url=BASE, client=LOCAL) as client:
        told = is_problem(client.get(path), 404, "no_dashboard")

    assert "REDIS_URL" in told["detail"] and "/queues" in told["detail"]


def test_a_tower_without_the_package_says_how_to_get_it(broker: RedisBroker, redis_server: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its metadata forbids our versions, so it is installed apart."""
    monkeypatch.setitem(__import__("sys").modules, "dramatiq_dashboard", None)
    with TestClient(bare_app(Settings(redis_url=redis_server.url()), broker=broker), base_url=BASE, client=LOCAL) as client:
        told = is_problem(client.get("/dashboard/"), 404, "no_dashboard")

    assert "requirements-dashboard.txt" in told["detail"]

"""GET /health and /health/ready."""

from fastapi.testclient import TestClient

from tests.api.conftest import bare_app
from tests.conftest import BASE, LOCAL, Tower
from tower.settings import Settings


def test_health_says_ok_and_nothing_else(api: Tower) -> None:
    """A probe may compare the whole answer."""
    answer = api.client.get("/health")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_a_whole_tower_is_ready(api: Tower) -> None:
    """Ready means: tasks are accepted, and something will run them."""
    answer = api.client.get("/health/ready")

    told = answer.json()
    told.pop("oldest_waiting_s")
    assert (answer.status_code, told) == (
        200,
        {"status": "ready", "database": "ok", "broker": "embedded", "workers": 1, "slots": api.settings.slots, "problems": []},
    )


def test_a_tower_whose_database_is_not_prepared_lives_but_takes_no_tasks() -> None:
    """Health is about the process, readiness about tasks; a load balancer reads the 503."""
    with TestClient(bare_app(Settings(redis_url=None)), base_url=BASE, client=LOCAL) as client:
        alive, ready = client.get("/health"), client.get("/health/ready")

    assert (alive.status_code, ready.status_code) == (200, 503)
    assert ready.headers["retry-after"] == "2"
    assert (ready.json()["status"], ready.json()["database"]) == ("unavailable", "down")
    assert ready.json()["problems"] == ["The database is still being prepared. Tasks cannot be accepted."]


def test_a_tower_without_its_broker_is_degraded_but_takes_tasks(api: Tower) -> None:
    """Messages are only nudges: with Redis down tasks are accepted and found by the sweep."""
    orchestrator = api.client.app.state.orchestrator  # type: ignore[attr-defined]
    ping, orchestrator._nudger.ping = orchestrator._nudger.ping, lambda: "connection refused"
    try:
        answer = api.client.get("/health/ready")
    finally:
        orchestrator._nudger.ping = ping

    assert (answer.status_code, answer.json()["status"], answer.json()["broker"]) == (200, "degraded", "down")
    assert "connection refused" in answer.json()["problems"][0]


def test_a_probe_may_add_whatever_it_likes(api: Tower) -> None:
    """Monitors put time stamps into the query to get past caches."""
    assert api.client.get("/health?t=123").json() == {"status": "ok"}
    assert api.client.get("/health/ready?t=123").status_code == 200

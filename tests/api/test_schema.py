"""The API against its own OpenAPI document: what is documented is what happens, and the reverse."""

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
import uvicorn
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from actors.handlers.echo import EchoPayload, echo
from tests.api.conftest import bare_app, forget_all_tasks
from tests.conftest import Tower
from tests.servers import wait_for
from tower.handler import HandlerType, Registry
from tower.settings import Settings

LATER = "2500-01-01T00:00:00Z"
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def harmless() -> Registry:
    """Return a registry without the types that run programs or call servers: made-up tasks must do nothing."""
    registry = Registry()
    registry.add(HandlerType("echo", echo, EchoPayload, "default", 60, 1))
    return registry


DOCUMENT: dict[str, Any] = bare_app(Settings(redis_url=None), harmless()).openapi()
ROUTES = [(method, path, route) for path, methods in DOCUMENT["paths"].items() for method, route in methods.items()]


def ids(routes: list[tuple[str, str, Any]]) -> list[str]:
    return [f"{method.upper()} {path}" for method, path, _ in routes]


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        return dict(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    return schema


def test_every_public_route_is_in_the_document() -> None:
    """What the README names is there, and nothing that is not."""
    assert sorted(ids(ROUTES)) == [
        "DELETE /access/keys/{key_id}",
        "DELETE /rules/tower",
        "DELETE /rules/{kind}/{name}",
        "GET /access/audit",
        "GET /access/keys",
        "GET /handlers",
        "GET /health",
        "GET /health/ready",
        "GET /me",
        "GET /queues",
        "GET /rules",
        "GET /tasks",
        "GET /tasks/{task_id}",
        "GET /tasks/{task_id}/events",
        "GET /tasks/{task_id}/files",
        "GET /tasks/{task_id}/files/{path}",
        "GET /tasks/{task_id}/log",
        "GET /tasks/{task_id}/why",
        "GET /workers",
        "POST /access/keys",
        "POST /keys/{name}/pause",
        "POST /keys/{name}/resume",
        "POST /pause",
        "POST /queues/{name}/pause",
        "POST /queues/{name}/resume",
        "POST /resume",
        "POST /tasks/cancel",
        "POST /tasks/enqueue",
        "POST /tasks/enqueue/batch",
        "POST /tasks/retry",
        "POST /tasks/{task_id}/cancel",
        "POST /tasks/{task_id}/retry",
        "POST /types/{name}/pause",
        "POST /types/{name}/resume",
        "PUT /rules/tower",
        "PUT /rules/{kind}/{name}",
    ]


@pytest.mark.parametrize(("method", "path", "route"), ROUTES, ids=ids(ROUTES))
def test_a_route_says_what_it_does_and_shows_an_example(method: str, path: str, route: dict[str, Any]) -> None:
    """A summary, a description, an example or default of every parameter and of every answer."""
    assert route["summary"][0].isupper() and not route["summary"].endswith(".")
    assert len(route["description"]) > 20 and route["tags"]
    for parameter in route.get("parameters", []):
        schema = parameter["schema"]
        assert parameter["description"], parameter["name"]
        assert {"example", "examples"} & {*parameter, *schema} or "default" in schema, parameter["name"]
    for content in _contents(route):
        schema = resolved(content.get("schema", {}))
        shown = {"example", "examples"} & {*content, *schema}
        for name, field in schema.get("properties", {}).items():
            told = {*field, *resolved(field.get("items", field))}
            assert shown or {"example", "examples", "properties"} & told, f"{schema['title']}.{name}"


def _contents(route: dict[str, Any]) -> Iterator[dict[str, Any]]:
    bodies = [route["requestBody"]] if "requestBody" in route else []
    good = [answer for status, answer in route["responses"].items() if status.startswith("2")]
    for part in bodies + good:
        yield from part.get("content", {}).values()


@pytest.mark.parametrize(("method", "path", "route"), ROUTES, ids=ids(ROUTES))
def test_a_route_documents_how_it_can_fail(method: str, path: str, route: dict[str, Any]) -> None:
    """Every error is a problem document; which there are follows from what the route takes."""
    errors = {status: answer for status, answer in route["responses"].items() if int(status) >= 400}
    for status, answer in errors.items():
        assert len(answer["description"]) > 10
        if (path, status) != ("/health/ready", "503"):
            assert list(answer["content"]) == ["application/problem+json"]
            assert answer["content"]["application/problem+json"]["schema"] == {"$ref": "#/components/schemas/Problem"}
    wanted = {"421"} if path.startswith("/health") else {"401", "403", "421", "422", "429"}
    is_rule = route["tags"] == ["rules"] and method != "get"
    wanted |= {"404"} if "{task_id}" in path or "{key_id}" in path or is_rule else set()
    wanted |= {"503"} if path not in ("/health", "/handlers") else set()
    wanted |= {"413", "415"} if method != "get" else set()
    wanted |= {"400"} if "requestBody" in route else set()
    wanted |= {"409"} if "/enqueue" in path or path.endswith(("}/cancel", "}/retry")) else set()
    wanted |= {"416"} if path.endswith(("/log", "/files/{path}")) else set()
    assert errors.keys() == wanted


def test_the_document_is_served_as_it_is(api: Tower) -> None:
    """And the error's schema is ours, not the framework's."""
    document = api.client.get("/openapi.json").json()

    assert document["paths"].keys() == DOCUMENT["paths"].keys()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert {"type", "title", "status", "code", "detail"} == set(document["components"]["schemas"]["Problem"]["required"]) | {"type"}


SCHEMA = schemathesis.openapi.from_dict(
    DOCUMENT,
    config=SchemathesisConfig.from_dict(
        {
            "generation": {"deterministic": True, "max-examples": 10, "database": "none"},
            "phases": {"stateful": {"enabled": False}, "coverage": {"unexpected-methods": []}},
        }
    ),
)


@pytest.fixture(scope="module")
def url(api: Tower) -> Iterator[str]:
    """A server on the database of `api` that takes echo only."""
    config = uvicorn.Config(bare_app(api.settings, harmless()), port=0, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    server.config.app.state.orchestrator._prepared.set()  # type: ignore[union-attr]
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    wait_for("the server", lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    forget_all_tasks()


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        yield made


class Sense:
    """Makes part of the made-up requests meet what is there: real ids, real types, real files."""

    def __init__(self, api: Tower) -> None:
        self._api = api
        self._turn = itertools.count()
        self._final, self._waiting = api.enqueue("echo"), api.enqueue("echo", not_before=LATER)
        api.traced(self._final)

    def give(self, case: Any) -> None:
        turn = next(self._turn)
        parameters = case.path_parameters or {}
        if "task_id" in parameters and turn % 4:
            waits = turn % 4 == 3 and not case.path.endswith("/log")  # to follow a task that waits has no end
            parameters["task_id"] = self._waiting if waits else self._final
            if waits and case.method == "POST":  # it may be cancelled now
                self._waiting = self._api.enqueue("echo", not_before=LATER)
        if "path" in parameters and turn % 3 == 1:
            parameters["path"] = "output.json"
        several = case.body.get("tasks") if isinstance(case.body, dict) else None
        for body in several if isinstance(several, list) else [case.body]:
            if isinstance(body, dict) and turn % 2:
                body["type"] = "echo"


@pytest.fixture(scope="module")
def sense(api: Tower) -> Sense:
    return Sense(api)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")  # the tower's own threads do, beside the test
@SCHEMA.parametrize()
@settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
def test_a_route_does_what_the_document_says(case: Any, url: str, session: requests.Session, sense: Sense) -> None:
    """No server error, no status, type or body that is not documented, whatever is sent."""
    sense.give(case)
    case.call_and_validate(base_url=url, session=session, checks=CHECKS, timeout=20)

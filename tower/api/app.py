"""create_app: the routers, the guard before them, and an OpenAPI document that tells the truth."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import dramatiq
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tower import __version__, lifeline, ui
from tower.api import bulk, dashboard, errors, fleet, health, keys, login, rules, tasks, traces, why
from tower.api.access import LOGIN, LOGOUT, Access, check_rules
from tower.api.follow import Watch
from tower.api.guard import Guard
from tower.api.session import Sessions, kept_secret
from tower.api.short import ShortWay
from tower.handler import Registry
from tower.orchestrator import EnhancedOrchestrator
from tower.settings import Settings

_DESCRIPTION = "Takes in work as tasks, runs each through its handler, survives what breaks, and leaves a folder a person can read."

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(
    settings: Settings, orchestrator: EnhancedOrchestrator, registry: Registry, broker: dramatiq.Broker, lifespan: Lifespan | None = None
) -> FastAPI:
    """Make the web application around an orchestrator; `lifespan` starts and stops what runs beside it."""
    app = FastAPI(
        title="DevOps Control Tower",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # a page of ours shows it, without a script from elsewhere
        redoc_url=None,
    )
    app.state.settings, app.state.orchestrator, app.state.registry = settings, orchestrator, registry
    app.state.watch, app.state.sessions = Watch(), _sessions(settings)
    routers = (health.router, bulk.router, tasks.router, why.router, traces.router, fleet.router, rules.router, keys.router)
    for router in routers:
        app.include_router(router)
    pages = ui.install(app)
    login.install(app)
    dashboard.mount(app, settings, broker)
    errors.install(app)
    known = [
        *(route for router in (*routers, pages) for route in router.routes),
        *(route for route in app.routes if hasattr(route, "path")),
    ]
    check_rules(known)
    app.add_middleware(ShortWay, orchestrator=orchestrator)
    app.add_middleware(Access, settings=settings, sessions=app.state.sessions, routes=known, as_page=ui.as_page)
    forms = (dashboard.PATH + "/", "/ui/", LOGIN, LOGOUT)
    app.add_middleware(Guard, allowed_hosts=settings.allowed_hosts, max_body=settings.max_body_mb * 1_000_000, forms_below=forms)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _sessions(settings: Settings) -> Sessions:
    given = settings.session_secret
    return Sessions(given.get_secret_value() if given else kept_secret(lifeline.folder(settings.run_dir)))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's document with our own error schema in place of its default one."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = document["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        problem = errors.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= problem.pop("$defs") | {"Problem": problem}
        app.openapi_schema = document
    return app.openapi_schema

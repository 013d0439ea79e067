"""Fixtures of the pages: the app as a test client asks it, and a real tower with a real browser before it where there is one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dramatiq.brokers.stub import StubBroker
from fastapi import FastAPI
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page, sync_playwright

from actors.handlers import load
from tests.acceptance.stack import Stack
from tests.api.conftest import bare_app
from tests.conftest import BASE, LOCAL
from tests.ui.pages import KEY
from tower.handler import Registry
from tower.settings import Settings

#: A browser that the system has; none is downloaded.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; it ends with the file, since its event loop is in the way of others in the same thread."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the PATH")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An embedded tower in a process of its own, shared by the tests of a file; whoever has no key is admin."""
    made = Stack(tmp_path_factory.mktemp("pages"), TOWER_BOOTSTRAP_KEY=KEY)
    made.server()
    yield made
    made.close()


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser, stack: Stack) -> Iterator[Open]:
    """Open pages; whatever the browser finds wrong with one fails the test."""
    contexts, wrong = [], list[str]()

    def open_page(path: str, *, must_be_clean: bool = True, **options: object) -> Page:
        context = browser.new_context(base_url=f"http://127.0.0.1:{stack.port}", **options)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        if must_be_clean:
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def folder(stack: Stack) -> Path:
    """The folder that the tower runs in."""
    return stack.folder


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

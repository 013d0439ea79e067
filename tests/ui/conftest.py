"""Fixtures of the pages' tests: a real tower, and a real browser before it where there is one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.acceptance.stack import Stack

#: A browser that the system has; none is downloaded.
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
BOOTSTRAP = "a-bootstrap-key-for-tests"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium for the session."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the PATH")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An embedded tower in a process of its own, shared by the tests of a file; whoever has no key is admin."""
    made = Stack(tmp_path_factory.mktemp("pages"), TOWER_BOOTSTRAP_KEY=BOOTSTRAP)
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
        page.set_default_timeout(10_000)
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

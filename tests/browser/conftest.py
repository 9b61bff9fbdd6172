"""A real Chromium, and sites for it: an app in this process, served on a port of its own."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from werkzeug.serving import WSGIRequestHandler, make_server

from feature_extraction_server.core.engine import Engine
from feature_extraction_server.flask.app import create_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 60_000
ARGUMENTS = [
    "--no-sandbox",  # which root may not use
    "--use-fake-device-for-media-stream",  # a microphone that beeps
    "--use-fake-ui-for-media-stream",
]

MakeSite = Callable[..., str]
OpenPage = Callable[..., Page]


class RequestHandler(WSGIRequestHandler):
    """Lets a browser ask several times by one connection, and logs nothing of it."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt-get install chromium): the pages are not tested")
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lasting_process(browser: Browser) -> psutil.Process | None:
    """Playwright's driver, whose child the browser is."""
    (driver,) = [child for child in psutil.Process().children() if "playwright" in " ".join(child.cmdline())]
    return driver


@pytest.fixture
def site(build: Callable[..., Engine]) -> Iterator[MakeSite]:
    """``site(SETTING=value, ...)`` serves all plugins and the fakes, and returns the URL of the page.

    ``middleware`` is put between the server and the app.
    """
    servers = []

    def make(middleware: Callable[[Any], Any] = lambda app: app, **settings: str) -> str:
        app = middleware(create_app(build(**settings)))
        servers.append(make_server("127.0.0.1", 0, app, threaded=True, request_handler=RequestHandler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), name="site", daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """``open_page(url, **options)`` opens a URL in a context of its own. A page that complains fails the test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_(url: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []


def is_complaint(message: Any) -> bool:
    """Tell an error or a warning of the page from the browser's note that the server answered with an error."""
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text

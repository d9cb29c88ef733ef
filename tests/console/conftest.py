"""Chromium, and pages that are watched: what they ask for, and what they complain about."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from e2e.conftest import KEY, Running, model_dir, start_server

__all__ = ["model_dir", "start_server"]  # fixtures, used by name

# What keeps Chromium quiet in a container without a GPU: it must talk to the server alone.
CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
WAIT_MS = 20_000  # shared machines stall for seconds
DESKTOP = {"width": 1360, "height": 900}


@pytest.fixture(scope="module")
def browser(tool: Callable[[str], str]) -> Iterator[Browser]:
    """Closed after each file: as long as it is open, Playwright has an event loop running in this thread, and tests
    elsewhere start their own."""
    path = tool("chromium")
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Running]) -> Running:
    """A tiny model with a cache of a fifth of its vocabulary."""
    return start_server("--device-cache", "60").wait_ready()


@dataclass
class Visits:
    """Opens pages of one server and judges them at the end of a test."""

    browser: Browser
    url: str
    complaints: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # patterns of console errors that a test provokes

    def open(self, key: str | None = KEY, url: str | None = None, **options: object) -> Page:
        """The console, loaded and polling; `options` are the browser context's."""
        context = self.browser.new_context(**{"viewport": DESKTOP} | options)  # type: ignore[arg-type]
        context.set_default_timeout(WAIT_MS)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('tolserve-api-key', '{key}')")
        page = context.new_page()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        page.goto(url or self.url)
        return page

    def judge(self) -> None:
        left = [text for text in self.complaints if not any(re.search(pattern, text) for pattern in self.expected)]
        assert left == []
        assert [url for url in self.asked if not url.startswith("http://127.0.0.1:")] == []


@pytest.fixture
def visits(browser: Browser, server: Running) -> Iterator[Visits]:
    """After each test no page may have logged an error that was not `expected`, or asked anyone but the server."""
    visits = Visits(browser, server.url)
    try:
        yield visits
        visits.judge()
    finally:
        for context in browser.contexts:
            context.close()


@pytest.fixture
def page(visits: Visits) -> Page:
    return visits.open()

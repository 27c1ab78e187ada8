"""The page in a browser, for the tests that drive it: a browser a file, a first visit a test."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
from page_server import PageServer
from page_window import Window


@pytest.fixture(scope="module")
def window() -> Iterator[Window]:
    """A server and a browser, for a module."""
    server = PageServer()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser.Browser(Path(profile), 20) as chromium,
    ):
        yield Window(chromium, server)
    server.stop()


@pytest.fixture
def page(window: Window) -> Iterator[Window]:
    """The page as at its first visit. After the test: no complaint, no request to another host."""
    server, chromium = window.server, window.browser
    server.reset()
    chromium.show(1400, 900)
    chromium.open("about:blank")
    chromium.call("Storage.clearDataForOrigin", origin=server.url.rstrip("/"), storageTypes="all")
    chromium.complaints.clear()
    chromium.requests.clear()
    window.open()
    yield window
    server.release.set()
    assert chromium.complaints == [], chromium.complaints
    own = (server.url, "about:blank", f"blob:{server.url}")
    assert [url for url in chromium.requests if not url.startswith(own)] == []

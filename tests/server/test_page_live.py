"""The chat page in a browser, served by a model: what it shows was recorded from the run."""

import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import browser
import pytest
import small
import uvicorn
from page_window import Window as Page
from page_window import needs_chromium

from mistral import Decoder
from mistral.chat import tool
from mistral.server.app import App, Settings
from mistral.server.service import Service
from mistral.server.window.toolbox import ServedTool, Toolbox
from mistral.server.window.window import Window

pytestmark = needs_chromium


@tool
def now() -> str:
    """Tell the time."""
    return "noon"


@pytest.fixture(scope="module")
def served():
    """A random model behind the whole application, on a port: (its address, its service)."""
    model = small.model(vocab_size=32032, max_position_embeddings=2048, sliding_window=64).float()
    tools = Toolbox([ServedTool(now, "my_tools.py")])

    def open():
        window = Window(model=model, engine="eager", tools=tools)
        engine = Decoder(model, 2, slack=16)
        return Service(engine, small.true_tokenizer(), window=window, max_new_tokens=40)

    app = App(open, Settings(), wait=True)
    config = uvicorn.Config(app.asgi, port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/", app.service
    app.is_draining = True
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()  # the stream of the run has ended


def test_the_page_shows_the_run_that_it_is_served_by(served):
    url, service = served
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser.Browser(Path(profile), 20) as chromium,
    ):
        page = Page(chromium, SimpleNamespace(url=url, bodies=[]))
        chromium.show(1400, 900)
        page.open()
        # 1. With the panel closed nothing is recorded.
        page.ask("Hi", wait=False)
        page.wait("document.querySelector('article.answer .facts')")
        assert service.passes.recorded == 0 and service.passes.listeners == 0
        assert chromium.complaints == []
        # 2. With the panel open: tokens, passes, slots.
        page.click("#run-toggle")
        page.wait("document.querySelectorAll('.slot').length === 2")
        page.ask("Again", wait=False)
        page.wait("document.querySelectorAll('.token.generated').length === 40")
        assert page.js("document.querySelectorAll('.bars i').length") == service.passes.recorded
        page.js("document.querySelectorAll('.token.generated')[1].focus()")
        assert "%" in page.text("#popover") and "forward pass" in page.text("#popover")
        assert page.js("document.querySelectorAll('.token.rolled[data-at]').length") > 0
        # 3. Closed again.
        recorded = service.passes.recorded
        page.click("#run-toggle")
        deadline = time.monotonic() + 60
        while service.passes.listeners and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.passes.listeners == 0
        # 4. Look inside: a page of its own, whose script runs and sees nothing of this one.
        page.js("window.open = (...args) => { window.opened_with = args }")
        page.click("article.answer button", "Look inside this answer", last=True)
        page.wait("window.opened_with")
        path = page.js("window.opened_with[0].pathname")
        assert path.startswith("/page/inside/") and service.passes.recorded == recorded
        chromium.open(url.rstrip("/") + path)
        page.wait("document.body.dataset.shown")
        assert page.js("origin") == "null"
        assert "were generated. Click" in page.js("document.getElementById('tokens').innerText")
        assert chromium.complaints == []
        assert all(one.startswith((url, "about:", "data:")) for one in chromium.requests)

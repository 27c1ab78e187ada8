"""The page in a browser, with the answers of a script: what the tests of the page share."""

import json
import time

import browser
import pytest
from page_server import PageServer

needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
IS_IDLE = "!document.querySelector('#send.stop')"


class Window:
    """The page: a person at the keyboard, and what is on the screen."""

    def __init__(self, browser: browser.Browser, server: PageServer):
        self.browser = browser
        self.server = server
        self._opened = 0

    def open(self, path: str = "") -> None:
        """Load the page, and wait until it is ready."""
        # Another address, since one that differs in its # alone loads nothing; and of the same host,
        # since a browser takes a new process for another one.
        self._opened += 1
        self.browser.open(f"{self.server.url}?{self._opened}{path}")
        self.wait("document.body.dataset.ready === 'yes'")

    def reopen(self) -> None:
        """Load the same conversation again, when the browser has written what the page stores."""
        # Transactions of one store end in the order in which they began.
        self.js(
            "(() => { window.isStored = false; const request = indexedDB.open('mistral');"
            "request.onsuccess = () => { const database = request.result;"
            "const stores = [...database.objectStoreNames];"
            "database.transaction(stores, 'readwrite').oncomplete = () => {"
            "database.close(); window.isStored = true } } })()"
        )
        self.wait("window.isStored")
        self.open(self.js("location.hash"))

    def js(self, expression: str):
        return self.browser.evaluate(expression)

    def wait(self, expression: str) -> None:
        tried = f"try {{ return Boolean({expression}) }} catch {{ return false }}"
        self.browser.wait(f"(() => {{ {tried} }})()")

    def focus(self) -> None:
        self.js("document.getElementById('composer-text').focus()")

    def ask(self, text: str, wait: bool = True) -> None:
        """Write a question and press Enter; wait for the end of the answer."""
        before = len(self.server.bodies)
        self.focus()
        self.browser.write(text)
        self.browser.enter()
        if wait:
            self.idle(before)

    def idle(self, before: int | None = None) -> None:
        """Wait until no answer is being written; before: at least one more request was sent."""
        self.wait(f"{IS_IDLE} && document.querySelector('article.answer, .empty')")
        until = time.monotonic() + self.browser.patience
        while before is not None and len(self.server.bodies) <= before:
            assert time.monotonic() < until, "the page has sent no request"
            time.sleep(0.01)
        self.wait(IS_IDLE)

    def click(self, selector: str, text: str | None = None, last: bool = False) -> None:
        """Click on an element of a selector, with this text or title."""
        self.wait(f"{self._find(selector, text, last)}")
        self.js(f"{self._find(selector, text, last)}.click()")

    @staticmethod
    def _find(selector: str, text: str | None, last: bool) -> str:
        fits = (
            "true"
            if text is None
            else f"(e.textContent.trim() === {json.dumps(text)} || e.title === {json.dumps(text)})"
        )
        place = "at(-1)" if last else "at(0)"
        return f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => {fits}).{place}"

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements of a selector."""
        return self.js(
            f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText.trim())"
        )

    def text(self, selector: str) -> str:
        """The text of the last element of a selector."""
        return self.texts(selector)[-1]

    def type(self, selector: str, text: str) -> None:
        """Put a text into a field."""
        self.js(
            f"(e => {{ e.value = {json.dumps(text)}; e.dispatchEvent(new Event('input')); "
            f"e.dispatchEvent(new Event('change')) }})(document.querySelector({json.dumps(selector)}))"
        )

    def close_dialog(self) -> None:
        self.js("document.querySelector('dialog').close()")
        self.wait("!document.querySelector('dialog')")

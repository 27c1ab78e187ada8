"""A headless Chromium for the tests, driven through its debugging pipe: no driver, no port."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
).split()
# Chromium reads commands from file 3 and answers on file 4.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """One page.

    complaints  errors and warnings of its console
    requests    what it asked the network for
    """

    def __init__(self, profile: Path, patience: float = 60):
        self.patience = patience
        self.complaints: list[str] = []
        self.requests: list[str] = []
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        self._waiting = b""
        self._last_id = 0
        command = [sys.executable, "-c", START, str(their_in), str(their_out), CHROMIUM, *FLAGS]
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._session = None
        pages = [
            target
            for target in self.call("Target.getTargets")["targetInfos"]
            if target["type"] == "page"
        ]
        target = (
            pages[0]["targetId"]
            if pages
            else self.call("Target.createTarget", url="about:blank")["targetId"]
        )
        self._attach(target)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _attach(self, target: str) -> None:
        self._session = None
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    @contextmanager
    def other_tab(self) -> Iterator[None]:
        """A second tab: until the end, all calls are for it."""
        self._first = self._session
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._attach(target)
        try:
            yield
        finally:
            self._session = None
            self.call("Target.closeTarget", targetId=target)
            self._session = self._first

    @contextmanager
    def first_tab(self) -> Iterator[None]:
        """Within `other_tab`: until the end, all calls are for the first tab."""
        other = self._session
        self._session = self._first
        try:
            yield
        finally:
            self._session = other

    def call(self, method: str, **parameters) -> dict:
        """One command of the DevTools protocol, and its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _receive(self) -> dict:
        until = time.monotonic() + self.patience
        while b"\0" not in self._waiting:
            if not select.select([self._in], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError(f"Chromium has not answered for {self.patience} s")
            if not (read := os.read(self._in, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self._waiting += read
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str | None, what: dict) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(what["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(what["args"]))
        elif event == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            entry = what["entry"]
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}".strip())
        elif event == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page (awaited)."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        until = time.monotonic() + self.patience
        while not self.evaluate(expression):
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{expression} has not come true in {self.patience} s; {self.complaints}"
                )
            time.sleep(0.02)

    def show(self, width: int, height: int, dark: bool = False) -> None:
        """The size of the window, and its colours."""
        self._window = (width, height, dark)
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path | str) -> None:
        """Load a page from a file or an address."""
        url = page.absolute().as_uri() if isinstance(page, Path) else page
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """A real click of the mouse on an element, at a share of its width and height."""
        spot = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            f"return [b.left + {across} * b.width, b.top + {down} * b.height]; }})()"
        )
        x, y = self.evaluate(spot)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key, for example ArrowRight."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def write(self, text: str) -> None:
        """Type a text where the focus is."""
        self.call("Input.insertText", text=text)

    def enter(self, modifiers: int = 0) -> None:
        """The Enter key. modifiers: 2 Ctrl, 8 Shift."""
        self.key("Enter", "\r", 13, modifiers)

    def key(self, key: str, text: str = "", code: int = 0, modifiers: int = 0) -> None:
        """A key that may write a text or have modifiers."""
        what = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call(
            "Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **what
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG file: the window is made as high as the page for it."""
        height = self.evaluate("document.documentElement.scrollHeight")
        self.show(self._window[0], height, self._window[2])
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

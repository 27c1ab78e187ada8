"""The application on a socket: signals, and an end that lets running requests finish."""

import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from mistral.server.app import App

_AFTER_CANCEL = 2  # seconds for the last words of requests that were cancelled


def serve(app: App, host: str, port: int, say: Callable[[str], object]) -> None:
    """Serve until SIGTERM or Ctrl-C; then running requests may finish, as the settings say.

    port  0: any free one
    say   receives the address, and a line when the server begins to end

    Raises OSError if the address cannot be bound, and whatever prevented the model from loading.
    """
    with _bound(host, port) as listening:
        address = listening.getsockname()
        name = f"[{address[0]}]" if ":" in address[0] else address[0]
        config = uvicorn.Config(
            app.asgi,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_AFTER_CANCEL,
        )
        server = _Server(config, app, say)
        say(f"serving at http://{name}:{address[1]}")
        # A browser on this machine reaches a server that listens everywhere at a loopback address.
        own = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(name, name)
        say(f"chat window: http://{own}:{address[1]}/")
        server.run(sockets=[listening])
    if app.failure is not None:
        raise app.failure


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send every event of a stream at once."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        listening = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from None
    # asyncio turns Nagle's algorithm off only if the protocol is named; with it the first event
    # waits for 40 ms until the client has acknowledged the head.
    number = listening.detach()
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=number)


class _Server(uvicorn.Server):
    """Drains at the first signal: new requests get 503, running ones finish. The second ends it."""

    def __init__(self, config: uvicorn.Config, app: App, say: Callable[[str], object]):
        super().__init__(config)
        self._app = app
        self._say = say
        self._deadline: float | None = None  # when running requests are cancelled; None: never
        self._was_cancelled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; this is its handler."""
        if self._deadline is not None:
            super().handle_exit(sig, frame)
            return
        self._app.is_draining = True
        self._deadline = time.monotonic() + self._app.settings.drain
        name = signal.Signals(sig).name
        self._say(f"{name}: running requests may take {self._app.settings.drain:g} s more")

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now; called ten times a second."""
        if self._app.failure is not None:
            return True
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if not self.server_state.tasks or left < -_AFTER_CANCEL:
                return True
            if left <= 0 and not self._was_cancelled:
                self._was_cancelled = True
                await self._app.cancel_all()
        return await super().on_tick(counter)

"""Serving: continuous batching on the rows of an engine, and the endpoints that clients expect."""

from importlib.util import find_spec
from typing import Any

from mistral.errors import MistralError
from mistral.server.request import Chosen, Request, Run
from mistral.server.slots import QueueFull, Slots
from mistral.server.worker import Snapshot, Stopped, Stream, Worker

__all__ = [
    "Chosen",
    "QueueFull",
    "Request",
    "Run",
    "Slots",
    "Snapshot",
    "Stopped",
    "Stream",
    "Worker",
    "create_app",
    "require_extra",
]

_EXTRA = ("starlette", "uvicorn", "prometheus_client", "pydantic", "llguidance", "jsonschema_rs")


class MissingExtra(MistralError, ImportError):
    """The packages of the extra `serve` are not installed."""


def require_extra() -> None:
    """Raises MissingExtra unless the packages are installed that the endpoints need."""
    if missing := [name for name in _EXTRA if find_spec(name) is None]:
        raise MissingExtra(
            f"{missing[0]} is not installed; install the extra: "
            "pip install 'mistral-from-scratch[serve]'"
        )


def __getattr__(name: str) -> Any:
    """`create_app`: slots alone need nothing of the extra `serve`."""
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_extra()
    from mistral.server.app import create_app

    return create_app

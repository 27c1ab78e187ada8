"""What every API does with answers: one reply, or events while they are written."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mistral.server.choice import Choice, Delta
from mistral.server.protocol.errors import ApiError

Event = dict[str, Any]


class Reply(ABC):
    """The reply to one request. An API overrides it; a stream is begin, chunks of deltas, end.

    One that is not streamed is told the deltas by `note`, and then is `whole`.

    names_events  whether each event has its type as its name, in a line of its own
    last_line     the data of the last event, if it is not JSON
    """

    names_events: ClassVar[bool] = False
    last_line: ClassVar[str | None] = "[DONE]"

    def __init__(self, choices: Sequence[Choice]):
        self.choices = choices

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The reply when all answers have ended."""

    def note(self, delta: Delta) -> None:  # noqa: B027
        """A delta of a reply that is not streamed; most find all that they need in the choices."""

    @abstractmethod
    def begin(self) -> Iterator[Event]:
        """The events before the first token."""

    @abstractmethod
    def chunks(self, delta: Delta) -> Iterator[Event]:
        """The events of one delta."""

    @abstractmethod
    def end(self) -> Iterator[Event]:
        """The events after the last token."""

    def failed(self, error: ApiError) -> Iterator[Event]:
        """The events of an error in the middle of a stream; they are the last."""
        yield error.body()

    def encoded(self, event: Event) -> bytes:
        """A server-sent event."""
        name = f"event: {event['type']}\n" if self.names_events else ""
        return f"{name}data: {to_json(event)}\n\n".encode()

    def encoded_end(self) -> bytes:
        """What follows the last event."""
        return b"" if self.last_line is None else f"data: {self.last_line}\n\n".encode()


def to_json(value: Any) -> str:
    """JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

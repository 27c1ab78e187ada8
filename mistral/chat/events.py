"""The events of an answer, in their order: `ToolCallStream` and `Conversation` return them."""

from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]  # begin and end in the model's text


@dataclass(frozen=True)
class Text:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class Call:
    """The model calls a function.

    arguments  by name; JSON can hold all of them
    span       of the call in the model's text, its tags included; None if it was not parsed from
               text
    id         names the call in its result, in formats that need one
    written    the arguments as the model wrote them, if that is JSON: numbers have all their digits
    """

    name: str
    arguments: dict[str, Any]
    span: Span | None = None
    id: str | None = None
    written: str | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Result:
    """A function returned `content`, as in JSON."""

    name: str
    content: Any


@dataclass(frozen=True)
class Error:
    """A call failed: nothing has happened, and the model may call again.

    span, source  of a call that cannot be parsed: its place in the model's text, and its text
    """

    message: str
    span: Span | None = None
    source: str = ""


@dataclass(frozen=True)
class Altered:
    """A function ran, but the model reads less than its `Result`, or another form of it."""

    name: str
    message: str


@dataclass(frozen=True)
class Unfinished:
    """A function was started, and whether it has done its work is not known.

    It ran out of time. The model is told not to repeat the call.
    """

    name: str
    message: str


@dataclass(frozen=True)
class Trimmed:
    """The conversation was too long: it has forgotten its oldest `messages` messages."""

    messages: int


@dataclass(frozen=True)
class End:
    """The last event; `Conversation.say` lists the reasons."""

    reason: str


Event = Text | Call | Result | Error | Altered | Unfinished | Trimmed | End

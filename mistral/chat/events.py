"""What happens while a model answers: the events that `ToolCallStream` and `Conversation` give, in
their order.
"""

from dataclasses import dataclass
from typing import Any

Span = tuple[int, int]


@dataclass(frozen=True)
class Text:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class Call:
    """The model calls a function.

    arguments  by name; everything in them can be written as JSON
    span       where the call stands in the model's text, its tags included; None for one that was
               not read from text
    id         what its result refers to it by, in formats that need one
    """

    name: str
    arguments: dict[str, Any]
    span: Span | None = None
    id: str | None = None


@dataclass(frozen=True)
class Result:
    """What a function gave back."""

    name: str
    content: Any


@dataclass(frozen=True)
class Error:
    """Something went wrong, and the model can be told.

    span, source  for a call that cannot be read: where it stands in the model's text, and that part
                  of the text
    """

    message: str
    span: Span | None = None
    source: str = ""


@dataclass(frozen=True)
class End:
    """Nothing follows; `Conversation.say` lists the reasons."""

    reason: str


Event = Text | Call | Result | Error | End

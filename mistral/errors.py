"""The exceptions that this package raises on purpose: each message says what is wrong and why."""

from mistral.printable import on_one_line


class MistralError(Exception):
    """Base of the errors below. Its text is one printable line, whatever a file put into it."""

    def __str__(self) -> str:
        return on_one_line(" ".join(super().__str__().splitlines()))


class CheckpointError(MistralError, ValueError):
    """A checkpoint's files are missing, damaged, contradictory, or of an unsupported type."""


class NotEnoughMemory(MistralError, RuntimeError):
    """The request does not fit into memory; the message says what it needs and what would fit."""


class ConversationError(MistralError, ValueError):
    """A conversation cannot continue as asked; it is as it was before."""


def shown(value: object, limit: int = 80) -> str:
    """How a message shows a value that a file holds: its repr, on one line."""
    return one_line(repr(value), limit)


def one_line(text: str, limit: int = 300) -> str:
    """A message on one printable line that any tokenizer can read; a long one loses its middle."""
    text = on_one_line(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"

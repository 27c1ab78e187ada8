"""The exceptions that this package raises on purpose: each message says what is wrong and why."""


class MistralError(Exception):
    """Base of the errors below."""


class CheckpointError(MistralError, ValueError):
    """A checkpoint's files are missing, damaged, contradictory, or of an unsupported type."""


class NotEnoughMemory(MistralError, RuntimeError):
    """The request does not fit into memory; the message says what it needs and what would fit."""


class ConversationError(MistralError, ValueError):
    """A conversation cannot continue as asked; it is as it was before."""


def one_line(text: str, limit: int = 300) -> str:
    """A message on one line that any tokenizer can read; a long one loses its middle."""
    text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"

"""The exceptions that this package raises on purpose; each message names the thing and the
remedy.
"""


class MistralError(Exception):
    """Base of the errors below."""


class CheckpointError(MistralError, ValueError):
    """A checkpoint's files are missing, damaged, contradictory, or of a kind that is not read."""


class NotEnoughMemory(MistralError, RuntimeError):
    """What was asked for does not fit; the message says what it needs and what would fit."""

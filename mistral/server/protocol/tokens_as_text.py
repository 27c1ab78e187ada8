"""Tokens as text, and their log-probabilities, in the forms of OpenAI's APIs."""

from typing import Any

from mistral.server.request import Chosen
from mistral.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no infinity: the log-probability of an id that cannot come


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token as text: a control token by its spelling, a part of a character by its bytes."""
    piece = tokenizer.token_bytes(id)
    if piece is None:
        return tokenizer.control_text(id) or ""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def logprob(value: float | None) -> float:
    """A log-probability that JSON can hold."""
    return _LEAST if value is None else max(value, _LEAST)


def token_logprob(tokenizer: Tokenizer, token: Chosen) -> dict[str, Any]:
    """A token with its log-probability and those of the most probable ones."""
    top = [_token(tokenizer, id, value) for id, value in token.top]
    return _token(tokenizer, token.id, token.logprob) | {"top_logprobs": top}


def _token(tokenizer: Tokenizer, id: int, value: float | None) -> dict[str, Any]:
    text = token_text(tokenizer, id)
    piece = tokenizer.token_bytes(id)
    return {
        "token": text,
        "logprob": logprob(value),
        "bytes": list(text.encode() if piece is None else piece),
    }

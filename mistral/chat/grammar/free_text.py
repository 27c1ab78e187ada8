"""Constraints on answers of free text: no control token in it, except for the one before calls."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mistral.chat.grammar.token_masks import GrammarConstraint
from mistral.engine.base import Constraint, Engine
from mistral.engine.constraints import FixedMask
from mistral.tokenizer import Tokenizer


class TextOnly(FixedMask):
    """Allows tokens of text and stop tokens: no control token, and no id without a token."""

    def __init__(self, decoder: Engine, tokenizer: Tokenizer, stop_tokens: Sequence[int]):
        ids = range(decoder.config.vocab_size)
        allowed = [tokenizer.token_bytes(id) is not None or id in stop_tokens for id in ids]
        super().__init__(decoder, allowed)

    def copy(self) -> "TextOnly":
        """Itself: it has no state."""
        return self


class TextOrCalls(Constraint):
    """Allows text, or `call_token` and a list of calls after it.

    text      the constraint on text
    calls     the constraint on the list; None: that on text
    required  only calls are allowed
    """

    def __init__(
        self,
        text: TextOnly | GrammarConstraint,
        calls: GrammarConstraint | None,
        call_token: int,
        required: bool,
    ):
        self._text = text
        self._calls = calls
        self._call_token = call_token
        self._required = required
        self._now: TextOnly | GrammarConstraint | None = None  # None: before the first token

    def mask(self) -> Tensor:
        """bool [V]."""
        if self._now is not None:
            return self._now.mask()
        mask = self._text.mask()
        mask = torch.zeros_like(mask) if self._required else mask.clone()
        mask[self._call_token] = True
        return mask

    def accept(self, id: int) -> None:
        """Take note of an id; the first one decides between text and calls."""
        if self._now is not None:
            self._now.accept(id)
        elif id == self._call_token and self._calls is not None:
            self._now = self._calls
        else:
            self._now = self._text
            self._text.accept(id)

    def forced(self) -> list[int]:
        """The ids that a grammar of calls forces; the call token first, if a call is required."""
        if self._now is not None:
            return self._now.forced()
        return [self._call_token] if self._required else []

    def copy(self) -> "TextOrCalls":
        """One for another answer."""
        calls = self._calls and self._calls.copy()
        return TextOrCalls(self._text.copy(), calls, self._call_token, self._required)

"""Constraints on answers whose text is free: no control token in it, but for the one behind which
calls stand.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mistral.chat.grammar.token_masks import GrammarConstraint
from mistral.engine.constraints import FixedMask, forced_ids
from mistral.engine.decoder import Engine
from mistral.tokenizer import Tokenizer


class TextOnly(FixedMask):
    """A constraint to tokens that are text, and those that end it: no control token, no row without
    a token.
    """

    def __init__(self, decoder: Engine, tokenizer: Tokenizer, stop_tokens: Sequence[int]):
        ids = range(decoder.config.vocab_size)
        super().__init__(
            decoder, [tokenizer.token_bytes(id) is not None or id in stop_tokens for id in ids]
        )

    def copy(self) -> "TextOnly":
        """Itself: it remembers nothing."""
        return self


class TextOrCalls:
    """A constraint to text, or to `call_token` and what stands behind it then: a list of calls.

    text      the constraint on text
    calls     the constraint on the list; None: that on text
    required  only calls may come
    """

    def __init__(
        self, text: TextOnly, calls: GrammarConstraint | None, call_token: int, required: bool
    ):
        self._text, self._calls, self._call_token, self._required = (
            text,
            calls,
            call_token,
            required,
        )
        self._now: TextOnly | GrammarConstraint | None = None  # nothing yet

    def mask(self) -> Tensor:
        """bool [V]."""
        if self._now is not None:
            return self._now.mask()
        mask = self._text.mask()
        mask = torch.zeros_like(mask) if self._required else mask.clone()
        mask[self._call_token] = True
        return mask

    def accept(self, id: int) -> None:
        """The first id decides what the others may be."""
        if self._now is not None:
            self._now.accept(id)
        elif id == self._call_token and self._calls is not None:
            self._now = self._calls
        else:
            self._now = self._text

    def forced(self) -> list[int]:
        """What a grammar of the calls leaves no choice about; the first token, where a call is
        required.
        """
        if self._now is not None:
            return forced_ids(self._now)
        return [self._call_token] if self._required else []

    def copy(self) -> "TextOrCalls":
        """One for another answer."""
        calls = self._calls and self._calls.copy()
        return TextOrCalls(self._text, calls, self._call_token, self._required)

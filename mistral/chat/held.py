"""The part of a conversation that is in the decoder."""

import copy
from collections.abc import Sequence
from typing import Any

from mistral.engine.base import Engine
from mistral.errors import ConversationError


class Held:
    """The part of a conversation that its decoder holds, so that it is not prefilled again.

    ids       the tokens
    messages  copies of the messages that they encode, the assistant's last; empty: not known
    """

    def __init__(self, decoder: Engine):
        self.ids: list[int] = []
        self.messages: list[dict[str, Any]] = []
        self._decoder = decoder
        self._left = 0  # the decoder's length after the last turn

    def forget(self) -> None:
        """Empty the decoder."""
        self._decoder.rewind(self._decoder.lengths[0])
        self.ids = []
        self.messages = []
        self.leave()

    def go_back(self) -> None:
        """Roll the decoder back to `ids`, if the listener left an answer before its end.

        An empty decoder holds nothing. Raises ConversationError for one that holds other tokens.
        """
        length = self._decoder.lengths[0]
        if not length:
            self.forget()
        # another conversation may have as many tokens
        elif length != self._left or self._decoder.holder is not self:
            raise ConversationError(
                f"the decoder holds {length} tokens that are not this conversation's: give every "
                "conversation a decoder of its own, or empty it between their turns "
                f"(decoder.rewind({length}))"
            )
        self._rewind(len(self.ids))

    def count_read(self, messages: Sequence[Any]) -> int:
        """How many of the messages are as the model read them; 0 if any of those has changed."""
        read = len(self.messages)
        return read if list(messages[:read]) == self.messages else 0

    def keep(self, ids: Sequence[int]) -> int:
        """Keep of the decoder's tokens those that `ids` begins with, and return their number.

        At least one of `ids` is not kept: the decoder needs a token to prefill.
        """
        same = 0
        for held, wanted in zip(self.ids, ids[:-1]):
            if held != wanted:
                break
            same += 1
        self.messages = []
        self._rewind(same)
        return len(self.ids)

    def add(self, ids: Sequence[int], messages: Sequence[dict[str, Any]]) -> None:
        """Add tokens; with them the decoder holds these messages (none: not exactly)."""
        self.ids += ids
        self.messages = copy.deepcopy(list(messages))

    def leave(self) -> None:
        """Remember the decoder's state until the next turn."""
        self._left = self._decoder.lengths[0]
        self._decoder.holder = self

    def _rewind(self, length: int) -> None:
        try:
            self._decoder.rewind(self._decoder.lengths[0] - length)
            self.ids = self.ids[:length]
            self.leave()
        except ValueError:  # the cache cannot roll back that far
            self.forget()

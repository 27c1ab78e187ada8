"""The part of a conversation that is in the decoder."""

from mistral.engine.base import Engine
from mistral.errors import ConversationError


class Held:
    """The part of a conversation that its decoder holds, so that it is not prefilled again.

    tokens    how many tokens; 0: the conversation is prefilled from its beginning
    messages  how many messages
    """

    def __init__(self, decoder: Engine):
        self.tokens = 0
        self.messages = 0
        self._decoder = decoder
        self._left = 0  # the decoder's length after the last turn

    def forget(self) -> None:
        """Empty the decoder."""
        self._decoder.rewind(self._decoder.lengths[0])
        self.tokens = 0
        self.messages = 0
        self.leave()

    def go_back(self) -> None:
        """Roll the decoder back to `tokens`, if the listener left an answer before its end.

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
        try:
            self._decoder.rewind(length - self.tokens)
            self.leave()
        except ValueError:  # the cache cannot roll back that far
            self.forget()

    def add(self, tokens: int, messages: int) -> None:
        """Add tokens; with them the decoder holds the first `messages` messages."""
        self.tokens += tokens
        self.messages = messages

    def leave(self) -> None:
        """Remember the decoder's state until the next turn."""
        self._left = self._decoder.lengths[0]
        self._decoder.holder = self

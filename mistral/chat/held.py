"""What a decoder holds of a conversation."""

from mistral.chat.saved import ConversationError
from mistral.engine.decoder import Engine


class Held:
    """The part of a conversation that its decoder has read or written, and need not read again.

    tokens    how many tokens that are; 0: the conversation is read from its beginning
    messages  how many messages
    """

    def __init__(self, decoder: Engine):
        self.tokens = self.messages = 0
        self._decoder, self._left = decoder, 0

    def forget(self) -> None:
        """Empty the decoder."""
        self._decoder.rewind(self._decoder.lengths[0])
        self.tokens = self.messages = 0
        self.leave()

    def go_back(self) -> None:
        """Bring the decoder back to `tokens`, where the listener left an answer while it went on.

        Of a decoder that is empty it holds nothing. Raises ConversationError for one that something
        else filled.
        """
        length = self._decoder.lengths[0]
        if not length:
            self.forget()
        elif (
            length != self._left or self._decoder.holder is not self
        ):  # another conversation may have as many tokens
            raise ConversationError(
                f"the decoder holds {length} tokens that are not this conversation's: give every "
                f"conversation a "
                f"decoder of its own, or empty it between their turns (decoder.rewind({length}))"
            )
        try:
            self._decoder.rewind(length - self.tokens)
            self.leave()
        except ValueError:  # more than the cache can take back
            self.forget()

    def add(self, tokens: int, messages: int) -> None:
        """So many more tokens were heard; with them the decoder holds the first `messages`."""
        self.tokens += tokens
        self.messages = messages

    def leave(self) -> None:
        """Remember how the decoder is left, until the next turn."""
        self._left = self._decoder.lengths[0]
        self._decoder.holder = self

"""One turn of the assistant, while the model writes it."""

from collections.abc import Iterator, Sequence
from typing import Any

from mistral.chat.events import Call, Event
from mistral.chat.formats import ChatFormat
from mistral.chat.reader import AnswerReader
from mistral.engine.base import Constraint, Engine
from mistral.engine.constraints import CountsForced
from mistral.engine.decoder import Decoder
from mistral.engine.generation import generate
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

# Tokens that can be rolled back once the window rolls: an end of turn that the model spelled
SLACK = 32


class Answer:
    """The text that a decoder writes after `prompt_ids`: iterate over its pieces, or its `events`.

    text    written so far
    ids     its tokens, without the one that ended it
    whole   whether `ids` spell all of it: a string of `stop` may begin within a token
    reason  why it ended: "stop"; "length" after `max_new_tokens` or when the decoder is full;
            "interrupted" until then

    When the text has ended, the decoder holds the prompt and `ids`, and nothing more. After an
    interruption `settle` makes `ids` the tokens of `text`; the decoder may hold a few more then.

    stop          strings that end the answer, and are not part of it
    spelled_ends  whether an end of turn that is spelled as text ends the answer, as in `ChatFormat`

    Neither ends it inside a call. Raises the errors of `mistral.generate`, and ValueError for a
    prompt that leaves no room for an answer.
    """

    def __init__(  # noqa: PLR0913
        self,
        decoder: Engine,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        constraint: Constraint,
        max_new_tokens: int,
        spelled_ends: bool = True,
        stop: Sequence[str] = (),
    ):
        self.whole = True
        self.reason = "interrupted"
        self.prompt_ids = prompt_ids
        self._decoder = decoder
        self._constraint = CountsForced(constraint)
        self._reader = AnswerReader(tokenizer, chat, stop, spelled_ends)
        self._start = decoder.lengths[0] + len(prompt_ids)
        if (room := decoder.limit - self._start) < 1:
            raise ValueError(
                f"the prompt has {self._start} tokens, "
                f"and there is room for {decoder.limit}: shorten it"
            )
        self._generated = generate(
            decoder,
            prompt_ids,
            sampling,
            max_new_tokens=min(max_new_tokens, room),
            stop_tokens=chat.stop_ids(tokenizer),
            constraint=self._constraint,
        )

    def __iter__(self) -> Iterator[str]:
        reader = self._reader
        for id in self._generated:
            if piece := reader.feed(id):
                yield piece
            if reader.ended_by is not None:
                break
        if piece := reader.finish():
            yield piece
        if reader.ended_by == "string":
            self.whole = reader.drop_unwritten()
        self.reason = "stop" if reader.ended_by else "length"
        self._generated.close()  # rolls back an engine's steps in flight
        self._decoder.rewind(self._decoder.lengths[0] - self._start - len(self.ids))

    def events(self, number: int) -> Iterator[Event]:
        """Text as it comes, each call as soon as it is complete, and errors.

        number  of the answer in the conversation: part of the ids of its calls, in formats that
                need some
        """
        for piece in self:
            yield from self._reader.events(piece)
        yield from self._reader.last_events(number)

    @property
    def text(self) -> str:
        """Written so far."""
        return self._reader.text

    @property
    def ids(self) -> list[int]:
        """The tokens of the text, without the one that ended it."""
        return self._reader.ids

    @property
    def calls(self) -> list[Call]:
        """The calls in `message`; the listener may not have heard all of them."""
        return self._reader.calls

    def message(self) -> dict[str, Any]:
        """The answer as a message; a list of calls takes the place of its text."""
        return self._reader.message()

    @property
    def saved(self) -> int:
        """How many tokens the constraint forced: none of them cost a forward pass of its own."""
        return self._constraint.taken

    def settle(self) -> None:
        """End the answer; if it was interrupted, reduce `ids` to the tokens of `text`."""
        self._generated.close()
        if self.reason == "interrupted":
            self.whole = self._reader.drop_unwritten()


def one_row(model_or_decoder: Mistral | Engine, max_tokens: int | None = None) -> Engine:
    """A decoder for one answer after the other: the given one, or a new one for the model.

    max_tokens  room in the cache of a model without a window; None: max_position_embeddings

    ValueError for a decoder of several rows.
    """
    if not isinstance(model_or_decoder, Mistral):
        if model_or_decoder.batch_size != 1:
            raise ValueError(
                f"a decoder of one row is needed, not of {model_or_decoder.batch_size}"
            )
        return model_or_decoder
    config = model_or_decoder.config
    if config.sliding_window is None and max_tokens is None:
        max_tokens = config.max_position_embeddings
    return Decoder(model_or_decoder, 1, max_tokens, slack=SLACK)

"""One turn of the assistant, while the model writes it."""

from collections.abc import Iterator, Sequence
from typing import Any

from mistral.chat.events import Call, Event, Text
from mistral.chat.formats import ChatFormat
from mistral.chat.formats.call_list import call_list_message, read_call_list
from mistral.chat.formats.tool_calls import ToolCallStream
from mistral.engine.base import Constraint, Engine
from mistral.engine.constraints import CountsForced
from mistral.engine.decoder import Decoder
from mistral.engine.generation import generate
from mistral.engine.text import text_until
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
        self.text = ""
        self.ids: list[int] = []
        self.whole = True
        self.reason = "interrupted"
        self.prompt_ids = prompt_ids
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._stop_tokens = chat.stop_ids(tokenizer)
        self._constraint = CountsForced(constraint)
        self._strip_leading_space = chat.strip_leading_space
        self._spelled = (*(chat.spelled_ends if spelled_ends else ()), *stop)
        self._call_token: int | None = None
        if chat.call_token is not None:
            self._call_token = tokenizer.control_id(chat.call_token)
        self._exhausted = False
        # The only parser of the text: finds the calls, and knows which places are in a string.
        self._stream = ToolCallStream()
        self._parsed = 0  # characters that it was fed
        self._found: list[Event] = []  # by it, not yet yielded
        self._calls: list[Call] = []  # in the text
        self._listed: list[Call] = []  # calls of a list
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
            stop_tokens=self._stop_tokens,
            constraint=self._constraint,
        )

    def __iter__(self) -> Iterator[str]:
        pieces = text_until(
            self._record(),
            self._tokenizer,
            self._spelled,
            self._strip_leading_space,
            self._is_quoted,
        )
        for piece in pieces:
            self.text += piece
            yield piece
        if not self._exhausted:  # a spelled end
            self._drop_unwritten()
            self.reason = "stop"
        elif self.ids and self.ids[-1] in self._stop_tokens:
            self.ids.pop()
            self.reason = "stop"
        else:
            self.reason = "length"
        self._generated.close()  # rolls back an engine's steps in flight
        self._decoder.rewind(self._decoder.lengths[0] - self._start - len(self.ids))

    def events(self, number: int) -> Iterator[Event]:
        """Text as it comes, each call as soon as it is complete, and errors.

        number  of the answer in the conversation: part of the ids of its calls, in formats that
                need some
        """
        for piece in self:
            if self._call_token is None:
                self._parse(self.text, len(self.text))
                yield from self._take_found()
            elif not self._is_list:
                yield Text(piece)
        if self._call_token is None:
            self._add_found(self._stream.finish())
        elif self._is_list:
            self._found = [*read_call_list(self.text, number)]
            self._listed = [event for event in self._found if isinstance(event, Call)]
        yield from self._take_found()

    @property
    def calls(self) -> list[Call]:
        """The calls in `message`; the listener may not have heard all of them."""
        return self._listed or [call for call in self._calls if call.span[1] <= len(self.text)]

    def message(self) -> dict[str, Any]:
        """The answer as a message; a list of calls takes the place of its text."""
        if self._listed:
            return call_list_message(self._listed)
        return {"role": "assistant", "content": self.text}

    @property
    def saved(self) -> int:
        """How many tokens the constraint forced: none of them cost a forward pass of its own."""
        return self._constraint.taken

    def settle(self) -> None:
        """End the answer; if it was interrupted, reduce `ids` to the tokens of `text`."""
        self._generated.close()
        if self.reason == "interrupted":
            self._drop_unwritten()

    @property
    def _is_list(self) -> bool:
        """Whether the text is a list of calls: the call token says so."""
        return self.ids[:1] == [self._call_token]

    def _record(self) -> Iterator[int]:
        for id in self._generated:
            self.ids.append(id)
            yield id
        self._exhausted = True

    def _is_quoted(self, text: str, at: int) -> bool:
        """Whether a place of the text lies in a string of a call; places come in their order."""
        if self._is_list:
            return True
        self._parse(text, at)
        return self._stream.in_string

    def _parse(self, text: str, end: int) -> None:
        """Feed the text up to `end` to the parser, each character once."""
        self._add_found(self._stream.feed(text[self._parsed : end]))
        self._parsed = max(self._parsed, end)

    def _add_found(self, events: list[Event]) -> None:
        self._found += events
        self._calls += [event for event in events if isinstance(event, Call)]

    def _take_found(self) -> list[Event]:
        events = self._found
        self._found = []
        return events

    def _drop_unwritten(self) -> None:
        """Reduce `ids` to those that spell the text; those after them spell the end of the turn."""
        stream = self._tokenizer.stream(self._strip_leading_space)
        length = 0
        for n, id in enumerate(self.ids):
            before = length
            length += len(stream.feed(id))
            if before >= len(self.text) or length > len(self.text):
                self.ids = self.ids[:n]
                self.whole = before >= len(self.text)
                return


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

"""One turn of the assistant, while the model writes it."""

from collections.abc import Iterator, Sequence

from mistral.chat.formats import ChatFormat
from mistral.chat.formats.tool_calls import ToolCallStream
from mistral.engine.constraints import Constraint, CountsForced
from mistral.engine.decoder import Decoder, Engine
from mistral.engine.generation import generate, text_until
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

# tokens that can be taken back after the window rolled: an end of turn that the model spelled
SLACK = 32


class Answer:
    """What a decoder writes behind `prompt_ids`: iterate for its text, piece by piece.

    text    what was written so far
    ids     its tokens, without the one that ended it
    reason  why it ended: "stop", or "length" after `max_new_tokens` or where there is no more room;
            "interrupted" until then

    When the text has ended, the decoder holds the prompt and `ids`, and nothing behind them. Where
    iteration is broken off, `settle` makes `ids` the tokens of `text`; the decoder may hold a few
    more then.
    `spelled_ends` says whether an end of turn that is written as text is one, as in `ChatFormat`;
    in a string of a call it never is. Raises what `mistral.generate` raises, and ValueError for a
    prompt that there is no room for.
    """

    def __init__(
        self,
        decoder: Engine,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        constraint: Constraint,
        max_new_tokens: int,
        spelled_ends: bool = True,
    ):
        self.text, self.ids, self.reason = "", [], "interrupted"
        self.prompt_ids = prompt_ids
        self._decoder, self._tokenizer, self._stop_tokens = (
            decoder,
            tokenizer,
            chat.stop_ids(tokenizer),
        )
        self._constraint, self._begins_text = CountsForced(constraint), chat.reply_begins_text
        self._spelled = chat.spelled_ends if spelled_ends else ()
        self._call_token = (
            None if chat.call_token is None else tokenizer.control_id(chat.call_token)
        )
        self._exhausted, self._start = False, decoder.lengths[0] + len(prompt_ids)
        if (room := decoder.limit - self._start) < 1:
            raise ValueError(
                f"the prompt makes {self._start} tokens, and there is room for {decoder.limit}: "
                f"shorten it"
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
        for piece in text_until(
            self._record(), self._tokenizer, self._spelled, self._begins_text, in_string_of_call
        ):
            self.text += piece
            yield piece
        if not self._exhausted:
            self.ids = self.ids[: self._written()]
            self.reason = "stop"
        elif self.ids and self.ids[-1] in self._stop_tokens:
            self.ids.pop()
            self.reason = "stop"
        else:
            self.reason = "length"
        self._generated.close()  # an engine that runs ahead takes back what was too much
        self._decoder.rewind(self._decoder.lengths[0] - self._start - len(self.ids))

    @property
    def is_calls(self) -> bool:
        """Whether the text is a list of calls: it stands behind the token that says so."""
        return self._call_token is not None and self.ids[:1] == [self._call_token]

    @property
    def saved(self) -> int:
        """How many tokens the constraint left no choice about: they cost no forward pass of their
        own.
        """
        return self._constraint.taken

    def settle(self) -> None:
        """Let `ids` be what `text` is made of, if the answer was broken off."""
        self._generated.close()
        if self.reason == "interrupted":
            self.ids = self.ids[: self._written()]

    def _record(self) -> Iterator[int]:
        for id in self._generated:
            self.ids.append(id)
            yield id
        self._exhausted = True

    def _written(self) -> int:
        """How many ids it takes to write the text; those behind them spell the end."""
        stream, length = self._tokenizer.stream(self._begins_text), 0
        for n, id in enumerate(self.ids):
            if length >= len(self.text):
                return n
            length += len(stream.feed(id))
        return len(self.ids)


def in_string_of_call(text: str, at: int) -> bool:
    """Whether a place of an answer lies in a string of a call."""
    stream = ToolCallStream()
    stream.feed(text[:at])
    return stream.in_string


def one_row(model_or_decoder: Mistral | Engine, max_tokens: int | None = None) -> Engine:
    """A decoder for one answer after the other: the one that is given, or one for the model.
    ValueError for more rows.

    max_tokens  room in the cache for a model without a window; None: what the checkpoint was made
                for
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

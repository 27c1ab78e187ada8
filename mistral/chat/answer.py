"""One turn of the assistant, while the model writes it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mistral.decoder import Engine
from mistral.generation import Constraint, generate, text_until
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

# Some fine-tunes spell the end of a turn instead of writing its token; it counts as the end, too.
SPELLED = ("<|im_end|>", "<|im_start|>")


class TextOnly:
    """A constraint to tokens that are text, and those that end it: no control token, no row without a token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int]):
        allowed = [tokenizer.token_bytes(id) is not None or id in stop_tokens for id in range(vocab_size)]
        self._mask = torch.tensor(allowed)  # [V]

    def mask(self) -> Tensor:
        """bool [V], the same at every step."""
        return self._mask

    def accept(self, id: int) -> None:
        """Nothing to remember."""


class Answer:
    """What a decoder writes behind `prompt_ids`: iterate for its text, piece by piece.

    text    what was written so far
    ids     its tokens, without the one that ended it
    reason  why it ended: "stop", or "length" after `max_new_tokens`; "interrupted" until then

    spelled      texts that end the answer, too
    begins_text  the answer begins a text, and its first leading space is none: see `ChatFormat.reply_begins_text`

    When the text has ended, the decoder holds the prompt and `ids`, and nothing behind them. Where iteration is
    broken off, `settle` makes `ids` the tokens of `text`; the decoder may hold a few more then.
    Raises what `mistral.generate` raises.
    """

    def __init__(
        self,
        decoder: Engine,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        constraint: Constraint,
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int],
        begins_text: bool = False,
        spelled: Sequence[str] = SPELLED,
    ):
        self.text, self.ids, self.reason = "", [], "interrupted"
        self.prompt_ids = prompt_ids
        self._decoder, self._tokenizer, self._stop_tokens = decoder, tokenizer, stop_tokens
        self._generated = generate(
            decoder,
            prompt_ids,
            sampling,
            max_new_tokens=max_new_tokens,
            stop_tokens=stop_tokens,
            constraint=constraint,
        )
        self._constraint, self._begins_text, self._spelled = constraint, begins_text, spelled
        self._exhausted, self._start = False, decoder.lengths[0] + len(prompt_ids)

    def __iter__(self) -> Iterator[str]:
        for piece in text_until(self._record(), self._tokenizer, self._spelled, self._begins_text):
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
        self._decoder.rewind(self._decoder.lengths[0] - self._start - len(self.ids))

    @property
    def saved(self) -> int:
        """How many tokens the constraint left no choice about: they cost no forward pass of their own."""
        return getattr(self._constraint, "forced_count", 0)

    def settle(self) -> None:
        """Let `ids` be what `text` is made of, if the answer was broken off."""
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

"""More than one token from a forward pass, without a second model: prompt lookup.

A forward pass over nine tokens takes hardly longer than one over a single token, because its time
goes into reading the weights. So guess what comes next, read the guess together with the last
token, and see how far it is right.

Guessing: answers repeat their prompt, its names, numbers, keys and code. Find where the last three
tokens occurred before; the tokens that followed them there are the guess (prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding).

    sequence      a b c d e f . a b c    the last token, c, is not read yet; "a b c" occurred before
    guess         d e f .                this followed it there
    forward pass  c d e f .              returns the logits after each of the five
    draw          d e x                  from the logits after c, d and e; the third draw is not
                                         what was guessed
    sequence      a b c d e f . a b c d e x    three tokens from one forward pass; the cache rolls
                                               back f and the full stop

Deciding: with p the distribution of the next token after penalties, masks and warpers, and q that
of the guesser, speculation keeps a guessed x with probability min(1, p(x) / q(x)), and otherwise
draws from max(0, p - q), normalized (Leviathan et al., section 2.3,
https://arxiv.org/abs/2211.17192). This guesser is certain: q(x) = 1. So x is kept with probability
p(x), or else a token is drawn from p without x. Drawing from p as always, and comparing the draw
with x, does just that. So a guess decides nothing; if it was right, the logits after it are there
already.
"""

from collections.abc import Sequence
from os.path import commonprefix

import torch
from torch import Tensor

from mistral.engine.base import IDLE, Engine
from mistral.engine.decoder import one_thread
from mistral.engine.ids import check_rows
from mistral.sampling import RandomNumbers, Sampling, sample_rows

_LONGEST_CHUNK = 64  # more new ids are a prompt: no guess, whose logits would cost too much


def _find_guess(text: str, tokens: int, max_ngram: int, min_ngram: int) -> str:
    """Up to `tokens` tokens that followed the last earlier occurrence of the longest final n-gram.

    A sequence is a string with one character per id, because `str.rfind` searches fastest. If the
    occurrence reaches to the end of the sequence, the guess repeats itself: "abab" continues as
    "abab...".
    """
    for n in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
        if (found := text.rfind(text[-n:], 0, len(text) - 1)) >= 0:
            period = text[found + n :]
            return (period * (tokens // len(period) + 1))[:tokens]
    return ""


class LookupDecoder(Engine):
    """An engine for one row that makes another engine read guesses along.

    decoder    an empty engine for one row; from now on it belongs to this one
    tokens     how many are guessed at a time; at most the decoder's slack, because wrong ones are
               rolled back
    max_ngram  how many of the last tokens must have occurred before; if they have not, one fewer is
               tried, ...
    min_ngram  ... down to this

    Arguments and errors of the methods are those of `Decoder`. The text is that of the reference
    (up to rounding, if two tokens are equally probable): random numbers are drawn as it draws them,
    whatever engine computes the logits. Every id is read back, so no steps are in flight.

    forwards        how many forward passes were made; a prompt is one
    plain_forwards  how many there would be without lookup: one per id that was chosen, one per
                    `prefill`

    Raises ValueError for an engine that cannot do this, and for impossible numbers.
    """

    def __init__(self, decoder: Engine, tokens: int = 8, max_ngram: int = 3, min_ngram: int = 1):
        _check(decoder, tokens, max_ngram, min_ngram)
        self.config = decoder.config
        self.batch_size = 1
        self.slack = decoder.slack - tokens
        self.holder = None
        self.forwards = self.plain_forwards = 0
        self._decoder = decoder
        self._tokens = tokens
        self._ngrams = (max_ngram, min_ngram)
        self._text = ""  # one character for each id
        # What the decoder holds, or an interrupted call was to append: its length says how much.
        self._given = ""
        # How many ids come before the first of the scores, and the scores, [n, V]: after that many
        # of `_given`, after one more, ... One assignment replaces both.
        self._scored: tuple[int, Tensor] | None = None
        self._new = False  # True: its last logits were not asked for yet
        self._random: RandomNumbers | None = None  # made at the first step, on the logits' device

    @property
    @one_thread
    def logits(self) -> Tensor:
        """[1, V]: the logits that the next step samples from. ValueError while the row is empty."""
        self._catch_up()
        return self._last_scores().clone()

    @property
    def lengths(self) -> list[int]:
        """How many tokens the row holds; guesses do not count."""
        return self._yielded([len(self._text)])

    @property
    def limit(self) -> int:
        """How many tokens the row can hold."""
        return self._decoder.limit

    @property
    def tokens_a_forward(self) -> float:
        """How many plain forward passes each forward pass replaced, on average. 1: no gain."""
        return self.plain_forwards / max(self.forwards, 1)

    @property
    def summary(self) -> str:
        """One line for a person."""
        counts = f"{self.forwards} forward passes instead of {self.plain_forwards}"
        return f"lookup: {self.tokens_a_forward:.1f} tokens a forward pass, {counts}"

    @one_thread
    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Append ids to the row: a prompt, or ids that a grammar leaves no choice about."""
        self._begin_use()
        (ids,) = check_rows(rows, 1, self.config.vocab_size)
        self._check_room([len(ids)])
        if ids:
            if self._random is not None:
                self._random.settle(self.lengths)
            self._new = True
            self._text += "".join(map(chr, ids))
            self._catch_up()

    @one_thread
    @torch.inference_mode()
    def step(
        self,
        sampling: Sampling | Sequence[Sampling | None],
        mask: Tensor | None = None,
        active: Sequence[bool] | None = None,
    ) -> Tensor:
        """Sample an id and append it: int64 [1] on the device."""
        self._begin_use()
        counts = self._step_counts(sampling, mask, active)
        self._catch_up()
        logits = self._last_scores()
        if not any(counts):
            return torch.full((1,), IDLE, device=logits.device)
        own = sampling if isinstance(sampling, Sampling) else sampling[0]
        self._random = self._random or RandomNumbers(logits.device)
        ids = list(map(ord, self._text)) if own.reads_history else []
        history = torch.tensor([ids], dtype=torch.int64)
        history = history.to(logits.device, non_blocking=True)
        rows = (history, self.lengths)
        starts = self.answer_starts
        ids = sample_rows(logits, own, *rows, mask, self._random, counts, starts)
        chosen = ids.item()
        self._new = True
        # Without a choice the id is negative; 0 takes its place until the row is rewound.
        self._text += chr(max(chosen, 0))
        return ids

    @one_thread
    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens.

        All can always be forgotten. Raises ValueError beyond `slack` once the window rolls.
        """
        self._begin_use()
        (count,) = self._rewind_counts(n)
        if count == 0:
            return
        stays = len(self._text) - count
        if stays < self._right():
            self._decoder.rewind(self._decoder.lengths[0] - stays)
            self._scored = None
        self._new = True
        self._text = self._text[:stays]

    @one_thread
    def restart_random(self, row: int) -> None:
        """Begin the random numbers anew."""
        self._random = None

    def _right(self) -> int:
        """How many ids the decoder holds that are the row's first."""
        held = self._given[: self._decoder.lengths[0]]
        if self._text.startswith(held):
            return len(held)
        return len(commonprefix((self._text, held)))

    def _last_scores(self) -> Tensor | None:
        """The logits after the row's last id, [1, V], if they are known."""
        end = len(self._text)
        if self._scored is None or self._right() < end:
            return None
        start, scores = self._scored
        return scores[end - start : end - start + 1] if start <= end < start + len(scores) else None

    def _catch_up(self) -> None:
        """One forward pass: let the decoder read the new ids, and with them a guess."""
        if not self._text:
            raise ValueError("row 0 is empty: prefill a prompt first")
        self.plain_forwards += self._new
        self._new = False
        if self._last_scores() is not None:
            return
        # 1. Drop a wrong guess. What remains are ids of the row.
        self._scored = None
        end = len(self._text)
        read = self._right()
        if wrong := self._decoder.lengths[0] - read:
            self._decoder.rewind(wrong)
        self._given = self._text[:read]
        new = self._text[read:]
        # 2. Guess, and read.
        room = min(self._tokens, self.limit - end)
        guess = ""
        if 0 < len(new) <= _LONGEST_CHUNK:
            guess = _find_guess(self._text, room, *self._ngrams)
        self._given = self._text + guess
        if guess:
            scores = self._decoder.verify(list(map(ord, new + guess)))[len(new) - 1 :]
        else:
            self._decoder.prefill([list(map(ord, new))])
            scores = self._decoder.logits
        self._scored = end, scores
        self.forwards += 1


def _check(decoder: Engine, tokens: int, max_ngram: int, min_ngram: int) -> None:
    if not 1 <= min_ngram <= max_ngram or tokens < 1:
        raise ValueError(
            f"lookup: {tokens} tokens by n-grams of {max_ngram} down to {min_ngram} are impossible"
        )
    if decoder.batch_size != 1:
        raise ValueError(f"lookup is for one row, not for {decoder.batch_size}")
    if decoder.lengths != [0]:
        raise ValueError(
            f"lookup must know all ids, and the decoder holds {decoder.lengths[0]} tokens already"
        )
    if tokens > decoder.slack:
        raise ValueError(
            f"lookup of {tokens} tokens needs a decoder with slack={tokens} or more, not "
            f"{decoder.slack}"
        )

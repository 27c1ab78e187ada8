"""More than one token from a forward, without a second model: prompt lookup.

A forward that reads nine tokens takes hardly longer than one that reads a single token, because its
time goes into reading the weights. So guess what comes next, read the guess together with the last
token, and see how far it is right.

Guessing: answers repeat their prompt, its names, numbers, keys and code. Where did the last three
tokens stand before? What followed them there is the guess (prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding).

    text      a b c d e f . a b c     the last token, c, is not read yet; "a b c" stood at the
              beginning,
    guess     d e f .                 and this followed it there
    forward   c d e f .               gives the logits behind each of the five
    draw      d e x                   from the logits behind c, d and e; the third time it is not
              what was guessed
    text      a b c d e f . a b c d e x     three tokens from one forward; the cache takes back f
              and the full stop

Deciding: with p the distribution of the next token after penalties, masks and warpers, and q the
guesser's, speculation keeps a guessed x with probability min(1, p(x) / q(x)), and otherwise draws
from max(0, p - q), made to sum to 1 (Leviathan et al., section 2.3,
https://arxiv.org/abs/2211.17192). This guesser is certain: q(x) = 1. So x is kept with probability
p(x), or else a token is drawn from p without x. To draw from p as always, and to see whether it is
x, does just that. So a guess decides nothing; if it was right, the logits behind it are there
already.
"""

from collections.abc import Sequence
from os.path import commonprefix

import torch
from torch import Tensor

from mistral.engine.decoder import Engine, check_ids
from mistral.sampling import Sampling, next_ids, random_numbers

# more new ids are read without a guess, which would cost the logits behind each of them: they are a
# prompt
LONG = 64


def find_guess(text: str, tokens: int, max_ngram: int, min_ngram: int) -> str:
    """Up to `tokens` tokens that followed the last earlier occurrence of the longest n-gram that
    ends the text.

    A text is a string with one character for each id, since nothing searches faster than
    `str.rfind`. Where the occurrence reaches to the end of the text, the guess repeats itself:
    "abab" goes on with "abab...".
    """
    for n in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
        if (found := text.rfind(text[-n:], 0, len(text) - 1)) >= 0:
            period = text[found + n :]
            return (period * (tokens // len(period) + 1))[:tokens]
    return ""


class LookupDecoder:
    """An engine that makes another one read guesses along. Its methods, arguments and errors are
    those of `Decoder`.

    decoder    an empty engine for one row that has `score`, and from now on belongs to this one
    tokens     how many are guessed at a time; at most the decoder's slack, for wrong ones are taken
               back
    max_ngram  how many of the last tokens must have occurred before; if they have not, one fewer is
               tried, ...
    min_ngram  ... down to this

    The text is what the reference's would be (but for rounding, where two tokens are equally good):
    random numbers are drawn as it draws them, whatever engine computes the logits. What it costs: a
    look at every id, so the engine cannot run ahead of the host.

    forwards        how many forwards were made; a prompt is one
    plain_forwards  how many there would be without lookup: one for each id that was chosen, one for
                    each text read

    Raises ValueError for an engine that cannot do this, and for numbers that make no sense.
    """

    def __init__(self, decoder: Engine, tokens: int = 8, max_ngram: int = 3, min_ngram: int = 1):
        _check(decoder, tokens, max_ngram, min_ngram)
        self.config, self.batch_size, self.limit = decoder.config, 1, decoder.limit
        self.slack, self.holder = decoder.slack - tokens, None
        self.forwards = self.plain_forwards = 0
        self._decoder, self._tokens, self._ngrams = decoder, tokens, (max_ngram, min_ngram)
        self._text = ""  # one character for each id
        self._new = False  # whether nobody has asked for the logits behind it yet
        self._read = 0  # how many of them the decoder has read ...
        self._guess = ""  # ... and what it has read behind them
        self._scores: Tensor | None = (
            None  # [1 + guess, V]: behind the text that was read and behind each guess
        )
        self._seed: int | None = None
        self._generator: torch.Generator | None = None

    @property
    def logits(self) -> Tensor:
        """[1, V]: what the next step samples from. ValueError while the row is empty."""
        self._catch_up()
        return self._scores[:1]

    @property
    def lengths(self) -> list[int]:
        """How many tokens the row holds; guesses do not count."""
        return [len(self._text)]

    @property
    def tokens_a_forward(self) -> float:
        """How many plain forwards each forward replaced, on average. 1: no gain."""
        return self.plain_forwards / max(self.forwards, 1)

    @property
    def summary(self) -> str:
        """One line for a person."""
        counts = f"{self.forwards} forwards instead of {self.plain_forwards}"
        return f"lookup: {self.tokens_a_forward:.1f} tokens a forward, {counts}"

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Append ids to the row: a prompt, or what a grammar leaves no choice about."""
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} rows for a decoder of 1")
        self._check_room(len(rows[0]))
        check_ids(rows[0], self.config)
        if rows[0]:
            self._append(rows[0])
            self._catch_up()

    @torch.inference_mode()
    def step(self, sampling: Sampling, mask: Tensor | None = None) -> Tensor:
        """Sample an id and append it: int64 [1] on the device."""
        logits = self.logits
        self._check_room(1)
        if self._generator is None or sampling.seed != self._seed:
            self._seed, self._generator = sampling.seed, random_numbers(sampling, logits.device)
        remembers = sampling.repetition_penalty != 1 or sampling.no_repeat_ngram_size
        history = torch.tensor([list(map(ord, self._text)) if remembers else []], dtype=torch.int64)
        history = history.to(logits.device, non_blocking=True)
        lengths = torch.full((1,), history.shape[1], device=logits.device)
        ids = next_ids(logits, sampling, history, lengths, mask, self._generator)
        self._append(ids.tolist())
        return ids

    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens.

        All can always be forgotten; ValueError beyond `slack` once the window rolls.
        """
        counts = [n] if isinstance(n, int) else list(n)
        if len(counts) != 1 or not 0 <= counts[0] <= len(self._text):
            raise ValueError(
                f"cannot forget {counts} tokens of one row that holds {len(self._text)}"
            )
        if counts == [0]:
            return
        stays = len(self._text) - counts[0]
        if stays < self._read:
            self._decoder.rewind(self._decoder.lengths[0] - stays)
            self._read, self._guess, self._scores = stays, "", None
        self._text, self._new = self._text[:stays], stays > self._read or self._scores is None

    def _append(self, ids: Sequence[int]) -> None:
        """The text goes on: as far as it was guessed it is read already, and a wrong guess is worth
        nothing more.
        """
        new = "".join(map(chr, ids))
        right = len(commonprefix((new, self._guess)))
        self._text, self._new = self._text + new, True
        self._guess = self._guess[right:] if right == len(new) else ""
        if right:
            self._read += right
            self._scores = self._scores[right:]

    def _catch_up(self) -> None:
        """One forward: let the decoder read what it has not read, and with it a guess at what
        follows.
        """
        self.plain_forwards += self._new
        self._new = False
        new = self._text[self._read :]
        if not new and self._scores is not None:
            return
        if wrong := self._decoder.lengths[0] - self._read:
            self._decoder.rewind(wrong)
        room = min(self._tokens, self.limit - len(self._text))
        guess = find_guess(self._text, room, *self._ngrams) if 0 < len(new) <= LONG else ""
        if guess:
            scores = self._decoder.score(list(map(ord, new + guess)))[len(new) - 1 :]
        else:
            self._decoder.read([list(map(ord, new))])
            scores = self._decoder.logits
        self._read, self._guess, self._scores = len(self._text), guess, scores
        self.forwards += 1

    def _check_room(self, new: int) -> None:
        if (length := len(self._text) + new) > self.limit:
            raise ValueError(f"{length} tokens in a row, and the limit here is {self.limit}")


def _check(decoder: Engine, tokens: int, max_ngram: int, min_ngram: int) -> None:
    if not 1 <= min_ngram <= max_ngram or tokens < 1:
        raise ValueError(
            f"lookup: {tokens} tokens by n-grams of {max_ngram} down to {min_ngram} make no sense"
        )
    if decoder.batch_size != 1:
        raise ValueError(f"lookup is for one text at a time, not for {decoder.batch_size}")
    if not hasattr(decoder, "score"):
        raise ValueError(
            f"lookup needs an engine that has `score`, and {type(decoder).__name__} has none"
        )
    if decoder.lengths != [0]:
        raise ValueError(
            f"lookup must know the whole text, and the decoder holds {decoder.lengths[0]} tokens "
            f"already"
        )
    if tokens > decoder.slack:
        raise ValueError(
            f"lookup of {tokens} tokens needs a decoder with slack={tokens} or more, not "
            f"{decoder.slack}"
        )

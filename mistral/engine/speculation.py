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
from dataclasses import dataclass
from os.path import commonprefix

import torch
from torch import Tensor

from mistral.engine.base import IDLE, Engine
from mistral.engine.decoder import one_thread
from mistral.engine.draws import RandomNumbers, sample_rows
from mistral.engine.ids import check_rows
from mistral.sampling import Sampling

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


@dataclass
class _Row:
    """What is known of one row.

    text    its ids, one character for each
    given   the ids that the decoder holds, or that an interrupted call was to append: its length
            there says how many of them
    scored  how many ids come before the first of the scores, and the scores, [n, V]: after that
            many of `given`, after one more, ... One assignment replaces both
    is_new  its last logits were not asked for yet
    """

    text: str = ""
    given: str = ""
    scored: tuple[int, Tensor] | None = None
    is_new: bool = False

    def right(self, held: int) -> int:
        """How many of the `held` ids of the decoder are the row's first."""
        given = self.given[:held]
        return len(given) if self.text.startswith(given) else len(commonprefix((self.text, given)))

    def last_scores(self, held: int) -> Tensor | None:
        """The logits after the row's last id, [1, V], if they are known."""
        end = len(self.text)
        if self.scored is None or self.right(held) < end:
            return None
        start, scores = self.scored
        return scores[end - start : end - start + 1] if start <= end < start + len(scores) else None


class LookupDecoder(Engine):
    """An engine that makes another engine read guesses along.

    decoder    an empty engine; from now on it belongs to this one
    tokens     how many are guessed at a time, by all rows together; at most the decoder's slack,
               because wrong ones are rolled back
    max_ngram  how many of the last tokens must have occurred before; if they have not, one fewer is
               tried, ...
    min_ngram  ... down to this

    Arguments and errors of the methods are those of `Decoder`. The text is that of the reference
    (up to rounding, if two tokens are equally probable): random numbers are drawn as it draws them,
    whatever engine computes the logits. Every id is read back, so no steps are in flight.

    A row whose guess was right needs no forward pass for its next step (`is_ahead`). A step of
    several rows reads only what the others lack, so a batch gains from it if its caller steps the
    rows that are ahead by themselves, as the slots of a server do.

    forwards        how many forward passes were made, counted for each row; a prompt is one
    plain_forwards  how many there would be without lookup: one per id that was chosen, one per
                    `prefill`

    Raises ValueError for an engine that cannot do this, and for impossible numbers.
    """

    def __init__(self, decoder: Engine, tokens: int = 8, max_ngram: int = 3, min_ngram: int = 1):
        _check(decoder, tokens, max_ngram, min_ngram)
        self.config = decoder.config
        self.batch_size = decoder.batch_size
        self.slack = decoder.slack - tokens
        self.holder = None
        self.forwards = self.plain_forwards = 0
        self._decoder = decoder
        self._tokens = tokens
        self._ngrams = (max_ngram, min_ngram)
        self._rows = [_Row() for _ in range(decoder.batch_size)]
        self._random: RandomNumbers | None = None  # made at the first step, on the logits' device

    @property
    @one_thread
    def logits(self) -> Tensor:
        """[B, V]: the logits that the next step samples from. ValueError if every row is empty."""
        if not any(row.text for row in self._rows):
            raise ValueError("row 0 is empty: prefill a prompt first")
        self._catch_up(range(self.batch_size), guesses=True)
        return self._all_scores().clone()

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds; guesses do not count."""
        return self._yielded([len(row.text) for row in self._rows])

    @property
    def limit(self) -> int:
        """How many tokens a row can hold."""
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

    def is_ahead(self, row: int) -> bool:
        """Whether the next step of a row needs no forward pass: its last id was guessed."""
        return self._last_scores(row) is not None

    @one_thread
    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Append ids to each row: a prompt, or ids that a grammar leaves no choice about.

        One row reads a guess along. Of several each may have a part of a prompt only.
        """
        self._begin_use()
        rows = check_rows(rows, self.batch_size, self.config.vocab_size)
        self._check_room(list(map(len, rows)))
        given = [b for b, ids in enumerate(rows) if ids]
        if not given:
            return
        for b in given:
            self._rows[b].is_new = True
        self._append(rows)
        self._catch_up(given, guesses=self.batch_size == 1)

    @one_thread
    @torch.inference_mode()
    def step(
        self,
        sampling: Sampling | Sequence[Sampling | None],
        mask: Tensor | None = None,
        active: Sequence[bool] | None = None,
    ) -> Tensor:
        """Sample an id for each row and append it: int64 [B] on the device."""
        self._begin_use()
        counts = self._step_counts(sampling, mask, active)
        if not any(counts):
            return torch.full((self.batch_size,), IDLE, device=self._decoder.logits.device)
        self._catch_up([b for b, count in enumerate(counts) if count], guesses=True)
        logits = self._all_scores()
        self._random = self._random or RandomNumbers(logits.device)
        history = self._history(sampling).to(logits.device, non_blocking=True)
        rows = (history, [len(row.text) for row in self._rows])
        starts = self.answer_starts
        ids = sample_rows(logits, sampling, *rows, mask, self._random, counts, starts)
        for row, count, id in zip(self._rows, counts, ids.tolist()):
            if count:
                row.is_new = True
                # Without a choice the id is negative; 0 takes its place until the row is rewound.
                row.text += chr(max(id, 0))
        return ids

    @one_thread
    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b).

        All can always be forgotten. Raises ValueError beyond `slack` once the window rolls.
        """
        self._begin_use()
        counts = self._rewind_counts(n)
        stays = [len(row.text) - count for row, count in zip(self._rows, counts)]
        held = self._decoder.lengths
        dropped = [0] * self.batch_size
        for b, row in enumerate(self._rows):
            if counts[b] and stays[b] < row.right(held[b]):
                dropped[b] = held[b] - stays[b]
        if any(dropped):
            self._decoder.rewind(dropped)
        for b, row in enumerate(self._rows):
            if dropped[b]:
                row.scored = None
            if counts[b]:
                row.is_new = True
                row.text = row.text[: stays[b]]

    @one_thread
    def copy_row(self, source: int, target: int, length: int) -> None:
        """As `Decoder.copy_row`; only ids that the decoder has read already are copied there."""
        self._begin_use()
        self._check_copy(source, target, length)
        held = self._decoder.lengths[source]
        text = self._rows[source].text[:length]
        read = min(length, self._rows[source].right(held))
        # Interrupted from here on, the target reads its own ids again.
        row = self._rows[target]
        given = row.given
        row.given = ""
        try:
            self._decoder.copy_row(source, target, read)
        except ValueError:
            row.given = given
            raise
        self._rows[target] = _Row(text=text, given=text[:read], is_new=True)
        if self._random is not None:
            self._random.restart(target)

    @one_thread
    def restart_random(self, row: int) -> None:
        """Begin the random numbers of a row anew."""
        if self._random is not None:
            self._random.restart(row)

    @one_thread
    def erase(self, row: int) -> None:
        """Empty a row, and forget what was computed for it, which may be NaN."""
        super().erase(row)
        self._decoder.erase(row)
        self._rows[row] = _Row()

    @one_thread
    def score(self, row: int, ids: Sequence[int]) -> Tensor:
        """Append ids to one row, and return the logits after each of them: [T, V]."""
        self._begin_use()
        given = [ids if b == row else [] for b in range(self.batch_size)]
        given = check_rows(given, self.batch_size, self.config.vocab_size)
        self._check_room(list(map(len, given)))
        self._catch_up([row], guesses=False)
        self._drop_wrong([row])
        # Interrupted from here on, the row has the ids, and its decoder reads those that it lacks.
        self._append(given)
        own = self._rows[row]
        own.given = own.text
        scores = self._decoder.score(row, given[row])
        own.scored = len(own.text), scores[-1:]
        return scores

    def _append(self, rows: Sequence[Sequence[int]]) -> None:
        """Append checked ids from outside to the rows; the decoder reads them later."""
        if self._random is not None:
            self._random.settle(self.lengths)
        for row, ids in zip(self._rows, rows):
            row.text += "".join(map(chr, ids))

    def _last_scores(self, b: int) -> Tensor | None:
        return self._rows[b].last_scores(self._decoder.lengths[b])

    def _all_scores(self) -> Tensor:
        """The logits after each row's last id, [B, V]; zeros for a row whose are not known."""
        known = [self._last_scores(b) for b in range(self.batch_size)]
        like = next(scores for scores in known if scores is not None)
        return torch.cat([torch.zeros_like(like) if row is None else row for row in known])

    def _history(self, sampling: Sampling | Sequence[Sampling | None]) -> Tensor:
        """The ids of each row if a penalty needs them, padded by -1: int64 [B, n]."""
        each = [sampling] if isinstance(sampling, Sampling) else sampling
        if not any(own is not None and own.reads_history for own in each):
            return torch.empty(self.batch_size, 0, dtype=torch.int64)
        longest = max(len(row.text) for row in self._rows)
        ids = [list(map(ord, row.text)) for row in self._rows]
        return torch.tensor([row + [-1] * (longest - len(row)) for row in ids])

    def _catch_up(self, rows: Sequence[int], guesses: bool) -> None:
        """One forward pass: let the decoder read the new ids of these rows, and with them guesses.

        Empty rows, and those whose logits are known, take no part.
        """
        for b in rows:
            self.plain_forwards += self._rows[b].is_new
            self._rows[b].is_new = False
        lacking = [b for b in rows if self._rows[b].text and self._last_scores(b) is None]
        if not lacking:
            return
        # 1. Drop wrong guesses. What remains are ids of the rows.
        self._drop_wrong(lacking)
        # 2. Guess.
        new = {b: self._rows[b].text[len(self._rows[b].given) :] for b in lacking}
        guess = dict.fromkeys(lacking, "")
        for b in lacking if guesses else ():
            end = len(self._rows[b].text)
            room = min(self._tokens // len(lacking), self.limit - end)
            if 0 < len(new[b]) <= _LONGEST_CHUNK:
                guess[b] = _find_guess(self._rows[b].text, room, *self._ngrams)
        # 3. Read.
        given: list[list[int]] = [[] for _ in self._rows]
        for b in lacking:
            given[b] = list(map(ord, new[b] + guess[b]))
            self._rows[b].given = self._rows[b].text + guess[b]
        if any(guess.values()):
            scores = self._decoder.verify_rows(given)
            found = {b: scores[b][len(new[b]) - 1 :] for b in lacking}
        else:
            self._decoder.prefill(given)
            logits = self._decoder.logits
            found = {b: logits[b : b + 1] for b in lacking}
        for b in lacking:
            self._rows[b].scored = len(self._rows[b].text), found[b]
        self.forwards += len(lacking)

    def _drop_wrong(self, rows: Sequence[int]) -> None:
        """Roll back what the decoder holds of these rows beyond their own ids."""
        held = self._decoder.lengths
        wrong = [0] * self.batch_size
        for b in rows:
            self._rows[b].scored = None
            wrong[b] = held[b] - self._rows[b].right(held[b])
        if any(wrong):
            self._decoder.rewind(wrong)
        for b in rows:
            self._rows[b].given = self._rows[b].text[: held[b] - wrong[b]]


def _check(decoder: Engine, tokens: int, max_ngram: int, min_ngram: int) -> None:
    if not 1 <= min_ngram <= max_ngram or tokens < 1:
        raise ValueError(
            f"lookup: {tokens} tokens by n-grams of {max_ngram} down to {min_ngram} are impossible"
        )
    if any(decoder.lengths):
        raise ValueError(
            f"lookup must know all ids, and the decoder holds {max(decoder.lengths)} tokens already"
        )
    if tokens > decoder.slack:
        raise ValueError(
            f"lookup of {tokens} tokens needs a decoder with slack={tokens} or more, not "
            f"{decoder.slack}"
        )

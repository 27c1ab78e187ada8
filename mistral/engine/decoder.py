"""The engine interface, and the reference engine: a model with its rolling cache."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.config import Config
from mistral.model import Mistral
from mistral.sampling import Sampling, next_ids, random_numbers

# What `step` may give instead of an id, where the engine can tell: the logits were no numbers; none
# was allowed.
NO_NUMBERS, NOTHING_LEFT = -1, -2


class Engine(Protocol):
    """What generation needs; `Decoder` is the reference and describes each method, others are
    faster.

    One that has `ahead` > 0 lets `generate` start so many more steps before it looks at the ids of
    one. Its `step` must not wait for the device then, and says NO_NUMBERS or NOTHING_LEFT, since
    nobody looks at its logits. One that has `score` and `slack`, as `Decoder` has them, can be sped
    up by `speculation.LookupDecoder`.

    holder  whose tokens the engine holds: a conversation leaves itself here, to find out if another
            came between
    """

    config: Config
    batch_size: int
    holder: object

    def read(self, rows: Sequence[Sequence[int]]) -> None: ...
    def step(self, sampling: Sampling, mask: Tensor | None = None) -> Tensor: ...
    def rewind(self, n: int | Sequence[int]) -> None: ...

    @property
    def logits(self) -> Tensor: ...

    @property
    def lengths(self) -> list[int]: ...

    @property
    def limit(self) -> int: ...


class Decoder:
    """The reference engine: a model, its rolling cache, and the ids of each row.

    max_tokens  make room for so many tokens a row; required for a model without a window
    slack       how many tokens `rewind` can take back once the window has begun to roll

    A seed in `Sampling` starts the decoder's random numbers at the first step that brings it, and
    they go on from there, through any number of calls, as long as the seed stays the same. Raises
    what `Mistral.new_cache` raises.
    """

    def __init__(
        self, model: Mistral, batch_size: int = 1, max_tokens: int | None = None, *, slack: int = 16
    ):
        self.model, self.config, self.batch_size = model, model.config, batch_size
        with torch.inference_mode():
            # One more than asked for: `rewind` reads the last token that stays again.
            self._cache = model.new_cache(batch_size, max_tokens, slack + 1 if slack > 0 else slack)
            self._history = torch.full(
                (batch_size, 64), -1, device=model.device
            )  # [B, room]: ids, -1 behind them
        self._behind = [0] * batch_size  # how many of a row's last ids the cache has not read yet
        self._chunk = min(
            self.config.sliding_window or 2048, 2048
        )  # longer ones cost memory and gain no speed
        self.slack, self.holder = slack, None
        self._logits: Tensor | None = None  # [B, V]: behind the last id that the cache has read ...
        self._stale = [False] * batch_size  # ... unless the cache was taken back since
        self._seed: int | None = None
        self._generator: torch.Generator | None = None

    @property
    def logits(self) -> Tensor:
        """[B, V] in the model's dtype: what the next step samples from.

        ValueError while a row is empty.
        """
        self._catch_up()
        if 0 in self._cache.lengths_at_most:
            raise ValueError(
                f"row {self._cache.lengths_at_most.index(0)} is empty: read a prompt first"
            )
        return self._logits

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""
        return [
            cached + behind for cached, behind in zip(self._cache.lengths_at_most, self._behind)
        ]

    @property
    def limit(self) -> int:
        """How many tokens a row can hold."""
        most = self.config.max_position_embeddings
        return most if self._cache.wraps else min(most, self._cache.num_slots)

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Append ids to each row (ragged; a row may be empty).

        Raises ValueError for ids outside the vocabulary and for rows that grow too long; nothing is
        read then.
        """
        self._append_rows(rows)
        self._catch_up()

    @torch.inference_mode()
    def score(self, ids: Sequence[int]) -> Tensor:
        """`read` for a decoder of one row, with the logits behind each of the ids: [T, V], in the
        model's dtype.

        They judge a guess at what comes next; `rewind` takes back what was wrong. ValueError as for
        `read`, for a decoder of several rows, and for no ids.
        """
        if self.batch_size > 1 or not ids:
            raise ValueError(
                f"score takes ids, and a decoder of one row; here are {len(ids)} and "
                f"{self.batch_size}"
            )
        self._append_rows([ids])
        self.rewind(0)  # a faster engine brings the cache's tables up to date then
        scored: list[Tensor] = []
        while T := min(self._behind[0], self._chunk):
            scored.append(self._forward_all(self._next_tokens(T))[0])  # [T, V]
            self._behind, self._stale = [self._behind[0] - T], [False]
        self._keep_logits([len(ids)], scored[-1][-1:])
        return torch.cat(scored)[-len(ids) :]

    @torch.inference_mode()
    def step(self, sampling: Sampling, mask: Tensor | None = None) -> Tensor:
        """Sample an id for each row and append it: int64 [B] on the device.

        mask  bool [B, V] or [V]: True where an id is allowed

        The logits behind it are worked out when they are asked for, at the latest by the next step:
        the ids are there sooner, and the last step of a text costs no forward. Nothing waits for
        the device. Raises ValueError while a row is empty and where there is no more room.
        """
        logits = self.logits
        if self._generator is None or sampling.seed != self._seed:
            self._seed, self._generator = sampling.seed, random_numbers(sampling, logits.device)
        ids = next_ids(logits, sampling, self._history, self._cache.lengths, mask, self._generator)
        self._append(ids[:, None], [1] * self.batch_size)
        return ids

    @torch.inference_mode()
    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b).

        All of a row can always be forgotten. Otherwise ValueError for more than the cache can take
        back; nothing is forgotten then.
        """
        counts = [n] * self.batch_size if isinstance(n, int) else list(n)
        if len(counts) != self.batch_size or min(counts) < 0:
            raise ValueError(
                f"rewind takes one count of 0 or more for each of {self.batch_size} rows, not "
                f"{counts}"
            )
        cached, behind = self._cache.lengths_at_most, self._behind
        stay = [length - n for length, n in zip(self.lengths, counts)]
        if min(stay) < 0:
            raise ValueError(
                f"cannot forget {counts} tokens of rows that hold "
                f"{[s + n for s, n in zip(stay, counts)]}"
            )
        # The logits behind the last token that stays are gone if the cache goes back. Then that
        # token leaves it too, to be read again: alone if the logits are asked for, otherwise
        # together with what comes next.
        keep = [
            c if n < b or (n == b and not stale) else max(s - 1, 0)
            for c, b, n, s, stale in zip(cached, behind, counts, stay, self._stale)
        ]
        try:
            self._cache.rewind([c - k for c, k in zip(cached, keep)])
        except ValueError:
            message = (
                f"cannot forget {counts} tokens: once the window rolls, {self.slack} can be "
                f"taken back in all"
            )
            raise ValueError(message) from None
        self._stale = [stale or k < c for c, k, stale in zip(cached, keep, self._stale)]
        self._behind = [s - k for s, k in zip(stay, keep)]
        for b, length in enumerate(stay):
            self._history[b, length:] = -1

    def _append_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """`_append` for lists of ids from outside."""
        if len(rows) != self.batch_size:
            raise ValueError(f"{len(rows)} rows for a decoder of {self.batch_size}")
        for row in rows:
            check_ids(row, self.config)
        counts = [len(row) for row in rows]
        if max(counts):
            padded = torch.tensor(
                [list(row) + [-1] * (max(counts) - len(row)) for row in rows]
            )  # [B, T]
            self._append(padded.to(self.model.device, non_blocking=True), counts)

    def _append(self, ids: Tensor, counts: list[int]) -> None:
        """Write ids [B, T] (-1: none) behind what each row holds; the cache reads them later."""
        lengths = [length + n for length, n in zip(self.lengths, counts)]
        if max(lengths) > self.limit:
            raise ValueError(f"{max(lengths)} tokens in a row, and the limit here is {self.limit}")
        T, room = ids.shape[1], self._history.shape[1]
        if max(lengths) + T > room:
            self._history = F.pad(
                self._history, (0, max(max(lengths) + T, 2 * room) - room), value=-1
            )
        start = self._cache.lengths + torch.tensor(self._behind).to(
            ids.device, non_blocking=True
        )  # [B]
        at = start[:, None] + torch.arange(T, device=ids.device)  # [B, T]
        self._history.scatter_(1, at, ids)
        self._behind = [b + n for b, n in zip(self._behind, counts)]

    @torch.inference_mode()
    def _catch_up(self) -> None:
        """Let the model read what the cache lacks, chunk by chunk."""
        while T := min(max(self._behind), self._chunk):
            counts, tokens = [min(b, T) for b in self._behind], self._next_tokens(T)
            if min(counts) == T:
                self._logits = self._forward(tokens)  # [B, V]
            else:
                self._keep_logits(counts, self.model(tokens, self._cache, counts, last_only=True))
            self._behind = [b - n for b, n in zip(self._behind, counts)]
            self._stale = [stale and n == 0 for stale, n in zip(self._stale, counts)]

    def _next_tokens(self, T: int) -> Tensor:
        """Up to T ids of each row that the cache has not read: int64 [B, T]."""
        at = self._cache.lengths[:, None] + torch.arange(T, device=self.model.device)  # [B, T]
        return self._history.gather(1, at).clamp(min=0)

    def _keep_logits(self, counts: list[int], new: Tensor) -> None:
        """Take over the rows that have read something."""
        read = torch.tensor(counts).to(new.device, non_blocking=True)[:, None] > 0  # [B, 1]
        self._logits = new if self._logits is None else torch.where(read, new, self._logits)

    def _forward(self, tokens: Tensor) -> Tensor:
        """Let every row read its tokens [B, T]; returns the logits behind them, [B, V]."""
        return self.model(tokens, self._cache, last_only=True)

    def _forward_all(self, tokens: Tensor) -> Tensor:
        """The same, with the logits behind each of them, [B, T, V]."""
        return self.model(tokens, self._cache)


def check_ids(ids: Sequence[int], config: Config) -> None:
    """Raises ValueError for an id outside the vocabulary."""
    for id in set(ids):
        if not 0 <= id < config.vocab_size:
            raise ValueError(f"token id {id} lies outside the vocabulary of {config.vocab_size}")

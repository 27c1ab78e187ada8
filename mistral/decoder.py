"""The engine interface, and the reference engine: a model with its rolling cache."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.config import Config
from mistral.model import Mistral
from mistral.sampling import Sampling, next_ids, random_numbers


class Engine(Protocol):
    """The four methods that generation needs; `Decoder` is the reference, others are faster."""

    config: Config
    batch_size: int

    def read(self, rows: Sequence[Sequence[int]]) -> None: ...
    def step(self, sampling: Sampling, mask: Tensor | None = None) -> Tensor: ...
    def rewind(self, n: int | Sequence[int]) -> None: ...

    @property
    def logits(self) -> Tensor: ...


class Decoder:
    """The reference engine: a model, its rolling cache, and the logits of the next token of each row.

    max_tokens  no row will hold more; required for a model without a window
    slack       how many tokens `rewind` can take back once the window has begun to roll

    A seed in `Sampling` starts the decoder's random numbers at the first step that brings it, and they go on from
    there as long as the seed stays the same.
    """

    def __init__(self, model: Mistral, batch_size: int = 1, max_tokens: int | None = None, *, slack: int = 16):
        self.model, self.config, self.batch_size = model, model.config, batch_size
        with torch.inference_mode():
            # One more than asked for: `rewind` reads the last token that stays again.
            self._cache = model.new_cache(batch_size, max_tokens, slack and slack + 1)
            self._history = torch.full((batch_size, 64), -1, device=self._cache.lengths.device)
        self._chunk = min(self.config.sliding_window or 2048, 2048)  # longer ones cost memory and gain no speed
        self._unread: list[list[int]] = [[] for _ in range(batch_size)]
        self._logits: Tensor | None = None
        self._seed: int | None = None
        self._generator: torch.Generator | None = None

    @property
    def logits(self) -> Tensor:
        """[B, V] in the model's dtype: what the next step samples from. ValueError while a row is empty."""
        if any(self._unread):
            self.read([[]] * self.batch_size)
        if 0 in self._cache.lengths_at_most:
            raise ValueError(f"row {self._cache.lengths_at_most.index(0)} is empty: read a prompt first")
        return self._logits

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Append ids to each row (ragged; a row may be empty).

        Raises ValueError for ids outside the vocabulary and for rows that grow too long; nothing is read then.
        """
        if len(rows) != self.batch_size:
            raise ValueError(f"{len(rows)} rows for a decoder of {self.batch_size}")
        for id in {id for row in rows for id in row}:
            if not 0 <= id < self.config.vocab_size:
                raise ValueError(f"token id {id} lies outside the vocabulary of {self.config.vocab_size}")
        rows = [unread + list(row) for unread, row in zip(self._unread, rows)]
        self._check_room([len(row) for row in rows])
        self._unread = [[] for _ in rows]
        for start in range(0, max(map(len, rows)), self._chunk):
            chunk = [row[start : start + self._chunk] for row in rows]
            lengths = [len(row) for row in chunk]
            T = max(lengths)
            tokens = torch.tensor([row + [0] * (T - len(row)) for row in chunk])  # [B, T], right-padded
            self._forward(tokens.to(self._history.device, non_blocking=True), None if min(lengths) == T else lengths)

    @torch.inference_mode()
    def step(self, sampling: Sampling, mask: Tensor | None = None) -> Tensor:
        """Sample an id for each row, append it, compute the logits of the one after. int64 [B] on the device.

        mask  bool [B, V] or [V]: True where an id is allowed

        Nothing waits for the device. Raises ValueError while a row is empty and where there is no more room.
        """
        logits = self.logits
        self._check_room([1] * self.batch_size)
        if self._generator is None or sampling.seed != self._seed:
            self._seed, self._generator = sampling.seed, random_numbers(sampling, logits.device)
        ids = next_ids(logits, sampling, self._history, self._cache.lengths, mask, self._generator)
        self._forward(ids[:, None], None)
        return ids

    @torch.inference_mode()
    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b). ValueError beyond what the cache can take back."""
        counts = [n] * self.batch_size if isinstance(n, int) else list(n)
        if len(counts) != self.batch_size or min(counts) < 0:
            raise ValueError(f"rewind takes one count of 0 or more for each of {self.batch_size} rows, not {counts}")
        held = self._cache.lengths_at_most
        stay = [h + len(unread) - c for h, unread, c in zip(held, self._unread, counts)]
        if min(stay) < 0:
            raise ValueError(f"cannot forget {counts} tokens of rows that hold {[s + c for s, c in zip(stay, counts)]}")
        # The logits behind the last token that stays are gone: that token leaves the cache too and is read again,
        # alone if they are asked for, otherwise together with what comes next.
        keep = [max(s - 1, 0) if c else h for h, s, c in zip(held, stay, counts)]
        self._cache.rewind([h - k for h, k in zip(held, keep)])
        for b, count in enumerate(counts):
            if count:
                self._unread[b] = self._history[b, keep[b] : stay[b]].tolist()
                self._history[b, stay[b] :] = -1

    def _forward(self, tokens: Tensor, lengths: list[int] | None) -> None:
        B, T = tokens.shape
        needed = max(self._cache.lengths_at_most) + T
        if needed > self._history.shape[1]:
            more = max(needed, 2 * self._history.shape[1]) - self._history.shape[1]
            self._history = F.pad(self._history, (0, more), value=-1)
        at = self._cache.lengths[:, None] + torch.arange(T, device=tokens.device)  # [B, T]
        logits = self.model(tokens, self._cache, lengths, last_only=True)  # [B, V]
        if lengths is not None:
            read = torch.tensor(lengths).to(tokens.device, non_blocking=True)[:, None]  # [B, 1]
            tokens = tokens.masked_fill(torch.arange(T, device=tokens.device) >= read, -1)
            if self._logits is not None:
                logits = torch.where(read > 0, logits, self._logits)
        self._history.scatter_(1, at, tokens)
        self._logits = logits

    def _check_room(self, counts: list[int]) -> None:
        longest = max(n + c for n, c in zip(self._cache.lengths_at_most, counts))
        limit = self.config.max_position_embeddings
        if not self._cache.wraps:
            limit = min(limit, self._cache.num_slots)
        if longest > limit:
            raise ValueError(f"{longest} tokens in a row, and the limit here is {limit}")

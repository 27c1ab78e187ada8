"""The reference engine: a model with its rolling cache."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.cache import rewind_counts
from mistral.engine.base import Engine
from mistral.engine.memory import checked_cache
from mistral.model import Mistral
from mistral.sampling import RandomNumbers, Sampling, sample_rows

_LONGEST_CHUNK = 2048  # longer chunks take memory and are no faster


class Decoder(Engine):
    """The reference engine: a model, its rolling cache, and the ids of each row.

    max_tokens  make room for this many tokens a row; required for a model without a window
    slack       how many tokens `rewind` can roll back once the window has begun to roll

    `step` appends ids that the cache has not read yet; they are read when the logits are asked for,
    at the latest by the next step. So ids are available early, and the last step of a text costs no
    forward pass.

    Raises ValueError for impossible sizes, NotEnoughMemory if the cache does not fit.
    """

    def __init__(
        self, model: Mistral, batch_size: int = 1, max_tokens: int | None = None, *, slack: int = 16
    ):
        self.model = model
        self.config = model.config
        self.batch_size = batch_size
        self.slack = slack
        with torch.inference_mode():
            # One extra slot: after a rewind the last kept token is fed again, to recompute its
            # logits.
            cache_slack = slack + 1 if slack > 0 else slack
            self._cache = checked_cache(model, batch_size, max_tokens, cache_slack)
            self._history = torch.full((batch_size, 64), -1, device=model.device)  # [B, room]: ids
        self._lengths = [0] * batch_size  # ids of each row; the cache may have read fewer
        self._logits: Tensor | None = None  # [B, V]: after the last id that the cache has read
        self._stale = [False] * batch_size  # the row's logits are not those of its last cached id
        self._random = RandomNumbers(model.device)
        self._chunk = min(self.config.sliding_window or _LONGEST_CHUNK, _LONGEST_CHUNK)

    @property
    def logits(self) -> Tensor:
        """[B, V] in the model's dtype: the logits that the next step samples from.

        Those of an empty row are meaningless. Raises ValueError while every row is empty.
        """
        if not any(self._lengths):
            raise ValueError("row 0 is empty: prefill a prompt first")
        self._catch_up()
        return self._logits

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""
        return list(self._lengths)

    @property
    def limit(self) -> int:
        """How many tokens a row can hold."""
        most = self.config.max_position_embeddings
        return most if self._cache.wraps else min(most, self._cache.num_slots)

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Append ids to each row (ragged; a row may be empty).

        Raises ValueError for ids outside the vocabulary and for rows that grow too long; nothing is
        appended then.
        """
        self._append_rows(rows)
        self._catch_up()

    @torch.inference_mode()
    def verify(self, ids: Sequence[int]) -> Tensor:
        """`prefill` for one row that also returns the logits after each of the ids.

        They are [T, V] in the model's dtype, and are used to check a guess; `rewind` drops the
        wrong tokens. Raises what `prefill` raises, and ValueError for several rows.
        """
        self._check_verify(ids)
        self._append_rows([ids])
        parts: list[Tensor] = []
        while counts := self._next_counts():
            parts.append(self._forward_all(self._pending_ids(counts))[0])  # [T, V]
            self._keep_logits(counts, parts[-1][-1:])
        return torch.cat(parts)[-len(ids) :]

    @torch.inference_mode()
    def step(
        self, sampling: Sampling | Sequence[Sampling | None], mask: Tensor | None = None
    ) -> Tensor:
        """Sample an id for each row and append it: int64 [B] on the device, IDLE for an idle row.

        sampling  one for all rows, or one per row; None: the row is idle and keeps its length.
                  See `RandomNumbers` for what this means for seeds.
        mask      bool [B, V] or [V]: True for an id that is allowed

        Never synchronizes. Raises ValueError while a row is empty and if there is no more room.
        """
        counts = self._step_counts(sampling)
        self._catch_up()
        ids = sample_rows(self._logits, sampling, self._history, self._lengths, mask, self._random)
        self._append(ids[:, None], counts)
        return ids

    @torch.inference_mode()
    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b).

        All of a row can always be forgotten. Otherwise raises ValueError for more than the cache
        can roll back; nothing is forgotten then.
        """
        counts = rewind_counts(n, self._lengths)
        # 1. How much of each row stays in the cache.
        cached = self._cache.lengths
        kept = list(cached)
        for b, count in enumerate(counts):
            pending = self._lengths[b] - cached[b]
            if count > pending or (count == pending and self._stale[b]):
                # Shrinking the cache loses the logits of the last kept token: drop that token too.
                # It is fed again later, alone or together with what comes next.
                kept[b] = max(self._lengths[b] - count - 1, 0)
        # 2. Shrink the cache; if it cannot, nothing has changed yet.
        try:
            self._cache.rewind([before - after for before, after in zip(cached, kept)])
        except ValueError:
            raise ValueError(
                f"cannot forget {counts} tokens: once the window rolls, {self.slack} can be rolled "
                "back in all"
            ) from None
        # 3. Forget the ids.
        for b, count in enumerate(counts):
            self._lengths[b] -= count
            if count and self._lengths[b] == 0:
                self._restart(b)
            self._stale[b] |= kept[b] < cached[b]
            self._history[b, self._lengths[b] :] = -1

    def _step_counts(self, sampling: Sampling | Sequence[Sampling | None]) -> list[int]:
        """How many ids a step appends to each row: 1, or 0 if the row is idle. Checks the room."""
        counts = [1] * self.batch_size
        if not isinstance(sampling, Sampling):
            counts = [int(own is not None) for own in sampling]
        if len(counts) != self.batch_size:
            raise ValueError(f"{len(counts)} samplings for a decoder of {self.batch_size} rows")
        for b, (count, length) in enumerate(zip(counts, self._lengths)):
            if count and not length:
                raise ValueError(f"row {b} is empty: prefill a prompt first")
        self._check_room(counts)
        return counts

    def _restart(self, b: int) -> None:
        """Row b is empty: another sequence may begin, and with it the row's own random numbers."""
        self._random.restart(b)

    def _append_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """`_append` for lists of ids from outside."""
        self._check_ids(rows)
        counts = [len(row) for row in rows]
        self._check_room(counts)
        if longest := max(counts):
            padded = [list(row) + [-1] * (longest - len(row)) for row in rows]
            ids = torch.tensor(padded).to(self.model.device, non_blocking=True)  # [B, T]
            self._append(ids, counts)

    def _append(self, ids: Tensor, counts: list[int]) -> None:
        """Append the first counts[b] of ids [B, T] to row b; the cache reads them later."""
        lengths = [length + count for length, count in zip(self._lengths, counts)]
        room = self._history.shape[1]
        if max(lengths) >= room:  # the last column stays free, for pads
            self._history = F.pad(self._history, (0, max(lengths) + room), value=-1)
        start = self._lengths[0]
        T = ids.shape[1]
        if len(set(self._lengths)) == 1 and min(counts) == T:  # rows of one length
            self._history[:, start : start + T] = ids
        else:
            columns, real = self._columns(self._lengths, counts)  # [B, T] each
            self._history.scatter_(1, columns, torch.where(real, ids, -1))
        self._lengths = lengths

    def _columns(self, starts: list[int], counts: list[int]) -> tuple[Tensor, Tensor]:
        """Where counts[b] ids of row b from starts[b] on are in the history, and which are no pads.

        int64 and bool, [B, T] each; the column of a pad is the last one, which is always free.
        """
        on_host = torch.tensor([starts, counts])[:, :, None]
        first, count = on_host.to(self._history.device, non_blocking=True)  # [B, 1] each
        offsets = torch.arange(max(counts), device=first.device)  # [T]
        real = offsets < count
        return torch.where(real, first + offsets, self._history.shape[1] - 1), real

    def _catch_up(self) -> None:
        """Prefill the ids that the cache lacks, chunk by chunk."""
        with torch.inference_mode():
            while counts := self._next_counts():
                self._keep_logits(counts, self._forward(self._pending_ids(counts), counts))

    def _next_counts(self) -> list[int] | None:
        """How many ids of each row the next forward pass reads; None: there are none left."""
        cached = self._cache.lengths
        # A forward pass that was interrupted after its commit has left no logits: read the last id
        # again.
        again = [0] * self.batch_size
        for b, stale in enumerate(self._stale):
            if stale and self._lengths[b] == cached[b] > 0:
                again[b] = 1
        if any(again):
            self._cache.rewind(again)
            cached = self._cache.lengths
        pending = [length - read for length, read in zip(self._lengths, cached)]
        if not any(pending):
            return None
        counts = [min(count, self._chunk) for count in pending]
        self._stale = [stale or count > 0 for stale, count in zip(self._stale, counts)]
        return counts

    def _pending_ids(self, counts: list[int]) -> Tensor:
        """The next counts[b] ids of row b that the cache has not read, padded: int64 [B, T]."""
        T = max(counts)
        cached = self._cache.lengths
        if len(set(cached)) == 1 and min(counts) == T:  # rows of one length
            return self._history[:, cached[0] : cached[0] + T]
        columns, _ = self._columns(cached, counts)
        return self._history.gather(1, columns).clamp(min=0)  # [B, T]

    def _keep_logits(self, counts: list[int], new: Tensor) -> None:
        """Take over the logits [B, V] of the rows that have read something."""
        if min(counts) == 0 and self._logits is not None:
            read = torch.tensor(counts).to(new.device, non_blocking=True)[:, None] > 0  # [B, 1]
            new = torch.where(read, new, self._logits)
        self._logits = new
        self._stale = [stale and count == 0 for stale, count in zip(self._stale, counts)]

    def _forward(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """Read the first counts[b] of tokens [B, T] of row b; returns the last logits, [B, V]."""
        whole = min(counts) == tokens.shape[1]
        return self.model(tokens, self._cache, None if whole else counts, last_only=True)

    def _forward_all(self, tokens: Tensor) -> Tensor:
        """Let every row read tokens [B, T]; returns the logits after each of them, [B, T, V]."""
        return self.model(tokens, self._cache)

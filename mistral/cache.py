"""The rolling key/value cache: memory that stops growing at the window.

Source: Mistral 7B, section 2 and figure 2, https://arxiv.org/abs/2310.06825
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral.config import Config


def window_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Who may look at whom: positions [B, T] and [B, keys] (-1: empty) -> bool [B, 1, T, keys].

    A query at position i sees the keys i - W < j <= i: W of them, itself included (Mistral 7B,
    section 2).
    """
    q, k = queries[:, :, None], keys[:, None, :]
    visible = (k >= 0) & (k <= q)
    if window is not None:
        visible &= k > q - window
    return visible[:, None]


@dataclass(frozen=True)
class Plan:
    """What one forward reads and writes, the same in every layer."""

    positions: Tensor  # [B, T]: where the new tokens stand
    mask: Tensor | None  # [B, 1, T, keys]; None: as `attention.attend` takes it, or not asked for
    rows: Tensor  # [B, 1]: 0 .. B-1, to index with slots
    slots: Tensor  # [B, T]: where the new keys go
    used: int  # how many slots to read, from the first on
    write_first: bool  # write, then read the ring alone; else read ring and chunk, then write
    slot_positions: Tensor  # [B, S + 1]: the table after this forward
    lengths: Tensor  # [B]: tokens a row holds after this forward
    peaks: Tensor  # [B]: the most it ever held
    lengths_at_most: list[
        int
    ]  # upper bounds of the same two, which the host knows without asking the device
    peaks_at_most: list[int]
    exact: bool  # True: the two lists are the numbers themselves


@dataclass(frozen=True)
class LayerCache:
    """One layer's share of a RollingCache during one forward."""

    keys: Tensor  # [B, K, S + 1, H]
    values: Tensor
    plan: Plan

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v [B, K, T, H]; returns the keys and values to attend to, [B, K,
        keys, H] each.
        """
        used = self.plan.used
        if self.plan.write_first:
            self._write(k, v)
            return self.keys[:, :, :used], self.values[:, :, :used]
        if used:
            all_keys = torch.cat((self.keys[:, :, :used], k), dim=2)
            all_values = torch.cat((self.values[:, :, :used], v), dim=2)
        self._write(k, v)
        return (all_keys, all_values) if used else (k, v)

    def _write(self, k: Tensor, v: Tensor) -> None:
        plan = self.plan
        self.keys[plan.rows, :, plan.slots] = k.detach().transpose(1, 2)  # indexed: [B, T, K, H]
        self.values[plan.rows, :, plan.slots] = v.detach().transpose(1, 2)


class RollingCache:
    """Keys and values of the last S tokens of each of B rows, in every layer. Position p lives in
    slot p mod S.

    S = min(window + slack, max_tokens). Each slot knows the absolute position that it holds (-1:
    empty), and the mask is made from those, so the order of the slots does not matter. Keys are
    stored rotated by their absolute position.

    One forward: `plan` works out positions, slots and mask from the state before it; after `begin`
    every layer reads and writes by the plan; `commit` makes the plan the new state. A forward that
    is broken off in between counts as one whose tokens were taken back. No gradient flows into what
    is remembered.

    An example with window 3, no slack and one row (S = 3):

        read tokens 0 1 2 3 4   slots  [3 4 2]   five at once: each attends to the chunk itself;
                                then 0 and 1 are
                                                 not written at all, since 3 and 4 belong in their
                                                 slots
        read token 5            slots  [3 4 5]   one token: written first (it evicts 2, which lies
                                outside the window
                                                 of 5), then attends to the three slots: 3 4 5
        read tokens 6 7         slots  [6 7 5]   6 sees 4 5 6, so slot 1 must not be overwritten
                                yet: attend to
                                                 ring and chunk together [3 4 5 6 7] by the mask
                                                     6:   . x x x .
                                                     7:   . . x x x      and then write

    With slack 2 (S = 5) the last two may be taken back, because what they evicted was already out
    of sight:

        tokens 0 .. 7           slots  [5 6 7 3 4]
        rewind(2)               slots  [5 . . 3 4]   the next token is 6 again; it sees 4 5 6

    In a ragged batch a row may read fewer tokens than the others, or none (right-padded,
    `lengths`). Pads are written to one more slot, number S, that nobody reads. The host keeps upper
    bounds of the rows' lengths, so that slicing and overflow checks never wait for the device; they
    are exact as long as `lengths` comes from the host.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        *,
        max_tokens: int | None,
        slack: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """Raises ValueError for sizes below 1 (slack: 0), and without a window for max_tokens
        None.
        """
        window = config.sliding_window
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1) or slack < 0:
            raise ValueError(
                f"impossible cache: batch_size {batch_size}, max_tokens {max_tokens}, slack {slack}"
            )
        if window is None and max_tokens is None:
            raise ValueError("this model has no sliding window, so its cache needs max_tokens")
        self.window, self.slack, self.batch_size = window, slack, batch_size
        self.num_slots = cache_slots(window, max_tokens, slack)
        self.wraps = (
            window is not None and self.num_slots == window + slack
        )  # False: num_slots tokens fill it
        # Zeros, not empty memory: a masked slot has weight 0, and 0 * nan would be nan.
        shape = (
            config.num_hidden_layers,
            batch_size,
            config.num_key_value_heads,
            self.num_slots + 1,
            config.head_dim,
        )
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, B, K, S + 1, H]
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.slot_positions = torch.full(
            (batch_size, self.num_slots + 1), -1, device=device
        )  # [B, S + 1]
        self.lengths = torch.zeros(
            batch_size, dtype=torch.int64, device=device
        )  # [B]: tokens that a row holds
        self.peaks = torch.zeros_like(
            self.lengths
        )  # the most that a row ever held: what was evicted follows from it
        self.lengths_at_most = [0] * batch_size  # upper bounds of the same two, on the host
        self.peaks_at_most = [0] * batch_size
        self.exact = True  # the two lists are the numbers themselves, not upper bounds

    def plan(
        self, num_tokens: int, lengths: Tensor | Sequence[int] | None = None, masked: bool = True
    ) -> Plan:
        """The next forward, of [B, num_tokens] tokens, `lengths` [B] of them real (None: all), with
        a mask or without.

        Raises ValueError for impossible lengths and for tokens that do not fit; the cache is as
        before then.
        """
        counts = count_real(lengths, self.batch_size, num_tokens)
        exact = self.exact and counts is not None
        device = self.lengths.device
        if lengths is None:
            lengths = torch.full_like(self.lengths, num_tokens)
        else:
            lengths = torch.as_tensor(lengths).to(device, non_blocking=True)
        ends = self.lengths + lengths  # [B]
        at_most = [
            n + c for n, c in zip(self.lengths_at_most, counts or [num_tokens] * self.batch_size)
        ]
        at_most = self.check_room(at_most, ends, exact)
        peaks = [max(p, n) for p, n in zip(self.peaks_at_most, at_most)]

        S = self.num_slots
        positions = self.lengths[:, None] + torch.arange(num_tokens, device=device)  # [B, T]
        # Pads go to the bin, and so do tokens whose slot a later token of the same chunk takes.
        kept = (positions < ends[:, None]) & (positions >= ends[:, None] - S)
        slots = torch.where(kept, positions % S, S)  # [B, T]
        table = self.slot_positions.scatter(1, slots, positions)  # [B, S + 1]

        write_first = self._may_write_first(num_tokens, max(peaks))
        used = min(S, max(peaks if write_first else self.peaks_at_most))
        # One token a row, all rows of one length, nothing taken back, no slot out of sight: every
        # slot is seen.
        sees_all = (
            (exact and num_tokens == 1 and min(counts) == 1)
            and (at_most == peaks and min(at_most) == max(at_most))
            and (self.window is None or used <= self.window)
        )
        mask = (
            None
            if not masked or (write_first and sees_all)
            else self._mask(positions, table, used, write_first)
        )
        rows = torch.arange(self.batch_size, device=device)[:, None]
        furthest = torch.maximum(self.peaks, ends)
        return Plan(
            positions,
            mask,
            rows,
            slots,
            used,
            write_first,
            table,
            ends,
            furthest,
            at_most,
            peaks,
            exact,
        )

    def begin(self, plan: Plan) -> None:
        """Slots are about to be overwritten: from here on, what they evict is gone."""
        self.peaks.copy_(plan.peaks)
        self.peaks_at_most = plan.peaks_at_most

    def layer(self, index: int, plan: Plan) -> LayerCache:
        """Layer `index` as the attention of one forward sees it."""
        return LayerCache(self.keys[index], self.values[index], plan)

    def commit(self, plan: Plan) -> None:
        """Make the plan the state, after every layer has written."""
        self.slot_positions.copy_(plan.slot_positions)
        self.lengths.copy_(plan.lengths)
        self.lengths_at_most, self.exact = plan.lengths_at_most, plan.exact

    def rewind(self, n: int | Tensor | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b). Reads n on the host.

        Exact up to `slack` tokens behind the furthest point reached, and without limit while
        nothing was evicted. All of a row can always be forgotten. Raises ValueError beyond that;
        the cache is as before then.
        """
        counts = [n] * self.batch_size if isinstance(n, int) else [int(c) for c in n]
        if len(counts) != self.batch_size or min(counts) < 0:
            raise ValueError(
                f"rewind takes one count of 0 or more for each of {self.batch_size} rows, not "
                f"{counts}"
            )
        if not self.exact:
            self.lengths_at_most, self.peaks_at_most = self.lengths.tolist(), self.peaks.tolist()
            self.exact = True
        after = [length - c for length, c in zip(self.lengths_at_most, counts)]
        for length, count, peak in zip(after, counts, self.peaks_at_most):
            if length < 0:
                raise ValueError(
                    f"cannot forget {count} tokens of a row that holds {length + count}"
                )
            if length and peak > self.num_slots and peak - length > self.slack:
                gone = f"{peak - length} behind the furthest point, and the slack is {self.slack}"
                raise ValueError(f"cannot forget {count} tokens: {gone}; what they evicted is gone")
        self.lengths_at_most = after
        self.peaks_at_most = [
            peak if length else 0 for peak, length in zip(self.peaks_at_most, after)
        ]
        self.lengths -= torch.tensor(counts).to(self.lengths.device, non_blocking=True)
        self.peaks.masked_fill_(self.lengths == 0, 0)
        self.slot_positions.masked_fill_(self.slot_positions >= self.lengths[:, None], -1)

    def _may_write_first(self, num_tokens: int, peak: int) -> bool:
        """Whether the keys of a chunk can be written before its queries read the ring, which saves
        a copy of it.

        T tokens from position p on evict positions up to p + T-1 - S. The first query, at p, still
        sees those above
        p - W. So p + T-1 - S <= p - W must hold, that is T <= S - W + 1; or nothing is evicted at
        all.
        """
        if max(self.peaks_at_most) == 0:
            return False  # nothing to read: the chunk attends to itself
        if peak <= self.num_slots:
            return True
        return self.window is not None and num_tokens <= self.num_slots - self.window + 1

    def _mask(
        self, positions: Tensor, table: Tensor, used: int, write_first: bool
    ) -> Tensor | None:
        """Who sees whom in the next forward;

        None for plain causal attention of a chunk to itself.
        """
        if write_first:
            return window_mask(positions, table[:, :used], self.window)
        if used:
            return window_mask(
                positions, torch.cat((self.slot_positions[:, :used], positions), dim=1), self.window
            )
        # Pads of a first chunk need no mask: they come last, so causality hides them.
        return self_mask(positions, self.window)

    def check_room(self, at_most: list[int], ends: Tensor, exact: bool) -> list[int]:
        """The bounds, tightened where they hit the end.

        ValueError where there is no room or what is needed is gone.
        """
        for length, peak in zip(self.lengths_at_most, self.peaks_at_most):
            if self.wraps and peak > self.num_slots and peak - length > self.slack:
                raise ValueError(
                    "a forward was broken off and has overwritten what is still needed: start a "
                    "new cache"
                )
        if not self.wraps and max(at_most) > self.num_slots:
            # The one place of a forward that may wait for the device: when a bound, not a known
            # length, hits the end.
            at_most = at_most if exact else ends.tolist()
            if max(at_most) > self.num_slots:
                raise ValueError(
                    f"{max(at_most)} tokens do not fit into a cache made for "
                    f"max_tokens={self.num_slots}"
                )
        return at_most


def self_mask(positions: Tensor, window: int | None) -> Tensor | None:
    """The mask of tokens that attend to each other alone, positions [B, T].

    None where the window is longer than they are: plain causal attention is the same, and has a
    faster kernel.
    """
    if window is None or positions.shape[1] < window:  # not <=: at T = W transformers makes a mask
        return None
    return window_mask(positions, positions, window)


def count_real(
    lengths: Tensor | Sequence[int] | None, batch_size: int, num_tokens: int
) -> list[int] | None:
    """Each row's real tokens;

    None where only an accelerator knows them. ValueError for impossible ones.
    """
    if lengths is None:
        return [num_tokens] * batch_size
    if len(lengths) != batch_size:
        raise ValueError(f"lengths has {len(lengths)} entries for {batch_size} rows")
    if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
        return None
    counts = [int(count) for count in lengths]
    if min(counts) < 0 or max(counts) > num_tokens:
        raise ValueError(f"lengths must lie between 0 and {num_tokens}, not {counts}")
    return counts


def cache_slots(window: int | None, max_tokens: int | None, slack: int = 0) -> int:
    """S, the slots a row needs: min(window + slack, max_tokens)."""
    return min(n for n in (window and window + slack, max_tokens) if n is not None)

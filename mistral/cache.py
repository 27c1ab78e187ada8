"""The rolling key/value cache: memory that stops growing at the window.

Source: Mistral 7B, section 2 and figure 2, https://arxiv.org/abs/2310.06825
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral.config import Config


def window_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which query sees which key: bool [B, 1, T, keys].

    queries, keys  positions, [B, T] and [B, keys]; -1: an empty slot

    A query at position i sees the keys i - W < j <= i: W of them, itself included (Mistral 7B,
    section 2).
    """
    q = queries[:, :, None]
    k = keys[:, None, :]
    visible = (k >= 0) & (k <= q)
    if window is not None:
        visible &= k > q - window
    return visible[:, None]


def chunk_mask(positions: Tensor, window: int | None) -> Tensor | None:
    """The mask of a chunk at `positions` [B, T] that attends to itself alone.

    None if the window is longer than the chunk: plain causal attention, which has a faster kernel.
    """
    if window is None or positions.shape[1] < window:  # not <=: at T = W transformers makes a mask
        return None
    return window_mask(positions, positions, window)


def slots_of(positions: Tensor, ends: Tensor, num_slots: int) -> Tensor:
    """The slot for each token of a chunk: positions [B, T] -> [B, T].

    ends  [B, 1]: the rows' lengths after the chunk

    Pads go to the bin, slot S, and so do tokens whose slot a later token of the chunk takes.
    """
    kept = (positions < ends) & (positions >= ends - num_slots)
    return torch.where(kept, positions % num_slots, num_slots)


def held_positions(lengths: Tensor, peaks: Tensor, num_slots: int) -> Tensor:
    """The position that each slot holds, -1 for an empty one: [B, S].

    lengths  [B, 1]: tokens that a row holds
    peaks    [B, 1]: the most it held since it was last empty

    Slot s was last written with the highest position below the peak that is s modulo S. Positions
    from `lengths` on were rolled back.
    """
    newest = peaks - 1
    held = newest - (newest - torch.arange(num_slots, device=lengths.device)) % num_slots  # [B, S]
    return held.masked_fill((held < 0) | (held >= lengths), -1)


@dataclass
class _Row:
    """What the host knows of one row. Views of a row share it."""

    length: int = 0  # tokens that it holds
    peak: int = 0  # the most it held since it was last empty: what was evicted follows from it


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The rows' lengths and peaks before and after one forward pass."""

    starts: list[int]
    lengths: list[int]
    peaks_before: list[int]
    peaks: list[int]


@dataclass(frozen=True, kw_only=True)
class ForwardPlan(Growth):
    """What one forward pass reads and writes, the same in every layer."""

    positions: Tensor  # [B, T]: of the new tokens
    rows: Tensor  # [B, 1]: 0 .. B-1, to index together with slots
    slots: Tensor  # [B, T]: where the new keys go
    mask: Tensor | None  # [B, 1, T, keys]; None: as `attention.attend` takes it, or not asked for
    slots_read: int  # how many slots to read, from the first on
    write_before_read: bool  # write, then read the ring; else read ring and chunk, then write


@dataclass(frozen=True)
class LayerCache:
    """One layer's share of a RollingCache during one forward pass."""

    keys: Tensor  # [B, K, S + 1, H]
    values: Tensor
    plan: ForwardPlan

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k and v [B, K, T, H]; returns the keys and values to attend to.

        Both are [B, K, keys, H].
        """
        read = self.plan.slots_read
        if self.plan.write_before_read:
            self._write(k, v)
            return self.keys[:, :, :read], self.values[:, :, :read]
        if read:
            all_keys = torch.cat((self.keys[:, :, :read], k), dim=2)
            all_values = torch.cat((self.values[:, :, :read], v), dim=2)
        self._write(k, v)
        return (all_keys, all_values) if read else (k, v)

    def _write(self, k: Tensor, v: Tensor) -> None:
        plan = self.plan
        self.keys[plan.rows, :, plan.slots] = k.detach().transpose(1, 2)  # indexed: [B, T, K, H]
        self.values[plan.rows, :, plan.slots] = v.detach().transpose(1, 2)


class RollingCache:
    """Keys and values of the last S tokens of B rows, in every layer.

    Position p is in slot p mod S, and S = min(window + slack, max_tokens). The mask is made from
    the position that each slot holds, so the order of the slots does not matter. Keys are stored
    rotated by their absolute position.

    The host knows every row's length exactly. Lengths, and with them which slot holds what, change
    here alone: `plan` computes positions, slots and mask from the state before a forward pass;
    after `begin` every layer reads and writes by the plan; `commit` makes the plan the new state.
    Tokens of a forward pass that is interrupted in between count as rolled back. No gradient flows
    into the stored keys and values.

    An example with window 3, no slack and one row (S = 3):

        read tokens 0 1 2 3 4   slots  [3 4 2]   five at once: each attends to the chunk itself;
                                                 then 0 and 1 are not written at all, because 3
                                                 and 4 belong in their slots
        read token 5            slots  [3 4 5]   one token: written first (it evicts 2, which lies
                                                 outside the window of 5), then attends to the
                                                 three slots: 3 4 5
        read tokens 6 7         slots  [6 7 5]   6 sees 4 5 6, so slot 1 must not be overwritten
                                                 yet: attend to ring and chunk together
                                                 [3 4 5 6 7] by the mask
                                                     6:   . x x x .
                                                     7:   . . x x x      and then write

    With slack 2 (S = 5) the last two may be rolled back, because what they evicted was already out
    of sight:

        tokens 0 .. 7           slots  [5 6 7 3 4]
        rewind(2)               slots  [5 . . 3 4]   the next token is 6 again; it sees 4 5 6

    In a ragged batch a row may read fewer tokens than the others, or none (right-padded,
    `lengths`). Pads are written to one more slot, number S, that is never read.
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
        """Raises ValueError for impossible sizes, and without a window if max_tokens is None."""
        window = config.sliding_window
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1) or slack < 0:
            raise ValueError(
                f"impossible cache: batch_size {batch_size}, max_tokens {max_tokens}, slack {slack}"
            )
        if window is None and max_tokens is None:
            raise ValueError("this model has no sliding window, so its cache needs max_tokens")
        self.window = window
        self.slack = slack
        self.batch_size = batch_size
        self.num_slots = cache_slots(window, max_tokens, slack)
        # False: the cache is full after num_slots tokens.
        self.wraps = window is not None and self.num_slots == window + slack
        K, S, H = config.num_key_value_heads, self.num_slots, config.head_dim
        shape = (config.num_hidden_layers, batch_size, K, S + 1, H)
        # Zeros, not empty memory: a masked slot has weight 0, and 0 * nan would be nan.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, B, K, S + 1, H]
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = [_Row() for _ in range(batch_size)]

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""
        return [row.length for row in self._rows]

    @property
    def peaks(self) -> list[int]:
        """The most tokens that each row held since it was last empty."""
        return [row.peak for row in self._rows]

    @property
    def slot_positions(self) -> Tensor:
        """The position that each slot holds, -1 for an empty one: int64 [B, S] on the device."""
        lengths, peaks = self._on_device(self.lengths, self.peaks)
        return held_positions(lengths, peaks, self.num_slots)

    def row(self, b: int) -> "RollingCache":
        """Row b as a cache of one row that shares its storage: prefill it while the others wait."""
        view = copy.copy(self)
        view.batch_size = 1
        view.keys = self.keys[:, b : b + 1]
        view.values = self.values[:, b : b + 1]
        view._rows = self._rows[b : b + 1]
        return view

    def grow(self, counts: Sequence[int]) -> Growth:
        """The lengths after `counts` more tokens; the cache itself does not change.

        Raises ValueError for tokens that do not fit, and after an interrupted forward pass that has
        overwritten tokens which are still needed.
        """
        starts = self.lengths
        peaks = self.peaks
        lengths = [start + count for start, count in zip(starts, counts)]
        if any(self._has_lost(start, peak) for start, peak in zip(starts, peaks)):
            raise ValueError(
                "a forward pass was interrupted after it had overwritten tokens that are still "
                "needed: start a new cache"
            )
        longest = max(lengths)
        if not self.wraps and longest > self.num_slots:
            raise ValueError(
                f"{longest} tokens do not fit into a cache made for max_tokens={self.num_slots}"
            )
        return Growth(
            starts=starts,
            lengths=lengths,
            peaks_before=peaks,
            peaks=[max(peak, length) for peak, length in zip(peaks, lengths)],
        )

    def plan(
        self, num_tokens: int, lengths: Tensor | Sequence[int] | None = None, masked: bool = True
    ) -> ForwardPlan:
        """The next forward pass, of [B, num_tokens] tokens, `lengths` [B] of them real (None: all).

        masked  False: a caller with kernels of its own needs no mask

        Raises what `grow` raises, and ValueError for impossible lengths; the cache does not change.
        """
        counts = token_counts(lengths, self.batch_size, num_tokens)
        growth = self.grow(counts)
        S = self.num_slots

        # 1. Which keys to read, and when to write: decided on the host.
        write_before_read = self._may_write_before_read(num_tokens, growth)
        slots_read = min(S, max(growth.peaks if write_before_read else growth.peaks_before))

        # 2. Where the new tokens go.
        device = self.keys.device
        starts, ends = self._on_device(growth.starts, growth.lengths)  # [B, 1] each
        positions = starts + torch.arange(num_tokens, device=device)  # [B, T]
        slots = slots_of(positions, ends, S)  # [B, T]

        # 3. Who sees whom. One token a row, rows of one length, nothing rolled back and no slot
        #    outside the window: every slot is seen, and there is no mask.
        sees_all = (
            (write_before_read and num_tokens == 1 and min(counts) == 1)
            and growth.lengths == growth.peaks
            and len(set(growth.lengths)) == 1
            and (self.window is None or slots_read <= self.window)
        )
        mask = None
        if masked and not sees_all:
            mask = self._mask(positions, growth, slots_read, write_before_read)
        return ForwardPlan(
            **vars(growth),
            positions=positions,
            rows=torch.arange(self.batch_size, device=device)[:, None],
            slots=slots,
            mask=mask,
            slots_read=slots_read,
            write_before_read=write_before_read,
        )

    def begin(self, growth: Growth) -> None:
        """Slots are about to be overwritten: what they evict is lost from here on."""
        for row, peak in zip(self._rows, growth.peaks):
            row.peak = peak

    def layer(self, index: int, plan: ForwardPlan) -> LayerCache:
        """Layer `index`, as the attention of one forward pass sees it."""
        return LayerCache(self.keys[index], self.values[index], plan)

    def commit(self, growth: Growth) -> None:
        """Make the lengths of `growth` the rows' lengths, after every layer has written."""
        for row, length in zip(self._rows, growth.lengths):
            row.length = length

    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b).

        Works up to `slack` tokens below the row's high-water mark, and without limit while
        nothing was evicted. All of a row can always be forgotten. Raises ValueError beyond that;
        the cache does not change then.
        """
        counts = rewind_counts(n, self.lengths)
        lengths = [length - count for length, count in zip(self.lengths, counts)]
        for count, length, peak in zip(counts, lengths, self.peaks):
            if count and self._has_evicted(length, peak):
                raise ValueError(
                    f"cannot forget {count} tokens: that is {peak - length} below the "
                    f"high-water mark, and the slack is {self.slack}; what they evicted is gone"
                )
        for row, length in zip(self._rows, lengths):
            row.length = length
            row.peak = row.peak if length else 0

    def can_copy(self, source: int, length: int) -> bool:
        """Whether row `source` has all that the token after its first `length` tokens sees."""
        row = self._rows[source]
        return length <= row.length and not self._has_evicted(length, row.peak)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` the first `length` tokens of row `source`, bit for bit.

        Raises ValueError if the source has overwritten what they need; nothing changes then.
        """
        if source == target or not self.can_copy(source, length):
            raise ValueError(
                f"the first {length} tokens of row {source} cannot be copied to row {target}: it "
                f"holds {self._rows[source].length}, and {self._rows[source].peak} came before"
            )
        # 1. Interrupted from here on, the target is empty.
        held = self._rows[source]
        new = self._rows[target]
        new.length = new.peak = 0
        # 2. A ring that has begun to roll is copied whole, with what its next tokens evict.
        peak = held.peak if held.peak > self.num_slots else length
        used = min(peak, self.num_slots)
        self.keys[:, target, :, :used] = self.keys[:, source, :, :used]
        self.values[:, target, :, :used] = self.values[:, source, :, :used]
        # 3. The tokens count.
        new.peak = peak if length else 0
        new.length = length

    def read_again(self, rows: Sequence[bool]) -> None:
        """Forget the last token of some rows, which must be the next one that they read.

        Needs no slack: the token returns to its slot, and what it evicted is outside its window.
        """
        for row, again in zip(self._rows, rows):
            row.length -= bool(again)
            row.peak = row.peak if row.length else 0

    def forget_lost(self) -> None:
        """Empty the rows of which an interrupted forward pass has overwritten needed tokens."""
        for row in self._rows:
            if self._has_lost(row.length, row.peak):
                row.length = row.peak = 0

    def _has_evicted(self, length: int, peak: int) -> bool:
        """Whether a later token may have overwritten one that a row of this length sees."""
        return length > 0 and peak > self.num_slots and peak - length > self.slack

    def _has_lost(self, length: int, peak: int) -> bool:
        """Whether a later token has overwritten one that the next token of a row sees."""
        if not self.wraps:
            return False
        first_seen = max(length - self.window + 1, 0)
        return first_seen < min(length, peak - self.num_slots)

    def _may_write_before_read(self, num_tokens: int, growth: Growth) -> bool:
        """Whether a chunk may be written before its queries read the ring, which saves copying it.

        T tokens from position p on evict positions up to p + T-1 - S. The first query, at p, still
        sees those above p - W. So p + T-1 - S <= p - W must hold, that is T <= S - W + 1; or
        nothing is evicted at all.
        """
        if max(growth.peaks_before) == 0:
            return False  # nothing to read: the chunk attends to itself
        if max(growth.peaks) <= self.num_slots:
            return True
        return self.window is not None and num_tokens <= self.num_slots - self.window + 1

    def _mask(
        self, positions: Tensor, growth: Growth, slots_read: int, write_before_read: bool
    ) -> Tensor | None:
        """The mask of the next forward pass; None for causal attention of a chunk to itself."""
        if not slots_read:
            # Pads of a first chunk need no mask: they come last, so causality hides them.
            return chunk_mask(positions, self.window)
        if write_before_read:
            lengths, peaks = self._on_device(growth.lengths, growth.peaks)
            keys = held_positions(lengths, peaks, self.num_slots)[:, :slots_read]
        else:
            lengths, peaks = self._on_device(growth.starts, growth.peaks_before)
            ring = held_positions(lengths, peaks, self.num_slots)[:, :slots_read]
            keys = torch.cat((ring, positions), dim=1)
        return window_mask(positions, keys, self.window)

    def _on_device(self, *numbers: list[int]) -> tuple[Tensor, ...]:
        """Lists of one number per row as int64 [B, 1] each, in one copy that waits for nothing."""
        together = torch.tensor(numbers)[:, :, None]
        return together.to(self.keys.device, non_blocking=True).unbind()


def token_counts(
    lengths: Tensor | Sequence[int] | None, batch_size: int, num_tokens: int
) -> list[int]:
    """How many tokens of each row are real. Raises ValueError for impossible ones."""
    if lengths is None:
        return [num_tokens] * batch_size
    if isinstance(lengths, Tensor):
        lengths = lengths.tolist()  # the host must know: waits for an accelerator
    counts = [int(count) for count in lengths]
    if len(counts) != batch_size:
        raise ValueError(f"lengths has {len(counts)} entries for {batch_size} rows")
    if min(counts) < 0 or max(counts) > num_tokens:
        raise ValueError(f"lengths must lie between 0 and {num_tokens}, not {counts}")
    return counts


def rewind_counts(n: int | Sequence[int], lengths: Sequence[int]) -> list[int]:
    """How many tokens each row forgets. ValueError for other than one count of 0 to its length."""
    counts = [n] * len(lengths) if isinstance(n, int) else [int(count) for count in n]
    if len(counts) != len(lengths) or min(counts) < 0:
        raise ValueError(
            f"rewind takes one count of 0 or more for each of {len(lengths)} rows, not {counts}"
        )
    for count, length in zip(counts, lengths):
        if count > length:
            raise ValueError(f"cannot forget {count} tokens of a row that holds {length}")
    return counts


def cache_slots(window: int | None, max_tokens: int | None, slack: int = 0) -> int:
    """S, the slots that a row needs: min(window + slack, max_tokens)."""
    return min(n for n in (window and window + slack, max_tokens) if n is not None)

"""The reference engine: a model with its rolling cache."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral.engine.base import Engine
from mistral.engine.draws import RandomNumbers, sample_rows
from mistral.engine.given import only_model
from mistral.engine.ids import check_rows, check_sizes
from mistral.engine.memory import checked_cache
from mistral.model import Mistral
from mistral.sampling import Sampling

_LONGEST_CHUNK = 2048  # longer chunks take memory and are no faster
# So few tokens a row are read in about the time of one: it goes into reading the weights.
_FEW = 16


def one_thread(method: Callable) -> Callable:
    """Decorates an engine's method: ValueError if another thread is inside such a method."""

    @functools.wraps(method)
    def run(self: Engine, *args: Any, **kwargs: Any) -> Any:
        me = threading.get_ident()
        state = vars(self)
        is_outermost = "_thread" not in state
        if state.setdefault("_thread", me) != me:  # atomic, unlike a test and an assignment
            raise ValueError("another thread is using this decoder: give each thread its own")
        try:
            return method(self, *args, **kwargs)
        finally:
            if is_outermost:
                state.pop("_thread", None)

    return run


def computes(method: Callable) -> Callable:
    """Decorates a decoder's method that runs the model: no gradients and no autocast in it.

    So it computes the same wherever it is called. ValueError if another thread is inside one.
    """

    @one_thread
    @functools.wraps(method)
    @torch.inference_mode()
    def run(self: "Decoder", *args: Any, **kwargs: Any) -> Any:
        device = self.model.device.type
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return method(self, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(self, *args, **kwargs)

    return run


class Decoder(Engine):
    """The reference engine: a model, its rolling cache, and the ids of each row.

    max_tokens  make room for this many tokens a row; required for a model without a window
    slack       how many tokens `rewind` can roll back once the window has begun to roll

    `step` appends ids that the cache has not read yet; they are read when the logits are asked for,
    at the latest by the next step. So ids are available early, and the last step of a text costs no
    forward pass.

    `copy.deepcopy` returns an independent decoder of the same model, whose weights are shared: to
    answer several times after one prompt, prefill it once, and let each answer have a copy. A copy
    in mid-text holds what was yielded.

    Raises ValueError for impossible sizes, NotEnoughMemory if the cache does not fit.
    """

    def __init__(
        self, model: Mistral, batch_size: int = 1, max_tokens: int | None = None, *, slack: int = 16
    ):
        model = only_model(model)
        check_sizes(batch_size=batch_size, max_tokens=max_tokens, slack=slack)
        self.model = model
        self.config = model.config
        self.batch_size = batch_size
        self.slack = slack
        with torch.inference_mode():
            self._cache = checked_cache(model, batch_size, max_tokens, slack)
            self._history = torch.full((batch_size, 64), -1, device=model.device)  # [B, room]: ids
        self._lengths = [0] * batch_size  # ids of each row; the cache may have read fewer
        self._logits: Tensor | None = None  # [B, V]: after the last id that the cache has read
        self._stale = [False] * batch_size  # the row's logits are not those of its last cached id
        self._unsettled = False  # True: a call runs, or was interrupted; see `_settle`
        self._random = RandomNumbers(model.device)
        self._chunk = min(self.config.sliding_window or _LONGEST_CHUNK, _LONGEST_CHUNK)

    def _shared(self) -> list[object]:
        return [self.model]

    @property
    def logits(self) -> Tensor:
        """[B, V] in the model's dtype: a copy of the logits that the next step samples from.

        To change what is sampled, pass `step` a mask. Those of an empty row are meaningless.
        Raises ValueError while every row is empty.
        """
        if not any(self._lengths):
            raise ValueError("row 0 is empty: prefill a prompt first")
        self._catch_up()
        return self._logits.clone()

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""
        return self._yielded(self._lengths)

    @property
    def limit(self) -> int:
        """How many tokens a row can hold."""
        most = self.config.max_position_embeddings
        return most if self._cache.wraps else min(most, self._cache.num_slots)

    @computes
    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """Append ids to each row (ragged; a row may be empty).

        Raises ValueError for ids outside the vocabulary and for rows that grow too long; nothing is
        appended then.
        """
        self._append_rows(rows)
        self._catch_up()

    @computes
    def verify(self, ids: Sequence[int]) -> Tensor:
        """`prefill` for one row that also returns the logits after each of the ids.

        They are [T, V] in the model's dtype, and are used to check a guess; `rewind` drops the
        wrong tokens. Raises what `prefill` raises, and ValueError for several rows.
        """
        return self.verify_rows([self._to_verify(ids)])[0]

    @computes
    def verify_rows(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """`verify` for several rows: of each the logits after its ids, [T, V]; T may be 0.

        One forward pass for all of them, unless they are long.
        """
        self._append_rows(rows)
        parts: list[list[Tensor]] = [[] for _ in rows]
        while counts := self._next_counts():
            logits = self._forward_all(self._pending_ids(counts), counts)  # [B, T, V]
            last = torch.tensor(counts).to(logits.device, non_blocking=True).sub(1).clamp(min=0)
            every = torch.arange(self.batch_size, device=logits.device)
            self._keep_logits(counts, logits[every, last])
            for b, count in enumerate(counts):
                parts[b].append(logits[b, :count])
        nothing = torch.empty(0, self.config.vocab_size, device=self.model.device)
        read = [torch.cat(part) if part else nothing for part in parts]
        # Ids that were appended before these were read along.
        return [logits[len(logits) - len(ids) :] for logits, ids in zip(read, rows)]

    @computes
    def score(self, row: int, ids: Sequence[int]) -> Tensor:
        """`prefill` for one row of several that also returns the logits after each id: [T, V]."""
        self._begin_use()  # before it catches up: ids in flight are not read
        self._catch_up()
        self._append_rows([ids if b == row else [] for b in range(self.batch_size)])
        parts: list[Tensor] = []
        while counts := self._next_counts():
            tokens = self._pending_ids(counts)[row : row + 1]
            parts.append(self.model(tokens, self._cache.row(row))[0])  # [T, V]
            self._keep_logits(counts, parts[-1][-1:].expand(self.batch_size, -1))
        return torch.cat(parts)

    @computes
    def step(
        self,
        sampling: Sampling | Sequence[Sampling | None],
        mask: Tensor | None = None,
        active: Sequence[bool] | None = None,
    ) -> Tensor:
        """Sample an id for each row and append it: int64 [B] on the device, IDLE for an idle row.

        sampling  one for all rows, or one per row; None: the row is idle and keeps its length.
                  See `RandomNumbers` for what this means for seeds.
        mask      bool [B, V] or [V]: True for an id that is allowed
        active    False for another row that is idle

        Never synchronizes. Raises ValueError while a row is empty and if there is no more room.
        """
        self._begin_use()
        self._check_model()
        self._settle()
        counts = self._step_counts(sampling, mask, active)
        self._catch_up()
        self._unsettled = True  # from the first random number on
        rows = (self._history, self._lengths)
        starts = self.answer_starts
        ids = sample_rows(self._logits, sampling, *rows, mask, self._random, counts, starts)
        self._append(ids[:, None], counts)
        return ids

    @computes
    def rewind(self, n: int | Sequence[int]) -> None:
        """Forget the last n tokens of every row (or n[b] of row b).

        All of a row can always be forgotten. Otherwise raises ValueError for more than the cache
        can roll back; nothing is forgotten then.
        """
        self._begin_use()
        counts = self._rewind_counts(n)
        lengths = [length - count for length, count in zip(self._lengths, counts)]
        # 1. How much of each row leaves the cache. The logits of its last kept token are lost then.
        self._cache.forget_lost()
        dropped = [max(held - stays, 0) for held, stays in zip(self._cache.lengths, lengths)]
        # 2. Shrink the cache; if it cannot, nothing has changed yet. A row whose cache is shorter
        #    than its ids is read again, so an interrupt between here and 3. costs only time.
        stale = self._stale
        self._stale = [was or n > 0 for was, n in zip(stale, dropped)]
        try:
            self._cache.rewind(dropped)
        except ValueError:
            self._stale = stale
            raise ValueError(
                f"cannot forget {counts} tokens: once the window rolls, {self.slack} can be rolled "
                "back in all"
            ) from None
        # 3. Forget the ids.
        self._unsettled = True
        self._lengths = lengths
        self._settle()

    @computes
    def copy_row(self, source: int, target: int, length: int) -> None:
        """Make row `target` the first `length` tokens of row `source`, without a forward pass.

        What the target held is forgotten, and its random numbers begin anew. Keys and values are
        copied bit for bit. Raises ValueError if the window of the source has rolled too far for it,
        as for a rewind to that length, and for impossible rows and lengths; nothing changes then.
        """
        self._begin_use()
        self._check_copy(source, target, length)
        # 1. The last ids of the source may not be in its cache yet. They are copied as ids alone.
        self._cache.forget_lost()
        cached = min(length, self._cache.lengths[source])
        if not self._cache.can_copy(source, cached):
            raise ValueError(
                f"row {source} cannot be copied up to token {length}: once the window rolls, "
                f"{self.slack} tokens can be left out"
            )
        # 2. Empty the target, then give it the ids. Interrupted before 3., it reads them.
        counts = [0] * self.batch_size
        counts[target] = self._lengths[target]
        self.rewind(counts)
        self._unsettled = True
        self._history[target, :length] = self._history[source, :length]
        self._stale[target] = True  # the logits after its last id are not known
        self._lengths[target] = length
        self._unsettled = False
        # 3. The keys and values.
        self._cache.copy_row(source, target, cached)

    @one_thread
    def restart_random(self, row: int) -> None:
        """Begin the random numbers of a row anew."""
        self._random.restart(row)

    @computes
    def erase(self, row: int) -> None:
        """Empty a row. Its keys and values become zeros: a masked NaN would still spread."""
        super().erase(row)
        storage = self._cache.row(row)
        storage.keys.zero_()
        storage.values.zero_()

    def _check_model(self) -> None:
        """Raises ValueError if the model was converted or moved after the decoder was created."""
        keys = self._cache.keys
        weight = self.model.model.norm.weight
        if keys.dtype != weight.dtype or keys.device != weight.device:
            raise ValueError(
                f"the decoder was created for {keys.dtype} on {keys.device}, and the model is "
                f"now {weight.dtype} on {weight.device}: create a new decoder"
            )

    def _check_attached(self) -> None:
        """Raises ValueError if something is attached to the model that the engine leaves out."""

    def _settle(self) -> None:
        """Undo what calls have left beyond `_lengths`, which alone say what a row holds.

        An interrupted call may have written ids there, or drawn random numbers.
        """
        if self._unsettled:
            for b, length in enumerate(self._lengths):
                self._history[b, length:] = -1
            self._random.settle(self._lengths)
            self._unsettled = False

    def _append_rows(self, rows: Sequence[Sequence[int]]) -> None:
        """`_append` for lists of ids from outside."""
        self._begin_use()
        self._check_model()
        self._check_attached()
        self._settle()
        rows = check_rows(rows, self.batch_size, self.config.vocab_size)
        counts = [len(row) for row in rows]
        self._check_room(counts)
        if longest := max(counts):
            padded = [row + [-1] * (longest - len(row)) for row in rows]
            ids = torch.tensor(padded).to(self.model.device, non_blocking=True)  # [B, T]
            self._append(ids, counts)

    def _append(self, ids: Tensor, counts: list[int]) -> None:
        """Append the first counts[b] of ids [B, T] to row b; the cache reads them later."""
        lengths = [length + count for length, count in zip(self._lengths, counts)]
        self._unsettled = True
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
        self._lengths = lengths  # here, and nowhere before, the ids count
        self._unsettled = False

    def _columns(self, starts: list[int], counts: list[int]) -> tuple[Tensor, Tensor]:
        """Where counts[b] ids of row b from starts[b] on are in the history, and which are no pads.

        int64 and bool, [B, T] each; the column of a pad is the last one, which is always free.
        """
        on_host = torch.tensor([starts, counts])[:, :, None]
        first, count = on_host.to(self._history.device, non_blocking=True)  # [B, 1] each
        offsets = torch.arange(max(counts), device=first.device)  # [T]
        real = offsets < count
        return torch.where(real, first + offsets, self._history.shape[1] - 1), real

    @computes
    def _catch_up(self) -> None:
        """Prefill the ids that the cache lacks, chunk by chunk."""
        while counts := self._next_counts():
            self._check_model()
            self._keep_logits(counts, self._forward(self._pending_ids(counts), counts))

    def _next_counts(self) -> list[int] | None:
        """How many ids of each row the next forward pass reads; None: there are none left."""
        cached = self._cache.lengths
        if any(self._stale):
            # 1. A rewind, or an interrupt after a commit, has left no logits: read the last id
            #    again.
            again = [
                stale and length == read > 0
                for stale, length, read in zip(self._stale, self._lengths, cached)
            ]
            self._cache.read_again(again)
            # 2. A forward pass that was interrupted may have overwritten what the row still needs:
            #    read the whole row again.
            self._cache.forget_lost()
            cached = self._cache.lengths
        pending = [length - read for length, read in zip(self._lengths, cached)]
        if not any(pending):
            return None
        counts = [min(count, self._chunk) for count in pending]
        if self.rows_together:
            counts = _worth_padding(counts)
        elif not self.steps_keep_bits or max(counts) > 1:
            counts = _longest_alone(counts)
        self._stale = [stale or count > 0 for stale, count in zip(self._stale, counts)]
        return counts

    def _pending_ids(self, counts: list[int]) -> Tensor:
        """The next counts[b] ids of row b that the cache has not read, padded: int64 [B, T]."""
        T = max(counts)
        cached = self._cache.lengths
        if len(set(cached)) == 1 and min(counts) == T:  # rows of one length
            return self._history[:, cached[0] : cached[0] + T].clamp(min=0)
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
        if (b := only_row(counts)) is not None:
            logits = self.model(tokens[b : b + 1], self._cache.row(b), last_only=True)
            return logits.expand(self.batch_size, -1)
        whole = min(counts) == tokens.shape[1]
        return self.model(tokens, self._cache, None if whole else counts, last_only=True)

    def _forward_all(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """`_forward` that returns the logits after each of the tokens: [B, T, V]."""
        if (b := only_row(counts)) is not None:
            logits = self.model(tokens[b : b + 1], self._cache.row(b))
            return logits.expand(self.batch_size, -1, -1)
        whole = min(counts) == tokens.shape[1]
        return self.model(tokens, self._cache, None if whole else counts)


def only_row(counts: Sequence[int]) -> int | None:
    """The row that alone has a count, in a batch of several; None: there is no such row."""
    if len(counts) > 1 and sum(map(bool, counts)) == 1:
        return counts.index(max(counts))
    return None


def _worth_padding(counts: list[int]) -> list[int]:
    """The counts of the next forward pass: all of them, or that of the longest row alone.

    The rows of a forward pass are padded to the longest. If that more than doubled the work, and
    the longest is not short, it is read alone: the prompt of one row costs what it costs alone.
    """
    longest = max(counts)
    if longest <= _FEW or len(counts) * longest <= 2 * sum(counts):
        return counts
    return _longest_alone(counts)


def _longest_alone(counts: list[int]) -> list[int]:
    """The count of the first of the longest rows; 0 for the others."""
    b = counts.index(max(counts))
    return [count if other == b else 0 for other, count in enumerate(counts)]

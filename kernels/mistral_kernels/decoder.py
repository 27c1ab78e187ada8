"""The fast engine: `mistral.Decoder` with CUDA graphs for a token and for short chunks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mistral.engine.attached import (
    addresses,
    norm_versions,
    refuse_attachments,
    refuse_changed_norms,
    refuse_moved,
)
from mistral.engine.base import IDLE
from mistral.engine.decoder import Decoder as ReferenceDecoder
from mistral.engine.decoder import computes, one_thread, only_row
from mistral.engine.draws import sample_rows
from mistral.engine.given import only_model
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral_kernels.decode.matvec import MAX_BATCH, MAX_ROWS
from mistral_kernels.decode.step import KERNELS, REFERENCES, DecodeStep
from mistral_kernels.portable import arch_for
from mistral_kernels.prefill.chunk import read_chunk, run_chunk
from mistral_kernels.sample.sampler import Sampler
from mistral_kernels.weights import unpacked_kinds
from mistral_kernels.works import Works

_NAME = "the kernels"


class Decoder(ReferenceDecoder):
    """`mistral.Decoder`, faster: same methods, same meaning, same errors.

    max_tokens, slack  as there
    graph              None: CUDA graphs on a GPU. False: the same launches one by one, for
                       debugging
    plain              run the kernels' plain-PyTorch twins instead: slow, on any device, to find
                       out which side is wrong
    pdl                programmatic dependent launch (compute capability 9.0 to 11.x; up to 16 rows)

    Differences: logits are float32, as the kernels compute them; for more than 16 rows those of a
    plain output matrix were rounded to its dtype, as the model's own are. Random numbers are those
    of the sampling kernel, so a seed gives another text than with the reference, of the same
    distribution. Up to `steps_in_flight` more steps are launched before the ids of one are read
    back; `rewind` rolls back those launched past the end of a text.

    The model's weights are regrouped: parameters become views of larger matrices, packed ones
    become planes. The model still works; a packed one is slower than before, because its layers put
    the blocks together again.

    The host knows every length (`RollingCache`); a CUDA graph reads them from the device, where
    `_positions` is their copy. A replayed step advances the copy itself.

    Raises ValueError if the kernels cannot run the model or the batch, and for what is attached to
    the model (hooks, adapters, biases), which they would leave out.
    """

    # The launches of a step depend on the number of rows alone: splits and tiles are the same
    # whichever of them are idle, and a column of a tile does not depend on the others. For more
    # than 16 rows cuBLAS multiplies plain matrices, which promises no such thing: if bits are asked
    # for (`rows_together` is False), the tiles do it instead, in several passes.
    steps_keep_bits = True

    def __init__(
        self,
        model: Mistral,
        batch_size: int = 1,
        max_tokens: int | None = None,
        *,
        slack: int = 16,
        graph: bool | None = None,
        plain: bool = False,
        pdl: bool = False,
    ):
        model = only_model(model)
        refuse_attachments(model, _NAME)
        super().__init__(model, batch_size, max_tokens, slack=slack)
        on_gpu = model.device.type == "cuda"
        if graph and (plain or not on_gpu):
            raise ValueError("a CUDA graph needs the kernels and a GPU")
        if pdl and on_gpu and arch_for(10 * torch.cuda.get_device_capability(model.device)[0]) < 90:
            raise ValueError(
                "dependent launch needs a GPU of compute capability 9.0 to 11.x: leave out pdl"
            )
        graph = on_gpu and not plain if graph is None else graph
        self.steps_in_flight = min(2, slack)
        self.works = Works(model.device, recorded=graph)
        self._plain = plain
        with torch.inference_mode():
            self._step = DecodeStep(model, self._cache, REFERENCES if plain else KERNELS, pdl)
            self._addresses = addresses(model)  # of the weights, which `_step` has regrouped
            self._norm_versions = norm_versions(model)
            self._sampler = Sampler(batch_size, model.config.vocab_size, model.device, plain)
            # Graphs hold addresses: none of these is ever replaced.
            self._logits = self._step.logits  # [B, V]
            # [B, room]; the column after the last id that fits is never read
            self._history = self._history.new_full((batch_size, self.limit + 1), -1)
            self._positions = self._history.new_zeros(batch_size)  # [B]: the cache's lengths
            self._active = self._history.new_zeros(batch_size)  # [B]: 1 if the row reads a token
            self._short_tokens = self._history.new_zeros(MAX_ROWS)
            self._short_starts = self._history.new_zeros(batch_size)  # [B]
            self._short_counts = self._history.new_zeros(batch_size)  # [B]
        self._short_logits: dict[str, Tensor] = {}  # where each short chunk's graph writes them
        self._placed: list[int] | None = None  # the lengths in `_positions`; None: unknown
        self._sampled = False  # True: `_step.tokens` are the ids that the cache reads next

    def __getstate__(self) -> None:
        raise TypeError("the kernels' decoder cannot be pickled; a mistral.Decoder can")

    def _shared(self) -> list[object]:
        return [self.model, self._step.weights]

    def _check_attached(self) -> None:
        refuse_attachments(self.model, _NAME)
        refuse_moved(self.model, self._addresses)
        if self._step.weights.activations == torch.float16:  # see `scaled_norm`
            refuse_changed_norms(self.model, self._norm_versions)

    @property
    def unpacked_kinds(self) -> list[str]:
        """The types of packed matrices that no kernel multiplies.

        They are unpacked at every step, which is slow.
        """
        return unpacked_kinds(self._step.weights)

    @property
    def logits(self) -> Tensor:
        """As the reference's, in float32."""
        return super().logits

    @computes
    def step(
        self,
        sampling: Sampling | Sequence[Sampling | None],
        mask: Tensor | None = None,
        active: Sequence[bool] | None = None,
    ) -> Tensor:
        """As the reference's."""
        self._begin_use()
        self._check_model()
        counts = self._step_counts(sampling, mask, active)
        # 1. Settings that the sampling kernel lacks are left to the reference.
        each = [sampling] if isinstance(sampling, Sampling) else sampling
        supported = [own is None or self._sampler.supports(own) for own in each]
        if not all(supported):
            self._sampled = False
            self._sampler.forget()
            if isinstance(sampling, Sampling):
                return super().step(sampling, mask, active)
            return self._step_of_both(sampling, supported, mask, counts)
        self._settle()
        # 2. Read the ids that were sampled last, and sample. An interrupt leaves the flags as they
        #    are here: `_settle` undoes the rest.
        sampled = self._sampled
        self._sampled = False
        self._unsettled = True
        self._sampler.prepare(sampling, mask, self._history, counts, self._lengths)
        self._read_and_sample(counts, sampled)
        # 3. Count.
        self._lengths = [length + count for length, count in zip(self._lengths, counts)]
        self._sampler.confirm()
        self._unsettled = False
        self._sampled = all(counts)
        return self._chosen()

    def _step_of_both(
        self,
        sampling: Sequence[Sampling | None],
        supported: Sequence[bool],
        mask: Tensor | None,
        counts: list[int],
    ) -> Tensor:
        """A step: the kernel samples for the supported rows, the reference for the others."""
        self._settle()
        ours = [count * own for count, own in zip(counts, supported)]
        others = [count - own for count, own in zip(counts, ours)]
        self._catch_up()
        self._place()
        self._unsettled = True
        own = [sampling if count else None for sampling, count in zip(sampling, ours)]
        self._sampler.prepare(own, mask, self._history, ours, self._lengths)
        self.works.run("sample for some rows", self._choose_for_some)
        self._sampler.forget()  # it does not know the ids of the others
        rows = (self._history, self._lengths)
        starts = self.answer_starts
        ids = sample_rows(self._logits, sampling, *rows, mask, self._random, others, starts)
        ids = torch.where(self._sampler.answers == IDLE, ids, self._sampler.answers)
        self._append(ids[:, None], counts)
        self._sampler.confirm()
        return ids

    def _chosen(self) -> Tensor:
        """The ids of the last sampling, or what was wrong with it: int64 [B].

        A copy, because the next step may be launched before it is read.
        """
        return self._sampler.answers.clone()

    def _read_and_sample(self, counts: list[int], sampled: bool) -> None:
        """Sample an id for each row with a count; `sampled`: `_step.tokens` are the last ids."""
        pending = {length - read for length, read in zip(self._lengths, self._cache.lengths)}
        if pending == {1} and sampled and all(counts):
            self._stale = [True] * self.batch_size
            self._advance_by_one(counts, "forward and sample", self._read_and_choose)
            self._stale = [False] * self.batch_size
            return
        self._catch_up()
        self._place()
        if all(counts):
            self.works.run("sample", self._choose)
        else:
            self.works.run("sample for some rows", self._choose_for_some)

    @computes
    def rewind(self, n: int | Sequence[int]) -> None:
        """As the reference's."""
        self._sampled = False
        self._sampler.forget()
        super().rewind(n)

    @computes
    def copy_row(self, source: int, target: int, length: int) -> None:
        """As the reference's."""
        self._sampled = False
        self._sampler.forget()
        super().copy_row(source, target, length)

    @one_thread
    def restart_random(self, row: int) -> None:
        """As the reference's."""
        super().restart_random(row)
        self._sampler.restart(row)

    def _settle(self) -> None:
        if self._unsettled:
            self._sampled = False
            self._sampler.forget()
            self._sampler.settle(self._lengths)
        super()._settle()

    @computes
    def prefill(self, rows: Sequence[Sequence[int]]) -> None:
        """As the reference's."""
        self._sampled = False
        self._sampler.forget()
        super().prefill(rows)

    @computes
    def verify_rows(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """As the reference's."""
        self._sampled = False
        self._sampler.forget()
        return super().verify_rows(rows)

    @computes
    def score(self, row: int, ids: Sequence[int]) -> Tensor:
        """As the reference's, computed by the model itself."""
        self._sampled = False
        self._sampler.forget()
        return super().score(row, ids)

    def _forward(self, tokens: Tensor, counts: list[int]) -> Tensor:
        if tokens.shape[1] == 1:
            return self._read_one(tokens, counts)
        return self._read_chunk(tokens, counts)

    def _read_chunk(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """More than one token of some row: tokens [B, T] -> logits [B, V]."""
        if self._plain:
            return super()._forward(tokens, counts)
        if room := self._short_room(tokens.shape[1]):
            return self._read_short(tokens, counts, room, last_only=True)
        workspace = self._step.workspace
        if (b := only_row(counts)) is not None:
            row = self._cache.row(b)
            logits = read_chunk(self.model, tokens[b : b + 1], row, None, workspace)
            return logits.expand(self.batch_size, -1)
        return read_chunk(self.model, tokens, self._cache, counts, workspace)

    def _forward_all(self, tokens: Tensor, counts: list[int]) -> Tensor:
        if self._plain:
            return super()._forward_all(tokens, counts)
        T = tokens.shape[1]
        if room := self._short_room(T):
            return self._read_short(tokens, counts, room, last_only=False)[:, :T]
        workspace = self._step.workspace
        return read_chunk(self.model, tokens, self._cache, counts, workspace, last_only=False)

    def _short_room(self, T: int) -> int | None:
        """Tokens a row, pads included, of the graph that reads a chunk of T; None: there is none.

        Each length up to 16 tokens in all has a graph of its own; up to 64 there is one for about
        every 16 more.
        """
        step = max(MAX_BATCH // self.batch_size, 1)
        room = T if step >= T else -(-T // step) * step
        return room if self.batch_size * room <= MAX_ROWS else None

    def _read_short(self, tokens: Tensor, counts: list[int], room: int, last_only: bool) -> Tensor:
        """`read_chunk` for a short chunk, by the graph for `room` tokens a row.

        Its many launches would take longer than its work. All that a replay reads is on the device
        at a fixed address; the host checks and counts here.
        """
        # 1. Check, and copy the inputs to their addresses.
        B, T = tokens.shape
        growth = self._cache.grow(counts)
        fixed = self._short_tokens[: B * room].view(B, room)
        fixed.zero_()[:, :T] = tokens
        self._short_starts.copy_(torch.tensor(growth.starts), non_blocking=True)
        self._short_counts.copy_(torch.tensor(counts), non_blocking=True)
        name = f"chunk of {room}" + (", last logits" if last_only else "")

        # 2. Run or replay, and count.
        def work() -> None:
            self._short_logits[name] = run_chunk(
                self.model,
                fixed,
                self._cache,
                self._short_starts,
                self._short_counts,
                self._step.workspace,
                last_only,
            )

        self._cache.begin(growth)
        self.works.run(name, work)
        self._cache.commit(growth)
        return self._short_logits[name].clone()

    def _read_one(self, tokens: Tensor, counts: list[int]) -> Tensor:
        """One token of every row, or of some: tokens [B, 1] -> logits [B, V]."""
        self._step.tokens.copy_(tokens[:, 0])
        if min(counts) == 1:
            self._advance_by_one(counts, "forward", self._read_tokens)
        else:
            self._active.copy_(torch.tensor(counts), non_blocking=True)
            stale = self._stale
            self._stale = [True] * self.batch_size  # until the idle rows have their logits back
            self._advance_by_one(counts, "forward of some rows", self._read_some_tokens)
            self._stale = stale
        return self._step.logits

    def _read_tokens(self) -> None:
        self._step.run(self._positions)
        self._positions.add_(1)

    def _read_some_tokens(self) -> None:
        logits = self._step.logits
        before = logits.clone()
        reads = self._active > 0
        self._step.run(torch.where(reads, self._positions, -1))
        logits.copy_(torch.where(reads[:, None], logits, before))
        self._positions.add_(self._active)

    def _choose(self) -> None:
        self._sampler.run(self._step.wide_logits, self._step.tokens)
        self._history.scatter_(1, self._positions[:, None], self._step.tokens[:, None])

    def _choose_for_some(self) -> None:
        self._sampler.run(self._step.wide_logits, self._step.tokens)
        # An idle row has no new id; -1 is what its history holds there already.
        ids = self._step.tokens.masked_fill(self._sampler.answers == IDLE, -1)
        self._history.scatter_(1, self._positions[:, None], ids[:, None])

    def _read_and_choose(self) -> None:
        self._read_tokens()
        self._choose()

    def _place(self) -> None:
        """Bring the lengths of the cache's rows to the device, if they are not there."""
        lengths = self._cache.lengths
        if self._placed != lengths:
            self._positions.copy_(torch.tensor(lengths), non_blocking=True)
            self._placed = lengths

    def _keep_logits(self, counts: list[int], new: Tensor) -> None:
        """Take over the logits of the rows that have read something, at the fixed address."""
        kept = self._step.logits
        if new is not kept:
            read = torch.tensor(counts).to(new.device, non_blocking=True)[:, None] > 0  # [B, 1]
            kept.copy_(torch.where(read, new.float(), kept))
        self._stale = [stale and count == 0 for stale, count in zip(self._stale, counts)]

    def _advance_by_one(self, counts: list[int], name: str, work: Callable[[], object]) -> None:
        """Do work that reads one token of each row with a count, and moves `_positions`."""
        growth = self._cache.grow(counts)
        self._place()
        self._placed = None
        self._cache.begin(growth)
        self._step.keep_bits = not self.rows_together
        self.works.run(name if self.rows_together else f"{name}, same bits", work)
        self._cache.commit(growth)
        self._placed = growth.lengths

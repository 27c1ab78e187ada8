"""The fast engine: the reference decoder's methods, with CUDA graphs for a token and for short
chunks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mistral.cache import RollingCache
from mistral.engine.cuda_graph import Recorder
from mistral.engine.decoder import Decoder as ReferenceDecoder
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral_kernels.decode.matvec import MAX_BATCH
from mistral_kernels.decode.step import KERNELS, REFERENCES, DecodeStep
from mistral_kernels.packed.short_linear import MAX_ROWS
from mistral_kernels.portable import arch_for
from mistral_kernels.prefill.chunk import read_chunk
from mistral_kernels.sample.sampler import Sampler
from mistral_kernels.weights import unpacked_kinds


class Decoder(ReferenceDecoder):
    """`mistral.Decoder`, faster: same methods, same meaning, same errors.

    max_tokens, slack  as there
    graph              None: CUDA graphs on a GPU. False: the same launches one by one, for
                       debugging
    plain              run the kernels' plain-PyTorch twins instead: slow, on any device, to find
                       out who is wrong
    pdl                programmatic dependent launch (compute capability 9.0 to 11.x)

    What differs: logits are float32, since the kernels have them so. Random numbers are those of
    the sampling kernel, so the same seed gives other texts than the reference, of the same
    distribution. `ahead` says how many steps `generate` may start before it looks at the first
    one's ids; what was too much is taken back by `rewind`.

    The model's weights are regrouped: parameters become views of larger matrices, packed ones
    become planes. The model still works; packed, it is slower than before, since its layers put the
    blocks together again.

    Raises ValueError where the kernels cannot do the model or the batch.
    """

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
        super().__init__(model, batch_size, max_tokens, slack=slack)
        on_gpu = model.device.type == "cuda"
        if graph and (plain or not on_gpu):
            raise ValueError("a CUDA graph needs the kernels and a GPU")
        if pdl and on_gpu and arch_for(10 * torch.cuda.get_device_capability(model.device)[0]) < 90:
            raise ValueError(
                "these kernels launch dependently on GPUs of compute capability 9.0 to 11.x alone"
            )
        graph = on_gpu and not plain if graph is None else graph
        self._graphs: dict[str, Callable[[], None] | None] | None = {} if graph else None
        self._recorder = Recorder(model.device)
        self.ahead = min(2, slack)
        self._plain = plain
        with torch.inference_mode():
            self._step = DecodeStep(model, self._cache, REFERENCES if plain else KERNELS, pdl)
            self._sampler = Sampler(batch_size, model.config.vocab_size, model.device, plain)
            # Graphs know addresses, so it cannot grow; `_append` writes up to one chunk behind the
            # last real id.
            self._history = torch.full(
                (batch_size, 2 * self.limit), -1, device=model.device
            )  # [B, room]
            self._short_tokens = torch.zeros(MAX_ROWS, dtype=torch.int64, device=model.device)
            self._short_counts = torch.zeros(
                batch_size, dtype=torch.int64, device=model.device
            )  # [B]
        self.unrecorded: list[
            str
        ] = []  # what runs launch by launch, since its graph did not fit into memory
        self._short_logits: dict[
            str, Tensor
        ] = {}  # of each kind of short chunk, where its graph writes them
        self._logits = self._step.logits
        self._has_tokens = False  # whether `_step.tokens` are the ids that the cache reads next

    @property
    def unpacked_kinds(self) -> list[str]:
        """The kinds of packed matrices that no kernel multiplies: they are unpacked at every step,
        which is slow.
        """
        return unpacked_kinds(self._step.weights)

    @property
    def logits(self) -> Tensor:
        """[B, V] in float32: what the next step samples from. ValueError while a row is empty."""
        return super().logits.clone()

    @torch.inference_mode()
    def step(self, sampling: Sampling, mask: Tensor | None = None) -> Tensor:
        """As the reference's."""
        if not self._sampler.supports(sampling):
            self._has_tokens = False
            self._sampler.forget()
            return super().step(sampling, mask)
        lengths = self.lengths
        if 0 in lengths or max(lengths) >= self.limit:
            return super().step(sampling, mask)  # which says what is wrong
        self._sampler.prepare(sampling, mask, self._history)
        if set(self._behind) == {1} and self._has_tokens:
            self._run("forward and sample", lambda: (self._read_tokens(), self._choose()))
            self._count([1] * self.batch_size)
        else:
            self._catch_up()
            self._run("sample", self._choose)
        self._behind = [1] * self.batch_size
        self._has_tokens = True
        problems = self._sampler.problems
        return torch.where(problems < 0, problems, self._step.tokens)

    @torch.inference_mode()
    def rewind(self, n: int | Sequence[int]) -> None:
        """As the reference's. Taking back nothing brings the cache's tables up to date."""
        settle(self._cache)
        if n != 0:
            super().rewind(n)
        self._has_tokens = False
        self._sampler.forget()

    def start_over(self) -> None:
        """Be as a new decoder: without a token, and with random numbers that begin at the next
        step.
        """
        self.rewind(self.lengths)
        self._sampler.restart()

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """As the reference's."""
        super().read(rows)
        self._sampler.forget()

    @torch.inference_mode()
    def _catch_up(self) -> None:
        """Let the cache read what it lacks: one token a row by the decode step, more by the
        prefill.
        """
        while most := max(self._behind):
            counts = [min(b, self._chunk) for b in self._behind]
            if most == 1:
                self._read_one(counts)
            else:
                settle(self._cache)
                self._keep_logits(counts, self._prefill(self._next_tokens(max(counts)), counts))
            self._behind = [b - n for b, n in zip(self._behind, counts)]
            self._stale = [stale and n == 0 for stale, n in zip(self._stale, counts)]
            self._has_tokens = False

    def _prefill(self, tokens: Tensor, counts: list[int]) -> Tensor:
        if self._plain:
            return self.model(tokens, self._cache, counts, last_only=True)
        if room := self._short_room(tokens.shape[1]):
            return self._read_short(tokens, counts, room, last_only=True)
        return read_chunk(self.model, tokens, self._cache, counts, self._step.workspace)

    def _forward_all(self, tokens: Tensor) -> Tensor:
        if self._plain:
            return super()._forward_all(tokens)
        T = tokens.shape[1]
        if room := self._short_room(T):
            return self._read_short(tokens, [T] * self.batch_size, room, last_only=False)[:, :T]
        return read_chunk(
            self.model, tokens, self._cache, None, self._step.workspace, last_only=False
        )

    def _short_room(self, T: int) -> int | None:
        """How many tokens a row the graph reads that a chunk of T goes through, pads included;
        None: there is none.

        Each length up to 16 tokens in all has a graph of its own; up to 64 there is one for about
        every 16 more. While one is recorded the cache cannot look whether the pads of a nearly full
        row go too far.
        """
        step = max(MAX_BATCH // self.batch_size, 1)
        room, cache = (T if step >= T else -(-T // step) * step), self._cache
        fits = cache.wraps or max(cache.lengths_at_most) + room <= cache.num_slots
        return room if self.batch_size * room <= MAX_ROWS and fits else None

    def _read_short(self, tokens: Tensor, counts: list[int], room: int, last_only: bool) -> Tensor:
        """`read_chunk` for a short chunk, by the graph for `room` tokens a row: its launches are
        many for so little.

        All that a replay reads is on the device at a fixed address; what the host checks and counts
        is done here.
        """
        (B, T), cache = tokens.shape, self._cache
        fixed = self._short_tokens[: B * room].view(B, room)
        fixed.zero_()[:, :T] = tokens
        self._short_counts.copy_(torch.tensor(counts), non_blocking=True)
        name = f"chunk of {room}" + (", last logits" if last_only else "")
        ends = [length + n for length, n in zip(cache.lengths_at_most, counts)]
        ends, exact = (
            cache.check_room(ends, cache.lengths + self._short_counts, cache.exact),
            cache.exact,
        )
        peaks = [max(pair) for pair in zip(cache.peaks_at_most, ends)]

        def work() -> None:
            arguments = cache, self._short_counts, self._step.workspace, last_only
            self._short_logits[name] = read_chunk(self.model, fixed, *arguments)

        # What runs does not know the counts on the device and counts pads; what is replayed counts
        # nothing.
        lengths_before, peaks_before = cache.lengths_at_most, cache.peaks_at_most
        try:
            self._run(name, work)
        except BaseException:
            begun = cache.peaks_at_most is not peaks_before
            cache.lengths_at_most, cache.peaks_at_most = (
                lengths_before,
                peaks if begun else peaks_before,
            )
            cache.exact = exact
            raise
        cache.lengths_at_most, cache.peaks_at_most, cache.exact = ends, peaks, exact
        return self._short_logits[name].clone()

    def _read_one(self, counts: list[int]) -> None:
        """One token of every row, or of some."""
        lengths, step = self._cache.lengths, self._step
        if not self._has_tokens:
            step.tokens.copy_(self._history.gather(1, lengths[:, None])[:, 0].clamp(min=0))
        if min(counts) == 1:
            self._run("forward", self._read_tokens)
        else:
            reads = torch.tensor(counts).to(lengths.device, non_blocking=True)  # [B]
            before = step.logits.clone()
            step.run(torch.where(reads > 0, lengths, -1))
            lengths += reads
            self._keep_logits(counts, step.logits, before)
        self._count(counts)

    def _read_tokens(self) -> None:
        self._step.run(self._cache.lengths)
        self._cache.lengths.add_(1)

    def _choose(self) -> None:
        self._sampler.run(self._step.logits, self._step.tokens)
        self._history.scatter_(1, self._cache.lengths[:, None], self._step.tokens[:, None])

    def _keep_logits(self, counts: list[int], new: Tensor, before: Tensor | None = None) -> None:
        """Take over the rows that have read something."""
        read = torch.tensor(counts).to(new.device, non_blocking=True)[:, None] > 0  # [B, 1]
        self._step.logits.copy_(
            torch.where(read, new.float(), self._step.logits if before is None else before)
        )

    def _count(self, counts: list[int]) -> None:
        """What the kernels have written, on the host; `settle` does the rest when somebody asks."""
        cache = self._cache
        cache.lengths_at_most = [length + n for length, n in zip(cache.lengths_at_most, counts)]
        cache.peaks_at_most = [
            max(pair) for pair in zip(cache.peaks_at_most, cache.lengths_at_most)
        ]

    def _run(self, name: str, work: Callable[[], object]) -> None:
        """Do the work; by a CUDA graph from the second time on (the first compiles the kernels), if
        there is room.
        """
        if self._graphs is None:
            work()
        elif name not in self._graphs:
            work()
            self._graphs[name] = None
        else:
            if self._graphs[name] is None:
                try:
                    self._graphs[name] = self._recorded(work)
                except (
                    torch.OutOfMemoryError
                ):  # of the recording, which may come in the midst of a text
                    self._graphs[name] = work
                    self.unrecorded.append(name)
            self._graphs[name]()

    def _recorded(self, work: Callable[[], object]) -> Callable[[], None]:
        """The work as a graph. Nothing runs while it is recorded, so nothing counts either."""
        cache = self._cache
        counted = cache.lengths_at_most, cache.peaks_at_most, cache.exact
        try:
            return self._recorder.record(work).replay
        finally:
            cache.lengths_at_most, cache.peaks_at_most, cache.exact = counted


def settle(cache: RollingCache) -> None:
    """Bring a cache's tables up to date with what `lengths_at_most` and `peaks_at_most` say was
    read.

    Slot s holds the last position below the peak that is s modulo S; those that were taken back
    count as empty.
    """
    device, S = cache.lengths.device, cache.num_slots
    lengths = torch.tensor(cache.lengths_at_most).to(device, non_blocking=True)  # [B]
    peaks = torch.tensor(cache.peaks_at_most).to(device, non_blocking=True)
    last = peaks[:, None] - 1
    held = last - (last - torch.arange(S, device=device)) % S  # [B, S]
    empty = (held < 0) | (held >= lengths[:, None])
    cache.slot_positions[:, :S] = held.masked_fill(empty, -1)
    cache.lengths.copy_(lengths)
    cache.peaks.copy_(peaks)

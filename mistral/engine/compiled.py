"""An engine without hand-written kernels: the step of one token, compiled by torch.compile.

Prompts are read by the reference model; only the step of a single token a row is compiled. Compiled
code has fixed shapes, and three choices keep it small and the number of its variants bounded:

one block   One block is compiled and called for each layer with that layer's weights. Nothing but
            an addition could be fused across the border of two, and compiling the whole model would
            take as many times longer as it has layers.
few sizes   The reference attends to the slots in use, whose number grows by one a token. Here it is
            the ring, its half, its quarter ...: the smallest that holds what is in use, under a
            mask. So the block is compiled at most six times, each when a sequence first grows into
            a size, and attends to at most twice what is there.
one graph   On a GPU everything from the token to the logits is recorded as a CUDA graph, one for
            each size, so that some hundred kernels are launched at once. (Not yet run on a GPU.)

On a CPU the time of a step is the time to read the matrices, and which product reads them faster
depends on the processor: PyTorch's library, or a loop that the compiler writes for a product that
is spelled out as a sum (docs/benchmarks/README.md has one of each). So both are timed when a
decoder for one row is created, and the faster one is taken.
"""

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.cache import held_positions, window_mask
from mistral.engine.attached import addresses, refuse_attachments, refuse_hooks, refuse_moved
from mistral.engine.cuda_graph import Recorder
from mistral.engine.decoder import Decoder, computes
from mistral.engine.given import only_model
from mistral.model import Block, Mistral
from mistral.quantization.packed import Packed
from mistral.rms_norm import RMSNorm

_SMALLEST = 256  # halving never makes a size of fewer slots
_MOST_SIZES = 6
_TIMED_BYTES = 2**28  # of matrices to time on: more than a processor keeps in its caches
_NAME = "the compiled engine"
_REMEDY = "use the eager engine, mistral.Decoder"
NO_PACKED = f"packed weights cannot be compiled: {_REMEDY}, or load the checkpoint unpacked"


class CompiledDecoder(Decoder):
    """`Decoder` with a compiled step: the same methods and errors, the same logits up to rounding.

    sums  whether the compiler writes the matrix products, as loops that read the matrices once a
          row. None: if that is faster, for one row on a CPU. The choice changes rounding, and so,
          at a near-tie, the text.

    The compiler runs when the decoder is created, for a few seconds (what it compiled before is
    found again), and when a sequence grows into the next size. Raises ValueError for packed
    weights, for forward hooks, which compiled code leaves out, and if the compiler is missing or
    fails.
    """

    backend: str | Callable = "inductor"  # of torch.compile

    def __init__(
        self,
        model: Mistral,
        batch_size: int = 1,
        max_tokens: int | None = None,
        *,
        slack: int = 16,
        sums: bool | None = None,
    ):
        model = only_model(model)
        if any(isinstance(module, Packed) for module in model.modules()):
            raise ValueError(NO_PACKED)
        refuse_hooks(model, _NAME)
        super().__init__(model, batch_size, max_tokens, slack=slack)
        self._sizes = _sizes(self._cache.num_slots)
        self._compiled: set[int] = set()  # the sizes whose step has run
        self._graphs: dict[int, _Graph] = {}  # on a GPU, by size
        self._recorder = Recorder(model.device)
        self._addresses = addresses(model)  # graphs refer to them
        # By reading, not measured: this lets the GPU's compiler write matrix-vector products itself
        # and tune them.
        options = {"coordinate_descent_tuning": True} if model.device.type == "cuda" else None
        how = dict(fullgraph=True, dynamic=False, backend=self.backend, options=options)
        with torch.inference_mode():
            if sums is None and self.backend == "inductor":
                one_row = batch_size == 1 and model.device.type == "cpu"
                sums = one_row and _sums_are_faster(model)
            if sums:
                how |= dict(backend=_compile_sums, options=None)
            self._run_block = torch.compile(_run_block, **how)
            self._run_head = torch.compile(_run_head, **how)
            # What a step reads besides the token; a CUDA graph needs it at a fixed address.
            # For the first compilation the rows hold one token.
            self._lengths_and_peaks = torch.ones(
                2, batch_size, 1, dtype=torch.int64, device=model.device
            )
            self._lengths_and_peaks[0] = 0
            self._prepare(self._sizes[0])

    def _forward(self, tokens: Tensor, counts: list[int]) -> Tensor:
        if tokens.shape[1] > 1 or min(counts) == 0:
            return super()._forward(tokens, counts)
        cache = self._cache
        growth = cache.grow(counts)
        cache.begin(growth)
        state = torch.tensor([growth.starts, growth.peaks])[:, :, None]
        self._lengths_and_peaks.copy_(state, non_blocking=True)
        used = max(growth.peaks)
        size = next((size for size in self._sizes if size >= used), self._sizes[-1])
        if size not in self._compiled:
            self._prepare(size)
        logits = self._run_step(tokens, size)
        cache.commit(growth)
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self._graphs)] = {}  # graphs hold addresses: the copy records its own
        memo[id(self._recorder)] = Recorder(self.model.device)
        if self._graphs:
            memo[id(self._compiled)] = set()
        return super().__deepcopy__(memo)

    def __getstate__(self) -> None:
        raise TypeError("a compiled decoder cannot be pickled; a mistral.Decoder can")

    def _check_attached(self) -> None:
        if self._graphs:  # they would replay what was attached when they were recorded
            refuse_attachments(self.model, _NAME)
            refuse_moved(self.model, self._addresses)
        refuse_hooks(self.model, _NAME)

    def _run_step(self, tokens: Tensor, size: int) -> Tensor:
        """`_one_token`, by its graph if there is one."""
        if size not in self._graphs:
            return self._one_token(tokens, size)
        recorded = self._graphs[size]
        recorded.tokens.copy_(tokens)
        recorded.graph.replay()
        return recorded.logits.clone()

    def _one_token(self, tokens: Tensor, size: int) -> Tensor:
        """`Mistral.forward` for tokens [B, 1], attending to the first `size` slots: logits [B, V].

        It reads where the rows are from `_lengths_and_peaks`, and changes only keys and values.
        """
        cache = self._cache
        trunk = self.model.model
        positions, peaks = self._lengths_and_peaks  # [B, 1] each: of the new tokens; after them
        held = held_positions(positions + 1, peaks, cache.num_slots)  # [B, S]
        mask = window_mask(positions, held[:, :size], cache.window)  # [B, 1, 1, size]
        rows = torch.arange(self.batch_size, device=tokens.device)[:, None]
        slots = positions % cache.num_slots  # [B, 1]
        x = trunk.embed_tokens(tokens)  # [B, 1, D]
        cos, sin = trunk.rotary(positions, x.dtype)
        for block, keys, values in zip(trunk.layers, cache.keys, cache.values):
            x = self._run_block(block, x, cos, sin, mask, keys, values, rows, slots)
        return self._run_head(trunk.norm, self.model.lm_head, x)

    @computes
    def _prepare(self, size: int) -> None:
        """Compile the step for this many slots, and on a GPU record it.

        The step that runs for it writes keys into the slot of the next token, which that token
        overwrites.
        """
        tokens = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=self.model.device)
        try:
            # Decoders of several models and batch sizes share the functions below; the default
            # limit of 8 variants is too low for them.
            with torch._dynamo.config.patch(recompile_limit=256):
                self._one_token(tokens, size)
        except (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
        ) as error:
            needs = "Triton" if tokens.is_cuda else "a C++ compiler (g++ or clang)"
            raise ValueError(
                f"torch.compile failed: {_reason(error)}; it needs {needs}. Or {_REMEDY}"
            ) from error
        self._compiled.add(size)
        if tokens.is_cuda:
            made: list[Tensor] = []
            graph = self._recorder.record(lambda: made.append(self._one_token(tokens, size)))
            self._graphs[size] = _Graph(graph, tokens, made[0])


class _Graph(NamedTuple):
    """A step as a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # [B, 1]: what it reads
    logits: Tensor  # [B, V]: what it writes


def _sizes(num_slots: int) -> list[int]:
    """How many slots the compiled steps attend to, ascending: the ring, its half, its quarter ...

    4112 -> [257, 514, 1028, 2056, 4112]
    """
    found = [num_slots]
    while len(found) < _MOST_SIZES and found[0] > 2 * _SMALLEST - 1:
        found.insert(0, (found[0] + 1) // 2)
    return found


def _run_block(  # noqa: PLR0913
    block: Block,
    x: Tensor,  # [B, 1, D]
    cos: Tensor,  # [B, 1, 1, H]
    sin: Tensor,
    mask: Tensor,  # [B, 1, 1, slots to attend to]
    keys: Tensor,  # [B, K, S + 1, H]
    values: Tensor,
    rows: Tensor,  # [B, 1]
    slots: Tensor,  # [B, 1]: where the new key goes
) -> Tensor:  # [B, 1, D]
    """One layer for one token: the reference's own block. This is what is compiled."""
    return block(x, (cos, sin), mask, _Ring(keys, values, rows, slots, mask.shape[-1]))


def _run_head(norm: RMSNorm, matrix: nn.Module, x: Tensor) -> Tensor:
    """[B, 1, D] -> logits [B, V]."""
    return matrix(norm(x))[:, -1]


def _compile_sums(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
    """A backend of torch.compile: inductor, given every matrix product as a sum.

    So it writes the loops itself.
    """
    _spell_out(graph)
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def _spell_out(graph: torch.fx.GraphModule) -> None:
    """Make every matrix product in it a sum; one with a bias stays."""
    for node in graph.graph.nodes:
        if node.target is F.linear and not any(node.args[2:]) and not node.kwargs:
            node.target = _summed
    graph.recompile()


def _summed(x: Tensor, weight: Tensor, bias: None = None) -> Tensor:
    """x W^T, spelled out: [..., in] and [out, in] -> [..., out]."""
    return (x[..., None, :] * weight).sum(dim=-1)


def _sums_are_faster(model: Mistral) -> bool:
    """Whether the compiler's products read matrices faster than PyTorch's: the best of three turns.

    The gates' matrices are timed, for all. Below a difference of 10%, which may be noise, PyTorch's
    products are taken. False without a compiler: `_prepare` raises the error.
    """
    matrices = [layer.mlp.gate_proj.weight for layer in model.model.layers]  # [F, D]
    read = accumulate(matrix.nbytes for matrix in matrices)
    few = [matrix for matrix, so_far in zip(matrices, read) if so_far <= _TIMED_BYTES]
    matrices = few or matrices[:1]
    x = matrices[0].new_zeros(1, 1, matrices[0].shape[1])
    seconds = {F.linear: [], torch.compile(_summed, dynamic=False): []}
    try:
        with torch._dynamo.config.patch(recompile_limit=256):  # a variant for every size of matrix
            for _ in range(4):  # the first turn compiles
                for product, taken in seconds.items():
                    start = time.perf_counter()
                    for matrix in matrices:
                        product(x, matrix)
                    taken.append(time.perf_counter() - start)
    except torch._dynamo.exc.TorchDynamoException:
        return False
    theirs, ours = (min(taken[1:]) for taken in seconds.values())
    return ours < 0.9 * theirs


class _Ring:
    """`LayerCache` for one token, of nothing but tensors and a size, as compiled code needs it."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, used: int):
        self.keys = keys
        self.values = values
        self.rows = rows
        self.slots = slots
        self.used = used

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.slots] = k.transpose(1, 2)  # indexed: [B, 1, K, H]
        self.values[self.rows, :, self.slots] = v.transpose(1, 2)
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]


def _reason(error: Exception) -> str:
    """The first line of what the compiler says, without the advice for PyTorch's developers."""
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return (lines or [type(inner).__name__])[0].rstrip(".:")[:200]

"""An engine without hand-written kernels: the step that reads one token, compiled by torch.compile.

Prompts are read by the reference model; only the step of a single token a row is compiled. Compiled
code has fixed shapes, and three choices keep it small and its number bounded:

one block   One block is compiled and called for each layer with that layer's weights. Nothing but
            an addition could be fused across the border of two, and compiling the whole model would
            take as many times longer as it has layers.
few sizes   The reference attends to the slots in use, and their number grows by one a token. Here
            it is the ring, its half, its quarter ...: the smallest that holds what is in use, under
            a mask. So the block is compiled at most six times, each when a text first grows into a
            size, and attends to at most twice what is there.
one graph   On a GPU everything from the token to the logits is recorded as a CUDA graph, one for
            each size, so that some hundred kernels are started at once. (Not yet run on a GPU.)

On a CPU a step is the time that it takes to read the matrices, and who reads them faster depends on
the processor: PyTorch's library, or a loop that the compiler writes where a product is spelled out
as a sum (docs/benchmarks/README.md has one of each). So both are timed when a decoder for one row
is made, and the faster one is taken.
"""

import time
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.cache import RollingCache, window_mask
from mistral.engine.cuda_graph import Recorder
from mistral.engine.decoder import Decoder
from mistral.model import Block, Mistral
from mistral.quantization.packed import Packed
from mistral.rms_norm import RMSNorm

SMALLEST = 256  # halving makes no size of fewer slots
MOST_SIZES = 6
TIMED_BYTES = 2**28  # of matrices to time on: more than a processor keeps in its caches
REMEDY = "use the eager engine, mistral.Decoder (--engine eager)"


class CompiledDecoder(Decoder):
    """`Decoder` with a compiled step: the same methods, arguments and errors, and the same numbers
    up to rounding.

    sums  whether the compiler writes the matrix products: what it writes reads the matrices once a
          row. None: if that is faster, for one row on a CPU. The choice is a matter of rounding,
          and so, at a near-tie, of the text.

    The compiler runs when the decoder is made, for a few seconds (what it made before is found
    again), and when a text grows into the next size. Raises ValueError for packed weights, and
    where the compiler is missing or fails.
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
        if any(isinstance(module, Packed) for module in model.modules()):
            raise ValueError(
                f"packed weights cannot be compiled: {REMEDY}, or load the checkpoint unpacked"
            )
        super().__init__(model, batch_size, max_tokens, slack=slack)
        self._sizes = sizes(self._cache.num_slots)
        self._steps: dict[int, Callable[[Tensor], Tensor]] = {}
        self._recorder = Recorder(model.device)
        # By reading, not measured: this lets the GPU's compiler make matrix-vector products itself
        # and tune them.
        options = {"coordinate_descent_tuning": True} if model.device.type == "cuda" else None
        how = dict(fullgraph=True, dynamic=False, backend=self.backend, options=options)
        with torch.inference_mode():
            if sums is None and self.backend == "inductor":
                sums = batch_size == 1 and model.device.type == "cpu" and sums_are_faster(model)
            if sums:
                how |= dict(backend=compile_sums, options=None)
            self._run_block, self._run_head = (
                torch.compile(run_block, **how),
                torch.compile(run_head, **how),
            )
            self._prepare(self._sizes[0])

    def _forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > 1:
            return super()._forward(tokens)
        used = max(self._cache.peaks_at_most + [n + 1 for n in self._cache.lengths_at_most])
        size = next((size for size in self._sizes if size >= used), self._sizes[-1])
        if size not in self._steps:
            self._prepare(size)
        return self._steps[size](tokens)

    def _one_token(self, tokens: Tensor, size: int) -> Tensor:
        """What `Mistral.forward` does for tokens [B, 1], attending to the first `size` slots:
        logits [B, V].
        """
        cache, trunk = self._cache, self.model.model
        plan = cache.plan(1)
        mask = window_mask(
            plan.positions, plan.slot_positions[:, :size], cache.window
        )  # [B, 1, 1, size]
        cache.begin(plan)
        x = trunk.embed_tokens(tokens)  # [B, 1, D]
        cos, sin = trunk.rotary(plan.positions, x.dtype)
        for block, keys, values in zip(trunk.layers, cache.keys, cache.values):
            x = self._run_block(block, x, cos, sin, mask, keys, values, plan.rows, plan.slots)
        logits = self._run_head(trunk.norm, self.model.lm_head, x)
        cache.commit(plan)
        return logits

    def _prepare(self, size: int) -> None:
        """Compile the step for so many slots, and on a GPU record it. The cache is as before then.

        The step that runs for it writes keys into the slot that the next token takes anyway. If the
        compiler fails, it is a forward that was broken off.
        """
        before = _State(self._cache)
        tokens = torch.zeros(self.batch_size, 1, dtype=torch.int64, device=self.model.device)
        try:
            # Decoders of several models and batch sizes share the functions below, and 8 variants
            # are few for them.
            with torch._dynamo.config.patch(recompile_limit=256):
                self._one_token(tokens, size)
        except (
            torch._dynamo.exc.TorchDynamoException,
            torch._dynamo.exc.FailOnRecompileLimitHit,
        ) as error:
            needs = "Triton" if tokens.is_cuda else "a C++ compiler (g++ or clang)"
            raise ValueError(
                f"torch.compile failed: {_reason(error)}; it needs {needs}. Or {REMEDY}"
            ) from error
        before.restore()
        self._steps[size] = lambda tokens: self._one_token(tokens, size)
        if tokens.is_cuda:
            self._steps[size] = self._record(tokens, size, before)

    def _record(self, tokens: Tensor, size: int, before: "_State") -> Callable[[Tensor], Tensor]:
        """The compiled step as a CUDA graph: `tokens` is where it reads."""
        cache, made = self._cache, []
        graph = self._recorder.record(lambda: made.append(self._one_token(tokens, size)))
        before.restore()  # recording runs nothing on the device, but the host has counted

        def replay(new: Tensor) -> Tensor:
            tokens.copy_(new)
            graph.replay()
            cache.lengths_at_most = [n + 1 for n in cache.lengths_at_most]
            cache.peaks_at_most = [
                max(pair) for pair in zip(cache.peaks_at_most, cache.lengths_at_most)
            ]
            return made[0].clone()

        return replay


def sizes(num_slots: int) -> list[int]:
    """How many slots the compiled steps attend to, ascending: the ring, and its halves while they
    are worth it.

    4113 -> [258, 515, 1029, 2057, 4113]
    """
    found = [num_slots]
    while len(found) < MOST_SIZES and found[0] > 2 * SMALLEST - 1:
        found.insert(0, (found[0] + 1) // 2)
    return found


def run_block(
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


def run_head(norm: RMSNorm, matrix: nn.Module, x: Tensor) -> Tensor:
    """[B, 1, D] -> logits [B, V]."""
    return matrix(norm(x))[:, -1]


def compile_sums(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
    """A backend of torch.compile: its own, given every matrix product as a sum, so that it writes
    the loop itself.
    """
    spell_out(graph)
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def spell_out(graph: torch.fx.GraphModule) -> None:
    """Make every matrix product in it a sum; one with a bias stays."""
    for node in graph.graph.nodes:
        if node.target is F.linear and not any(node.args[2:]) and not node.kwargs:
            node.target = summed
    graph.recompile()


def summed(x: Tensor, weight: Tensor, bias: None = None) -> Tensor:
    """x W^T, spelled out: [..., in] and [out, in] -> [..., out]."""
    return (x[..., None, :] * weight).sum(dim=-1)


def sums_are_faster(model: Mistral) -> bool:
    """Whether the compiler's products read matrices faster than PyTorch's, by the best of a few
    turns.

    Those of the gates are timed, and stand for all. Near 1 the difference is noise; PyTorch's are
    taken then. False where there is no compiler: who needs it will say.
    """
    matrices = [layer.mlp.gate_proj.weight for layer in model.model.layers]  # [F, D]
    read = accumulate(matrix.nbytes for matrix in matrices)
    matrices = [
        matrix for matrix, so_far in zip(matrices, read) if so_far <= TIMED_BYTES
    ] or matrices[:1]
    x = matrices[0].new_zeros(1, 1, matrices[0].shape[1])
    seconds = {F.linear: [], torch.compile(summed, dynamic=False): []}
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
    """`LayerCache` for one token, made of nothing but tensors, on which compiled code can be told
    apart.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor, used: int):
        self.keys, self.values, self.rows, self.slots, self.used = keys, values, rows, slots, used

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.slots] = k.transpose(1, 2)  # indexed: [B, 1, K, H]
        self.values[self.rows, :, self.slots] = v.transpose(1, 2)
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]


class _State:
    """Which tokens a cache holds, to go back to."""

    def __init__(self, cache: RollingCache):
        self.cache = cache
        self.tensors = [
            tensor.clone() for tensor in (cache.lengths, cache.peaks, cache.slot_positions)
        ]
        self.on_host = (
            cache.lengths_at_most,
            cache.peaks_at_most,
            cache.exact,
        )  # the lists are replaced, never changed

    def restore(self) -> None:
        cache = self.cache
        for tensor, before in zip((cache.lengths, cache.peaks, cache.slot_positions), self.tensors):
            tensor.copy_(before)
        cache.lengths_at_most, cache.peaks_at_most, cache.exact = self.on_host


def _reason(error: Exception) -> str:
    """The first line of what the compiler says, without the advice for PyTorch's developers."""
    inner = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return (lines or [type(inner).__name__])[0].rstrip(".:")[:200]

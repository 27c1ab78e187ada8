"""Looking inside a running model, by forward hooks on its modules.

    with Recorder(model) as trace:
        new = list(mistral.generate(model, ids, mistral.Sampling(temperature=0), max_new_tokens=16))
    trace.residual()     # the hidden states before and after each block
    trace.attention(3)   # which token attends to which in layer 3
    trace.steps[-1]      # what the last forward pass read, and which cache slots it wrote

    with Stopwatch(model) as watch: ...
    watch.steps[0]       # seconds of each module in the first forward pass

The model's files do not know about this, and every hook is removed when the block ends. Both need
a forward pass that calls the model's modules: `Decoder` and the model itself do, a compiled step
and fused kernels do not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mistral.attention import Attention, attend_explicit
from mistral.cache import RollingCache, window_mask
from mistral.config import Config
from mistral.files import format_bytes
from mistral.model import Mistral
from mistral.rotary import rotate

_ATTENTION_LIMIT = 2**29  # bytes of recorded weights: 512 tokens of a 7B (32 layers, 32 heads)
_LENS_ROWS = 512  # hidden states that the logit lens turns into logits at a time


class Write(NamedTuple):
    """One slot of the cache that a forward pass wrote."""

    slot: int
    position: int  # that the slot holds now
    evicted: int  # position that it held before; -1: it was empty


@dataclass
class Step:
    """One forward pass over T tokens at positions start .. start + T - 1.

    slots           the position that each slot holds after the pass, -1: empty; [] without a cache
    writes          the slots that the pass wrote
    residual        layers + 1 of [T, D]: the embedding, then the output of each block
    attention       [N, T, start + T] for each layer, float16: a weight for every key
    attention_norm  [T] for each layer, float32: the norm of the attention's output
    mlp_norm        [T] for each layer, float32: the norm of the MLP's output
    keys            [1, K, T, H] for each layer, rotated

    The tensors are on the CPU; the keys are on the model's device.
    """

    start: int
    tokens: list[int]
    slots: list[int] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    residual: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    attention_norm: list[Tensor] = field(default_factory=list)
    mlp_norm: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


class Recorder:
    """Records one sequence from its first token, in any number of forward passes.

    A context manager. Fused attention kernels do not return their weights, so these are computed a
    second time, from the input of each attention module and with its own projections.

    Host memory: 2 bytes * layers * N * T^2 for the weights, at most _ATTENTION_LIMIT, and
    (layers + 1) * T * D elements of the model's dtype for the hidden states. For 512 tokens of a 7B
    in bfloat16 that is 537 MB and 138 MB. The model's device holds the sequence's keys, 34 MB, and
    the weights of one layer at a time, 100 MB.

    A forward pass under it raises ValueError for more than one row, for padding, for a sequence
    that does not continue the previous pass (a rewind, a second sequence), and for one longer than
    `most_tokens`.
    """

    def __init__(self, model: Mistral):
        self.model = model
        self.config = model.config
        self.steps: list[Step] = []
        self._step = Step(0, [])  # the running pass; appended to `steps` only when it completes
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Recorder":
        trunk = self.model.model
        self._hooks = [
            trunk.register_forward_pre_hook(self._begin),
            trunk.embed_tokens.register_forward_hook(self._keep_residual),
            trunk.register_forward_hook(self._end),
        ]
        for index, layer in enumerate(trunk.layers):
            self._hooks += [
                layer.self_attn.register_forward_hook(partial(self._keep_attention, index)),
                layer.mlp.register_forward_hook(self._keep_mlp),
                layer.register_forward_hook(self._keep_residual),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def tokens(self) -> list[int]:
        """Every token that was read."""
        return [token for step in self.steps for token in step.tokens]

    def residual(self) -> Tensor:
        """Hidden states [layers + 1, T, D] in the model's dtype, on the CPU.

        The first is the embedding, the others are the outputs of the blocks.
        """
        by_layer = zip(*(step.residual for step in self.steps))
        return torch.stack([torch.cat(parts) for parts in by_layer])

    def attention(self, layer: int) -> Tensor:
        """Weights [N, T, T], float16: from each token (second axis) to each key (third axis)."""
        T = self.steps[-1].end
        weights = torch.zeros(self.config.num_attention_heads, T, T, dtype=torch.float16)
        for step in self.steps:
            weights[:, step.start : step.end, : step.end] = step.attention[layer]
        return weights

    def added_norms(self) -> tuple[Tensor, Tensor]:
        """Euclidean norms of the outputs of attention and MLP, float32 [layers, T] each."""
        attention = zip(*(step.attention_norm for step in self.steps))
        mlp = zip(*(step.mlp_norm for step in self.steps))
        return (
            torch.stack([torch.cat(parts) for parts in attention]),
            torch.stack([torch.cat(parts) for parts in mlp]),
        )

    def _begin(self, _: nn.Module, args: tuple[Tensor, RollingCache | None, object]) -> None:
        """Check that the pass continues the sequence, and begin a step."""
        tokens, cache, lengths = args
        expected = self.steps[-1].end if self.steps else 0
        start = 0 if cache is None else cache.lengths[0]
        end = start + tokens.shape[1]
        most = most_tokens(self.config)
        if tokens.shape[0] != 1 or lengths is not None:
            raise ValueError(
                f"a recorder follows one row without padding, not {tokens.shape[0]} rows"
            )
        if start != expected:
            raise ValueError(
                f"a recorder follows one sequence from its beginning: it has read {expected} "
                f"tokens, and this forward pass begins at position {start}; use a new recorder "
                "(and a new cache) for another sequence"
            )
        if end > most:
            raise ValueError(
                f"the attention weights of {end} tokens are more than "
                f"{format_bytes(_ATTENTION_LIMIT)}; "
                f"at most {most} tokens of this model can be recorded"
            )
        self._step = Step(start, tokens[0].tolist())

    def _end(
        self, _: nn.Module, args: tuple[Tensor, RollingCache | None, object], __: Tensor
    ) -> None:
        """Record the slots, and keep the step."""
        step = self._step
        cache = args[1]
        if cache is not None:
            step.slots = cache.slot_positions[0].tolist()
            before = self.steps[-1].slots if self.steps else [-1] * len(step.slots)
            for slot, (new, old) in enumerate(zip(step.slots, before)):
                if new != old:
                    step.writes.append(Write(slot, position=new, evicted=old))
        self.steps.append(step)

    def _keep_residual(self, _: nn.Module, __: tuple, output: Tensor) -> None:
        self._step.residual.append(output[0].detach().cpu())

    def _keep_mlp(self, _: nn.Module, __: tuple, output: Tensor) -> None:
        self._step.mlp_norm.append(_row_norms(output))

    @torch.no_grad()
    def _keep_attention(self, index: int, module: Attention, args: tuple, output: Tensor) -> None:
        x, rotary = args[:2]  # x [1, T, D]
        step = self._step
        # 1. The new queries and keys, and the keys of earlier passes.
        q = rotate(_heads(module.q_proj, x, module.head_dim), *rotary)  # [1, N, T, H]
        k = rotate(_heads(module.k_proj, x, module.head_dim), *rotary)  # [1, K, T, H]
        step.keys.append(k)
        k = torch.cat([*(earlier.keys[index] for earlier in self.steps), k], dim=2)
        # 2. The weights, under the window's mask.
        positions = torch.arange(step.end, device=x.device)[None]  # [1, keys]
        mask = window_mask(positions[:, step.start :], positions, self.config.sliding_window)
        step.attention.append(_attention_weights(q, k, mask)[0].to(torch.float16).cpu())
        # 3. The norm of the output.
        step.attention_norm.append(_row_norms(output))


def _heads(projection: nn.Module, x: Tensor, head_dim: int) -> Tensor:
    """Queries or keys, before their rotation: x [1, T, D] -> [1, heads, T, H]."""
    # `forward`, not a call: hooks of others, a stopwatch for example, must not see this product.
    return projection.forward(x).view(1, x.shape[1], -1, head_dim).transpose(1, 2)


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)): [B, N, T, keys].

    q [B, N, T, H], k [B, K, keys, H], mask [B, 1, T, keys]. With the identity matrix as values, the
    output of attention is its weights.
    """
    B, K, keys, _ = k.shape
    identity = torch.eye(keys, dtype=q.dtype, device=q.device).expand(B, K, keys, keys)
    return attend_explicit(q, k, identity, mask)


def _row_norms(x: Tensor) -> Tensor:
    """Euclidean norms of x [1, T, D], in float32 on the CPU: [T]."""
    return x[0].detach().float().norm(dim=-1).cpu()


def most_tokens(config: Config) -> int:
    """The longest sequence that `Recorder` takes.

    Its weights [layers, N, T, T], of 2 bytes each, fill _ATTENTION_LIMIT.
    """
    bytes_of_pair = 2 * config.num_hidden_layers * config.num_attention_heads
    return int((_ATTENTION_LIMIT / bytes_of_pair) ** 0.5)


class Lens(NamedTuple):
    """What each layer would predict if the model ended there.

    The last entry of the first axis is the model's own prediction.
    """

    ids: Tensor  # int64 [layers + 1, T, top]: the most probable next tokens
    probabilities: Tensor  # float32 [layers + 1, T, top]
    following: Tensor  # float32 [layers + 1, T]: of the token that came next; 0 at the last T


@torch.inference_mode()
def logit_lens(model: Mistral, trace: Recorder, top: int) -> Lens:
    """The logit lens: final norm and output matrix, applied to the hidden states of every layer.

    Probabilities are of temperature 1. It takes _LENS_ROWS hidden states at a time, 200 MB for a
    vocabulary of 32,000.
    Source: nostalgebraist, interpreting GPT: the logit lens, 2020,
    https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens
    """
    residual = trace.residual()  # [layers + 1, T, D]
    states, T, _ = residual.shape
    next_ids = torch.tensor([*trace.tokens[1:], 0]).repeat(states)
    ids = []
    probabilities = []
    following = []
    for x, came in zip(residual.flatten(0, 1).split(_LENS_ROWS), next_ids.split(_LENS_ROWS)):
        logits = model.lm_head(model.model.norm(x.to(model.device)))  # [_LENS_ROWS, V]
        p = logits.float().softmax(dim=-1)
        best = p.topk(top)
        ids.append(best.indices.cpu())
        probabilities.append(best.values.cpu())
        following.append(p.gather(1, came[:, None].to(p.device))[:, 0].cpu())
    of_next = torch.cat(following).view(states, T)
    of_next[:, -1] = 0  # no token came after the last one
    return Lens(
        ids=torch.cat(ids).view(states, T, top),
        probabilities=torch.cat(probabilities).view(states, T, top),
        following=of_next,
    )


class Stopwatch:
    """Measures the time of every module in every forward pass; a context manager.

    steps   one dict for each forward pass: seconds by the module's name, "" for the whole model. A
            module's time includes the modules inside it.

    On a CUDA device the time is between events in the GPU's stream, and includes waiting for the
    host. A hook costs some microseconds, which dominate the time of a small module: compare
    modules with it, and measure speed with scripts/benchmark.py.
    """

    def __init__(self, model: Mistral):
        self.model = model
        self.steps: list[dict[str, float]] = []
        self._cuda = model.device.type == "cuda"
        self._began: dict[str, float | torch.cuda.Event] = {}
        self._ended: dict[str, float | torch.cuda.Event] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "Stopwatch":
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._note(self._began, name)))
            self._hooks.append(module.register_forward_hook(self._note(self._ended, name)))
        self._hooks.append(self.model.register_forward_hook(self._finish))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, times: dict, name: str) -> Callable[..., None]:
        """A hook that stores the time under the module's name."""

        def note(*_: object) -> None:
            times[name] = self._now()

        return note

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.model.device))
        return event

    def _finish(self, *_: object) -> None:
        """Append the seconds of a complete forward pass to `steps`."""
        if self._cuda:
            torch.cuda.synchronize(self.model.device)
        seconds = {}
        for name, end in self._ended.items():
            began = self._began[name]
            seconds[name] = began.elapsed_time(end) / 1000 if self._cuda else end - began
        self.steps.append(seconds)

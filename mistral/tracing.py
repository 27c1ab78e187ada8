"""Looking inside a running model, from outside: forward hooks see what every module reads and
returns.

    with Recorder(model) as trace:
        new = list(mistral.generate(model, ids, mistral.Sampling(temperature=0), max_new_tokens=16))
    trace.residual()     # the hidden states before and behind each block
    trace.attention(3)   # who looked at whom in layer 3
    trace.steps[-1]      # what the last forward read, and which slots of the cache it wrote

    with Stopwatch(model) as watch: ...
    watch.steps[0]       # seconds of each module in the first forward

The model's files know nothing of this, and nothing of it stays behind when the block ends. Both
need a forward that calls the model's modules: `Decoder` and the model itself do, a compiled step
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
from mistral.engine.memory import format_bytes
from mistral.model import Mistral
from mistral.rotary import rotate

ATTENTION_LIMIT = (
    2**29
)  # bytes of recorded weights: 512 tokens of a 7B, whose 32 layers have 32 heads each


class Write(NamedTuple):
    """One slot of the cache that a forward wrote."""

    slot: int
    position: int  # what it holds now
    evicted: int  # the position that it held before; -1: it was empty


@dataclass
class Step:
    """One forward of T tokens at positions start .. start + T - 1.

    Tensors of the layers are in their order.
    """

    start: int
    tokens: list[int]
    # The position that each slot holds after this forward, -1: empty. Without a cache there are no
    # slots.
    slots: list[int] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    residual: list[Tensor] = field(
        default_factory=list
    )  # layers + 1 of [T, D]: the embedding, then behind each block
    attention: list[Tensor] = field(
        default_factory=list
    )  # [N, T, start + T] each, float16: a weight for every key
    attention_norm: list[Tensor] = field(
        default_factory=list
    )  # [T] each, float32: length of what attention added
    mlp_norm: list[Tensor] = field(default_factory=list)  # [T] each, float32: of what the MLP added
    keys: list[Tensor] = field(
        default_factory=list
    )  # [1, K, T, H] each, rotated, on the model's device

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.tokens)


class Recorder:
    """Records one text, from its first token on, in as many forwards as it takes; a context
    manager.

    Attention weights are worked out a second time from what each attention module reads, with its
    own projections: the fused kernels that run do not tell them. The weights take 2 bytes * layers
    * N * T^2 of the host's memory, at most ATTENTION_LIMIT; hidden states take (layers + 1) * T * D
    numbers of the model's dtype. For 512 tokens of a 7B in bfloat16 that is 537 MB and 138 MB. Its
    device holds the keys of the text, 34 MB, and works on the weights of one layer at a time, 100
    MB.

    A forward under it raises ValueError for more rows than one, for padding, for a text that does
    not go on where the one before it ended (a rewind, a second text), and for one longer than
    `most_tokens`.
    """

    def __init__(self, model: Mistral):
        self.model, self.config = model, model.config
        self.steps: list[Step] = []
        self._step = Step(
            0, []
        )  # the forward that is under way; one that breaks off never becomes one of the steps
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
        """Hidden states [layers + 1, T, D] in the model's dtype on the CPU: the embedding, then
        behind each block.
        """
        return torch.stack(
            [torch.cat(parts) for parts in zip(*(step.residual for step in self.steps))]
        )

    def attention(self, layer: int) -> Tensor:
        """Weights [N, T, T], float16: how much each token (second axis) looks at each (third)."""
        T = self.steps[-1].end
        weights = torch.zeros(self.config.num_attention_heads, T, T, dtype=torch.float16)
        for step in self.steps:
            weights[:, step.start : step.end, : step.end] = step.attention[layer]
        return weights

    def added_norms(self) -> tuple[Tensor, Tensor]:
        """Euclidean norms of what attention and the MLP of each layer added, [layers, T] each."""
        attention = [
            torch.cat(parts) for parts in zip(*(step.attention_norm for step in self.steps))
        ]
        mlp = [torch.cat(parts) for parts in zip(*(step.mlp_norm for step in self.steps))]
        return torch.stack(attention), torch.stack(mlp)

    def _begin(self, _: nn.Module, args: tuple[Tensor, RollingCache | None, object]) -> None:
        tokens, cache, lengths = args
        here = self.steps[-1].end if self.steps else 0
        start = 0 if cache is None else cache.lengths_at_most[0]
        if tokens.shape[0] != 1 or lengths is not None:
            raise ValueError(
                f"a recorder follows one row without padding, not {tokens.shape[0]} rows"
            )
        if start != here:
            raise ValueError(
                f"a recorder follows one text from its beginning: it has seen {here} tokens, and "
                f"this forward begins "
                f"behind {start}; take a new recorder (and a new cache) for another text"
            )
        if (end := start + tokens.shape[1]) > (most := most_tokens(self.config)):
            raise ValueError(
                f"the attention weights of {end} tokens are more than "
                f"{format_bytes(ATTENTION_LIMIT)}; "
                f"at most {most} tokens of this model can be recorded"
            )
        self._step = Step(start, tokens[0].tolist())

    def _end(
        self, _: nn.Module, args: tuple[Tensor, RollingCache | None, object], __: Tensor
    ) -> None:
        step, cache = self._step, args[1]
        if cache is not None:
            step.slots = cache.slot_positions[0, : cache.num_slots].tolist()
            before = self.steps[-1].slots if self.steps else [-1] * len(step.slots)
            slots = enumerate(zip(step.slots, before))
            step.writes = [Write(slot, new, old) for slot, (new, old) in slots if new != old]
        self.steps.append(step)

    def _keep_residual(self, _: nn.Module, __: tuple, output: Tensor) -> None:
        self._step.residual.append(output[0].detach().cpu())

    def _keep_mlp(self, _: nn.Module, __: tuple, output: Tensor) -> None:
        self._step.mlp_norm.append(row_norms(output))

    @torch.no_grad()
    def _keep_attention(self, index: int, module: Attention, args: tuple, output: Tensor) -> None:
        x, rotary = args[:2]  # [1, T, D]
        step, T = self._step, x.shape[1]
        # `forward` and not a call: other hooks, those of a stopwatch for example, must not see
        # this.
        q = rotate(
            module.q_proj.forward(x).view(1, T, -1, module.head_dim).transpose(1, 2), *rotary
        )  # [1, N, T, H]
        k = rotate(
            module.k_proj.forward(x).view(1, T, -1, module.head_dim).transpose(1, 2), *rotary
        )  # [1, K, T, H]
        step.keys.append(k)
        k = torch.cat(
            [earlier.keys[index] for earlier in self.steps] + [k], dim=2
        )  # [1, K, keys, H]
        positions = torch.arange(step.end, device=x.device)[None]
        mask = window_mask(positions[:, step.start :], positions, self.config.sliding_window)
        step.attention.append(attention_weights(q, k, mask)[0].to(torch.float16).cpu())
        step.attention_norm.append(row_norms(output))


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(H)): q [B, N, T, H], k [B, K, keys, H], mask [B, 1, T, keys] -> [B, N,
    T, keys].

    With the identity matrix as values, the output of attention is its weights.
    """
    B, K, keys, _ = k.shape
    identity = torch.eye(keys, dtype=q.dtype, device=q.device).expand(B, K, keys, keys)
    return attend_explicit(q, k, identity, mask)


def row_norms(x: Tensor) -> Tensor:
    """Euclidean norms of x [1, T, D], in float32 on the CPU: [T]."""
    return x[0].detach().float().norm(dim=-1).cpu()


def most_tokens(config: Config) -> int:
    """How long a text `Recorder` takes: its weights [layers, N, T, T] of 2 bytes fill
    ATTENTION_LIMIT then.
    """
    return int(
        (ATTENTION_LIMIT / (2 * config.num_hidden_layers * config.num_attention_heads)) ** 0.5
    )


class Lens(NamedTuple):
    """What each layer would predict, if the model ended there.

    The last is what the model does predict.
    """

    ids: Tensor  # int64 [layers + 1, T, top]: the most probable next tokens
    probabilities: Tensor  # float32 [layers + 1, T, top]
    # float32 [layers + 1, T]: probability of the token that did come next; the last T: 0
    following: Tensor


@torch.inference_mode()
def logit_lens(model: Mistral, trace: Recorder, top: int) -> Lens:
    """The logit lens: the final norm and the output matrix, applied to the hidden states behind
    every block.

    Probabilities are of temperature 1. It takes 512 rows at a time, 200 MB for a vocabulary of
    32,000.
    Source: nostalgebraist, interpreting GPT: the logit lens, 2020,
    https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens
    """
    residual = trace.residual()  # [layers + 1, T, D]
    layers, T, _ = residual.shape
    next_ids = torch.tensor([*trace.tokens[1:], 0]).repeat(layers)
    ids, probabilities, following = [], [], []
    for x, came in zip(residual.flatten(0, 1).split(512), next_ids.split(512)):
        logits = model.lm_head(model.model.norm(x.to(model.device)))  # [512, V]
        p = logits.float().softmax(dim=-1)
        best = p.topk(top)
        ids.append(best.indices.cpu())
        probabilities.append(best.values.cpu())
        following.append(p.gather(1, came[:, None].to(p.device))[:, 0].cpu())
    after = torch.cat(following).view(layers, T)
    after[:, -1] = 0
    return Lens(
        torch.cat(ids).view(layers, T, top), torch.cat(probabilities).view(layers, T, top), after
    )


class Stopwatch:
    """Takes the time of every module, in every forward; a context manager.

    steps   one dict a forward: seconds by the module's name, "" for the whole model. A module's
            time holds that of the modules inside it.

    On a CUDA device the time is the GPU's own, between events in its stream, waiting for the host
    included. A hook costs some microseconds, which show where a module takes no longer: compare
    modules, and measure speed with scripts/benchmark.py.
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
        if self._cuda:
            torch.cuda.synchronize(self.model.device)
            seconds = {
                name: self._began[name].elapsed_time(end) / 1000
                for name, end in self._ended.items()
            }
        else:
            seconds = {name: end - self._began[name] for name, end in self._ended.items()}
        self.steps.append(seconds)

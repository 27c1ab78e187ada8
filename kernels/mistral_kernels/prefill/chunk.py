"""Reading a prompt: PyTorch's matrix products, with attention that knows the window and the ring.

A chunk of hundreds of tokens is bound by arithmetic, so the matrices go through cuBLAS. PyTorch has
no fast attention over a ring and a chunk with a window: `attend_chunk` computes it (`attend_short`
for a few tokens). Rotation, ring and SwiGLU have a kernel each (pointwise.py).

Q, K and V take one product, and gate and up another: the model's parameters are views of a tensor
that holds the rows of all (weights.py). The kernels take the columns of a product as they are. A
layer to which something is attached, or whose weight was replaced, has a product of its own.

Packed matrices are unpacked one after the other into the same memory (see dequantize.py), so that
none stays. Those that this memory holds together share a product: Q, K and V of a 7B. Gate and up
would need 117 MB more, and save little, because each fills the GPU alone. Up to 64 rows, such as a
guess that is read along with the last token, are bound by memory like a decode step, and multiply
packed matrices as they are: short_linear.py, and Q, K and V, or gate and up, in one launch:
joint_linear.py.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mistral.cache import RollingCache, slots_of, token_counts
from mistral.config import Config
from mistral.engine.attached import is_plain_linear
from mistral.mlp import MLP
from mistral.model import Block, Mistral
from mistral.quantization.packed import Packed, TiedOutput
from mistral.rms_norm import RMSNorm
from mistral_kernels.decode.attention import Partials
from mistral_kernels.decode.matvec import MAX_ROWS
from mistral_kernels.packed.dequantize import Workspace
from mistral_kernels.packed.joint_linear import is_joint, joint_linear
from mistral_kernels.packed.planes import Planes
from mistral_kernels.packed.short_linear import scale_rows, short_linear
from mistral_kernels.prefill.attention import attend_chunk
from mistral_kernels.prefill.pointwise import rotate_chunk, store_chunk, swiglu
from mistral_kernels.prefill.short_attention import MAX_QUERIES, attend_short
from mistral_kernels.weights import already_stacked, matrix_of


@torch.inference_mode()
def read_chunk(
    model: Mistral,
    tokens: Tensor,
    cache: RollingCache,
    lengths: Sequence[int] | None = None,
    workspace: Workspace | None = None,
    last_only: bool = True,
) -> Tensor:
    """`model(tokens, cache, lengths, last_only)`, faster on a GPU: its logits, and the same cache.

    tokens     int64 [B, T]; a chunk may be longer than the window
    lengths    how many of a row's T tokens are real; None: all
    workspace  required for a packed model
    last_only  logits [B, V] of each row's last real position, instead of [B, T, V]

    Raises ValueError if the cache has no room, for head sizes that the kernel cannot do, and for a
    packed model without a workspace.
    """
    counts = token_counts(lengths, *tokens.shape)
    growth = cache.grow(counts)
    starts_and_counts = torch.tensor([growth.starts, counts])
    starts, real = starts_and_counts.to(tokens.device, non_blocking=True)  # [B] each
    cache.begin(growth)
    logits = run_chunk(model, tokens, cache, starts, real, workspace, last_only)
    cache.commit(growth)  # an error before this line leaves the chunk unread
    return logits


@torch.inference_mode()
def run_chunk(
    model: Mistral,
    tokens: Tensor,
    cache: RollingCache,
    starts: Tensor,
    real: Tensor,
    workspace: Workspace | None,
    last_only: bool,
) -> Tensor:
    """The work of `read_chunk` on the device. It counts nothing, so a CUDA graph can hold it.

    starts  int64 [B]: the rows' lengths before the chunk
    real    int64 [B]: how many of a row's T tokens are real
    """
    B, T = tokens.shape
    ends = (starts + real)[:, None]  # [B, 1]
    positions = starts[:, None] + torch.arange(T, device=starts.device)  # [B, T]
    slots = slots_of(positions, ends, cache.num_slots)  # [B, T]
    x = _embedded(model.model.embed_tokens, tokens, workspace)  # [B, T, D]
    angles = _angles(model, positions)
    attend = _attention_over(cache, starts, real, model.config, T)
    for block, keys, values in zip(model.model.layers, cache.keys, cache.values):
        x = x + _attention(block, x, angles, keys, values, slots, attend, workspace)
        x = x + _mlp(block.mlp, _normalised(block.post_attention_layernorm, x), workspace)
    if last_only:
        last = (real - 1).clamp(min=0)  # [B]
        x = x[torch.arange(B, device=x.device), last]  # [B, D]
    return _linear(_normalised(model.model.norm, x), workspace, model.lm_head)[0]


def _attention(
    block: Block,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    attend: Callable[..., None],
    workspace: Workspace | None,
) -> Tensor:  # [B, T, D] -> [B, T, D]
    """One block's attention; after it, and not before, the new keys go into the ring."""
    B, T, _ = x.shape
    attention = block.self_attn
    x = _normalised(block.input_layernorm, x)
    q, k, v = (
        heads.view(B, T, -1, attention.head_dim)  # [B, T, N, H] and twice [B, T, K, H]
        for heads in _linear(x, workspace, attention.q_proj, attention.k_proj, attention.v_proj)
    )
    rotate_chunk(q, k, *angles)
    y = q.new_empty(q.shape)
    attend(q, k, v, keys, values, y)
    store_chunk(k, v, slots, keys, values)
    return _linear(y.view(B, T, -1), workspace, attention.o_proj)[0]


def _attention_over(
    cache: RollingCache, starts: Tensor, real: Tensor, config: Config, T: int
) -> Callable[..., None]:
    """The attention of a chunk over ring and chunk: (q, k, v, keys, values, y), for every layer."""
    N = config.num_attention_heads
    K = config.num_key_value_heads
    H = config.head_dim
    kernel = attend_chunk
    # In float32 the queries of heads of 256, and their keys, would not fit into the shared memory
    # of small GPUs.
    if T * N // K <= MAX_QUERIES and H * cache.keys.dtype.itemsize <= 512:
        partials = Partials(len(starts), N, K, H, starts.device, tokens=T)
        kernel = partial(attend_short, partials=partials)

    def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, y: Tensor) -> None:
        kernel(q, k, v, keys, values, starts, real, y, cache.num_slots, cache.window)

    return attend


def _mlp(mlp: MLP, x: Tensor, workspace: Workspace | None) -> Tensor:  # [B, T, D] -> [B, T, D]
    gate, up = _linear(x, workspace, mlp.gate_proj, mlp.up_proj)  # [B, T, F] each
    swiglu(gate, up)
    return _linear(gate, workspace, mlp.down_proj)[0]


def _angles(
    model: Mistral, positions: Tensor
) -> tuple[Tensor, Tensor]:  # [B, T] -> fp32 [B, T, H/2] each
    """Cosines and sines; the model's own come twice, once for each number of a pair."""
    cos, sin = (
        part.chunk(2, dim=-1)[0] for part in model.model.rotary(positions, torch.float32)
    )  # [B, 1, T, H/2]
    return cos[:, 0].contiguous(), sin[:, 0].contiguous()


def _linear(x: Tensor, workspace: Workspace | None, *modules: nn.Module) -> Sequence[Tensor]:
    """`module(x)` of each: [..., in] -> [..., out]; they may be columns of one product."""
    rows = x.flatten(0, -2)
    weight = _together(len(rows), workspace, modules) if len(modules) > 1 else None
    if weight is not None:
        sizes = [matrix_of(module).shape[0] for module in modules]
        return F.linear(x, weight).split(sizes, dim=-1)
    if len(rows) <= MAX_ROWS and (matrices := _joint(modules)):
        sizes = [matrix.rows for matrix in matrices]
        y = x.new_empty(len(rows), sum(sizes))
        joint_linear(*scale_rows(rows), matrices, y)
        return y.view(*x.shape[:-1], -1).split(sizes, dim=-1)
    results = []
    scaled = None
    for module in modules:
        if not isinstance(module, (Packed, TiedOutput)):
            results.append(module(x))
        elif isinstance(matrix := matrix_of(module), Planes) and len(rows) <= MAX_ROWS:
            scaled = scaled or scale_rows(rows)
            y = x.new_empty(len(rows), matrix.rows)
            short_linear(*scaled, matrix, y)
            results.append(y.view(*x.shape[:-1], -1))
        else:
            results.append(_required(workspace).linear(x, matrix))
    return results


def _joint(modules: Sequence[nn.Module]) -> list[Planes] | None:
    """The matrices of some layers, if one launch multiplies them as they are."""
    if not all(isinstance(module, Packed) for module in modules):
        return None
    matrices = [matrix_of(module) for module in modules]
    return matrices if is_joint(matrices) else None


def _together(
    rows: int, workspace: Workspace | None, modules: Sequence[nn.Module]
) -> Tensor | None:
    """The matrices of some layers as one, if one product of `rows` rows can take their place."""
    if all(map(is_plain_linear, modules)):
        return already_stacked(modules)
    if not all(isinstance(module, Packed) for module in modules) or workspace is None:
        return None
    matrices = [matrix_of(module) for module in modules]
    is_short = rows <= MAX_ROWS and any(isinstance(matrix, Planes) for matrix in matrices)
    return workspace.fill(matrices) if workspace.holds(matrices) and not is_short else None


def _embedded(
    module: nn.Module, tokens: Tensor, workspace: Workspace | None
) -> Tensor:  # [B, T] -> [B, T, D]
    """`module(tokens)`."""
    if isinstance(module, Packed) and isinstance(table := matrix_of(module), Planes):
        return _required(workspace).rows(table, tokens)
    return module(tokens)


def _required(workspace: Workspace | None) -> Workspace:
    if workspace is None:
        raise ValueError("a packed model is read with a workspace to unpack its matrices into")
    return workspace


def _normalised(norm: RMSNorm, x: Tensor) -> Tensor:
    """`norm(x)` in one kernel instead of six."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

"""A trial run of a new decoder: it does all of its work twice, and its logits are compared.

A kernel that the driver refuses, a CUDA graph that cannot be recorded and wrong logits on this very
GPU show here, while another engine can still be chosen, and not in the middle of a text.
"""

import math

import torch
from torch import Tensor

from mistral import Mistral, Sampling
from mistral_kernels.decode.matvec import MAX_BATCH, MAX_ROWS
from mistral_kernels.decoder import Decoder

TOKENS = MAX_ROWS + 4
# Relative to the logits' norm. A fault in a kernel makes logits that have nothing to do with the
# model's: 1.4. Rounding in bfloat16 is about 0.01 in a trained model, and 0.1 in one of random
# weights, whose layers amplify every difference.
_LARGEST_DISTANCE = 0.5


class WrongLogits(ValueError):
    """The decoder computes, but not what the model computes."""


@torch.inference_mode()
def expected_logits(model: Mistral) -> Tensor:
    """The model's own logits after each of a few ids: float32 [TOKENS, V]."""
    ids = torch.tensor([_ids(model.config.vocab_size)], device=model.device)  # [1, TOKENS]
    return model(ids)[0].float()


@torch.inference_mode()
def try_out(decoder: Decoder, expected: Tensor) -> float:
    """Let a new decoder do everything twice, compare it with `expected_logits`, and reset it.

    Returns the largest distance of its logits from the expected ones, relative to their norm; 0 if
    there is room for no comparison, NaN if the model's own logits are not finite.

    A decoder with little room does as much as fits. Raises WrongLogits if the logits are not the
    model's, OutOfMemoryError if a CUDA graph does not fit; any other error is raised as it is.
    """
    rows = decoder.batch_size
    # Packed matrices have one kernel for up to 8 rows in all, one for 16 in a pass, and are
    # unpacked for more than 64. Attention has one for a few tokens, in two sizes, and one whose
    # tiles are larger beyond 64 tokens.
    per_row = (MAX_BATCH // rows, MAX_ROWS // rows, MAX_ROWS // rows + 1)
    distances = [0.0]
    for _ in range(2):  # the first time compiles the kernels, the second records the CUDA graphs
        for T in sorted({2, *per_row, MAX_ROWS + 1}):
            if 1 < T <= decoder.limit - 5:
                distances += _do_everything(decoder, T, expected)
    if decoder.works.unrecorded:
        raise torch.OutOfMemoryError(
            f"no memory for the CUDA graph of {decoder.works.unrecorded[0]}"
        )
    decoder.rewind(decoder.lengths)
    # `max` ignores a NaN that is not the first.
    return max(distances) if all(map(math.isfinite, distances)) else math.nan


def _do_everything(decoder: Decoder, T: int, expected: Tensor) -> list[float]:
    """Three chunks, of which the first has T tokens, and two steps.

    Returns the distance of each chunk's logits. Raises WrongLogits if one is too large.
    """
    ids = _ids(expected.shape[-1])
    decoder.rewind(decoder.lengths)
    # 1. A chunk, a single token, which runs the kernels of a step, and a chunk that reads the ring.
    distances = []
    for chunk in (ids[:T], ids[T : T + 1], ids[T + 1 : T + 3]):
        decoder.prefill([chunk] * decoder.batch_size)
        distances.append(_distance(decoder.logits, expected[decoder.lengths[0] - 1]))
    # 2. The graphs of a step. The seed keeps PyTorch's generator as it is.
    greedy = Sampling(temperature=0.0, seed=0)
    decoder.step(greedy)  # samples only
    decoder.step(greedy)  # reads and samples
    decoder.logits.sum().item()  # reads only; synchronizes, so that errors of the GPU show here
    return distances


def _distance(logits: Tensor, wanted: Tensor) -> float:
    """How far logits [B, V] are from the wanted [V]; WrongLogits if it is too far."""
    distance = ((logits - wanted).norm(dim=-1).max() / wanted.norm()).item()
    # Not `distance > ...`: NaN is too far as well.
    if wanted.isfinite().all() and not distance <= _LARGEST_DISTANCE:
        raise WrongLogits(f"their logits are {distance:.0%} away from the model's own")
    return distance


def _ids(vocab_size: int) -> list[int]:
    """A few ids, all different if the vocabulary allows it."""
    return [(3 + 11 * i) % vocab_size for i in range(TOKENS)]

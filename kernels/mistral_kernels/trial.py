"""A trial of a new decoder: all that it will do, done twice, and its numbers beside the model's
own.

What a driver refuses, a CUDA graph that cannot be recorded and numbers that are wrong on this very
GPU show here, where another engine can still be taken, and not in the middle of a text.
"""

import torch
from torch import Tensor

from mistral import Mistral, Sampling
from mistral_kernels.decode.matvec import MAX_BATCH
from mistral_kernels.decoder import Decoder
from mistral_kernels.packed.short_linear import MAX_ROWS

TOKENS = MAX_ROWS + 4
# Of the logits' norm. Rounding in bfloat16 makes about a hundredth, a fault in a kernel more than
# the whole.
LARGEST_DISTANCE = 0.1


@torch.inference_mode()
def expected_logits(model: Mistral) -> Tensor:  # fp32 [TOKENS, V]
    """The model's own, for a few ids."""
    return model(torch.tensor([_ids(model.config.vocab_size)], device=model.device))[0].float()


@torch.inference_mode()
def try_out(decoder: Decoder, expected: Tensor) -> None:
    """Let a new decoder do everything twice, compare it with `expected_logits`, and make it forget
    it all.

    The first time compiles the kernels, the second records the CUDA graphs. A decoder with little
    room does what it has room for. ValueError where the logits are not the model's,
    OutOfMemoryError where a graph does not fit; whatever else fails is raised as it is.
    """
    rows, room, ids = decoder.batch_size, decoder.limit, _ids(expected.shape[-1])
    rules = Sampling(
        temperature=0.0, seed=0
    )  # without a seed it would draw one from PyTorch's generator
    for _ in range(2):
        # Packed matrices have one kernel for up to 8 rows in all, one for 16 in a pass, and are
        # unpacked for over 64. Attention has one for a few tokens in two sizes, and one that takes
        # more queries at a time beyond 64 tokens.
        for T in sorted(
            {2, MAX_BATCH // rows, MAX_ROWS // rows, MAX_ROWS // rows + 1, MAX_ROWS + 1}
        ):
            if 1 < T <= room - 5:
                decoder.rewind(decoder.lengths)
                # The second is read as any token is that was chosen, the third sees the ring.
                for chunk in (ids[:T], ids[T : T + 1], ids[T + 1 : T + 3]):
                    decoder.read([chunk] * rows)
                    _compare(decoder.logits, expected[decoder.lengths[0] - 1])
                decoder.step(rules)  # samples alone
                decoder.step(rules)  # reads and samples
                decoder.logits.sum().item()  # reads alone; and waits: only then has everything run
    if decoder.unrecorded:
        raise torch.OutOfMemoryError(f"no memory for the CUDA graph of {decoder.unrecorded[0]}")
    decoder.start_over()


def _compare(logits: Tensor, wanted: Tensor) -> None:  # [B, V], [V]
    distance = ((logits - wanted).norm(dim=-1).max() / wanted.norm()).item()
    if wanted.isfinite().all() and not distance <= LARGEST_DISTANCE:  # NaN, too
        raise ValueError(f"their logits are {distance:.0%} away from the model's own")


def _ids(vocab_size: int) -> list[int]:
    """Some ids, all different where the vocabulary allows it."""
    return [(3 + 11 * i) % vocab_size for i in range(TOKENS)]

"""Run by test_captures.py in a process of its own: what the decoder asks of a GPU that is not there.

Prints a line of JSON for each model: what must not happen while a CUDA graph is recorded, and what
a second round compiles that the first did not.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
sys.path.append(str(Path(__file__).parents[2] / "tests"))
import small
from benchmark_parts import pretended_gpu
from test_packed_decoder import MIXES, packed_model

import mistral
from mistral.engine.cuda_graph import Recorder
from mistral_kernels.decoder import Decoder
from mistral_kernels.portable import Launch
from mistral_kernels.prefill.pointwise import swiglu_kernel

warnings.simplefilter("ignore")  # PyTorch's own, about fake tensors
form = sys.argv[1]
recording = pretended_gpu.install(compiles=form == "full")

SIZES = dict(
    hidden_size=96, intermediate_size=160, head_dim=16, num_hidden_layers=2, sliding_window=7
)
DENSE = [(torch.bfloat16, 1, False), (torch.bfloat16, 3, True), (torch.float32, 1, False)]
GREEDY = mistral.Sampling(temperature=0)
DRAWN = mistral.Sampling(temperature=1.0, top_k=5, repetition_penalty=1.1, seed=3)


def use(decoder):
    """Everything that has a graph, twice: the second time records it. Then once more."""
    B = decoder.batch_size
    for T in (3, 3, 20, 20, 70, 1, 1):
        decoder.prefill([[3 + i % 90 for i in range(T)]] * B)
        for sampling in (GREEDY, DRAWN, GREEDY):
            decoder.step(sampling)
        if B > 1:
            decoder.step([GREEDY] * (B - 1) + [None])
        decoder.logits.sum().item()


def use_many_rows(decoder):
    """`use` for 17 rows, whose step has kernels of its own; then with the same bits."""
    for decoder.rows_together in (True, False):
        for T in (1, 1, 2, 2):
            decoder.prefill([[3 + i for i in range(T)]] * decoder.batch_size)
            decoder.step(GREEDY)
            decoder.step([GREEDY] * (decoder.batch_size - 1) + [None])
            decoder.logits.sum().item()


def report(label, decoder, use=use):
    before = len(recording.graphs)
    use(decoder)
    known = set(recording.variants)
    use(decoder)
    facts = dict(label=label, faults=recording.faults, graphs=recording.graphs[before:])
    new = sorted(name for name, _ in set(recording.variants) - known)
    print(json.dumps(facts | {"new_in_second_round": new, "kernels": len(known)}), flush=True)
    recording.faults = []


def provoke():
    """The faults of work that no graph may hold."""
    device = torch.device("cuda")
    x = torch.zeros(4, device=device)
    swiglu = Launch((1,), dict(F=16, BLOCK=16), dict(num_warps=1))
    faulty = {
        "a copy to the device": lambda: x.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])),
        "a new tensor": lambda: torch.tensor([1.0], device=device),
        "a copy to the host": lambda: x.to("cpu", non_blocking=True),
        "a read": lambda: x.sum().item(),
        "a condition": lambda: 1 if x.sum() > 0 else 0,
        "a list": lambda: x.tolist(),
        "a synchronization": lambda: torch.cuda.synchronize(),
        "a compilation": lambda: swiglu.run(swiglu_kernel, x, x, 16, 16),
        "nothing": lambda: x.add_(1),
    }
    for name, work in faulty.items():
        Recorder(device).record(work)
        print(json.dumps(dict(label=name, provoked=recording.faults)), flush=True)
        recording.faults = []


def main():
    for dtype, batch, pdl in DENSE[1:2] if form == "short" else DENSE:
        model = small.model(dtype, **SIZES).to("cuda")
        report(f"{dtype}, batch {batch}", Decoder(model, batch, pdl=pdl))
    for name in ["Q4_K_M"] if form == "short" else MIXES:
        model = packed_model(MIXES[name], torch.bfloat16).to("cuda")
        report(name, Decoder(model, 1, pdl=True))
    many = {"plain, batch 17": small.model(torch.bfloat16, **SIZES)}
    if form == "full":
        many |= {f"{name}, batch 17": packed_model(MIXES[name], torch.bfloat16) for name in MIXES}
    for label, model in many.items():
        report(label, Decoder(model.to("cuda"), 17), use_many_rows)
    provoke()


main()

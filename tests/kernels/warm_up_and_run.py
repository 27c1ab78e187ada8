"""Run by test_warm_up.py in a process of its own, on a GPU that is not there.

Plans what to compile ahead, then runs the engines, and prints what they launch beyond the plan.
"""

import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from benchmark_parts import pretended_gpu, sizes, warm_up
from benchmark_parts.contestants import Ours
from benchmark_parts.sizes import Case

warnings.simplefilter("ignore")  # PyTorch's own, about fake tensors
CASES = (Case(1, 300, 6, chunk=3), Case(3, 20, 6))
sizes.SIZES["wide"] = sizes.SIZES["tiny"] | dict(
    hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=9
)


def main():
    device = torch.device("cuda", 0)
    recording = pretended_gpu.install(compiles=False)
    for format in sys.argv[1:]:
        planned = sizes.make_model("wide", device, torch.bfloat16, format, layers=8)
        warm_up.plan(planned, CASES, [False, True])
        known = set(recording.variants)
        model = sizes.make_model("wide", device, torch.bfloat16, format)
        for case in CASES:
            prompts = torch.zeros(case.batch, case.context, dtype=torch.int64, device=device)
            for name in ("kernels", "kernels-pdl"):
                contestant = Ours(name, model, case, prompts)
                for _ in range(2):
                    contestant.prefill()
                    contestant.generate(case.tokens)
                if case.batch == 1:
                    contestant.score([5] * 3)
        new = sorted(name for name, _ in set(recording.variants) - known)
        print(json.dumps(dict(format=format, planned=len(known), new=new)), flush=True)


main()

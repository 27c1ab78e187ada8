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

from mistral_kernels import engines, open_engine, trial

# That process would have no GPU, not even one that is not there.
engines.problem_apart = lambda model, batch_size: None
warnings.simplefilter("ignore")  # PyTorch's own, about fake tensors
CASES = (Case(1, 300, 6, chunk=3), Case(3, 20, 6), Case(17, 4, 2))
sizes.SIZES["wide"] = sizes.SIZES["tiny"] | dict(
    hidden_size=256, intermediate_size=512, head_dim=64
)


def main():
    device = torch.device("cuda", 0)
    recording = pretended_gpu.install(compiles=False)
    for argument in sys.argv[1:]:
        # The plan is made with fewer layers than the model has. The short form has both types of a
        # mixture in few layers.
        format, planned_layers = ("Q4_K_M", 3) if argument == "short" else (argument, 8)
        planned = sizes.make_model("wide", device, torch.bfloat16, format, layers=planned_layers)
        warm_up.plan(planned, CASES, [False, True])
        known = set(recording.variants)
        model = sizes.make_model("wide", device, torch.bfloat16, format, layers=planned_layers + 1)
        for case in CASES:
            prompts = torch.zeros(case.batch, case.context, dtype=torch.int64, device=device)
            for name in ("kernels", "kernels-pdl", "auto") if case.batch <= 16 else ("kernels",):
                contestant = Ours(name, model, case, prompts)
                for _ in range(2):
                    contestant.prefill()
                    contestant.generate(case.tokens)
                if case.batch == 1:
                    contestant.score([5] * 3)
        opened = {}
        for passes in (True, False):
            before = len(recording.launches)
            opened[str(passes)] = open_auto(model, passes)
            early = sum(early for _, early in recording.launches[before:])
            opened[str(passes)] |= dict(launched_early=early)
        new = sorted(name for name, _ in set(recording.variants) - known)
        facts = dict(format=format, planned=len(known), new=new, auto=opened)
        print(json.dumps(facts), flush=True)


def open_auto(model, passes):
    """The line of `auto`, and whether its steps are launched early."""
    real = trial.try_out

    def try_out(decoder, expected):
        if decoder._step._early and not passes:
            raise trial.WrongLogits("140% away")
        return real(decoder, expected)

    trial.try_out = try_out
    decoder, line = open_engine("auto", model, 1, 400)
    trial.try_out = real
    return dict(line=line, early=bool(decoder._step._early))


main()

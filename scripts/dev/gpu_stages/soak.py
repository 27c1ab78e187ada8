"""Thousands of steps by CUDA graphs beside the same steps launch by launch: the same bits.

A race shows as a difference; a kernel that does not reset its counters shows at the end.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py, benchmark_parts/

import common
import torch
from benchmark_parts import sizes
from benchmark_parts.contestants import GREEDY

from mistral_kernels.decoder import Decoder

_PROMPT = list(range(3, 40))
_EVERY = 100  # steps between two comparisons


def main() -> int:
    parser = common.parser(__doc__, "python scripts/dev/gpu_stages/soak.py --steps 2000")
    parser.add_argument("--formats", nargs="+", default=["plain", "Q4_K_M"])
    parser.add_argument("--size", default="7b", choices=sizes.SIZES)
    parser.add_argument("--steps", type=int, default=2000, help="default: 2000")
    args = parser.parse_args()
    failed = 0
    # Dependent launches last: an error of theirs may leave this process without the GPU.
    for pdl, format in itertools.product((False, True), args.formats):
        device = torch.device("cuda", 0)
        line = {"format": format, "dependent": pdl, "steps": args.steps}
        try:
            model = sizes.make_model(args.size, device, torch.bfloat16, format, layers=2)
            line |= compare(model, args.steps, pdl)
        except Exception as error:  # of Triton, its compiler or the driver
            line["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        common.show_json(line)
        failed += not (line.get("same_bits") and line.get("counters_are_zero"))
    return 1 if failed else 0


def compare(model: torch.nn.Module, steps: int, pdl: bool) -> dict[str, bool | int]:
    """Both decoders in turns, and whether their logits and ids ever differ."""
    room = len(_PROMPT) + steps + 2
    by_graph = Decoder(model, 1, room, pdl=pdl)
    one_by_one = Decoder(model, 1, room, graph=False)
    for decoder in (by_graph, one_by_one):
        decoder.prefill([_PROMPT])
    done = 0
    while done < steps:
        count = min(_EVERY, steps - done)
        ids = []
        for decoder in (by_graph, one_by_one):
            ids.append(torch.stack([decoder.step(GREEDY) for _ in range(count)]))
        done += count
        same = torch.equal(*ids) and torch.equal(by_graph.logits, one_by_one.logits)
        if not same:
            return {"same_bits": False, "differ_within": done, "counters_are_zero": zero(by_graph)}
    return {"same_bits": True, "counters_are_zero": zero(by_graph) and zero(one_by_one)}


def zero(decoder: Decoder) -> bool:
    """Whether attention has left its counters as it needs them next time."""
    counters = decoder._step._partials.counters  # from inside: no user sees them
    return torch.equal(counters, torch.zeros_like(counters))


if __name__ == "__main__":
    common.run(main)

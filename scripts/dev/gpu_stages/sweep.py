"""Time the launch shapes of each kernel of a decode step: one line of JSON a variant, at once.

The launches of one step of a 7B of one layer are recorded, with their arguments. Each is repeated
in a CUDA graph with other numbers of warps, loads in flight and registers, over copies of its
weights that no cache holds, and its results are compared with those of the shape in use. A variant
that does not compile, or computes something else, is a line that says so.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py, benchmark_parts/

import common
import torch
from benchmark_parts import machine, sizes
from benchmark_parts.contestants import GREEDY
from benchmark_parts.turns import TimeLimit
from torch import Tensor

from mistral.files import append_line
from mistral_kernels.decoder import Decoder
from mistral_kernels.portable import Launch

FORMATS = ("plain", "Q4_K_M", "Q6_K", "Q8_0", "Q4_0", "Q5_K_M")
_COLD = 512e6  # bytes of weights to walk through: more than eight times an H200's L2
_MOST_COPIES = 64  # of small ones
_READ = {
    *("q_proj", "k_proj", "v_proj", "weight", "gate_proj", "up_proj"),
    *("keys", "values"),  # of attention; the kernel of the projections writes them
}
_CLOSE = 0.02  # of the norm: another order of sums, never another result


@dataclass
class Call:
    """A launch of a step: the kernel, its shape and its arguments."""

    kernel: Any
    launch: Launch
    arguments: tuple

    @property
    def name(self) -> str:
        """The kernel's, and the width of a matrix that tells two projections apart."""
        columns = self.launch.constants.get("COLUMNS")
        return self.kernel.__name__ + (f", {columns} columns" if columns else "")

    def read(self) -> list[int]:
        """Which arguments are weights, or keys and values that it only reads."""
        writes_cache = "ring_size" in self.kernel.arg_names
        return [
            i
            for i, (name, argument) in enumerate(zip(self.kernel.arg_names, self.arguments))
            if name in _READ and isinstance(argument, Tensor)
            if not (writes_cache and name in ("keys", "values"))
        ]


def main() -> None:
    args = arguments()
    limit = TimeLimit(args.seconds)
    with torch.inference_mode():
        for format, batch in itertools.product(args.formats, args.batches):
            for call in recorded(args, format, batch):
                if args.only and call.name.partition(",")[0] not in args.only:
                    continue
                facts = {"format": format, "batch": batch, "context": args.context}
                for line in lines(call, limit):
                    line = facts | {"kernel": call.name} | line
                    common.show_json(line)
                    append_line(args.out, json.dumps(line).encode())


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/dev/gpu_stages/sweep.py --out sweep.jsonl --formats plain Q4_K_M"
    )
    parser.add_argument("--out", type=common.path, required=True, help="lines are appended to it")
    parser.add_argument("--seconds", type=float, default=240, help="default: 240")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS[:4])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache")
    parser.add_argument("--only", nargs="+", help="kernels, by name: gate_up_kernel, ...")
    parser.add_argument("--size", default="7b", choices=sizes.SIZES)
    return parser.parse_args()


def recorded(args: argparse.Namespace, format: str, batch: int) -> list[Call]:
    """The launches of one step, one of each kernel and shape."""
    device = torch.device("cuda", 0)
    model = sizes.make_model(args.size, device, torch.bfloat16, format, layers=1)
    decoder = Decoder(model, batch, args.context + 8, graph=False)
    decoder.prefill([[3] * args.context] * batch)
    calls: dict[str, Call] = {}
    run = Launch.run

    def record(launch: Launch, kernel: Any, *arguments: Any, pdl: bool = False) -> None:
        call = Call(kernel, launch, arguments)
        calls.setdefault(call.name, call)
        run(launch, kernel, *arguments, pdl=pdl)

    try:
        Launch.run = record
        decoder.step(GREEDY)
        decoder.step(GREEDY)
    finally:
        Launch.run = run
    return list(calls.values())


def variants(call: Call) -> Iterator[tuple[dict, dict]]:
    """Changes of the constants and of the options; none at first."""
    yield {}, {}
    constants = call.launch.constants
    if "STAGES" in constants:  # attention
        for block, stages, warps in itertools.product((32, 64, 128), (2, 3), (4, 8)):
            yield dict(BLOCK=block, STAGES=stages), dict(num_warps=warps, num_stages=stages)
    elif constants.get("CHUNKS"):  # plain weights
        for warps, chunks in itertools.product((4, 8), (2, 4, 7, 8)):
            if constants["COLUMNS"] // 32 % (warps * chunks) == 0:
                yield dict(WARPS=warps, CHUNKS=chunks), dict(num_warps=warps)
    elif "WARPS" in constants:  # packed ones
        for warps, most in itertools.product((2, 4, 8), (None, 128, 144, 168)):
            if warps <= -(-constants["COLUMNS"] // 1024):
                yield dict(WARPS=warps), dict(num_warps=warps, maxnreg=most)
    else:
        for warps in (4, 8, 16, 32):
            yield {}, dict(num_warps=warps)


def lines(call: Call, limit: TimeLimit) -> Iterator[dict]:
    """What each variant takes, launched plainly and early."""
    sets = copies(call)
    size = sum(call.arguments[i].nbytes for i in call.read())
    wanted = None
    for (constants, options), pdl in itertools.product(variants(call), (False, True)):
        line = {"constants": constants, "options": options, "dependent": pdl}
        if not limit.left():
            yield line | {"failed": "no time left"}
            continue
        launch = changed(call.launch, constants, options)
        try:
            got = results(call, launch, pdl)
            wanted = wanted or got
            # Of tensors, because Python's `max` drops a NaN that is not the first.
            distance = torch.tensor([*map(relative_distance, got, wanted)]).max().item()
            took = seconds_a_launch(call, launch, sets, pdl)
        except Exception as error:  # too many registers or too much shared memory, say
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield line | {"failed": failure}
            continue
        line |= {"us": round(1e6 * took, 3), "distance": round(distance, 5)}
        line |= {"GB_per_s": round(size / took / 1e9)} if size else {}
        if not distance <= _CLOSE:
            line["failed"] = "it computes something else"
        yield line


def changed(launch: Launch, constants: dict, options: dict) -> Launch:
    """The launch with these changes; an option that is None is left out."""
    merged = launch.options | options
    return launch._replace(
        constants=launch.constants | constants,
        options={name: value for name, value in merged.items() if value is not None},
    )


def copies(call: Call) -> list[tuple]:
    """Arguments whose weights differ in their place, enough that no cache holds them all."""
    which = call.read()
    size = sum(call.arguments[i].nbytes for i in which)
    count = min(max(2, int(_COLD // max(size, 1)) + 1), _MOST_COPIES) if which else 1
    sets = [call.arguments]
    for _ in range(count - 1):
        made = list(call.arguments)
        for i in which:
            made[i] = call.arguments[i].clone()
        sets.append(tuple(made))
    return sets


def results(call: Call, launch: Launch, pdl: bool) -> list[Tensor]:
    """What the kernel writes, from the same state each time: all its tensors but the weights."""
    which = set(call.read())
    state = [
        argument
        for i, argument in enumerate(call.arguments)
        if isinstance(argument, Tensor) and i not in which
    ]
    before = [tensor.clone() for tensor in state]
    launch.run(call.kernel, *call.arguments, pdl=pdl)
    after = [tensor.clone() for tensor in state]
    for tensor, old in zip(state, before):
        tensor.copy_(old)
    return after


def relative_distance(got: Tensor, wanted: Tensor) -> float:
    """Of the norm; NaN if something that was finite is not any more."""
    got = got.double()
    wanted = wanted.double()
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def seconds_a_launch(call: Call, launch: Launch, sets: list[tuple], pdl: bool) -> float:
    """The median over replays of a graph that walks through all copies of the weights."""

    def work() -> None:
        for number, arguments in enumerate(sets):
            launch.run(call.kernel, *arguments, pdl=pdl and number > 0)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    device = torch.device("cuda", 0)
    times = [machine.seconds(device, graph.replay) for _ in range(12)]
    return statistics.median(times[2:]) / len(sets)


if __name__ == "__main__":
    common.run(main)

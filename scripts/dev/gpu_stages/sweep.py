"""Time the launch shapes of each kernel: one line of JSON a variant, at once.

    steps      the kernels of one token, of every format, but for attention and sampling
    attention  of one token, at a short and a full window, alone and for 8 rows
    sampling   of one id, greedily and with each of the rules, alone and for 8 rows
    prompts    attention of a prompt of 2,048 tokens
    chunks     the products of packed weights with 8 and with 64 rows, as short chunks have them

The launches of a 7B of two layers, which have all types of a mixture, are recorded, with their
arguments. Each is repeated in a CUDA graph with other numbers of warps, keys at once, parts, loads
in flight and registers, over copies of its weights that no cache holds, and its results are
compared with those of the shape in use. A variant that does not compile, or computes something
else, is a line that says so.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py, benchmark_parts/

import common
import torch
import triton
from benchmark_parts import machine, sizes
from benchmark_parts.contestants import GREEDY
from benchmark_parts.turns import TimeLimit
from torch import Tensor

from mistral import Sampling
from mistral.files import append_line
from mistral_kernels.decode.matvec import DENSE
from mistral_kernels.decoder import Decoder
from mistral_kernels.portable import Launch

_PACKED = ("Q4_K_M", "Q6_K", "Q8_0")
_COLD = 512e6  # bytes of weights to walk through: more than eight times an H200's L2
_MOST_COPIES = 64  # of small ones; as often a kernel without weights is launched in a row
_CLOSE = 0.02  # of the norm: another order of sums, never another result


_OF_STEPS = ("embed_kernel", "qkv_kernel", "projection_kernel", "gate_up_kernel", "head_kernel")
_OF_CHUNKS = ("short_linear_kernel", "joint_linear_kernel")
# How ids are sampled, by the name of the rule; every launch draws by other random numbers.
_RULES = {
    "greedy": GREEDY,
    "no rule": Sampling(temperature=0.8, seed=0),
    "top-k 40": Sampling(temperature=0.8, top_k=40, seed=0),
    "top-p 0.9": Sampling(temperature=0.8, top_p=0.9, seed=0),
    "min-p 0.05": Sampling(temperature=0.8, min_p=0.05, seed=0),
    "all rules": Sampling(
        temperature=0.8, top_k=40, top_p=0.9, min_p=0.05, repetition_penalty=1.1, seed=0
    ),
}


class Work(NamedTuple):
    """What is recorded, once for each format, batch, context and rule.

    chunk    so many tokens are read at once; 1: a step after `contexts` tokens
    kernels  which of its kernels
    rules    by which a step samples; names in `_RULES`
    """

    formats: tuple[str, ...]
    kernels: tuple[str, ...]
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (512,)
    chunk: int = 1
    rules: tuple[str, ...] = ("greedy",)


WORKS = {
    "steps": [Work(("plain", *_PACKED), _OF_STEPS)],
    "attention": [Work(("plain",), ("decode_attention_kernel",), (1, 8), (512, 4096))],
    "sampling": [Work(("plain",), ("sample_kernel",), (1, 8), (16,), rules=tuple(_RULES))],
    "prompts": [Work(("plain",), ("prefill_attention_kernel",), contexts=(0,), chunk=2048)],
    "chunks": [Work(_PACKED, _OF_CHUNKS, chunk=chunk) for chunk in (8, 64)],
}


class Kind(NamedTuple):
    """Arguments of a kernel, by name.

    read     weights, or keys and values that it only reads: a copy for each launch in a row
    written  its results, all of their elements
    changed  its results, in part, or from what they were
    early    it may be launched before the kernel before it has ended
    """

    read: tuple[str, ...]
    written: tuple[str, ...]
    changed: tuple[str, ...] = ()
    early: bool = True


KINDS = {
    "embed_kernel": Kind((), ("residual", "x", "sums", "cos", "sin"), early=False),
    "qkv_kernel": Kind(("q_proj", "k_proj", "v_proj"), ("q",), ("keys", "values")),
    "decode_attention_kernel": Kind(("keys", "values"), ("y",)),
    "projection_kernel": Kind(("weight",), ("x", "sums"), ("residual",)),
    "gate_up_kernel": Kind(("gate_proj", "up_proj"), ("h",)),
    "head_kernel": Kind(("weight",), ("logits",)),
    "sample_kernel": Kind((), (), ("seen", "counts", "ids", "answers"), early=False),
    "prefill_attention_kernel": Kind(("k", "v"), ("y",), early=False),
    "short_linear_kernel": Kind(("weight",), ("outputs",), early=False),
    "joint_linear_kernel": Kind(("first", "second", "third"), ("outputs",), early=False),
}


@dataclass
class Call:
    """A launch: the kernel, its shape and its arguments."""

    kernel: Any
    launch: Launch
    arguments: tuple

    @property
    def name(self) -> str:
        """The kernel's, and the width and the types of its matrices, which tell two calls apart."""
        constants = self.launch.constants
        parts = [self.kernel.__name__]
        if "COLUMNS" in constants:
            parts.append(f"{constants['COLUMNS']} columns")
        types = {value for name, value in constants.items() if name.endswith("KIND")}
        return ", ".join([*parts, *sorted(types - {DENSE})])

    @property
    def kind(self) -> Kind:
        """What its arguments are."""
        return KINDS[self.kernel.__name__]

    def places(self, names: tuple[str, ...]) -> list[int]:
        """Which arguments have these names."""
        return [self.kernel.arg_names.index(name) for name in names]

    def with_launch(self, launch: Launch, replaced: dict[int, Tensor]) -> "Call":
        """The call with another shape, and some of its arguments replaced."""
        arguments = [replaced.get(i, argument) for i, argument in enumerate(self.arguments)]
        return Call(self.kernel, launch, tuple(arguments))


def main() -> None:
    args = arguments()
    limit = TimeLimit(args.seconds)
    with torch.inference_mode():
        for name in args.works:
            for work in WORKS[name]:
                measure(args, name, work, limit)


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/dev/gpu_stages/sweep.py steps --out sweep.jsonl --formats plain"
    )
    parser.add_argument("works", nargs="+", choices=WORKS, metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--out", type=common.path, help="lines are appended to it, too")
    parser.add_argument("--seconds", type=float, default=240, help="default: 240")
    parser.add_argument("--formats", nargs="+", help="of a work's formats (default: all)")
    parser.add_argument("--only", nargs="+", help="kernels, by name: gate_up_kernel, ...")
    parser.add_argument("--size", default="7b", choices=sizes.SIZES)
    parser.add_argument(
        "--once", action="store_true", help="launch each variant once: to compile them"
    )
    return parser.parse_args()


def measure(args: argparse.Namespace, name: str, work: Work, limit: TimeLimit) -> None:
    """All variants of all kernels of a work."""
    formats = [format for format in work.formats if format in (args.formats or work.formats)]
    for format, batch, context in product(formats, work.batches, work.contexts):
        facts = {"work": name, "format": format, "batch": batch, "context": context}
        facts |= {"chunk": work.chunk}
        for rule, call in recorded(args.size, format, batch, context, work):
            kernel = call.kernel.__name__
            if kernel not in (args.only or work.kernels):
                continue
            if args.once:
                launch_once(call)
                continue
            shown = call.name if len(work.rules) == 1 else f"{call.name}, {rule}"
            for line in lines(call, limit):
                line = facts | {"kernel": shown} | line
                common.show_json(line)
                if args.out:
                    append_line(args.out, json.dumps(line).encode())


def recorded(
    size: str, format: str, batch: int, context: int, work: Work
) -> Iterator[tuple[str, Call]]:
    """The launches of one chunk, or of one step by each rule: one of each name.

    The arguments of a launch hold what its rule needs until the next rule's is asked for.
    """
    device = torch.device("cuda", 0)
    model = sizes.make_model(size, device, torch.bfloat16, format, layers=2)
    decoder = Decoder(model, batch, context + work.chunk + 2 * len(work.rules) + 8, graph=False)
    if context:
        decoder.prefill([[3] * context] * batch)
    for rule in work.rules:
        calls: dict[str, Call] = {}
        with _recording(calls):
            if work.chunk > 1:
                decoder.prefill([[3] * work.chunk] * batch)
            else:
                decoder.step(_RULES[rule])
                decoder.step(_RULES[rule])
        for call in calls.values():
            yield rule, call


@contextlib.contextmanager
def _recording(calls: dict[str, Call]) -> Iterator[None]:
    """Note the first launch of each name in `calls`."""
    run = Launch.run

    def record(launch: Launch, kernel: Any, *arguments: Any, pdl: bool = False) -> None:
        call = Call(kernel, launch, arguments)
        calls.setdefault(call.name, call)
        run(launch, kernel, *arguments, pdl=pdl)

    Launch.run = record
    try:
        yield
    finally:
        Launch.run = run


def variants(call: Call) -> Iterator[tuple[dict, dict]]:
    """Changes of the constants and of the options; none at first."""
    yield {}, {}
    constants = call.launch.constants
    if "STAGES" in constants:  # attention
        parts = ("QUERIES", (64, 128)) if "QUERIES" in constants else ("SPLITS", (8, 16, 32))
        for part, block, stages, warps in product(parts[1], (32, 64, 128), (2, 3), (4, 8)):
            changes = {parts[0]: part, "BLOCK": block, "STAGES": stages}
            yield changes, dict(num_warps=warps, num_stages=stages)
    elif constants.get("CHUNKS"):  # plain weights
        for warps, chunks in product((4, 8), (2, 4, 7, 8)):
            if constants["COLUMNS"] // 32 % (warps * chunks) == 0:
                yield dict(WARPS=warps, CHUNKS=chunks), dict(num_warps=warps)
    elif "WARPS" in constants:  # packed ones
        # Of 65,536 registers: 8 warps with 128 are two CTAs, 4 with 168 three, 2 with 128 eight.
        for warps, most in product((2, 4, 8), (None, 128, 168)):
            if warps <= -(-constants["COLUMNS"] // 1024) and (warps, most) != (8, 168):
                yield dict(WARPS=warps), dict(num_warps=warps, maxnreg=most)
    else:
        for warps in (4, 8, 16, 32):
            changes = dict(BLOCK=128 * warps) if "GROUPS" in constants else {}  # as it samples
            yield changes, dict(num_warps=warps)


def changed(call: Call, constants: dict, options: dict, pdl: bool) -> Call:
    """The call with these changes; an option that is None is left out."""
    old = call.launch
    constants = old.constants | constants
    options = {name: value for name, value in (old.options | options).items() if value is not None}
    grid = old.grid
    replaced = {}
    if "AHEAD" in constants:  # as `attend` chooses it
        constants["AHEAD"] = pdl and constants["H"] <= 128
    if "QUERIES" in constants:
        (tokens,) = call.places(("T",))
        grid = (grid[0], triton.cdiv(call.arguments[tokens], constants["QUERIES"]))
    if (splits := constants.get("SPLITS")) != old.constants.get("SPLITS"):
        grid = (grid[0], splits)
        for i in call.places(("partial_outputs", "stats")):
            heads, _, *rest = call.arguments[i].shape
            replaced[i] = call.arguments[i].new_empty(heads, splits, *rest)
    return call.with_launch(Launch(grid, constants, options), replaced)


def tried(call: Call) -> Iterator[tuple[dict, Call, bool]]:
    """Each variant: its facts, its call, and whether it is launched early."""
    early = (False, True) if call.kind.early else (False,)
    seen = []
    for (constants, options), pdl in product(variants(call), early):
        made = changed(call, constants, options, pdl)
        if (made.launch, pdl) not in seen:  # the shape in use is first, without changes
            seen.append((made.launch, pdl))
            yield {"constants": constants, "options": options, "dependent": pdl}, made, pdl


def launch_once(call: Call) -> None:
    """Every variant, whatever becomes of it."""
    for _, made, pdl in tried(call):
        try:
            made.launch.run(made.kernel, *made.arguments, pdl=pdl)
        except Exception as error:  # it will fail again when it is measured
            common.note(f"{call.name}: {type(error).__name__}")


def lines(call: Call, limit: TimeLimit) -> Iterator[dict]:
    """What each variant takes, launched plainly and early."""
    read = call.places(call.kind.read)
    sets = copies(call, read)
    # Of two matrices a launch has the last one twice.
    size = sum({id(call.arguments[i]): call.arguments[i].nbytes for i in read}.values())
    state = State(call)
    wanted = None
    for facts, made, pdl in tried(call):
        if not limit.left():
            yield facts | {"failed": "no time left"}
            continue
        try:
            got = state.results(made, pdl)
            wanted = wanted or got
            # Of tensors, because Python's `max` drops a NaN that is not the first.
            distance = torch.tensor([*map(relative_distance, got, wanted)]).max().item()
            took = seconds_a_launch(made, sets, pdl)
        except Exception as error:  # too many registers or too much shared memory, say
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield facts | {"failed": failure}
            continue
        line = facts | {"us": round(1e6 * took, 3), "distance": round(distance, 5)}
        line |= {"GB_per_s": round(size / took / 1e9)} if size else {}
        if not distance <= _CLOSE:
            line["failed"] = "it computes something else"
        yield line


def copies(call: Call, read: list[int]) -> list[dict[int, Tensor]]:
    """Weights that differ in their place, enough that no cache holds them all."""
    if not read:
        return [{}] * _MOST_COPIES
    size = sum(call.arguments[i].nbytes for i in read)
    count = min(max(2, int(_COLD // max(size, 1)) + 1), _MOST_COPIES)
    return [{}] + [{i: call.arguments[i].clone() for i in read} for _ in range(count - 1)]


class State:
    """The tensors of a call as they were, and as a launch must find them."""

    def __init__(self, call: Call):
        kind = call.kind
        self._written = call.places(kind.written)
        self._changed = call.places(kind.changed)
        self._before = {i: call.arguments[i].clone() for i in self._changed}

    def results(self, call: Call, pdl: bool) -> list[Tensor]:
        """What the kernel writes, from the same state each time.

        Where it writes nothing there is NaN, not what a launch before it has left.
        """
        for i, tensor in self._before.items():
            call.arguments[i].copy_(tensor)
        for i in self._written:
            call.arguments[i].fill_(float("nan"))
        call.launch.run(call.kernel, *call.arguments, pdl=pdl)
        return [call.arguments[i].clone() for i in (*self._written, *self._changed)]


def relative_distance(got: Tensor, wanted: Tensor) -> float:
    """Of the norm; NaN if something that was finite is not any more."""
    got = got.double()
    wanted = wanted.double()
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def seconds_a_launch(call: Call, sets: list[dict[int, Tensor]], pdl: bool) -> float:
    """The median over replays of a graph that walks through all copies of the weights."""
    calls = [call.with_launch(call.launch, weights) for weights in sets]

    def work() -> None:
        for number, one in enumerate(calls):
            one.launch.run(one.kernel, *one.arguments, pdl=pdl and number > 0)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    device = torch.device("cuda", 0)
    times = [machine.seconds(device, graph.replay) for _ in range(12)]
    return statistics.median(times[2:]) / len(sets)


if __name__ == "__main__":
    common.run(main)

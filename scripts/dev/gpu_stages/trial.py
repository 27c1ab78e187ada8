"""Every kind of kernel beside the eager model; of a step that fails, which operation is to blame.

For each format, number of rows and kind of launch: a 7B of a few layers, all its works twice (the
second time by CUDA graphs), and the largest distance of the logits. If they are wrong or a kernel
does not run, each operation in turn is replaced by its plain twin: the one without which it works
is named. If only dependent launches fail, they are switched off one operation at a time. More than
16 rows have no dependent launches, but operations of their own, and more of them that keep the bits
of a row whatever the others are.

Each format and kind of launch has a process of its own, all at the same time: after an illegal
address, say, every later launch of a process fails.
"""

import argparse
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # common.py, benchmark_parts/

import common
import torch
from benchmark_parts import sizes

from mistral import Mistral
from mistral_kernels.decode.matvec import MAX_BATCH
from mistral_kernels.decode.step import (
    KERNELS,
    MANY_ROWS,
    MANY_ROWS_SAME_BITS,
    REFERENCES,
    Operations,
)
from mistral_kernels.decoder import Decoder
from mistral_kernels.trial import expected_logits, try_out

_HOW = ("plain", "dependent", "same bits")
_ROOM = 128  # tokens a row: more than the trial's longest chunk


def main() -> int:
    parser = common.parser(__doc__, "python scripts/dev/gpu_stages/trial.py --formats plain Q4_K_M")
    parser.add_argument("--formats", nargs="+", default=["plain", "Q4_K_M", "Q8_0", "Q6_K"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--how", nargs="+", choices=_HOW, default=_HOW, help="default: all of them")
    parser.add_argument("--size", default="7b", choices=sizes.SIZES)
    parser.add_argument("--layers", type=int, default=2, help="default: 2")
    parser.add_argument("--here", action="store_true", help="all in this process, in turns")
    args = parser.parse_args()
    return in_turns(args) if args.here else apart(args)


def apart(args: argparse.Namespace) -> int:
    """A process for each format and kind of launch; they print the lines."""
    same = ["--batches", *args.batches, "--size", args.size, "--layers", args.layers, "--here"]
    started = []
    hows = [how for how in args.how if any(takes(batch, how) for batch in args.batches)]
    for format, how in itertools.product(args.formats, hows):
        command = [sys.executable, __file__, "--formats", format, "--how", how, *same]
        started.append(subprocess.Popen([str(part) for part in command]))
    return max(abs(process.wait()) for process in started)


def in_turns(args: argparse.Namespace) -> int:
    """All of them in this process."""
    failed = 0
    for format in args.formats:
        # Layer 0 of a mixture has its larger type, layer 1 its smaller one.
        device = torch.device("cuda", 0)
        model = sizes.make_model(args.size, device, torch.bfloat16, format, args.layers)
        expected = expected_logits(model)  # before the first decoder regroups the weights
        for batch in args.batches:
            for how in (how for how in args.how if takes(batch, how)):
                case = {"format": format, "batch": batch, "how": how}
                result = one_trial(model, expected, batch, how)
                common.show_json(case | result)
                failed += "failed" in result
    return 1 if failed else 0


def takes(batch: int, how: str) -> bool:
    """Whether so many rows can be launched so."""
    return how == "plain" or (how == "dependent") == (batch <= MAX_BATCH)


def one_trial(model: Mistral, expected: torch.Tensor, batch: int, how: str) -> dict:
    """The distance of the logits; or the failure, and what it takes to be without it.

    how  "plain", "dependent" launches, or the "same bits" of a row in any company
    """
    pdl = how == "dependent"
    together = how != "same bits"
    distance, failure = attempt(model, expected, batch, pdl=pdl, together=together)
    if not failure:
        return {"distance": round(distance, 4)}
    result = {"failed": failure}
    options = dict(together=together, graph=False)
    if not attempt(model, expected, batch, pdl=pdl, **options)[1]:
        return result | {"works": "without CUDA graphs"}
    if pdl and not attempt(model, expected, batch, pdl=False, **options)[1]:
        return result | {"works": works_with(plain_launches(), model, expected, batch, pdl=True)}
    kernels = KERNELS
    if batch > MAX_BATCH:
        kernels = MANY_ROWS if together else MANY_ROWS_SAME_BITS
    return result | {"works": works_with(twins(kernels), model, expected, batch, pdl=False)}


def works_with(
    sets: Iterator[tuple[str, Operations]],
    model: Mistral,
    expected: torch.Tensor,
    batch: int,
    pdl: bool,
) -> str:
    """The first set of operations with which the trial passes."""
    for name, operations in sets:
        options = dict(pdl=pdl, graph=False, operations=operations)
        if not attempt(model, expected, batch, **options)[1]:
            return name
    return "with none of them: the kernels of chunks or of sampling are to blame"


def twins(kernels: Operations) -> Iterator[tuple[str, Operations]]:
    """The kernels with one operation replaced by its plain twin; then with all replaced."""
    for name in Operations._fields:
        changed = {name: without_pdl(getattr(REFERENCES, name))}
        yield f"with the plain twin of {name}", kernels._replace(**changed)
    every = {name: without_pdl(getattr(REFERENCES, name)) for name in Operations._fields}
    yield "with all plain twins", kernels._replace(**every)


def plain_launches() -> Iterator[tuple[str, Operations]]:
    """The kernels with one of them launched plainly; then with all of them."""
    names = [name for name in Operations._fields if name not in ("embed", "unpack")]
    for name in names:
        changed = {name: without_pdl(getattr(KERNELS, name))}
        yield f"with a plain launch of {name}", KERNELS._replace(**changed)
    every = {name: without_pdl(getattr(KERNELS, name)) for name in names}
    yield "with plain launches of all", KERNELS._replace(**every)


def without_pdl(operation: Callable[..., None]) -> Callable[..., None]:
    """The operation, launched plainly whatever `pdl` says; the twins do not take it at all."""

    @functools.wraps(operation)
    def run(*arguments: object, pdl: bool = False, **options: object) -> None:
        operation(*arguments, **options)

    return run


def attempt(
    model: Mistral,
    expected: torch.Tensor,
    batch: int,
    *,
    pdl: bool,
    together: bool = True,
    graph: bool | None = None,
    operations: Operations | None = None,
) -> tuple[float, str]:
    """The trial's distance, and why it failed ("" if it did not)."""
    try:
        decoder = Decoder(model, batch, _ROOM, pdl=pdl, graph=graph)
        decoder.rows_together = together
        if operations:
            decoder._step.operations = operations  # from inside: no user replaces them
        return try_out(decoder, expected), ""
    except Exception as error:  # of Triton, its compiler or the driver
        return float("nan"), f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    common.run(main)

"""Measure every engine beside transformers and llama.cpp, and beside the machine's own limits.

The weights are random, unless --file names a GGUF: nothing is downloaded. First the machine's own
rates are measured, which bound every engine; then all engines take turns. A line of JSON follows
each case at once, and the last line is JSON of all of them.
"""

import argparse
import sys
from collections.abc import Sequence

import common
import torch
from benchmark_parts import machine, report, sizes, turns
from benchmark_parts.formats import FORMATS
from benchmark_parts.sizes import SIZES, Case
from benchmark_parts.warm_up import WarmUp

import mistral
from mistral.checkpoints.load import choose_device
from mistral.files import format_bytes
from mistral_kernels.requirements import has_dependent_launch

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/benchmark.py --suite sweep --engines kernels eager --plot cost.png"
    )
    parser.add_argument(
        "--suite", choices=("core", "sweep", "chunks"), default="core", help="default: core"
    )
    _add_model_arguments(parser)
    _add_measuring_arguments(parser)
    args = parser.parse_args()
    counts = [args.threads, args.prompt_tokens, args.new_tokens, args.repeats, args.time_limit]
    counts += [args.layers, *(args.contexts or ()), *(args.batches or ()), *(args.chunks or ())]
    if args.busy < 0 or any(n is not None and n < 1 for n in counts):
        raise ValueError(
            "--threads, --prompt-tokens, --new-tokens, --repeats, --layers, --contexts, --batches, "
            "--chunks and --time-limit must be 1 or more, and --busy 0 or more"
        )
    if args.plot:
        report.require_matplotlib()
        common.check_output(args.plot)
    return args


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=common.DTYPES, help="default: float32 on the CPU, else bfloat16"
    )
    parser.add_argument(
        "--size", choices=SIZES, help="default: 7b on a GPU, else small (175 million parameters)"
    )
    parser.add_argument(
        "--layers", type=int, help="of the model of --size (default: as many as it has)"
    )
    parser.add_argument(
        "--format",
        choices=("plain", *FORMATS),
        default="plain",
        help="of the weights: plain, in --dtype, or packed",
    )
    parser.add_argument(
        "--file",
        type=common.path,
        help="measure this GGUF file, packed as it is, in place of --size and --format",
    )


def _add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=turns.NAMES,
        help="default: all that take the format (llama.cpp: not a plain 7b; kernels-pdl: on "
        "compute capability 9 to 11)",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads of PyTorch (default: 2)"
    )
    parser.add_argument(
        "--busy", type=int, default=0, help="keep so many cores busy with other work (default: 0)"
    )
    parser.add_argument("--prompt-tokens", type=int, help="of core's first case (default: 200)")
    parser.add_argument("--new-tokens", type=int, help="a turn (default: 64 on a GPU, else 40)")
    parser.add_argument(
        "--repeats", type=int, help="turns; the quickest counts (default: 5 on a GPU, else 15)"
    )
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="of sweep (default: 512 to 32,768, doubled)"
    )
    parser.add_argument("--batches", type=int, nargs="+", help="of sweep (default: 1 2 4 8)")
    parser.add_argument(
        "--chunks", type=int, nargs="+", help="tokens a forward pass, of chunks (default: 2 4 8 16)"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        help="seconds, shared among the cases; what does not fit is left out (default: core 330)",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="Triton has the kernels: compile none ahead"
    )
    parser.add_argument(
        "--plot",
        type=common.path,
        help="draw cost a token against context into this file (matplotlib)",
    )


def main() -> None:  # noqa: PLR0915
    args = arguments()
    limit = turns.TimeLimit(args.time_limit or (330 if args.suite == "core" else None))
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    on_gpu = device.type == "cuda"
    dtype = common.DTYPES[args.dtype or ("bfloat16" if on_gpu else "float32")]
    size = args.size or ("7b" if on_gpu else "small")
    format = args.format
    if args.file:
        size, format = args.file.name, "its own"
    chosen = args.engines or taking_part(device, size, format)
    names = [name for name in turns.NAMES if name in chosen]
    cases = suite(args, on_gpu)
    ahead = compile_ahead(args, device, dtype, size, names, cases)

    # 1. The machine, and what no engine can beat on it.
    bandwidth = machine.read_bandwidth(device)
    rate = machine.matrix_rate(device, dtype)
    if args.file:
        model, _ = mistral.load(args.file, device=device, dtype=dtype, packed=True)
    else:
        model = sizes.make_model(size, device, dtype, format, args.layers)
    facts = machine.facts(device, dtype) | {"size": size, "format": format}
    facts |= {"parameters": model.config.num_parameters}
    introduce(facts, model, bandwidth, rate)
    if ahead:
        common.note(ahead.wait(limit.left() / 2))

    # 2. All engines in turns, case by case.
    facts |= {"busy": args.busy}
    machine.keep_busy(args.busy)
    results = []
    field = turns.Field(model, names, args.file)
    repeats = args.repeats or (5 if on_gpu else 15)
    parts = shares(args, names, cases)
    for number, (fits, case) in enumerate(parts):
        rows = turns.run_case(
            field, fits, case, repeats, limit.share(len(parts) - number), common.note
        )
        found = [row.result(model, bandwidth, rate) for row in rows]
        decode = sizes.decode_roof(model, case, bandwidth)
        prefill = sizes.prefill_roof(model, case, bandwidth, rate)
        title = f"{case}: roof of decode {decode:,.1f} tokens/s, of prefill {prefill:,.1f}"
        common.show(report.table(title, found))
        common.show_json({"case": str(case), "results": found})
        results += found

    # 3. The report.
    for line in report.costs_of_length(results):
        common.show(line)
    if on_gpu:
        common.show(
            "memory reserved by PyTorch at most: "
            f"{format_bytes(torch.cuda.max_memory_reserved(device))}"
        )
    else:
        common.show(f"peak memory of the process: {common.peak_memory(device)}")
    if args.plot:
        report.plot(args.plot, results, f"{facts['machine']}, {size}, {format}, {facts['dtype']}")
        common.note(f"wrote {args.plot}")
    measured = {"read_bytes_per_s": round(bandwidth), "matrix_flop_per_s": round(rate)}
    common.show_json(facts | {"suite": args.suite} | measured | {"results": results})


def compile_ahead(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    size: str,
    names: Sequence[str],
    cases: Sequence[Case],
) -> WarmUp | None:
    """Begin to compile the kernels of all cases, if they take part on a GPU; else None."""
    ours = [name for name in names if name.startswith("kernels")]
    if device.type != "cuda" or not ours or args.file or args.compiled:
        return None
    common.note("compiling the kernels in all cores; meanwhile the machine is measured")
    capability = torch.cuda.get_device_capability(device)
    return WarmUp(size, dtype, [args.format], cases, ours, capability)


def shares(
    args: argparse.Namespace, names: Sequence[str], cases: Sequence[Case]
) -> list[tuple[list[str], Case]]:
    """Who runs in which case, in the order in which they share the time.

    In core those that compile for minutes come last, in one case, with whatever time is left.
    """
    if args.suite != "core":
        return [(list(names), case) for case in cases]
    quick = [name for name in names if name not in turns.SLOW_STARTERS]
    slow = [name for name in names if name in turns.SLOW_STARTERS]
    parts = [(quick, case) for case in cases] if quick else []
    return [*parts, (slow, cases[-1])] if slow else parts


def taking_part(device: torch.device, size: str, format: str) -> list[str]:
    """The engines that are measured unless --engines names others."""
    packed = ("kernels", "kernels-pdl", "cpu", "eager", "llama.cpp")
    names = set(turns.NAMES if format == "plain" else packed)
    if device.type != "cuda" or not has_dependent_launch(device):
        names.discard("kernels-pdl")
    if device.type != "cpu":
        names.discard("cpu")
    if (size, format) == ("7b", "plain"):
        names.discard("llama.cpp")  # it would need a file of 14 GB
    return [name for name in turns.NAMES if name in names]


def introduce(facts: dict, model: mistral.Mistral, bandwidth: float, rate: float) -> None:
    """The machine, its rates, and what they allow."""
    for name, value in facts.items():
        common.show(f"{name:<18} {value:,}" if isinstance(value, int) else f"{name:<18} {value}")
    step = sizes.weight_bytes(model)
    common.show(f"{'reads':<18} {format_bytes(bandwidth)}/s, measured: reading 1 GB")
    common.show(
        f"{'multiplies':<18} {rate / 1e12:,.2f} TFLOP/s, measured: a product of two matrices"
    )
    common.show(
        f"{'ceiling':<18} {bandwidth / step:,.1f} tokens/s of one text: "
        f"{format_bytes(step)} of weights a token\n"
    )
    sys.stdout.flush()


def suite(args: argparse.Namespace, on_gpu: bool) -> list[Case]:
    """The cases to measure.

    `core` takes a minute on a CPU; on a GPU it begins with a long prompt, and has a batch, too.
    """
    new = args.new_tokens or (64 if on_gpu else 40)
    if args.suite == "sweep":
        contexts = args.contexts or CONTEXTS
        batches = args.batches or (1, 2, 4, 8)
        return [Case(batch, context, new) for batch in batches for context in contexts]
    if args.suite == "chunks":
        context = args.prompt_tokens or 200
        return [Case(1, context, new, chunk) for chunk in args.chunks or (2, 4, 8, 16)]
    cases = [Case(1, args.prompt_tokens or 200, new)]
    return [Case(1, 2048, new), Case(8, 512, new), *cases] if on_gpu else cases


if __name__ == "__main__":
    common.run(main)

"""Profile one decode step: its kernels (GPU) or operators (CPU), their time, bytes and GB/s.

Bytes are the least that the work must move (weights, keys and values, results): bytes that are read
again do not count, so GB/s far below the machine's is time lost. "-" if the name alone does not
determine them.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
import torch
from benchmark_parts import machine, sizes
from benchmark_parts.contestants import GREEDY
from benchmark_parts.formats import FORMATS
from benchmark_parts.sizes import SIZES
from benchmark_parts.warm_up import WarmUp
from torch.profiler import ProfilerActivity, profile

import mistral
import mistral_kernels
from mistral.checkpoints.load import choose_device
from mistral.files import format_bytes
from mistral.quantization.packed import Packed, TiedOutput
from mistral_kernels.engines import ENGINES
from mistral_kernels.requirements import has_dependent_launch

_EARLY = ", dependent launch"  # in an engine's line
MATRICES = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mv")


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/dev/profile_step.py --engine kernels --context 4096"
    )
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="default: auto")
    parser.add_argument(
        "--pdl", action="store_true", help="the kernels, with programmatic dependent launch"
    )
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", choices=common.DTYPES, help="default: float32 on the CPU, else bfloat16"
    )
    parser.add_argument(
        "--size", choices=SIZES, help="of a random model (default: 7b on a GPU, else small)"
    )
    parser.add_argument(
        "--format",
        choices=("plain", *FORMATS),
        default="plain",
        help="of the weights: plain, in --dtype, or packed",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--context", type=int, default=512, help="tokens before the step (default: 512)"
    )
    parser.add_argument("--steps", type=int, default=10, help="the mean of so many (default: 10)")
    parser.add_argument(
        "--compiled", action="store_true", help="Triton has the kernels: compile none ahead"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads of PyTorch (default: 2)"
    )
    args = parser.parse_args()
    if args.pdl and args.engine not in ("auto", "kernels"):
        raise ValueError(f"--pdl is for the kernels, not for {args.engine}")
    if min(args.batch_size, args.context, args.steps, args.threads) < 1:
        raise ValueError("--batch-size, --context, --steps and --threads must be 1 or more")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    on_gpu = device.type == "cuda"
    dtype = common.DTYPES[args.dtype or ("bfloat16" if on_gpu else "float32")]
    model, decoder, note = open_decoder(args, device, dtype)
    common.show(
        f"{note}; {machine.facts(device, dtype)['machine']}, {args.format}, "
        f"{str(dtype).removeprefix('torch.')}, batch {args.batch_size}, context {args.context:,}"
    )
    bandwidth = machine.read_bandwidth(device)
    common.show(f"the machine reads {bandwidth / 1e9:,.1f} GB/s (measured: reading 1 GB)\n")

    decoder.prefill(
        torch.randint(3, model.config.vocab_size, (args.batch_size, args.context)).tolist()
    )
    run_steps(decoder, args.steps)  # compiles, records, warms up
    wall = machine.seconds(device, lambda: run_steps(decoder, args.steps)) / args.steps
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], record_shapes=True
    ) as record:
        run_steps(decoder, args.steps)
        machine.synchronize(device)
    known = kernel_bytes(model, args.batch_size, args.context)
    if _EARLY in note:
        common.note(
            "with dependent launch the time of a kernel contains its wait for the one before it; "
            "for shares of a step use --engine kernels"
        )
    rows = (
        kernels(record.events(), known, args.steps)
        if on_gpu
        else operators(record.events(), dtype, args.steps)
    )
    show(rows, wall, sizes.weight_bytes(model) / bandwidth)
    facts = {
        "engine": note,
        "format": args.format,
        "context": args.context,
        "batch": args.batch_size,
    }
    common.show_json(facts | {"step_s": wall, "rows": rows})


def open_decoder(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[mistral.Mistral, mistral.Decoder, str]:
    """A random model, its engine, and a line about it."""
    on_gpu = device.type == "cuda"
    size = args.size or ("7b" if on_gpu else "small")
    ahead = None
    if on_gpu and args.engine in ("auto", "kernels") and not args.compiled:
        common.note("compiling the kernels in all cores; meanwhile the weights are made")
        case = sizes.Case(args.batch_size, args.context, 3 * args.steps)
        capability = torch.cuda.get_device_capability(device)
        engines = ["kernels-pdl" if args.pdl else "kernels"]
        if args.engine == "auto" and not args.pdl and has_dependent_launch(device):
            engines = ["kernels-pdl", "kernels"]  # which `auto` tries in this order
        ahead = WarmUp(size, dtype, [args.format], [case], engines, capability)
    model = sizes.make_model(size, device, dtype, args.format)
    if ahead:
        common.note(ahead.wait(120))
    room = args.context + 3 * args.steps + 2
    if args.pdl:
        decoder = mistral_kernels.Decoder(model, args.batch_size, room, pdl=True)
        return model, decoder, f"engine: kernels{_EARLY}"
    return model, *mistral_kernels.open_engine(args.engine, model, args.batch_size, room)


def run_steps(decoder: mistral.Decoder, n: int) -> None:
    """`n` greedy steps; nothing waits in between."""
    for _ in range(n):
        ids = decoder.step(GREEDY)
    ids.tolist()


def kernels(events: Sequence, known: dict[str, int], steps: int) -> list[dict]:
    """The GPU's kernels by name, the longest first.

    There are two projections: the one after gate and up is down.
    """
    found: dict[str, list[float]] = defaultdict(list)
    after_gate_up = False
    on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(on_gpu, key=lambda event: event.time_range.start):
        name = event.name
        if name == "projection_kernel":
            name = f"{name}, {'down' if after_gate_up else 'o'}"
            after_gate_up = False
        found[name].append(event.time_range.elapsed_us())
        after_gate_up = after_gate_up or name == "gate_up_kernel"
    rows = [
        _row(name, len(times), sum(times), known.get(name), steps) for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def kernel_bytes(model: mistral.Mistral, batch: int, context: int) -> dict[str, int]:
    """What each of our kernels moves in one step, all its calls together."""
    config = model.config
    trunk = model.model
    attention = [layer.self_attn for layer in trunk.layers]
    mlp = [layer.mlp for layer in trunk.layers]
    slots = min(context, config.sliding_window or context)
    return {
        "embed_kernel": batch * matrix_bytes(trunk.embed_tokens) // config.vocab_size,
        "qkv_kernel": sum(matrix_bytes(a.q_proj, a.k_proj, a.v_proj) for a in attention),
        "decode_attention_kernel": batch * config.cache_bytes(slots, model.dtype.itemsize),
        "projection_kernel, o": sum(matrix_bytes(a.o_proj) for a in attention),
        "gate_up_kernel": sum(matrix_bytes(m.gate_proj, m.up_proj) for m in mlp),
        "projection_kernel, down": sum(matrix_bytes(m.down_proj) for m in mlp),
        "head_kernel": matrix_bytes(model.lm_head),
        "sample_kernel": 4 * batch * config.vocab_size,
    }


def matrix_bytes(*layers: torch.nn.Module) -> int:
    """What their matrices take, packed or plain."""
    layers = [layer.embedding if isinstance(layer, TiedOutput) else layer for layer in layers]
    return sum(
        layer.num_rows * layer.row_bytes if isinstance(layer, Packed) else layer.weight.nbytes
        for layer in layers
    )


def operators(events: Sequence, dtype: torch.dtype, steps: int) -> list[dict]:
    """The CPU's operators by name (matrices also by shape), the longest first.

    Time is that in an operator's own code, not in what it calls. Loops that torch.compile made are
    not operators.
    """
    found: dict[str, list] = defaultdict(lambda: [0, 0.0, 0])
    for event in events:
        shapes = [shape for shape in event.input_shapes or () if shape]
        reads = event.name in MATRICES or event.name.startswith("aten::_scaled_dot_product")
        label = f"{event.name} {' '.join('x'.join(map(str, shape)) for shape in shapes)}"
        sums = found[label if event.name in MATRICES else event.name]
        sums[0] += 1
        sums[1] += event.self_cpu_time_total
        sums[2] += (
            dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes) if reads else 0
        )
    rows = []
    for name, (calls, us, moved) in found.items():
        rows.append(_row(name, calls, us, moved // steps or None, steps))
    return sorted(rows, key=lambda row: -row["us"])


def _row(name: str, calls: int, microseconds: float, moved: int | None, steps: int) -> dict:
    us = microseconds / steps
    # a byte a microsecond is 1e6 bytes a second
    rate = round(moved / us / 1e3, 2) if moved and us else None
    return {
        "name": name,
        "calls": round(calls / steps, 1),
        "us": round(us, 2),
        "bytes": moved,
        "GB_per_s": rate,
    }


def show(rows: Sequence[dict], wall: float, least: float) -> None:
    """The table: what takes a thousandth of the time or more, and the sums."""
    total = sum(row["us"] for row in rows) or 1.0
    common.show(f"{'one step':<70}{'calls':>8}{'us':>11}{'share':>8}{'bytes':>12}{'GB/s':>9}")
    for row in rows:
        if row["us"] < total / 1000:
            continue
        moved = format_bytes(row["bytes"]) if row["bytes"] else "-"
        rate = f"{row['GB_per_s']:,.1f}" if row["GB_per_s"] else "-"
        name = row["name"] if len(row["name"]) < 70 else row["name"][:66] + "..."
        common.show(
            f"{name:<70}{row['calls']:>8,.1f}{row['us']:>11,.1f}{row['us'] / total:>8.1%}"
            f"{moved:>12}{rate:>9}"
        )
    common.show(f"{'all of them':<70}{sum(row['calls'] for row in rows):>8,.1f}{total:>11,.1f}")
    common.show(f"{'the whole step, gaps included':<78}{1e6 * wall:>11,.1f}")
    common.show(f"{'reading the weights once at the measured rate':<78}{1e6 * least:>11,.1f}")


if __name__ == "__main__":
    common.run(main)

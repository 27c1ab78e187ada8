"""What one decode step runs: on a GPU its kernels, on a CPU its operators; time, bytes and GB/s of each.

Bytes are the least that the work must move (weights, keys and values, results): what was re-read does not count, so
GB/s far below the machine's is time lost. "-" where the name alone does not tell.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence

import common
import torch
from benchmark_parts import machine, sizes
from benchmark_parts.contestants import GREEDY
from benchmark_parts.sizes import SIZES
from torch.profiler import ProfilerActivity, profile

import mistral
from mistral.checkpoints.load import choose_device
from mistral.memory import format_bytes
from mistral_kernels import open_engine
from mistral_kernels.engines import ENGINES

MATRICES = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mv")


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, "python scripts/profile_step.py --engine kernels --context 4096")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="default: auto")
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=common.DTYPES, help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--size", choices=SIZES, help="of a random model (default: 7b on a GPU, else small)")
    parser.add_argument("--batch-size", type=int, default=1, help="default: 1")
    parser.add_argument("--context", type=int, default=512, help="tokens before the step (default: 512)")
    parser.add_argument("--steps", type=int, default=10, help="the mean of so many (default: 10)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of PyTorch (default: 2)")
    args = parser.parse_args()
    if min(args.batch_size, args.context, args.steps, args.threads) < 1:
        raise ValueError("--batch-size, --context, --steps and --threads must be 1 or more")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    on_gpu = device.type == "cuda"
    dtype = common.DTYPES[args.dtype] if args.dtype else torch.bfloat16 if on_gpu else torch.float32
    model = sizes.make_model(args.size or ("7b" if on_gpu else "small"), device, dtype)
    decoder, note = open_engine(args.engine, model, args.batch_size, args.context + 3 * args.steps + 2)
    print(f"{note}; {machine.facts(device, dtype)['machine']}, {str(dtype).removeprefix('torch.')}, "
          f"batch {args.batch_size}, context {args.context:,}")  # fmt: skip
    bandwidth = machine.read_bandwidth(device)
    print(f"the machine reads {bandwidth / 1e9:,.1f} GB/s (measured: sums over 1 GB)\n")

    decoder.read(torch.randint(3, model.config.vocab_size, (args.batch_size, args.context)).tolist())
    run_steps(decoder, args.steps)  # compiles, records, warms up
    wall = machine.seconds(device, lambda: run_steps(decoder, args.steps)) / args.steps
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], record_shapes=True) as record:
        run_steps(decoder, args.steps)
        machine.synchronize(device)
    known = kernel_bytes(model, args.batch_size, args.context)
    rows = kernels(record.events(), known, args.steps) if on_gpu else operators(record.events(), dtype, args.steps)
    show(rows, wall, sizes.weight_bytes(model) / bandwidth)
    print(json.dumps({"engine": note, "context": args.context, "batch": args.batch_size, "step_s": wall, "rows": rows}))


def run_steps(decoder: mistral.Decoder, n: int) -> None:
    """`n` greedy steps; nothing waits in between."""
    for _ in range(n):
        ids = decoder.step(GREEDY)
    ids.tolist()


def kernels(events: Sequence, known: dict[str, int], steps: int) -> list[dict]:
    """The GPU's kernels by name, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us())
    rows = [_row(name, len(times), sum(times), known.get(name), steps) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row["us"])


def kernel_bytes(model: mistral.Mistral, batch: int, context: int) -> dict[str, int]:
    """What each of our kernels moves in one step, all its calls together."""
    config, item = model.config, model.dtype.itemsize
    D, F, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    heads, held = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    slots = min(context, config.sliding_window or context)
    return {
        "embed_kernel": batch * D * item,
        "qkv_kernel": layers * (heads + 2 * held) * D * item,
        "decode_attention_kernel": batch * config.cache_bytes(slots, item),
        "projection_kernel": layers * (heads + F) * D * item,  # of the attention, and down
        "gate_up_kernel": layers * 2 * F * D * item,
        "head_kernel": config.vocab_size * D * item,
    }


def operators(events: Sequence, dtype: torch.dtype, steps: int) -> list[dict]:
    """The CPU's operators by name (matrices also by shape), the longest first.

    Time is that in an operator's own code, not in what it calls. Loops that torch.compile made are no operators.
    """
    found: dict[str, list] = defaultdict(lambda: [0, 0.0, 0])
    for event in events:
        shapes = [shape for shape in event.input_shapes or () if shape]
        reads = event.name in MATRICES or event.name.startswith("aten::_scaled_dot_product")
        label = f"{event.name} {' '.join('x'.join(map(str, shape)) for shape in shapes)}"
        sums = found[label if event.name in MATRICES else event.name]
        sums[0] += 1
        sums[1] += event.self_cpu_time_total
        sums[2] += dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes) if reads else 0
    rows = [_row(name, calls, us, moved // steps or None, steps) for name, (calls, us, moved) in found.items()]
    return sorted(rows, key=lambda row: -row["us"])


def _row(name: str, calls: int, microseconds: float, moved: int | None, steps: int) -> dict:
    us = microseconds / steps
    rate = round(moved / us / 1e3, 2) if moved and us else None  # a byte a microsecond is 1e6 bytes a second
    return {"name": name, "calls": round(calls / steps, 1), "us": round(us, 2), "bytes": moved, "GB_per_s": rate}


def show(rows: Sequence[dict], wall: float, least: float) -> None:
    """The table: what takes a thousandth of the time or more, and the sums."""
    total = sum(row["us"] for row in rows) or 1.0
    print(f"{'one step':<70}{'calls':>8}{'us':>11}{'share':>8}{'bytes':>12}{'GB/s':>9}")
    for row in rows:
        if row["us"] < total / 1000:
            continue
        moved = format_bytes(row["bytes"]) if row["bytes"] else "-"
        rate = f"{row['GB_per_s']:,.1f}" if row["GB_per_s"] else "-"
        name = row["name"] if len(row["name"]) < 70 else row["name"][:66] + "..."
        print(f"{name:<70}{row['calls']:>8,.1f}{row['us']:>11,.1f}{row['us'] / total:>8.1%}{moved:>12}{rate:>9}")
    print(f"{'all of them':<70}{sum(row['calls'] for row in rows):>8,.1f}{total:>11,.1f}")
    print(f"{'the step, with what lies between them':<78}{1e6 * wall:>11,.1f}")
    print(f"{'reading the weights once at the measured rate':<78}{1e6 * least:>11,.1f}")


if __name__ == "__main__":
    common.run(main)

"""Time and memory of loading a made-up GGUF with the shapes of Hermes-2-Pro-Mistral-7B in Q4_K_M.

The file has 4.4 GB. The last way, "first token", is a process from its start to the first token:
imports, file, engine (`auto`, on a GPU if there is one) and prompt. It is run twice, since the
first time may compile kernels; the second counts.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
from benchmark_parts.gguf_file import write_file

from mistral.files import format_bytes
from mistral.quantization.ggml_types import GGML_TYPES

LAYERS = 32
WIDTH = 4096
MLP = 14336
KV_WIDTH = 1024
VOCABULARY = 32032
# Layers whose attn_v and ffn_down llama.cpp gives Q6_K in a Q4_K_M of 32 layers
FINER = {*range(4), *range(6, 28, 3), *range(28, 32)}
WAYS = ("read", "header", "packed", "bfloat16", "llama.cpp", "first token")

CHILD = """
import sys, time
def kilobytes(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
way, path, warm = sys.argv[1:]
if way == "read":
    import os, torch
    def load(file):
        memory = torch.empty(os.path.getsize(file), dtype=torch.uint8)
        with open(file, "rb") as f:
            f.readinto(memory.numpy())
        return memory
elif way == "llama.cpp":
    from benchmark_parts.llama_cpp_peer import LlamaCpp
    def load(file): return LlamaCpp(file, 512, threads=2, exact=False)
elif way == "header":
    from pathlib import Path
    from mistral.checkpoints.gguf import GgufReader
    def load(file):
        reader = GgufReader(Path(file))
        return reader.tokenizer(reader.config())
else:
    import torch, mistral
    torch.set_num_threads(2)
    dtype = None if way == "packed" else torch.bfloat16
    how = dict(device="cpu", dtype=dtype, packed=way == "packed", sliding_window=4096)
    def load(file): return mistral.load(file, **how)
if way != "llama.cpp":
    load(warm)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from here
before, start, cpu_start = kilobytes("VmRSS"), time.perf_counter(), time.process_time()
kept = load(path)
print(time.perf_counter() - start, time.process_time() - cpu_start, kilobytes("VmHWM") - before)
"""

FIRST_TOKEN = """
import resource, sys, time
import mistral
from mistral_kernels import open_engine
model, tokenizer = mistral.load(sys.argv[1], packed=True, sliding_window=4096)
decoder, note = open_engine("auto", model)
prompt, greedy = tokenizer.encode("one two three"), mistral.Sampling(temperature=0)
next(mistral.generate(decoder, prompt, greedy, max_new_tokens=1))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(time.time() - float(sys.argv[2]), time.process_time(), peak, note)
"""


def main() -> None:
    parser = common.parser(__doc__, "python scripts/benchmark_load.py --layers 32")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help="fewer make a smaller file (default: 32)"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=WAYS,
        help=(
            "default: all that are installed. read: the bytes into new memory and nothing else, "
            "to compare with"
        ),
    )
    args = parser.parse_args()
    if not 1 <= args.layers <= LAYERS:
        raise ValueError(f"--layers must be 1 to {LAYERS}, not {args.layers}")
    if not Path("/proc/self/status").exists():
        raise ValueError("this script reads a process's memory from Linux's /proc")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.Q4_K_M.gguf"
        warm = Path(folder) / "warm.gguf"
        write(path, args.layers)
        write(warm, 1, width=256, mlp=512, kv_width=64)
        common.show(
            f"{path.name}: {format_bytes(path.stat().st_size)}, {args.layers} layers, "
            "just written: in the file cache"
        )
        common.show(
            f"{'':<12}{'seconds':>10}{'CPU seconds':>14}{'peak memory':>14}"
            f"{'stays':>12}{'ratio':>8}"
        )
        for way in args.ways:
            results[way] = (
                first_token(path) if way == "first token" else measure(way, path, warm, args)
            )
    common.show_json({"layers": args.layers, **results})


def measure(way: str, path: Path, warm: Path, args: argparse.Namespace) -> dict[str, float] | None:
    """Load in a process of its own; peak memory is what it took beyond what it had before."""
    result = run_child(way, [CHILD, way, str(path), str(warm)])
    if result is None:
        return None
    seconds, cpu_seconds, peak = map(float, result.split())
    parameters = num_parameters(args.layers)
    size = path.stat().st_size
    stays = {"read": size, "packed": size, "bfloat16": 2 * parameters}.get(way)
    ratio = f"{peak * 1024 / stays:>8.2f}" if stays else ""
    memory = f"{format_bytes(peak * 1024):>14}{format_bytes(stays) if stays else '':>12}{ratio}"
    common.show(f"{way:<12}{seconds:>10.2f}{cpu_seconds:>14.2f}{memory}")
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_bytes": round(peak * 1024),
    }


def first_token(path: Path) -> dict[str, float | str] | None:
    """From the start of a process to its first token; the peak is that of the whole process."""
    for _ in range(2):
        result = run_child("first token", [FIRST_TOKEN, str(path), str(time.time())])
        if result is None:
            return None
    seconds, cpu_seconds, peak, note = result.split(maxsplit=3)
    common.show(
        f"{'first token':<12}{float(seconds):>10.2f}{float(cpu_seconds):>14.2f}"
        f"{format_bytes(int(peak) * 1024):>14}"
    )
    common.show(f"  {note.strip()}")
    rest = {"peak_bytes": int(peak) * 1024, "engine": note.strip()}
    return {
        "seconds": round(float(seconds), 2),
        "cpu_seconds": round(float(cpu_seconds), 2),
        **rest,
    }


def run_child(way: str, arguments: list[str]) -> str | None:
    """What a Python program prints; None, after a line about it, if it fails."""
    here = str(Path(__file__).resolve().parent)  # for benchmark_parts
    paths = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", *arguments],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        common.show(f"{way:<12}not measured: {result.stderr.strip().splitlines()[-1]}")
        return None
    return result.stdout


def num_parameters(layers: int) -> int:
    attention = 2 * WIDTH * (WIDTH + KV_WIDTH)
    return layers * (attention + 3 * WIDTH * MLP + 2 * WIDTH) + 2 * VOCABULARY * WIDTH + WIDTH


def write(
    path: Path, layers: int, width: int = WIDTH, mlp: int = MLP, kv_width: int = KV_WIDTH
) -> None:
    """A file with these shapes and Q4_K_M's types, of random blocks with finite scales."""
    tensors = [
        ("token_embd.weight", (VOCABULARY, width), "Q4_K"),
        ("output.weight", (VOCABULARY, width), "Q6_K"),
    ]
    for i in range(layers):
        fine = "Q6_K" if i in FINER else "Q4_K"
        tensors += [
            (f"blk.{i}.attn_norm.weight", (width,), "F32"),
            (f"blk.{i}.attn_q.weight", (width, width), "Q4_K"),
            (f"blk.{i}.attn_k.weight", (kv_width, width), "Q4_K"),
            (f"blk.{i}.attn_v.weight", (kv_width, width), fine),
            (f"blk.{i}.attn_output.weight", (width, width), "Q4_K"),
            (f"blk.{i}.ffn_norm.weight", (width,), "F32"),
            (f"blk.{i}.ffn_gate.weight", (mlp, width), "Q4_K"),
            (f"blk.{i}.ffn_up.weight", (mlp, width), "Q4_K"),
            (f"blk.{i}.ffn_down.weight", (width, mlp), fine),
        ]
    tensors.append(("output_norm.weight", (width,), "F32"))
    blocks = {kind: random_blocks(kind) for kind in ("F32", "Q4_K", "Q6_K")}
    write_file(path, metadata(layers, width, mlp, kv_width), tensors, blocks)


def random_blocks(kind: str) -> np.ndarray:
    """Some blocks of a type, whose float16 scales are small numbers; vectors are ones."""
    if kind == "F32":
        return np.ones(1, np.float32).view(np.uint8)
    size = next(ggml.block_bytes for ggml in GGML_TYPES.values() if ggml.name == kind)
    blocks = np.random.default_rng(0).integers(0, 256, (4099, size), dtype=np.uint8)
    scale = np.full((4099, 1), 1e-4, np.float16).view(np.uint8)
    for at in (0, 2) if kind == "Q4_K" else (size - 2,):
        blocks[:, at : at + 2] = scale
    return blocks.reshape(-1)


def metadata(layers: int, width: int, mlp: int, kv_width: int) -> dict[str, tuple[str, object]]:
    """Of a Llama of these sizes, with a vocabulary of made-up words."""
    head_dim = 128 if width == WIDTH else 64
    letters = "abcdefghijklmnopqrstuvwxyz"
    # so that every longer word is made of two pieces
    two = [a + b for a in letters for b in letters]
    words = two + [a + b for a in two for b in letters] + [a + b for a in two for b in two]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, *words]
    sizes = {
        "block_count": layers,
        "context_length": 32768,
        "embedding_length": width,
        "feed_forward_length": mlp,
        "attention.head_count": width // head_dim,
        "attention.head_count_kv": kv_width // head_dim,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
    }
    return {
        "general.architecture": ("str", "llama"),
        **{f"llama.{name}": ("u32", size) for name, size in sizes.items()},
        "llama.rope.freq_base": ("f32", 10000.0),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.tokens": ("[str]", pieces[:VOCABULARY]),
        "tokenizer.ggml.scores": ("[f32]", [-float(i) for i in range(VOCABULARY)]),
        "tokenizer.ggml.token_type": ("[i32]", [2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)]),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
    }


if __name__ == "__main__":
    common.run(main)

"""Measure what a packed format costs: the distance of its logits from those in float32.

The distance is the mean Kullback-Leibler divergence KL(float32 || format) over all positions, in
nats, and beside it how often both have the same most likely token. For each format there are
several ways to multiply with it.
"""

import argparse
import ctypes
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
import torch
from demo.dialogues import unseen_request
from torch import Tensor

import mistral
from mistral.chat.formats import encode_chat
from mistral.chat.formats.prompts import tool_prompt
from mistral.checkpoints.gguf_export import export
from mistral.checkpoints.load import choose_device
from mistral.quantization.packed import Packed

PLAIN = "bfloat16"
ROUNDED = {"q8_0": "--quantize q8_0", "q4_0": "--quantize q4_0"}
LLAMA_CPP = (
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_0",
    "Q4_K_M",
    "IQ4_XS",
    "IQ4_NL",
    "Q4_0",
    "Q3_K_M",
    "Q2_K",
)
WAYS = {
    "float32": "the reference, float32",
    "bfloat16": "the reference, bfloat16",
    "kernels": "the kernels, bfloat16 (inputs of packed matrices: float16)",
}

PAGE = """# What packed formats cost

Mean Kullback-Leibler divergence from the logits of {model} in float32, in nats, over {positions} positions of {texts};
in brackets how often the most likely token is the same. Bits are those of the matrices, scales included. "llama.cpp"
formats are the mixtures that its `llama-quantize` makes, without an importance matrix; "--quantize" is this project's
loading.

{table}

{ways}

{remark}This page was written by `python scripts/dev/measure_quantization.py {arguments}` with {versions}.
"""
DEMOS_OWN = (
    "The demo's file has 8 bits a weight already, and float32 here means those: Q8_0 loses "
    "nothing against it.\n\n"
)


class Distance(NamedTuple):
    """From the float32 logits."""

    kl: float
    same: float  # share of positions with the same most likely token

    def __str__(self) -> str:
        return f"{self.kl:.2e} ({self.same:.1%})"


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/dev/measure_quantization.py --page docs/benchmarks/quantization.md"
    )
    parser.add_argument(
        "model", nargs="?", default="demo", help=common.MODEL + "; none: the demo of this package"
    )
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    parser.add_argument(
        "--window", type=common.window, default="auto", help="sliding window, as in generate.py"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a name on the hub")
    parser.add_argument(
        "--formats", nargs="+", choices=(PLAIN, *ROUNDED, *LLAMA_CPP), help="default: all"
    )
    parser.add_argument(
        "--positions", type=int, default=400, help="at least so many (default: 400)"
    )
    parser.add_argument(
        "--text", type=Path, help="a text instead of requests for functions with their answers"
    )
    parser.add_argument(
        "--page", type=Path, help="write the results as a page of the documentation"
    )
    args = parser.parse_args()
    if args.positions < 1:
        raise ValueError("--positions must be 1 or more")
    return args


def main() -> None:
    args = arguments()
    device = choose_device(args.device)
    chosen = args.formats or (PLAIN, *ROUNDED, *LLAMA_CPP)
    common.introduce(args.model)
    options = dict(device=device, sliding_window=args.window, revision=args.revision)
    model, tokenizer = mistral.load(args.model, dtype=torch.float32, **options)
    rows = list(texts(model, tokenizer, args))
    wanted = [logits_of(model, ids) for ids in rows]
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float32.gguf"
        export(model, tokenizer, path, "F32")
        window = model.config.sliding_window
        del model
        for name in chosen:
            common.note(f"{name} ...")
            results.append(measure(name, path, device, window, rows, wanted))
            print(line(results[-1]), flush=True)
    positions = sum(map(len, rows))
    if args.page:
        args.page.write_text(page(args, positions, results), encoding="utf-8")
        common.note(f"wrote {args.page}")
    print(json.dumps({"model": args.model, "positions": positions, "results": results}))


def texts(
    model: mistral.Mistral, tokenizer: mistral.Tokenizer, args: argparse.Namespace
) -> Iterator[list[int]]:
    """Sequences to compare on: requests with words that the demo never saw, and its answers."""
    left = args.positions
    random = Random(0)
    if args.text:
        yield tokenizer.encode(args.text.read_text(encoding="utf-8"))[:left]
        return
    while left > 0:
        tools, request, _ = unseen_request(random)
        messages = [
            {"role": "system", "content": tool_prompt(tools)},
            {"role": "user", "content": request},
        ]
        ids = encode_chat(tokenizer, messages)
        ids += mistral.generate(model, ids, mistral.Sampling(temperature=0), max_new_tokens=60)
        yield ids
        left -= len(ids)


def measure(
    name: str,
    path: Path,
    device: torch.device,
    window: int | None,
    rows: list[list[int]],
    wanted: list[Tensor],
) -> dict:
    """One format, made of the float32 file and multiplied in each of the ways."""
    result = {"format": name, "maker": "llama.cpp" if name in LLAMA_CPP else ROUNDED.get(name, "-")}
    try:
        load = loader(name, path, device, window)
    except (ImportError, ValueError) as error:
        return result | {"failed": f"not measured: {error}"}
    for way in WAYS:
        if way == "kernels" and device.type != "cuda":
            result[way] = "not measured: no GPU"
            continue
        if way == "float32" and name == PLAIN:
            result[way] = "-"
            continue
        try:
            model = load(torch.float32 if way == "float32" else torch.bfloat16)
            result["bits"] = round(bits(model), 2)
            read = one_by_one if way == "kernels" else logits_of
            result[way] = distance(wanted, [read(model, ids) for ids in rows])
        # Triton or a driver may raise anything; the other formats are still measured
        except Exception as error:
            result[way] = f"not measured: {' '.join(str(error).split())[:200]}"
    return result


def loader(
    name: str, path: Path, device: torch.device, window: int | None
) -> Callable[[torch.dtype], mistral.Mistral]:
    """How to load a format in a dtype.

    ImportError without llama.cpp where it is needed; ValueError if it cannot.
    """
    options = dict(device=device, sliding_window=window)
    if name in LLAMA_CPP:
        packed = path.with_name(f"{name}.gguf")
        quantize_by_llama_cpp(path, packed, name)
        return lambda dtype: mistral.load(packed, packed=True, dtype=dtype, **options)[0]
    quantize = name if name in ROUNDED else None
    return lambda dtype: mistral.load(path, quantize=quantize, dtype=dtype, **options)[0]


def quantize_by_llama_cpp(source: Path, to: Path, name: str) -> None:
    """Write a packed file, as `llama-quantize` does. ImportError without llama-cpp-python."""
    try:
        import llama_cpp
    except ImportError:
        raise ImportError("llama-cpp-python is not installed") from None
    silence_llama_cpp()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    options.nthread = torch.get_num_threads()
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(to).encode(), ctypes.byref(options)
    )
    if code:
        raise ValueError(f"llama.cpp could not write {name}")


@functools.cache  # keeps the function, which llama.cpp only points to
def silence_llama_cpp() -> Callable:
    """It tells of every tensor otherwise."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    return silent


@torch.inference_mode()
def logits_of(model: mistral.Mistral, ids: list[int]) -> Tensor:
    """[T, V] in float32, on the CPU."""
    return model(torch.tensor([ids], device=model.device))[0].float().cpu()


@torch.inference_mode()
def one_by_one(model: mistral.Mistral, ids: list[int]) -> Tensor:
    """The same by the kernels, token by token as they generate."""
    from mistral_kernels import Decoder

    decoder = Decoder(model, max_tokens=len(ids) + 1)
    found = []
    for id in ids:
        decoder.prefill([[id]])
        found.append(decoder.logits[0].float().cpu())
    return torch.stack(found)


def distance(wanted: list[Tensor], found: list[Tensor]) -> Distance:
    """Over all positions of all texts."""
    p, q = (torch.cat(rows).double().log_softmax(-1) for rows in (wanted, found))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Distance(max(kl, 0.0), (p.argmax(-1) == q.argmax(-1)).double().mean().item())


def bits(model: mistral.Mistral) -> float:
    """Of a weight of the matrices, on average."""
    layers = [module for module in model.modules() if isinstance(module, Packed)]
    plain = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    size = sum(layer.num_rows * layer.row_bytes for layer in layers) + sum(
        matrix.nbytes for matrix in plain
    )
    weights = sum(
        layer.num_rows * layer.row_bytes // layer.kind.block_bytes * layer.kind.block_weights
        for layer in layers
    )
    return 8 * size / (weights + sum(matrix.numel() for matrix in plain))


def line(result: dict) -> str:
    """A row of the table."""
    cells = [result.get("failed", result.get(way, "")) for way in WAYS]
    return (
        f"| {result['format']} | {result['maker']} | {result.get('bits', '-')} | "
        f"{' | '.join(map(str, cells))} |"
    )


def page(args: argparse.Namespace, positions: int, results: list[dict]) -> str:
    """The results as a page."""
    head = [
        "| format | made by | bits | " + " | ".join(WAYS) + " |",
        "|---|---|---|" + "---|" * len(WAYS),
    ]
    model = "the demo" if args.model == "demo" else f"`{Path(args.model).name}`"
    written = [f"`{name}`: {meaning}." for name, meaning in WAYS.items()]
    return PAGE.format(
        model=model,
        positions=positions,
        texts=f"`{args.text.name}`"
        if args.text
        else "requests for functions and the model's answers to them",
        table="\n".join(head + [line(result) for result in results]),
        ways=" ".join(written),
        remark=DEMOS_OWN if args.model == "demo" else "",
        arguments=" ".join(sys.argv[1:]),
        versions=f"torch {torch.__version__}",
    )


if __name__ == "__main__":
    common.run(main)

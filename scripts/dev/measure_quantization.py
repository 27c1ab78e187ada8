"""Measure what a packed format costs: the distance of its logits from those in float32.

The distance is the mean Kullback-Leibler divergence KL(float32 || format) over all positions, in
nats, and beside it how often both have the same most likely token. For each format there are
several ways to multiply with it. A quantized checkpoint is unpacked first: float32 then means the
values that its blocks have.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, benchmark_parts/, demo/

import common
import torch
from benchmark_parts import llama_cpp_peer, machine, mixtures
from benchmark_parts.report import write_section
from demo.dialogues import unseen_request
from torch import Tensor

import mistral
from mistral.chat.formats import encode_chat
from mistral.chat.formats.prompts import tool_prompt
from mistral.checkpoints.assemble import Parts, rounded_types
from mistral.checkpoints.load import choose_device
from mistral.checkpoints.names import EMBEDDING
from mistral.quantization.ggml_types import GgmlType
from mistral.quantization.packed import Packed
from mistral.quantization.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]
PLAIN = "bfloat16"
ROUNDED = {"q8_0": "--quantize q8_0", "q4_0": "--quantize q4_0"}
WAYS = {
    "float32": "the reference, float32",
    "bfloat16": "the reference, bfloat16",
    "kernels": "the kernels, bfloat16 (inputs of packed matrices: float16)",
}

TEXTS = ("LICENSE", "README.md", "mistral/model.py")  # for every model but the demo
SECTION = """{positions} positions of {texts}.

{table}

{remarks}

Written by `python scripts/dev/measure_quantization.py {arguments}` with {versions}.
"""
UNPACKED = {
    "demo": "The file has Q8_0 already, and float32 here means those values: Q8_0 loses nothing.",
    "smollm2": "The file has Q4_1 already, and Q8_0 for the embedding: float32 here means those "
    "values, not the weights as published, and the formats round them a second time.",
}
NARROW = (
    "Rows of {width} weights are not whole blocks of 256. There llama.cpp replaces a type by one "
    "with blocks of 32 (Q4_K by Q5_0, Q5_K by Q5_1, Q6_K by Q8_0, Q2_K and Q3_K by Q4_0, IQ4_XS by "
    "IQ4_NL), so most formats have more bits here than in a 7B."
)


class Distance(NamedTuple):
    """From the float32 logits."""

    kl: float
    same: float  # share of positions with the same most likely token

    def __str__(self) -> str:
        return f"{self.kl:.2e} ({self.same:.1%})"


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        "python scripts/dev/measure_quantization.py smollm2 --page docs/benchmarks/quantization.md",
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
        "--formats", nargs="+", choices=(PLAIN, *ROUNDED, *mixtures.MOST), help="default: all"
    )
    parser.add_argument(
        "--positions", type=int, default=400, help="at least so many (default: 400)"
    )
    parser.add_argument(
        "--text",
        type=common.path,
        nargs="+",
        help="files to compare on, in equal parts (default: for the demo requests for functions "
        f"and its answers, for others {', '.join(TEXTS)} of this project)",
    )
    parser.add_argument(
        "--page", type=common.path, help="write the results into the model's section of this page"
    )
    args = parser.parse_args()
    if args.positions < 1:
        raise ValueError("--positions must be 1 or more")
    if args.page:
        common.check_output(args.page)
    if not args.text and args.model != "demo":
        args.text = [ROOT / name for name in TEXTS]
    return args


def main() -> None:
    args = arguments()
    device = choose_device(args.device)
    chosen = args.formats or (PLAIN, *ROUNDED, *mixtures.MOST)
    common.introduce(args.model)
    options = dict(device=device, sliding_window=args.window, revision=args.revision)
    model, tokenizer = mistral.load(args.model, dtype=torch.float32, **options)
    rows = list(texts(model, tokenizer, args))
    wanted = [logits_of(model, ids) for ids in rows]
    results: list[dict] = []
    for name in chosen:
        common.note(f"{name} ...")
        results.append(measure(name, model, rows, wanted))
        common.show(line(results[-1]))
    positions = sum(map(len, rows))
    if args.page:
        heading = args.model if args.model in UNPACKED else Path(args.model).name
        write_section(args.page, heading, section(args, model.config, positions, results))
        common.note(f"wrote {args.page}")
    common.show_json({"model": args.model, "positions": positions, "results": results})


def texts(
    model: mistral.Mistral, tokenizer: mistral.Tokenizer, args: argparse.Namespace
) -> Iterator[list[int]]:
    """Sequences to compare on: parts of files, or requests and the demo's answers to them."""
    left = args.positions
    random = Random(0)
    if args.text:
        share = -(-args.positions // len(args.text))
        for path in args.text:
            yield tokenizer.encode(path.read_text(encoding="utf-8"))[:share]
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


def measure(name: str, model: mistral.Mistral, rows: list[list[int]], wanted: list[Tensor]) -> dict:
    """One format, made of the float32 model and multiplied in each of the ways."""
    maker = "llama.cpp" if name in mixtures.MOST else ROUNDED.get(name, "-")
    result = {"format": name, "maker": maker}
    try:
        blocks = pack(model, name)
    except (ImportError, ValueError) as error:
        return result | {"failed": f"not measured: {error}"}
    for way in WAYS:
        if way == "kernels" and model.device.type != "cuda":
            result[way] = "not measured: no GPU"
            continue
        if way == "float32" and name == PLAIN:
            result[way] = "-"
            continue
        try:
            packed = assemble(model, blocks, torch.float32 if way == "float32" else torch.bfloat16)
            result["bits"] = round(bits(packed), 2)
            read = one_by_one if way == "kernels" else logits_of
            result[way] = distance(wanted, [read(packed, ids) for ids in rows])
        # Triton or a driver may raise anything; the other formats are still measured
        except Exception as error:
            result[way] = f"not measured: {' '.join(str(error).split())[:200]}"
    return result


def pack(model: mistral.Mistral, name: str) -> dict[str, tuple[Tensor, GgmlType]]:
    """The blocks of all matrices in a format, by parameter; none for bfloat16.

    Raises ImportError without llama.cpp if it is needed; ValueError for rows that are not whole
    blocks.
    """
    if name == PLAIN:
        return {}
    weights = {name: values for name, values in model.named_parameters() if values.dim() == 2}
    if name in ROUNDED:
        kinds = rounded_types(Path("the model"), weights, name)
        return {n: (quantize(weights[n], kind, model.device), kind) for n, kind in kinds.items()}
    packed = {}
    for parameter, values in weights.items():
        kind = mixtures.fitting(llama_cpp_type(model.config, parameter, name), values.shape[1])
        packed[parameter] = llama_cpp_peer.quantize(values.cpu(), kind).to(model.device), kind
    return packed


def llama_cpp_type(config: mistral.Config, parameter: str, format: str) -> GgmlType:
    """The type that `llama-quantize` gives a matrix whose rows are whole blocks."""
    parts = parameter.split(".")  # model.layers.0.self_attn.q_proj.weight
    layer = int(parts[2]) if "layers" in parts else 0
    tied = config.tie_word_embeddings and parameter == EMBEDDING
    return mixtures.kind_of(
        format,
        "lm_head" if tied else parts[-2],
        layer,
        config.num_hidden_layers,
        config.num_attention_heads // config.num_key_value_heads,
    )


def assemble(
    model: mistral.Mistral, blocks: Mapping[str, tuple[Tensor, GgmlType]], dtype: torch.dtype
) -> mistral.Mistral:
    """The model with these blocks, and its other parameters in `dtype`."""
    parts = Parts(model.config, model.device, dtype)
    for name, values in model.named_parameters():
        if name in blocks:
            parts.add_blocks(name, *blocks[name])
        else:
            parts.add(name, values.to(dtype))
    return parts.model()


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


def section(
    args: argparse.Namespace, config: mistral.Config, positions: int, results: list[dict]
) -> str:
    """The results as a section of the page."""
    head = [
        "| format | made by | bits | " + " | ".join(WAYS) + " |",
        "|---|---|---|" + "---|" * len(WAYS),
    ]
    remarks = [" ".join(f"`{name}`: {meaning}." for name, meaning in WAYS.items())]
    if args.model in UNPACKED:
        remarks.append(UNPACKED[args.model])
    if config.hidden_size % 256:
        remarks.append(NARROW.format(width=config.hidden_size))
    read = "requests for functions and the model's answers to them"
    if args.text:
        read = ", ".join(f"`{path.name}`" for path in args.text)
    return SECTION.format(
        positions=positions,
        texts=read,
        table="\n".join(head + [line(result) for result in results]),
        remarks="\n\n".join(remarks),
        arguments=" ".join(sys.argv[1:]),
        versions=f"torch {torch.__version__}, xllamacpp {machine.version('xllamacpp')}",
    )


if __name__ == "__main__":
    common.run(main)

"""What is in a checkpoint, without loading it: config, tensors, memory it will need, tokenizer."""

import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch

from mistral.cache import cache_slots
from mistral.checkpoints import consolidated, gguf, hugging_face
from mistral.checkpoints.assemble import dtype_name
from mistral.checkpoints.gguf_config import read_config
from mistral.checkpoints.gguf_tokenizer import read_tokenizer
from mistral.checkpoints.load import local_path
from mistral.checkpoints.safetensors_files import StoredTensor, stored_tensors
from mistral.config import Config
from mistral.engine.memory import format_bytes
from mistral.tokenizer import Tokenizer

SAMPLE = 'Hello, world! {"naïve": [1, 234]}\n'


def main() -> None:
    parser = common.parser(__doc__, "python scripts/inspect_checkpoint.py ~/Mistral-7B-v0.1")
    parser.add_argument("model", nargs="?", default="demo", help=common.MODEL + "; none: the demo")
    parser.add_argument("--revision", help="branch, tag or commit of a name on the hub")
    parser.add_argument(
        "--all", action="store_true", help="list every tensor, not one line for all layers"
    )
    args = parser.parse_args()
    common.introduce(args.model)
    path = local_path(args.model, args.revision)
    if path.is_file():
        inspect_gguf(path, args.all)
    elif (path / "config.json").exists():
        inspect_hugging_face(path, args.all)
    elif (path / "params.json").exists():
        inspect_consolidated(path, args.all)
    else:
        raise ValueError(
            f"{path} has no config.json (Hugging Face's layout) and no params.json (Mistral's own)"
        )


def inspect_hugging_face(path: Path, every: bool) -> None:
    config = hugging_face.read_config(path)
    print_config(config)
    print_tensors({name: row(tensor) for name, tensor in stored_tensors(path).items()}, every)
    print_memory(config)
    hugging_face.checked_tensors(path, config)
    print_tokenizer(hugging_face.read_tokenizer(path, config), config)


def inspect_consolidated(path: Path, every: bool) -> None:
    tensors, tokenizer = consolidated.read_tensors(path), consolidated.read_tokenizer(path)
    config = consolidated.read_config(path, tensors, tokenizer)
    print_config(config)
    print_tensors({name: row(tensor, path) for name, tensor in tensors.items()}, every)
    print_memory(config)
    consolidated.checked_tensors(path, tensors, config)
    print_tokenizer(tokenizer, config)


def inspect_gguf(path: Path, every: bool) -> None:
    header = gguf.read_files(path)
    config = read_config(path, header)
    print_config(config)
    print_metadata(header)
    rows = {
        n: Row(t.path.name, t.shape, t.kind.name, t.num_bytes) for n, t in header.tensors.items()
    }
    print_tensors(rows, every)
    print_memory(config, packed=sum(tensor.num_bytes for tensor in header.tensors.values()))
    gguf.checked_tensors(path, header, config)
    print_tokenizer(read_tokenizer(path, header, config), config)


class Row(NamedTuple):
    """A tensor on disk, as the table shows it."""

    file: str
    shape: tuple[int, ...]
    kind: str
    size: int


def row(tensor: StoredTensor | torch.Tensor, folder: Path | None = None) -> Row:
    if isinstance(tensor, StoredTensor):
        return Row(tensor.path.name, tensor.shape, dtype_name(tensor.dtype), tensor.num_bytes)
    return Row(consolidated.PICKLE, tuple(tensor.shape), dtype_name(tensor.dtype), tensor.nbytes)


def print_config(config: Config) -> None:
    heading(f"config: {config.num_parameters:,} parameters")
    for name, value in vars(config).items():
        print(f"  {name:<24} {value}")


def print_metadata(header: gguf.GgufHeader) -> None:
    heading(f"metadata: {len(header.metadata)} keys")
    for key, value in header.metadata.items():
        text = f"{len(value):,} entries" if isinstance(value, (list, np.ndarray)) else repr(value)
        print(f"  {key:<42} {text if len(text) < 70 else text[:66] + ' ...'}")


def print_tensors(stored: dict[str, Row], every: bool) -> None:
    files = sorted({tensor.file for tensor in stored.values()})
    size = sum(tensor.size for tensor in stored.values())
    heading(
        f"tensors: {len(stored)} in {len(files)} file{'s' * (len(files) > 1)}, {format_bytes(size)}"
    )
    rows: dict[tuple, list[Row]] = defaultdict(list)
    for name, tensor in stored.items():
        name = name if every else re.sub(r"^((?:model\.)?(?:layers|blk))\.\d+\.", r"\1.*.", name)
        rows[name, tensor.shape, tensor.kind].append(tensor)
    for (name, shape, kind), tensors in rows.items():
        count = f"{len(tensors)} x " if len(tensors) > 1 else ""
        total = format_bytes(sum(tensor.size for tensor in tensors))
        print(f"  {name:<52} {count + str(list(shape)):>22} {kind:>9} {total:>10}")
    by_kind: dict[str, int] = defaultdict(int)
    for tensor in stored.values():
        by_kind[tensor.kind] += tensor.size
    print("  in all " + ", ".join(f"{kind} {format_bytes(size)}" for kind, size in by_kind.items()))
    for file in files if len(files) > 1 else ():
        print(
            f"  {file}: "
            f"{format_bytes(sum(tensor.size for tensor in stored.values() if tensor.file == file))}"
        )


def print_memory(config: Config, packed: int | None = None) -> None:
    window = config.sliding_window
    heading("memory: weights, and the key/value cache of one row by length of the text")
    lengths = sorted({n for n in (1024, 4096, 8192, 32768) if n < config.max_position_embeddings})
    lengths.append(config.max_position_embeddings)
    print(f"  {'':<10}{'weights':>12}" + "".join(f"{n:>12,}" for n in lengths))
    for dtype in (torch.float32, torch.bfloat16):
        slots = [cache_slots(window, n) for n in lengths]
        caches = "".join(
            f"{format_bytes(config.cache_bytes(n, dtype.itemsize)):>12}" for n in slots
        )
        weights = format_bytes(config.num_parameters * dtype.itemsize)
        print(f"  {dtype_name(dtype):<10}{weights:>12}{caches}")
    if packed is not None:
        print(
            f"  {'packed':<10}{format_bytes(packed):>12}   (as in the file, with --packed; the "
            f"cache as above)"
        )
    rolls = (
        f"the cache stops growing at the window of {window:,}"
        if window
        else "no window: the cache grows with the text"
    )
    print(f"  ({rolls})")


def print_tokenizer(tokenizer: Tokenizer, config: Config) -> None:
    heading(f"tokenizer: {tokenizer.vocab_size:,} ids for {config.vocab_size:,} rows of the model")
    print(f"  begin {tokenizer.bos_id}, stop {', '.join(map(str, tokenizer.stop_ids)) or 'none'}")
    control = [f"{id} {tokenizer.control_text(id)}" for id in sorted(tokenizer.control_ids)]
    shown = control[:8] + [f"... {len(control) - 8} more"] * (len(control) > 8)
    print(f"  control tokens: {', '.join(shown)}")
    ids = tokenizer.encode(SAMPLE)
    print(f"  {SAMPLE!r} -> {ids}")
    print(f"  and back -> {tokenizer.decode(ids)!r}")


def heading(text: str) -> None:
    print(f"\n{text}")


if __name__ == "__main__":
    common.run(main)

"""What is in a checkpoint, without loading it: config, tensors, memory it will need, tokenizer."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import common
import numpy as np
import torch

from mistral.cache import cache_slots
from mistral.checkpoints.assemble import match_tensors
from mistral.checkpoints.gguf import GgufReader
from mistral.checkpoints.paths import local_path, open_reader
from mistral.checkpoints.reader import StoredTensor, dtype_name
from mistral.config import Config
from mistral.files import format_bytes
from mistral.printable import on_one_line
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
    reader = open_reader(local_path(args.model, args.revision))
    config = reader.config()
    if note := reader.window_note(config):
        common.note(f"note: {note}")
    tensors = reader.tensors()
    packed = None
    print_config(config)
    if isinstance(reader, GgufReader):
        print_metadata(reader.header.metadata)
        packed = sum(tensor.num_bytes for tensor in tensors.values())
    print_tensors(tensors, args.all)
    print_memory(config, packed)
    match_tensors(reader, config)
    print_tokenizer(reader.tokenizer(config), config)


def print_config(config: Config) -> None:
    heading(f"config: {config.num_parameters:,} parameters")
    for name, value in vars(config).items():
        common.show(f"  {name:<24} {value}")


def print_metadata(metadata: dict[str, Any]) -> None:
    heading(f"metadata: {len(metadata)} keys")
    for key, value in metadata.items():
        text = f"{len(value):,} entries" if isinstance(value, (list, np.ndarray)) else repr(value)
        common.show(f"  {on_one_line(key):<42} {text if len(text) < 70 else text[:66] + ' ...'}")


def print_tensors(stored: Mapping[str, StoredTensor], every: bool) -> None:
    sizes: dict[str, int] = defaultdict(int)  # by file
    for tensor in stored.values():
        sizes[tensor.path.name] += tensor.num_bytes
    files = f"{len(sizes)} file{'s' * (len(sizes) > 1)}"
    heading(f"tensors: {len(stored)} in {files}, {format_bytes(sum(sizes.values()))}")
    rows: dict[tuple, list[StoredTensor]] = defaultdict(list)
    by_type: dict[str, int] = defaultdict(int)
    for name, tensor in stored.items():
        name = on_one_line(name)
        name = name if every else re.sub(r"^((?:model\.)?(?:layers|blk))\.\d+\.", r"\1.*.", name)
        type_name = on_one_line(tensor.type_name)
        rows[name, tensor.shape, type_name].append(tensor)
        by_type[type_name] += tensor.num_bytes
    for (name, shape, type_name), tensors in rows.items():
        count = f"{len(tensors)} x " if len(tensors) > 1 else ""
        total = format_bytes(sum(tensor.num_bytes for tensor in tensors))
        common.show(f"  {name:<52} {count + str(list(shape)):>22} {type_name:>9} {total:>10}")
    common.show("  in all " + ", ".join(f"{name} {format_bytes(n)}" for name, n in by_type.items()))
    if len(sizes) > 1:
        for file, size in sorted(sizes.items()):
            common.show(f"  {on_one_line(file)}: {format_bytes(size)}")


def print_memory(config: Config, packed: int | None = None) -> None:
    window = config.sliding_window
    heading("memory: weights, and the key/value cache of one row by length of the text")
    lengths = sorted({n for n in (1024, 4096, 8192, 32768) if n < config.max_position_embeddings})
    lengths.append(config.max_position_embeddings)
    common.show(f"  {'':<10}{'weights':>12}" + "".join(f"{n:>12,}" for n in lengths))
    for dtype in (torch.float32, torch.bfloat16):
        slots = [cache_slots(window, n) for n in lengths]
        caches = "".join(
            f"{format_bytes(config.cache_bytes(n, dtype.itemsize)):>12}" for n in slots
        )
        weights = format_bytes(config.num_parameters * dtype.itemsize)
        common.show(f"  {dtype_name(dtype):<10}{weights:>12}{caches}")
    if packed is not None:
        common.show(
            f"  {'packed':<10}{format_bytes(packed):>12}   "
            "(as in the file, with --packed; the cache as above)"
        )
    rolls = (
        f"the cache stops growing at the window of {window:,}"
        if window
        else "no window: the cache grows with the text"
    )
    common.show(f"  ({rolls})")


def print_tokenizer(tokenizer: Tokenizer, config: Config) -> None:
    heading(f"tokenizer: {tokenizer.vocab_size:,} ids for {config.vocab_size:,} rows of the model")
    common.show(
        f"  begin {tokenizer.bos_id}, stop {', '.join(map(str, tokenizer.stop_ids)) or 'none'}"
    )
    control = [
        f"{id} {on_one_line(tokenizer.control_text(id))}" for id in sorted(tokenizer.control_ids)
    ]
    shown = control[:8] + [f"... {len(control) - 8} more"] * (len(control) > 8)
    common.show(f"  control tokens: {', '.join(shown)}")
    ids = tokenizer.encode(SAMPLE)
    common.show(f"  {SAMPLE!r} -> {ids}")
    common.show(f"  and back -> {tokenizer.decode(ids)!r}")


def heading(text: str) -> None:
    common.show(f"\n{text}")


if __name__ == "__main__":
    common.run(main)

"""What is in a checkpoint, without loading it: config, tensors, memory it will need, tokenizer."""

import re
from collections import defaultdict

import common
import torch
from random_checkpoint import checkpoint

from mistral.cache import cache_slots
from mistral.checkpoints.assemble import dtype_name
from mistral.checkpoints.hugging_face import checked_tensors, read_config, read_tokenizer
from mistral.checkpoints.safetensors_files import StoredTensor, stored_tensors
from mistral.config import Config
from mistral.memory import format_bytes
from mistral.tokenizer import Tokenizer

SAMPLE = 'Hello, world! {"naïve": [1, 234]}\n'


def main() -> None:
    parser = common.parser(__doc__, "python scripts/inspect_checkpoint.py ~/Mistral-7B-v0.1")
    parser.add_argument("model", nargs="?", help="folder of a checkpoint; none: a small random one is made")
    parser.add_argument("--all", action="store_true", help="list every tensor, not one line for all layers")
    args = parser.parse_args()
    with checkpoint(args.model) as folder:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        config = read_config(folder)
        print_config(config)
        print_tensors(stored_tensors(folder), args.all)
        print_memory(config)
        checked_tensors(folder, config)
        print_tokenizer(read_tokenizer(folder, config), config)


def print_config(config: Config) -> None:
    heading(f"config: {config.num_parameters:,} parameters")
    for name, value in vars(config).items():
        print(f"  {name:<24} {value}")


def print_tensors(stored: dict[str, StoredTensor], every: bool) -> None:
    files = sorted({tensor.path.name for tensor in stored.values()})
    size = sum(tensor.num_bytes for tensor in stored.values())
    heading(f"tensors: {len(stored)} in {len(files)} file{'s' * (len(files) > 1)}, {format_bytes(size)}")
    rows: dict[tuple, list[StoredTensor]] = defaultdict(list)
    for name, tensor in stored.items():
        name = name if every else re.sub(r"\.layers\.\d+\.", ".layers.*.", name)
        rows[name, tensor.shape, tensor.dtype].append(tensor)
    for (name, shape, dtype), tensors in rows.items():
        count = f"{len(tensors)} x " if len(tensors) > 1 else ""
        total = format_bytes(sum(tensor.num_bytes for tensor in tensors))
        print(f"  {name:<52} {count + str(list(shape)):>22} {dtype_name(dtype):>9} {total:>10}")


def print_memory(config: Config) -> None:
    window = config.sliding_window
    heading("memory: weights, and the key/value cache of one row by length of the text")
    lengths = sorted({n for n in (1024, 4096, 8192, 32768) if n < config.max_position_embeddings})
    lengths.append(config.max_position_embeddings)
    print(f"  {'':<10}{'weights':>12}" + "".join(f"{n:>12,}" for n in lengths))
    for dtype in (torch.float32, torch.bfloat16):
        slots = [cache_slots(window, n) for n in lengths]
        caches = "".join(f"{format_bytes(config.cache_bytes(n, dtype.itemsize)):>12}" for n in slots)
        print(f"  {dtype_name(dtype):<10}{format_bytes(config.num_parameters * dtype.itemsize):>12}{caches}")
    rolls = (
        f"the cache stops growing at the window of {window:,}" if window else "no window: the cache grows with the text"
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

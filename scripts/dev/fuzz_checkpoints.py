"""Damage a checkpoint's files in many ways: each must load or be refused with a clear error."""

import argparse
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common

import mistral
from mistral.files import format_bytes

# Files are damaged up to here: in the bulk of their weights every byte is a valid value.
HEADER_BYTES = 50_000


def main() -> int:
    parser = common.parser(
        __doc__, "python scripts/dev/fuzz_checkpoints.py tests/data/small tests/data/gguf/q8_0.gguf"
    )
    parser.add_argument(
        "model", nargs="+", type=Path, help="small checkpoints: folders or GGUF files"
    )
    parser.add_argument("--cases", type=int, default=1000, help="for each file (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    wrong = 0
    for source in args.model:
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        for file in files:
            if file.suffix in (
                ".json",
                ".safetensors",
                ".model",
                ".gguf",
                ".pth",
                ".bin",
                ".jinja",
            ):
                wrong += fuzz(source, file, args)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{wrong} of the cases ended in another error; peak memory {format_bytes(memory)}")
    return 1 if wrong else 0


def fuzz(source: Path, file: Path, args: argparse.Namespace) -> int:
    """Run all cases of one file. Returns how many ended in neither a model nor CheckpointError."""
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    original = file.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        copy = target = Path(folder) / source.name
        if source.is_dir():
            shutil.copytree(source, copy)
            target = copy / file.name
        for case in range(args.cases):
            generator = random.Random(f"{args.seed} {file.name} {case}")
            if file.suffix == ".json" and case % 2:
                target.write_text(json.dumps(changed(json.loads(original), generator)))
            else:
                target.write_bytes(damage(original, generator))
            start = time.perf_counter()
            try:
                _, tokenizer = mistral.load(
                    copy, device="cpu", packed=file.suffix == ".gguf" and case % 2 == 0
                )
                tokenizer.decode(tokenizer.encode("some <|im_start|> text", special=True))
                outcomes["loaded"] += 1
            except mistral.CheckpointError:
                outcomes["refused"] += 1
            except Exception as error:
                outcomes["wrong"] += 1
                print(f"{file.name}, case {case}: {type(error).__name__}: {error}")
            slowest = max(slowest, time.perf_counter() - start)
    print(f"{file.name}: {dict(outcomes)}, slowest {slowest:.2f} s", flush=True)
    return outcomes["wrong"]


def damage(original: bytes, generator: random.Random) -> bytes:
    """One of: truncated, bytes changed, bytes removed, bytes inserted, a number made huge."""
    data = bytearray(original)
    at = generator.randrange(min(len(data), HEADER_BYTES))
    match generator.randrange(5):
        case 0:
            del data[generator.randrange(len(data)) :]
        case 1:
            for _ in range(generator.choice([1, 4, 30])):
                data[generator.randrange(min(len(data), HEADER_BYTES))] = generator.randrange(256)
        case 2:
            del data[at : at + generator.randrange(1, 40)]
        case 3:
            data[at:at] = generator.randbytes(generator.randrange(1, 9))
        case 4:
            width = generator.choice([1, 2, 4, 8])
            data[at : at + width] = generator.choice([b"\xff", b"\x7f", b"\x00"]) * width
    return bytes(data)


# What takes the place of a value in a JSON file
STRANGE = [
    *(None, True, False, 0, -1, 1, 2**31, 10**28, 0.5, 1e308, float("nan"), float("inf")),
    *("", "a", "\ud800", "\0", "<s>", "../x", "x" * 10_000, "(a+)+$"),
    *([], {}, [[]], [None], {"": None}, [1] * 1000, {"type": "yarn", "factor": 2.0}),
]


def changed(value: object, generator: random.Random) -> object:
    """The value of a JSON file with one of its inner values replaced, doubled or removed."""
    if isinstance(value, (dict, list)) and value and generator.random() < 0.9:
        copy = value.copy()
        keys = list(copy) if isinstance(copy, dict) else range(len(copy))
        # Prefer the first and last keys: one at random is nearly always an entry of a vocabulary.
        key = generator.choice([*keys[:5], *keys[-5:], generator.choice(keys)])
        if generator.random() < 0.1:
            del copy[key]
        elif generator.random() < 0.1 and isinstance(copy, list):
            copy.append(copy[key])
        else:
            copy[key] = changed(copy[key], generator)
        return copy
    return generator.choice(STRANGE)


if __name__ == "__main__":
    common.run(main)

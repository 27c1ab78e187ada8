"""Measure what a table of tokens a second does not show of the CPU engine: starts, memory, a soak.

Each result is a line of JSON. A start is a process of its own: the first one finds nothing
compiled, the second one everything; the last one is the eager engine, for its memory. Memory is
what the process has after each stage, in bytes: `anonymous` is its own, `files` are mapped
libraries, which processes share. The soak generates tokens in short texts, alone and then beside
other work.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, benchmark_parts/

import common
import torch
from benchmark_parts import machine

import mistral
from mistral.engine.base import Engine
from mistral_kernels import open_engine

_ROOM = 600  # tokens of the cache
_TURN = 100  # tokens of a text of the soak
_GREEDY = mistral.Sampling(temperature=0)

_START = """
import json, sys, time
start = time.perf_counter()
name, threads, engine, room = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
stages = {}
def stage(label):
    lines = open("/proc/self/status").read().splitlines()
    kept = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if "Rss" in line}
    sizes = {"anonymous": kept["RssAnon"], "files": kept["RssFile"]}
    stages[label] = {"s": round(time.perf_counter() - start, 3)} | sizes
import torch
stage("torch")
import mistral
from mistral_kernels import open_engine
from mistral.quantization.packed import Packed
torch.set_num_threads(threads)
model, tokenizer = mistral.load(name, packed=True)
packed = sum(m.blocks.nbytes for m in model.modules() if isinstance(m, Packed))
stage("loaded")
said = []
decoder, line = open_engine(engine, model, 1, room, say=said.append)
stage("opened")
ids = tokenizer.encode("The history of the printing press began")
next(mistral.generate(decoder, ids, mistral.Sampling(temperature=0), max_new_tokens=1))
stage("first token")
cache = decoder._cache.keys.nbytes + decoder._cache.values.nbytes
print(json.dumps({"engine": line, "said": said, "weights": packed, "cache": cache} | stages))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a GGUF file, or smollm2")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--steps", type=int, default=2000, help="of the soak (default: 2000)")
    parser.add_argument(
        "--busy", type=int, default=1, help="cores that are busy in its second half (default: 1)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        for label, engine in (("first", "cpu"), ("second", "cpu"), ("eager", "eager")):
            common.show_json({"start": label} | start(args, engine, cache))
    torch.set_num_threads(args.threads)
    model, tokenizer = mistral.load(args.model, packed=True)
    decoder, line = open_engine("cpu", model, 1, _ROOM)
    ids = tokenizer.encode("The history of the printing press began")
    common.show_json({"soak": "alone", "engine": line} | soak(decoder, ids, args.steps))
    machine.keep_busy(args.busy)
    common.show_json({"soak": f"{args.busy} busy"} | soak(decoder, ids, args.steps))


def start(args: argparse.Namespace, engine: str, cache: str) -> dict:
    """The stages of a process up to its first token."""
    command = [sys.executable, "-W", "ignore", "-c", _START]
    command += [args.model, str(args.threads), engine, str(_ROOM)]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def soak(decoder: Engine, ids: list[int], steps: int) -> dict:
    """Tokens a second of a long run, over all and of its slowest and quickest text."""
    turns = []
    for _ in range(0, steps, _TURN):
        decoder.rewind(decoder.lengths)
        decoder.prefill([ids])
        begin = time.perf_counter()
        for _ in range(_TURN):
            decoder.step(_GREEDY).tolist()
        turns.append(time.perf_counter() - begin)
    rates = {"mean": _TURN * len(turns) / sum(turns)}
    rates |= {"slowest": _TURN / max(turns), "quickest": _TURN / min(turns)}
    return {"steps": _TURN * len(turns)} | {name: round(rate, 1) for name, rate in rates.items()}


if __name__ == "__main__":
    common.run(main)

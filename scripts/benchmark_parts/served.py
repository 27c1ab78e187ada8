"""Servers that are measured, each in a process of its own: ours, and llama-server."""

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.request import urlopen

SERVERS = ("ours", "llama-server")
_PATIENCE = 300  # seconds for loading a model, and for compiling its engine


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, and how.

    engine  of ours, a name of `mistral_kernels.open_engine`
    packed  whether ours keeps the file's blocks
    room    tokens of a slot
    """

    path: Path
    engine: str
    packed: bool
    slots: int
    room: int
    threads: int


@contextmanager
def served(name: str, serving: Serving) -> Iterator[str]:
    """The address of a server that is ready. RuntimeError if it does not start."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    run = _serve_ours if name == "ours" else _serve_llama_cpp
    process = spawn.Process(target=run, args=(serving, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        address = ours.recv()
        _wait(address)
        yield address
    except EOFError:
        raise RuntimeError(f"{name} did not start") from None
    finally:
        process.terminate()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _wait(address: str) -> None:
    """Until the server has loaded its model."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            with urlopen(f"{address}/health", timeout=10):
                return
        except OSError:  # 503, or it does not listen yet
            if time.monotonic() > deadline:
                raise RuntimeError(f"{address} was not ready in {_PATIENCE} s") from None
        time.sleep(0.05)


# In the other process


def _serve_ours(serving: Serving, told: Connection) -> None:
    from mistral.server.app import App, Settings
    from mistral.server.run import serve

    def say(line: str) -> None:
        if line.startswith("serving at "):
            told.send(line.removeprefix("serving at "))

    serve(App(partial(_open, serving), Settings(drain=0)), "127.0.0.1", 0, say)


def _open(serving: Serving) -> "Service":  # noqa: F821
    import torch

    import mistral
    from mistral.chat.answer import SLACK
    from mistral.server.service import Service
    from mistral_kernels import open_engine

    torch.set_num_threads(serving.threads)
    dtype = None if serving.packed else torch.float32
    model, tokenizer = mistral.load(
        serving.path, device="cpu", dtype=dtype, packed=serving.packed, sliding_window=None
    )
    engine, _ = open_engine(serving.engine, model, serving.slots, serving.room, slack=SLACK)
    return Service(engine, tokenizer)


def _serve_llama_cpp(serving: Serving, told: Connection) -> None:
    from benchmark_parts.llama_server import LlamaServer

    with LlamaServer(
        serving.path, slots=serving.slots, room=serving.room, threads=serving.threads
    ) as server:
        told.send(server.address)
        while True:
            time.sleep(60)

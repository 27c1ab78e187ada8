"""Compile kernels in all cores at once, while the weights are made.

Triton compiles a kernel at its first launch, one after the other, some seconds each. Here a process
that pretends to have the GPU (pretended_gpu.py) runs the decoders of all cases once, which tells
what they launch, and compiles that in as many processes as there are cores. The results are in
Triton's cache on disk ($TRITON_CACHE_DIR, or ~/.triton/cache), under the keys that Triton itself
makes; the decoders that run on the GPU find them there.
"""

import contextlib
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmark_parts import sizes
from benchmark_parts.sizes import Case

_LAYERS = 2  # a mixture has a layer of each of its types


class WarmUp:
    """A process that compiles; begun by the constructor.

    formats  of the weights: a model of each
    engines  of kernels and kernels-pdl
    """

    def __init__(
        self,
        size: str,
        dtype: torch.dtype,
        formats: Sequence[str],
        cases: Sequence[Case],
        engines: Sequence[str],
        capability: tuple[int, int],
    ):
        request = {
            "size": size,
            "dtype": str(dtype).removeprefix("torch."),
            "formats": list(formats),
            "cases": [asdict(case) for case in cases],
            "early": [name == "kernels-pdl" for name in engines],
            "capability": 10 * capability[0] + capability[1],
        }
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(request)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, seconds: float) -> str:
        """A line about what was compiled, or why not; then kernels are compiled when they run.

        seconds  it is ended after so many; infinity: never
        """
        later = "the rest is compiled when it is first launched"
        try:
            out, errors = self._process.communicate(
                timeout=None if seconds == math.inf else seconds
            )
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return f"compiling ahead took more than {seconds:.0f} s: {later}"
        took = time.monotonic() - self._began
        if self._process.returncode:
            reason = (errors.strip().splitlines() or ["no reason given"])[-1]
            return f"nothing was compiled ahead: {reason}"
        done = json.loads(out.splitlines()[-1])
        line = f"compiled {done['compiled']} kernels ahead in {took:.0f} s"
        if done["failed"]:
            line += f"; not {', '.join(done['failed'])}"
        return line


def plan(model: Any, cases: Sequence[Case], early: Sequence[bool]) -> None:
    """Do all that the engines do in these cases, on a GPU that is not there."""
    from mistral import Sampling
    from mistral_kernels.decode.matvec import MAX_BATCH
    from mistral_kernels.decoder import Decoder
    from mistral_kernels.trial import TOKENS, try_out

    greedy = Sampling(temperature=0.0)
    for case in cases:
        for pdl in early:
            if pdl and case.batch > MAX_BATCH:
                continue  # more rows are never launched early
            room = case.context + case.tokens + 2
            decoder = Decoder(model, case.batch, room, pdl=pdl)
            try_out(decoder, torch.zeros(TOKENS, model.config.vocab_size, device="cuda"))
            for _ in range(2):  # the second time by CUDA graphs
                decoder.rewind(decoder.lengths)
                decoder.prefill([[3] * case.context] * case.batch)
                decoder.step(greedy)
                decoder.step(greedy)
            if case.chunk > 1:
                decoder.verify([3] * case.chunk)


def compile_all(variants: Sequence[Any]) -> list[str]:
    """Compile them in as many processes as there are cores; returns what failed, and why."""
    # Forked processes have everything imported; they only compile.
    context = multiprocessing.get_context("fork")
    _Compiling.variants = variants
    with context.Pool(min(os.cpu_count() or 1, max(len(variants), 1))) as pool:
        problems = pool.map(_compile, range(len(variants)), chunksize=1)
    return [problem for problem in problems if problem]


class _Compiling:
    """What the forked processes share."""

    variants: Sequence[Any] = ()


def _compile(number: int) -> str:
    """Compile one kernel, and its launcher if the driver's library is there."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaLauncher

    knobs.runtime.jit_cache_hook = None  # of the pretended GPU, which compiles nothing
    variant = _Compiling.variants[number]
    try:
        kernel = variant.function.preload(variant.data)
    except Exception as error:  # of any kind: the GPU's own attempt will tell
        return f"{variant.function.__name__}: {type(error).__name__}"
    with contextlib.suppress(Exception):  # without a driver there is no launch either
        CudaLauncher(kernel.src, kernel.metadata)
    return ""


def main() -> None:
    """Of the process that `WarmUp` starts; the argument is its request, the last line JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from benchmark_parts import pretended_gpu

    request = json.loads(sys.argv[1])
    recording = pretended_gpu.install(request["capability"], compiles=False)
    dtype = getattr(torch, request["dtype"])
    layers = min(_LAYERS, sizes.SIZES[request["size"]]["num_hidden_layers"])
    for format in request["formats"]:
        model = sizes.make_model(request["size"], torch.device("cuda", 0), dtype, format, layers)
        plan(model, [Case(**case) for case in request["cases"]], request["early"])
    variants = list(recording.variants.values())
    failed = compile_all(variants)
    print(json.dumps({"compiled": len(variants) - len(failed), "failed": failed}))


if __name__ == "__main__":
    main()

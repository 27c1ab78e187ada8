"""The engine for a CPU: packed weights are multiplied as they are, by kernels that numba compiles.

In the process that decodes:

    decoder       the engine
    weights       a model's weights as tiles
    pages         their memory, in pages of 2 MB
    tiles         ggml's blocks in the order of the products
    widening      blocks of other types as signed bytes
    buffers       the memory of a step
    layout        what a step's threads share: records, sizes
    helpers       threads that run jobs, and that a process waits for when it ends
    team          those that help with a step
    prompt        a forward pass over many tokens
    linear        a prompt's product, shared by threads
    activations   float32 rounded to int16: the memory for it
    pool          Python threads that share work; how many PyTorch's own are
    compiled      kernels by name, from a cache on disk or from workers

What numba compiles, in a process of its own:

    worker        that process
    catalog       the kernels, by name
    compiler      from a Python function to object code
    emit          how numba gets vectors: LLVM IR
    lanes         vectors of 8 or 16 lanes, and their operations
    halves        float16 to float32 and back
    wide          words of two tiles
    shared        counters of several threads, records, and calls by address
    encodings     32 columns of a tile, times activations or unpacked
    products      packed weights times one row of activations, and the loop over tiles
    groups        32 columns of two tiles unpacked
    microkernel   the innermost part of a product with several rows
    several       packed weights times several rows of activations
    plain         products of matrices that are not packed
    rounding      activations to int16
    exponential   e^x and SwiGLU
    attention     one token and the positions in its window
    phases        counters that threads share a step by
    work          what they do in a layer
    step          one forward pass for up to 32 tokens
    rows          what a prompt does with its rows

Importing this needs no numba.
"""

import importlib.util
from typing import Any

__all__ = ["Decoder"]


def __getattr__(name: str) -> Any:
    # Only now: the decoder imports llvmlite, which comes with numba.
    if name == "Decoder":
        if importlib.util.find_spec("numba") is None:
            raise ModuleNotFoundError(
                "mistral_kernels.cpu.Decoder needs numba: pip install numba", name="numba"
            )
        from mistral_kernels.cpu.decoder import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

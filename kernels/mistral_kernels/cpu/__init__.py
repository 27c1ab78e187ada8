"""The engine for a CPU: packed weights are multiplied as they are, by kernels that numba compiles.

    lanes         vectors as values of numba: LLVM IR
    wide          vectors of twice the size
    shared        counters of several threads, and calls by address: LLVM IR
    tiles         ggml's blocks in the order of the products
    encodings     32 columns of a tile, times activations or unpacked
    products      packed weights times one row of activations, and the loop over tiles
    groups        32 columns of two tiles unpacked
    several       packed weights times several rows of activations
    linear        a prompt's product, shared by threads
    plain         products of matrices that are not packed
    activations   float32 rounded to int16
    exponential   e^x and SwiGLU
    attention     one token and the positions in its window
    team          threads that share a step
    layout        what they share
    work          what they do in a layer
    step          one forward pass for up to 32 tokens
    weights       a model's weights as tiles
    buffers       the memory of a step
    decoder       the engine
    compiled      numba's compiler with a cache on disk

Importing this needs no numba.
"""

from typing import Any

__all__ = ["Decoder"]


def __getattr__(name: str) -> Any:
    # Only now: the decoder imports numba.
    if name == "Decoder":
        try:
            from mistral_kernels.cpu.decoder import Decoder
        except ModuleNotFoundError as error:
            if error.name not in ("numba", "llvmlite"):
                raise
            raise ModuleNotFoundError(
                "mistral_kernels.cpu.Decoder needs numba: pip install numba", name="numba"
            ) from None
        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

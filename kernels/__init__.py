"""Mistral's decode step in Triton, fused. The reference is the package `mistral`; the doors are the same.

Importing this needs neither a GPU nor Triton.
"""

from typing import Any

from mistral_kernels.engines import open_engine

__all__ = ["Decoder", "open_engine"]


def __getattr__(name: str) -> Any:
    # Only now: the decoder imports Triton.
    if name == "Decoder":
        from mistral_kernels.decoder import Decoder

        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

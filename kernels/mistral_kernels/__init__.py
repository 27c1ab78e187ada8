"""What the package `mistral` computes, in fused Triton kernels for one GPU.

`Decoder` has the methods of `mistral.Decoder`; `open_engine` chooses between the engines. Importing
this needs neither a GPU nor Triton.
"""

from typing import Any

from mistral_kernels.engines import open_engine

__all__ = ["Decoder", "open_engine"]


def __getattr__(name: str) -> Any:
    # Only now: the decoder imports Triton.
    if name == "Decoder":
        try:
            from mistral_kernels.decoder import Decoder
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ModuleNotFoundError(
                "mistral_kernels.Decoder needs Triton: pip install triton", name="triton"
            ) from None
        return Decoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

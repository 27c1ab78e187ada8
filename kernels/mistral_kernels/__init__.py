"""What the package `mistral` computes, in fused Triton kernels for one GPU.

`Decoder` has the methods of `mistral.Decoder`; `open_engine` chooses between the engines. Importing
this needs neither a GPU nor Triton.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_kernels.engines import open_engine

__all__ = ["Decoder", "open_engine"]


def __getattr__(name: str) -> Any:
    # Only now: the engines import PyTorch, which a process that compiles for a CPU does not need.
    if name == "open_engine":
        from mistral_kernels.engines import open_engine

        return open_engine
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

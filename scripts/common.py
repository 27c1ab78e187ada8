"""What the scripts share: the model's arguments, and ending in one clear line instead of a traceback."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable

# Ctrl-C in the seconds that the imports below take ends a script as quietly as later on; `run` restores the usual way.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch  # noqa: E402

import mistral  # noqa: E402
from mistral.memory import format_bytes  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> None:
        """Say what is wrong with the arguments, and exit with 2."""
        self.exit(2, f"error: {message}; --help lists the options\n")


def parser(description: str, example: str) -> Parser:
    """A parser whose --help ends with an example."""
    return Parser(
        description=description, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


MODEL = "a checkpoint's folder, a GGUF file, or owner/repo on the hub (owner/repo:Q4_K_M for one of its GGUFs)"


def add_model_arguments(to: argparse.ArgumentParser, optional: bool = True) -> None:
    """MODEL, --device, --dtype, --window, --packed, --revision."""
    if optional:
        to.add_argument("model", nargs="?", help=MODEL + "; none: a small random one is made")
    else:
        to.add_argument("model", help=MODEL)
    to.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    to.add_argument("--dtype", choices=DTYPES, help="default: float32 on the CPU, else the checkpoint's")
    to.add_argument(
        "--window",
        type=window,
        default="auto",
        help="sliding window: a number of tokens, none, or auto: what the checkpoint says (default)",
    )
    to.add_argument("--packed", action="store_true", help="keep a quantised GGUF packed in memory: small, and slower")
    to.add_argument("--revision", help="branch, tag or commit of a name on the hub")


def window(text: str) -> int | None | str:
    """'auto', 'none' or a number, for argparse."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, none, or a number of tokens")
    return int(text)


def load(arguments: argparse.Namespace, source: str) -> tuple[mistral.Mistral, mistral.Tokenizer]:
    """`mistral.load` with the arguments of `add_model_arguments`."""
    return mistral.load(
        source,
        device=arguments.device,
        dtype=DTYPES.get(arguments.dtype),
        packed=arguments.packed,
        sliding_window=arguments.window,
        revision=arguments.revision,
    )


def note(text: str) -> None:
    """One line for the person, on stderr, so that stdout holds nothing but the result."""
    print(text, file=sys.stderr, flush=True)


def peak_memory(device: torch.device) -> str:
    """The most memory that was in use: of the GPU's by PyTorch, else of the process."""
    if device.type == "cuda":
        return format_bytes(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return format_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main function and exit with its code; expected errors become one line and exit code 1."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = lambda message, *_: note(f"note: {message}")
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
        note("stopped")
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except (mistral.MistralError, ValueError, OSError, OverflowError) as error:
        code = 1
        note(f"error: {' '.join(str(error).split())}")
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        code = 1
        wanted = str(error).splitlines()[0].split("DefaultCPUAllocator: ")[-1]
        note(f"error: out of memory: {wanted}; a shorter text or a --dtype of fewer bytes needs less")
    sys.exit(code)

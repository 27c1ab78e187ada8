"""The standard streams of a script, which may be closed, full, or unable to show a character.

Everything that a script says passes through here: results to stdout (`show`, `show_text`), one line
about the work to stderr (`note`). A style, such as "dim" or "bold cyan", is applied by rich, and on
a terminal only; NO_COLOR and TERM=dumb turn it off. The streams are repaired on import, before the
libraries, which take seconds and memory, are imported.
"""

import atexit
import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
from types import TracebackType
from typing import Any, TextIO

_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "unable to allocate",
    "unable to mmap",
    "failed to map segment",
    "can't start new thread",
    "bad_alloc",
    "out of memory",
)


_exit_code: int | str | None = 1  # unless `finish` says another one


class _Notes(io.TextIOWrapper):
    """Standard error. What it cannot write is lost, and the work continues."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _open_closed_streams() -> None:
    """Open 0, 1 and 2 if they are closed: the next file would have that number otherwise.

    Input is at its end then, writing to stdout is an error, and notes are lost.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _end_in_one_line(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Report an error while importing: a library is missing, or does not fit into memory."""
    global _exit_code
    if isinstance(error, KeyboardInterrupt):
        _exit_code = 130
        return
    reason = " ".join(str(error).split()) or kind.__name__
    if is_out_of_memory(error):
        print(f"error: the libraries do not fit into memory: {reason}", file=sys.stderr)
    elif isinstance(error, ImportError):
        print(f"error: a library cannot be imported: {reason}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def _leave_daemons() -> None:
    """End the process at once if threads are still at work that nothing waits for.

    A model that is being loaded, a tool that hangs: Python would end such a thread in the middle of
    PyTorch's C++ code, and the process would abort.
    """
    if not any(thread.daemon for thread in threading.enumerate()):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or full
            stream.flush()
    os._exit(_exit_code if isinstance(_exit_code, int) else bool(_exit_code))


def _prepare() -> None:
    atexit.register(_leave_daemons)  # the first that is registered is called last
    _open_closed_streams()
    # A console that cannot show a character shows "?", and the output continues.
    sys.stdout.reconfigure(errors="replace")
    encoding = sys.stderr.encoding
    sys.stderr = sys.__stderr__ = _Notes(
        sys.stderr.detach(), encoding=encoding, errors="replace", line_buffering=True
    )
    # Until `common.run` is called, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = _end_in_one_line


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, or no address space (ulimit -v), left."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY)


if sys.stderr in (None, sys.__stderr__):  # not in a test, which has streams of its own
    _prepare()

from mistral.printable import on_one_line, printable, printable_json  # noqa: E402


class OutputError(OSError):
    """Standard output is closed, or what it leads to is full."""


def show(text: str = "", end: str = "\n", style: str | None = None) -> None:
    """A result on stdout, with controls as escapes: a file must not command the terminal."""
    _write(styled(printable(text), style, sys.stdout) + end)


def show_json(value: Any, indent: int | None = None) -> None:
    """A value as JSON on stdout, equal to what it was on every console."""
    text = printable_json(value, indent)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent)
    _write(text + "\n")


def show_text(piece: str) -> None:
    """A piece of the text that is the result: a pipe or a file gets it as it is."""
    _write(printable(piece) if sys.stdout.isatty() else piece)


def _write(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _output_error(error) from error


def _output_error(error: OSError) -> OutputError:
    reason = "it is closed" if error.errno == errno.EBADF else error.strerror
    return OutputError(f"cannot write to standard output: {reason}")


def note(text: str, style: str | None = None) -> None:
    """One line for the person, on stderr, so that stdout holds nothing but the result."""
    print(styled(on_one_line(text), style, sys.stderr), file=sys.stderr, flush=True)


def styled(text: str, style: str | None, stream: TextIO) -> str:
    """The text with the escape sequences of a style, if the stream is a terminal that has colours.

    text  printable, as `printable` returns it: rich passes it on as it is
    """
    if style is None or not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:  # the extra `chat` has it
        return text
    painter = Console(file=stream)
    if painter.legacy_windows:  # shows escape sequences as text
        return text
    with painter.capture() as painted:
        # An object, not a string: brackets in it are no markup of rich.
        painter.print(Text(text, style), end="", soft_wrap=True)
    return painted.get()


def compiling(done: int, total: int, name: str) -> None:
    """Progress of the CPU engine's first start: one line that changes, or two in a log."""
    text = f"compiled {done} of {total}"
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done in (total // 2, total):
        note(text)


def finish(code: int | str | None) -> int | str | None:
    """Write the rest of the output; returns the code to exit with, another one if that fails."""
    global _exit_code
    _exit_code = _flush(code)
    return _exit_code


def _flush(code: int | str | None) -> int | str | None:
    try:
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has ended
        code = 141
    except OSError as error:
        if not code:
            note(f"error: {_output_error(error)}")
        code = code or 1
    # Python writes the rest once more when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code

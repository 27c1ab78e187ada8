"""What the person types: messages of one or more lines, and answers to yes-or-no questions.

Once readline is imported, `input` is a line editor; without it a terminal cuts lines at 4,095
bytes. GNU readline also reads a bracketed paste: the terminal marks where it begins and ends, so
that its newlines do not end the message. libedit (Python on macOS) and Windows do not have this;
there, three quotes enclose a text of several lines.
"""

import os
import re
import sys

import console

try:
    import readline
except ImportError:  # on Windows
    readline = None

PROMPT = "> "
CONTINUED = "... "
_QUOTES = '"""'


def read_message() -> str | None:
    """A message, perhaps of several lines; "" for nothing, None at the end of the input.

    What is pasted is one message. A line that ends with a backslash continues in the next one, and
    lines of three quotes enclose a longer text. Ctrl-C drops what was typed.
    """
    lines: list[str] = []
    try:
        line = _ask(PROMPT)
        if line.strip() == _QUOTES:
            while (line := _ask(CONTINUED)).strip() != _QUOTES:
                lines.append(line)
            return "\n".join(lines)
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = _ask(CONTINUED)
        return "\n".join([*lines, line]).strip()
    except EOFError:
        if sys.stdin.isatty():
            console.show()  # Ctrl-D ends no line
        return "\n".join(lines) if lines else None
    except UnicodeDecodeError as error:
        encoding = error.encoding.upper()
        console.note(f"error: the input is not valid {encoding}: {error}", style="red")
        return ""
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        console.show()
        console.note("Ctrl-D or /quit leaves", style="dim")
        return ""


def confirm(question: str) -> bool:
    """Whether the person agrees. True without a terminal: a file of commands means what it says."""
    if not sys.stdin.isatty():
        return True
    if readline:
        readline.set_auto_history(False)
    try:
        return _ask(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        console.show()
        return False
    finally:
        if readline:
            readline.set_auto_history(True)


def _ask(prompt: str) -> str:
    """The next line, or what was pasted; a prompt is for a terminal only."""
    if not sys.stdin.isatty():
        return input()
    if readline and "GNU" in (readline.__doc__ or "") and os.environ.get("TERM") != "dumb":
        readline.parse_and_bind("set enable-bracketed-paste on")  # off unless asked for, in Python
    return input(_without_width(console.styled(prompt, "bold cyan", sys.stdout)))


def _without_width(prompt: str) -> str:
    """The prompt with its escape sequences marked, so that readline does not count their width."""
    if readline is None:
        return prompt
    return re.sub(r"\x1b\[[\d;]*m", lambda found: f"\x01{found[0]}\x02", prompt)

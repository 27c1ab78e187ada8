"""How an answer appears: its text as it comes, calls and results on lines of their own."""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator

import console

from mistral.chat import Conversation, events
from mistral.printable import on_one_line, printable_json

# How each event that has a message begins its line, and the style of it.
_MESSAGES = {
    events.Error: ("error", "red"),
    events.Altered: ("note", "yellow"),
    events.Unfinished: ("unknown", "red"),
}
_ENDS = {
    "length": "cut off at --max-new-tokens",
    "max_rounds": "ended at --max-rounds",
    "repeated_call": "ended: the same call failed twice",
}
_MOST_LINES = 3  # of the terminal, for a call or a result


def show_answer(conversation: Conversation, answer: Iterator[events.Event]) -> None:
    """Print the answer as it comes, and then, in a note, what it took.

    KeyboardInterrupt, after the note, if Ctrl-C ended it; the conversation keeps what was written.
    """
    written = conversation.tokens_written
    saved = conversation.tokens_saved
    start = time.perf_counter()
    shown = _Shown()
    try:
        with contextlib.closing(answer):  # its part of the answer is in the conversation then
            for event in answer:
                shown.add(event)
    except KeyboardInterrupt:
        shown.end = "stopped"
    finally:
        shown.end_line()
    parts = [_speed(conversation.tokens_written - written, start, shown)]
    if saved := conversation.tokens_saved - saved:
        parts.append(f"{saved} of them without asking the model")
    parts += _room(conversation)
    if shown.end:
        parts.append(shown.end)
    console.note(f"[{', '.join(parts)}]", style="dim")
    if shown.end == "stopped":
        raise KeyboardInterrupt


class _Shown:
    """What is on the screen of an answer.

    first  when its first text came; None before that, and once it has calls, whose time counts
    end    how it ended, for the person; "" if it ended by itself
    """

    def __init__(self):
        self.first: float | None = None
        self.end = ""
        self._has_calls = False
        self._within_line = False

    def add(self, event: events.Event) -> None:
        """Show one event."""
        match event:
            case events.Text():
                if self.first is None and not self._has_calls:
                    self.first = time.perf_counter()
                console.show(event.text, end="")
                self._within_line = not event.text.endswith("\n")
            case events.Call():
                self.first = None
                self._has_calls = True
                self._line("call", f"{event.name}({printable_json(event.arguments)})", "yellow")
            case events.Result():
                self._line("result", printable_json(event.content), "green")
            case events.End():
                self.end = _ENDS.get(event.reason, "")
            case events.Error() | events.Altered() | events.Unfinished():
                label, style = _MESSAGES[type(event)]
                self._line(label, event.message, style)

    def end_line(self) -> None:
        """Begin a new line, unless this is the beginning of one."""
        if self._within_line:
            console.show()
        self._within_line = False

    def _line(self, label: str, text: str, style: str) -> None:
        self.end_line()
        console.show(shortened(f"  {label:<8}{on_one_line(text)}"), style=style)


def shortened(line: str) -> str:
    """A long line without its end, on a terminal; it says how much that was."""
    most = _MOST_LINES * shutil.get_terminal_size().columns
    if len(line) <= most or not sys.stdout.isatty():
        return line
    left_out = f" ... {len(line):,} more characters"  # not fewer digits than will be shown
    kept = line[: most - len(left_out)]
    return f"{kept} ... {len(line) - len(kept):,} more characters"


def _speed(written: int, start: float, shown: _Shown) -> str:
    """How many tokens, and how fast: a rate for text alone, the whole time for one with calls."""
    end = time.perf_counter()
    count = f"{written} token{'s' if written != 1 else ''}"
    if shown.first is None or written < 2:
        return f"{count} in {end - start:.1f} s"
    return f"{count}, {(written - 1) / (end - shown.first):.1f} tokens/s"


def _room(conversation: Conversation) -> Iterator[str]:
    """What has left the window; without a window, that the cache is nearly full."""
    length = conversation.tokens_held
    window = conversation.decoder.config.sliding_window
    limit = conversation.decoder.limit
    if window and length > window:
        yield f"{length - window:,} have left the window"
    elif not window and length > 3 * limit / 4:
        yield f"{length:,} of {limit:,} tokens of the conversation"

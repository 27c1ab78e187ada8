"""An answer's text, split into text and function calls, as a whole or while it is being written.

A call is a block: `<tool_call>`, an object with a name and arguments, `</tool_call>`.

- A block ends at a tag outside of strings and brackets: its own `</tool_call>` or the next
  `<tool_call>`. It may also end with the text, and a tag that is cut off there belongs to it.
- The content of a block is parsed by `read_literals`: JSON, Python's literals, or a mixture.
- A block that cannot be parsed is one error. It ends at the first tag inside it, even one in a
  string, or else with the text; the text after it is parsed as usual.
- Whitespace next to a block belongs to the block, and texts on both sides of one are joined by a
  newline. All other text is kept as it is, including a `</tool_call>` that closes nothing.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mistral.chat.events import Call, Error, Event, Span, Text
from mistral.chat.formats.call_objects import call_of, written_arguments
from mistral.chat.formats.literals import read_literals

_OPEN = "<tool_call>"
_CLOSE = "</tool_call>"
_SPACE = " \t\r\n"
_BRACKETS = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}

_TAG = re.compile(f"{_OPEN}|{_CLOSE}")
_BETWEEN = re.compile(r"[ \t\r\n,]*+")
_PLAIN = re.compile(r"[\s\w:,.+-]*+")  # a value's characters outside of strings and brackets
_STRING = {q: re.compile(rf"[^{q}\\]*+(?:\\.[^{q}\\]*+)*+", re.DOTALL) for q in "\"'"}


@dataclass(frozen=True)
class Reply:
    """A model's answer.

    text    outside of calls
    calls   in their order
    errors  of calls that cannot be parsed
    """

    text: str
    calls: list[Call]
    errors: list[Error]

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Reply":
        """The answer that all events of one stream make up."""
        events = list(events)
        return cls(
            text="".join(event.text for event in events if isinstance(event, Text)),
            calls=[event for event in events if isinstance(event, Call)],
            errors=[event for event in events if isinstance(event, Error)],
        )


def parse_tool_calls(text: str) -> Reply:
    """Text, calls and errors of a whole answer. No text makes it raise; see `ToolCallStream`."""
    stream = ToolCallStream()
    return Reply.of(stream.feed(text) + stream.finish())


class ToolCallStream:
    """Text, calls and errors of an answer as it comes: they do not depend on how it was cut.

    Feed it only text that the model wrote: anybody may have written a call in a prompt. JSON
    outside of `<tool_call>` is text: it may well be the answer.

    Text is held back if it could be the beginning of a tag, and whitespace if it could belong to
    a call. Time is linear in the text. Only `feed` after `finish` raises (ValueError).
    """

    def __init__(self):
        self._outside = _Outside()
        self._events: list[Event] = []  # not yet returned
        self._step = self._read_text
        self._finished = False
        # A window of the text
        self._window = ""
        self._offset = 0  # of the window in the whole text
        self._at = 0  # how much of the window has been read
        # The block that is being read; its content is `_earlier` and the window from `_start`
        self._begin = 0  # of its tag in the whole text
        self._earlier: list[str] = []
        self._start = 0
        self._depth = 0  # open brackets
        self._quote = ""  # that opened the string; "": outside of strings

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends within a string of a call."""
        return self._step == self._read_block and self._quote != ""

    def feed(self, piece: str) -> list[Event]:
        """The events that are certain after one more piece of text (of any length)."""
        if self._finished:
            raise ValueError("this stream is finished: create a ToolCallStream for each answer")
        return self._read(piece)

    def finish(self) -> list[Event]:
        """The events that only the end of the text makes certain."""
        if self._finished:
            return []
        self._finished = True
        return self._read("", final=True)

    def _read(self, piece: str, final: bool = False) -> list[Event]:
        if self._step != self._read_text:
            # Joining a long block piece by piece would be quadratic: it is joined once, at its end.
            self._earlier.append(self._window[self._start : self._at])
            self._start = 0
        self._offset += self._at
        self._window = self._window[self._at :] + piece
        self._at = 0
        while self._step(final):
            pass
        events = self._events
        self._events = []
        return events

    # Each step reads the window from `_at`, and returns False if it needs more text.

    def _read_text(self, final: bool) -> bool:
        """Read to the next block."""
        found = self._window.find(_OPEN, self._at)
        end = found
        if found < 0:
            end = len(self._window) - (0 if final else _begun(self._window, _OPEN))
        self._say(self._outside.feed(self._window[self._at : end]))
        self._at = end
        if found < 0:
            self._say(self._outside.finish() if final else "")
            return False
        self._outside.block()
        self._begin = self._offset + found
        self._earlier = []
        self._at = found + len(_OPEN)
        self._start = self._at
        self._depth = 0
        self._quote = ""
        self._step = self._read_block
        return True

    def _read_block(self, final: bool) -> bool:
        """Read to the first tag outside of strings and brackets; give up when none can come."""
        # 1. Inside brackets: read to the end of the value.
        if self._depth:
            self._read_value()
            unread = len(self._window) - self._at  # 1: perhaps a backslash before its character
            if self._depth and (final or unread > 1):
                return self._give_up()
            return not self._depth
        # 2. Outside: a tag ends the block, a bracket opens the next value.
        self._at = _BETWEEN.match(self._window, self._at).end()
        rest = self._window[self._at : self._at + len(_CLOSE)]
        if rest == _CLOSE:
            return self._end_block(self._at + len(_CLOSE))
        if rest.startswith(_OPEN):
            return self._end_block(self._at)
        if _OPEN.startswith(rest) or _CLOSE.startswith(rest):
            return final and self._end_block(len(self._window))
        if _BRACKETS.get(rest[0]) != 1:
            return self._give_up()
        self._at += 1
        self._depth = 1
        return True

    def _read_value(self) -> None:
        """Read to the end of the value or of the window, or to a character that no value has."""
        window = self._window
        at = self._at
        while self._depth:
            inside = _STRING[self._quote] if self._quote else _PLAIN
            at = inside.match(window, at).end()
            char = window[at : at + 1]
            if self._quote:
                if char != self._quote:
                    break
                self._quote = ""
            elif char in _STRING:
                self._quote = char
            elif char in _BRACKETS:
                self._depth += _BRACKETS[char]
            else:
                break
            at += 1
        self._at = at

    def _skip_block(self, final: bool) -> bool:
        """Read to the next tag, in a string or not."""
        tag = _TAG.search(self._window, self._at)
        if tag or final:
            self._at = tag.start() if tag else len(self._window)
            return self._end_block(tag.end() if tag and tag[0] == _CLOSE else self._at)
        self._at = len(self._window) - _begun(self._window, _OPEN, _CLOSE)
        return False

    def _end_block(self, end: int) -> bool:
        """Parse the block, whose content has been read; it ends at `end` in the window."""
        content = "".join(self._earlier) + self._window[self._start : self._at]
        source = _OPEN + content + self._window[self._at : end]
        span = (self._begin, self._offset + end)
        try:
            values = read_literals(content)
        except ValueError as error:
            if self._step == self._read_block:
                return self._give_up()
            self._events.append(Error(str(error), span, source))
        else:
            self._events.append(_call_or_error(values, span, source))
        self._at = end
        self._step = self._read_text
        return True

    def _give_up(self) -> bool:
        """Return to the beginning of a block that cannot be parsed, and look for the first tag."""
        # If that tag is in a string, the text after it is read again, and perhaps once more. Time
        # stays linear: two readings that began at different tags are never both outside of strings,
        # both in "..." or both in '...', because a quote never takes two states to one. So there
        # are three at most.
        if before := "".join(self._earlier):
            self._window = before + self._window
            self._earlier = []
            self._offset -= len(before)
        self._at = self._start
        self._step = self._skip_block
        return True

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Text(text))


class _Outside:
    """The text outside of blocks, without the whitespace next to them, joined by newlines."""

    def __init__(self):
        self._spaces: list[str] = []  # held back
        self._said = False
        self._after_block = False

    def feed(self, text: str) -> str:
        visible = text.rstrip(_SPACE)
        if not visible:
            self._spaces.append(text)
            return ""
        said = "".join(self._spaces) + visible
        self._spaces = [text[len(visible) :]]
        if self._after_block:
            said = ("\n" if self._said else "") + said.lstrip(_SPACE)
        self._said = True
        self._after_block = False
        return said

    def block(self) -> None:
        """Note that a block is here."""
        self._after_block = True

    def finish(self) -> str:
        return "" if self._after_block else "".join(self._spaces)


def _call_or_error(values: list[Any], span: Span, source: str) -> Call | Error:
    """The call in a block whose content is `values`."""
    if len(values) > 1:
        message = f"{len(values)} values in one <tool_call>: each call needs its own tags"
        return Error(message, span, source)
    try:
        name, arguments = call_of(values[0])
    except ValueError as error:
        return Error(str(error), span, source)
    try:
        written, _ = written_arguments(source, source.find("{"))
    except (ValueError, RecursionError):  # not JSON, but what was meant is known
        written = None
    return Call(name, arguments, span, written=written)


def _begun(text: str, *tags: str) -> int:
    """How many characters at the end of the text could be the beginning of a tag."""
    return max((n for tag in tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)

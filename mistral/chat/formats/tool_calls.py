"""What a model wrote, taken apart into text and function calls, as a whole or while it is being
written.

A call is a block: `<tool_call>`, an object with a name and arguments, `</tool_call>`.

- A block ends at a tag that stands outside of strings and brackets: its own `</tool_call>` or the
  next `<tool_call>`. It may also end with the text, and a tag that is cut off there belongs to it.
- What is in a block is read by `read_literals`: JSON, Python's literals, or a mixture.
- A block that cannot be read is one error. It ends at the first tag inside it, even one in a
  string, or else with the text; what stands behind it is read as usual.
- Whitespace next to a block belongs to the block, and texts on both sides of one are joined by a
  newline. All other text is kept as it is, a `</tool_call>` that closes nothing included.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mistral.chat.events import Call, Error, Event, Span, Text
from mistral.chat.formats.call_objects import (
    HEAD,
    call_of,
    could_begin_untagged,
    flattened,
    untagged_calls,
)
from mistral.chat.formats.literals import read_literals

ToolCall = Call  # what a `Reply` holds
OPEN, CLOSE = "<tool_call>", "</tool_call>"
SPACE = " \t\r\n"
BRACKETS = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}

_TAG = re.compile(f"{OPEN}|{CLOSE}")
_BETWEEN = re.compile(r"[ \t\r\n,]*+")
_PLAIN = re.compile(r"[\s\w:,.+-]*+")  # what a value has outside of strings and brackets
_STRING = {q: re.compile(rf"[^{q}\\]*+(?:\\.[^{q}\\]*+)*+", re.DOTALL) for q in "\"'"}


@dataclass(frozen=True)
class Reply:
    """A model's answer: the text outside of calls, the calls in their order, and what could not be
    read.
    """

    text: str
    calls: list[Call]
    errors: list[Error]

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Reply":
        """The answer that these events tell, all of them from one stream."""
        events = list(events)
        return cls(
            text="".join(event.text for event in events if isinstance(event, Text)),
            calls=[event for event in events if isinstance(event, Call)],
            errors=[event for event in events if isinstance(event, Error)],
        )


def parse_tool_calls(text: str, *, lenient: bool = False) -> Reply:
    """Text, calls and errors of a whole answer. No text makes it raise; see `ToolCallStream`."""
    stream = ToolCallStream(lenient=lenient)
    return Reply.of(stream.feed(text) + stream.finish())


class ToolCallStream:
    """Text, calls and errors of an answer as it comes: `Reply.of` all events is the same however
    the text was cut.

    Only give it what the model wrote: in a prompt, a call may be anybody's.

    lenient  also take for calls: several objects or lists in a block; "parameters" in the place of
             "arguments"; a whole answer that consists of calls without `<tool_call>`
             (`untagged_calls`). An answer that begins like one of those comes in one piece, at its
             end. Strict, untagged JSON is text: it may well be the answer.

    Held back is what could be the beginning of a tag, and whitespace that could belong to a call.
    Time is linear in the text. Nothing raises but `feed` after `finish` (ValueError).
    """

    def __init__(self, *, lenient: bool = False):
        self._lenient = lenient
        self._untagged = _Untagged() if lenient else None
        self._outside = _Outside()
        # A window of the text: what has been read of it, and where it begins in the whole text
        self._window, self._at, self._offset = "", 0, 0
        self._step = self._read_text
        self._events: list[Event] = []
        # Of a block: where its tag stands in the whole text; its content is `_earlier` and the
        # window from `_start`
        self._begin, self._earlier, self._start = 0, [], 0
        self._depth, self._quote = 0, ""
        self._finished = False

    @property
    def in_string(self) -> bool:
        """Whether the text so far ends within a string of a call."""
        return self._step == self._read_block and self._quote != ""

    def feed(self, piece: str) -> list[Event]:
        """The events that are certain after one more piece of text (of any length)."""
        if self._finished:
            raise ValueError(
                "this stream is finished: every answer needs a ToolCallStream of its own"
            )
        if self._untagged:
            piece = self._untagged.feed(piece)
        return self._read(piece)

    def finish(self) -> list[Event]:
        """The events that the end of the text settles."""
        if self._finished:
            return []
        self._finished = True
        held = self._untagged.finish() if self._untagged else ""
        if calls := untagged_calls(held):
            begin, end = len(held) - len(held.lstrip()), len(held.rstrip())
            return [Call(*call, (begin, end)) for call in calls]
        return self._read(held) + self._read("", final=True)

    def _read(self, piece: str, final: bool = False) -> list[Event]:
        if self._step != self._read_text:
            # Joining a long block piece by piece would be quadratic: it is joined once, at its end.
            self._earlier.append(self._window[self._start : self._at])
            self._start = 0
        self._offset += self._at
        self._window, self._at = self._window[self._at :] + piece, 0
        while self._step(final):
            pass
        events, self._events = self._events, []
        return events

    # Each step reads on in the window from `_at`, and returns False where it needs more text.

    def _read_text(self, final: bool) -> bool:
        found = self._window.find(OPEN, self._at)
        end = (
            found
            if found >= 0
            else len(self._window) - (0 if final else _begun(self._window, OPEN))
        )
        self._say(self._outside.feed(self._window[self._at : end]))
        self._at = end
        if found < 0:
            self._say(self._outside.finish() if final else "")
            return False
        self._outside.block()
        self._begin, self._earlier = self._offset + found, []
        self._at = self._start = found + len(OPEN)
        self._depth, self._quote = 0, ""
        self._step = self._read_block
        return True

    def _read_block(self, final: bool) -> bool:
        """Read to the first tag outside of strings and brackets, or give up where none can come any
        more.
        """
        if self._depth:
            self._read_value()
            behind = (
                len(self._window) - self._at
            )  # 1: perhaps a backslash, whose character is still to come
            if self._depth and (final or behind > 1):
                return self._give_up()
            return not self._depth
        self._at = _BETWEEN.match(self._window, self._at).end()
        rest = self._window[self._at : self._at + len(CLOSE)]
        if rest.startswith((OPEN, CLOSE)):
            return self._end_block(self._at + (len(CLOSE) if rest == CLOSE else 0))
        if OPEN.startswith(rest) or CLOSE.startswith(rest):
            return final and self._end_block(len(self._window))
        if BRACKETS.get(rest[0]) != 1:
            return self._give_up()
        self._at += 1
        self._depth = 1
        return True

    def _read_value(self) -> None:
        """Read to the end of the value, to a character that no value has there, or to the end of
        the window.
        """
        window, at = self._window, self._at
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
            elif char in BRACKETS:
                self._depth += BRACKETS[char]
            else:
                break
            at += 1
        self._at = at

    def _skip_block(self, final: bool) -> bool:
        """Read to the next tag, wherever it stands."""
        tag = _TAG.search(self._window, self._at)
        if tag or final:
            self._at = tag.start() if tag else len(self._window)
            return self._end_block(tag.end() if tag and tag[0] == CLOSE else self._at)
        self._at = len(self._window) - _begun(self._window, OPEN, CLOSE)
        return False

    def _end_block(self, end: int) -> bool:
        """Tell what is in the block. Its content has been read; it ends at `end` in the window."""
        content = self._content()
        source = OPEN + content + self._window[self._at : end]
        span = self._begin, self._offset + end
        try:
            self._events += self._calls(read_literals(content), span, source)
        except ValueError as error:
            if self._step == self._read_block:
                return self._give_up()
            self._events.append(Error(str(error), span, source))
        self._at = end
        self._step = self._read_text
        return True

    def _give_up(self) -> bool:
        """Go back to the block's beginning and look for the first tag, for what is in the block
        cannot be read.
        """
        # Where that tag stands in a string, the text behind it is read again, and perhaps once
        # more. Time stays linear: two readings that began at different tags are never both outside
        # of strings, both in "..." or both in '...', because a quote never takes two states to one.
        # So there are three at most.
        if before := "".join(self._earlier):
            self._window, self._earlier = before + self._window, []
            self._offset -= len(before)
        self._at = self._start
        self._step = self._skip_block
        return True

    def _content(self) -> str:
        """The block from behind its tag to where reading has come."""
        return "".join(self._earlier) + self._window[self._start : self._at]

    def _calls(self, values: list[Any], span: Span, source: str) -> list[Event]:
        """What the values in a block say, each a call or an error."""
        if self._lenient:
            values = flattened(values)
        elif len(values) > 1:
            return [
                Error(
                    f"{len(values)} values in one <tool_call>: each call needs its own tags",
                    span,
                    source,
                )
            ]
        events: list[Event] = []
        for value in values:
            try:
                events.append(Call(*call_of(value, self._lenient), span))
            except ValueError as error:
                events.append(Error(str(error), span, source))
        return events or [Error("an empty list of calls", span, source)]

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Text(text))


class _Outside:
    """The text outside of blocks: without the whitespace next to them, with a newline in their
    place.
    """

    def __init__(self):
        self._spaces: list[str] = []
        self._said, self._behind_block = False, False

    def feed(self, text: str) -> str:
        visible = text.rstrip(SPACE)
        if not visible:
            self._spaces.append(text)
            return ""
        said = "".join(self._spaces) + visible
        self._spaces = [text[len(visible) :]]
        if self._behind_block:
            said = ("\n" if self._said else "") + said.lstrip(SPACE)
        self._said, self._behind_block = True, False
        return said

    def block(self) -> None:
        """A block stands here."""
        self._behind_block = True

    def finish(self) -> str:
        return "" if self._behind_block else "".join(self._spaces)


class _Untagged:
    """Keeps an answer that begins like an untagged call; any other goes through."""

    def __init__(self):
        self._held: list[str] | None = []
        self._head = ""

    def feed(self, piece: str) -> str:
        if self._held is None:
            return piece
        self._held.append(piece)
        self._head = (self._head + piece).lstrip()[:HEAD]
        return "" if could_begin_untagged(self._head) else self.finish()

    def finish(self) -> str:
        held, self._held = "".join(self._held or []), None
        return held


def _begun(text: str, *tags: str) -> int:
    """How many characters at the end of the text could be the beginning of a tag."""
    return max((n for tag in tags for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)

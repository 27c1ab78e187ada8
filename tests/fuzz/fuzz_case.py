"""Fuzzing: what a target is, the values that cases are made of, and how one case is run.

A target makes hostile inputs of one form and gives each to one door of the project. A case may end
in a value or in one of the documented errors, in one printable line, within bounds on time and
memory; where a value has a property (a round trip, equality with another library), it must hold.
"""

import functools
import re
import signal
import time
import unicodedata
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SECONDS = 5.0  # CPU time of one case
MEGABYTES = 300  # that one case may add to the memory of the process
# Unicode's categories and directions of what ends a line, controls a terminal or reorders a text
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_STATUS = Path("/proc/self/status")  # Linux; elsewhere memory is not measured
_CLEAR = Path("/proc/self/clear_refs")


class Maker:
    """Makes the parts of one case from hypothesis's choices, which it can shrink."""

    def __init__(self, draw: Callable[[st.SearchStrategy], Any]):
        self._draw = draw

    def number(self, least: int, most: int) -> int:
        """A whole number, both ends included."""
        return self._draw(_whole(least, most))

    def chance(self, percent: int) -> bool:
        """True in so many of 100 cases."""
        # hypothesis prefers both ends of a range: neither counts for what is rare
        return abs(2 * self._draw(_whole(0, 999)) - 999) < 10 * percent

    def rarely(self, n: int) -> bool:
        """True in one of about n cases: for one of many fields of a file."""
        return self._draw(_whole(0, 100 * n)) // 100 == n // 2

    def pick(self, choices: Any) -> Any:
        """One of a sequence."""
        return choices[self.number(0, len(choices) - 1)]

    def some(self, make: Callable[[], Any], least: int, most: int) -> list[Any]:
        """A list of so many made values."""
        return [make() for _ in range(self.number(least, most))]

    def shuffled(self, items: list[Any]) -> list[Any]:
        """The items in any order."""
        return self._draw(st.permutations(items))

    def letters(self, most: int = 12) -> str:
        """A text of any characters, surrogates included."""
        return self._draw(_text(most))

    def bytes(self, most: int = 40) -> bytes:
        """Any bytes."""
        return self._draw(_binary(most))

    def float(self) -> float:
        """Any float, NaN and infinities included."""
        return self._draw(_FLOATS)

    def text(self) -> str:
        """A text: an ordinary, a strange, a long, or any one."""
        if self.chance(15):
            return self.letters()
        return self.pick(ODD_TEXTS) if self.chance(50) else self.pick(WORDS)

    def whole(self) -> int:
        """A whole number, often at the border of a type."""
        return self.pick(ODD_NUMBERS) if self.chance(50) else self.number(-3, 40)

    def json(self, depth: int = 3) -> Any:
        """A value that Python's parser of JSON may return."""
        kind = self.number(0, 9 if depth > 0 else 6)
        if kind < 2:
            return self.text()
        if kind < 4:
            return self.whole()
        if kind == 4:
            return self.float() if self.chance(50) else self.pick(ODD_FLOATS)
        if kind < 7:
            return self.pick((None, True, False, [], {}, ""))
        if kind == 7:
            return {self.text(): self.json(depth - 1) for _ in range(self.number(0, 3))}
        if kind == 8:
            return self.some(lambda: self.json(depth - 1), 0, 3)
        return nested(self.number(0, 200), self.chance(50))

    def changed(self, value: Any, keys: int = 12) -> Any:
        """A value of JSON with one inner value replaced, doubled, added or removed.

        keys  of a long list or object only so many at both ends are considered
        """
        if isinstance(value, (dict, list)) and value and self.chance(90):
            copy = value.copy()
            places = list(copy) if isinstance(copy, dict) else list(range(len(copy)))
            if len(places) > 2 * keys:
                places = places[:keys] + places[-keys:]
            key = self.pick(places)
            action = self.number(0, 19)
            if action == 0:
                del copy[key]
            elif action == 1 and isinstance(copy, list):
                copy.append(copy[key])
            elif action == 1:
                copy[self.text()] = copy[key]
            else:
                copy[key] = self.changed(copy[key], keys)
            return copy
        return self.json(2)

    def damaged(self, data: bytes, within: int = 50_000) -> bytes:
        """Bytes that are cut off, changed, removed, inserted, or in which a number is huge.

        within  changes are in so many first bytes
        """
        data = bytearray(data)
        end = min(len(data), within)
        at = self.number(0, max(end - 1, 0))
        action = self.number(0, 4)
        if action == 0:
            del data[self.number(0, len(data)) :]
        elif action == 1:
            for _ in range(self.pick((1, 4, 30))):
                place = self.number(0, max(end - 1, 0))
                data[place : place + 1] = bytes([self.number(0, 255)])
        elif action == 2:
            del data[at : at + self.number(1, 40)]
        elif action == 3:
            data[at:at] = self.bytes(9)
        else:
            width = self.pick((1, 2, 4, 8))
            data[at : at + width] = self.pick((b"\xff", b"\x7f", b"\x00")) * width
        return bytes(data)


def nested(depth: int, as_list: bool) -> Any:
    """A value of JSON that is so deep."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


WORDS = ("a", "b", "name", "city", "Berlin", "x1", "the", " capital", "é", "日本", "😀", "7", "-")
ODD_TEXTS = (
    *("", " ", "\n", "\0", "\x1b]0;t\x07", "\u202e", "\u2028", "\ufeff", "\ud800", "\udfff"),
    *("\x7f", "\x85", "▁", "▁▁", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "[INST]"),
    *("<tool_call>", "</tool_call>", "..", "../x", "/etc/passwd", "a/b", "con", "__class__"),
    *("%s%n", "{}", "{0}", "${x}", "(a+)+$", "'", '"', "\\", "null", "NaN", "1e999", "-0"),
    *("x" * 300, "x" * 10_000, "é" * 5_000, "👩‍👩‍👧", "ﬁ", "ß", "\u0301", "İ", chr(0x10FFFF)),
)
ODD_NUMBERS = (
    *(0, 1, -1, 2, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, -(2**31), 2**32),
    *(2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64 - 1, 2**64, 10**28, 10**400),
)
ODD_FLOATS = (
    *(0.0, -0.0, 0.1, 0.5, 1.0, 3.0, -1.5, 1e-308, 5e-324, 1e300, -1e300, 1e38, 3.5e38),
    *(float("nan"), float("inf"), float("-inf")),
)
_FLOATS = st.floats()
_whole = functools.lru_cache(None)(lambda least, most: st.integers(least, most))
_text = functools.lru_cache(None)(lambda most: st.text(max_size=most))
_binary = functools.lru_cache(None)(lambda most: st.binary(max_size=most))


def cases(make: Callable[[Maker], Any]) -> st.SearchStrategy:
    """hypothesis's strategy for what `make` makes."""
    return st.composite(lambda draw: make(Maker(draw)))()


@dataclass(frozen=True)
class Target:
    """One form of input and the door that reads it.

    name      on the command line
    what      the inputs, for a person
    cases     the strategy that makes them
    check     reads one; returns what became of it, in a word. AssertionError: a property is wrong
    errors    the documented errors, which may leave it
    holds     the property of what is read, for a person; "" for none
    """

    name: str
    what: str
    cases: st.SearchStrategy
    check: Callable[[Any], str]
    errors: tuple[type[Exception], ...] = ()
    holds: str = ""
    seconds: float = SECONDS
    megabytes: int = MEGABYTES


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    what       the word of the target's check, or "refused"
    error      the error without the parts that differ from case to case; None: there was none
    seconds    CPU time
    megabytes  more memory than before, at its peak
    """

    what: str
    error: str | None
    seconds: float
    megabytes: float


class TooSlow(BaseException):
    """A case takes more CPU time than its target may."""


def run_case(target: Target, case: Any) -> Outcome:
    """Run one case. AssertionError, with the reason, for anything that a target may not do."""
    before = _reset_peak()
    start = time.process_time()
    what, error = "refused", None
    with warnings.catch_warnings(), _limited(target.seconds):
        warnings.simplefilter("ignore")
        try:
            what = target.check(case)
        except target.errors as raised:
            error = _template(raised)
    seconds = time.process_time() - start
    megabytes = max(0.0, _memory("VmHWM") - before)
    assert seconds <= target.seconds, f"it takes {seconds:.1f} s"
    assert megabytes <= target.megabytes, f"it takes {megabytes:.0f} MB"
    return Outcome(what, error, seconds, megabytes)


def one_printable_line(message: str) -> None:
    """AssertionError unless a message is one line that cannot control a terminal."""
    assert message, "the message is empty"
    bad = next((one for one in message if unicodedata.category(one) in UNPRINTABLE), None)
    bad = bad or next((one for one in message if unicodedata.bidirectional(one) in TURNING), None)
    assert bad is None, (
        f"the message has {bad!a}, so it is not one printable line: {message!a:.300}"
    )


def _template(error: Exception) -> str:
    """An error's class and message, without names and numbers."""
    message = str(error)
    one_printable_line(message)
    message = re.sub(r"/\S+|'[^']*'|\"[^\"]*\"|\d[\d,.]*", "_", message)
    return f"{type(error).__name__}: {message[:60]}"


@contextmanager
def _limited(seconds: float):
    """Raises TooSlow in the midst of a case that takes longer, if it runs Python at all."""

    def stop(*_):
        raise TooSlow(f"more than {seconds} s of CPU time")

    old = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 2 * seconds)
    try:
        yield
    except TooSlow as error:
        raise AssertionError(str(error)) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)


def _reset_peak() -> float:
    """Let the peak of the process's memory begin again; returns its memory in MB."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return float("inf")  # not Linux, or not allowed: nothing is more than that
    return _memory("VmHWM")


def _memory(name: str) -> float:
    try:
        status = _STATUS.read_text()
    except OSError:
        return 0.0
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024

"""Values that a model wrote: JSON, Python's literals, and every mixture of the two.

The first prompts of Hermes-2-Pro showed calls in Python's quotes, later ones JSON. Models write
both, sometimes in one object. Nothing is evaluated, nothing recurses, and time is linear in the
text.
"""

import math
import re
from typing import Any

MAX_DEPTH = 100  # brackets inside brackets
MAX_NUMBER = 640  # characters; Python may refuse to parse longer integers (sys.int_info)

_BETWEEN = re.compile(r"[ \t\r\n,]*+")
_SPACE = re.compile(r"[ \t\r\n]*+")
_STRING = {q: re.compile(rf"{q}([^{q}\\]*+(?:\\.[^{q}\\]*+)*+){q}", re.DOTALL) for q in "\"'"}
_NUMBER = re.compile(r"[-+]?(?:\d++\.\d*+|\.\d++|0|[1-9]\d*+)(?:[eE][-+]?\d++)?", re.ASCII)
_WORD = re.compile(r"\w++")
_ESCAPE = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-9a-fA-F]{2})|([0-7]{1,3})|(.))",
    re.DOTALL,
)
_ESCAPED = {c: c for c in "\"'\\/"} | dict(zip("abfnrtv", "\a\b\f\n\r\t\v")) | {"\n": ""}
_CONSTANTS = {
    "true": True,
    "True": True,
    "false": False,
    "False": False,
    "null": None,
    "None": None,
}
_CLOSING = {"{": "}", "[": "]", "(": ")"}


def read_literals(text: str) -> list[Any]:
    """The values in `text`, one at least, with whitespace, commas or nothing between them.

    JSON means the same as in JSON: of two equal keys the last counts. Also accepted, anywhere:
    single quotes, Python's escapes (a backslash before any other character stays one, as in
    Python), line breaks in strings, True, False and None, +1, 1. and .5, tuples (they become
    lists), and a comma after the last item.

    JSON can hold every returned value. Anything else is an error: keys that are not strings, sets,
    bytes, complex numbers, NaN and infinity, half a surrogate pair; Python's prefixed,
    triple-quoted and adjacent strings, 0x1F and 1_000, too.

    Raises ValueError that names the problem and its character, also beyond MAX_DEPTH and
    MAX_NUMBER.
    """
    values = []
    at = _BETWEEN.match(text).end()
    while at < len(text):
        value, at = _read(text, at)
        values.append(value)
        at = _BETWEEN.match(text, at).end()
    if not values:
        raise ValueError("there is nothing to read")
    return values


class _Container:
    """An open bracket and the items after it; in an object keys and values alternate."""

    def __init__(self, bracket: str):
        self.bracket = bracket
        self.closing = _CLOSING[bracket]
        self.items: list[Any] = []
        self.comma = False  # True: "(1,)" is a tuple, "(1)" is not

    @property
    def expects_value(self) -> bool:
        return self.bracket == "{" and len(self.items) % 2 == 1

    def value(self) -> Any:
        if self.bracket == "{":
            return dict(zip(self.items[::2], self.items[1::2]))
        in_parentheses = self.bracket == "(" and len(self.items) == 1 and not self.comma
        return self.items[0] if in_parentheses else self.items


def _read(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and its end."""
    around: list[_Container] = []  # innermost last
    while True:
        at = _SPACE.match(text, at).end()
        char = text[at : at + 1]
        if char in _CLOSING:
            if len(around) == MAX_DEPTH:
                raise ValueError(
                    f"more than {MAX_DEPTH} brackets inside each other at character {at}"
                )
            around.append(_Container(char))
            at += 1
            continue
        if around and char == around[-1].closing and not around[-1].expects_value:
            value = around.pop().value()
            at += 1
        else:
            value, at = _read_scalar(text, at)
        if not around:
            return value, at
        around[-1].items.append(value)
        at = _read_separator(text, at, around[-1])


def _read_separator(text: str, at: int, container: _Container) -> int:
    """The place of the next item, or of the closing bracket."""
    at = _SPACE.match(text, at).end()
    char = text[at : at + 1]
    if container.expects_value:
        if not isinstance(container.items[-1], str):
            raise ValueError(f"the key before character {at} is not a string")
        if char != ":":
            raise _expected("':'", text, at)
        return at + 1
    if char == ",":
        container.comma = True
        return at + 1
    if char != container.closing:
        raise _expected(f"',' or {container.closing!r}", text, at)
    return at


def _read_scalar(text: str, at: int) -> tuple[Any, int]:
    quote = text[at : at + 1]
    if quote in _STRING:
        string = _STRING[quote].match(text, at)
        if not string:
            raise ValueError(f"the string that begins at character {at} is not closed")
        return _unescaped(string[1], at), string.end()
    if number := _NUMBER.match(text, at):
        return _number(number[0], at), number.end()
    word = _WORD.match(text, at)
    if word and word[0] in _CONSTANTS:
        return _CONSTANTS[word[0]], word.end()
    if word:
        raise ValueError(f"{word[0][:40]!r} at character {at} is not a value that JSON has")
    raise _expected("a value", text, at)


def _number(written: str, at: int) -> int | float:
    if len(written) > MAX_NUMBER:
        raise ValueError(
            f"the number at character {at} has {len(written)} characters; the limit is {MAX_NUMBER}"
        )
    if written.lstrip("+-").isdigit():
        return int(written)
    number = float(written)
    if math.isinf(number):
        raise ValueError(f"the number {written[:40]} at character {at} is too large")
    return number


def _unescaped(written: str, at: int) -> str:
    """The string that the characters between two quotes mean."""
    try:
        string = _ESCAPE.sub(_character, written) if "\\" in written else written
        if string.isascii():
            return string
        # Two escapes may be the halves of one character; a half alone is not valid Unicode.
        return string.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ValueError(
            f"the string that begins at character {at} has half a surrogate pair"
        ) from None
    except ValueError as error:
        raise ValueError(f"the string that begins at character {at} has {error}") from None


def _character(escape: re.Match) -> str:
    four, eight, two, octal, char = escape.groups()
    if code := four or eight or two:
        if int(code, 16) > 0x10FFFF:
            raise ValueError(f"an escape beyond Unicode, {escape[0]}")
        return chr(int(code, 16))
    if octal:
        return chr(int(octal, 8))
    if char in "uUx":
        raise ValueError(f"\\{char} without its hexadecimal digits")
    return _ESCAPED.get(char, escape[0])


def _expected(wanted: str, text: str, at: int) -> ValueError:
    found = repr(text[at]) if at < len(text) else "the end"
    return ValueError(f"expected {wanted} at character {at}, not {found}")

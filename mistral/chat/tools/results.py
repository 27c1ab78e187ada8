"""What a function returned, as JSON for the model."""

import base64
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from itertools import islice
from typing import Any, NamedTuple

from mistral.chat.tools.json_schema import as_json
from mistral.errors import one_line

_MOST_CHARACTERS = 2000  # of a result that is written as text because JSON cannot hold it
_MOST_ITEMS = 1_000_000  # of one list: a generator may be endless


class Returned(NamedTuple):
    """A function's result.

    value    as in JSON
    problem  None; or why JSON cannot hold the result, whose text `value` is then
    """

    value: Any
    problem: str | None = None


def encode_result(result: Any) -> Returned:
    """The obvious JSON form of a result. Never raises, except for KeyboardInterrupt.

    As pydantic writes them: dates and times (ISO), UUID, Decimal, Enum, dataclasses, models, paths.
    Tuples, sets (sorted), generators and arrays become lists, NaN and infinity null, bytes
    "data:;base64,...", and any other object its `str`. A result that JSON cannot hold all the same
    (a circle, more than 64 levels, broken Unicode) becomes its text.
    """
    try:
        return Returned(as_json(_json_value(result)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a generator, __str__ or __iter__ may raise anything
        return Returned(_as_text(result), describe_error(error))


def result_text(value: Any) -> str:
    """A JSON value as the text of a message, from which its reader gets the same value.

    Text is not encoded, so that JSON that a function wrote as text is read as JSON. Only text that
    would be read as another value ("3.10", "null", "") is written in quotes.
    """
    if isinstance(value, str):
        try:
            is_taken = isinstance(as_json(json.loads(value)), (str, list, dict))
        except (ValueError, RecursionError):
            is_taken = value != ""
        if is_taken:
            return value
    return json.dumps(value, ensure_ascii=False)


def describe_error(error: BaseException) -> str:
    """An exception in one line."""
    try:
        return one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    except Exception:  # its own __str__ failed
        return type(error).__name__


def _json_value(value: Any) -> Any:
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "data:;base64," + base64.b64encode(bytes(value)).decode()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        keys = list(_to_json(dict.fromkeys(value)))
        if len(keys) < len(value):
            raise ValueError("two of its keys are the same text")
        return {key: _json_value(inner) for key, inner in zip(keys, value.values())}
    if isinstance(value, Set):
        return _sorted([_json_value(inner) for inner in value])
    if isinstance(value, (Sequence, Iterator, ValuesView)) and not isinstance(value, str):
        items = [_json_value(inner) for inner in islice(value, _MOST_ITEMS + 1)]
        if len(items) > _MOST_ITEMS:
            raise ValueError(f"it has more than {_MOST_ITEMS:,} items")
        return items
    return _to_json(value)


def _sorted(items: list[Any]) -> list[Any]:
    """In an order that does not change from one process to the next."""
    try:
        return sorted(items)
    except TypeError:  # of several types
        return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))


def _to_json(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, by_alias=False, inf_nan_mode="null", fallback=_fallback)


def _fallback(value: Any) -> Any:
    """numpy's and torch's scalars and arrays as numbers and lists, everything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _as_text(value: Any) -> str:
    try:
        return one_line(str(value), _MOST_CHARACTERS)
    except KeyboardInterrupt:
        raise
    except BaseException:  # its own __str__ failed
        return f"an object of the class {type(value).__name__}"

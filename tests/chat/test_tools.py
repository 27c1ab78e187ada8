"""Tools: from functions and schemas, checked against the model's arguments, and run."""

import asyncio
import dataclasses
import enum
import functools
import http.server
import itertools
import json
import math
import subprocess
import sys
import threading
import time
import uuid
from collections import deque, namedtuple
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from functools import partial
from pathlib import Path
from random import Random
from typing import (  # noqa: UP035
    Annotated,
    Any,
    Dict,
    List,
    Literal,
    NotRequired,
    Optional,
    Tuple,
    TypedDict,
    Union,
)

import jsonschema_rs
import numpy as np
import pytest
import torch
from pydantic import BaseModel, Field
from typing_extensions import Doc

from mistral.chat.formats.messages import check_messages
from mistral.chat.formats.prompts import tool_prompt, write_json_result
from mistral.chat.tools import running
from mistral.chat.tools.functions import (
    ArgumentError,
    StillRunning,
    Tool,
    ToolError,
    check_arguments,
    tool,
    tool_table,
)
from mistral.chat.tools.json_schema import SchemaError, compile_schema
from mistral.chat.tools.references import References
from mistral.chat.tools.results import result_text
from mistral.errors import MistralError

HINTS = [
    int,
    float,
    str,
    bool,
    None,
    Any,
    list,
    tuple,
    dict,
    list[int],
    List[str],  # noqa: UP006
    list[list[float]],
    list[Any],
    tuple[int, str],
    Tuple[int, list[str]],  # noqa: UP006
    dict[str, int],
    Dict[str, list[bool]],  # noqa: UP006
    dict[str, dict[str, Any]],
    dict[str, int | None],
    Literal["celsius", "fahrenheit"],
    Literal[1, 2, 3],
    Literal["a", 1, None, True],
    list[Literal["a", "b"]],
    Optional[int],  # noqa: UP045
    Optional[Literal["a", "b"]],  # noqa: UP045
    Optional[list[int]],  # noqa: UP045
    int | None,
    None | str,
    int | str,
    Union[str, int, float, None],  # noqa: UP007
    list | tuple,
    list[int] | str,
    int | Literal["all"],
    int | list[int] | None,
    dict[str, int] | list[dict[str, int]] | None,
    int | Any,
    Annotated[int, "years"],
    "int | None",
    "list[Literal['a']]",
]


def run_tool(tool, arguments, time_limit=None):
    return running.run_tool(tool, arguments, time_limit).value


def function_of(hint, default=...):
    def f(x, y: int = 3):
        """Does one thing.

        Args:
            x: The thing.
            y: How often.
        """

    f.__annotations__ = {"x": hint, **f.__annotations__}
    f.__defaults__ = f.__defaults__ if default is ... else (default, 3)
    return f


def plain(a: int, b: Optional[str] = None, *, c: list[int] = ()) -> float:  # noqa: UP045
    """Adds.

    It adds things, one after
    the other.

    Args:
        a: The first,
            which goes on here: with a colon.
        b: The second (choices: ["x", " y "])
        c (list of int): is written with its type
    Returns:
        A sum,
        of two lines.
    Raises:
        ValueError: never
    """


def theirs_too(a: int, b: str = "", c: Any = None) -> dict[str, int]:
    """One line, and: a colon.
    Second line.

    Args:
      a: First, with "quotes" and (brackets).

        b: is not an entry, it is indented deeper than one
      b:
        On the next line
      c: Third (Choices: [1, 2.5, null, "tea"])

    Returns:
        dict: a "table"

    Raises:
        KeyError: often
    """


def nothing_to_say():
    """Get the time."""


def returns_none() -> None:
    """Turn it off.

    Returns:
        Nothing.
    """


def returns_an_object(x: int) -> date:
    """Get a date.

    Args:
        x: The day
           Examples: 1
        Note: this is cut off
    Returns:
        The date
    """


def no_sections_but_examples(x: "int", y: "str | None" = None) -> "list[int] | None":
    """Counts (choices: not here).

    Args:
        x: a http://example.com/a:b thing
        y: über, 日本 (choices: ["é", "日本"])

    Examples:
        x: 3
    """


class Host:
    def method(self, x: int) -> int:
        """Is bound.

        Args:
            x: A number
        """
        return x + 1


FUNCTIONS = [
    theirs_too,
    nothing_to_say,
    returns_none,
    returns_an_object,
    no_sections_but_examples,
]


def same(function):
    """As text: the order of the keys is what a model sees."""
    theirs = pytest.importorskip("transformers").utils.get_json_schema(function)
    return json.dumps(tool(function).schema()) == json.dumps(theirs)


@pytest.mark.parametrize("hint", HINTS, ids=str)
def test_the_schema_of_a_type_hint_is_transformers(hint):
    assert same(function_of(hint))
    assert same(function_of(hint, default=None))


@pytest.mark.parametrize("hint", HINTS, ids=str)
def test_the_schema_of_a_result_is_transformers(hint):
    def f():
        """Does one thing.

        Returns:
            The thing.
        """

    f.__annotations__ = {"return": hint}
    assert same(f)


@pytest.mark.parametrize("function", [*FUNCTIONS, Host().method], ids=lambda f: f.__name__)
def test_the_docstring_is_read_as_transformers_reads_it(function):
    assert same(function)


DOCSTRINGS = {
    "google": """Search the shop.

Only what is in stock.

Args:
    query (str): Words to look for,
        with a : in them.
    limit (int, optional): How many results at most.

Returns:
    The names.

Raises:
    ValueError: never
""",
    "numpy": """Search the shop.

Only what is in stock.

Parameters
----------
query : str
    Words to look for,
    with a : in them.
limit : int, optional
    How many results at most.

Returns
-------
list
    The names.

Notes
-----
Nothing for the model.
""",
    "sphinx": """Search the shop.

Only what is in stock.

:param query: Words to look for,
    with a : in them.
:type query: str
:param int limit: How many results at most.
:returns: The names.
:rtype: list
""",
    "epydoc": """Search the shop.

Only what is in stock.

@param query: Words to look for,
    with a : in them.
@param limit: How many results at most.
@return: The names.
""",
}


def test_a_docstring_in_full():
    made = tool(plain)
    assert (made.name, made.description) == (
        "plain",
        "Adds.\n\nIt adds things, one after\nthe other.",
    )
    assert made.parameters == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The first, which goes on here: with a colon."},
            "b": {
                "type": "string",
                "nullable": True,
                "enum": ["x", "y"],
                "description": "The second",
            },
            "c": {
                "type": "array",
                "items": {"type": "integer"},
                "description": "is written with its type",
            },
        },
        "required": ["a"],
    }
    assert made.returns == {"type": "number", "description": "A sum,\nof two lines."}


def test_a_docstring_may_begin_with_its_arguments():
    @tool(description="Does it.")
    def f(x: int):
        """
        Args:
            x: the day
        """

    assert f.parameters["properties"] == {"x": {"type": "integer", "description": "the day"}}


def test_a_tuple_of_any_length_is_a_list():
    assert tool(function_of(tuple[int, ...])).parameters["properties"]["x"]["items"] == {
        "type": "integer"
    }


class Endless(TypedDict):
    inner: "Endless"


HINTS_WITHOUT_JSON = [[int], type, callable, Host, Callable[[int], int], list[Host]]
if sys.version_info < (3, 12):  # pydantic reads the TypedDict of later versions, with a $ref
    HINTS_WITHOUT_JSON.append(Endless)


@pytest.mark.parametrize("hint", HINTS_WITHOUT_JSON, ids=str)
def test_a_hint_without_json_is_named(hint):
    with pytest.raises(
        SchemaError, match="tool f: the parameter x: .* has no JSON schema"
    ) as error:
        tool(function_of(hint))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("style", DOCSTRINGS)
def test_docstrings_of_every_style_say_the_same(style):
    def search(query: str, limit: int = 10) -> list:
        pass

    search.__doc__ = DOCSTRINGS[style]
    made = tool(search)
    assert made.description == "Search the shop.\n\nOnly what is in stock."
    assert made.parameters == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "Words to look for, with a : in them."},
            "limit": {"type": "integer", "description": "How many results at most."},
        },
        "required": ["query"],
    }
    assert made.returns == {"type": "array", "description": "The names."}


def test_what_has_no_description_gets_none():
    def bare(x: int, y: str = ""):
        pass

    def one_line(x: int):
        """Does one thing: well."""

    assert (tool(bare).description, tool(one_line).description) == ("", "Does one thing: well.")
    assert tool(bare).parameters["properties"] == {
        "x": {"type": "integer"},
        "y": {"type": "string"},
    }
    assert "description" not in tool(one_line).parameters["properties"]["x"]


@pytest.mark.parametrize(
    "text",
    ["", "Args:", "Args:\n", "Args:\n    x: a\n  y: b", "\n\n", ":\nArgs:\n:::", "Returns:",
     ":param", ":param x", "Parameters\n----------", "Args:\n    x without a colon\n    y: b", ":    :param,---:@param x:Args::returns:"],
)  # fmt: skip
def test_any_docstring_can_be_read(text):
    def f(x: int):
        pass

    f.__doc__ = text
    assert tool(f).parameters["properties"]["x"]["type"] == "integer"


def test_a_sentence_with_the_name_of_a_section_does_not_end_the_description():
    def f():
        """Get a date. Args: and Returns: are words of this sentence.

        Example:
            >>> f()

        Returns:
            The date
        """

    assert tool(f).description == (
        "Get a date. Args: and Returns: are words of this sentence.\n\nExample:\n    >>> f()"
    )


def test_the_types_of_a_docstring_replace_missing_hints():
    def f(city, days=3, **others):
        """Get the weather.

        :param str city: The city.
        :param days: How many days.
        :type days: int, optional
        """

    assert tool(f).parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city."},
            "days": {"type": "integer", "description": "How many days."},
        },
        "required": ["city"],
        "additionalProperties": {},
    }


@pytest.mark.parametrize(
    ("written", "schema"),
    [
        ("str", {"type": "string"}),
        ("Integer", {"type": "integer"}),
        ("bool, optional", {"type": "boolean"}),
        ("list of int", {"type": "array"}),
        ("list[str], default []", {"type": "array"}),
        ("dict[str, int]", {"type": "object"}),
        ("int or str", {}),
        ("{'a', 'b'}", {}),
        ("a city", {}),
    ],
)
def test_a_type_of_a_docstring_that_is_not_known_is_any(written, schema):
    def f(x):
        pass

    f.__doc__ = f"Does.\n\nParameters\n----------\nx : {written}\n    The thing."
    assert tool(f).parameters["properties"]["x"] == schema | {"description": "The thing."}


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Seat:
    row: int
    letter: str = "A"


class Options(TypedDict, total=False):
    window: bool
    meal: Literal["fish", "none"]


class Node(BaseModel):
    value: int
    children: list["Node"] = []


class Fund(BaseModel):
    """Fundamentals of a share."""

    symbol: str = Field(min_length=2, description="Ticker")
    since: date | None = None
    weights: list[int] = []


INTEGER, STRING = {"type": "integer"}, {"type": "string"}
SEAT_1A = {"row": 1, "letter": "A"}
FUND = {"symbol": "TSLA", "since": None, "weights": []}
SEAT = {"type": "object", "properties": {"row": INTEGER, "letter": STRING}, "required": ["row"]}
TYPES = {  # type: (its schema, an argument, what the function gets)
    date: ({"type": "string", "format": "date"}, "2024-03-01", date(2024, 3, 1)),
    datetime: (
        {"type": "string", "format": "date-time"},
        "2024-03-01T12:00:00",
        datetime(2024, 3, 1, 12),
    ),
    uuid.UUID: (
        {"type": "string", "format": "uuid"},
        "00000000-0000-0000-0000-000000000007",
        uuid.UUID(int=7),
    ),
    Decimal: ({"type": ["number", "string"]}, "19.90", Decimal("19.90")),
    Path: ({"type": "string", "format": "path"}, "a/b", Path("a/b")),
    bytes: ({"type": "string", "format": "binary"}, "abc", b"abc"),
    Color: ({"type": "string", "enum": ["red", "blue"]}, "red", Color.RED),
    Seat: (SEAT, {"row": 4.0}, Seat(4)),
    Options: (
        {
            "type": "object",
            "properties": {
                "window": {"type": "boolean"},
                "meal": {"type": "string", "enum": ["fish", "none"]},
            },
        },
        {"meal": "fish"},
        {"meal": "fish"},
    ),
    list[Options]: (None, [{"window": True}], [{"window": True}]),
    Seat | None: (SEAT | {"nullable": True}, None, None),
    Fund: (None, {"symbol": "TSLA"}, Fund(symbol="TSLA")),
    set[int]: ({"type": "array", "uniqueItems": True, "items": INTEGER}, [1, 2], {1, 2}),
    tuple[int, str]: ({"type": "array", "prefixItems": [INTEGER, STRING]}, [1.0, "a"], (1, "a")),
    dict[int, str]: ({"type": "object", "additionalProperties": STRING}, {"3": "c"}, {3: "c"}),
    dict[Color, int]: (
        {
            "type": "object",
            "additionalProperties": INTEGER,
            "propertyNames": {"type": "string", "enum": ["red", "blue"]},
        },
        {"red": 1},
        {Color.RED: 1},
    ),
    Annotated[int, Field(ge=1, description="Rows.")]: (
        {"type": "integer", "minimum": 1, "description": "Rows."},
        3,
        3,
    ),
    Annotated[int, "years"]: ({"type": "integer", "description": "years"}, 3.0, 3),
    Annotated[int, Doc("months")]: ({"type": "integer", "description": "months"}, 3, 3),
    list[Annotated[str, "a name"]]: (
        {"type": "array", "items": {"type": "string", "description": "a name"}},
        ["x"],
        ["x"],
    ),
    Sequence[int]: ({"type": "array", "items": INTEGER}, [1], [1]),
}


@pytest.mark.parametrize("hint", TYPES, ids=str)
def test_a_function_gets_the_type_that_it_asks_for(hint):
    schema, argument, value = TYPES[hint]
    got = []

    def f(x):
        got.append(x)

    f.__annotations__ = {"x": hint}
    made = tool(f)
    if schema is not None:
        assert made.parameters["properties"]["x"] == schema
    check_arguments(made, {"x": argument})
    run_tool(made, {"x": argument})
    assert got == [value] and type(got[0]) is type(value)


def test_shared_and_recursive_definitions_stay_definitions():
    def f(root: Node, a: Seat, b: list[Seat], c: Seat | None = None):
        return [type(root.children[0]), a, b, c]

    parameters = tool(f).parameters
    assert parameters["properties"] == {
        "root": {"$ref": "#/$defs/Node"},
        "a": {"$ref": "#/$defs/Seat"},
        "b": {"type": "array", "items": {"$ref": "#/$defs/Seat"}},
        "c": {"anyOf": [{"$ref": "#/$defs/Seat"}, {"type": "null"}]},
    }
    assert parameters["$defs"]["Seat"] == SEAT
    arguments = {"root": {"value": 1, "children": [{"value": 2}]}, "a": {"row": 1}, "b": []}
    check_arguments(tool(f), arguments)
    assert run_tool(tool(f), arguments) == [f"{Node}", {"row": 1, "letter": "A"}, [], None]


def test_a_property_named_like_a_keyword_stays():
    class Page(BaseModel):
        title: str
        default: int = 3

    def f(page: Page, title: str = "x"):
        pass

    properties = tool(f).parameters["properties"]
    assert properties["title"] == STRING
    assert properties["page"]["properties"] == {"title": STRING, "default": INTEGER}


def test_arguments_that_cannot_be_converted_are_argument_errors():
    @tool
    def book(day: date, seats: Annotated[list[int], Field(max_length=2)] = ()):
        raise AssertionError("this never runs")

    for arguments, words in (
        ({"day": "yesterday"}, "book: day: Input should be a valid date"),
        ({"day": "2024-02-30"}, "book: day: "),
    ):
        with pytest.raises(ArgumentError, match=words) as error:
            check_arguments(book, arguments)
        assert "\n" not in str(error.value)


def test_defaults_are_the_functions_own():
    nothing = object()

    def f(x: int = nothing, kept: list[int] = [], y: int = Field(default=3, ge=1)):
        return [x is nothing, kept is f.__defaults__[1], y]

    assert run_tool(tool(f), {}) == [True, True, 3]


def test_functions_of_every_kind():
    def fetch(url: str, key: str, retries: int = 1) -> list:
        """Fetch a page."""
        return [url, key, retries]

    async def later(x: int) -> int:
        """Wait."""
        await asyncio.sleep(0)
        return x + 1

    async def each(n: int):
        for i in range(n):
            yield i

    class Adder:
        """Add."""

        def __call__(self, x: int) -> int:
            return x + 1

        @staticmethod
        def static(x: int) -> int:
            return x + 1

        @classmethod
        def of_class(cls, x: int) -> int:
            return x + 1

    bound = tool(partial(fetch, key="secret"))
    assert (bound.name, bound.description) == ("fetch", "Fetch a page.")
    assert list(bound.parameters["properties"]) == ["url", "retries"]
    assert "secret" not in json.dumps(bound.schema())
    assert run_tool(bound, {"url": "a"}) == ["a", "secret", 1]
    for limit in (None, 30):
        assert run_tool(tool(later), {"x": 1}, limit) == 2
        assert run_tool(tool(each), {"n": 3}, limit) == [0, 1, 2]
    for function in (Adder(), Adder.static, Adder.of_class, functools.lru_cache(Adder.static)):
        made = tool(function)
        assert made.parameters["properties"] == {"x": INTEGER}
        assert run_tool(made, {"x": 1}) == 2
    assert tool(Adder()).description == "Add."


def test_an_async_function_is_run_in_a_thread_that_has_a_loop_already():
    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    async def main():
        return run_tool(tool(later), {"x": 1})

    assert asyncio.run(main()) == 2


def test_further_keywords_are_further_arguments():
    @tool
    def f(x: int, **others: date):
        return others

    assert f.parameters["additionalProperties"] == {"type": "string", "format": "date"}
    arguments = {"x": 1, "since": "2024-03-01"}
    check_arguments(f, arguments)
    assert run_tool(f, arguments) == {"since": "2024-03-01"}
    with pytest.raises(ArgumentError, match="since"):
        check_arguments(f, {"x": 1, "since": 3.5})


def test_a_type_hint_may_be_the_name_of_a_local_class():
    @dataclasses.dataclass
    class Local:
        x: int

    @tool
    def f(local: "Local"):
        """Uses it."""

    assert f.parameters["properties"]["local"]["properties"] == {"x": INTEGER}


def test_the_keys_of_a_dict_are_described():
    plain = tool(function_of(dict[str, int])).parameters["properties"]["x"]
    names = {"type": "string", "enum": ["a", "b"]}
    assert tool(function_of(dict[Literal["a", "b"], int])).parameters["properties"]["x"] == (
        plain | {"propertyNames": names}
    )


def test_the_extra_is_named(monkeypatch):
    for module in ("pydantic", "docstring_parser"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MistralError, match=rf'{module} is not.*install -e "\.\[chat\]"'):
                tool(plain)


def test_the_decorator_works_with_and_without_arguments():
    bare = tool(plain)
    renamed = tool(name="other.name-1", description="Described here.")(plain)
    assert (bare.name, renamed.name, renamed.description) == (
        "plain",
        "other.name-1",
        "Described here.",
    )
    assert renamed.parameters == bare.parameters
    assert tool(Host().method)(3) == tool(Host().method)(x=3) == 4


def test_a_tool_in_the_prompt_is_its_schema():
    assert json.dumps(tool(plain).schema()) in tool_prompt([tool(plain).schema()])


# ---- functions that are not tools


def no_hint(x):
    """Does.

    Args:
        x: it
    """


def unknown_hint(x: "Nowhere"):  # noqa: F821
    """Does.

    Args:
        x: it
    """


def bad_choices(x: str):
    """Does.

    Args:
        x: it (choices: [a, b])
    """


def any_number(*x: int):
    """Does.

    Args:
        x: it
    """


def by_position(x: int, /):
    """Does.

    Args:
        x: it
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_hint, "tool no_hint: the parameter x has no type hint"),
        (Host.method, "tool method: the parameter self has no type hint"),
        (
            unknown_hint,
            "tool unknown_hint: its type hints cannot be read: name 'Nowhere' is not defined",
        ),
        (bad_choices, "the parameter x: the choices must be a JSON list"),
        (any_number, "any_number: .x: int cannot be passed by name"),
        (by_position, "x: int cannot be passed by name"),
        (date, "is not a function: use Tool.from_schema"),
        ("plain", "'plain' is not a function"),
        (print, "cannot be"),
    ],
)
def test_a_function_without_a_schema_is_refused_with_the_reason(function, message):
    with pytest.raises(SchemaError, match=message) as error:
        tool(function)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["", "two words", "größe", "a\n", "x" * 65, "</tool_call>", '"', None, 3]
)
def test_a_name_that_a_model_cannot_write_is_refused(name):
    with pytest.raises(ValueError, match="cannot be a tool's name"):
        Tool(name, "", {})


def test_two_tools_of_one_name_are_refused():
    one = tool(plain)
    other = tool(name="other")(plain)
    assert tool_table([one, other]) == {"plain": one, "other": other}
    with pytest.raises(ValueError, match="two tools are named 'plain'"):
        tool_table([one, other, tool(plain)])
    with pytest.raises(ValueError, match="is not a Tool: create one with @tool"):
        tool_table([plain])


# ---- tools from a schema

STOCK = {
    "name": "get_stock_price",
    "description": "Price of a share.",
    "parameters": {
        "type": "object",
        "properties": {
            "symbol": {"type": "string"},
            "days": {"type": "integer", "minimum": 1},
            "fields": {"type": "array", "items": {"enum": ["open", "close"]}},
        },
        "required": ["symbol"],
    },
}


def of(properties, **rest):
    return Tool.from_schema(
        {"name": "f", "parameters": {"type": "object", "properties": properties, **rest}}
    )


def test_from_schema_creates_the_described_tool():
    wrapped = {"type": "function", "function": STOCK}
    assert Tool.from_schema(STOCK).schema() == Tool.from_schema(wrapped).schema() == wrapped
    assert Tool.from_schema(STOCK, lambda symbol: [symbol])(symbol="TSLA") == ["TSLA"]
    assert Tool.from_schema(tool(plain).schema()).schema() == tool(plain).schema()
    described_only = Tool.from_schema({"name": "now", "parameters": None})
    assert described_only.parameters == {"type": "object", "properties": {}}
    for call in (described_only, partial(run_tool, described_only, {})):
        with pytest.raises(ToolError, match="now has no function"):
            call()


@pytest.mark.parametrize("key", ["inputSchema", "input_schema", "parameters"])
def test_tools_as_others_publish_them_keep_their_arguments(key):
    published = {key: STOCK["parameters"], "name": STOCK["name"], "title": "Stock", "x": 1}
    for schema in (published, {"type": "function", "function": published}):
        made = Tool.from_schema(schema, lambda symbol: symbol)
        assert made.parameters == STOCK["parameters"]
        check_arguments(made, {"symbol": "TSLA"})
        with pytest.raises(ArgumentError, match=".symbol. is a required property"):
            check_arguments(made, {})
    none = {"type": "function", "function": {"name": "now", "description": "The time."}}
    assert Tool.from_schema(none).parameters == {"type": "object", "properties": {}}


def test_a_tool_keeps_its_own_copy_of_the_schema():
    schema = {
        "name": "f",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
    }
    made = Tool.from_schema(schema)
    schema["parameters"]["properties"]["x"]["type"] = "string"
    check_arguments(made, {"x": 1})


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("now", "a tool is {"),
        ({"function": None}, "a tool is {"),
        ({"parameters": {}}, "a tool is {"),
        ({"name": "f"}, "tool 'f' has no schema of its arguments: it is missing under parameters"),
        ({"name": "f", "schema": {}}, "has no schema of its arguments"),
        ({"type": "function", "function": {"name": "f", "args": {}}}, "has no schema of its"),
        (
            {"name": "f", "description": ["x"], "parameters": {}},
            "the description is list, not text",
        ),
        ({"name": "f", "parameters": []}, "a schema is a JSON object, not list"),
        ({"name": "f", "parameters": {"type": "array"}}, "must be of type object, not 'array'"),
        (
            {"name": "f", "parameters": {"type": "objekt"}},
            'malformed schema: type: "objekt" is not one of',
        ),
        (
            {"name": "f", "parameters": {"required": "x"}},
            'malformed schema: required: "x" is not of type "array"',
        ),
        (
            {"name": "f", "parameters": {"properties": {"x": {"pattern": "("}}}},
            r'properties/x/pattern: "\("',
        ),
        ({"name": "f", "parameters": {"enum": {1, 2}}}, "type set is not JSON"),
        ({"name": "f", "parameters": {"minimum": math.nan}}, "not JSON compliant"),
        ({"name": "f", "parameters": {}, "return": {1, 2}}, "type set is not JSON"),
    ],
)
def test_a_malformed_schema_is_refused(schema, message):
    with pytest.raises(SchemaError, match=message) as error:
        Tool.from_schema(schema)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"not": {"$ref": "#/$defs/b"}}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}},
        },
        {"properties": {"x": {"if": {"$ref": "#/properties/x"}}}},
        {"dependentSchemas": {"x": {"$ref": "#"}}},
        {"$dynamicAnchor": "here", "oneOf": [{"$dynamicRef": "#here"}]},
    ],
)
def test_a_schema_that_leads_back_to_itself_is_refused(schema):
    with pytest.raises(SchemaError, match="leads back to itself"):
        Tool.from_schema({"name": "f", "parameters": schema})


def test_a_recursive_schema_is_not_endless():
    node = {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "children": {"items": {"$ref": "#/$defs/n"}}},
    }
    made = of({"root": {"$ref": "#/$defs/n"}}, **{"$defs": {"n": node}})
    check_arguments(made, {"root": {"value": 1, "children": [{"children": [{"value": 2}]}]}})
    with pytest.raises(
        ArgumentError, match=r'root.children\[0\].children\[0\].value: "2" is not of type "integer"'
    ):
        check_arguments(made, {"root": {"value": 1, "children": [{"children": [{"value": "2"}]}]}})
    with pytest.raises(ArgumentError, match="nested"):
        check_arguments(made, {"root": nested({}, 40, lambda inner: {"children": [inner]})})


DRAFT_3 = "http://json-schema.org/draft-03/schema#"


@pytest.fixture
def server():
    """Counts requests, and answers each with a schema that allows everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    requests = []
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/schema", requests
        server.shutdown()


def test_a_reference_to_elsewhere_is_never_fetched(server, tmp_path):
    url, requests = server
    (tmp_path / "schema.json").write_text("{}")
    for place in (
        url,
        (tmp_path / "schema.json").as_uri(),
        "https://json-schema.org/draft/2020-12/schema",
        "other",
    ):
        for schema in (
            {"$ref": place},
            {"$dynamicRef": place},
            {"$id": url + "/base", "$ref": place},
            {"properties": {"x": {"anyOf": [{"items": {"$ref": f"{place}#/x"}}]}}},
            {"$defs": {"unused": {"$ref": place}}},
            {"$ref": "#/definitions/a", "definitions": {"a": {"$ref": place}}},
            {"$schema": "http://json-schema.org/draft-03/schema#", "items": {"$ref": place}},
        ):
            with pytest.raises(
                SchemaError, match=r"its \$ref .* leads nowhere in it, and nothing is fetched"
            ):
                compile_schema(schema)
    # In draft 7 and before, `dependencies` has schemas.
    with pytest.raises(SchemaError, match="leads nowhere"):
        compile_schema({"dependencies": {"x": {"$ref": url}}})
    with pytest.raises(SchemaError, match=r"a \$schema of its own"):
        compile_schema({"items": {"$schema": DRAFT_3, "extends": {"$ref": url}}})
    assert requests == []


def test_the_validator_left_to_itself_would_fetch(server):
    url, requests = server
    jsonschema_rs.validator_for({"$ref": url}).is_valid(1)
    assert requests == ["/schema"]


def test_even_an_unchecked_reference_is_not_fetched(server, monkeypatch):
    url, requests = server
    monkeypatch.setattr(References, "target", lambda self, node, reference: True)
    with pytest.raises(SchemaError, match="is not fetched"):
        compile_schema({"$ref": url})
    assert requests == []


@pytest.mark.parametrize(
    "reference", ["#/nowhere", "#/required", "#/properties", "#anchor", "http://[::1"]
)
def test_a_reference_to_an_invalid_schema_is_refused(reference):
    properties = {"x": {"$ref": reference}, "type": {"type": "integer"}}
    with pytest.raises(SchemaError, match="malformed schema"):
        of(properties, required=["x"])


def test_a_property_named_like_a_keyword_is_a_property():
    made = of(
        {
            "$ref": {"type": "integer"},
            "$schema": {"type": "string"},
            "x": {"const": {"$ref": "http://a"}},
        }
    )
    check_arguments(made, {"$ref": 1, "$schema": "s", "x": {"$ref": "http://a"}})


# ---- arguments


@tool
def typed(
    whole: int = 0,
    real: float = 0.0,
    flag: bool = False,
    text: str = "",
    maybe: Literal["a", "b"] | None = None,
    many: list[int] | None = None,
    table: dict[str, float] = {},
    either: int | list[int] = 0,
) -> list:
    """Says what it got.

    Args:
        whole: an integer
        real: a number
        flag: true or false
        text: any text
        maybe: a or b or null
        many: integers
        table: numbers by name
        either: one or many
    """
    return [whole, real, flag, text, maybe, many, table, either]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"whole": 3, "real": 3},
        {"whole": 3.0},
        {"whole": 10**30, "real": -1e300},
        {"flag": True, "text": "</tool_call>\n\0é日本"},
        {"maybe": None, "many": None},
        {"maybe": "a", "many": []},
        {"table": {"": 1.5, "x": 2}},
        {"either": 1},
        {"either": [1, 2.0]},
    ],
)
def test_arguments_of_the_schema_pass(arguments):
    check_arguments(typed, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"whole": True}, 'typed: whole: true is not of type "integer"'),
        ({"real": False}, 'typed: real: false is not of type "number"'),
        ({"whole": 3.5}, 'typed: whole: 3.5 is not of type "integer"'),
        ({"whole": "3"}, 'typed: whole: "3" is not of type "integer"'),
        ({"whole": None}, 'typed: whole: null is not of type "integer"'),
        ({"flag": 0}, 'typed: flag: 0 is not of type "boolean"'),
        ({"text": 0}, 'typed: text: 0 is not of type "string"'),
        ({"maybe": "c"}, 'typed: maybe: "c" is not one of ["a", "b", null]'),
        ({"many": [1, None]}, 'typed: many[1]: null is not of type "integer"'),
        ({"many": {}}, "typed: many: {} is not of types (null, array)"),
        ({"table": {"x": "y"}}, 'typed: table.x: "y" is not of type "number"'),
        (
            {"either": "x"},
            'typed: either: "x" is not of type "integer", or either: "x" is not of type "array"',
        ),
        (
            {"flag": 0, "text": 1},
            'typed: flag: 0 is not of type "boolean"; text: 1 is not of type "string"',
        ),
        ({"real": math.inf}, "typed: not JSON: Out of range float values are not JSON compliant"),
        ({"real": math.nan}, "typed: not JSON: Out of range float values are not JSON compliant"),
        ([], "typed: the arguments must be a JSON object, not list"),
        (None, "typed: the arguments must be a JSON object, not NoneType"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(arguments, message):
    with pytest.raises(ArgumentError) as error:
        check_arguments(typed, arguments)
    assert str(error.value).startswith(message)


def test_missing_and_unknown_arguments_are_named():
    stock = Tool.from_schema(STOCK)
    with pytest.raises(ArgumentError) as error:
        check_arguments(stock, {"ticker": "TSLA", "days": 0})
    assert str(error.value) == (
        'get_stock_price: "symbol" is a required property; days: 0 is less than the minimum of 1; '
        "Unevaluated properties are not allowed ('ticker' was unexpected); known: symbol, days, "
        "fields"
    )


def test_unknown_arguments_are_allowed_only_if_the_schema_says_so():
    x = {"x": {"type": "integer"}}
    check_arguments(of(x, additionalProperties=True), {"x": 1, "y": 2})
    check_arguments(of(x, additionalProperties={"type": "integer"}), {"x": 1, "y": 2})
    check_arguments(of({}, patternProperties={"^y": {}}), {"y1": 2})
    check_arguments(of(x, allOf=[{"properties": {"y": {"type": "integer"}}}]), {"x": 1, "y": 2})
    check_arguments(of({"inner": {"type": "object", "properties": x}}), {"inner": {"y": 2}})
    for refusing in (of(x), of(x, additionalProperties=False), of({}), Tool("f", "", {})):
        with pytest.raises(ArgumentError, match=r"\('y' was unexpected\); known: (x|none)$"):
            check_arguments(refusing, {"y": 2})


def nested(value, levels, around):
    for _ in range(levels):
        value = around(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        {"\udfff": 1},
        {1, 2},
        b"x",
        object(),
        1 << 20_000,
        -math.inf,
        {(1, 2): 3},
        nested([], 5000, lambda v: [v]),
    ],
    ids=[
        "surrogate",
        "surrogate key",
        "set",
        "bytes",
        "object",
        "digits",
        "infinity",
        "tuple key",
        "deep",
    ],
)
def test_arguments_that_json_cannot_hold_are_refused(value):
    with pytest.raises(ArgumentError) as error:
        check_arguments(of({"x": {}}), {"x": value})
    assert len(str(error.value).encode().splitlines()) == 1


def test_a_number_that_no_float_can_hold_is_checked():
    check_arguments(of({"x": {"multipleOf": 0.1}}), {"x": 10**400})
    with pytest.raises(ArgumentError, match="multiple of 3"):
        check_arguments(of({"x": {"multipleOf": 3}}), {"x": 10**400})


def test_a_megabyte_of_wrong_text_makes_a_short_message():
    with pytest.raises(ArgumentError, match='is not of type "integer"$') as error:
        check_arguments(typed, {"whole": "x\n" * 500_000})
    assert len(str(error.value)) < 400


def test_a_malformed_schema_in_a_handmade_tool_is_named():
    with pytest.raises(SchemaError, match="malformed schema: type: 3 is"):
        check_arguments(Tool("f", "", {"type": 3}), {})
    with pytest.raises(SchemaError, match="the parameters are list, not a dict"):
        Tool("f", "", [])


def test_without_jsonschema_rs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    for call in (partial(check_arguments, tool(plain), {"a": 1}), partial(Tool.from_schema, STOCK)):
        with pytest.raises(MistralError, match=r'pip install -e "\.\[chat\]"'):
            call()


# ---- pydantic


def test_the_function_of_a_pydantic_tool_gets_an_instance():
    got = []
    made = Tool.from_pydantic(Fund, got.append)
    assert (made.name, made.description) == ("Fund", "Fundamentals of a share.")
    assert made.parameters == {
        key: v for key, v in Fund.model_json_schema().items() if key != "description"
    }
    arguments = {"symbol": "TSLA", "since": "2024-03-01", "weights": [1, 2.0]}
    check_arguments(made, arguments)
    assert run_tool(made, arguments) is None
    assert got == [Fund(symbol="TSLA", since=date(2024, 3, 1), weights=[1, 2])]
    for wrong in (
        {},
        {"symbol": "X"},
        {"symbol": "TSLA", "since": 3},
        {"symbol": "TSLA", "extra": 1},
    ):
        with pytest.raises(ArgumentError):
            check_arguments(made, wrong)


def test_an_error_of_pydantics_own_checks_is_an_argument_error():
    made = Tool.from_pydantic(Fund, print)
    wrong = {"symbol": "TSLA", "since": "yesterday"}
    with pytest.raises(ArgumentError, match="Fund: since: Input should be") as error:
        check_arguments(made, wrong)
    assert "\n" not in str(error.value)
    with pytest.raises(ToolError, match="Fund failed with ArgumentError"):
        run_tool(made, wrong)


def test_a_pydantic_tool_can_be_renamed_and_only_described():
    made = Tool.from_pydantic(Fund, name="get_fund", description="Else.")
    assert (made.name, made.description, made.function) == ("get_fund", "Else.", None)


def test_a_class_without_a_schema_is_refused():
    class Unwritable(BaseModel):
        x: type[int] = Field(default=int)
        y: Any = None

        @classmethod
        def __get_pydantic_json_schema__(cls, core_schema, handler):
            return {"type": "objekt"}

    for model, message in (
        (Host, "is not a subclass of"),
        (Fund(symbol="xx"), "is not"),
        (Unwritable, "objekt"),
    ):
        with pytest.raises(SchemaError, match=message):
            Tool.from_pydantic(model)


# ---- running


def runner(function, parameters=None):
    return Tool("f", "", parameters or {}, function)


BOTH = pytest.mark.parametrize("time_limit", [None, 30])


@BOTH
def test_a_tool_is_called_by_keyword_in_any_order(time_limit):
    made = runner(lambda a, b: {"difference": a - b})
    assert run_tool(made, {"b": 1, "a": 3}, time_limit) == {"difference": 2}


def test_whole_numbers_reach_the_function_as_integers():
    arguments = {"whole": 3.0, "real": 3.0, "many": [1.0, 2], "table": {"x": 2.0}, "either": [4.0]}
    whole, real, *_, many, table, either = run_tool(typed, arguments)
    assert [type(x) for x in (whole, real, *many, table["x"], *either)] == [
        int,
        float,
        int,
        int,
        float,
        int,
    ]
    assert arguments["whole"] == 3.0 and type(arguments["whole"]) is float


def test_whole_numbers_are_found_in_every_part_of_a_schema():
    integer = {"type": "integer"}
    schema = {
        "properties": {"p": {"prefixItems": [{}, integer], "items": {"type": ["integer", "null"]}}}
    }
    schema["properties"]["r"] = {"type": ["integer", "number"]}
    schema |= {"additionalProperties": {"oneOf": [integer, {"type": "string"}]}}
    made = runner(lambda **arguments: [arguments["p"], arguments["q"], arguments["r"]], schema)
    result = run_tool(made, {"p": [1.0, 1.0, 1.0, 0.5], "q": 2.0, "r": 3.0})
    assert json.dumps(result) == "[[1.0, 1, 1, 0.5], 2, 3.0]"


@BOTH
def test_a_result_is_what_its_json_says(time_limit):
    assert run_tool(runner(lambda: {"a": (1, None), 2: [True, "é"]}), {}, time_limit) == {
        "a": [1, None],
        "2": [True, "é"],
    }
    kept = {"x": []}
    run_tool(runner(lambda: kept), {}, time_limit)["x"].append(1)
    assert kept == {"x": []}


def circle():
    made = []
    made.append(made)
    return made


class Strange:
    def __str__(self):
        return "strange"


class Evil(list):
    def __iter__(self):
        raise SystemExit(3)


NOON = datetime(2024, 3, 13, 12)
NAMED = namedtuple("NAMED", "x y")
RESULTS = [
    (NOON, "2024-03-13T12:00:00"),
    ({"at": NOON, "day": date(2024, 1, 1)}, {"at": "2024-03-13T12:00:00", "day": "2024-01-01"}),
    (time_of_day(1, 2), "01:02:00"),
    (timedelta(days=3), "P3D"),
    (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    (Decimal("19.90"), "19.90"),
    ([Color.RED], ["red"]),
    (Seat(4), {"row": 4, "letter": "A"}),
    ({"seats": (Seat(1), Seat(2, "B"))}, {"seats": [SEAT_1A, {"row": 2, "letter": "B"}]}),
    (Fund(symbol="TSLA", since=date(2024, 1, 2)), FUND | {"since": "2024-01-02"}),
    ({"b", "a"}, ["a", "b"]),
    (frozenset({16, 2, 1}), [1, 2, 16]),  # 16 comes first in it, whatever the seed of hashes
    ((1, (2,)), [1, [2]]),
    (NAMED(1, 2), [1, 2]),
    (math.nan, None),
    ([1.5, -math.inf], [1.5, None]),
    (np.float32(1.5), 1.5),
    ({"n": np.int64(3), "ok": np.bool_(True)}, {"n": 3, "ok": True}),
    (np.float64("nan"), None),
    (np.arange(3), [0, 1, 2]),
    (torch.tensor([[1.5]]), [[1.5]]),
    (b"\xff\x00", "data:;base64,/wA="),
    ({"png": bytearray(b"ab")}, {"png": "data:;base64,YWI="}),
    ((x for x in "ab"), ["a", "b"]),
    (range(3), [0, 1, 2]),
    ({"a": 1}.keys(), ["a"]),
    (deque([1]), [1]),
    ({1: "a", None: 2, (1, 2): 3, Color.RED: 4}, {"1": "a", "None": 2, "1,2": 3, "red": 4}),
    (Path("a/b"), "a/b"),
    (Strange(), "strange"),
    ([Strange(), object], ["strange", str(object)]),
    (ValueError("no seat"), "no seat"),
    (10**30, 10**30),
    ("3.10", "3.10"),
    ("", ""),
    (None, None),
]
UNWRITABLE = {
    "circle": (circle(), "[[...]]"),
    "surrogate": ("\ud800", "\\ud800"),
    "deep": (nested([], 65, lambda v: [v]), "[" * 66 + "]" * 66),
    # From Python 3.14 on `repr` goes that deep.
    "very deep": (nested([], 5000, lambda v: [v]), ("an object of the class list", "[[[")),
    "digits": (1 << 20_000, "an object of the class int"),
    "evil": (Evil([1]), "[1]"),
    "endless": (itertools.count(), "count("),
    "equal keys": ({1: "a", "1": "b"}, "{1: 'a', '1': 'b'}"),
}


def tool_message(value):
    return {"role": "tool", "name": "f", "content": result_text(value)}


@pytest.mark.parametrize(("result", "value"), RESULTS)
def test_a_result_has_its_obvious_json_form(result, value):
    returned = running.run_tool(runner(lambda: result), {})
    assert (returned.value, returned.problem) == (value, None)
    *_, told = check_messages([{"role": "assistant", "content": "x"}, tool_message(value)])
    assert told.result() == value


@BOTH
@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_result_that_json_cannot_hold_is_told_as_text(name, time_limit):
    result, text = UNWRITABLE[name]
    value, problem = running.run_tool(runner(lambda: result), {}, time_limit)
    assert value.startswith(text)
    assert problem and "\n" not in problem
    assert len(value.encode()) <= 2100


def random_value(random, depth=0):
    """A value of Python such as functions return, and its JSON."""
    plain = [
        lambda: (None, None),
        lambda: (True, True),
        lambda: 2 * (random.randint(-(10**20), 10**20),),
        lambda: 2 * (random.uniform(-1e9, 1e9),),
        lambda: (
            2 * (random.choice(["", "3.10", "null", "é\u2028日本</tool_response>", '{"a": 1.10}']),)
        ),
        lambda: (np.float32(0.5), 0.5),
        lambda: (math.nan, None),
        lambda: (NOON, "2024-03-13T12:00:00"),
        lambda: (Decimal("1.10"), "1.10"),
        lambda: (Color.BLUE, "blue"),
        lambda: (b"ab", "data:;base64,YWI="),
        lambda: (Seat(3), {"row": 3, "letter": "A"}),
    ]
    if depth == 3 or random.random() < 0.4:
        return random.choice(plain)()
    items = [random_value(random, depth + 1) for _ in range(random.randint(0, 4))]
    values, written = [one for one, _ in items], [one for _, one in items]
    names = [random.choice("abc") + str(i) for i in range(len(items))]
    made = random.choice([list, tuple, iter, dict])
    if made is dict:
        return dict(zip(names, values)), dict(zip(names, written))
    return made(values), written


def test_any_value_reaches_the_model_as_its_json():
    random = Random(0)
    for _ in range(500):
        value, written = random_value(random)
        text = result_text(running.run_tool(runner(lambda value=value: value), {}).value)
        *_, told = check_messages(
            [{"role": "assistant", "content": ""}, {"role": "tool", "name": "f", "content": text}]
        )
        line = write_json_result("f", told.result_json()).split("\n")[1]
        read = json.loads(line)["content"]
        # Text that is JSON is read as JSON: only the text itself tells them apart.
        assert read == written or (isinstance(written, str) and read == json.loads(written))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("It is sunny.", "It is sunny."),
        ("", '""'),
        ("3.10", '"3.10"'),
        ("null", '"null"'),
        ("NaN", "NaN"),
        ('{"price":  1.10}', '{"price":  1.10}'),
        ("[1, 2]", "[1, 2]"),
        ('"quoted"', '"quoted"'),
        ("größe 日本", "größe 日本"),
        (["größe", 1.5, None], '["größe", 1.5, null]'),
        (3, "3"),
    ],
)
def test_text_is_not_written_twice_as_json(value, text):
    assert result_text(value) == text


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no")


class NoException(BaseException):
    pass


RAISED = [
    (ZeroDivisionError("division by zero"), "f failed with ZeroDivisionError: division by zero"),
    (ValueError("two\n\nlines \ud800"), "f failed with ValueError: two lines \\ud800"),
    (SystemExit(3), "f failed with SystemExit: 3"),
    (NoException(), "f failed with NoException"),
    (GeneratorExit(), "f failed with GeneratorExit"),
    (Unspeakable(), "f failed with Unspeakable"),
    (ToolError("no such file"), "f failed with ToolError: no such file"),
    (StopIteration(), "f failed with StopIteration"),
    (MemoryError(), "f failed with MemoryError"),
]


@BOTH
@pytest.mark.parametrize(("raised", "message"), RAISED, ids=lambda v: type(v).__name__)
def test_whatever_the_function_raises_is_a_tool_error(raised, message, time_limit):
    def f():
        raise raised

    with pytest.raises(ToolError) as error:
        run_tool(runner(f), {}, time_limit)
    assert str(error.value) == message
    assert error.value.__cause__ is raised


@BOTH
def test_an_endless_recursion_is_a_tool_error(time_limit):
    def f():
        return f()

    with pytest.raises(ToolError, match="f failed with RecursionError"):
        run_tool(runner(f), {}, time_limit)


@BOTH
def test_arguments_that_the_function_does_not_take_are_a_tool_error(time_limit):
    for arguments in ({"y": 1}, {"x": math.nan}, {"x": object()}, {"self": 1}, {1: 2}):
        with pytest.raises(ToolError, match="f failed with"):
            run_tool(runner(lambda x: x), arguments, time_limit)


@BOTH
def test_an_interrupt_is_passed_on(time_limit):
    def f():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tool(runner(f), {}, time_limit)


def test_a_long_message_is_shortened():
    def f():
        raise ValueError("x" * 1_000_000)

    with pytest.raises(ToolError) as error:
        run_tool(runner(f), {})
    assert len(str(error.value)) < 400


def test_a_tool_that_hangs_is_abandoned():
    free = threading.Event()
    start = time.monotonic()
    with pytest.raises(StillRunning, match=r"f did not finish within 0\.05 seconds"):
        run_tool(runner(free.wait), {}, time_limit=0.05)
    assert time.monotonic() - start < 5
    free.set()


@pytest.mark.parametrize("time_limit", [math.inf, 1e300])
def test_a_limit_may_be_beyond_what_threads_can_wait(time_limit):
    assert run_tool(runner(lambda: 1), {}, time_limit) == 1


@pytest.mark.parametrize("time_limit", [0, -1, math.nan])
def test_a_limit_of_nothing_is_over_at_once(time_limit):
    free = threading.Event()
    with pytest.raises(ToolError, match="did not finish"):
        run_tool(runner(free.wait), {}, time_limit)
    free.set()


def test_a_thread_that_cannot_be_started_is_a_tool_error(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ToolError, match="f could not be started: can't start new thread"):
        run_tool(runner(lambda: 1), {}, time_limit=1)


def test_a_tool_that_hangs_does_not_keep_the_process_alive():
    code = """
import time
from mistral.chat.tools.functions import Tool, ToolError
from mistral.chat.tools.running import run_tool
try:
    run_tool(Tool("f", "", {}, lambda: time.sleep(3600)), {}, time_limit=0.05)
except ToolError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (result.returncode, result.stdout) == (0, "f did not finish within 0.05 seconds\n"), (
        result.stderr
    )


def test_the_limit_of_a_tool_counts_from_its_start():
    free = threading.Event()
    running_tool = running.RunningTool(runner(lambda: free.wait(20)), {})
    running_tool._start -= 100
    start = time.monotonic()
    with pytest.raises(StillRunning):
        running_tool.wait(8)
    free.set()
    assert time.monotonic() - start < 4


def test_a_key_of_a_dict_may_be_left_out():
    class Place(TypedDict):
        city: str
        country: NotRequired[str]

    def f(place: Place) -> None:
        """Go.

        Args:
            place: where to
        """

    assert tool(f).parameters["properties"]["place"]["required"] == ["city"]


@pytest.mark.parametrize("name", ["auto", "none", "required"])
def test_a_tool_is_not_named_like_a_choice(name):
    with pytest.raises(ValueError, match="which is a tool_choice"):
        tool_table([Tool(name, "", {}, print)])

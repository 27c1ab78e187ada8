"""Tools: functions that a model may call, described to it by a JSON schema.

    @tool
    def area(width: float, height: float, unit: Literal["m", "ft"] = "m") -> str:
        '''Area of a rectangle.

        Args:
            width: how wide it is
            height: how high it is
            unit: what both are measured in
        '''
        return f"{width * height} square {unit}"

What a model writes is checked (`check_arguments`), then run (`run_tool`). Nothing it writes is ever
evaluated.
"""

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mistral.chat.tools.docstrings import function_schema
from mistral.chat.tools.json_schema import (
    SchemaError,
    as_json,
    compile_schema,
    one_line,
    problem,
    pydantic_schema,
)
from mistral.errors import MistralError

CHOICES = ("auto", "none", "required")  # what a tool choice can be besides a tool's name
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ArgumentError(MistralError, ValueError):
    """Arguments that a tool's schema does not allow; the message is for the model to read."""


class ToolError(MistralError, RuntimeError):
    """A call that failed; the message is for the model to read."""


@dataclass(frozen=True, eq=False)
class Tool:
    """A function that a model may call. Calling the tool calls the function.

    name         letters, digits and _ . - (64 at most): what the model writes
    description  what the model reads
    parameters   JSON schema of the arguments, an object
    function     is called with the arguments as keywords; None: the tool can be described, not run
    returns      JSON schema of the result, if the model is to read one

    Raises ValueError for another name and for parameters that are no dict; ToolError when a tool
    without a function is called.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any] | None = None
    returns: dict[str, Any] | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(
                f"{self.name!r} cannot be a tool's name: 1 to 64 of the letters a-z A-Z, digits "
                f"and _ . -"
            )
        if not isinstance(self.parameters, dict):
            raise SchemaError(
                f"tool {self.name}: the parameters are {type(self.parameters).__name__}, not a dict"
            )

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self.function is None:
            raise ToolError(f"{self.name} has no function: it can be described, not called")
        return self.function(*args, **kwargs)

    def schema(self) -> dict[str, Any]:
        """The tool as the system prompts describe it: {"type": "function", "function": {...}}."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        if self.returns is not None:
            function["return"] = self.returns
        return {"type": "function", "function": function}

    @classmethod
    def from_schema(
        cls, schema: Mapping[str, Any], function: Callable[..., Any] | None = None
    ) -> "Tool":
        """A tool from {"type": "function", "function": {"name", "description", "parameters"}} or
        the inner object.

        Without parameters it takes no arguments; keys other than these and "return" are left out.
        Raises SchemaError for a schema that is malformed, endless or points outside of itself,
        ValueError for a name that no model could write. Needs the extra `chat`.
        """
        inner = schema.get("function", schema) if isinstance(schema, Mapping) else None
        if not isinstance(inner, Mapping) or "name" not in inner:
            raise SchemaError(
                'a tool is {"type": "function", "function": {"name", "description", "parameters"}}'
            )
        name, description = inner["name"], inner.get("description") or ""
        parameters = inner.get("parameters")
        if parameters is None:
            parameters = {"type": "object", "properties": {}}
        if not isinstance(description, str):
            raise SchemaError(
                f"tool {name!r}: the description is {type(description).__name__}, not text"
            )
        try:
            compile_schema(parameters)
            if parameters.get("type", "object") != "object":
                raise SchemaError(
                    f"the parameters must be of type object, not {parameters['type']!r}"
                )
            returns = None if inner.get("return") is None else as_json(inner["return"])
        except ValueError as error:
            raise SchemaError(f"tool {name!r}: {error}") from None
        return cls(name, description, as_json(dict(parameters)), function, returns)

    @classmethod
    def from_pydantic(
        cls,
        model: type,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        description: str | None = None,
    ) -> "Tool":
        """A tool whose arguments are the fields of a pydantic 2 model.

        The name and the description are the class's, its docstring being the description.
        `function` is called with one instance of the model, so that pydantic's own checks and
        conversions have run. Raises SchemaError for a class that is none or has no schema. Needs
        the extra `chat`.
        """
        parameters = pydantic_schema(model)
        documented = parameters.pop("description", "")

        def call(**arguments: Any) -> Any:
            return function(model.model_validate_json(json.dumps(arguments)))

        inner = {
            "name": name or model.__name__,
            "description": description or documented,
            "parameters": parameters,
        }
        return cls.from_schema(inner, call if function else None)

    @functools.cached_property
    def _validator(self) -> Any:
        says_nothing = {"additionalProperties", "unevaluatedProperties"}.isdisjoint(self.parameters)
        # Then an argument that the schema does not name is an error, for models make some up
        return compile_schema(
            self.parameters | ({"unevaluatedProperties": False} if says_nothing else {})
        )


def tool(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """A tool from a function with type hints and a Google docstring; a decorator, with or without
    arguments.

    name         what the model calls it; None: the function's name
    description  None: the docstring up to its first section

    The schema is the one that transformers' `get_json_schema` makes. Arguments reach the function
    as JSON has them: a tuple is a list. Raises SchemaError for a function that no schema can be
    made of, with the reason.
    """
    if function is None:
        return functools.partial(tool, name=name, description=description)
    schema = function_schema(function, name, description)
    return Tool(
        schema["name"], schema["description"], schema["parameters"], function, schema.get("return")
    )


def tool_table(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Name -> tool. ValueError for two tools of one name, for the name of a choice, and for what is
    no tool.
    """
    table: dict[str, Tool] = {}
    for one in tools:
        if not isinstance(one, Tool):
            raise ValueError(f"{one!r} is not a Tool: make one with @tool or Tool.from_schema")
        if one.name in CHOICES:
            raise ValueError(
                f"a tool cannot be named {one.name!r}, which is a choice of tools; use "
                f"tool(name=...)"
            )
        if one.name in table:
            raise ValueError(f"two tools are named {one.name!r}; rename one with tool(name=...)")
        table[one.name] = one
    return table


def check_arguments(tool: Tool, arguments: Any) -> None:
    """Hold arguments against the tool's schema.

    As in JSON Schema a bool is no integer, and 3.0 is one. An argument that the schema does not
    name is an error unless the schema says `additionalProperties`. Raises ArgumentError, in one
    line for the model, and SchemaError where the schema itself is no good. Needs the extra `chat`.
    """
    if not isinstance(arguments, Mapping):
        raise ArgumentError(
            f"{tool.name}: the arguments must be a JSON object, not {type(arguments).__name__}"
        )
    if wrong := problem(tool._validator, dict(arguments)):
        raise ArgumentError(f"{tool.name}: {wrong}")


def run_tool(tool: Tool, arguments: Mapping[str, Any], time_limit: float | None = None) -> Any:
    """Call the tool with checked arguments as keywords; returns its result as JSON has it (a tuple
    is a list).

    3.0 is passed as 3 where the schema says integer (`$ref`s are not followed for that).
    time_limit  seconds. The function then runs in a thread of its own, which is left behind when
                time is up: Python cannot end a thread, so it goes on until it is done or the
                process ends. None: in this thread.

    Raises ToolError, and nothing else but KeyboardInterrupt: for an exception in the function
    (SystemExit included), for a result that JSON cannot hold (other objects, sets, NaN, circles),
    and when the time is up.
    """
    if tool.function is None:
        raise ToolError(f"{tool.name} has no function: it can be described, not called")
    if time_limit is None:
        return _call(tool, arguments)
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((_call(tool, arguments), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, name=f"tool {tool.name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # too many threads, left behind by tools that hang
        raise ToolError(f"{tool.name} could not be started: {error}") from error
    thread.join(max(0, min(time_limit, threading.TIMEOUT_MAX)))
    if not outcome:
        raise ToolError(f"{tool.name} did not finish within {time_limit:g} seconds")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _call(tool: Tool, arguments: Mapping[str, Any]) -> Any:
    what = "failed with"
    try:
        result = tool.function(**_whole_numbers(as_json(dict(arguments)), tool.parameters))
        what = "returned what JSON cannot hold:"
        return as_json(result)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ToolError(f"{tool.name} {what} {_name_error(error)}") from error


def _name_error(error: BaseException) -> str:
    try:
        return one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    except Exception:  # the exception cannot say what it is
        return type(error).__name__


def _whole_numbers(value: Any, schema: Any) -> Any:
    """3.0 becomes 3 where the schema says integer: for JSON Schema they are one number, for
    Python's functions not.
    """
    if not isinstance(schema, Mapping):
        return value
    for keyword in ("allOf", "anyOf", "oneOf"):
        for branch in schema.get(keyword, ()):
            value = _whole_numbers(value, branch)
    if isinstance(value, dict):
        named, others = schema.get("properties", {}), schema.get("additionalProperties")
        return {key: _whole_numbers(inner, named.get(key, others)) for key, inner in value.items()}
    if isinstance(value, list):
        first, others = schema.get("prefixItems", []), schema.get("items")
        return [
            _whole_numbers(inner, first[i] if i < len(first) else others)
            for i, inner in enumerate(value)
        ]
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    whole = (
        isinstance(value, float)
        and value.is_integer()
        and "integer" in kinds
        and "number" not in kinds
    )
    return int(value) if whole else value

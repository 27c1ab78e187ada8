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

A model's arguments are checked (`check_arguments`), then the function runs (`run_tool`). Nothing
that a model writes is evaluated.
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
    problem,
    pydantic_schema,
)
from mistral.errors import MistralError, one_line

_CHOICES = ("auto", "none", "required")  # a tool choice is one of these, or a tool's name
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ArgumentError(MistralError, ValueError):
    """Arguments that a tool's schema does not allow; the message is for the model to read."""


class ToolError(MistralError, RuntimeError):
    """A call that failed; the message is for the model to read."""


@dataclass(frozen=True, eq=False)
class Tool:
    """A function that a model may call. Calling the tool calls the function.

    name         letters, digits and _ . - (64 at most)
    description  for the model
    parameters   JSON schema of the arguments, an object
    function     is called with the arguments as keywords; None: the tool can be described, not run
    returns      JSON schema of the result, if the model is to know it

    Raises ValueError for an invalid name and for parameters that are not a dict; ToolError when a
    tool without a function is called.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any] | None = None
    returns: dict[str, Any] | None = None

    def __post_init__(self):
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ValueError(
                f"{self.name!r} cannot be a tool's name: "
                "it has 1 to 64 of the letters a-z A-Z, digits and _ . -"
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
        """The tool as in the system prompts: {"type": "function", "function": {...}}."""
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
        """A tool from {"type": "function", "function": {...}} or from the inner object.

        The inner object has "name", "description", "parameters" (without them the tool takes no
        arguments) and "return"; other keys are ignored. Raises SchemaError for a schema that is
        malformed, endless or refers to another document, ValueError for an invalid name. Needs the
        extra `chat`.
        """
        inner = schema.get("function", schema) if isinstance(schema, Mapping) else None
        if not isinstance(inner, Mapping) or "name" not in inner:
            raise SchemaError(
                'a tool is {"type": "function", "function": {"name", "description", "parameters"}}'
            )
        name = inner["name"]
        description = inner.get("description") or ""
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
        return cls(
            name=name,
            description=description,
            parameters=as_json(dict(parameters)),
            function=function,
            returns=returns,
        )

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

        The name and the description (its docstring) are the class's. `function` is called with
        one instance of the model, so that pydantic's own checks and conversions have run. Raises
        SchemaError for a class that is not such a model or has no schema. Needs the extra `chat`.
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
        # Models invent arguments: unless the schema allows others, they are errors.
        parameters = self.parameters
        if {"additionalProperties", "unevaluatedProperties"}.isdisjoint(parameters):
            parameters = parameters | {"unevaluatedProperties": False}
        return compile_schema(parameters)


def tool(
    function: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    description: str | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """A tool from a function with type hints and a Google docstring.

    A decorator, with or without arguments.

    name         for the model; None: the function's name
    description  None: the docstring up to its first section

    The schema is the same as from transformers' `get_json_schema`. The function gets arguments as
    in JSON: a tuple is a list. Raises SchemaError, with the reason, for a function that has no
    schema.
    """
    if function is None:
        return functools.partial(tool, name=name, description=description)
    schema = function_schema(function, name, description)
    return Tool(
        name=schema["name"],
        description=schema["description"],
        parameters=schema["parameters"],
        function=function,
        returns=schema.get("return"),
    )


def wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema as {"type": "function", "function": {...}}; it may be the inner object."""
    return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}


def tool_table(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Name -> tool.

    ValueError for two tools with one name, the name of a choice, and a value that is not a tool.
    """
    table: dict[str, Tool] = {}
    for one in tools:
        if not isinstance(one, Tool):
            raise ValueError(f"{one!r} is not a Tool: create one with @tool or Tool.from_schema")
        if one.name in _CHOICES:
            raise ValueError(
                f"a tool cannot be named {one.name!r}, which is a tool_choice; "
                "rename it with tool(name=...)"
            )
        if one.name in table:
            raise ValueError(f"two tools are named {one.name!r}; rename one with tool(name=...)")
        table[one.name] = one
    return table


def check_arguments(tool: Tool, arguments: Any) -> None:
    """Check arguments against the tool's schema.

    As in JSON Schema a bool is not an integer, and 3.0 is one. An argument that the schema does not
    name is an error unless the schema has `additionalProperties`. Raises ArgumentError, one line
    for the model, and SchemaError if the schema itself is invalid. Needs the extra `chat`.
    """
    if not isinstance(arguments, Mapping):
        raise ArgumentError(
            f"{tool.name}: the arguments must be a JSON object, not {type(arguments).__name__}"
        )
    if wrong := problem(tool._validator, dict(arguments)):
        raise ArgumentError(f"{tool.name}: {wrong}")


def run_tool(tool: Tool, arguments: Mapping[str, Any], time_limit: float | None = None) -> Any:
    """Call the tool with checked arguments as keywords; returns its result as in JSON.

    A tuple in the result is a list. The argument 3.0 is passed as 3 if the schema says integer
    (`$ref`s are not followed for that).

    time_limit  seconds. The function then runs in a thread of its own, which is abandoned when
                time is up: Python cannot end a thread, so it runs until the function returns or
                the process ends. None: in this thread.

    Raises only ToolError and KeyboardInterrupt: for an exception in the function (SystemExit
    included), for a result that JSON cannot hold (other objects, sets, NaN, circles), and when the
    time is up.
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
    except RuntimeError as error:  # too many threads, abandoned by tools that hang
        raise ToolError(f"{tool.name} could not be started: {error}") from error
    thread.join(max(0, min(time_limit, threading.TIMEOUT_MAX)))
    if not outcome:
        raise ToolError(f"{tool.name} did not finish within {time_limit:g} seconds")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _call(tool: Tool, arguments: Mapping[str, Any]) -> Any:
    failed = "failed with"
    try:
        result = tool.function(**_whole_numbers(as_json(dict(arguments)), tool.parameters))
        failed = "returned a value that JSON cannot hold:"
        return as_json(result)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ToolError(f"{tool.name} {failed} {_name_error(error)}") from error


def _name_error(error: BaseException) -> str:
    try:
        return one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
    except Exception:  # its own __str__ failed
        return type(error).__name__


def _whole_numbers(value: Any, schema: Any) -> Any:
    """3.0 becomes 3 if the schema says integer: JSON Schema does not tell them apart."""
    if not isinstance(schema, Mapping):
        return value
    for keyword in ("allOf", "anyOf", "oneOf"):
        for branch in schema.get(keyword, ()):
            value = _whole_numbers(value, branch)
    if isinstance(value, dict):
        named = schema.get("properties", {})
        others = schema.get("additionalProperties")
        return {key: _whole_numbers(inner, named.get(key, others)) for key, inner in value.items()}
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        others = schema.get("items")
        return [
            _whole_numbers(inner, first[i] if i < len(first) else others)
            for i, inner in enumerate(value)
        ]
    types = schema.get("type", ())
    types = (types,) if isinstance(types, str) else types
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and "integer" in types and "number" not in types else value

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

A model's arguments are checked (`check_arguments`), then the function runs (`running.run_tool`).
Nothing that a model writes is evaluated.
"""

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mistral.chat.tools.json_schema import (
    SchemaError,
    as_json,
    compile_schema,
    problem,
    pydantic_schema,
)
from mistral.chat.tools.signatures import ArgumentError, function_signature, validation_problem
from mistral.errors import MistralError

_CHOICES = ("auto", "none", "required")  # a tool choice is one of these, or a tool's name
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


_PARAMETERS = ("parameters", "inputSchema", "input_schema")  # OpenAI's key, MCP's, Anthropic's
_WITHOUT_PARAMETERS = {"name", "description", "strict", "return"}


class ToolError(MistralError, RuntimeError):
    """A call that failed; the message is for the model to read."""


class StillRunning(ToolError):
    """A function was started, and whether it has done its work is not known."""


@dataclass(frozen=True, eq=False)
class Tool:
    """A function that a model may call. Calling the tool calls the function.

    name         letters, digits and _ . - (64 at most)
    description  for the model
    parameters   JSON schema of the arguments, an object
    function     is called with the arguments as keywords; None: the tool can be described, not run
    returns      JSON schema of the result, if the model is to know it
    convert      JSON arguments -> keywords for the function, or ArgumentError; None: the keywords
                 are the arguments, but 3.0 is 3 if the schema says integer

    Raises ValueError for an invalid name and for parameters that are not a dict; ToolError when a
    tool without a function is called.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    function: Callable[..., Any] | None = None
    returns: dict[str, Any] | None = None
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None

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
        """A tool from its published description, in the form of OpenAI, MCP or Anthropic.

        That is {"type": "function", "function": {...}} or the inner object, with "name",
        "description", "parameters" (null: it takes no arguments) and "return"; MCP's tools have
        "inputSchema" in place of "parameters", Anthropic's "input_schema". Other keys are ignored.
        Raises SchemaError for a schema that is missing, malformed, endless or refers to another
        document, ValueError for an invalid name. Needs the extra `chat`.
        """
        inner = wrapped(schema)["function"] if isinstance(schema, Mapping) else None
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

        def instance(arguments: dict[str, Any]) -> Any:
            return model.model_validate_json(json.dumps(arguments))

        def call(**arguments: Any) -> Any:
            return function(instance(arguments))

        def check(arguments: dict[str, Any]) -> dict[str, Any]:
            try:
                instance(arguments)
            except ValueError as error:  # a check of the class that no schema can express
                problem = validation_problem(error) if hasattr(error, "errors") else str(error)
                raise ArgumentError(f"{inner['name']}: {problem}") from None
            return arguments

        inner = {
            "name": name or model.__name__,
            "description": description or documented,
            "parameters": parameters,
        }
        return replace(cls.from_schema(inner, call if function else None), convert=check)

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
    """A tool from a function with type hints: a decorator, with or without arguments.

    name         for the model; None: the function's name
    description  None: the docstring up to its first section

    The docstring may be in Google's style, numpy's or Sphinx's. The schema has the words of
    transformers' `get_json_schema`. The function gets values of the types that it asks for, because
    pydantic converts the arguments. Methods, `functools.partial` and `async def` are functions,
    too. Raises SchemaError, with the reason, for a function that has no schema. Needs the extra
    `chat`.
    """
    if function is None:
        return functools.partial(tool, name=name, description=description)
    # The type hints of a function that was written in another may be local names.
    local_names = sys._getframe(1).f_locals
    signature = function_signature(function, name, description, local_names)
    return Tool(**signature._asdict(), function=function)


def wrapped(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A published tool as {"type": "function", "function": {..., "parameters": ...}}.

    SchemaError for one that has a name, but no schema under a known key. Only OpenAI's own form may
    be without one: its function takes no arguments.
    """
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or "name" not in function:
        return dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
    inner = dict(function)
    if "function" not in tool and inner.get("type") == "function":
        del inner["type"]  # OpenAI's Responses interface
    keys = [key for key in _PARAMETERS if key in inner]
    takes_none = "function" in tool and inner.keys() <= _WITHOUT_PARAMETERS
    if not keys and not takes_none:
        raise SchemaError(
            f"tool {inner['name']!r} has no schema of its arguments: it is missing under "
            f"{', '.join(_PARAMETERS)}"
        )
    if keys and keys[0] != "parameters":
        inner = {key: inner[key] for key in ("name", "description", keys[0]) if key in inner}
        inner["parameters"] = inner.pop(keys[0])
    if "function" in tool:
        return {**tool, "function": inner}
    return {"type": "function", "function": inner}


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
    keyword_arguments(tool, arguments)


def keyword_arguments(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords for the function; raises ArgumentError if a value cannot be converted."""
    copy = as_json(dict(arguments))
    return tool.convert(copy) if tool.convert else _whole_numbers(copy, tool.parameters)


def _whole_numbers(value: Any, schema: Any) -> Any:
    """3.0 becomes 3 if the schema says integer: JSON Schema does not tell them apart."""
    if not isinstance(schema, Mapping):
        return value
    for keyword in ("allOf", "anyOf", "oneOf"):
        for branch in schema.get(keyword) or ():
            value = _whole_numbers(value, branch)
    if isinstance(value, dict):
        named = schema.get("properties") or {}
        others = schema.get("additionalProperties")
        return {key: _whole_numbers(inner, named.get(key, others)) for key, inner in value.items()}
    if isinstance(value, list):
        first = schema.get("prefixItems") or []
        others = schema.get("items")
        return [
            _whole_numbers(inner, first[i] if i < len(first) else others)
            for i, inner in enumerate(value)
        ]
    types = schema.get("type") or ()
    types = (types,) if isinstance(types, str) else types
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and "integer" in types and "number" not in types else value

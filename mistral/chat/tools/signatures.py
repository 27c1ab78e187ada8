"""A Python function as a tool: pydantic reads its type hints.

pydantic also converts the arguments: a function that asks for a date, an Enum, a dataclass or a
model gets one. The schema is written in the words of transformers: see `plain_schema`.
"""

import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from mistral.chat.tools.docstrings import read_docstring, split_choices
from mistral.chat.tools.json_schema import SchemaError
from mistral.chat.tools.plain_schema import keywords, plain_schema
from mistral.errors import MistralError, one_line

# The types of a docstring, for parameters without a type hint
_DOCUMENTED_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "any": Any}
_DOCUMENTED_TYPES |= {one.__name__: one for one in (str, int, float, bool, list, dict)}
# Keywords of a result's schema that is short and of JSON's own types
_RESULT_WORDS = {
    "type",
    "enum",
    "items",
    "prefixItems",
    "additionalProperties",
    "anyOf",
    "nullable",
    "description",
}


class ArgumentError(MistralError, ValueError):
    """Arguments that a tool's schema does not allow; the message is for the model to read."""


class Signature(NamedTuple):
    """What a model is told of a function, and how its arguments are converted.

    convert  JSON arguments -> keywords for the function; raises ArgumentError
    """

    name: str
    description: str
    parameters: dict[str, Any]
    returns: dict[str, Any] | None
    convert: Callable[[dict[str, Any]], dict[str, Any]]


def function_signature(
    function: Callable[..., Any],
    name: str | None = None,
    description: str | None = None,
    local_names: Mapping[str, Any] | None = None,
) -> Signature:
    """The signature of a function, a method, a `functools.partial` or an object with `__call__`.

    local_names  of the place where the function was written: its type hints may be names of them

    Parameters that a partial has bound are not described. Raises SchemaError, with the reason, for
    a function that has no schema, MistralError without the extra `chat`.
    """
    _check_installed()
    inner = _inner(function)
    name = name or getattr(inner, "__name__", type(inner).__name__)
    documented = read_docstring(inspect.getdoc(inner) or "")
    hints = _type_hints(name, inner, local_names or {})
    returns = hints.pop("return", inspect.Parameter.empty)
    parameters = _parameters(name, function, hints, documented.type_names)
    capture = _capture(parameters)
    schema = _schema_of(name, capture, parameters)
    for key, parameter in schema["properties"].items():
        schema["properties"][key] = _described(name, key, parameter, documented.parameters)
    return Signature(
        name=name,
        description=description or documented.description,
        parameters=schema,
        returns=_result_schema(returns, documented.returns),
        convert=_converter(name, capture, parameters),
    )


def _check_installed() -> None:
    try:
        import docstring_parser  # noqa: F401
        import pydantic  # noqa: F401
    except ImportError as error:
        raise MistralError(
            f'{error.name} is not installed; install the extra: pip install -e ".[chat]"'
        ) from None


# ---- the function


def _inner(function: Any) -> Any:
    """The function in a partial; SchemaError for a value that is not a function."""
    while isinstance(function, functools.partial):
        function = function.func
    if not callable(function) or isinstance(function, type):
        raise SchemaError(
            f"{function!r} is not a function: use Tool.from_schema or Tool.from_pydantic"
        )
    return function


def _type_hints(name: str, function: Any, local_names: Mapping[str, Any]) -> dict[str, Any]:
    hinted = function if inspect.isroutine(function) else function.__call__
    try:
        try:
            return get_type_hints(hinted, include_extras=True)
        except NameError:
            return get_type_hints(hinted, localns=dict(local_names), include_extras=True)
    except (NameError, TypeError, ValueError, AttributeError, SyntaxError) as error:
        raise SchemaError(
            f"tool {name}: its type hints cannot be read: {one_line(str(error))}"
        ) from None


def _parameters(
    name: str, function: Any, hints: Mapping[str, Any], documented: Mapping[str, str]
) -> dict[str, inspect.Parameter]:
    """Parameters by name, each with a type that pydantic can read.

    SchemaError for one that cannot be passed by name, and for one without a type.
    """
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise SchemaError(
            f"tool {name}: its parameters cannot be read: {one_line(str(error))}"
        ) from None
    while isinstance(function, functools.partial):
        parameters = {key: one for key, one in parameters.items() if key not in function.keywords}
        function = function.func
    for key, parameter in parameters.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise SchemaError(f"tool {name}: {parameter} cannot be passed by name, as models do")
        hint = hints.get(key, _documented_type(documented.get(key, "")))
        if hint is None and parameter.kind is parameter.VAR_KEYWORD:
            hint = Any
        if hint is None:
            raise SchemaError(f"tool {name}: the parameter {key} has no type hint")
        try:
            parameters[key] = parameter.replace(annotation=_for_pydantic(hint))
        except Exception as error:  # typing and pydantic raise many classes
            raise SchemaError(
                f"tool {name}: the parameter {key}: {hint!r} has no JSON schema: "
                f"{one_line(str(error))}"
            ) from None
    return parameters


def _documented_type(text: str) -> Any:
    """The type that a docstring names; Any for another text, None without one."""
    found = re.fullmatch(r"(\w+)(?: of .*|\[.*\])?(?:,.*)?", text.strip(), re.DOTALL)
    known = _DOCUMENTED_TYPES.get(found[1].lower(), Any) if found else Any
    return known if text.strip() else None


def _capture(parameters: Mapping[str, inspect.Parameter]) -> Callable[..., dict[str, Any]]:
    """A function with these parameters that returns its keywords.

    pydantic reads and calls this one, so that an error of pydantic's is never one of the tool.
    """

    def capture(**keywords: Any) -> dict[str, Any]:
        return keywords

    # A parameter with a default may stand before one without: all are passed by name.
    by_name = [
        one if one.kind is one.VAR_KEYWORD else one.replace(kind=one.KEYWORD_ONLY)
        for one in parameters.values()
    ]
    capture.__signature__ = inspect.Signature(by_name)
    capture.__annotations__ = {key: one.annotation for key, one in parameters.items()}
    return capture


def _for_pydantic(hint: Any) -> Any:
    """The hint with its texts as descriptions, and without types that pydantic refuses.

    These are the TypedDict of `typing` before Python 3.12. A list or dict without items is
    described without them, as by transformers.
    """
    from pydantic import Field, WithJsonSchema
    from typing_extensions import Doc

    if hint in (list, tuple, dict, typing.List, typing.Tuple, typing.Dict):  # noqa: UP006
        json_type = "object" if hint in (dict, typing.Dict) else "array"  # noqa: UP006
        return Annotated[get_origin(hint) or hint, WithJsonSchema({"type": json_type})]
    if typing.is_typeddict(hint) and sys.version_info < (3, 12):
        return _typed_dict(hint)
    origin = get_origin(hint)
    args = get_args(hint)
    if origin is Annotated:
        notes = (one.documentation if isinstance(one, Doc) else one for one in args[1:])
        texts = (Field(description=one) if isinstance(one, str) else one for one in notes)
        return Annotated[(_for_pydantic(args[0]), *texts)]
    if origin is None or origin is typing.Literal or any(isinstance(arg, list) for arg in args):
        return hint
    args = tuple(arg if arg is ... else _for_pydantic(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return typing.Union[args]  # noqa: UP007
    return hint.copy_with(args) if hasattr(hint, "copy_with") else origin[args]


def _typed_dict(hint: Any) -> Any:
    """The same TypedDict as one of `typing_extensions`."""
    import typing_extensions

    fields = {}
    for key, inner in get_type_hints(hint, include_extras=True).items():
        if get_origin(inner) in (typing.Required, typing.NotRequired):
            inner = get_args(inner)[0]
        is_required = key in hint.__required_keys__
        mark = typing_extensions.Required if is_required else typing_extensions.NotRequired
        fields[key] = mark[_for_pydantic(inner)]
    made = typing_extensions.TypedDict(hint.__name__, fields)
    made.__doc__ = hint.__doc__
    return made


# ---- the schema


def _schema_of(
    name: str, capture: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """The JSON schema of the parameters; SchemaError names the one that has none."""
    try:
        schema = plain_schema(_json_schema(capture))
    except Exception as error:  # pydantic raises many classes
        for key, parameter in parameters.items():
            try:
                _json_schema(parameter.annotation)
            except Exception as inner:
                reason = one_line(str(inner).split("\n", 1)[0])
                raise SchemaError(
                    f"tool {name}: the parameter {key}: {parameter.annotation!r} has no JSON "
                    f"schema: {reason}"
                ) from None
        raise SchemaError(f"tool {name} has no JSON schema: {one_line(str(error))}") from None
    if schema.get("additionalProperties") is False:  # `check_arguments` refuses unknown ones anyway
        del schema["additionalProperties"]
    elif any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        schema.setdefault("additionalProperties", {})
    schema.setdefault("properties", {})
    order = ("type", "properties", "required")
    return {key: schema[key] for key in order if key in schema} | schema


def _json_schema(hint: Any, mode: Any = "validation") -> dict[str, Any]:
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class InOrder(GenerateJsonSchema):
        ignored_warning_kinds = {"non-serializable-default"}  # no default is shown

        def sort(self, value: Any, parent_key: str | None = None) -> Any:
            return value

    return TypeAdapter(hint).json_schema(schema_generator=InOrder, mode=mode)


def _described(
    name: str, key: str, schema: dict[str, Any], documented: Mapping[str, str]
) -> dict[str, Any]:
    """A parameter's schema with its text and its choices from the docstring."""
    if key not in documented:
        return schema
    try:
        text, choices = split_choices(documented[key])
    except ValueError as error:
        raise SchemaError(f"tool {name}: the parameter {key}: {error}") from None
    schema = {word: value for word, value in schema.items() if word != "description"}
    if choices is not None:
        schema["enum"] = choices
    return schema | {"description": text}


def _result_schema(hint: Any, description: str | None) -> dict[str, Any] | None:
    """The schema of a result if it is short; the model never writes one."""
    if hint is inspect.Parameter.empty:
        return None
    try:
        schema = plain_schema(_json_schema(_for_pydantic(hint), mode="serialization"))
    except Exception:  # pydantic raises many classes
        return None
    if not keywords(schema) <= _RESULT_WORDS:
        return None
    return schema if description is None else schema | {"description": description}


# ---- the arguments


def _converter(
    name: str, capture: Callable[..., Any], parameters: Mapping[str, inspect.Parameter]
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """JSON arguments -> keywords for the function."""
    from pydantic import ValidationError, validate_call
    from pydantic.fields import FieldInfo

    checked = validate_call(capture)
    # A default that is a pydantic Field is pydantic's to fill in; the function fills in the others.
    filled = {key for key, one in parameters.items() if isinstance(one.default, FieldInfo)}

    def convert(arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            converted = checked(**arguments)
        except ValidationError as error:
            raise ArgumentError(f"{name}: {validation_problem(error)}") from None
        return {key: one for key, one in converted.items() if key in arguments or key in filled}

    return convert


def validation_problem(error: Any) -> str:
    """The problems that a ValidationError of pydantic's names, in one line."""
    problems = []
    for one in error.errors(include_url=False)[:3]:
        where = ".".join(map(str, one["loc"]))
        problems.append(f"{where}: {one['msg']}" if where else one["msg"])
    return one_line("; ".join(problems))

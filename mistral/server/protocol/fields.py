"""The fields of a request, each with what is done with it."""

import json
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from mistral.errors import one_line, shown
from mistral.server.protocol.errors import ApiError, invalid

_TYPES = ("str", "int", "float", "bool", "dict", "list")  # as pydantic names alternatives
STATUSES = ("done", "differs", "ignored", "refused")


def done(what: str = "", default: Any = None, **limits: Any) -> Any:
    """A field that does what the API says."""
    return _field("done", what, default, limits)


def differs(what: str, default: Any = None, **limits: Any) -> Any:
    """A field that does something else than the API says: `what`."""
    return _field("differs", what, default, limits)


def ignored(why: str) -> Any:
    """A field that is accepted and changes nothing."""
    return _field("ignored", why, None, {})


def refused(why: str) -> Any:
    """A field of the API whose every value except null is an error."""
    return _field("refused", why, None, {})


def _field(status: str, what: str, default: Any, limits: dict[str, Any]) -> Any:
    return Field(default, description=what, json_schema_extra={"status": status}, **limits)


class Part(BaseModel):
    """An object in a request; a field that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Body(Part):
    """The body of a request."""

    _given: dict[str, Any] = PrivateAttr(default_factory=dict)  # as it was sent

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The request in a body of JSON. ApiError that names the field that is wrong."""
        value = read_json(body)
        if not isinstance(value, dict):
            raise invalid(f"the body must be a JSON object, not {shown(value)}")
        try:
            body = cls.model_validate(value)
        except ValidationError as error:
            raise _named(error, cls) from None
        body._given = value
        return body


def read_json(body: bytes) -> Any:
    """The value in a body. ApiError if it is not valid JSON."""
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {one_line(str(error))}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _named(error: ValidationError, cls: type[BaseModel]) -> ApiError:
    """One line about the first problem, or about the one that a client most likely meant."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    # Of a union's alternatives, the one that fits furthest.
    alike = [one for one in problems if one["loc"][:1] == problems[0]["loc"][:1]]
    first = unknown[0] if unknown else max(alike, key=lambda one: len(one["loc"]))
    place = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field: {place}", place, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"missing field: {place}", place, "missing_required_parameter")
    if first["type"] == "none_required":
        field = cls.model_fields.get(str(first["loc"][0]))
        why = field.description if field is not None else ""
        return invalid(f"{place} is not supported: {why}", place, "unsupported_parameter")
    return invalid(f"{place}: {one_line(first['msg'])}", place, "invalid_value")


def _place(loc: tuple[int | str, ...]) -> str:
    """Such as messages[0].content; the names of the alternatives of a union are left out."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part.islower() and part not in _TYPES:
            text += f".{part}" if text else part
    return one_line(text, 100) or "the body"

"""The docstring of a function, in the style of Google, numpy, Sphinx or epydoc."""

import json
import re
from typing import Any, NamedTuple

# The lines that begin the first section: Google's, numpy's, Sphinx's and epydoc's
_SECTION = re.compile(
    r"^[ \t]*(?:(?:Args|Arguments|Parameters|Params|Returns|Yields|Raises):"
    r"|(?:Parameters|Other Parameters|Returns|Yields|Raises)[ \t]*\n[ \t]*-{3,}"
    r"|[:@](?:param|parameter|arg|argument|type|returns?|rtype|raises?)\b[^\n]*:)",
    re.MULTILINE,
)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


class Docstring(NamedTuple):
    """The parts of a docstring.

    description  the text before the first section
    parameters   name -> text, on one line
    type_names   name -> the type, if the docstring has one
    returns      the text about the result
    """

    description: str
    parameters: dict[str, str]
    type_names: dict[str, str]
    returns: str | None


def read_docstring(text: str) -> Docstring:
    """The parts of a docstring whose indentation is removed. Never raises for a text.

    Needs the extra `chat`.
    """
    from docstring_parser import DocstringStyle, parse

    description = _SECTION.split(text, maxsplit=1)[0].strip()
    try:
        # It fails on some texts that begin with a section.
        parsed = parse(f"Description.\n\n{text}")
    except Exception:  # ParseError, and others of its own on odd texts
        return Docstring(description, {}, {}, None)
    parameters: dict[str, str] = {}
    type_names: dict[str, str] = {}
    for one in parsed.params:
        for key in one.arg_name.split(","):  # numpy describes several at once
            key = key.strip().lstrip("*")
            type_names[key] = one.type_name or ""
            if one.description:
                parameters[key] = " ".join(map(str.strip, one.description.split("\n")))
    returns = parsed.returns.description if parsed.returns else None
    if returns and parsed.returns.type_name and parsed.style is DocstringStyle.GOOGLE:
        returns = f"{parsed.returns.type_name}: {returns}"  # often no type, but a sentence
    return Docstring(description, parameters, type_names, returns)


def split_choices(text: str) -> tuple[str, list[Any] | None]:
    """A parameter's text without its `(choices: ["tea", "coffee"])`, and the choices.

    ValueError if they are not a JSON list.
    """
    found = _CHOICES.search(text)
    if not found:
        return text, None
    try:
        choices = json.loads(found[1])
    except (ValueError, RecursionError):
        choices = None
    if not isinstance(choices, list):
        raise ValueError(
            f'the choices must be a JSON list, such as (choices: ["tea", "coffee"]), not {found[1]}'
        )
    choices = [choice.strip() if isinstance(choice, str) else choice for choice in choices]
    return text[: found.start()].strip(), choices

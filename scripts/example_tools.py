"""Tools for `scripts/chat.py --tools scripts/example_tools.py`.

It is the model that names the file to count, so only those in the folder where the script was
started, and below, are read.
"""

import ast
import datetime
import operator
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from mistral.chat import tool

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
# How much of a base unit one of each unit is: metres, kilograms, litres
_UNITS = {
    "length": {
        "kilometers": 1000,
        "meters": 1,
        "centimeters": 0.01,
        "miles": 1609.344,
        "feet": 0.3048,
        "inches": 0.0254,
    },
    "weight": {"kilograms": 1, "grams": 0.001, "pounds": 0.45359237, "ounces": 0.028349523125},
    "volume": {"liters": 1, "gallons": 3.785411784},
}
_LARGEST_FILE = 100_000_000  # bytes


@tool
def calculate(expression: str):
    """Calculate an arithmetic expression.

    Args:
        expression: The expression, such as 2 * (3 + 4).
    """
    if len(expression) > 200:
        raise ValueError("the expression is longer than 200 characters")
    result = _value(ast.parse(expression.strip(), mode="eval").body)
    return round(result, 6) if isinstance(result, float) else result


def _value(node: ast.expr) -> float:
    """Numbers and operators only: what the model wrote is read, never run."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left = _value(node.left)
        right = _value(node.right)
        if isinstance(node.op, ast.Pow) and (abs(right) > 100 or abs(left) > 1e6):
            raise ValueError("the power is too large")
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError(f"{ast.unparse(node)} is not arithmetic")


@tool
def current_time(timezone: str) -> str:
    """Tell the current date and time in a time zone.

    Args:
        timezone: The name of the time zone, such as Europe/Paris.
    """
    try:
        return datetime.datetime.now(ZoneInfo(timezone)).strftime("%Y-%m-%d %H:%M")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"there is no time zone {timezone!r}") from None


@tool
def convert_units(value: float, from_unit: str, to_unit: str) -> float:
    """Convert a length, a weight or a volume to another unit.

    Args:
        value: How much of the first unit.
        from_unit: The unit to convert from, such as kilometers.
        to_unit: The unit to convert to, such as miles.
    """
    for units in _UNITS.values():
        if from_unit in units and to_unit in units:
            return round(value * units[from_unit] / units[to_unit], 3)
    known = "; ".join(f"{kind}: {', '.join(units)}" for kind, units in _UNITS.items())
    raise ValueError(f"cannot convert {from_unit} to {to_unit}. There are {known}")


@tool
def count_words(path: str) -> int:
    """Count the words of a text file.

    Args:
        path: The path of the file.
    """
    folder = Path.cwd().resolve()
    file = (folder / path).resolve()  # resolves .. and links
    if not file.is_relative_to(folder):
        raise ValueError(f"{path} is outside of {folder}; only files in it can be read")
    if not file.is_file():
        raise ValueError(f"there is no file {path}")
    with file.open("rb") as opened:
        content = opened.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise ValueError(f"{path} is larger than 100 MB")
    try:
        return len(content.decode("utf-8").split())
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text in UTF-8") from None

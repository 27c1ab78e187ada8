"""Arrows run one way: what each room may import, as docs/structures.md says, and one request's path."""

import ast
import graphlib
import re

import pytest
import small
from test_project import KERNELS, PACKAGE

PAGE = (small.ROOT / "docs/structures.md").read_text()
ROW = re.compile(r"^\| `(\w+)` \| .+ \| ([^|]+) \|$", re.M)  # room, what is in it, may import
ARROWS = {room: re.findall(r"`([\w.]+)`", allowed) for room, allowed in ROW.findall(PAGE)}
SCRIPTS = sorted((small.ROOT / "scripts").rglob("*.py"))
SCRIPT_NAMES = {path.stem for path in SCRIPTS} | {"scripts", "benchmark_parts", "chat_parts"}
STATION = re.compile(r"^(\d+)\. `([\w/]+\.py)`: `([\w.]+)`", re.M)


def room_of(path):
    """The room of a file of the package: its folder, or its own name."""
    return path.relative_to(small.ROOT / "mistral").with_suffix("").parts[0]


def imported_names(source):
    """Dotted names that a source imports, at any depth: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(source, room):
    """What a source in a room of the package imports from other rooms against the table."""
    for name in imported_names(source):
        first, *rest = name.split(".")
        if first != "mistral" or rest[:1] == [room]:
            continue
        ways = {".".join(rest[:depth]) for depth in range(1, len(rest) + 1)}
        if not ways & set(ARROWS[room]):
            yield name


def test_the_table_has_every_room_and_no_circle():
    rooms = {room_of(path) for path in PACKAGE} - {"__init__"}
    assert set(ARROWS) == rooms
    order = {room: {name.split(".")[0] for name in allowed} for room, allowed in ARROWS.items()}
    list(graphlib.TopologicalSorter(order).static_order())  # CycleError names a circle


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_what_the_table_allows(room):
    for path in PACKAGE:
        if room_of(path) == room:
            found = list(forbidden(path.read_text(), room))
            assert not found, f"{path.relative_to(small.ROOT)} imports {', '.join(found)}"


def test_nobody_imports_scripts_or_tests_and_the_package_no_kernels():
    for path in PACKAGE + KERNELS:
        roots = {name.split(".")[0] for name in imported_names(path.read_text())}
        assert not roots & (SCRIPT_NAMES | {"tests", "small"}), path
        assert "transformers" not in roots, path
        assert path in KERNELS or "mistral_kernels" not in roots, path


def test_the_arrows_of_the_plan_are_those_of_the_table():
    for room, never in {
        "model": ("checkpoints", "engine", "tokenizer", "sampling", "chat"),
        "tokenizer": ("model", "engine", "sampling", "chat"),
        "sampling": ("model", "engine"),
        "engine": ("checkpoints", "chat", "evaluation"),
        "checkpoints": ("engine", "chat", "evaluation"),
        "chat": ("checkpoints", "evaluation"),
    }.items():
        assert not set(ARROWS[room]) & set(never), room


def test_an_arrow_against_the_table_is_noticed():
    for room, line in {
        "model": "from mistral.engine.memory import require_memory",
        "cache": "from mistral.attention import attend",
        "chat": "from mistral.checkpoints import hub",
        "checkpoints": "from mistral.engine.decoder import Decoder",
        "tokenizer": "def f():\n    import mistral",
        "engine": "from mistral import load",
    }.items():
        assert list(forbidden(line, room)), line
    for room, line in {
        "checkpoints": "from mistral.engine.memory import has_room",
        "chat": "from mistral.chat.tools import Tool",
        "attention": "import torch\nfrom mistral.cache import LayerCache",
    }.items():
        assert not list(forbidden(line, room)), line


def definitions(path):
    """Names at the top of a file, and Class.method."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
            for inner in node.body:
                if isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}"


def test_every_station_of_the_request_is_a_function_of_the_file_that_it_names():
    stations = STATION.findall(PAGE)
    assert [int(number) for number, _, _ in stations] == list(range(1, len(stations) + 1))
    assert len(stations) == len(re.findall(r"^\d+\. ", PAGE, re.M)) > 20
    for number, path, name in stations:
        assert name in set(definitions(small.ROOT / path)), f"station {number}: {path}: {name}"

"""Imports within mistral.chat run one way, and never in a circle."""

import ast
from graphlib import TopologicalSorter

import small

CHAT = small.ROOT / "mistral/chat"
MODULES = {
    ".".join(("mistral.chat", *path.relative_to(CHAT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in CHAT.rglob("*.py")
}
ALLOWED = {
    "tools": {"tools", "events"},
    "formats": {"tools", "formats", "events"},
    "grammar": {"tools", "formats", "grammar"},
}


def imports(path):
    """The modules of mistral.chat that a file imports, at the top or in a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                name = submodule if submodule in MODULES else node.module
                if name in MODULES:
                    yield name
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


GRAPH = {name: set(imports(path)) for name, path in MODULES.items()}


def test_rooms_import_only_the_rooms_below_them():
    for name, imported in GRAPH.items():
        room = name.split(".")[2] if name.count(".") > 1 else ""
        if room in ALLOWED:
            rooms = {other.split(".")[2] for other in imported if other != "mistral.chat"}
            assert "mistral.chat" not in imported, name
            assert rooms <= ALLOWED[room], name


def test_there_is_no_circle():
    list(TopologicalSorter(GRAPH).static_order())

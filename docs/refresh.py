"""Run the code of the book's pages and rewrite the output below it. Nothing else on a page changes.

    python docs/refresh.py [PAGE ...]      (default: every page; another demo prints other output)

How a page is written, and what tests/docs/test_docs.py and tests/docs/test_prompt.py check:

    ```python title="mistral/mlp.py"    a quotation: its lines are in that file, at any indentation.
                                        A line `...` stands for lines that are left out.
    ```python                           runs. The blocks of a page are one program, in order, in a
                                        fresh interpreter: the page imports and seeds what it needs.
                                        Each can be pasted into Python's prompt: an indented block
                                        ends with an empty line and has none inside.
    ```bash                             commands: the scripts and their options exist
    ```text                             right below a block of python or bash: exactly what it
                                        prints. (A block of bash runs only if one follows.)

Every other block, and a ```text anywhere else, is shown and not run. Fences begin at the left
margin.
"""

import argparse
import contextlib
import io
import re
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r'```(\w*)(?: title="([^"]+)")?$')
MARK = "=== the next block ==="


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    kind: str  # python, bash, text, ...
    title: str | None  # the file that it quotes
    first: int  # index of the line with the opening fence
    last: int  # index of the line with the closing fence
    code: str


def blocks(page: str) -> list[Block]:
    """Every fenced block of a page's text.

    ValueError for a fence that is not closed or that no rule covers.
    """
    lines = page.splitlines()
    found = []
    opening = None  # index of a fence that is not closed yet
    for i, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if opening is not None and line == "```":
            kind, title = FENCE.match(lines[opening]).groups()
            found.append(Block(kind, title, opening, i, "\n".join(lines[opening + 1 : i])))
            opening = None
        elif opening is None and FENCE.match(line):
            opening = i
        else:
            raise ValueError(f"line {i + 1}: a fence that no rule covers: {line}")
    if opening is not None:
        raise ValueError(f"line {opening + 1}: the block is not closed")
    return found


def output_of(block: Block, page: str) -> Block | None:
    """The block that shows what `block` prints: a ```text with only blank lines between them."""
    lines = page.splitlines()
    for other in blocks(page):
        if other.first > block.last:
            near = not any(line.strip() for line in lines[block.last + 1 : other.first])
            return other if near and other.kind == "text" and not other.title else None
    return None


def run_python(page: str, name: str = "page.md") -> dict[Block, str]:
    """What each block of python on a page prints."""
    code = [block for block in blocks(page) if block.kind == "python" and not block.title]
    # Each line is at its place, so that an error names the page's line.
    program = [""] * len(page.splitlines())
    for block in code:
        program[block.first] = f"print({MARK!r})"
        program[block.first + 1 : block.last] = block.code.splitlines()
    printed = io.StringIO()
    torch.seed()  # an experiment that forgets its own seed is noticed
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(printed),
    ):
        path = Path(folder) / name
        path.write_text("\n".join(program) + "\n")
        if code:
            runpy.run_path(str(path))
    return dict(zip(code, printed.getvalue().split(MARK + "\n")[1:]))


def run_bash(page: str) -> dict[Block, str]:
    """What each block of bash with an output on a page prints."""
    printed = {}
    for block in blocks(page):
        if block.kind == "bash" and output_of(block, page):
            command = "set -euo pipefail\n" + block.code.replace(".venv/bin/python", sys.executable)
            result = subprocess.run(
                ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True
            )
            if result.returncode:
                raise ValueError(f"this failed:\n{block.code}\n{result.stderr}")
            printed[block] = result.stdout
    return printed


def tidy(output: str) -> str:
    """Output as a page shows it: no blanks at the ends of lines, no blank lines at its end."""
    return "\n".join(line.rstrip() for line in output.splitlines()).rstrip()


def refreshed(page: str, name: str = "page.md") -> str:
    """The page with the output that its code prints now."""
    lines = page.splitlines()
    printed = {**run_python(page, name), **run_bash(page)}
    for block in sorted(printed, key=lambda block: block.first, reverse=True):
        if shown := output_of(block, page):
            lines[shown.first + 1 : shown.last] = tidy(printed[block]).splitlines()
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    for path in parser.parse_args().pages or sorted((ROOT / "docs").rglob("*.md")):
        page = path.read_text()
        new = refreshed(page, path.name)
        if new != page:
            path.write_text(new)
            print("changed", path)


if __name__ == "__main__":
    main()

"""Every block of Python in README and book can be pasted into Python's own prompt."""

import codeop
import re

import pytest
import small

PAGES = [small.ROOT / "README.md", *sorted((small.ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def problem(code):
    """The line at which Python's prompt refuses a block that is pasted into it, or None.

    The prompt reads a line after the other and runs what is complete. An indented block is complete
    at an empty line, and only there.
    """
    compiler = codeop.CommandCompiler()
    waiting = []  # the lines of a statement that is not complete yet
    for line in [*code.splitlines(), ""]:
        waiting.append(line)
        try:
            complete = compiler("\n".join(waiting)) is not None
        except SyntaxError as error:
            return f"{line!r}: {error.msg}"
        if complete:
            waiting = []
    return f"{waiting[0]!r} has no end" if any(waiting) else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_can_be_pasted_into_the_prompt(page):
    for code in CODE.findall(page.read_text()):
        assert problem(code) is None, f"{problem(code)} in\n{code}"


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    return 1\nprint(f())",
        "for i in (1, 2):\n    a = i\n\n    print(a)",
        "if a:\n    b = 1\n\nelse:\n    b = 2",
        "x = (1,",
    ],
)
def test_a_block_that_the_prompt_refuses_is_noticed(code):
    assert problem(code)


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    return 1\n\nprint(f())",
        "if a:\n    b = 1\nelse:\n    b = 2",
        "@cache\ndef f():\n    '''A text.\n\n    With an empty line.\n    '''\n    return (\n        1,\n\n        2,\n    )\n\nx = 1",
        "with a:\n    b\n# a comment\n\nc = 1",
    ],
)
def test_a_block_that_the_prompt_takes_passes(code):
    assert problem(code) is None

"""The book is true: its code prints what it shows, its quotations, names and figures hold."""

import ast
import functools
import importlib
import keyword
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import small
import yaml

DOCS = small.ROOT / "docs"
sys.path[:0] = [str(DOCS), str(DOCS / "figures")]

import draw  # noqa: E402
import refresh  # noqa: E402
import style  # noqa: E402

PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
WITH_CODE = [name for name, page in PAGES.items() if re.search(r"^```python$", page, re.M)]


def prose(page):
    """A page without its fenced blocks."""
    lines = page.splitlines()
    for block in refresh.blocks(page):
        lines[block.first : block.last + 1] = [""] * (block.last + 1 - block.first)
    return "\n".join(lines)


# -- code and its output --


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_prints_what_the_page_shows(name):
    page = PAGES[name]
    for block, printed in {
        **refresh.run_python(page, Path(name).name),
        **refresh.run_bash(page),
    }.items():
        shown = refresh.output_of(block, page)
        assert refresh.tidy(printed) == ("" if shown is None else refresh.tidy(shown.code)), (
            f"{name}, line {block.first + 1}; python docs/refresh.py docs/{name} writes what is "
            f"printed now"
        )


def quoted(code, source):
    """Whether the lines of a quotation are in a file, part by part; `...` leaves lines out."""
    lines = source.splitlines()
    start = 0
    for part in re.split(r"^ *\.\.\.\n", textwrap.dedent(code) + "\n", flags=re.M):
        wanted = textwrap.dedent(part).strip("\n").splitlines()
        for at in range(start, len(lines) - len(wanted) + 1):
            if textwrap.dedent("\n".join(lines[at : at + len(wanted)])).splitlines() == wanted:
                start = at + len(wanted)
                break
        else:
            return False
    return True


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_quotes_stands_in_the_file_that_it_names(name):
    for block in refresh.blocks(PAGES[name]):
        if block.title:
            source = (small.ROOT / block.title).read_text()
            assert quoted(block.code, source), (
                f"{name}, line {block.first + 1}: not in {block.title}:\n{block.code}"
            )


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("book/")])
def test_a_chapter_has_the_parts_that_the_book_promises(name):
    page = PAGES[name]
    assert re.match(r"# \d+\. .+\n\n\*\*The question:\*\* ", page)
    assert "\n## The picture\n" in page
    assert re.search(r"!\[[^]]+\]\(\.\./figures/", prose(page))
    found = refresh.blocks(page)
    assert any(block.title for block in found)
    assert any(
        block.kind == "python" and not block.title and refresh.output_of(block, page)
        for block in found
    )


def test_a_changed_output_and_a_changed_quotation_are_noticed():
    page = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n\n```python\nx = 1\n```\n\n"
    page += "```bash\necho a\n```\n```text\nb\n```\n"
    assert [*refresh.run_python(page).values(), *refresh.run_bash(page).values()] == [
        "2\n",
        "",
        "a\n",
    ]
    assert refresh.refreshed(page) == page.replace("3", "2").replace("b\n```", "a\n```")
    source = "def f(x):\n    y = x + 1\n\n    return y\n"
    for code in ("y = x + 1", "def f(x):\n    ...\n    return y", "    y = x + 1\n\n    return y"):
        assert quoted(code, source)
    for code in ("y = x + 2", "return y\n...\ny = x + 1", "y = x", "y = x + 1\nreturn y"):
        assert not quoted(code, source)
    for page in ("```python\n", "  ```python\n  ```\n", "```python linenums=1\n```\n"):
        with pytest.raises(ValueError, match="line 1"):
            refresh.blocks(page)


# -- what prose names --

SOURCES = [
    path
    for room in ("mistral", "kernels", "scripts", "tests")
    for path in (small.ROOT / room).rglob("*.py")
]
TEXT = {path: path.read_text() for path in SOURCES if path.name != "test_docs.py"}
WORDS = {word for text in TEXT.values() for word in re.findall(r"\w+", text)}
ROOMS = {path.name for path in small.ROOT.iterdir()}
FILES = {
    path.name
    for room in ("mistral", "kernels", "scripts", "tests", "docs")
    for path in (small.ROOT / room).rglob("*")
}
# What a variable of this name is, wherever prose says `model.new_cache` or `decoder.step`
INSTANCES = {
    "model": "Mistral",
    "tokenizer": "Tokenizer",
    "decoder": "Decoder",
    "cache": "RollingCache",
}
INSTANCES |= {"config": "Config", "conversation": "Conversation", "sampling": "Sampling"}
# What other projects call their own, where a chapter must name it
FOREIGN = {"tokenizer.apply_chat_template", "skip_special_tokens", "dequantize_row_q4_K"}
# Written by a script about made-up tools; tables of other projects' names
NOT_OURS = ("demo.md", "reference/coming-from.md")


@functools.cache
def definitions():
    """Every class and function at the top of a module of ours: name -> where it is."""
    found = {}
    for path, text in TEXT.items():
        if path.parts[len(small.ROOT.parts)] in ("mistral", "kernels"):
            module = ".".join(path.relative_to(small.ROOT).with_suffix("").parts)
            module = module.removeprefix("kernels.").removesuffix(".__init__")
            for node in ast.parse(text).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    found.setdefault(node.name, (module, ast.unparse(node)))
    return found


def spans(page):
    """What stands in backticks in a page's prose."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(page))


def exists_in_module(name):
    """Whether a dotted name that begins with a module can be reached."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(thing, part):
                return part in getattr(thing, "__annotations__", ())
            thing = getattr(thing, part)
        return True
    return False


def name_exists(name, page):
    """Whether an identifier, or several with dots, is in our code or in the page's own."""
    first, *rest = name.split(".")
    if first in ("mistral", "mistral_kernels", "torch"):
        return exists_in_module(name)
    code = "\n".join(block.code for block in refresh.blocks(page))
    literally = [*TEXT.values(), code]
    if rest and (first in definitions() or first in INSTANCES):
        _, body = definitions()[INSTANCES.get(first, first)]
        if re.search(rf"(def |self\.|^    |^class ){rest[0]}\b", body, re.M):
            return True
        if first in definitions():
            return False
    if rest:
        return name in FILES or any(name in text for text in literally)
    return name in WORDS or re.search(rf"\b{name}\b", code) is not None


def looks_like_code(span):
    """Whether a span is one word that only code has: f(), snake_case, CamelCase, a.b."""
    word = re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)*)(\(.*\))?", span)
    return (
        word
        and (word[2] or re.search(r"_|[a-z][A-Z]|\.", word[1]))
        and not keyword.iskeyword(word[1])
    )


@pytest.mark.parametrize("name", [name for name in PAGES if name not in NOT_OURS])
def test_what_prose_names_exists(name):
    page = PAGES[name]
    for span in spans(page):
        if looks_like_code(span) and span not in FOREIGN:
            assert name_exists(span.split("(")[0], page), f"{name}: `{span}`"


@pytest.mark.parametrize("name", PAGES)
def test_every_path_that_a_page_mentions_exists(name):
    for span in spans(PAGES[name]):
        for path in re.findall(r"(?:^|\s)([\w.-]+/[\w./*-]*)", span):
            if path.split("/")[0] in ROOMS:
                assert list(small.ROOT.glob(path.rstrip("/"))), f"{name}: {path}"


def options_of(script):
    """The options of a script, as its source and the modules beside it spell them."""
    text = (small.ROOT / script).read_text()
    for module in re.findall(r"^(?:import|from) (\w+)", text, re.M):
        beside = (small.ROOT / script).parent / f"{module}.py"
        text += beside.read_text() if beside.exists() else ""
    found = set(re.findall(r'"(--?[a-z][\w-]*)"', text)) | {"--help"}
    return found | {f"--no-{option[2:]}" for option in found if "BooleanOptionalAction" in text}


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_exist(name):
    code = [
        line
        for block in refresh.blocks(PAGES[name])
        if block.kind == "bash"
        for line in block.code.splitlines()
    ]
    for command in code + [
        span for span in spans(PAGES[name]) if re.match(r"(\.venv/bin/)?python3? ", span)
    ]:
        for module in re.findall(r"python3? -m (mistral[\w.]*)", command):
            assert (small.ROOT / (module.replace(".", "/") + ".py")).exists(), f"{name}: {command}"
        for script, rest in re.findall(r"((?:scripts|docs)/[\w/]+\.py)((?: [^&|;]*)?)", command):
            assert (small.ROOT / script).exists(), f"{name}: {command}"
            for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", rest):
                assert option in options_of(script), f"{name}: {script} {option}"


def test_a_name_a_path_or_an_option_that_is_gone_is_noticed():
    page = "```python\nmine = 1\n```\n"
    for name in (
        "mistral.load",
        "RollingCache.rewind",
        "Config.head_dim",
        "model.new_cache",
        "window_mask",
        "mine",
    ):
        assert name_exists(name, page), name
    for name in (
        "config.json",
        "q_proj",
        "mistral.cache.RollingCache",
        "torch.nn.functional.silu",
        "cache.py",
    ):
        assert name_exists(name, page), name
    for name in (
        "mistral.lode",
        "RollingCache.wind",
        "Config.heads_dim",
        "window_maks",
        "your.s",
        "torch.nn.sillu",
    ):
        assert not name_exists(name, page), name
    assert [span for span in ("x", "f(x)", "B x T", "a_b", "aB", "W", "None", "a.b") if looks_like_code(span)] == [
        "f(x)", "a_b", "aB", "a.b",
    ]  # fmt: skip
    assert {"--prompt", "--temperature", "--help"} <= options_of("scripts/generate.py")
    assert "--prompts" not in options_of("scripts/generate.py")


# -- links and figures --


def anchors(page):
    """The names that links can end in: a page's headings as the site and GitHub spell them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        for heading in headings
    }


def links(page):
    """(text, target) of every link and image."""
    return re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", prose(page))


@pytest.mark.parametrize("name", PAGES)
def test_every_link_inside_the_book_leads_somewhere(name):
    for _, target in links(PAGES[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (DOCS / name).parent / path if path else DOCS / name
        assert found.resolve().is_relative_to(DOCS) and found.is_file(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(found.read_text()), f"{name}: {target}"


def test_every_page_has_its_place_in_the_site():
    def listed(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            page
            for value in (entry.values() if isinstance(entry, dict) else entry)
            for page in listed(value)
        ]

    nav = listed(yaml.safe_load((small.ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(PAGES), f"list in mkdocs.yml: {set(PAGES) ^ set(nav)}"
    book = [page for page in nav if page.startswith("book/")]
    assert book == sorted(book)


def test_every_figure_has_a_script_a_page_and_words_for_those_who_cannot_see_it():
    shown = {}
    for page in PAGES.values():
        for text, target in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", prose(page)):
            shown.setdefault(Path(target).stem, []).append(text)
    assert set(shown) == set(draw.NAMES) == {path.stem for path in (DOCS / "figures").glob("*.svg")}
    assert all(len(text) > 20 for texts in shown.values() for text in texts)


def same(a, b):
    """Whether a figure has the values of the code, up to what another machine may change."""
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        )
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (int, float)) and not isinstance(a, bool) and isinstance(b, (int, float)):
        return a == pytest.approx(b, rel=5e-3, abs=1e-3)
    return a == b


@pytest.mark.parametrize("name", draw.NAMES)
def test_a_figure_shows_what_the_code_computes(name):
    data = style.rounded(importlib.import_module(name).data())
    assert same(style.saved_data(name), data), (
        f"python docs/figures/draw.py {name} draws what is computed now"
    )


# One of each kind of drawing: a matrix, curves, and what is placed by hand
DRAWN = ("attention_weights", "decode_bytes", "residual_stream", "rolling_cache", "window_mask")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in DRAWN else pytest.mark.slow) for n in draw.NAMES],
)
def test_a_figure_can_be_drawn_and_takes_the_colour_of_its_page(name, tmp_path):
    pytest.importorskip("matplotlib")
    importlib.import_module(name).draw(tmp_path)
    assert same(style.saved_data(name, tmp_path), style.saved_data(name))
    svg = (tmp_path / f"{name}.svg").read_text()
    assert "currentColor" in svg
    assert not re.search(rf"{style.INK}|#000000|#ffffff|<image|<dc:date", svg)
    assert len((DOCS / "figures" / f"{name}.svg").read_bytes()) < 300_000


def test_other_numbers_in_a_figure_are_noticed():
    assert same({"a": [1.0, "x"], "b": True}, {"a": [1.0004, "x"], "b": True})
    for other in (
        {"a": [1.1, "x"], "b": True},
        {"a": [1.0], "b": True},
        {"a": [1.0, "y"], "b": True},
        {"a": [1.0, "x"]},
    ):
        assert not same({"a": [1.0, "x"], "b": True}, other)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    result = subprocess.run(command, cwd=small.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site/index.html").exists()

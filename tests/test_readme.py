"""The README says what is so: its commands run, its paths exist, and CI runs the command that it
names.
"""

import re
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
    assert found[0].endswith('-e ".[test]" && .venv/bin/python -m pytest -n 2 --dist loadfile')
    assert 'bash -euo pipefail -c "$command"' in ci
    assert "pip install" not in ci
    assert "ruff check ." in ci
    assert "ruff format --check ." in ci


def test_the_first_command_runs_and_says_what_it_is():
    script = COMMANDS[0].split("&&")[-1].strip()
    arguments = shlex.split(script)
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
    "script", sorted({m for c in COMMANDS for m in re.findall(r"scripts/\w+\.py", c)})
)
def test_every_option_in_the_readme_exists(script):
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=small.ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "example:" in result.stdout
    for command in COMMANDS:
        if script in command:
            for option in re.findall(r"(?<=\s)--[\w-]+", command.split(script)[1]):
                assert option in result.stdout


@pytest.mark.parametrize("code", BLOCKS["python"])
def test_the_python_examples_run(code, tmp_path):
    (tmp_path / "Mistral-7B-v0.1").symlink_to(small.DATA / "small")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    for shown in re.findall(r"print\(.*\)  # (.+)", code):
        assert shows(result.stdout, shown), (
            f"the README shows {shown!r}, and this was printed:\n{result.stdout}"
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


def test_every_path_that_is_mentioned_exists():
    for path in re.findall(r"`((?:mistral|scripts|tests|docs)/[\w./]*)`", README):
        assert (small.ROOT / path).exists(), path

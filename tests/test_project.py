"""Rules of the house that a reader can rely on."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest
import small

PACKAGE = sorted((small.ROOT / "mistral").rglob("*.py"))
KERNELS = sorted((small.ROOT / "kernels").rglob("*.py"))
MODEL_FILES = ("attention", "cache", "mlp", "model", "rms_norm", "rotary")


def imported(path):
    """Every module that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_the_package_never_imports_transformers_kernels_or_scripts():
    assert PACKAGE
    for path in PACKAGE:
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {
            "transformers",
            "mistral_kernels",
            "kernels",
            "scripts",
            "common",
        }, path


def test_the_model_knows_nothing_of_files_text_or_generation():
    for name in MODEL_FILES:
        for module in imported(small.ROOT / f"mistral/{name}.py"):
            assert not module.startswith(
                ("mistral.checkpoints", "mistral.engine.generation", "mistral.engine.decoder")
            )
            assert not module.startswith(("mistral.tokenizer", "mistral.sampling"))


def test_importing_needs_no_gpu_and_no_transformers():
    code = """
import sys, torch
torch.cuda.init = torch.cuda._lazy_init = None
import mistral, mistral_kernels
print([name for name in ("transformers", "gguf", "triton") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_public_thing_has_a_docstring():
    for path in PACKAGE + KERNELS + sorted((small.ROOT / "scripts").rglob("*.py")):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        if "scripts" in path.relative_to(small.ROOT).parts:
            continue
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_every_package_is_installed():
    project = tomllib.loads((small.ROOT / "pyproject.toml").read_text())
    folders = {path.parent.relative_to(small.ROOT) for path in PACKAGE}
    folders |= {path.parent.relative_to(small.ROOT / "kernels") for path in KERNELS}
    assert set(project["tool"]["setuptools"]["packages"]) == {
        ".".join(folder.parts) for folder in folders
    } | {"mistral_kernels"}


def test_every_dependency_is_pinned():
    project = tomllib.loads((small.ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        need for extra in project["optional-dependencies"].values() for need in extra
    ]
    pinned = {
        line.split("==")[0]
        for line in (small.ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for need in wanted:
        assert need.split(">=")[0].replace("-", "_") in {
            name.replace("-", "_") for name in pinned
        }, need


def numbers(version):
    """A version as a tuple; 2.10.0 is 2.10."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed():
    project = tomllib.loads((small.ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    floors = {}
    for name, version in re.findall(r"([\w-]+)>=([\d.]+)", " ".join(needs)):
        assert floors.setdefault(name.replace("-", "_"), version) == version, name
    lines = (small.ROOT / "constraints-oldest.txt").read_text().splitlines()[1:]
    pinned = dict(line.replace("-", "_").split("==") for line in lines)
    assert {name: numbers(version) for name, version in floors.items()} == {
        name: numbers(version) for name, version in pinned.items()
    }
    python = project["requires-python"].removeprefix(">=")
    assert f"python{python} -m venv" in (small.ROOT / "scripts/dev/oldest.sh").read_text()
    # 0.2.0 crashes on a damaged tokenizer.model; 2.9 corrupts memory on a damaged pickle
    # (CVE-2026-24747), which other code of a user may still read with torch.load.
    assert numbers(floors["sentencepiece"]) >= (0, 2, 2)
    assert numbers(floors["torch"]) >= (2, 10)


@pytest.mark.parametrize(
    "name", ["load", "generate", "generate_batch", "generate_text", "Decoder", "Sampling"]
)
def test_the_doors_are_open(name):
    import mistral

    assert name in mistral.__all__
    assert getattr(mistral, name)

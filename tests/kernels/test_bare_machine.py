"""What runs on a machine that has PyTorch, Triton and pytest, and where nothing can be installed."""

import os
import subprocess
import sys

import pytest
import small

HIDDEN = (
    *("gguf", "mistral_common", "llguidance", "jsonschema", "jsonschema_rs", "pydantic"),
    *("starlette", "uvicorn", "transformers", "xllamacpp", "numba", "docstring_parser", "matplotlib"),
)  # fmt: skip
SCRIPTS = (
    *("benchmark", "benchmark_load", "profile_step", "gpu_run", "gpu_tables", "rehearse"),
    *("gpu_stages.facts", "gpu_stages.compiling", "gpu_stages.trial", "gpu_stages.soak"),
    *("gpu_stages.sweep", "gpu_stages.crossover", "gpu_stages.testing"),
)


def run(code):
    hide = f"import sys\nfor name in {HIDDEN}: sys.modules[name] = None\n"
    paths = [".", "kernels", "scripts", "scripts/dev"]
    # A test run inside this one is no worker of it.
    ours = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        [sys.executable, "-c", hide + code],
        cwd=small.ROOT,
        env=ours | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )


def test_the_scripts_are_imported_and_the_kernels_tests_are_collected():
    folders = ["tests/kernels", "tests/engine/test_cuda_graph.py"]
    arguments = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "", *folders]
    code = f"for name in {SCRIPTS}: __import__(name)\nprint('imported')\n"
    ended = run(code + f"import pytest; sys.exit(pytest.main({arguments}))")
    assert "imported\n" in ended.stdout, ended.stderr
    assert ended.returncode == 0, ended.stdout[-3000:]


@pytest.mark.slow
def test_loading_is_measured_without_gguf_py():
    code = (
        "import benchmark_load; sys.argv = ['x', '--layers', '1', '--ways', 'packed', 'header']\n"
    )
    ended = run(code + "benchmark_load.main()")
    assert ended.returncode == 0, ended.stderr
    assert "not measured" not in ended.stdout

"""The kernels' package runs from a checkout, on a machine where the project is not installed."""

import os
import subprocess
import sys

import small


def test_two_folders_on_the_path_are_all_that_an_import_needs():
    code = "import mistral_kernels; print(mistral_kernels.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=small.ROOT,
        env=os.environ | {"PYTHONPATH": ".:kernels"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str(small.ROOT / "kernels/mistral_kernels/__init__.py")

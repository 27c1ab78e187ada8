"""What the tests of the scripts share."""

import runpy
import sys
import warnings

import pytest
import small


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script in this process, which has imported all: (exit code, stdout, stderr)."""

    def run_here(script, *arguments):
        monkeypatch.setattr(sys, "argv", [small.SCRIPTS[script], *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(small.ROOT / small.SCRIPTS[script]), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which `run` replaces
    return run_here

"""The official clients against scripts/serve.py: the cases of scripts/dev/client_matrix.py."""

import json
import sys

import client_matrix
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("package", ["openai", "anthropic"])
def test_the_official_clients(package, tmp_path):
    pytest.importorskip(package)
    runs = [sys.executable, str(client_matrix.CLIENTS / "python/runs.py")]
    with client_matrix.served("demo", tmp_path / "server.log") as address:
        program = [*runs, address, "demo", package]
        cases = json.loads(list(client_matrix.output(program, "list"))[-1])
        jobs = json.dumps([[client, form, 1, 1] for client, form in cases])
        found = [json.loads(line) for line in client_matrix.output(program, jobs)]
    assert len(found) == len(cases) >= 5
    for run in found:
        verdicts = {"yes", "valid"}
        if run["client"] == "anthropic .parse()":  # no bound of a string reaches the server
            verdicts.add("length")
        assert client_matrix.verdict(run) in verdicts, run

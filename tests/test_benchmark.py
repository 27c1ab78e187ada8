"""The benchmark's arithmetic, and that one who fails does not stop the others; the scripts run on the CPU."""

import json
import sys

import pytest
import small
import torch

sys.path.insert(0, str(small.ROOT / "scripts"))  # scripts stand alone and find each other there

import benchmark
import profile_step
from benchmark_parts import report, sizes, turns
from benchmark_parts.peers import transformers_model
from benchmark_parts.sizes import Case


@pytest.fixture(scope="module")
def tiny():
    return sizes.make_model("tiny", torch.device("cpu"), torch.float32)


def run_script(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


@pytest.fixture
def no_rates(monkeypatch):
    """Measuring the machine takes seconds, and is not what is tested."""
    monkeypatch.setattr(benchmark.machine, "read_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(benchmark.machine, "matrix_rate", lambda device, dtype: 1e11)


def test_the_shapes_of_7b_are_mistrals():
    with torch.device("meta"):
        model = sizes.make_model("7b", torch.device("meta"), torch.bfloat16)
    assert model.config.num_parameters == 7_241_732_096
    assert sizes.weight_bytes(model) == 2 * (7_241_732_096 - 32000 * 4096)


def test_the_roofs_are_those_worked_out_by_hand():
    model = sizes.make_model("7b", torch.device("meta"), torch.bfloat16)
    assert sizes.decode_roof(model, Case(1, 1, 1), 4.3e12) == pytest.approx(302.4, abs=0.1)
    assert sizes.decode_roof(model, Case(8, 512, 1), 4.3e12) == pytest.approx(2331, abs=1)
    # past the window a step costs the same at any length
    assert sizes.decode_roof(model, Case(1, 32768, 1), 4.3e12) == sizes.decode_roof(model, Case(1, 4096, 1), 4.3e12)
    assert sizes.prefill_roof(model, Case(1, 2048, 1), 4.3e12, 790e12) == pytest.approx(54.5e3, rel=0.01)
    assert sizes.prefill_roof(model, Case(1, 16, 1), 4.3e12, 790e12) == pytest.approx(16 * 302.4, rel=0.01)


def test_transformers_shares_our_weights_and_gives_our_logits(tiny):
    theirs = transformers_model(tiny)
    assert theirs.lm_head.weight.data_ptr() == tiny.lm_head.weight.data_ptr()
    tokens = small.tokens(1, 70, vocab_size=2048)  # past the window of 64
    with torch.no_grad():
        assert torch.equal(theirs(tokens, use_cache=False).logits, tiny(tokens))


def test_who_fails_is_a_row_and_the_others_go_on(tiny, monkeypatch):
    class Broken:
        note = "breaks in the second turn"

        def __init__(self):
            self.turns = 0

        def prefill(self):
            self.turns += 1
            if self.turns == 3:
                raise torch.OutOfMemoryError("tried to allocate 99 GB\nand more")

        def generate(self, n):
            pass

    field = turns.Field(tiny)
    ours = field.open
    monkeypatch.setattr(field, "open", lambda name, *rest: Broken() if name == "transformers" else ours(name, *rest))
    names = ["kernels", "transformers", "eager"]
    rows = turns.run_case(field, names, Case(1, 5, 2), 3, lambda: "", lambda line: None)
    results = {row.engine: row.result(tiny, 1e10, 1e11) for row in rows}
    assert results["transformers"]["failed"] == "OutOfMemoryError: tried to allocate 99 GB"
    assert results["eager"]["decode_tokens_per_s"] > 0
    assert len(rows[2].decodes) == 3
    table = report.table("title", list(results.values()))
    assert "not measured: OutOfMemoryError" in table


def test_nothing_begins_after_the_time_limit(tiny):
    rows = turns.run_case(turns.Field(tiny), ["eager"], Case(1, 5, 2), 3, turns.time_limit(-1), lambda line: None)
    assert "time limit" in rows[0].result(tiny, 1e10, 1e11)["failed"]


@pytest.mark.parametrize("suite", [("--suite", "core", "--prompt-tokens", 9), ("--suite", "sweep", "--contexts", 5, 9)])
def test_the_last_line_is_json(suite, no_rates, monkeypatch, capsys):
    options = "--size tiny --device cpu --repeats 1 --new-tokens 2 --engines transformers eager".split()
    batches = ("--batches", 1, 2) if "sweep" in suite else ()
    out = run_script(benchmark, monkeypatch, capsys, *suite, *batches, *options)
    measured = json.loads(out.splitlines()[-1])
    rows = measured["results"]
    assert len(rows) == (2 if "core" in suite else 8)
    assert all(row["decode_of_roof"] > 0 and row["first_token_s"] > 0 for row in rows)
    assert measured["read_bytes_per_s"] == 1e10
    assert "ceiling" in out


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--plot needs matplotlib"):
        run_script(benchmark, monkeypatch, capsys, "--plot", "x.png")


def test_the_plot_shows_who_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    results = [
        {"engine": "eager", "batch": batch, "context": context, "ms_per_step": 1.5}
        for batch in (1, 8)
        for context in (512, 1024)
    ]
    report.plot(tmp_path / "plot.png", [*results, {"engine": "kernels", "failed": "no GPU"}], "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_profile_lists_operators_with_their_bytes(no_rates, monkeypatch, capsys):
    options = ("--size", "tiny", "--device", "cpu", "--steps", 2, "--context", 5, "--engine", "eager")
    out = run_script(profile_step, monkeypatch, capsys, *options)
    rows = {row["name"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    head = rows["aten::mm 1x128 128x2048"]
    assert head["calls"] == 1
    assert head["bytes"] == 4 * (128 + 128 * 2048)
    assert "reading the weights once" in out


def test_our_kernels_bytes_are_all_the_weights():
    model = sizes.make_model("7b", torch.device("meta"), torch.bfloat16)
    moved = profile_step.kernel_bytes(model, 1, 5000)
    norms = 2 * (2 * 32 + 1) * 4096
    weights = sum(moved.values()) - moved["decode_attention_kernel"] - moved["embed_kernel"]
    assert weights == sizes.weight_bytes(model) - norms
    assert moved["decode_attention_kernel"] == 4096 * 131_072

"""The benchmark's arithmetic, a contestant that fails, and the scripts on the CPU."""

import importlib.util
import json
import math
import sys
import time
import types

import benchmark
import benchmark_load
import benchmark_serve
import measure_quantization
import numpy as np
import profile_step
import pytest
import small
import torch
from benchmark_parts import formats, mixtures, report, sizes, turns
from benchmark_parts.peers import transformers_model
from benchmark_parts.sizes import Case
from torch.utils._python_dispatch import TorchDispatchMode

import mistral
from mistral.quantization.dequantize import dequantize
from mistral.quantization.packed import Packed


@pytest.fixture(scope="module")
def tiny():
    return sizes.make_model("tiny", torch.device("cpu"), torch.float32)


def run_script(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # it is 1, see conftest.py
    module.main()
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


@pytest.mark.parametrize(
    ("format", "gigabytes"),
    [
        ("Q4_K_M", 4.294),
        ("Q5_K_M", 5.041),
        ("Q4_0", 4.034),
        ("Q6_K", 5.834),
        ("Q8_0", 7.556),
        ("Q3_K_M", 3.461),
        ("Q2_K", 2.675),
        ("IQ4_XS", 3.873),
    ],
)
def test_packed_formats_of_7b_read_as_much_as_the_files_hold(format, gigabytes):
    model = sizes.make_model("7b", torch.device("meta"), torch.bfloat16, format)
    assert sizes.weight_bytes(model) == pytest.approx(gigabytes * 1e9, rel=1e-3)


def test_llama_cpp_packs_half_of_the_layers_finer():
    kinds = [mixtures.kind_of("Q4_K_M", "v_proj", layer, 32, 4).name for layer in range(32)]
    finer = {layer for layer, kind in enumerate(kinds) if kind == "Q6_K"}
    assert finer == {*range(4), *range(6, 28, 3), *range(28, 32)}
    assert set(kinds) == {"Q4_K", "Q6_K"}
    assert mixtures.kind_of("Q4_K_M", "q_proj", 0, 32, 4).name == "Q4_K"
    assert mixtures.kind_of("Q4_0", "lm_head", 0, 32, 4).name == "Q6_K"


@pytest.mark.parametrize("format", formats.FORMATS)
def test_random_blocks_are_weights_of_the_usual_size(format, monkeypatch):
    monkeypatch.setitem(
        sizes.SIZES,
        "wide",
        sizes.SIZES["tiny"] | dict(hidden_size=256, intermediate_size=512, head_dim=64),
    )
    model = sizes.make_model("wide", torch.device("cpu"), torch.float32, format)
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            factor = sizes.USUAL / sizes.spread(name, model.config.num_hidden_layers)
            weights = factor * dequantize(module.blocks, module.kind)
            assert weights.isfinite().all()
            assert 0.01 < weights.std() < 0.04
            assert weights.mean().abs() < 0.01
    with pytest.raises(ValueError, match="has rows of .*, and .* stores blocks of"):
        monkeypatch.setitem(
            sizes.SIZES, "odd", sizes.SIZES["tiny"] | dict(intermediate_size=97 * 8)
        )
        sizes.make_model("odd", torch.device("cpu"), torch.float32, format)


def test_random_layers_add_as_little_as_trained_ones():
    model = sizes.make_model("tiny", torch.device("cpu"), torch.float32, layers=8)
    expected = {"o_proj": 0.005, "down_proj": 0.005, "embed_tokens": 1.0}
    for name, weights in model.named_parameters():
        if weights.dim() == 2:
            std = expected.get(name.split(".")[-2], 0.02)
            assert weights.std().item() == pytest.approx(std, rel=0.05), name


def test_random_layers_do_not_amplify_rounding(monkeypatch):
    deep = dict(num_hidden_layers=32, hidden_size=256, intermediate_size=512, head_dim=64)
    monkeypatch.setitem(sizes.SIZES, "deep", sizes.SIZES["tiny"] | deep)
    monkeypatch.setattr(sizes, "USUAL", 0.08)  # rows of 256 add up to what those of 4,096 do
    model = sizes.make_model("deep", torch.device("cpu"), torch.float32)
    ids = small.tokens(1, 20, vocab_size=2048)
    wanted = model(ids)[0, -1]
    rounded = model.bfloat16()(ids)[0, -1].float()
    assert (rounded - wanted).norm() / wanted.norm() < 0.03  # with a small embedding 0.06


def test_the_roofs_are_those_worked_out_by_hand():
    model = sizes.make_model("7b", torch.device("meta"), torch.bfloat16)
    assert sizes.decode_roof(model, Case(1, 1, 1), 4.3e12) == pytest.approx(302.4, abs=0.1)
    assert sizes.decode_roof(model, Case(8, 512, 1), 4.3e12) == pytest.approx(2331, abs=1)
    # past the window a step costs the same at any length
    assert sizes.decode_roof(model, Case(1, 32768, 1), 4.3e12) == sizes.decode_roof(
        model, Case(1, 4096, 1), 4.3e12
    )
    assert sizes.prefill_roof(model, Case(1, 2048, 1), 4.3e12, 790e12) == pytest.approx(
        54.5e3, rel=0.01
    )
    assert sizes.prefill_roof(model, Case(1, 16, 1), 4.3e12, 790e12) == pytest.approx(
        16 * 302.4, rel=0.01
    )


def test_transformers_shares_our_weights_and_gives_our_logits(tiny):
    theirs = transformers_model(tiny, tiny.config.sliding_window)
    assert theirs.lm_head.weight.data_ptr() == tiny.lm_head.weight.data_ptr()
    tokens = small.tokens(1, 70, vocab_size=2048)  # past the window of 64
    with torch.no_grad():
        assert torch.equal(theirs(tokens, use_cache=False).logits, tiny(tokens))


def test_transformers_has_a_window_only_where_it_cuts_something_off(tiny):
    field = turns.Field(tiny, ["transformers"])
    prompts = torch.zeros(1, 1, dtype=torch.long)
    models = [
        field.open("transformers", Case(1, context, 2), prompts).model
        for context in (20, 60, 61, 90)
    ]
    assert [model.config.sliding_window for model in models] == [None, None, 64, 64]
    assert models[0] is models[1]
    assert models[2] is models[3]


@pytest.mark.slow
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

    names = ["kernels", "transformers", "eager"]
    field = turns.Field(tiny, names)
    ours = field.open
    monkeypatch.setattr(
        field, "open", lambda name, *rest: Broken() if name == "transformers" else ours(name, *rest)
    )
    rows = turns.run_case(field, names, Case(1, 5, 2), 3, turns.TimeLimit(None), lambda line: None)
    results = {row.engine: row.result(tiny, 1e10, 1e11) for row in rows}
    assert results["transformers"]["failed"] == "OutOfMemoryError: tried to allocate 99 GB"
    assert results["eager"]["decode_tokens_per_s"] > 0
    assert len(rows[2].decodes) == 3
    table = report.table("title", list(results.values()))
    assert "not measured: OutOfMemoryError" in table


def test_nothing_begins_after_the_time_limit(tiny):
    rows = turns.run_case(
        turns.Field(tiny, ["eager"]),
        ["eager"],
        Case(1, 5, 2),
        3,
        turns.TimeLimit(0),
        lambda line: None,
    )
    assert "time limit" in rows[0].result(tiny, 1e10, 1e11)["failed"]


def test_who_takes_too_long_is_interrupted_and_turns_that_were_done_count(tiny, monkeypatch):
    class Slow:
        note = ""
        turns = 0

        def prefill(self):
            Slow.turns += 1
            if Slow.turns == 3:  # opening, the first turn, the second
                try:
                    while True:
                        time.sleep(0.001)
                except Exception as error:  # as an engine does
                    raise ValueError("the kernels do not run here") from error

        def generate(self, n):
            pass

    field = turns.Field(tiny, ["eager", "compile"])
    monkeypatch.setattr(field, "open", lambda name, *rest: Slow())
    limit = turns.TimeLimit(0.2)
    (row,) = turns.run_case(field, ["eager"], Case(1, 5, 2), 5, limit, lambda line: None)
    result = row.result(tiny, 1e10, 1e11)
    assert (result["turns"], limit.left()) == (1, 0)
    Slow.turns = 2
    (row,) = turns.run_case(
        field, ["eager"], Case(1, 5, 2), 5, turns.TimeLimit(0.2), lambda line: None
    )
    assert row.failed == "left out: the time limit was reached"


def test_nothing_is_interrupted_inside_pytorchs_dispatcher():
    done = []

    class Waiting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            end = time.monotonic() + 0.1
            while time.monotonic() < end:
                pass
            done.append(function)
            return function(*args, **(kwargs or {}))

    with pytest.raises(turns.OutOfTime), turns.TimeLimit(0.02).enforced():
        with Waiting():
            torch.ones(1)
        while True:
            time.sleep(0.001)
    assert len(done) == 1


def test_the_time_is_shared_among_what_is_still_to_come(monkeypatch):
    now = 100.0
    monkeypatch.setattr(turns.time, "monotonic", lambda: now)
    limit = turns.TimeLimit(300)
    now = 160.0
    assert limit.left() == 240
    assert limit.share(4).left() == 60
    now = 500.0
    assert limit.share(4).left() == 0
    assert turns.TimeLimit(None).share(4).left() == math.inf


def test_core_begins_with_the_prompt_and_ends_with_those_that_compile_for_minutes():
    args = types.SimpleNamespace(suite="core", prompt_tokens=None, new_tokens=None)
    cases = benchmark.suite(args, on_gpu=True)
    assert [(case.batch, case.context) for case in cases] == [(1, 2048), (8, 512), (1, 200)]
    names = ["kernels", "compile", "transformers", "transformers-compiled"]
    quick = ["kernels", "transformers"]
    slow = ["compile", "transformers-compiled"]
    assert benchmark.shares(args, names, cases) == [
        *((quick, case) for case in cases),
        (slow, cases[-1]),
    ]
    assert benchmark.shares(args, slow, cases) == [(slow, cases[-1])]
    args.suite = "sweep"
    assert benchmark.shares(args, names, cases) == [(names, case) for case in cases]


def test_clocks_and_power_are_read_from_nvidia_smi(monkeypatch):
    machine = benchmark.machine
    assert machine.gpu_state(torch.device("cpu")) == {}
    answer = types.SimpleNamespace(stdout="1980, 3201, 541.20, 47\n345, 3201, 70.00, 30\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda command, **_: answer)
    expected = {"sm_mhz": 345.0, "memory_mhz": 3201.0, "watts": 70.0, "celsius": 30.0}
    assert machine.gpu_state(torch.device("cuda", 1)) == expected
    answer.stdout = "[N/A]\n"
    assert machine.gpu_state(torch.device("cuda", 0)) == {}

    def absent(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine.gpu_state(torch.device("cuda", 0)) == {}


@pytest.mark.parametrize(
    "suite", [("--suite", "core", "--prompt-tokens", 9), ("--suite", "sweep", "--contexts", 5, 9)]
)
def test_the_last_line_is_json(suite, no_rates, monkeypatch, capsys):
    options = (
        "--size tiny --device cpu --repeats 1 --new-tokens 2 --engines transformers eager".split()
    )
    batches = ("--batches", 1, 2) if "sweep" in suite else ()
    out = run_script(benchmark, monkeypatch, capsys, *suite, *batches, *options)
    measured = json.loads(out.splitlines()[-1])
    rows = measured["results"]
    assert len(rows) == (2 if "core" in suite else 8)
    # Each case has had a line of its own before: a run that is killed loses the last one alone.
    lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"case"')]
    assert [row for line in lines for row in line["results"]] == rows
    assert len(lines) == len(rows) // 2
    assert all(row["decode_of_roof"] > 0 and row["first_token_s"] > 0 for row in rows)
    assert measured["read_bytes_per_s"] == 1e10
    assert "ceiling" in out


def test_packed_formats_are_measured_too(no_rates, monkeypatch, capsys):
    options = "--size tiny --device cpu --repeats 1 --new-tokens 2 --prompt-tokens 5 --engines eager transformers".split()
    out = run_script(benchmark, monkeypatch, capsys, "--format", "Q8_0", *options)
    measured = json.loads(out.splitlines()[-1])
    eager, theirs = measured["results"]
    assert measured["format"] == "Q8_0"
    assert eager["decode_tokens_per_s"] > 0
    assert "does not multiply packed weights" in theirs["failed"]


def test_kernels_do_not_take_the_blocks_from_the_others():
    model = sizes.make_model("tiny", torch.device("cpu"), torch.float32, "Q8_0")
    field = turns.Field(model, ["kernels", "eager"])
    model.model.layers[0].mlp.up_proj.hand_over(object())
    eager = field.open("eager", Case(1, 5, 2), small.tokens(1, 5))
    assert eager.decoder.model.model.layers[0].mlp.up_proj.blocks is not None


def test_the_made_up_gguf_is_what_gguf_py_reads(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "made.gguf"
    benchmark_load.write(path, 1, width=256, mlp=512, kv_width=64)
    read = gguf.GGUFReader(path)
    assert len(read.tensors) == 3 + 9
    for tensor in read.tensors:
        blocks = benchmark_load.random_blocks(tensor.tensor_type.name)
        data = tensor.data.view("uint8").reshape(-1)
        assert (data == np.resize(blocks, len(data))).all(), tensor.name
    assert read.fields["llama.attention.head_count_kv"].contents() == 1
    assert len(read.fields["tokenizer.ggml.tokens"].contents()) == benchmark_load.VOCABULARY
    model, tokenizer = mistral.load(path, device="cpu", packed=True, sliding_window=None)
    assert model.config.num_hidden_layers == 1
    assert len(tokenizer.encode("one")) == 3


def test_a_distance_is_worked_out_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    kl, same = measure_quantization.distance([p[:1].log(), p[1:].log()], [q[:1].log(), q[1:].log()])
    assert kl == pytest.approx(0.5 * (0.5 * math.log(2) + 0.5 * math.log(2 / 3)), rel=1e-6)
    assert same == 0.5


def test_formats_are_compared_with_float32(monkeypatch, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("Rain fell on the hill, and the wind took it away. " * 3)
    options = (
        "--text",
        tmp_path / "text.txt",
        "--positions",
        30,
        "--device",
        "cpu",
        "--page",
        tmp_path / "page.md",
    )
    chosen = ["bfloat16", "q8_0", "q4_0"] + ["Q4_K_M"] * bool(importlib.util.find_spec("xllamacpp"))
    out = run_script(
        measure_quantization,
        monkeypatch,
        capsys,
        small.DATA / "small",
        *options,
        "--formats",
        *chosen,
    )
    results = {row["format"]: row for row in json.loads(out.splitlines()[-1])["results"]}
    assert results.keys() == set(chosen)
    assert results["bfloat16"]["float32"] == "-"
    assert 0 < results["q8_0"]["float32"][0] < results["q4_0"]["float32"][0]
    assert results["q8_0"]["bits"] == 8.5
    assert all(row["kernels"] == "not measured: no GPU" for row in results.values())
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("## small\n\n30 positions of `text.txt`.\n")
    assert page.count("\n| ") == 1 + len(chosen)


def test_a_section_of_a_page_is_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    report.write_section(page, "demo", "one")
    assert page.read_text() == "## demo\n\none\n"
    page.write_text("# Title\n\nHead.\n\n## demo\n\none\n\n## notes\n\nstay\n")
    report.write_section(page, "real", "two\n")
    report.write_section(page, "demo", "three")
    assert page.read_text() == (
        "# Title\n\nHead.\n\n## demo\n\nthree\n\n## notes\n\nstay\n\n## real\n\ntwo\n"
    )


@pytest.mark.parametrize("format", ["Q8_0", "Q4_K_M", "Q2_K", "IQ4_XS"])
def test_mixtures_are_the_bytes_that_llama_quantize_wrote(format):
    pytest.importorskip("xllamacpp")
    model, _ = mistral.load(
        small.DATA / "small", device="cpu", dtype=torch.float32, sliding_window=None
    )
    made = measure_quantization.assemble(
        model, measure_quantization.pack(model, format), torch.float32
    )
    file = small.DATA / f"gguf/{format.lower()}.gguf"
    written, _ = mistral.load(file, device="cpu", packed=True, sliding_window=None)
    blocks = {name: values for name, values in written.state_dict().items() if "blocks" in name}
    assert len(blocks) == 2 + 7 * model.config.num_hidden_layers
    for name, values in blocks.items():
        ours = made.get_submodule(name.removesuffix(".blocks"))
        assert ours.kind == written.get_submodule(name.removesuffix(".blocks")).kind
        assert torch.equal(ours.blocks, values), name


def test_rows_that_are_not_whole_blocks_get_another_type_as_in_llama_cpp():
    kinds = {name: mixtures.kind_of(name, "q_proj", 0, 32, 4) for name in mixtures.MOST}
    fitted = {name: mixtures.fitting(kind, 576).name for name, kind in kinds.items()}
    assert (fitted["Q4_K_M"], fitted["Q6_K"], fitted["IQ4_XS"]) == ("Q5_0", "Q8_0", "IQ4_NL")
    assert mixtures.fitting(kinds["Q4_K_M"], 1536).name == "Q4_K"
    with pytest.raises(ValueError, match="not whole blocks of 32"):
        mixtures.fitting(kinds["Q4_K_M"], 40)


def test_what_a_step_costs_far_beyond_the_window_is_told_beside_one_at_its_end():
    def row(engine, context, ms):
        return {"engine": engine, "batch": 1, "context": context, "ms_per_step": ms}

    rows = [
        row("eager", 512, 1.0),
        row("eager", 4096, 2.0),
        row("eager", 32768, 2.1),
        row("kernels", 32768, 1.0),
    ]
    failed = {"engine": "compile", "batch": 1, "context": 4096, "failed": "no GPU"}
    line = "eager, batch 1: a step at 32,768 tokens costs 1.050 times one at 4,096"
    assert report.costs_of_length([*rows, failed]) == [line]
    assert report.costs_of_length(rows[:2]) == []
    assert report.costs_of_length([]) == []
    between = [row("eager", 8192, 2.0), row("compile", 8192, 1.0), row("compile", 4096, 1.0)]
    assert report.costs_of_length([*between, *rows]) == [line]  # at the longest context alone
    other = row("eager", 32768, 9.0) | {"batch": 8}
    assert report.costs_of_length([other, *rows]) == [line]  # and of the same batch


@pytest.mark.parametrize(
    ("capability", "size", "format", "left_out"),
    [
        (None, "small", "plain", {"kernels-pdl"}),
        ((8, 0), "7b", "plain", {"kernels-pdl", "cpu", "llama.cpp"}),
        ((9, 0), "7b", "plain", {"cpu", "llama.cpp"}),
        ((9, 0), "7b", "Q4_K_M", {"cpu", "compile", "transformers", "transformers-compiled"}),
    ],
)
def test_who_takes_part_where_nobody_is_named(capability, size, format, left_out, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    names = benchmark.taking_part(torch.device("cuda" if capability else "cpu"), size, format)
    assert names == [name for name in turns.NAMES if name not in left_out]


def test_a_file_is_measured_packed_as_it_is(no_rates, monkeypatch, capsys):
    pytest.importorskip("numba")
    file = small.ROOT / "mistral/demo/demo.gguf"
    sizes = ("--prompt-tokens", "9", "--new-tokens", "3", "--repeats", "1")
    out = run_script(
        benchmark, monkeypatch, capsys, "--file", str(file), "--engines", "cpu", "eager", *sizes
    )
    results = json.loads(out.splitlines()[-1])
    assert (results["size"], results["format"]) == ("demo.gguf", "its own")
    assert [row["engine"] for row in results["results"]] == ["cpu", "eager"]
    assert not any("failed" in row for row in results["results"])


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
    report.plot(
        tmp_path / "plot.png", [*results, {"engine": "kernels", "failed": "no GPU"}], "title"
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_profile_lists_operators_with_their_bytes(no_rates, monkeypatch, capsys):
    options = (
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--steps",
        2,
        "--context",
        5,
        "--engine",
        "eager",
    )
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
    weights = sum(moved.values()) - sum(
        moved[f"{name}_kernel"] for name in ("decode_attention", "embed", "sample")
    )
    assert weights == sizes.weight_bytes(model) - norms
    assert moved["decode_attention_kernel"] == 4096 * 131_072
    assert moved["sample_kernel"] == 4 * 32000


def test_our_kernels_bytes_of_a_packed_model_are_its_blocks():
    model = sizes.make_model("tiny", torch.device("cpu"), torch.float32, "Q8_0")
    moved = profile_step.kernel_bytes(model, 1, 50)
    norms = sum(p.nbytes for p in model.parameters() if p.dim() == 1)
    weights = sum(moved.values()) - sum(
        moved[f"{name}_kernel"] for name in ("decode_attention", "embed", "sample")
    )
    assert weights == sizes.weight_bytes(model) - norms
    assert moved["embed_kernel"] == model.config.hidden_size // 32 * 34


def test_the_two_projections_of_a_layer_are_told_apart():
    def event(name, start, us):
        span = types.SimpleNamespace(start=start, elapsed_us=lambda: us)
        return types.SimpleNamespace(
            name=name, time_range=span, device_type=torch.autograd.DeviceType.CUDA
        )

    names = (
        "qkv_kernel",
        "projection_kernel",
        "gate_up_kernel",
        "unpack_kernel",
        "projection_kernel",
        "head_kernel",
    )
    events = [event(name, start, 10 * start) for start, name in enumerate(names, 1)]
    rows = profile_step.kernels(events[::-1], {"projection_kernel, down": 7}, 1)
    found = {
        row["name"]: (row["us"], row["bytes"])
        for row in rows
        if row["name"].startswith("projection")
    }
    assert found == {"projection_kernel, o": (20, None), "projection_kernel, down": (50, 7)}


def test_the_profile_takes_packed_formats(no_rates, monkeypatch, capsys):
    options = (
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--steps",
        1,
        "--context",
        5,
        "--engine",
        "eager",
        "--format",
        "Q8_0",
    )
    out = run_script(profile_step, monkeypatch, capsys, *options)
    assert json.loads(out.splitlines()[-1])["format"] == "Q8_0"


def test_a_packed_model_that_one_contestant_runs_is_not_copied():
    model = sizes.make_model("tiny", torch.device("cpu"), torch.float32, "Q8_0")
    assert (
        turns.Field(model, ["eager"]).open("eager", Case(1, 5, 2), small.tokens(1, 5)).decoder.model
        is model
    )


def test_percentiles_of_waits():
    waits = [n / 100 for n in range(101)]
    assert benchmark_serve.percentiles(waits) == {"p50": 0.5, "p99": 0.99, "most": 1.0}
    assert benchmark_serve.percentiles([0.5]) == {"p50": 0.5, "p99": 0.5, "most": 0.5}


def test_locust_is_run_twice_and_its_last_line_is_the_result(tmp_path, capsys):
    load = benchmark_serve.Load(
        clients=3, requests=1, prompt_tokens=16, new_tokens=8, ids=[5], answer=6
    )
    program = tmp_path / "locust"
    program.write_text(
        f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
echo 'Type  Name'
echo '{{"tokens_per_s": 9.5, "failures": {{"503": 2}}}}'
"""
    )
    program.chmod(0o755)
    found = benchmark_serve.by_locust(program, "http://127.0.0.1:1", load, 7)
    assert found["tokens_per_s"] == 9.5 and found["clients"] == 3
    assert "503" in capsys.readouterr().err
    warm, measured = (tmp_path / "calls").read_text().splitlines()
    assert "-t 2s" in warm and "-t 7s" in measured
    assert "-u 3 -r 3" in measured and "--prompt-tokens 16 --new-tokens 8" in measured
    program.write_text("#!/bin/sh\necho no >&2; exit 3\n")
    with pytest.raises(RuntimeError, match="locust ended with 3: no"):
        benchmark_serve.by_locust(program, "http://127.0.0.1:1", load, 7)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["plain", "Q8_0"])
def test_both_servers_under_load(format, monkeypatch, capsys):
    pytest.importorskip("xllamacpp")
    sizes = ("--size", "tiny", "--slots", 2, "--requests", 2, "--threads", 1)
    short = ("--prompt-tokens", 16, "--new-tokens", 8, "--formats", format, "--engine", "eager")
    out = run_script(benchmark_serve, monkeypatch, capsys, *sizes, *short)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["server"] for line in lines] == ["ours", "llama-server"]
    for line in lines:
        assert line["requests"] == 4 and line["tokens_per_s"] > 0
        assert line["first_token_s"]["p50"] > 0

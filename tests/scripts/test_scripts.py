"""The scripts as a person runs them: in a process of their own, with good and bad input."""

import ast
import io
import json
import os
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time

import common
import fuzz
import pytest
import small
import torch
from demo import talk, training

import mistral
import mistral_kernels
from mistral.checkpoints import load as checkpoints
from mistral.engine import memory
from mistral.rms_norm import RMSNorm

SMALL = str(small.DATA / "small")


def run(script, *arguments, **options):
    command = [sys.executable, small.SCRIPTS[script], *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL} | options if "input" not in options else options
    result = subprocess.run(
        command, cwd=small.ROOT, capture_output=True, text=True, timeout=120, **options
    )
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def hermes(tmp_path_factory):
    """Random weights, Mistral's true tokenizer, padded to 32,032 rows as Hermes-2-Pro is."""
    folder = tmp_path_factory.mktemp("hermes") / "checkpoint"
    tokenizer = small.TRUE_TOKENIZERS / "tokenizer.model.v1"
    with pytest.MonkeyPatch.context() as patch:
        script = small.SCRIPTS["random_checkpoint"]
        patch.setattr(sys, "argv", [script, str(folder), "--tokenizer", str(tokenizer)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(small.ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    return folder


@pytest.fixture
def standard_input(monkeypatch):
    """Makes bytes the standard input of a script that runs here."""

    def set_input(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))

    return set_input


def test_generate_lets_an_engine_run_ahead_of_what_it_prints(hermes, monkeypatch, run_here):
    events = []

    class Ahead(mistral.Decoder):
        steps_in_flight = 2

        def step(self, sampling, mask=None):
            events.append("step")
            return super().step(sampling, mask)

    def open_engine(name, model, *sizes, say, progress, **options):
        return Ahead(model, *sizes, **options), "engine: ahead"

    monkeypatch.setattr(mistral_kernels, "open_engine", open_engine)
    monkeypatch.setattr(
        mistral.tokenizer.TextStream, "feed", lambda self, id: events.append("text") or "a"
    )
    code, _, err = run_here("generate", hermes, "--prompt", "Hello", "--max-new-tokens", 6)
    assert code == 0
    assert "6 new tokens" in err
    assert events[:4] == ["step", "step", "step", "text"]


def test_generate_streams_text_and_reports_on_stderr(hermes, run_here):
    arguments = (
        hermes,
        "--prompt",
        "The capital of France is",
        "--max-new-tokens",
        20,
        "--seed",
        1,
        "--temperature",
        1,
    )
    first = run("generate", *arguments)
    assert first.returncode == 0, first.stderr
    assert run_here("generate", *arguments)[:2] == (0, first.stdout)
    assert len(first.stdout) > 20
    for part in (
        "prompt 6 tokens",
        "first token after",
        "tokens/s",
        "20 new tokens",
        "peak memory",
    ):
        assert part in first.stderr


def test_generate_takes_a_real_chat_prompt_from_a_pipe_far_past_the_window(
    hermes, run_here, standard_input
):
    turn = "<|im_start|>user\nWhat is the weather in Zürich? 🌧️<|im_end|>\n<|im_start|>assistant\n"
    standard_input((turn * 12).encode())
    options = ("--special", "--max-new-tokens", 5, "--temperature", 0)
    code, _, err = run_here("generate", hermes, *options)
    assert code == 0, err
    assert int(err.split("prompt ")[1].split(" tokens")[0].replace(",", "")) > 2 * 128


def test_generate_obeys_its_flags(hermes, run_here):
    base = (hermes, "--prompt", "Hello there", "--max-new-tokens", 30, "--temperature", 0)
    _, free, _ = run_here("generate", *base)
    stop = free[10:14]
    _, stopped, _ = run_here("generate", *base, "--stop", stop)
    assert stopped == free[: free.index(stop)] + "\n"
    flags = (
        "--top-k",
        5,
        "--top-p",
        0.9,
        "--min-p",
        0.01,
        "--typical-p",
        0.9,
        "--repetition-penalty",
        1.2,
    )
    flags += (
        "--no-repeat-ngram-size",
        3,
        "--seed",
        3,
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
        "--window",
        "none",
    )
    more = ("--prompt", "Hello there", "--max-new-tokens", 10)
    code, _, err = run_here("generate", hermes, *more, *flags)
    assert code == 0, err


def test_compare_hf_finds_no_difference_and_exits_with_0(hermes, run_here):
    for arguments in (
        (hermes, "--dtype", "bfloat16"),
        (SMALL, "--tokens", 40),
        (SMALL, "--window", "none"),
    ):
        code, out, err = run_here("compare_hf", *arguments)
        assert code == 0, out + err
        assert "bit-identical" in out
    assert "layer 1" in out


def test_compare_hf_finds_a_difference_and_exits_with_1(run_here, monkeypatch):
    made = RMSNorm.__init__
    monkeypatch.setattr(RMSNorm, "__init__", lambda self, size, eps: made(self, size, 1e-3))
    code, out, _ = run_here("compare_hf", SMALL)
    assert code == 1
    assert "DIFFERENT" in out


GGUF = small.DATA / "gguf/q4_k_m.gguf"


def test_every_script_takes_a_gguf_file(run_here, tmp_path):
    code, out, err = run_here(
        "generate", GGUF, "--packed", "--prompt", "hello", "--max-new-tokens", 5, "--seed", 1
    )
    assert (code, len(out) > 1, "names no sliding window" in err) == (0, True, True)
    code, out, _ = run_here("inspect_checkpoint", GGUF)
    assert code == 0
    for fact in (
        "Q6_K 221.76 kB",
        "tokenizer.ggml.tokens",
        "blk.*.attn_q.weight",
        "462 ids for 480 rows",
        "packed",
    ):
        assert fact in out
    code, out, _ = run_here("compare_hf", GGUF, "--window", 16, "--tokens", 40)
    assert (code, "bit-identical" in out) == (0, True)


def test_an_exported_checkpoint_generates_the_same_text(run_here, tmp_path):
    target = tmp_path / "small.F32.gguf"
    code, _, err = run_here("export_gguf", SMALL, target, "--type", "F32")
    assert (code, f"wrote {target}" in err) == (0, True)
    flags = ("--prompt", "hello", "--max-new-tokens", 30, "--temperature", 0)
    assert run_here("generate", target, *flags)[1] == run_here("generate", SMALL, *flags)[1]
    code, _, err = run_here("export_gguf", SMALL, target)
    assert (code, "exists; remove it" in err) == (1, True)


def test_the_fuzzing_script_runs_in_parts(run_here, tmp_path, monkeypatch):
    for number in (0, 1, 1):
        flags = ("--cases", 5, "--seed", number, "--save", tmp_path)
        code, out, err = run_here("fuzz", "answers", *flags)
        assert code == 0, out + err
        assert out.startswith("answers: 5 cases")
        assert "; 0 failures" in out
    page = tmp_path / "fuzzing.md"
    shutil.copy(fuzz.PAGE, page)
    monkeypatch.setattr(fuzz, "PAGE", page)
    fuzz.write_row(fuzz.TARGETS["answers"], fuzz.all_parts(fuzz.TARGETS["answers"], tmp_path))
    row = next(line for line in page.read_text().splitlines() if line.startswith("| answers |"))
    assert row.split(" | ")[3:5] == ["10", "0"]
    code, _, err = run_here("fuzz", "rows", "--cases", 0, "--page", "--save", tmp_path)
    assert (code, "has no run of rows" in err) == (1, True)


def test_inspect_checkpoint_tells_the_facts(hermes, run_here):
    code, out, err = run_here("inspect_checkpoint", hermes)
    assert code == 0, err
    for fact in (
        "sliding_window           128",
        "model.layers.*.self_attn.q_proj.weight",
        "32000 <|im_end|>",
        "bfloat16",
    ):
        assert fact in out
    assert "32,002 ids for 32,032 rows" in out
    _, out, _ = run_here("inspect_checkpoint", hermes, "--all")
    assert "model.layers.3.mlp.up_proj.weight" in out


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("generate", ("no/such/folder", "--prompt", "hi"), "no/such/folder does not exist"),
        ("generate", (__file__, "--prompt", "hi"), "is not a GGUF file"),
        ("generate", (SMALL, "--prompt", ""), "the prompt is empty"),
        (
            "generate",
            (SMALL, "--prompt", "hi", "--temperature", -1),
            "temperature must be 0 (greedy) or",
        ),
        ("generate", (SMALL, "--prompt", "hi", "--max-new-tokens", 3000), "made for 2048"),
        ("generate", (SMALL, "--prompt", "hi", "--stop", ""), "--stop is empty"),
        ("generate", (SMALL, "--prompt", "hi", "--device", "gpu"), "device 'gpu'"),
        ("generate", (SMALL, "--prompt", "hi", "--device", "meta"), "device 'meta'"),
        ("benchmark", ("--device", "foo"), "device 'foo'"),
        ("compare_hf", (SMALL, "--tokens", 3000), "takes 1 to 2048"),
        ("random_checkpoint", ("/nowhere/x", "--window", "auto"), "--window must be"),
        (
            "generate",
            (SMALL, "--prompt", b"\xff".decode(errors="surrogateescape")),
            "--prompt is not valid UTF-8",
        ),
        ("inspect_checkpoint", ("no/such/folder",), "does not exist"),
        ("compare_hf", ("no/such/folder",), "does not exist"),
        ("compare_hf", (SMALL, "--tokens", 0), "--tokens must be 1 or more"),
        ("random_checkpoint", (SMALL,), "is not empty"),
        ("random_checkpoint", ("/nowhere/x", "--hidden-size", 100), "multiple of 128"),
        ("benchmark", ("--repeats", 0), "must be 1 or more"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_a_code(script, arguments, message, run_here):
    code, _, err = run_here(script, *arguments)
    assert code == 1
    lines = err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    "arguments", [("--window", "-3"), ("--dtype", "int8"), ("--no-such-option",)]
)
def test_unknown_options_are_refused(arguments, run_here):
    code, _, err = run_here("generate", SMALL, *arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1


@pytest.fixture
def no_loading(monkeypatch):
    """Fails a test whose script reads a checkpoint."""

    def loaded(*arguments, **options):
        pytest.fail("the script began to load the checkpoint")

    monkeypatch.setattr(mistral, "load", loaded)
    monkeypatch.setattr(checkpoints, "open_reader", loaded)
    monkeypatch.setattr(checkpoints, "local_path", loaded)


PROMPT = ("--prompt", "hi")
TOOLS = ("--tools", "scripts/example_tools.py")
BEFORE_LOADING = [
    ("generate", (*PROMPT, "--engine", "compile", "--packed"), "packed weights cannot be compiled"),
    ("generate", (*PROMPT, "--engine", "compile", "--quantize", "q8_0"), "use --engine eager"),
    ("generate", (*PROMPT, "--max-new-tokens", 0), "--max-new-tokens must be 1 or more, not 0"),
    ("generate", (*PROMPT, "--max-new-tokens", -5), "--max-new-tokens must be 1 or more"),
    ("generate", (*PROMPT, "--temperature", -1), "--temperature must be 0"),
    ("generate", (*PROMPT, "--top-p", 2), "--top-p must be between 0 and 1"),
    ("generate", (*PROMPT, "--lookup", -1), "argument --lookup"),
    ("generate", (*PROMPT, "--device", "gpu"), "device 'gpu'"),
    ("generate", (*PROMPT, "--stop", ""), "--stop is empty"),
    ("generate", (*PROMPT, "--format", "x"), "unrecognized arguments"),
    ("chat", ("--load", "/nowhere.jsonl"), "/nowhere.jsonl"),
    ("chat", ("--load", "README.md"), "README.md, line 1, is not valid JSON"),
    ("chat", ("--max-new-tokens", 0), "--max-new-tokens must be 1 or more"),
    ("chat", ("--max-tokens", 0), "--max-tokens must be 1 or more"),
    ("chat", ("--format", "x"), "argument --format"),
    ("chat", ("--engine", "compile", "--packed"), "packed weights cannot be compiled"),
    ("json_mode", (*PROMPT, "--schema", "/nowhere.json"), "/nowhere.json cannot be read"),
    ("json_mode", (*PROMPT, "--retries", -1), "--retries must be 0 or more"),
    ("json_mode", (*PROMPT, "--max-new-tokens", 0), "--max-new-tokens must be 1 or more"),
    ("json_mode", (*PROMPT, "--seed", -1), "--seed must be a whole number"),
    ("chat", (*PROMPT, "--tools", "/nowhere.py"), "/nowhere.py does not exist"),
    ("chat", (*PROMPT, "--tools", "README.md"), "README.md cannot be run"),
    ("chat", (*TOOLS, *PROMPT, "--tool-choice", "fly"), "no tool 'fly'"),
    ("chat", (*TOOLS, *PROMPT, "--tool-choice", "required", "--no-grammar"), "--no-grammar"),
    ("chat", (*TOOLS, *PROMPT, "--format", "mistral_instruct_v1"), "has no functions"),
    ("chat", (*TOOLS, *PROMPT, "--max-rounds", 0), "--max-rounds must be 1 or more"),
    ("chat", ("--tool-choice", "required"), "--tool-choice 'required' needs tools"),
    ("chat", ("--time-limit", 0), "--time-limit must be more than 0"),
    ("chat", ("--prompt", ""), "--prompt is empty"),
    ("look_inside", ("hi", "-o", "/nowhere/page.html"), "/nowhere is not a folder"),
    ("look_inside", ("hi", "-o", "README.md"), "is not a page of this script"),
    ("look_inside", ("", "-o", "/tmp/page.html"), "the text is empty"),
    ("compare_hf", ("--tokens", 0), "--tokens must be 1 or more"),
    ("compare_hf", ("--packed",), "leave out --packed"),
    ("export_gguf", ("/nowhere/m.gguf",), "/nowhere is not a folder"),
    ("export_gguf", ("tests",), "tests is a folder"),
    ("export_gguf", ("README.md",), "README.md exists"),
    ("export_gguf", ("/tmp/m.gguf", "--packed"), "leave out --packed"),
    ("benchmark_lookup", ("--page", "/nowhere/page.md"), "/nowhere is not a folder"),
    ("measure_demo", ("--page", "/nowhere/page.md"), "/nowhere is not a folder"),
    ("measure_demo", ("--requests", 0), "must be 1 or more"),
    ("stress_grammar", ("--engine", "compile", "--packed"), "packed weights cannot be compiled"),
    ("serve", ("--lookup", 4, "--same-bits"), "--same-bits excludes --lookup"),
]


@pytest.mark.parametrize(("script", "arguments", "words"), BEFORE_LOADING, ids=str)
def test_what_needs_no_weights_is_refused_before_they_are_read(
    script, arguments, words, run_here, no_loading, monkeypatch
):
    monkeypatch.chdir(small.ROOT)
    model = () if script == "measure_demo" else ("demo",)
    code, _, err = run_here(script, *model, *arguments)
    assert code in (1, 2)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert words in lines[0]


EVALUATION = ("function-calling", "--model", "demo", "--data", str(small.DATA / "README.md"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--output", "/nowhere/answers.jsonl"), "/nowhere is not a folder"),
        (("--temperature", -1), "--temperature must be"),
        (("--max-new-tokens", 0), "--max-new-tokens must be 1 or more"),
        (("--engine", "compile", "--packed"), "packed weights cannot be compiled"),
        ((), "README.md"),
    ],
    ids=str,
)
def test_an_evaluation_is_checked_before_weights_are_read(arguments, words, run_here, no_loading):
    code, _, err = run_here("evaluate", *EVALUATION, *arguments)
    assert (code, words in err) == (1, True), err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["generate", "chat", "json_mode"])
def test_the_kernels_without_a_gpu_are_refused_before_weights_are_read(
    script, run_here, no_loading, monkeypatch
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    prompt = () if script == "chat" else PROMPT
    code, _, err = run_here(script, "demo", *prompt, "--engine", "kernels")
    assert (code, err.count("\n")) == (1, 1)
    assert "the kernels need an NVIDIA GPU" in err or "Triton is not installed" in err


def test_a_checkpoint_in_its_own_dtype_is_a_note_with_flags(run_here, monkeypatch):
    monkeypatch.setattr(memory, "_available_memory", lambda device: 4_000_000)
    code, _, err = run_here("generate", SMALL, *PROMPT, "--max-new-tokens", 1)
    assert code == 0, err
    [note] = [line for line in err.splitlines() if line.startswith("note: ")]
    assert "it is loaded in bfloat16 (2.72 MB)" in note
    assert note.endswith(
        "Less memory: --quantize q8_0 (1.45 MB) or --quantize q4_0 (831.49 kB), or a quantized "
        "GGUF with --packed"
    )
    monkeypatch.setattr(memory, "_available_memory", lambda device: 1_000_000)
    code, _, err = run_here("generate", SMALL, *PROMPT, "--dtype", "float32")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error: small in float32 needs 5.44 MB on cpu, and 1.00 MB are free; it")
    assert err.endswith("it would fit with --quantize q4_0 (831.49 kB)\n")


def all_options():
    """A parser with every option that takes an argument of the library."""
    parser = common.parser("", "")
    common.add_model_arguments(parser)
    common.add_chat_arguments(parser)
    common.add_sampling_arguments(parser, temperature=0.0)
    common.add_engine_argument(parser)
    common.add_lookup_argument(parser)
    for option in ("--tool-choice", "--max-rounds", "--retries", "--prompt", "--time-limit"):
        parser.add_argument(option)
    parser.add_argument("--no-grammar", action="store_true")


@pytest.mark.parametrize(
    ("message", "translated"),
    [
        ('quantize="q4_0" (4.18 GB)', "--quantize q4_0 (4.18 GB)"),
        ("keep it with packed=True, please", "keep it with --packed, please"),
        ("(sliding_window=None: attend to all)", "(--window none: attend to all)"),
        ("(sliding_window=... overrides)", "(--window overrides)"),
        ("dtype=torch.bfloat16 (2 GB)", "--dtype bfloat16 (2 GB)"),
        ("revision='x' is for names", "--revision x is for names"),
        ("lower max_new_tokens.", "lower --max-new-tokens."),
        ("top_p must be between 0 and 1", "--top-p must be between 0 and 1"),
        ("seed must be a whole number", "--seed must be a whole number"),
        ("it needs grammar=True, and", "it needs grammar (without --no-grammar), and"),
        ("or use the eager engine, mistral.Decoder", "or use --engine eager"),
        # Not arguments: keys of files, names of files, and arguments without an option
        ("config.json has no sliding_window", "config.json has no sliding_window"),
        ("/data/top_k/max_tokens.json is missing", "/data/top_k/max_tokens.json is missing"),
        ("/data/dtype=float16/seed=3 is missing", "/data/dtype=float16/seed=3 is missing"),
        ("there is no tool 'max_tokens'", "there is no tool 'max_tokens'"),
        ("slack=16 or more", "slack=16 or more"),
        ("a packed GGUF, a seed, the temperature", "a packed GGUF, a seed, the temperature"),
    ],
)
def test_messages_name_flags(message, translated):
    all_options()
    assert common.with_flags(message) == translated


def messages_of_the_library():
    """Every text of one line in mistral and mistral_kernels, the values in it as VALUE."""
    for folder in ("mistral", "kernels"):
        for path in sorted((small.ROOT / folder).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            formatted = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
            parts = {id(part) for values in formatted for part in values}
            texts = [
                node for node in nodes if isinstance(node, ast.Constant) and id(node) not in parts
            ]
            for values in (*formatted, *([text] for text in texts)):
                said = [v.value if isinstance(v, ast.Constant) else "VALUE" for v in values]
                message = "".join(map(str, said))
                if "\n" not in message:  # others are docstrings
                    yield path, message


def test_every_argument_that_a_message_names_has_its_flag_in_a_script():
    all_options()
    named = re.compile(
        r"\b(packed|quantize|sliding_window|dtype|revision|device|grammar|max_new_tokens|top_k|"
        r"top_p|min_p|typical_p|repetition_penalty|no_repeat_ngram_size|tool_choice|max_rounds)="
    )
    found = set()
    for path, message in messages_of_the_library():
        for argument in named.findall(message):
            found.add(argument)
            assert f"{argument}=" not in common.with_flags(message), (path, message)
    assert found >= {"packed", "quantize", "sliding_window", "dtype", "revision", "grammar"}


def test_input_that_is_not_utf_8_is_said(run_here, standard_input):
    standard_input(b"caf\xe9")
    code, _, err = run_here("generate", SMALL)
    assert (code, err.count("\n")) == (1, 1)
    assert "not UTF-8" in err


def test_too_little_memory_is_one_line(tmp_path, run_here):
    folder = tmp_path / "checkpoint"
    shutil.copytree(SMALL, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"sliding_window": None, "max_position_embeddings": 2**31 - 1}
    (folder / "config.json").write_text(json.dumps(config))
    code, _, err = run_here("generate", folder, "--prompt", "hi", "--max-new-tokens", 2**31 - 100)
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "a key/value cache of 21474" in err
    assert "would fit" in err


@pytest.mark.skipif(os.name == "nt", reason="uses a pseudo-terminal")
def test_a_terminal_sees_a_progress_bar(hermes):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [
        sys.executable,
        "scripts/generate.py",
        hermes,
        "--prompt",
        "hello",
        "--max-new-tokens",
        "2",
        "--engine",
        "eager",
    ]
    result = subprocess.run(
        command, cwd=small.ROOT, stdout=subprocess.PIPE, stderr=theirs, timeout=120
    )
    shown = os.read(ours, 100_000)
    os.close(ours)
    os.close(theirs)
    assert result.returncode == 0
    assert b"loading:" in shown
    assert b"0.00/39.6M" in shown


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("generate", ("--prompt", "x")), ("inspect_checkpoint", ()), ("compare_hf", ())],
)
def test_a_damaged_checkpoint_is_one_line(script, arguments, tmp_path, run_here):
    folder = tmp_path / "checkpoint"
    shutil.copytree(SMALL, folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    code, _, err = run_here(script, folder, *arguments)
    assert code == 1
    assert len(err.strip().splitlines()) == 1
    assert "damaged or not complete" in err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_generation_cleanly(hermes):
    command = [
        sys.executable,
        "scripts/generate.py",
        hermes,
        "--prompt",
        "hello",
        "--max-new-tokens",
        "4000",
        "--engine",
        "eager",
    ]
    # Unbuffered, so that the first piece of text is seen at once.
    process = subprocess.Popen(
        command, cwd=small.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"stopped" in err
    assert b"peak memory" in err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize(
    ("script", "seconds"),
    [
        ("generate", 0.4),
        pytest.param("generate", 1.2, marks=pytest.mark.slow),
        ("generate", 2.0),
        pytest.param("compare_hf", 2.4, marks=pytest.mark.slow),
        ("inspect_checkpoint", 1.0),
    ],
)
def test_ctrl_c_at_any_time_is_quiet(script, seconds):
    command = [
        sys.executable,
        f"scripts/{script}.py",
        SMALL,
        *(["--prompt", "x"] if script == "generate" else []),
    ]
    process = subprocess.Popen(
        command, cwd=small.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert b"Traceback" not in err
    assert process.returncode in (
        0,
        130,
        -signal.SIGINT,
    )  # the last: while importing, or when Python was leaving


def test_a_reader_that_leaves_is_not_an_error(hermes):
    command = (
        f"{sys.executable} scripts/generate.py {hermes} --prompt hello --max-new-tokens 4000 "
        f"--engine eager | head -c 5"
    )
    result = subprocess.run(command, shell=True, cwd=small.ROOT, capture_output=True, timeout=120)
    assert len(result.stdout) == 5
    assert b"Traceback" not in result.stderr
    assert b"Error" not in result.stderr


def test_a_chat_in_the_terminal_answers_obeys_commands_and_keeps_the_conversation(
    tmp_path, run_here, standard_input
):
    saved = tmp_path / "talk.jsonl"
    typed = (
        f"Hello!\n/system Be brief.\n/nothing\nWhat is\\\nGGUF?\n/retry\n/save {saved}\n/reset\n/load "
        f"{saved}\n/undo\n/undo\n/quit\n"
    )
    standard_input(typed.encode())
    code, out, err = run_here("chat", "--temperature", 0, "--max-new-tokens", 40)
    assert code == 0, err
    assert err.count("tokens/s") == 3
    assert "error: there is no command /nothing" in err
    assert err.count("error: the conversation has no message of the user") == 1
    head, *messages = map(json.loads, saved.read_text().splitlines())
    assert head["format"] == "chatml"
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[1]["content"] == "What is\nGGUF?"
    assert messages[2]["content"].strip() in out


def test_a_retry_with_a_seed_is_another_answer(run_here, monkeypatch, tmp_path):
    saved = [tmp_path / "first", tmp_path / "second"]
    typed = f"Tell me a story\n/save {saved[0]}\n/retry\n/save {saved[1]}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code, _, err = run_here("chat", "--seed", 3, "--temperature", 5, "--max-new-tokens", 8)
    assert code == 0, err
    first, second = (json.loads(path.read_text().splitlines()[-1])["content"] for path in saved)
    assert first != second


def test_a_chat_with_tools_shows_the_call_its_result_and_the_answer(run_here, tmp_path):
    code, out, err = run_here(
        "chat", *TOOLS, "--prompt", "What is 12 * 7?", "--tool-choice", "calculate"
    )
    assert code == 0, err
    assert "call    calculate(" in out
    assert "result  " in out or "error  " in out
    assert "without asking the model" in err
    (tmp_path / "mine.py").write_text(
        "from mistral.chat import tool\n\n@tool\ndef lucky() -> int:\n    '''Tell a lucky "
        "number.'''\n    return 7\n"
    )
    options = (
        "--tools",
        tmp_path / "mine.py",
        "--tool-choice",
        "required",
        "--prompt",
        "A number?",
    )
    code, out, _ = run_here("chat", *options)
    assert (code, "call    lucky({})" in out, "result  7" in out) == (0, True, True)


def test_the_word_counter_reads_no_file_outside_of_the_folder(tmp_path, monkeypatch):
    count_words = runpy.run_path(str(small.ROOT / "scripts/example_tools.py"))["count_words"]
    (tmp_path / "secret.txt").write_text("one two three")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "notes.txt").write_text("four words are here")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "image.png").write_bytes(b"\x89PNG")
    assert count_words("notes.txt") == count_words(str(folder / "notes.txt")) == 4
    for path in (
        "../secret.txt",
        str(tmp_path / "secret.txt"),
        "link.txt",
        "/etc/passwd",
        "/nowhere",
    ):
        with pytest.raises(ValueError, match="outside of"):
            count_words(path)
    for path, words in (
        ("none.txt", "no file"),
        (".", "no file"),
        ("image.png", "not a text in UTF-8"),
        ("a\0", "null"),
    ):
        with pytest.raises(ValueError, match=words):
            count_words(path)


@pytest.mark.skipif(os.name == "nt", reason="uses a pseudo-terminal")
def test_what_is_pasted_into_the_terminal_arrives_whole():
    # Seen in a terminal: of 5,000 characters the model read 4,095, and of a text its first line.
    ours, theirs = os.openpty()
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import console\n"
        "from chat_parts.line_editor import read_message\n"
        "for _ in range(3):\n"
        "    text = read_message()\n"
        "    print(f'<{text[:40]!r}, {len(text)} characters>')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=small.ROOT,
        env=os.environ | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""

    def until(words):
        nonlocal shown
        while words not in shown and select.select([ours], [], [], 30)[0]:
            shown += os.read(ours, 100_000)
        assert words in shown
        shown = shown.partition(words)[2]

    until(b"> ")
    for _ in range(50):
        os.write(ours, b"x" * 100)
        if select.select([ours], [], [], 1)[0]:  # the echo: the terminal is full otherwise
            shown += os.read(ours, 100_000)
    os.write(ours, b"\n")
    until(b", 5000 characters>")
    until(b"\x1b[?2004h")  # the terminal marks what is pasted from here on
    os.write(ours, b"\x1b[200~def f():\n\treturn 1\n/quit\n\x1b[201~\n")
    until(rb"<'def f():\n\treturn 1\n/quit', 24 characters>")
    os.write(ours, b"What is\\\nGGUF?\n")
    until(b"... ")
    until(rb"<'What is\nGGUF?', 13 characters>")
    process.wait(timeout=30)
    os.close(ours)


def test_json_mode_prints_json_that_follows_the_schema(run_here, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    )
    code, out, err = run_here("json_mode", "--schema", schema, "--prompt", "Make n 5.")
    assert code == 0, err
    assert list(json.loads(out)) == ["n"]
    assert isinstance(json.loads(out)["n"], int)


@pytest.mark.parametrize(
    ("schemas", "max_new_tokens", "least"),
    # Of 1,000 schemas 52% end within 300 tokens for a random model, so of 48 some 25, give or take 3.5
    [(3, 80, 1), pytest.param(48, 300, 16, marks=pytest.mark.slow)],
)
def test_made_up_schemas_are_answered_validly_by_the_demo_and_by_noise(
    schemas, max_new_tokens, least, run_here
):
    options = ("--batch-size", 12, "--max-new-tokens", max_new_tokens)
    code, out, err = run_here("stress_grammar", "--schemas", schemas, *options)
    assert code == 0, out + err
    for line in out.splitlines():
        counts = json.loads(line.split(": ", 1)[1].split(", mean")[0])
        assert counts["hung"] == counts["invalid"] == 0
        assert counts["valid"] >= least


@pytest.fixture(params=["short", pytest.param("long", marks=pytest.mark.slow)])
def length(request):
    """Whether a test of the demo's scripts runs in its short form or in its long one."""
    return request.param


def test_training_the_demo_continues_at_its_last_step(length, run_here, tmp_path, monkeypatch):
    if length == "short":
        tokenizer = mistral.load("demo", device="cpu")[1]
        monkeypatch.setattr(training, "train_tokenizer", lambda seed: tokenizer)
        monkeypatch.setattr(training, "BATCH_TOKENS", 256)
    train_one = training.Trainer._train

    def interrupted(trainer, *batch):
        result = train_one(trainer, *batch)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patched:  # Ctrl-C in the first step, which is finished and saved
        patched.setattr(training.Trainer, "_train", interrupted)
        code, _, err = run_here("train_demo", tmp_path, "--steps", 2)
    assert (code, "saved step 1" in err, err.endswith("stopped\n")) == (130, True, True)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
    code, _, err = run_here("train_demo", tmp_path, "--steps", 2)
    assert code == 0, err
    assert "continues at step 1" in err
    model, _ = mistral.load(tmp_path / "demo.gguf", device="cpu")
    assert model.config.sliding_window == 1024
    code, _, err = run_here("train_demo", tmp_path, "--steps", 3, "--seed", 1)
    assert (code, "was begun with --seed 0" in err) == (1, True)


def test_the_demo_is_measured_and_its_page_written(length, run_here, tmp_path, monkeypatch):
    requests = 2
    if length == "short":
        requests = 1
        monkeypatch.setattr(talk, "TALK", talk.TALK[:2])
    page = tmp_path / "demo.md"
    code, out, err = run_here("measure_demo", "--requests", requests, "--page", page)
    assert code == 0, err
    assert f"| calls, all of the above | {3 * requests} |" in out
    assert re.search(r"engine: (cpu|eager|kernels)\b", err)
    assert page.read_text().startswith("# The demo")


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("chat", ("--tools", "/nowhere.py"), "/nowhere.py does not exist"),
        ("chat", ("--tools", "README.md"), "cannot be run"),
        ("chat", ("--tool-choice", "fly", "--prompt", "x"), "no tool 'fly'"),
        (
            "chat",
            (*TOOLS, "--tool-choice", "required", "--no-grammar", "--prompt", "x"),
            "leave out --no-grammar",
        ),
        ("json_mode", ("--schema", "README.md", "--prompt", "x"), "is not valid JSON"),
        ("json_mode", ("--schema", "/nowhere.json", "--prompt", "x"), "cannot be read"),
        ("chat", ("--load", "README.md"), "README.md, line 1, is not valid JSON"),
        ("train_demo", ("/tmp/never", "--steps", 0), "--steps must be 1 or more"),
        ("stress_grammar", ("--schemas", 0), "must be 1 or more"),
        ("measure_demo", ("--requests", 0), "must be 1 or more"),
    ],
)
def test_bad_input_to_the_chat_scripts_is_one_clear_line(run_here, script, arguments, words):
    code, _, err = run_here(script, *arguments)
    assert code in (1, 2)
    assert words in err.splitlines()[-1]

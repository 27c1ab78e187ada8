"""The scripts as a person runs them: in a process of their own, with good and bad input."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import small

SMALL = str(small.DATA / "small")


def run(script, *arguments, **options):
    command = [sys.executable, f"scripts/{script}.py", *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL} | options if "input" not in options else options
    result = subprocess.run(command, cwd=small.ROOT, capture_output=True, text=True, timeout=120, **options)
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def hermes(tmp_path_factory):
    """Random weights with the true tokenizer of Mistral, padded to 32,032 rows as Hermes-2-Pro is."""
    folder = tmp_path_factory.mktemp("hermes") / "checkpoint"
    made = run("random_checkpoint", folder, "--tokenizer", small.TRUE_TOKENIZERS / "tokenizer.model.v1")
    assert made.returncode == 0, made.stderr
    return folder


def test_generate_streams_text_and_reports_on_stderr(hermes):
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
    first, again = run("generate", *arguments), run("generate", *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert len(first.stdout) > 20
    for part in ("prompt 6 tokens", "first token after", "tokens/s", "20 new tokens", "peak memory"):
        assert part in first.stderr


def test_generate_takes_a_real_chat_prompt_from_a_pipe_far_past_the_window(hermes):
    turn = "<|im_start|>user\nWhat is the weather in Zürich? 🌧️<|im_end|>\n<|im_start|>assistant\n"
    result = run("generate", hermes, "--special", "--max-new-tokens", 5, "--temperature", 0, input=turn * 12)
    assert result.returncode == 0, result.stderr
    assert int(result.stderr.split("prompt ")[1].split(" tokens")[0].replace(",", "")) > 2 * 128


def test_generate_obeys_its_flags(hermes):
    base = (hermes, "--prompt", "Hello there", "--max-new-tokens", 30, "--temperature", 0)
    free = run("generate", *base).stdout
    stop = free[10:14]
    stopped = run("generate", *base, "--stop", stop).stdout
    assert stopped == free[: free.index(stop)] + "\n"
    flags = ("--top-k", 5, "--top-p", 0.9, "--min-p", 0.01, "--typical-p", 0.9, "--repetition-penalty", 1.2)
    flags += ("--no-repeat-ngram-size", 3, "--seed", 3, "--dtype", "bfloat16", "--device", "cpu", "--window", "none")
    result = run("generate", hermes, "--prompt", "Hello there", "--max-new-tokens", 10, *flags)
    assert result.returncode == 0, result.stderr


def test_compare_hf_finds_no_difference_and_exits_with_0(hermes):
    for arguments in ((hermes, "--dtype", "bfloat16"), (SMALL, "--tokens", 40), (SMALL, "--window", "none")):
        result = run("compare_hf", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "bit-identical" in result.stdout
    assert "layer 1" in result.stdout


def test_compare_hf_finds_a_difference_and_exits_with_1(tmp_path, monkeypatch):
    # Ours reads eps from config.json as a number; give transformers another one through a wrapper of its own.
    folder = tmp_path / "checkpoint"
    shutil.copytree(SMALL, folder)
    wrapper = tmp_path / "sitecustomize.py"
    wrapper.write_text(
        "import transformers.models.mistral.configuration_mistral as c\n"
        "old = c.MistralConfig.__post_init__\n"
        "def new(self, **kwargs):\n    old(self, **kwargs)\n    self.rms_norm_eps = 1e-3\n"
        "c.MistralConfig.__post_init__ = new\n"
    )
    result = run("compare_hf", folder, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert "DIFFERENT" in result.stdout


def test_inspect_checkpoint_tells_the_facts(hermes):
    result = run("inspect_checkpoint", hermes)
    assert result.returncode == 0, result.stderr
    for fact in (
        "sliding_window           128",
        "model.layers.*.self_attn.q_proj.weight",
        "32000 <|im_end|>",
        "bfloat16",
    ):
        assert fact in result.stdout
    assert "32,002 ids for 32,032 rows" in result.stdout
    assert "model.layers.3.mlp.up_proj.weight" in run("inspect_checkpoint", hermes, "--all").stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("generate", ("no/such/folder", "--prompt", "hi"), "no/such/folder does not exist"),
        ("generate", (__file__, "--prompt", "hi"), "is a file, not a folder"),
        ("generate", (SMALL, "--prompt", ""), "the prompt is empty"),
        ("generate", (SMALL, "--prompt", "hi", "--temperature", -1), "temperature must be 0 or more"),
        ("generate", (SMALL, "--prompt", "hi", "--max-new-tokens", 3000), "made for 2048"),
        ("generate", (SMALL, "--prompt", "hi", "--stop", ""), "non-empty strings"),
        ("generate", (SMALL, "--prompt", "hi", "--device", "gpu"), "device 'gpu'"),
        ("generate", (SMALL, "--prompt", b"\xff".decode(errors="surrogateescape")), "surrogates"),
        ("inspect_checkpoint", ("no/such/folder",), "is not a folder"),
        ("compare_hf", ("no/such/folder",), "does not exist"),
        ("compare_hf", (SMALL, "--tokens", 0), "--tokens must be"),
        ("random_checkpoint", (SMALL,), "is not empty"),
        ("random_checkpoint", ("/tmp/x", "--hidden-size", 100), "multiple of 128"),
        ("benchmark", ("--repeats", 0), "must be 1 or more"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_a_code(script, arguments, message):
    result = run(script, *arguments)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_unknown_options_are_refused():
    assert run("generate", SMALL, "--window", "-3").returncode == 2
    assert run("generate", SMALL, "--dtype", "int8").returncode == 2


def test_a_damaged_checkpoint_is_one_line(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(SMALL, folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    for script, arguments in (("generate", ("--prompt", "x")), ("inspect_checkpoint", ()), ("compare_hf", ())):
        result = run(script, folder, *arguments)
        assert result.returncode == 1
        assert len(result.stderr.strip().splitlines()) == 1
        assert "damaged or not complete" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_generation_cleanly(hermes):
    command = [sys.executable, "scripts/generate.py", hermes, "--prompt", "hello", "--max-new-tokens", "4000"]
    # Unbuffered, so that the first piece of text is seen at once.
    process = subprocess.Popen(command, cwd=small.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"stopped" in err
    assert b"peak memory" in err


def test_a_reader_that_leaves_is_no_error(hermes):
    command = f"{sys.executable} scripts/generate.py {hermes} --prompt hello --max-new-tokens 4000 | head -c 5"
    result = subprocess.run(command, shell=True, cwd=small.ROOT, capture_output=True, timeout=120)
    assert len(result.stdout) == 5
    assert b"Traceback" not in result.stderr
    assert b"Error" not in result.stderr

"""Scripts, hostile checkpoints, and consoles that are closed, full, narrow or short of memory."""

import ast
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings

import common
import console
import look_inside
import pytest
import small

import mistral
from mistral.evaluation import rows as evaluation_rows
from mistral.printable import printable

OSC_52 = "\x1b]52;c;cm0gLXJmIH4=\x07"  # writes the clipboard
HOSTILE = f"{OSC_52}\x1b[2J\x9b31m\r\u202etxt\u2066\u200f\u2028\ufeff\n"


@pytest.fixture(autouse=True)
def ctrl_c_as_before():
    """`common.run` leaves the handler of a process that ends."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# 1. A hostile checkpoint goes through every script.


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The small checkpoint with controls in its own name, tokens, template and name on the hub."""
    folder = tmp_path_factory.mktemp("hostile") / f"m{HOSTILE}"
    shutil.copytree(small.DATA / "small", folder)
    # Pieces of equal length: the vocabulary's format stays valid.
    pieces = (folder / "tokenizer.model").read_bytes()
    pieces = re.sub("▁([a-z]{3})".encode(), lambda m: b"\x1b]" + m[1] + b"\x07", pieces)
    pieces = re.sub("▁(?=[a-z]{2})".encode(), "\u202e".encode(), pieces)
    (folder / "tokenizer.model").write_bytes(pieces)
    for name, keys in {
        "config.json": {"_name_or_path": HOSTILE, "vocab_size": 480},
        "tokenizer_config.json": {"chat_template": f"{{{{ {HOSTILE!r} }}}} <|im_start|>"},
        "added_tokens.json": {OSC_52: 462, "\u202etxt\u2066": 463, "<|im_start|>": 461},
    }.items():
        content = json.loads((folder / name).read_text()) | keys
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def hostile_gguf(hostile):
    """The same as a GGUF file, whose general.name is hostile, too."""
    path = hostile.parent / "m.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = mistral.load(hostile, device="cpu")
        mistral.export_gguf(model, tokenizer, path, "Q8_0", name=HOSTILE)
    return path


TOOL = f"""from mistral.chat import tool

@tool
def shout() -> str:
    "Say something."
    return {HOSTILE!r}
"""


def runs_of_every_script(model, folder):
    """Arguments that make each script read the checkpoint, and show or write as much as it can."""
    few = ("--max-new-tokens", 12)
    (folder / "tools.py").write_text(TOOL)
    schema = {"type": "object", "properties": {"a": {"const": HOSTILE}}, "required": ["a"]}
    (folder / "schema.json").write_text(json.dumps(schema))
    row = {
        "prompt": [{"role": "user", "content": HOSTILE}],
        "completion": json.dumps({"a": HOSTILE}),
        "schema": json.dumps(schema),
    }
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    yield "inspect_checkpoint", (model, "--all")
    yield "generate", (model, "--prompt", "hi", "--max-new-tokens", 40, "--seed", 0)
    yield "chat", (model, *few)
    yield "json_mode", (model, "--schema", folder / "schema.json", "--prompt", "Go.")
    tools = ("--tools", folder / "tools.py", "--tool-choice", "required", "--show-prompt")
    yield "chat", (model, *tools, "--prompt", HOSTILE, *few, "--max-rounds", 2)
    yield "look_inside", (model, "hi", "-o", folder / "page.html", "--new-tokens", 2)
    yield "export_gguf", (model, folder / "out.gguf")
    yield "compare_hf", (model, "--tokens", 8, "--prompt", "hi")
    data = ("--data", folder / "rows.jsonl", "--output", folder / "answers.jsonl")
    yield "evaluate", ("json-mode", "--model", model, *data, "--max-new-tokens", 4)
    yield "benchmark_lookup", (model, "--counts", "--requests", 1, "--kinds", "questions", *few)
    yield "stress_grammar", (model, "--schemas", 1, "--max-new-tokens", 4)
    yield "measure_quantization", (model, "--positions", 4, "--formats", "q8_0")
    yield "generate", (folder / f"missing{HOSTILE}", "--prompt", "hi")
    yield "generate", (model, "--prompt", "hi", "--window", HOSTILE)
    yield "generate", (model, HOSTILE)
    yield "chat", (model, "--load", folder / f"missing{HOSTILE}")
    yield "json_mode", (model, "--prompt", "x", "--schema", folder / f"missing{HOSTILE}")
    yield "chat", (model, "--prompt", "x", "--tools", folder / f"missing{HOSTILE}")
    yield "look_inside", (model, "hi", "-o", folder / f"missing{HOSTILE}/page.html")


READERS = ("inspect_checkpoint", "generate", "chat", "look_inside", "export_gguf")


CHATS = ("json_mode", "evaluate")


@pytest.mark.parametrize(
    ("kind", "scripts"),
    [
        ("hostile", READERS + CHATS),
        ("hostile_gguf", READERS),
        pytest.param("hostile", tuple(small.SCRIPTS), marks=pytest.mark.slow),
    ],
    ids=["folder", "gguf", "every script"],
)
def test_a_hostile_checkpoint_commands_no_terminal(
    kind, scripts, request, tmp_path, run_here, monkeypatch
):
    model = request.getfixturevalue(kind)
    monkeypatch.setenv("NO_COLOR", "1")
    typed = f"hello\n{HOSTILE}/nothing{OSC_52}\n/save {tmp_path}/missing{OSC_52}/x\n/help\n"
    shown = []
    worked = set()
    for script, arguments in runs_of_every_script(model, tmp_path):
        if script not in scripts:
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        code, out, err = run_here(script, *arguments)
        assert code in (0, 1, 2), (script, out, err)
        err = re.sub(r"\r[^\r\n]*\d+%\|[^\r\n]*", "", err).replace("\r", "")  # progress bars
        for stream in (out, err):
            assert printable(stream) == stream, (script, stream)
        shown += [out, err]
        worked |= {script} if code == 0 else set()
    assert worked >= set(READERS)
    assert r"\x1b]" in "".join(shown)
    assert r"\u202e" in "".join(shown)


def test_a_tensor_with_a_hostile_name_is_named_in_one_line(hostile, tmp_path, run_here):
    from safetensors.torch import load_file, save_file

    shutil.copytree(hostile, tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {HOSTILE: tensors["model.norm.weight"].clone()}, weights)
    for script, arguments in (("inspect_checkpoint", ()), ("generate", ("--prompt", "x"))):
        code, out, err = run_here(script, tmp_path / "m", *arguments)
        assert code == 1
        assert printable(out + err) == out + err
        told = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert len(told) == 1
        assert told[0].startswith("error: ")


def test_text_that_is_the_result_reaches_a_pipe_as_it_is(capsys, monkeypatch):
    console.show_text(OSC_52)
    assert capsys.readouterr().out == OSC_52
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console.show_text(OSC_52)
    assert capsys.readouterr().out == printable(OSC_52)


# 2. Every output goes through one writer, everything that is said through one module.


def sources_of(*folders):
    for folder in folders:
        for path in sorted((small.ROOT / folder).rglob("*.py")):
            yield path.relative_to(small.ROOT).as_posix(), path.read_text()


# The second prints nothing but its own tables, and must import nothing of the project; the third
# is run by locust, where the project is not installed; what the last prints is for its parent.
PRINTING = (
    "scripts/console.py",
    "scripts/dev/plant_faults.py",
    "scripts/benchmark_parts/locustfile.py",
    "scripts/benchmark_parts/warm_up.py",
)


def test_scripts_print_through_the_console():
    for path, source in sources_of("scripts"):
        calls = re.findall(r"^ +print\(", source, re.M)  # unindented: a program for another process
        # The clients of the matrix run in environments of their own, and print to it.
        is_client = path.startswith("scripts/dev/clients/")
        assert path in PRINTING or is_client or not calls, path


IN_TEMPORARY_FOLDERS = (
    "scripts/dev/fuzz",
    "scripts/dev/plant",
    "scripts/benchmark_load.py",
    "scripts/benchmark_parts/gguf_file.py",
)


def is_writing(call):
    """Whether a call opens a file to write to it, or has a library write one."""
    name = ast.unparse(call.func)
    if name == "open" or name.endswith(".open"):
        modes = [ast.unparse(value) for value in [*call.args, *(k.value for k in call.keywords)]]
        return any(re.fullmatch(r"'[rb+]*[wax+][wabx+]*'", mode) for mode in modes)
    return name in ("torch.save", "save_file", "shutil.copyfile") or name.endswith(
        (".write_text", ".write_bytes", ".savefig")
    )


def test_every_output_is_written_by_the_one_writer():
    words = re.compile(r"\bopen\(|write_text|write_bytes|savefig|copyfile|torch\.save|save_file")
    for path, source in sources_of("scripts", "mistral", "kernels"):
        # The file of answers of an evaluation loses its last line if that was cut off; a GPU run
        # has a log, to which its stages write.
        logs = ("mistral/evaluation/run.py", "scripts/dev/gpu_run.py")
        if path in ("mistral/files.py", "mistral/temporary.py", *logs):
            continue
        if path.startswith(IN_TEMPORARY_FOLDERS) or not words.search(source):
            continue
        tree = ast.parse(source)
        inside = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.With) and "whole_f" in ast.unparse(node.items[0].context_expr):
                inside |= set(ast.walk(node))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        outside = [ast.unparse(call) for call in calls if is_writing(call) and call not in inside]
        assert not outside, path


# 3. Consoles.


def in_a_child(main, closed=(), full=(), left=False, encoding=None):
    """Run `main` as a script in a fork: (exit code, what arrived on stdout, on stderr).

    closed    numbers of the streams that are closed
    full      numbers of the streams that lead to a full disk
    left      whether the reader of stdout has left
    encoding  of the streams
    """
    pipes = [os.pipe(), os.pipe()]
    if left:
        os.close(pipes[0][0])
    child = os.fork()
    if child == 0:
        code = 99
        try:
            if not left:
                os.close(pipes[0][0])
            for number, (_, write) in enumerate(pipes, 1):
                os.dup2(write, number)
                os.close(write)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number in full:
                os.dup2(os.open("/dev/full", os.O_WRONLY), number)
            for number in closed:
                os.close(number)
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                mode = "w" if number else "r"
                stream = None
                if number not in closed:
                    stream = os.fdopen(number, mode, encoding=encoding, closefd=False)
                setattr(sys, name, stream)
            console._prepare()
            try:
                common.run(main)
            except SystemExit as ended:
                code = ended.code
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    heard = []
    for read, write in pipes:
        os.close(write)
        if left and read == pipes[0][0]:
            heard.append("")
            continue
        with os.fdopen(read, encoding=encoding) as stream:
            heard.append(stream.read())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *heard


def work():
    console.note("a note")
    warnings.warn("a warning", stacklevel=1)
    console.show("the result " * 1000)


RESULT = "the result " * 1000 + "\n"
NOTES = "a note\nnote: a warning\n"
CLOSED = f"{NOTES}error: cannot write to standard output: it is closed\n"
FULL = f"{NOTES}error: cannot write to standard output: No space left on device\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({}, (0, RESULT, NOTES)),
        ({"closed": (0,)}, (0, RESULT, NOTES)),
        ({"closed": (1,)}, (1, "", CLOSED)),
        ({"closed": (2,)}, (0, RESULT, "")),
        ({"closed": (0, 1, 2)}, (1, "", "")),
        ({"full": (1,)}, (1, "", FULL)),
        ({"full": (2,)}, (0, RESULT, "")),
        ({"full": (1, 2)}, (1, "", "")),
        ({"left": True}, (141, "", NOTES)),
    ],
    ids=str,
)
def test_streams_that_are_closed_full_or_left(how, told):
    assert in_a_child(work, **how) == told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_text_that_a_library_printed_is_written_at_the_end():
    def work():
        sys.stdout.write("x")

    assert in_a_child(work) == (0, "x", "")
    assert in_a_child(work, left=True) == (141, "", "")
    assert in_a_child(work, full=(1,)) == (1, "", FULL.removeprefix(NOTES))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "na?ve ?? ? end\n"), ("cp1252", "naïve ?? ? end\n")]
)
def test_a_console_that_cannot_show_a_character_gets_the_rest(encoding, shown):
    def work():
        print("naïve 日本 \ud800 end")

    assert in_a_child(work, encoding=encoding) == (0, shown, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_closed_input_is_an_empty_one():
    assert in_a_child(lambda: console.show(repr(sys.stdin.read())), closed=(0,)) == (0, "''\n", "")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 99 GB"),
    ],
    ids=repr,
)
def test_no_memory_is_one_line(error, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as ended:
        common.run(fail)
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory: ")
    assert len(err.splitlines()) == 1


def test_a_process_with_a_thread_at_work_ends_at_once():
    program = """
import sys, threading, time
import console

class TornDown:
    def __del__(self, print=print):
        print("torn down")

sys.modules["the last one"] = TornDown()
threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
print("text", flush=False)
sys.exit(console.finish(3))
"""
    environment = os.environ | {"PYTHONPATH": f"{small.ROOT}:{small.ROOT / 'scripts'}"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (3, "text\n", "")


def test_from_its_end_on_ctrl_c_ends_a_script_at_once(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    with pytest.raises(SystemExit):
        common.run(lambda: handlers.update(during=handlers[signal.SIGINT]))
    assert handlers["during"] is signal.default_int_handler
    assert handlers[signal.SIGINT] is signal.SIG_DFL


def test_a_limit_on_memory_while_importing_is_one_line():
    command = f"ulimit -v 300000; exec {sys.executable} scripts/generate.py demo --prompt hi"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=small.ROOT)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: the libraries do not fit into memory: ")
    assert len(run.stderr.splitlines()) == 1


NOBODY = "~nosuchuser/x"
PATHS = [
    ("chat", ("--load", NOBODY)),
    ("json_mode", ("--prompt", "x", "--schema", NOBODY)),
    ("chat", ("--prompt", "x", "--tools", NOBODY)),
    ("look_inside", ("demo", "hi", "-o", NOBODY)),
    ("export_gguf", ("demo", NOBODY)),
    ("evaluate", ("json-mode", "--data", NOBODY)),
    ("evaluate", ("json-mode", "--data", "x", "--output", NOBODY)),
    ("generate", (NOBODY, "--prompt", "hi")),
    ("inspect_checkpoint", (NOBODY,)),
    ("compare_hf", (NOBODY,)),
    ("benchmark", ("--plot", NOBODY)),
    ("benchmark_lookup", ("--page", NOBODY)),
    ("measure_demo", ("--page", NOBODY)),
    ("measure_quantization", ("--page", NOBODY)),
    ("random_checkpoint", (NOBODY,)),
    ("random_checkpoint", ("/nowhere", "--tokenizer", NOBODY)),
    ("make_eval_rows", (NOBODY, "--task", "json-mode")),
    ("train_demo", (NOBODY,)),
]


@pytest.mark.parametrize(("script", "arguments"), PATHS, ids=str)
def test_the_home_of_nobody_is_one_line(script, arguments, run_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_here(script, *arguments)
    assert code in (1, 2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert NOBODY in err
    assert "write the path without ~" in err
    assert not list(tmp_path.iterdir())


def test_a_home_is_found_in_every_path(run_here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ("~/rows.jsonl", "--task", "json-mode", "--rows", 1)
    code, _, err = run_here("make_eval_rows", *arguments)
    assert (code, err) == (0, f"wrote 1 rows to {tmp_path}/rows.jsonl\n")
    assert len(evaluation_rows.read_rows("~/rows.jsonl", "json-mode", None)) == 1
    code, _, err = run_here("make_eval_rows", *arguments)
    assert (code, "is there already" in err) == (1, True)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_equal_on_every_console(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="replace"))
    console.show_json({"a": "naïve 日本"})
    assert json.loads(written.getvalue().decode(encoding)) == {"a": "naïve 日本"}


# 4. A disk without room.

FULL_DISK = [
    ("look_inside", ("demo", "hi there", "-o", "page.html"), "page.html"),
    ("make_eval_rows", ("rows.jsonl", "--task", "json-mode", "--rows", 60), "rows.jsonl"),
    ("export_gguf", (small.DATA / "small", "small.gguf"), "small.gguf"),
    ("random_checkpoint", ("new", "--tokenizer", small.DATA / "small/tokenizer.model"), "new"),
]


@pytest.mark.parametrize(("script", "arguments", "output"), FULL_DISK, ids=lambda value: value)
def test_a_full_disk_is_one_line_and_what_was_there_stays(
    script, arguments, output, run_here, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.html"
    page.write_text(f"{look_inside.OURS} earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        code, _, err = run_here(script, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    assert err.splitlines()[-1].startswith(f"error: cannot write {output}: the file is too large")
    assert list(tmp_path.iterdir()) == [page]
    assert page.read_text().endswith(" earlier")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_compiling_is_one_line_on_a_terminal_and_two_in_a_log(is_terminal, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    for done in range(6):
        console.compiling(done, 5, "step")
    lines = [f"compiled {done} of 5" for done in range(6)]
    expected = "\r" + "\r".join(lines) + "\n" if is_terminal else f"{lines[2]}\n{lines[5]}\n"
    assert stream.getvalue() == expected

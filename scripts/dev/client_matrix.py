"""Run the clients that people use against scripts/serve.py: text, a tool, JSON; whole, streamed.

Their packages are installed into environments in FOLDER, the first time. Results are kept there,
too: --page writes docs/reference/clients.md from those of all runs.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
from random_checkpoint import write_random_checkpoint

from mistral.files import append_line, write_text

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = Path(__file__).resolve().parent / "clients"
PAGE = ROOT / "docs/reference/clients.md"
FORMS = ("text", "text streamed", "tool", "tool streamed", "json", "json streamed")
# Environments of Python -> the clients in them, by the names of their files
PYTHON = {
    "python": "openai,anthropic,litellm,langchain,pydantic_ai,agents,smolagents,mcp",
    "python-openai-2": "instructor,llama_index",
}
REQUIREMENTS = {
    "python": "requirements.txt",
    "python-openai-2": "requirements-openai-2.txt",
}
STRUCTURED = (
    "instructor TOOLS",
    "instructor JSON_SCHEMA",
    "pydantic-ai chat, output_type",
    "pydantic-ai chat, NativeOutput",
    "langchain with_structured_output, json_schema",
    "langchain with_structured_output, function_calling",
    "ai-sdk generateObject, streamObject (js)",
)
CALLS = [["miles", {"kilometers": 42}]]
RESULT = "26.098"
JOBS = {"baker", "doctor", "pilot", "teacher"}
HOBBIES = {"chess", "hiking", "music"}
_LENGTH = re.compile(r"length|max_tokens|max_output_tokens|token limit|Unfinished", re.IGNORECASE)
INTRODUCTION = """# The clients that were run

`scripts/dev/client_matrix.py` runs each of these clients against `scripts/serve.py`, and wrote this page from what they
received; `.ci/clients` runs six of them as a job. They are given the address, a key of any text, and the name of the
model; ai-sdk is also told that the server knows schemas (`supportsStructuredOutputs`).

- **text**: a question; the answer must be the one that every other client receives, at temperature 0.
- **tool**: a question that needs a tool. The client hands it out, receives the call, calls the function, sends the
  result back and receives the answer: the call must be `miles(kilometers=42)`, and the answer must have its result.
  (smolagents sends results as the user's text, a form that the demo has not learned: there only the call counts.)
- **json**: an object that follows a schema, through the client's own way to ask for one. It must be valid. (In a stream
  instructor does not tell that an answer was cut off by its number of tokens: its object then lacks properties.)

Each of them whole, and in a stream. "-" means that the client has no such way, or that it is in another row. The usage
must arrive in all of them where the client can ask for it.
"""
STRUCTURE_TEXT = """## Structured output

The same object through the ways that clients have to ask for one, many times, at temperature 1 and with different
prompts. **valid**: the client returned an object, and it follows the schema. **length**: the client said that the answer
was cut off, by the {most} tokens that it could have. Anything else would be counted as **other**.
"""


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, "python scripts/dev/client_matrix.py build/clients --page")
    parser.add_argument("folder", type=common.path, help="of the environments and the results")
    parser.add_argument("--model", default="demo", help="demo (default), smollm2, random, ...")
    parser.add_argument("--structured", type=int, metavar="N", help="only JSON: N times each way")
    parser.add_argument(
        "--client",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="only clients with one of these in their names",
    )
    parser.add_argument(
        "--check", action="store_true", help="end with 1 unless every run is as it must be"
    )
    parser.add_argument("--page", action="store_true", help="write docs/reference/clients.md")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended, too
    install(args.folder)
    results = args.folder / "results"
    results.mkdir(exist_ok=True)
    stage = "matrix" if args.structured is None else "structured"
    file = results / f"{stage}-{args.model}.jsonl"
    with served(model_of(args), file.with_suffix(".log")) as address:
        for environment in (*PYTHON, "javascript"):
            run_clients(args, environment, address, file)
    found = read(file)
    common.show_text(matrix(found) if args.structured is None else structures({args.model: found}))
    for run in found:
        if verdict(run) not in ("yes", "valid"):
            common.note(f"{run['client']}, {run['form']}: {verdict(run)}: {shown(run)}")
    if args.page:
        write_text(PAGE, page(args.folder))
    verdicts = [*cells(found).values(), *map(verdict, found)]
    return int(args.check and not {"yes", "valid", "length"}.issuperset(verdicts))


def read(file: Path) -> list[dict[str, Any]]:
    """The runs in a file of results; of two runs of one case, the later one."""
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    last = {(run["client"], run["form"], run["n"]): run for run in runs}
    return list(last.values())


# --- environments and processes


def install(folder: Path) -> None:
    """Make the environments that are not there yet."""
    for name, requirements in REQUIREMENTS.items():
        if not (folder / name).exists():
            subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
            pip = [folder / name / "bin/python", "-m", "pip", "install", "-q"]
            subprocess.run([*pip, "-r", CLIENTS / "python" / requirements], check=True)
    javascript = folder / "javascript"
    javascript.mkdir(parents=True, exist_ok=True)
    for source in (CLIENTS / "javascript").iterdir():
        write_text(javascript / source.name, source.read_text())
    if not (javascript / "node_modules").exists():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=javascript, check=True)


def model_of(args: argparse.Namespace) -> str:
    """The model that the server loads; "random" is written first."""
    if args.model != "random":
        return args.model
    folder = args.folder / "random"
    if not folder.exists():
        write_random_checkpoint(folder, window=1024)
    return str(folder)


@contextmanager
def served(model: str, log: Path) -> Iterator[str]:
    """The address of a server that has loaded the model; what it says is in `log`."""
    command = [sys.executable, ROOT / "scripts/serve.py", model, "--port", "0", "--slots", "4"]
    command += ["--packed"] * (model == "smollm2")  # a step reads a sixth of the bytes
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    write_text(log, "")
    said = os.open(log, os.O_WRONLY | os.O_APPEND)
    process = subprocess.Popen(command, stderr=said, env=environment)
    os.close(said)
    try:
        while "ready after" not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(f"the server has ended: {log.read_text()}")
            time.sleep(0.1)
        yield re.search(r"serving at (http:\S+)", log.read_text())[1]
    finally:
        process.terminate()
        process.wait()


def run_clients(args: argparse.Namespace, environment: str, address: str, file: Path) -> None:
    """Run an environment's clients, and append the results to a file as they come."""
    program = program_of(args.folder, environment, address)
    jobs = []
    for client, form in json.loads(list(output(program, "list"))[-1]):
        if not any(name in client for name in args.client):
            continue
        if args.structured is None:
            jobs.append([client, form, 1, 1])
        elif client in STRUCTURED and form == "json":
            jobs.append([client, form, args.structured, 4])
    if not jobs:
        return
    for line in output(program, json.dumps(jobs)):
        if line[:1] == "{":
            append_line(file, line.rstrip().encode())


def program_of(folder: Path, environment: str, address: str) -> list[str]:
    """The command that runs an environment's clients, without its last argument."""
    if environment == "javascript":
        return ["node", str(folder / "javascript/runs.mjs"), address, "model"]
    python = str(folder / environment / "bin/python")
    return [python, str(CLIENTS / "python/runs.py"), address, "model", PYTHON[environment]]


def output(program: list[str], jobs: str) -> Iterator[str]:
    """The lines that a program of clients prints. RuntimeError if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OPENAI_API_KEY": "x"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([*program, jobs], env=environment, **pipes) as process:
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{' '.join(program)} ended with {process.returncode}")


# --- verdicts


def verdict(run: dict[str, Any]) -> str:
    """What came of a run: yes; valid, length or other for JSON; or no."""
    is_json = run["form"].startswith("json")
    if "error" in run:
        if not is_json:
            return "no"
        return "length" if _LENGTH.search(run["error"]) else "other"
    if is_json:
        has_limits = not run["client"].startswith("anthropic")  # see with_anthropic.py
        return "valid" if is_person(run["json"], has_limits) else "other"
    if run["form"].startswith("tool"):
        has_result = run["text"] is None or RESULT in run["text"]  # None: see with_smolagents.py
        return "yes" if run["calls"] == CALLS and has_result else "no"
    return "yes" if run["text"] and not run["calls"] else "no"


def is_person(value: Any, has_limits: bool) -> bool:
    """Whether a value follows the schema that the clients send."""
    if not isinstance(value, dict) or value.keys() != {"name", "age", "job", "hobbies"}:
        return False
    name, age, hobbies = value["name"], value["age"], value["hobbies"]
    if not isinstance(name, str) or value["job"] not in JOBS or not set(hobbies) <= HOBBIES:
        return False
    is_whole = isinstance(age, (int, float)) and age == int(age)
    too_much = len(name) > 16 or len(hobbies) > 3 or not 0 <= age <= 130
    return is_whole and not (has_limits and too_much)


def shown(run: dict[str, Any]) -> str:
    """What a client returned or raised, in one line."""
    rest = {key: run[key] for key in ("error", "text", "calls", "json") if key in run}
    return " ".join(json.dumps(rest, ensure_ascii=False).split())[:500]


# --- tables


def cells(runs: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """The verdict of each client and form. A text must be the one that most clients receive."""
    found = {(run["client"], run["form"]): verdict(run) for run in runs}
    texts = [run["text"] for run in runs if run["form"].startswith("text") and "text" in run]
    for run in runs:
        if run["form"].startswith("text") and run.get("text") != max(texts, key=texts.count):
            found[run["client"], run["form"]] = "no"
    return found


def matrix(runs: list[dict[str, Any]]) -> str:
    """A row a client, a column a form."""
    clients = list(dict.fromkeys(run["client"] for run in runs))
    found = cells(runs)
    rows = ["| client | " + " | ".join(FORMS) + " |", "|---|" + "---|" * len(FORMS)]
    for client in clients:
        row = [found.get((client, form), "-") for form in FORMS]
        rows.append(f"| {client} | " + " | ".join(row) + " |")
    return "\n".join(rows) + "\n"


def structures(runs_of: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each model and way: how many answers were valid, cut off, or something else."""
    rows = ["| model | client | runs | valid | length | other |", "|---|---|---|---|---|---|"]
    for model, runs in runs_of.items():
        for client in dict.fromkeys(run["client"] for run in runs):
            verdicts = [verdict(run) for run in runs if run["client"] == client]
            counts = [str(verdicts.count(kind)) for kind in ("valid", "length", "other")]
            rows.append(f"| {model} | {client} | {len(verdicts)} | " + " | ".join(counts) + " |")
    return "\n".join(rows) + "\n"


def page(folder: Path) -> str:
    """The page, of the results that are in the folder."""
    results = folder / "results"
    parts = [INTRODUCTION]
    for file in sorted(results.glob("matrix-*.jsonl")):
        name = file.stem.partition("-")[2]
        parts.append(f"## With {name}\n\n{matrix(read(file))}")
    files = sorted(results.glob("structured-*.jsonl"))
    if files:
        runs = {file.stem.partition("-")[2]: read(file) for file in files}
        parts.append(f"{STRUCTURE_TEXT.format(most=200)}\n{structures(runs)}")
    parts.append(f"## Versions\n\n{versions(folder)}")
    return "\n".join(parts)


def versions(folder: Path) -> str:
    """A row a package: those that were asked for by name."""
    rows = ["| package | version | of |", "|---|---|---|"]
    for name, requirements in REQUIREMENTS.items():
        lines = (CLIENTS / "python" / requirements).read_text().splitlines()
        wanted = {re.split(r"[=\[]", line)[0] for line in lines if line[:1] != "#"}
        path = [str(next((folder / name).glob("lib/python*/site-packages")))]
        for found in sorted(distributions(path=path), key=lambda one: one.name.lower()):
            if found.name.lower() in wanted:
                rows.append(f"| {found.name} | {found.version} | PyPI |")
    packages = json.loads((CLIENTS / "javascript/package.json").read_text())["dependencies"]
    for name in packages:
        installed = folder / "javascript/node_modules" / name / "package.json"
        rows.append(f"| {name} | {json.loads(installed.read_text())['version']} | npm |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    common.run(main)

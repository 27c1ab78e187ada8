"""The Berkeley function-calling suite, version 4: its rows, and scores by its own checker.

The wheel bfcl-eval has both. It installs 40 packages for the clients of other models, of which
neither needs any: `pip install --no-deps --target FOLDER bfcl-eval`. Source:
https://github.com/ShishirPatil/gorilla/tree/main/berkeley-function-call-leaderboard
"""

import importlib
import importlib.util
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from mistral.chat.events import Call
from mistral.chat.tools.json_schema import compile_schema, problem
from mistral.engine.base import Engine
from mistral.errors import one_line
from mistral.evaluation.rows import DataError
from mistral.evaluation.verdict import Verdict, summary
from mistral.sampling import Sampling
from mistral.server.choice import Choice
from mistral.server.jobs import Jobs
from mistral.server.protocol.errors import ApiError
from mistral.server.protocol.task import ChatTask
from mistral.server.slots import Slots
from mistral.tokenizer import Tokenizer

CATEGORIES = ("simple_python", "multiple", "parallel", "irrelevance")
# A name for us in the suite's table of models: functions have no dots in their names
_UNDERSCORES = "underscores"
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


@dataclass(frozen=True, kw_only=True)
class BfclRow:
    """One question.

    functions  in the suite's form, for its checker
    tools      the same in OpenAI's form, with JSON schema's types and without dots in names
    expected   the calls with the values that are right; empty: no function is relevant
    """

    id: str
    category: str
    messages: list[dict[str, str]]
    functions: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    expected: list[dict[str, Any]]


# A row and calls, {name: arguments} each, to {"valid": ..., "error": ..., "error_type": ...}
Checker = Callable[[BfclRow, list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BfclAnswer:
    """What a model answered.

    refusal  why it was not asked, or could not answer; None: it answered
    was_cut  whether max_new_tokens ended the answer
    """

    calls: Sequence[Call] = ()
    text: str = ""
    was_cut: bool = False
    refusal: str | None = None


def open_suite(folder: Path | None = None) -> Path:
    """The folder of the suite's data; its package can be imported from now on.

    folder  that has the package bfcl_eval in it; None: where Python finds it

    Raises DataError if it does not exist.
    """
    if folder is not None:
        sys.path.insert(0, str(folder))
    found = importlib.util.find_spec("bfcl_eval")
    if found is None or found.origin is None:
        where = "Python" if folder is None else folder
        raise DataError(
            f"{where} has no bfcl_eval: pip install --no-deps --target FOLDER bfcl-eval, and name "
            "FOLDER"
        )
    return Path(found.origin).parent / "data"


def read_suite(data: Path, category: str, limit: int | None = None) -> list[BfclRow]:
    """The rows of a category, `limit` of them from the first. Raises DataError."""
    rows = _lines(data / f"BFCL_v4_{category}.json")[:limit]
    expected = {}
    if category != "irrelevance":
        answers = _lines(data / "possible_answer" / f"BFCL_v4_{category}.json")
        expected = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [
        BfclRow(
            id=row["id"],
            category=category,
            messages=row["question"][0],
            functions=row["function"],
            tools=[_tool(function) for function in row["function"]],
            expected=expected.get(row["id"], []),
        )
        for row in rows
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(str(error))}") from None


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function in OpenAI's form, as the suite itself gives it to OpenAI's models."""
    name = re.sub(r"\.", "_", function["name"])
    fields = {**function, "name": name, "parameters": _schema(function["parameters"])}
    return {"type": "function", "function": fields}


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema's types for Python's, on all levels."""
    known = dict(schema)
    if isinstance(known.get("type"), str):
        known["type"] = _TYPES.get(known["type"], known["type"])
    if "properties" in known:
        known["properties"] = {name: _schema(part) for name, part in known["properties"].items()}
    if "items" in known:
        known["items"] = _schema(known["items"])
    return known


def load_checker() -> Checker:
    """The suite's own checker, after `open_suite`."""
    # Its module of models imports the clients of 20 companies; the checker reads one flag of it.
    models = ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {_UNDERSCORES: SimpleNamespace(underscore_to_dot=True)}
    with mock.patch.dict(sys.modules, {models.__name__: models}):
        suite = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")

    def check(row: BfclRow, calls: list[dict[str, Any]]) -> dict[str, Any]:
        language = suite.Language.PYTHON
        expected = row.expected
        return suite.ast_checker(
            row.functions, calls, expected, language, row.category, _UNDERSCORES
        )

    return check


def ask(
    engine: Engine,
    tokenizer: Tokenizer,
    rows: Sequence[BfclRow],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int = 512,
) -> Iterator[tuple[BfclRow, BfclAnswer]]:
    """Ask a model all rows, as the endpoints of the server would; the order may change.

    engine  of as many rows as are to be answered at the same time, empty
    """
    jobs = Jobs(engine, tokenizer)
    slots = Slots(engine)
    waiting = deque(enumerate(rows))
    running: list[tuple[BfclRow, Choice]] = []
    while waiting or running:
        while waiting and len(running) < engine.batch_size:
            number, row = waiting.popleft()
            task = ChatTask(
                messages=row.messages,
                tools=row.tools,
                sampling=Sampling(temperature=temperature, seed=seed + number),
                max_new_tokens=max_new_tokens,
            )
            try:
                [choice] = jobs.choices(task)
            except ApiError as error:
                yield row, BfclAnswer(refusal=str(error))
                continue
            choice.run = slots.submit(choice.request)
            running.append((row, choice))
        slots.turn()
        for row, choice in running:
            choice.feed(choice.run.take())
            if choice.is_complete:
                slots.cancel(choice.run)
            if choice.run.state == "ended":
                yield row, _end(choice)
        running = [(row, choice) for row, choice in running if choice.run.state != "ended"]


def _end(choice: Choice) -> BfclAnswer:
    try:
        choice.end()
    except ApiError as error:
        return BfclAnswer(refusal=str(error))
    return BfclAnswer(calls=choice.calls, text=choice.text, was_cut=choice.finish == "length")


def judge(row: BfclRow, answer: BfclAnswer, checker: Checker) -> Verdict:
    """The suite's verdict; its reasons are the checker's `error_type`."""
    if answer.refusal is not None:
        return Verdict("not answered", answer.refusal)
    if row.category == "irrelevance":
        return Verdict("irrelevance_error:decoder_success" if answer.calls else "passed")
    if not answer.calls:
        return Verdict("cut off" if answer.was_cut else "no call", answer.text)
    calls = [{call.name: call.arguments} for call in answer.calls]
    found = checker(row, calls)
    if found["valid"]:
        return Verdict("passed")
    return Verdict(found["error_type"], one_line(str(found["error"])))


def format_problems(row: BfclRow, answer: BfclAnswer) -> list[str]:
    """What is wrong with the calls by their form: unknown functions, arguments against a schema."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools}
    problems = []
    for call in answer.calls:
        if call.name not in schemas:
            problems.append(f"{row.id}: there is no function {call.name}")
        elif wrong := problem(compile_schema(schemas[call.name]), call.arguments):
            problems.append(f"{row.id}: {call.name}: {wrong}")
    return problems


def bfcl_summary(
    scored: Sequence[tuple[BfclRow, BfclAnswer, Verdict]],
) -> dict[str, dict[str, Any]]:
    """For each category: `verdict.summary`, how many calls there were, and the invalid ones."""
    found = {}
    for category in Counter(row.category for row, _, _ in scored):
        mine = [each for each in scored if each[0].category == category]
        invalid = [text for row, answer, _ in mine for text in format_problems(row, answer)]
        found[category] = summary([verdict for _, _, verdict in mine]) | {
            "calls": sum(len(answer.calls) for _, answer, _ in mine),
            "cut": sum(answer.was_cut for _, answer, _ in mine),
            "invalid_calls": invalid,
        }
    return found

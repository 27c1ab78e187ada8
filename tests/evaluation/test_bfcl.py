"""The Berkeley suite, on a package of the same form with rows and a checker of our own."""

import json
import subprocess
import sys
from functools import partial

import pytest
import small
from starlette.testclient import TestClient

import mistral
from mistral.chat.events import Call
from mistral.engine.decoder import Decoder
from mistral.evaluation import bfcl, bfcl_server
from mistral.evaluation.bfcl import BfclAnswer
from mistral.evaluation.rows import DataError
from mistral.server import create_app

AREA = {
    "name": "geometry.area",
    "description": "Area of a circle.",
    "parameters": {
        "type": "dict",
        "properties": {
            "radius": {"type": "float"},
            "sizes": {"type": "tuple", "items": {"type": "dict", "properties": {}}},
            "unit": {"type": "any"},
        },
        "required": ["radius"],
    },
}
# The real one compares values; both get the names with underscores, and our calls as dicts.
CHECKER = """
from bfcl_eval.constants.enums import Language
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING

def ast_checker(functions, calls, expected, language, category, model):
    assert MODEL_CONFIG_MAPPING[model].underscore_to_dot and language is Language.PYTHON
    right = [{functions[0]["name"].replace(".", "_"): answer} for answer in expected]
    valid = calls == right
    return {"valid": valid, "error": ["other calls"], "error_type": "value_error:others"}
"""
ENUMS = "from enum import Enum\nclass Language(Enum):\n    PYTHON = 'python'\n"


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """A folder with a package bfcl_eval that has two rows of each category."""
    folder = tmp_path_factory.mktemp("suite")
    package = folder / "bfcl_eval"
    for path, text in {
        "__init__.py": "",
        "constants/__init__.py": "",
        "constants/enums.py": ENUMS,
        "constants/model_config.py": "import a_client_of_another_model",
        "eval_checker/__init__.py": "",
        "eval_checker/ast_eval/__init__.py": "",
        "eval_checker/ast_eval/ast_checker.py": CHECKER,
    }.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    (package / "data" / "possible_answer").mkdir(parents=True)
    for category in bfcl.CATEGORIES:
        rows = []
        answers = []
        for n in range(2):
            question = [[{"role": "user", "content": f"The area of a circle of {n}?"}]]
            rows.append({"id": f"{category}_{n}", "question": question, "function": [AREA]})
            answers.append({"id": f"{category}_{n}", "ground_truth": [{"radius": n}]})
        name = f"BFCL_v4_{category}.json"
        (package / "data" / name).write_text("\n".join(map(json.dumps, rows)))
        if category != "irrelevance":
            text = "\n".join(map(json.dumps, answers))
            (package / "data" / "possible_answer" / name).write_text(text)
    return folder


@pytest.fixture
def opened(suite, monkeypatch):
    """(the suite's data, its checker), importable until the test ends."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    data = bfcl.open_suite(suite)
    yield data, bfcl.load_checker()
    for name in {*sys.modules} - before:
        if name.startswith("bfcl_eval"):
            del sys.modules[name]


def test_rows_have_the_types_of_json_schema(opened):
    rows = bfcl.read_suite(opened[0], "simple_python", 1)
    (row,) = rows
    assert row.expected == [{"radius": 0}] and row.functions == [AREA]
    function = row.tools[0]["function"]
    assert function["name"] == "geometry_area"
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "radius": {"type": "number"},
            "sizes": {"type": "array", "items": {"type": "object", "properties": {}}},
            "unit": {"type": "string"},
        },
        "required": ["radius"],
    }
    assert AREA["parameters"]["type"] == "dict"


def test_answers_are_scored_by_the_suites_checker(opened):
    data, checker = opened
    row = bfcl.read_suite(data, "simple_python")[1]
    irrelevant = bfcl.read_suite(data, "irrelevance")[0]
    right = BfclAnswer(calls=[Call("geometry_area", {"radius": 1})])
    wrong = BfclAnswer(calls=[Call("geometry_area", {"radius": 2})])
    for asked, answer, reason in (
        (row, right, "passed"),
        (row, wrong, "value_error:others"),
        (row, BfclAnswer(text="I do not know."), "no call"),
        (row, BfclAnswer(text="<tool_call>", was_cut=True), "cut off"),
        (row, BfclAnswer(refusal="too long"), "not answered"),
        (irrelevant, BfclAnswer(text="No."), "passed"),
        (irrelevant, right, "irrelevance_error:decoder_success"),
    ):
        assert bfcl.judge(asked, answer, checker).reason == reason


def test_calls_of_a_wrong_form_are_found(opened):
    row = bfcl.read_suite(opened[0], "multiple")[0]
    for arguments in ({}, {"radius": "one"}):
        answer = BfclAnswer(calls=[Call("geometry_area", arguments)])
        assert len(bfcl.format_problems(row, answer)) == 1
    assert bfcl.format_problems(row, BfclAnswer(calls=[Call("g", {})]))
    assert not bfcl.format_problems(row, BfclAnswer(calls=[Call("geometry_area", {"radius": 1})]))


def test_a_model_is_asked_each_row_once(opened):
    data, checker = opened
    model, tokenizer = mistral.load("demo", device="cpu")
    rows = [row for category in bfcl.CATEGORIES for row in bfcl.read_suite(data, category, 1)]
    engine = Decoder(model, 3, slack=32)
    asked = list(bfcl.ask(engine, tokenizer, rows))
    assert sorted(row.id for row, _ in asked) == sorted(row.id for row in rows)
    scored = [(row, answer, bfcl.judge(row, answer, checker)) for row, answer in asked]
    found = bfcl.bfcl_summary(scored)
    assert {*found} == {*bfcl.CATEGORIES}
    assert all(result["n"] == 1 and not result["invalid_calls"] for result in found.values())


def test_a_server_is_asked_what_a_model_is_asked(opened):
    data, checker = opened
    model, tokenizer = mistral.load("demo", device="cpu")
    rows = [row for category in bfcl.CATEGORIES for row in bfcl.read_suite(data, category, 2)]
    asked = bfcl.ask(Decoder(model, 2, slack=32), tokenizer, rows)
    expected = {row.id: answer for row, answer in asked}
    with TestClient(create_app(model, tokenizer, slots=2)) as client:

        def post(path, body):
            response = client.post(path, json=body)
            return response.status_code, response.json()

        asked = list(bfcl_server.ask_server(post, rows, at_once=2))
    assert [row for row, _ in asked] == rows
    for row, answer in asked:
        same = [(call.name, call.arguments) for call in expected[row.id].calls]
        assert [(call.name, call.arguments) for call in answer.calls] == same
        assert (answer.text, answer.was_cut) == (expected[row.id].text, expected[row.id].was_cut)
        assert not bfcl.format_problems(row, answer)


@pytest.mark.parametrize(
    ("status", "reply", "found"),
    [
        (400, {"error": {"message": "too long"}}, "too long"),
        (500, "invalid_answer", "invalid_answer"),
        (401, "no key", DataError),
        (200, {"choices": []}, DataError),
        (200, "text", DataError),
        (200, {"choices": [{"finish_reason": "stop", "message": {"content": "No."}}]}, None),
    ],
)
def test_replies_of_other_forms_are_told_apart(opened, status, reply, found):
    rows = bfcl.read_suite(opened[0], "multiple", 1)
    asked = bfcl_server.ask_server(lambda path, body: (status, reply), rows)
    if found is DataError:
        with pytest.raises(DataError):
            list(asked)
        return
    ((_, answer),) = asked
    if found is None:
        assert (answer.text, answer.refusal) == ("No.", None)
    else:
        assert found in answer.refusal


def reply_with(reply, path, body):
    return 200, reply


@pytest.mark.parametrize(("reason", "was_cut"), [("length", True), ("stop", False)])
def test_an_answer_that_was_cut_says_so(opened, reason, was_cut):
    rows = bfcl.read_suite(opened[0], "multiple", 1)
    reply = {"choices": [{"finish_reason": reason, "message": {"content": "No."}}]}
    ((_, answer),) = bfcl_server.ask_server(partial(reply_with, reply), rows)
    assert (answer.text, answer.was_cut) == ("No.", was_cut)


def test_arguments_that_are_not_an_object_are_an_invalid_call(opened):
    rows = bfcl.read_suite(opened[0], "multiple", 1)
    for written, kept in (('["a"]', ["a"]), ("{", "{"), ("{'radius': 1}", "{'radius': 1}")):
        call = {"function": {"name": "geometry_area", "arguments": written}}
        message = {"tool_calls": [call]}
        reply = {"choices": [{"finish_reason": "tool_calls", "message": message}]}
        ((row, answer),) = bfcl_server.ask_server(partial(reply_with, reply), rows)
        assert answer.calls == [Call("geometry_area", kept)]
        assert len(bfcl.format_problems(row, answer)) == 1
        assert not bfcl.judge(row, answer, opened[1]).passed


def test_a_server_that_is_not_there_is_an_error(opened):
    rows = bfcl.read_suite(opened[0], "multiple", 1)
    with pytest.raises(DataError, match="cannot be asked"):
        list(bfcl_server.ask_server(bfcl_server.post_to("http://127.0.0.1:1"), rows))


def test_a_folder_without_the_suite_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(DataError, match="pip install --no-deps --target"):
        bfcl.open_suite(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        bfcl.read_suite(tmp_path, "multiple")


@pytest.mark.slow
def test_the_script_reports_the_suite(suite):
    command = [sys.executable, "scripts/evaluate.py", "bfcl", "--data", str(suite)]
    done = subprocess.run(
        [*command, "--limit", "1", "--max-new-tokens", "16"],
        cwd=small.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert all(result[category]["n"] == 1 for category in bfcl.CATEGORIES)

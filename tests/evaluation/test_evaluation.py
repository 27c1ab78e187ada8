"""The rules of the evaluation with a scripted model, rows, and runs that are interrupted."""

import json
import runpy
import sys
import warnings
from types import SimpleNamespace
from xml.etree.ElementTree import ParseError

import pytest
import small

import mistral
import mistral.evaluation.run as run_module
from mistral.evaluation import fixed_rules, paper_rules
from mistral.evaluation.rows import DataError, Row, read_rows
from mistral.evaluation.run import Answers, ModelAnswers, evaluate
from mistral.evaluation.verdict import REASONS, Verdict, summary, wilson

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "default": 1},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "level": {"type": "integer", "enum": [1, 2]},
                "rain": {"type": "boolean"},
                "either": {"type": ["string", "integer"]},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


def call(name="weather", **arguments):
    return {"name": name, "arguments": arguments}


def written(*calls):
    return "\n".join(f"<tool_call>\n{json.dumps(one)}\n</tool_call>" for one in calls)


def calls_row(*expected, tools=(WEATHER, CLOCK), prompt="Hi"):
    return Row(0, "here", [{"role": "user", "content": prompt}], list(expected), list(tools), {})


CHECKPOINT = small.DATA / "small"
PARIS = call(city="Paris")
ROME = call(city="Rome")


# The paper's parser, case by case as measured


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": null}}\n</tool_call>', [call("f", a=None)]),
        (
            "<tool_call>{'name': 'f', 'arguments': {'a': None, 'b': True,}}</tool_call>",
            [call("f", a=None, b=True)],
        ),
        ('Let me see. <tool_call>{"a": 1}</tool_call>', [{"a": 1}]),
        ('<tool_call>{"a": 1}</tool_call><tool_call>{"b": 2}</tool_call>', [{"a": 1}, {"b": 2}]),
        ('<tool_call>{"a": "R&D"}</tool_call>', ParseError),
        ('<tool_call>{"a": "1 < 2"}</tool_call>', ParseError),
        ('Q & A <tool_call>{"a": 1}</tool_call>', ParseError),
        ('if a < b: <tool_call>{"a": 1}</tool_call>', ParseError),
        ('<tool_call>{"a": "one<br>two"}</tool_call>', ParseError),
        ('<tool_call>{"a": "<b>one</b>"}</tool_call>', []),
        ('<tool_call>{"a": "R&amp;D"}</tool_call>', [{"a": "R&D"}]),
        ('<tool_call>{"a": "</tool_call>"}</tool_call>', ParseError),
        ('<tool_call>{"a": 1}', ParseError),
        ("<tool_call>{'a': 'it's'}</tool_call>", []),
        ("<tool_call>{'a': null}</tool_call>", []),
        ("<tool_call>{'a': true}</tool_call>", []),
        ('<tool_call>{"a": 1} {"b": 2}</tool_call>', []),
        ('<tool_call>{"a": "one\ntwo"}</tool_call>', []),
        ('<tool_call>[{"a": 1}]</tool_call>', [[{"a": 1}]]),
        ('<tool_call>{"a": 1}</tool_call><tool_call>{"b": </tool_call>', [{"a": 1}]),
        ("<tool_call> </tool_call>", []),
        ("<tool_call></tool_call>", paper_rules.CRASHES),
        ('<tool_call>{"a": 1}</tool_call><tool_call/>', [{"a": 1}, {"a": 1}]),
        ('<x><tool_call>{"a": 1}</tool_call></x>', [{"a": 1}]),
        ('{"a": 1}', []),
        ("", []),
    ],
)
def test_the_papers_parser_reads_and_fails_as_it_did(text, found):
    if isinstance(found, list):
        assert paper_rules.tool_calls(text) == found
    else:
        with pytest.raises(found):
            paper_rules.tool_calls(text)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"city": "Paris", "days": 3, "unit": "celsius", "rain": True}, None),
        ({}, "Missing required arguments: ['city']"),
        (
            {"city": "Paris", "days": "3"},
            "Type mismatch for parameter days. Expected: integer, Got: <class 'str'>",
        ),
        (
            {"city": "Paris", "days": 3.0},
            "Type mismatch for parameter days. Expected: integer, Got: <class 'float'>",
        ),
        ({"city": "Paris", "unit": "kelvin"}, "Invalid value 'kelvin' for parameter unit"),
        ({"city": "Paris", "either": "one"}, "unhashable type: 'list'"),
        ({"city": "Paris", "unknown": 1}, None),
        ({"city": 0, "days": ""}, None),
        ({"city": None}, None),
        ({"city": "Paris", "days": True}, None),
        ({"city": "Paris", "level": 7}, None),
    ],
)
def test_the_papers_validator_accepts_and_rejects_as_it_did(arguments, problem):
    verdict = paper_rules.check_call(call(**arguments), [CLOCK, WEATHER])
    assert (verdict is None) == (problem is None)
    if problem:
        assert verdict.reason == "schema failure"
        assert problem in verdict.detail


def test_the_papers_validator_knows_functions_by_the_first_signature_of_their_name():
    assert (
        paper_rules.check_call(call("g"), [WEATHER]).detail
        == "No matching function signature found for function: g"
    )
    assert paper_rules.check_call(call("g"), [WEATHER]).reason == "unknown function"
    stricter = {
        "type": "function",
        "function": {"name": "clock", "parameters": {"required": ["zone"]}},
    }
    assert paper_rules.check_call(call("clock"), [CLOCK, stricter]) is None
    assert paper_rules.check_call(call("clock"), [stricter, CLOCK]).reason == "schema failure"
    assert paper_rules.check_call({"name": "clock"}, [CLOCK]).reason == "schema failure"
    assert paper_rules.check_call({"name": 1, "arguments": {}}, [CLOCK]).reason == "schema failure"
    without_type = {"function": {"name": "f"}}
    assert paper_rules.check_call(call("clock"), [without_type, CLOCK]).reason == "schema failure"
    assert paper_rules.check_call(call("clock"), [CLOCK, without_type]) is None


def paper(answer, *expected, **row):
    return paper_rules.score_calls(calls_row(*expected, **row), answer).reason


def test_the_papers_rules_for_calls():
    assert paper(written(PARIS), PARIS) == "passed"
    assert paper("It rains.", PARIS) == "no call"
    assert paper("5 < 6 " + written(PARIS), PARIS) == "no call"
    assert paper(written(PARIS, PARIS), PARIS) == "wrong count"
    assert paper(written(PARIS), PARIS, call("clock")) == "wrong count"
    assert paper(written(call("sun")), PARIS) == "unknown function"
    assert paper(written(call(days=1)), PARIS) == "schema failure"
    assert paper(written(call("clock")), PARIS) == "wrong function"
    assert paper(written(ROME), PARIS) == "wrong argument"
    assert paper(written(call("clock"), PARIS), PARIS, call("clock")) == "passed"
    assert paper("It rains.") == "no call"  # a row without calls cannot be passed


def test_the_papers_rules_ignore_arguments_that_were_not_expected():
    assert paper(written(call(city="Paris", days=9, unknown=[1])), PARIS) == "passed"
    assert paper(written(PARIS), call(city="Paris", unit=None)) == "passed"
    assert paper(written(PARIS), call(city="Paris", unit="celsius")) == "wrong argument"
    assert paper(written(call(city="Paris", days=True)), call(city="Paris", days=1)) == "passed"


def test_the_papers_rules_compare_with_the_first_call_of_a_name_only():
    assert paper(written(PARIS, ROME), PARIS, ROME) == "wrong argument"
    assert paper(written(PARIS, [1]), PARIS, PARIS) == "passed"  # the second is not compared


@pytest.mark.parametrize(
    "answer",
    [
        written([PARIS]),
        written(1),
        "<tool_call></tool_call>",
        "<tool_call>{1: 2}</tool_call>",
        "<tool_call>{[]: 2}</tool_call>",
        "<tool_call>{'name': 'weather', 'arguments': {'city': 'Paris', 'extra': {1, "
        "2}}}</tool_call>",
        f"<tool_call>{'[' * 100_000}</tool_call>",
        f"<tool_call>{'1' * 5000}</tool_call>",
        "im_start\\" + written(PARIS),
    ],
)
def test_a_crash_of_the_papers_program_fails_the_row(answer):
    assert paper(answer, PARIS) == "crash"


def test_the_papers_rules_read_the_text_after_the_last_assistant():
    assert paper("1 < 2 > assistant " + written(PARIS), PARIS) == "passed"
    assert paper(written(PARIS) + " ->assistant", PARIS) == "no call"
    assert paper(written(PARIS), PARIS, prompt="What does ->assistant mean?") == "passed"
    assert paper(written(PARIS), PARIS, prompt="What does <\\b> mean?") == "crash"
    assert paper(f"\n{written(PARIS)}\n<|im_end|>", PARIS) == "passed"
    assert paper(written(PARIS) + "<|im_start|>", PARIS) == "no call"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "count": {}, "in": {}},
    "required": ["name"],
}
BOX = {"name": "box", "count": 1, "in": {"a": [1, 2], "b": None}}


def json_row(schema=SCHEMA, expected=BOX):
    return Row(0, "here", [{"role": "user", "content": "Hi"}], expected, [], schema)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (json.dumps(BOX), "passed"),
        (repr(BOX), "passed"),
        (f"\n {json.dumps(BOX)} <|im_end|>", "passed"),
        ('{"in": {"b": null, "a": [1.0, 2]}, "count": true, "name": "box"}', "passed"),
        ('{"in": {"b": null, "a": [2, 1]}, "count": 1, "name": "box"}', "wrong values"),
        ('{"name": "box", "count": 1}', "wrong keys"),
        (json.dumps(BOX | {"more": 1}), "wrong keys"),
        (json.dumps(BOX | {"name": 1}), "schema failure"),
        (json.dumps([BOX]), "wrong keys"),
        (json.dumps([BOX, {}]), "schema failure"),
        ("[]", "wrong keys"),
        (f"```json\n{json.dumps(BOX)}\n```", "not JSON"),
        (f"Here it is: {json.dumps(BOX)}", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5000, "not JSON"),
        ("{'name': {1, 2}}", "schema failure"),
        ('{"name": "<\\/b>"}', "crash"),
    ],
)
def test_the_papers_rules_for_json(answer, reason):
    assert paper_rules.score_json(json_row(), answer).reason == reason


def test_a_schema_that_is_malformed_or_elsewhere_fails_by_the_papers_rules():
    for schema in (
        {"type": 1},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"properties": {"name": {"$ref": "#/x"}}},
    ):
        assert paper_rules.score_json(json_row(schema), json.dumps(BOX)).reason == "schema failure"
        assert fixed_rules.score_json(json_row(schema), json.dumps(BOX)).passed
        assert fixed_rules.score_json(json_row(schema), "{}").reason == "wrong keys"


# The corrected rules


def fixed(answer, *expected, **row):
    return fixed_rules.score_calls(calls_row(*expected, **row), answer).reason


def test_the_fixed_rules_for_calls():
    assert fixed(written(PARIS), PARIS) == "passed"
    assert fixed("It rains.", PARIS) == "no call"
    assert fixed("<tool_call>{</tool_call>", PARIS) == "no call"
    assert fixed(written(PARIS, PARIS), PARIS) == "wrong count"
    assert fixed(written(PARIS) + "<tool_call>{</tool_call>", PARIS) == "wrong count"
    assert fixed(written(PARIS) + "<tool_call>{</tool_call>", PARIS, ROME) == "wrong count"
    assert fixed(written(call("sun")), PARIS) == "unknown function"
    assert fixed(written(call("clock")), PARIS) == "wrong function"
    assert fixed(written(ROME), PARIS) == "wrong argument"
    assert fixed("It rains.") == "passed"
    assert fixed(written(PARIS)) == "wrong count"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"city": 0},
        {"city": None},
        {"city": "Paris", "days": True},
        {"city": "Paris", "level": 7},
    ],
)
def test_the_fixed_rules_check_arguments_by_json_schema(arguments):
    assert fixed(written(call(**arguments)), PARIS) == "schema failure"


def test_the_fixed_rules_match_every_expected_call_once():
    assert fixed(written(ROME, PARIS), PARIS, ROME) == "passed"
    assert fixed(written(PARIS, PARIS), PARIS, ROME) == "wrong argument"
    assert fixed(written(PARIS, [1]), PARIS, PARIS) == "wrong count"
    assert fixed(written(call("clock"), ROME, PARIS), PARIS, call("clock"), ROME) == "passed"
    assert fixed(written(call("clock"), PARIS), PARIS, ROME) == "wrong function"


def test_the_fixed_rules_count_every_argument_that_changes_something():
    assert fixed(written(call(city="Paris", unit="celsius")), PARIS) == "wrong argument"
    assert fixed(written(call(city="Paris", unknown=1)), PARIS) == "wrong argument"
    assert fixed(written(call(city="Paris", days=1)), PARIS) == "passed"  # its default
    assert fixed(written(PARIS), call(city="Paris", days=1, unit=None)) == "passed"
    assert fixed(written(call(city="Paris", days=2.0)), call(city="Paris", days=2)) == "passed"
    assert (
        fixed(written(call(city="Paris", level=True)), call(city="Paris", level=1))
        == "schema failure"
    )
    assert (
        fixed(written(call(city="Paris", either="a")), call(city="Paris", either="a")) == "passed"
    )


def test_the_fixed_rules_read_answers_that_are_not_xml_or_cut_off():
    for city in ("R&D", "<br>", "</tool_call>", "it's"):
        assert fixed("5 < 6 & " + written(call(city=city)), call(city=city)) == "passed"
    assert fixed(written(PARIS).removesuffix("</tool_call>"), PARIS) == "passed"
    assert fixed("<tool_call>{'name': 'weather', 'arguments': {'city': 'Paris', 'rain': true}}", PARIS | {
        "arguments": {"city": "Paris", "rain": True}}) == "passed"  # fmt: skip


def test_the_right_call_passes_though_its_own_schema_is_malformed():
    nothing = {"type": "object", "properties": {"city": {"enum": []}}}
    for parameters in (
        None,
        {"type": 7},
        nothing,
        {"properties": [1], "required": True},
        {"properties": {"city": 1}},
    ):
        tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
        assert fixed(written(PARIS), PARIS, tools=[tool]) == "passed", parameters
        assert fixed(written(ROME), PARIS, tools=[tool]) in ("wrong argument", "schema failure")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (json.dumps(BOX), "passed"),
        (repr(BOX), "passed"),
        (f"```json\n{json.dumps(BOX)}\n```", "passed"),
        (f"```\n{json.dumps(BOX)}\n```\n", "passed"),
        ('{"in": {"b": null, "a": [1.0, 2]}, "count": 1, "name": "box"}', "passed"),
        ('{"in": {"b": None, "a": [1, 2]}, "count": true, "name": "box"}', "wrong values"),
        ('{"in": {"b": null, "a": [2, 1]}, "count": 1, "name": "box"}', "wrong values"),
        ('{"name": "box", "count": 1}', "wrong keys"),
        (json.dumps(BOX | {"name": 1}), "schema failure"),
        (json.dumps([BOX]), "schema failure"),
        (f"Here it is: {json.dumps(BOX)}", "not JSON"),
        (json.dumps(BOX) * 2, "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_the_fixed_rules_for_json(answer, reason):
    assert fixed_rules.score_json(json_row(), answer).reason == reason


# Numbers


@pytest.mark.parametrize(
    ("passed", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(passed, n, low, high):
    assert wilson(passed, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - passed, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_summary_counts_the_reasons():
    verdicts = [Verdict("passed"), Verdict("no call"), Verdict("no call"), Verdict("crash")]
    counted = summary(verdicts)
    assert (counted["n"], counted["passed"], counted["rate"]) == (4, 1, 0.25)
    assert counted["reasons"] == {"no call": 2, "crash": 1}
    assert counted["interval"] == wilson(1, 4)


# Rows


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TOOLS_TEXT = json.dumps([WEATHER,  CLOCK]).replace(", ", " ,  ")  # fmt: skip
CALLS = {
    "prompt": [{"content": "Hi", "role": "user"}],
    "completion": json.dumps(PARIS),
    "tools": TOOLS_TEXT,
    "system": "",
}
JSON = {"prompt": CALLS["prompt"], "completion": json.dumps(BOX), "schema": json.dumps(SCHEMA)}
# From the template of commit 1c9fcb5
PROMPT = (
    "You are a function calling AI model. You are provided with function signatures within "
    "<tools></tools> XML tags. "
    "You may call one or more functions to assist with the user query. Don't make assumptions "
    "about what values to "
    f"plug into functions. Here are the available tools: <tools> {TOOLS_TEXT} </tools> "
    "Use the following pydantic model json schema for each tool call you will make: "
    "{'properties': {'arguments': {'title': 'Arguments', 'type': 'object'}, "
    "'name': {'title': 'Name', 'type': 'string'}}, 'required': ['arguments', 'name'], 'title': "
    "'FunctionCall', "
    "'type': 'object'} For each function call return a json object with function name and "
    "arguments within "
    "<tool_call></tool_call> XML tags as follows:\n<tool_call>\n{'arguments': <args-dict>, 'name': "
    "<function-name>}\n"
    "</tool_call>"
)


def test_the_prompt_is_the_papers_with_the_rows_tools_as_they_are_written(tmp_path):
    file = write_rows(
        tmp_path / "rows.jsonl", CALLS, CALLS | {"completion": json.dumps([PARIS, ROME])}
    )
    rows = read_rows(str(file), "function-calling")
    assert rows[0].messages == [
        {"role": "system", "content": PROMPT},
        {"role": "user", "content": "Hi"},
    ]
    assert [row.expected for row in rows] == [[PARIS], [PARIS, ROME]]
    assert rows[1].tools == [WEATHER, CLOCK]
    assert (rows[1].index, rows[1].where) == (1, f"{file}, line 2")


def test_the_prompt_for_json_is_the_rows_own(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", JSON, JSON)
    [row] = read_rows(str(file), "json-mode", limit=1)
    assert row.messages == [{"role": "user", "content": "Hi"}]
    assert (row.expected, row.schema) == (BOX, SCHEMA)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": ', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("7", "has no 'prompt'"),
        (json.dumps(JSON), "has no 'tools', and function-calling needs it"),
        (json.dumps(CALLS | {"prompt": []}), "'prompt' is not a list of messages"),
        (
            json.dumps(CALLS | {"prompt": [{"role": "user"}]}),
            "needs a 'role' and a 'content' that are text",
        ),
        (
            json.dumps(CALLS | {"prompt": [{"role": "user", "content": "\ud800"}]}),
            "'content' that are text",
        ),
        (json.dumps(CALLS | {"tools": [WEATHER]}), "'tools' is not a string of JSON"),
        (json.dumps(CALLS | {"tools": "{}"}), "'tools' are not a list"),
        (json.dumps(CALLS | {"tools": '[{"name": "f"}]'}), "one of its 'tools' is not of the form"),
        (json.dumps(CALLS | {"completion": "none"}), "'completion' is not valid JSON"),
        (json.dumps(CALLS | {"completion": '[{"name": "f"}]'}), "'completion' is not a call"),
    ],
)
def test_a_malformed_row_is_one_clear_error_with_file_and_line(tmp_path, line, problem):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(CALLS)}\n\n{line}\n")
    with pytest.raises(DataError) as error:
        read_rows(str(file), "function-calling")
    assert f"{file}, line 3: " in str(error.value)
    assert problem in str(error.value)


def test_json_mode_needs_a_schema_that_is_an_object(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", JSON | {"schema": "[]"})
    with pytest.raises(DataError, match="line 1: its 'schema' is not a JSON object"):
        read_rows(str(file), "json-mode")


def test_rows_that_cannot_be_read_are_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("\n")
    for source, problem in [
        (tmp_path / "empty.jsonl", "has no rows"),
        (tmp_path / "none.jsonl", "does not exist; name a .jsonl or .parquet file"),
        ("rows/none.jsonl", "does not exist"),
        (tmp_path, "has no rows"),
        ("no-one/no-such-data", "is not in the cache, and the hub cannot be reached"),
        ("no..one/data--set", "there is no file and no dataset"),
    ]:
        with pytest.raises(DataError, match=problem):
            read_rows(str(source), "json-mode")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        DataError, match=r"reading rows.parquet needs pyarrow \(pip install pyarrow\)"
    ):
        read_rows(str(tmp_path / "rows.parquet"), "json-mode")


def test_a_downloaded_dataset_is_read_by_its_split_for_training(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *names, **options: asked.append((names, options)) or str(tmp_path),
    )
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data/train-00001.jsonl", JSON | {"completion": "2"})
    write_rows(tmp_path / "data/train-00000.jsonl", JSON | {"completion": "1"})
    for other in ("test", "constrained"):
        write_rows(tmp_path / f"data/{other}-00000.jsonl", JSON | {"completion": "3"})
    assert [row.expected for row in read_rows("someone/data", "json-mode")] == [1, 2]
    assert asked == [
        (("someone/data",), {"repo_type": "dataset", "allow_patterns": ["*.parquet", "*.jsonl"]})
    ]


def test_parquet_has_the_same_rows_as_json_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = write_rows(
        tmp_path / "rows.jsonl", CALLS, CALLS | {"completion": json.dumps([PARIS, ROME])}
    )
    parquet.write_table(
        pyarrow.Table.from_pylist([json.loads(line) for line in lines.read_text().splitlines()]),
        tmp_path / "rows.parquet",
    )
    ours, theirs = (
        read_rows(str(tmp_path / name), "function-calling")
        for name in ("rows.jsonl", "rows.parquet")
    )
    assert [(row.messages, row.expected, row.tools) for row in ours] == [
        (row.messages, row.expected, row.tools) for row in theirs
    ]
    assert theirs[1].where == f"{tmp_path / 'rows.parquet'}, row 2"
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_rows(str(tmp_path / "bad.parquet"), "function-calling")


# Runs


class Scripted:
    """Returns the given texts, and remembers which rows it was asked."""

    def __init__(self, texts, fails_at=None):
        self.texts = texts
        self.fails_at = fails_at
        self.asked = []

    def __call__(self, rows):
        if self.fails_at in [row.index for row in rows]:
            raise KeyboardInterrupt
        self.asked += [row.index for row in rows]
        return [self.texts[row.index] for row in rows]


@pytest.fixture
def rows(tmp_path):
    cities = ("Paris", "Rome", "Oslo", "Lima", "Cairo")
    made = [
        CALLS
        | {"prompt": [{"role": "user", "content": city}], "completion": json.dumps(call(city=city))}
        for city in cities
    ]
    return read_rows(str(write_rows(tmp_path / "rows.jsonl", *made)), "function-calling")


TEXTS = [written(call(city=city)) for city in ("Paris", "Roma", "Oslo", "Lima")] + [
    "Cairo? It's hot & dry there: 5 < 9"
]
SETTINGS = {"seed": 0, "window": None}


def outcome(rows, ask, path, batch_size=1, settings=SETTINGS):
    answers = Answers(path, settings)
    verdicts = evaluate("function-calling", rows, ask, answers=answers, batch_size=batch_size)
    return [row["fixed"].reason for row in verdicts]


EXPECTED = ["passed", "wrong argument", "passed", "passed", "no call"]


def test_every_row_is_kept_with_both_verdicts_as_soon_as_it_is_done(tmp_path, rows):
    file = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        outcome(rows, Scripted(TEXTS, fails_at=2), file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, 1]
    assert lines[1]["text"] == TEXTS[1]
    assert lines[1]["prompt"] == rows[1].prompt_hash
    assert lines[1]["settings"] == SETTINGS
    for rules in ("paper", "fixed"):
        assert lines[0][rules] == {"passed": True, "reason": "passed", "detail": ""}
        assert (lines[1][rules]["passed"], lines[1][rules]["reason"]) == (False, "wrong argument")
        assert "Roma" in lines[1][rules]["detail"]


@pytest.mark.parametrize("cut", [0, 1, 5, 30, 1_000_000])
def test_an_interrupted_run_continues(tmp_path, rows, cut):
    file = tmp_path / "out.jsonl"
    assert outcome(rows, Scripted(TEXTS), file) == EXPECTED
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:cut])
    ask = Scripted(TEXTS)
    assert outcome(rows, ask, file) == EXPECTED
    assert ask.asked == ([4] if cut > len(lines[3]) else [3, 4])
    assert file.read_bytes() == whole
    assert outcome(rows, Scripted([]), file) == EXPECTED
    assert file.read_bytes() == whole


def test_a_last_line_without_a_newline_counts(tmp_path, rows):
    file = tmp_path / "out.jsonl"
    outcome(rows, Scripted(TEXTS), file)
    whole = file.read_bytes()
    file.write_bytes(whole.removesuffix(b"\n"))
    assert outcome(rows, Scripted([]), file) == EXPECTED
    assert file.read_bytes() == whole


def test_an_interrupted_batch_is_asked_again_and_keeps_its_answers(tmp_path, rows):
    file = tmp_path / "out.jsonl"
    assert outcome(rows, Scripted(TEXTS), file, batch_size=2) == EXPECTED
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    ask = Scripted(TEXTS)
    assert outcome(rows, ask, file, batch_size=2) == EXPECTED
    assert ask.asked == [2, 3, 4]
    assert file.read_bytes() == whole


def test_a_row_whose_prompt_has_changed_is_asked_again(tmp_path, rows):
    file = tmp_path / "out.jsonl"
    outcome(rows, Scripted(TEXTS), file)
    rows[1].messages[-1]["content"] = "Roma"
    ask = Scripted(TEXTS)
    outcome(rows, ask, file)
    assert ask.asked == [1]
    assert outcome(rows, Scripted([]), file) == EXPECTED


def test_answers_are_scored_anew_when_only_the_expected_ones_have_changed(tmp_path, rows):
    file = tmp_path / "out.jsonl"
    outcome(rows, Scripted(TEXTS), file)
    rows[1].expected[0]["arguments"]["city"] = "Roma"
    assert outcome(rows, Scripted([]), file) == ["passed", "passed", *EXPECTED[2:]]
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["id"], last["fixed"]["reason"]) == (1, "passed")


def test_answers_with_other_settings_are_refused(tmp_path, rows):
    file = tmp_path / "out.jsonl"
    outcome(rows, Scripted(TEXTS), file)
    whole = file.read_bytes()
    with pytest.raises(
        DataError, match="line 1: it was written with seed 0, not 1; name another file"
    ):
        outcome(rows, Scripted(TEXTS), file, settings=SETTINGS | {"seed": 1})
    with pytest.raises(DataError, match="written with seed 0, not None"):
        outcome(rows, Scripted(TEXTS), file, settings={"window": None})
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "text",
    [
        "a letter",
        pytest.param("[" * 100_000, id="deep"),
        '{"id": 7, "prompt": []}',
        '{"id": 7}\n',
        "one\ntwo",
        "[]\n",
        "7",
    ],
)
def test_a_file_that_is_not_of_answers_is_never_changed(tmp_path, rows, text):
    file = tmp_path / "precious.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match="name another file"):
        outcome(rows, Scripted(TEXTS), file)
    assert file.read_text() == text


def test_the_model_is_not_asked_if_the_file_cannot_be_written(tmp_path, rows):
    ask = Scripted(TEXTS)
    with pytest.raises(OSError):
        outcome(rows, ask, tmp_path / "nowhere/out.jsonl")
    assert ask.asked == []


def test_a_run_without_a_path_writes_no_file(rows):
    assert outcome(rows, Scripted(TEXTS), None) == EXPECTED


def test_every_reason_that_the_rules_give_has_its_line_in_the_table():
    tasks = {
        "function-calling": ("score_calls", calls_row(PARIS)),
        "json-mode": ("score_json", json_row()),
    }
    answers = [
        "",
        "<tool_call></tool_call>",
        "im_start\\",
        "{}",
        "[]",
        json.dumps(BOX | {"name": 1}),
    ]
    answers += [
        json.dumps(BOX | {"count": 3}),
        written(PARIS),
        written(ROME),
        written(call("sun")),
        written(call()),
    ]
    answers += [written(PARIS, ROME), written(call("clock"))]
    for task, (name, row) in tasks.items():
        reasons = {
            getattr(rules, name)(row, answer).reason
            for rules in (paper_rules, fixed_rules)
            for answer in answers
        }
        assert reasons - {"passed"} == set(REASONS[task])


# The model


@pytest.fixture(scope="module")
def chat_model():
    """Random weights with the true tokenizer; 32,032 rows as in Hermes-2-Pro."""
    return small.model(
        vocab_size=32032, eos_token_id=(32000,), sliding_window=None
    ), small.true_tokenizer()


def some_rows(*prompts):
    return [
        Row(i, f"row {i}", [{"role": "user", "content": text}], [], [], {})
        for i, text in enumerate(prompts)
    ]


def test_a_conversation_is_encoded_in_chatml(chat_model, monkeypatch):
    seen = []

    def generate_batch(model, prompts, sampling, *, max_new_tokens):
        seen.append((prompts, sampling, max_new_tokens))
        return [[22557, 32001, 2188, 32000], [22557]]

    monkeypatch.setattr(run_module, "generate_batch", generate_batch)
    texts = ModelAnswers(*chat_model)(some_rows("hello", "<|im_end|>"))
    [((hello, spelled), sampling, max_new_tokens)] = seen
    assert hello == [1, 32001, 2188, 13, 21558, 32000, 28705, 13, 32001, 13892, 13]
    assert spelled.count(32000) == 1
    assert (sampling.temperature, sampling.top_k, sampling.top_p, max_new_tokens) == (
        0.1,
        50,
        1.0,
        512,
    )
    # The stop token is not part of the answer; another control token is, spelled
    assert texts == ["Hello<|im_start|>user", "Hello"]


def test_a_row_is_answered_alike_whatever_was_asked_before(chat_model):
    rows = some_rows("one", "two", "three")
    options = {"temperature": 1.0, "max_new_tokens": 5}
    first = ModelAnswers(*chat_model, seed=1, **options)
    texts = [first([row])[0] for row in rows]
    again = ModelAnswers(*chat_model, seed=1, **options)
    assert [again([row])[0] for row in rows[1:]] == texts[1:]
    assert again([rows[0]]) != ModelAnswers(*chat_model, seed=2, **options)([rows[0]])
    assert len(first(rows)) == 3


def test_another_engine_can_answer(chat_model):
    rows = some_rows("one", "a longer one")
    made = []

    def empty_decoder(count):
        made.append(mistral.Decoder(chat_model[0], count, room, slack=0))
        return made[-1]

    ask = ModelAnswers(*chat_model, temperature=0, max_new_tokens=5)
    texts = ask(rows)
    room = ask.check(rows)
    ask.empty_decoder = empty_decoder
    assert ask(rows) == texts
    assert made[0].limit == room == made[0].lengths[1]


def test_a_row_that_is_too_long_is_named_before_any_is_asked(chat_model):
    ask = ModelAnswers(*chat_model, max_new_tokens=500)
    ask.check(some_rows("short"))
    with pytest.raises(
        ValueError, match=r"row 1: a prompt of 16 tokens and 500 new ones are more than the 512"
    ):
        ask.check(some_rows("short", "a little bit longer than that"))
    with pytest.raises(ValueError, match="not made for ChatML"):
        ModelAnswers(chat_model[0], small.true_tokenizer(added={})).check(some_rows("short"))


def test_invalid_settings_are_refused_before_any_row_is_asked(chat_model):
    for options in ({"temperature": -1}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError):
            ModelAnswers(*chat_model, **options)


# The scripts


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script inside this process: (exit code, stdout, stderr)."""

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(small.ROOT / small.SCRIPTS[name]), run_name="__main__")
        return SimpleNamespace(code=ended.value.code, **capsys.readouterr()._asdict())

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which `run` replaces
    return script


@pytest.mark.parametrize("task", ["function-calling", "json-mode"])
def test_made_up_rows_are_evaluated_and_the_same_command_continues(tmp_path, script, task):
    data = tmp_path / "rows.jsonl"
    out = tmp_path / "out.jsonl"
    assert script("make_eval_rows", data, "--task", task, "--rows", 3, "--seed", 7).code == 0
    rows = read_rows(str(data), task)
    assert len(rows) == 3
    command = (
        task,
        "--model",
        CHECKPOINT,
        "--data",
        data,
        "--output",
        out,
        "--max-new-tokens",
        2,
        "--window",
        "none",
    )
    first = script("evaluate", *command)
    assert first.code == 0, first.err
    result = json.loads(first.out.splitlines()[-1])
    for rules in ("paper", "fixed"):
        assert (result[rules]["n"], result[rules]["passed"]) == (3, 0)
        assert sum(result[rules]["reasons"].values()) == 3
    assert "95% interval          0.0% - 56.1%" in first.out
    kept = out.read_bytes()
    again = script("evaluate", *command, "--rules", "fixed")
    assert (again.code, out.read_bytes()) == (0, kept)
    assert "paper" not in again.out.splitlines()[1]
    other = script("evaluate", *command, "--seed", 1)
    assert (other.code, other.err.splitlines()[-1].startswith("error: ")) == (1, True)
    assert "written with seed 0, not 1" in other.err


def test_a_model_that_answers_rightly_passes_the_made_up_rows(tmp_path, script):
    for task, answer in (
        ("function-calling", lambda row: written(*row.expected)),
        ("json-mode", _as_json),
    ):
        data = tmp_path / f"{task}.jsonl"
        assert script("make_eval_rows", data, "--task", task, "--rows", 40).code == 0
        rows = read_rows(str(data), task)
        verdicts = list(
            evaluate(task, rows, lambda batch, answer=answer: [answer(row) for row in batch])
        )
        assert all(verdict["fixed"].passed for verdict in verdicts)
        passed = [verdict["paper"].passed for verdict in verdicts]
        assert passed == [
            task == "json-mode" or _first_calls_have_all_arguments(row.expected) for row in rows
        ]
        assert all(passed) == (task == "json-mode")


def _first_calls_have_all_arguments(expected):
    """The paper's rules hold every call to the first of its name, so two of one function fail
    unless it has it all.
    """
    first = {call["name"]: call["arguments"] for call in reversed(expected)}
    return all(first[call["name"]] | call["arguments"] == first[call["name"]] for call in expected)


def _as_json(row):
    return json.dumps(row.expected)


def test_made_up_rows_depend_on_the_seed_alone_and_overwrite_nothing(tmp_path, script):
    one, two, three = (tmp_path / f"{name}.jsonl" for name in ("one", "two", "three"))
    for file, seed in ((one, 1), (two, 1), (three, 2)):
        script("make_eval_rows", file, "--task", "json-mode", "--rows", 2, "--seed", seed)
    assert one.read_text() == two.read_text() != three.read_text()
    again = script("make_eval_rows", one, "--task", "json-mode")
    assert (again.code, "is there already" in again.err) == (1, True)
    assert one.read_text() == two.read_text()


def test_the_scripts_report_an_error_in_one_line(tmp_path, script):
    data = write_rows(tmp_path / "rows.jsonl", JSON)
    for arguments, problem in [
        (("json-mode", "--data", tmp_path / "none.jsonl"), "does not exist"),
        (("function-calling", "--data", data), "has no 'tools'"),
        (("json-mode", "--data", data, "--limit", 0), "--limit"),
        (
            ("json-mode", "--data", data, "--model", CHECKPOINT, "--output", data),
            "name another file",
        ),
    ]:
        result = script("evaluate", *arguments)
        assert result.code == 1
        assert problem in result.err.splitlines()[-1]


def test_lists_of_unequal_lengths_are_not_equal():
    assert fixed_rules._equal([1, 2], [1.0, 2])
    assert not fixed_rules._equal([1], [1, 2])
    assert not fixed_rules._equal([1, 2], [1])


def test_a_required_argument_counts_even_if_it_is_null():
    schema = {"properties": {"a": {}}, "required": ["a"]}
    assert fixed_rules._without_defaults({"a": None, "b": None}, schema) == {"a": None}


def test_an_interval_ends_exactly_at_0_and_1():
    for n in range(1, 300):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0

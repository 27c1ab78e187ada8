"""Targets of mistral/chat: schemas, tools, answers, results, messages, saved conversations."""

import json
import random
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import small
import torch
from fuzz_case import Maker, Target, cases, one_printable_line
from scripted import TOKENIZER, Scripted

import mistral
from mistral.chat import Conversation, ToolCallStream, encode_chat, parse_tool_calls
from mistral.chat.events import Call, Error, Text
from mistral.chat.formats import FORMATS
from mistral.chat.formats.call_list import read_call_list
from mistral.chat.formats.messages import check_messages
from mistral.chat.formats.tool_calls import Reply
from mistral.chat.grammar import GrammarError, json_constraint, tool_call_constraint
from mistral.chat.structured import generate_json
from mistral.chat.tools import ArgumentError, Tool
from mistral.chat.tools.functions import check_arguments
from mistral.chat.tools.json_schema import SchemaError, as_json, compile_schema, problem
from mistral.chat.tools.results import encode_result, result_text
from mistral.errors import ConversationError

DIALECTS = {
    None: jsonschema.Draft202012Validator,
    "http://json-schema.org/draft-04/schema#": jsonschema.Draft4Validator,
    "http://json-schema.org/draft-06/schema#": jsonschema.Draft6Validator,
    "http://json-schema.org/draft-07/schema#": jsonschema.Draft7Validator,
    "https://json-schema.org/draft/2019-09/schema": jsonschema.Draft201909Validator,
    "https://json-schema.org/draft/2020-12/schema": jsonschema.Draft202012Validator,
}
TYPES = ("string", "integer", "number", "boolean", "null", "object", "array")
# Those that mean the same to Python's re as to ECMA 262
PATTERNS = ("^[a-z]{2,5}$", "^(yes|no)$", "^A+b?$", "a", "^$", "[^x]", "^.{3}$")
ODD_PATTERNS = (
    *("^(a+)+$", "(", "[", "a{99999}", "(?<=a)b", "(?!x)", r"\p{L}+", r"(a)\1", "a" * 3000, "\0"),
    *("((((((((((a*)*)*)*)*)*)*)*)*)*", "[[a-z]--[b]]", "(?x) a b", "a++", "\ud800", "^\\u0041$"),
)
NAMES = ("a", "b", "value", "name", "x-y", "é", "$ref", "type", "0", "a/b", "a~b", "__proto__")
FORMATS_OF_TEXT = ("date", "date-time", "email", "uuid", "ipv4", "uri", "regex", "no-such", "time")


# 1. JSON schemas


def made_schema(m: Maker, depth: int = 3) -> Any:
    """A schema that is mostly well-formed."""
    if m.chance(6):
        return m.chance(70)
    if m.chance(4):
        return m.json(2)
    schema: dict[str, Any] = {}
    if m.chance(75):
        schema["type"] = m.pick(TYPES) if m.chance(85) else m.some(lambda: m.pick(TYPES), 0, 3)
    wanted = m.number(0, 3)
    for _ in range(wanted):
        _add_keyword(m, schema, depth)
    return schema


def _add_keyword(m: Maker, schema: dict[str, Any], depth: int) -> None:
    def inner() -> Any:
        return made_schema(m, depth - 1) if depth > 0 else {}

    def names() -> list[str]:
        return m.some(lambda: m.pick(NAMES), 0, 3)

    def size() -> int:
        return m.pick((0, 1, 2, 3, 5, 20, 300)) if m.chance(94) else m.whole()

    def bound() -> Any:
        return m.pick((0, 1, -1, 7, 2.5, -0.5, 100, 1e3)) if m.chance(90) else m.pick(BOUNDS)

    action = m.number(0, 29)
    match action:
        case 0 | 1 | 2 | 3:
            schema["type"] = "object"
            schema["properties"] = {name: inner() for name in names()}
            if m.chance(60):
                schema["required"] = list(dict.fromkeys(names()))
            if m.chance(40):
                schema["additionalProperties"] = m.chance(10) if m.chance(80) else inner()
        case 4 | 5:
            schema["type"] = "array"
            schema["items"] = inner()
        case 6:
            schema["prefixItems"] = m.some(inner, 0, 3)
        case 7 | 8:
            schema["enum"] = m.some(lambda: m.json(1), 0, 4)
        case 9:
            schema["const"] = m.json(2)
        case 10 | 11:
            schema[m.pick(("anyOf", "oneOf", "allOf"))] = m.some(inner, 1, 3)
        case 12:
            schema["not"] = inner()
        case 13:
            schema |= {"if": inner(), "then": inner(), "else": inner()}
        case 14 | 15:
            schema[m.pick(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))] = bound()
        case 16:
            schema["multipleOf"] = m.pick((1, 2, 0.5, 0.1, 3, 1e-9, 0, -1, 1e300))
        case 17 | 18:
            schema[m.pick(("minLength", "maxLength"))] = size()
        case 19:
            schema["pattern"] = m.pick(PATTERNS) if m.chance(75) else m.pick(ODD_PATTERNS)
        case 20:
            schema["format"] = m.pick(FORMATS_OF_TEXT)
        case 21:
            schema[m.pick(("minItems", "maxItems", "minProperties", "maxProperties"))] = size()
        case 22:
            schema[m.pick(("uniqueItems", "nullable", "deprecated"))] = m.chance(70)
        case 23:
            schema[m.pick(("contains", "unevaluatedItems", "unevaluatedProperties"))] = inner()
        case 24:
            schema["patternProperties"] = {m.pick(PATTERNS): inner()}
        case 25:
            schema["propertyNames"] = inner()
        case 26:
            schema["$ref"] = m.pick(
                ("#", "#/$defs/a", "#/$defs/b", "#/properties/a", "other.json", "http://h/x", "#no")
            )
        case 27:
            schema[m.pick(("$id", "$anchor", "id", "$schema", "$comment", "title"))] = m.text()
        case 28:
            schema[m.pick(("dependentRequired", "dependencies"))] = {m.pick(NAMES): names()}
        case 29:
            schema[m.pick((*NAMES, "minLength", "items", "type", "properties"))] = m.json(2)


BOUNDS = (*(10**20, -(10**20), 2**63, 1e300, 5e-324, float("nan"), True, "5", None),)


def _schema_and_values(m: Maker) -> tuple[Any, list[Any], int]:
    """A schema, values to check, and a seed for an answer."""
    schema = made_schema(m)
    if isinstance(schema, dict):
        if m.chance(40):
            schema["$defs"] = {"a": made_schema(m, 2), "b": made_schema(m, 1)}
        if m.chance(20):
            schema["$schema"] = m.pick(list(DIALECTS)[1:]) if m.chance(80) else m.json(1)
    return schema, m.some(lambda: m.json(2), 0, 3), m.number(0, 99)


def check_schema(case: tuple[Any, list[Any], int]) -> str:
    """The schema compiles, checks values as jsonschema does, and its grammar's answers are valid."""
    schema, values, seed = case
    validator = compile_schema(schema)
    peer = _peer(validator.schema)
    for value in values:
        told = problem(validator, value)
        if told is not None:
            one_printable_line(told)
        if peer is not None and not _too_large(value):
            assert (told is None) == peer.is_valid(as_json(value)), f"{value!r}: {told}"
    model, tokenizer = small_model()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        constraint = json_constraint(tokenizer, model.config.vocab_size, schema)
    for one in told:
        one_printable_line(str(one.message))
    text = _written(constraint, tokenizer, random.Random(seed))
    if text is None:
        return "cut off"
    value = json.loads(text)
    if told:
        return "answered, in part unchecked"
    assert (wrong := problem(validator, value)) is None, f"the grammar allows {text}: {wrong}"
    if peer is not None:
        assert peer.is_valid(value), f"the grammar allows {text}, and jsonschema does not"
    return "answered"


def _peer(schema: dict[str, Any]) -> Any:
    """jsonschema's validator; None for schemas that the two libraries read differently on purpose."""
    written = json.dumps(schema)
    unlike = ("multipleOf", "pattern", "$ref", "$id", '"id"', "$anchor", "\\ud", "unevaluated")
    if any(word in written for word in unlike) or schema.get("$schema") not in DIALECTS:
        return None
    return DIALECTS[schema.get("$schema")](schema)


def _too_large(value: Any) -> bool:
    """Whether a value has what JSON cannot hold, or numbers that float64 does not."""
    try:
        return any(len(word) > 15 for word in json.dumps(as_json(value)).split())
    except ValueError:
        return True


def _written(constraint: Any, tokenizer: mistral.Tokenizer, random: random.Random) -> str | None:
    """What an undecided model writes under a constraint; None if it does not end soon."""
    stream = tokenizer.stream()
    text = ""
    for _ in range(40):
        allowed = constraint.mask().nonzero().flatten().tolist()
        stops = [id for id in allowed if id in tokenizer.stop_ids]
        id = stops[0] if stops else random.choice(allowed)
        constraint.accept(id)
        if stops:
            return text + stream.finish()
        text += stream.feed(id)
    return None


@cache
def small_model() -> tuple[mistral.Mistral, mistral.Tokenizer]:
    """The small checkpoint of the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mistral.load(small.DATA / "small", device="cpu")


def _json_mode(m: Maker) -> tuple[Any, ...]:
    schema, _, seed = _schema_and_values(m)
    return schema, m.text(), m.chance(70), seed


def check_json_mode(case: tuple[Any, ...]) -> str:
    """generate_json with any schema and prompt: a valid value or a named error."""
    schema, prompt, grammar, seed = case
    if len(repr((schema, prompt))) > 1500:  # the model would read all of it
        return "too long to try"
    model, tokenizer = small_model()
    options = dict(
        sampling=mistral.Sampling(temperature=3.0, seed=seed),
        grammar=grammar,
        max_new_tokens=8,
        retries=1,
    )
    value = generate_json(model, tokenizer, prompt, schema, **options)
    assert problem(compile_schema(schema), value) is None, f"{value!r} is not valid"
    return "answered"


# 2. Tools


def _tool(m: Maker) -> tuple[Any, list[Any]]:
    parameters = made_schema(m, 2)
    if isinstance(parameters, dict) and m.chance(80):
        parameters["type"] = "object"
    key = m.pick(("parameters", "parameters", "inputSchema", "input_schema"))
    name = m.pick(("f", "get.x-1", "A_b")) if m.chance(85) else m.text()
    inner: Any = {"name": name, "description": m.text(), key: parameters}
    if m.chance(20):
        inner["return"] = m.json(2)
    tool: Any = {"type": "function", "function": inner} if m.chance(50) else inner
    if m.chance(15):
        tool = m.changed(tool)
    values = [{m.pick(NAMES): m.json(1) for _ in range(m.number(0, 3))} for _ in range(2)]
    return tool, [*values, m.json(1)]


def check_tool(case: tuple[Any, list[Any]]) -> str:
    """A published tool is read, checks arguments, and has a grammar."""
    schema, values = case
    tool = Tool.from_schema(schema)
    assert Tool.from_schema(tool.schema()).schema() == tool.schema(), "the tool changes when saved"
    accepted = 0
    for arguments in values:
        try:
            check_arguments(tool, arguments)
            accepted += 1
        except ArgumentError as error:
            one_printable_line(str(error))
    model, tokenizer = small_model()
    try:
        tool_call_constraint(tokenizer, model.config.vocab_size, [schema], choice="required")
    except GrammarError as error:
        one_printable_line(str(error))
    return "arguments accepted" if accepted else "arguments refused"


def _result(m: Maker, depth: int = 3) -> Any:
    """What a function may return."""
    kind = m.number(0, 11)
    if depth and kind < 4:
        items = m.some(lambda: _result(m, depth - 1), 0, 3)
        return (
            items,
            tuple(items),
            dict(enumerate(items)),
            {str(i): x for i, x in enumerate(items)},
        )[kind]
    if kind == 4:
        return m.bytes()
    if kind == 5:
        return torch.zeros(m.number(0, 3), m.number(0, 3))
    if kind == 6:
        return m.pick((Path("/x"), complex(1, 2), range(3), object, {1, 2}, frozenset("ab"), Odd()))
    if kind == 7:
        return {m.json(0) if m.chance(30) else m.text(): m.json(1)} if m.chance(50) else circle()
    if kind == 8:
        return json.dumps(m.json(2)) if m.chance(70) else m.pick(("3.10", "null", "", "[1", " {} "))
    return m.json(3)


class Odd:
    """An object whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no\nthing")

    __repr__ = __str__

    def __iter__(self):
        raise OSError("no")


def circle() -> list[Any]:
    """A list that is in itself."""
    made: list[Any] = []
    made.append(made)
    return made


def _hashable_result(m: Maker) -> Any:
    try:
        return _result(m)
    except TypeError:  # a list as a key
        return None


def check_result(result: Any) -> str:
    """Every result has a form in JSON, and the reader of its text gets the same value."""
    returned = encode_result(result)
    value = as_json(returned.value)
    assert json.dumps(value) == json.dumps(returned.value), "the value is not as in JSON"
    if returned.problem is not None:
        one_printable_line(returned.problem)
    text = result_text(value)
    message = {"role": "tool", "name": "f", "content": text}
    (read,) = check_messages([message], answered=True)
    if not isinstance(value, str) or read.result() == value:
        assert json.dumps(read.result()) == json.dumps(value), (
            f"{value!r} is read as {read.result()!r}"
        )
    encode_chat(TOKENIZER, [{"role": "assistant", "content": "x"}, message], format="chatml")
    return "as JSON" if returned.problem is None else "as text"


# 3. What a model writes

TAGS = ("<tool_call>", "</tool_call>", "<tool_call>\n", "\n</tool_call>", "<tool_", "</tool_call")
PARTS = (
    *('{"name": "f", "arguments": {}}', "{'name': 'f', 'arguments': {'a': 1}}", '{"name": "f"}'),
    *("{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ":", "\n", " ", "null", "None", "1e9"),
    *('"<tool_call>"', "'</tool_call>'", '{"a": "', '"}', "text ", "é", "😀", "<", ">", "/", "0x1"),
    *('"\\ud83d', "\\ude00", '"\\ud800"', "\\u0041", "True", ".5", "-", "[" * 101, "9" * 700),
    *('{"name": "g", "arguments": "{\\"x\\": 1}"}', '{"name": "h", "args": {"x": [1, 2]}}'),
)


def _answer(m: Maker) -> tuple[str, list[int]]:
    """A model's answer, and where it is cut into pieces."""
    parts = m.some(lambda: m.pick(TAGS) if m.chance(35) else m.pick(PARTS), 0, 12)
    if m.chance(10):
        parts.append(m.letters())
    if m.chance(3):
        parts *= m.pick((50, 500))
    text = "".join(parts)
    return text, sorted(m.some(lambda: m.number(0, len(text)), 0, 8))


def check_answer(case: tuple[str, list[int]]) -> str:
    """No answer makes the parser raise, and cutting it anywhere changes nothing."""
    text, cuts = case
    whole = parse_tool_calls(text)
    stream = ToolCallStream()
    events = []
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        events += stream.feed(text[start:end])
    events += stream.finish()
    assert Reply.of(events) == whole, "cut into pieces it is parsed differently"
    kept = text
    for event in reversed(events):
        if isinstance(event, (Call, Error)):
            start, end = event.span
            kept = kept[:start] + kept[end:]
        if isinstance(event, Call):
            as_json(event.arguments)
        if isinstance(event, Error):
            one_printable_line(event.message)
            assert event.source == text[start:end], "an error's source is not its span"
    same = "".join(kept.split()) == "".join(whole.text.split())
    assert same, "text outside of the calls is lost"
    for event in read_call_list(text, 1):
        if isinstance(event, Error):
            one_printable_line(event.message)
    return f"{min(len(whole.calls), 2)} calls, {min(len(whole.errors), 2)} errors"


# 4. Messages and saved conversations

ROLES = ("system", "user", "assistant", "tool", "developer", "function")


def _message(m: Maker) -> Any:
    role = m.pick(ROLES) if m.chance(95) else m.json(1)
    message: dict[str, Any] = {"role": role}
    if m.chance(85):
        message["content"] = m.text() if m.chance(70) else m.json(2)
    if m.chance(10):
        message["content"] = [{"type": m.pick(("text", "image", "refusal")), "text": m.text()}]
    if role == "tool" and m.chance(80):
        message["name"] = m.text()
    if m.chance(10):
        message[m.pick(("error", "tool_call_id", "refusal", "name"))] = m.json(1)
    if role == "assistant" and m.chance(40):
        arguments = m.json(2) if m.chance(60) else json.dumps(m.json(2))
        call = {"id": m.text(), "function": {"name": m.text(), "arguments": arguments}}
        message["tool_calls"] = m.some(lambda: call if m.chance(80) else m.json(2), 0, 2)
    return message if m.chance(97) else m.json(1)


def _messages(m: Maker) -> tuple[list[Any], str, bool]:
    polite = [{"role": m.pick(("user", "system")), "content": m.text()}] if m.chance(60) else []
    names = [*FORMATS, "no-such"] if m.chance(10) else list(FORMATS)
    return polite + m.some(lambda: _message(m), 0, 4), m.pick(names), m.chance(50)


def check_messages_encode(case: tuple[list[Any], str, bool]) -> str:
    """Messages become ids, with no control token but those of the format."""
    messages, format, generate = case
    tokenizer = TOKENIZER
    ids = encode_chat(tokenizer, messages, format=format, generate=generate)
    assert all(0 <= id < tokenizer.vocab_size for id in ids), "an id that does not exist"
    spelled = ids.count(tokenizer.control_id("<|im_start|>"))
    assert spelled <= len(messages) + 1, "a message's text became a control token"
    return "encoded"


def _saved(m: Maker) -> bytes:
    """The bytes of a file of JSON lines."""
    head: Any = {"format": m.pick(list(FORMATS)[:2]), "tools": []}
    if m.chance(25):
        head = m.changed(head)
    lines = [head, *[_message(m) for _ in range(m.number(0, 4))]]
    try:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    except ValueError:  # a number of too many digits
        data = b"{}"
    return m.damaged(data) if m.chance(20) else data


def check_saved(data: bytes) -> str:
    """A file is a conversation, which is saved and continued, or it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.jsonl"
        path.write_bytes(data)
        options = dict(max_new_tokens=3)
        loaded = Conversation.load(path, Scripted("ok", limit=300), TOKENIZER, **options)
        again = Path(folder) / "again.jsonl"
        loaded.save(again)
        copy = Conversation.load(again, Scripted("ok"), TOKENIZER, **options)
        assert copy.messages == loaded.messages, "saving changes a message"
        before = list(loaded.messages)
        events = list(loaded.say("hi"))
        assert any(isinstance(event, Text) for event in events), "no answer"
        assert loaded.messages[: len(before)] == before, "an old message was changed"
    return "continued"


TARGETS = (
    Target(
        "schemas",
        "JSON schemas of all dialects, with values and answers under the grammar",
        cases(_schema_and_values),
        check_schema,
        (SchemaError, GrammarError),
        holds="valid as in jsonschema; every answer under the grammar is valid",
    ),
    Target(
        "json-mode",
        "the same schemas and odd prompts, given to generate_json",
        cases(_json_mode),
        check_json_mode,
        (ValueError,),
        holds="the value is valid",
    ),
    Target(
        "tools",
        "tools in the forms of OpenAI, MCP and Anthropic, and arguments for them",
        cases(_tool),
        check_tool,
        (ValueError,),
        holds="a tool written and read again is the same",
    ),
    Target(
        "results",
        "what functions return: objects, circles, tensors, text that looks like JSON",
        cases(_hashable_result),
        check_result,
        holds="the model's text reads as the same value",
    ),
    Target(
        "answers",
        "answers with calls, halves of tags, strings with tags in them, cut anywhere",
        cases(_answer),
        check_answer,
        holds="the stream's events are those of the whole text; no text is lost",
    ),
    Target(
        "messages",
        "conversations in OpenAI's form, in every chat format",
        cases(_messages),
        check_messages_encode,
        (ValueError,),
        holds="text never becomes a control token",
    ),
    Target(
        "saved",
        "files of saved conversations",
        cases(_saved),
        check_saved,
        (ConversationError,),
        holds="saved and loaded again, and after the next turn, the messages are the same",
    ),
)

import ast
import json
import math
import random
import time
from dataclasses import FrozenInstanceError

import pytest

from mistral.chat.events import Call, Error, Text
from mistral.chat.formats.call_list import read_call_list
from mistral.chat.formats.call_objects import call_of
from mistral.chat.formats.literals import MAX_DEPTH, MAX_NUMBER, read_literals
from mistral.chat.formats.tool_calls import Reply, ToolCallStream, parse_tool_calls

F = '{"name": "f", "arguments": {"x": 1}}'
G = "{'arguments': {'y': None}, 'name': 'g'}"
CARD = (
    "<tool_call>\n{'arguments': {'symbol': 'TSLA'}, 'name': 'get_stock_fundamentals'}\n</tool_call>"
)


def block(inside, close="</tool_call>"):
    return f"<tool_call>\n{inside}\n{close}"


def with_argument(written):
    return block(f'{{"name": "f", "arguments": {{"x": {written}}}}}')


def call(text):
    """Name and arguments of the one call in a text that has nothing else."""
    reply = parse_tool_calls(text)
    assert reply.text == "" and not reply.errors
    [one] = reply.calls
    return one.name, one.arguments


def argument(written):
    name, arguments = call(with_argument(written))
    assert name == "f" and list(arguments) == ["x"]
    return arguments["x"]


def error(text):
    """The message of the one error in a text that has nothing else."""
    reply = parse_tool_calls(text)
    assert reply.text == "" and not reply.calls
    [one] = reply.errors
    assert text[slice(*one.span)] == one.source
    return one.message


def streamed(pieces):
    stream = ToolCallStream()
    return Reply.of([event for piece in pieces for event in stream.feed(piece)] + stream.finish())


def cut(text, places):
    places = [0, *sorted(places), len(text)]
    return [text[a:b] for a, b in zip(places, places[1:])]


def names(reply):
    return [one.name for one in reply.calls]


TEXTS = [
    "",
    "plain text",
    " \n plain text \n\n ",
    "a < b, <tool, <tool_ and <tool_calls> are no tags; </tool_call> closes nothing <",
    "<tool_call",
    CARD,
    f"I'll look.\n{CARD}\n{block(F)}{block(G)} Done. \n",
    f"\n{block(F)}\n\n ",
    f"<think>a > b</think>\n\n{block(F)}\r\n\t",
    f"<tool_call>{F}</tool_call><tool_call>{F}</tool_call>",
    f"<tool_call>{F}<tool_call>{F}\n<tool_call>{G}",
    f"text <tool_call>{F}</tool_c",
    f"text <tool_call>{F} <",
    '<tool_call>{"name": "f", "arguments": {"x": "cut o',
    '<tool_call>{"name": "f", "arguments": {"x": "cut \\',
    with_argument('"a </tool_call> b <tool_call> {[( &amp; <b>c</b>"'),
    with_argument(r'"\n\\</tool_call>\"</tool_call>\\"'),
    with_argument('"日本 é 😀 \\ud83d\\ude00 \\" \\\\"'),
    f'<tool_call>{{"name": "f", "arguments": {{"a": "b}}}}</tool_call> x {block(F)}',
    f"<tool_call>{{'name': 'it's'}}</tool_call> it's {block(F)} so",
    f"{block('f(1)')} then {block('')}{block(F)}",
    f"<tool_call><tool_call>{F}</tool_call></tool_call>",
    f"the <tool_call> tag, isn't it? {block(F)}",
    f"{block(F + '}')} one too many",
    f"{block(F + ' and so on')} more {block(F)}",
    f'{block(F[:-1])} one too few "quotes" ',
    f'<tool_call>{{"<tool_call>{{\'"</tool_call>{block(F)}',
    block(f"[{F}, {G}]"),
    block(f"{F}\n{G}"),
    block("[]"),
    F,
    f"  {F}\n",
    f"[{F}, {G}] trailing",
    f"```json\n{F}\n```",
    f"```json\n{F}\n``` and {block(G)}",
    f"```xml\n{block(F)}\n```",
    "```json\n{}\n```",
    '<function=f>{"x": 1}</function>',
    f"<JSON>\n{F}\n</JSON>",
    "\ud800 lone \udfff <tool_call>\ud800</tool_call> \x00 " + with_argument('"\x00\ud800"'),
    with_argument("[" * 200 + "]" * 200),
]
FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "<tool_call>",
    "</tool_call>",
    "<",
    "<tool",
    "</tool_",
    "```",
    F,
    G,
]
FRAGMENTS += [
    *"{}[]()\"'\\,: \n\té😀\ud800\x00",
    "text",
    "1e9",
    "null",
    "NaN",
    '"name"',
    '{"name": "f"',
    '"arguments": {}',
]


def random_texts(count, seed=0):
    generator = random.Random(seed)
    return [
        "".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 25))) for _ in range(count)
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_a_reply_is_the_same_however_the_text_was_cut(text):
    whole = parse_tool_calls(text)
    generator = random.Random(0)
    assert streamed(text) == whole
    for size in (2, 3, 5):
        assert streamed([text[i : i + size] for i in range(0, len(text), size)]) == whole
    for place in range(len(text) + 1):
        assert streamed(cut(text, [place])) == whole
    for _ in range(50):
        places = generator.choices(range(len(text) + 1), k=generator.randrange(2, 12))
        assert streamed(cut(text, places)) == whole


def test_random_texts_never_raise_and_are_read_the_same_however_they_were_cut():
    generator = random.Random(1)
    for text in random_texts(600):
        whole = parse_tool_calls(text)
        assert streamed(text) == whole
        assert streamed(cut(text, generator.choices(range(len(text) + 1), k=4))) == whole


def test_text_and_spans_make_up_the_whole_text():
    """The rule of whitespace, implemented again: from the spans instead of from the stream."""
    for text in TEXTS + random_texts(600, seed=2):
        reply = parse_tool_calls(text)
        found = sorted(reply.calls + reply.errors, key=lambda one: one.span)
        ends = [0] + [one.span[1] for one in found]
        begins = [one.span[0] for one in found] + [len(text)]
        assert all(a <= b for a, b in zip(ends, begins)), "spans overlap"
        between = [text[a:b] for a, b in zip(ends, begins)]
        for i in range(len(between)):
            between[i] = between[i].lstrip(" \t\r\n") if i else between[i]
            between[i] = between[i].rstrip(" \t\r\n") if i < len(between) - 1 else between[i]
        assert reply.text == (text if not found else "\n".join(filter(None, between)))
        assert all(text[slice(*one.span)] == one.source for one in reply.errors)
        assert all(text[slice(*one.span)].startswith("<tool_call>") for one in found)


def test_what_is_written_is_read():
    generator = random.Random(3)
    for _ in range(300):
        prose = []
        calls = []
        text = ""
        for _ in range(generator.randrange(4)):
            prose += [generator.choice(["", "Some text.", "a < b it's {", "日本 </tool_call>"])]
            calls += [
                (generator.choice(["f", "get weather", "É"]), random_value(generator, 3, dict))
            ]
            text += f"{prose[-1]}{generator.choice(['', ' '])}<tool_call>{written(generator, *calls[-1])}"
            text += generator.choice(
                ["</tool_call>", "\n</tool_call>\n", "\n"] if not prose[-1] else ["</tool_call>"]
            )
            text = (
                text if text.endswith(("</tool_call>", "</tool_call>\n")) else text + "</tool_call>"
            )
        reply = parse_tool_calls(text)
        assert not reply.errors
        assert [(one.name, one.arguments) for one in reply.calls] == calls
        assert reply.text == "\n".join(filter(None, prose))


def written(generator, name, arguments):
    pairs = [
        ("name", name),
        ("arguments", arguments),
        ("id", generator.choice([None, "call_1", 7])),
    ]
    generator.shuffle(pairs)
    value = dict(pairs)
    if generator.random() < 0.2:
        value["arguments"] = json.dumps(arguments)
    ascii_only = generator.random() < 0.5
    forms = [repr, json.dumps]
    forms.append(lambda value: json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":")))
    forms.append(
        lambda value: json.dumps(value, ensure_ascii=ascii_only, indent=4).replace(
            "\n    ", "\r\n\t"
        )
    )
    return generator.choice(forms)(value)


STRINGS = [
    "",
    "TSLA",
    "it's",
    'say "x"',
    "\"'",
    "\\",
    "\\n",
    "a\nb\t",
    "</tool_call>",
    "<tool_call>{",
    "{t1,t2",
]
STRINGS += [
    "[oops",
    '{"a": 1} tail text',
    "&amp; <b>",
    "日本語 é",
    "😀",
    "\x00\x7f",
    "\u2028",
    "http://x/y",
    "None",
    "1",
]
STRINGS += ['def f(s):\n    """It\'s {odd"""\n    return [x for x in s if x != "}"]\n']


def random_value(generator, depth, kind=None):
    kind = kind or generator.choice([str, str, int, float, bool, None] + [dict, list] * (depth > 0))
    if kind is dict:
        keys = generator.sample(STRINGS, generator.randrange(4))
        return {key: random_value(generator, depth - 1) for key in keys}
    if kind is list:
        return [random_value(generator, depth - 1) for _ in range(generator.randrange(4))]
    number = generator.choice([0, 1, -1, 42, 10**30, -(10**600)])
    values = {str: generator.choice(STRINGS), int: number, bool: generator.random() < 0.5}
    values[float] = generator.choice([0.5, -0.0, 3.0, 1e-300, 1.5e300, generator.random()])
    return values.get(kind)


# Streams


def test_text_goes_through_at_once_and_whitespace_with_what_follows_it():
    stream = ToolCallStream()
    assert stream.feed("Hello") == [Text("Hello")]
    assert stream.feed("") == []
    assert stream.feed(" \n") == []
    assert stream.feed("world, ") == [Text(" \nworld,")]
    assert stream.finish() == [Text(" ")]
    assert stream.finish() == []


def test_text_that_may_begin_a_tag_is_held_back_until_it_cannot():
    stream = ToolCallStream()
    assert stream.feed("a <") == [Text("a")]
    assert stream.feed("tool") == []
    assert stream.feed("_cold") == [Text(" <tool_cold")]
    assert stream.feed("<<tool_call") == [Text("<")]
    assert stream.feed("<b") == [Text("<tool_call<b")]
    assert stream.feed("<tool") == []
    assert stream.finish() == [Text("<tool")]


def test_a_call_is_returned_as_soon_as_its_tag_is_closed():
    stream = ToolCallStream()
    first = f"Wait.\n{block(F)}"
    second = block(G)
    assert stream.feed(first[:-1]) == [Text("Wait.")]
    assert stream.feed(">") == [Call("f", {"x": 1}, (6, len(first)))]
    span = len(first) + 1, len(first) + 1 + len(second)
    assert stream.feed(f"\n{second}\nDone") == [Call("g", {"y": None}, span), Text("\nDone")]
    assert stream.finish() == []


def test_a_stream_is_for_one_answer():
    stream = ToolCallStream()
    stream.finish()
    with pytest.raises(ValueError, match="for each answer"):
        stream.feed("more")


def test_a_prefilled_beginning_of_an_answer_is_part_of_it():
    assert names(streamed(["<tool_call>\n", '{"na', 'me": "f"}', "</tool_call>"])) == ["f"]
    assert streamed(["Sure, ", "<tool", "_call>", F]).text == "Sure,"


def test_events_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Call("f", {}).name = "g"
    assert (Error("wrong").span, Error("wrong").source) == (None, "")


@pytest.mark.parametrize(
    ("first", "repeated", "last", "piece", "length"),
    [
        (
            "<tool_call>{'name': 'f', 'arguments': {'x': '",
            "long text ",
            "'}}</tool_call>",
            100,
            3_000_000,
        ),
        ("<tool_call>{'name': 'f', 'arguments': {'x': '", "long text ", "", 100, 3_000_000),
        ("<tool_call>nothing", "long text ", "", 100, 3_000_000),
        ("", "<tool_call>x</tool_call>", "", 1_000_000, 1_000_000),
        ("<tool_call>{'", "<tool_call>x</tool_call>", "", 1, 100_000),
        ("<tool_call>{'", "</tool_call><tool_call>x", "", 100_000, 100_000),
        ("<tool_call>", "[", "", 100_000, 100_000),
        ("<tool_call>{'", "\\'", "", 1, 100_000),
        ("<tool_call>{'", ">", "", 1, 100_000),
        ("", "<tool_call>{\"'\"'", "", 100_000, 100_000),
        ("", "<tool_call>[\"\",',\",','", "", 100_000, 100_000),
        ("", "<tool_call>[\"\",',\",','", "", 1, 50_000),
        ("", '<tool_call>{"name": "f"}</tool_call>', "", 100_000, 100_000),
        ("<tool_call>{}</tool_call>", "\n", "", 1, 50_000),
    ],
)
def test_the_time_is_linear_in_the_text(first, repeated, last, piece, length):
    def seconds(length):
        text = first + repeated * (length // len(repeated)) + last
        pieces = [text[i : i + piece] for i in range(0, len(text), piece)]
        begin = time.process_time()
        streamed(pieces)
        return time.process_time() - begin

    # Ten times the text: ten times as long, or a hundred times if it were quadratic. One of five
    # comparisons must show it: other processes may disturb some.
    assert any(seconds(length) < 30 * max(seconds(length // 10), 0.005) for _ in range(5))


# Valid blocks


def test_the_card_s_example():
    assert call(CARD) == ("get_stock_fundamentals", {"symbol": "TSLA"})


@pytest.mark.parametrize(
    ("text", "said", "called"),
    [
        ("no call", "no call", []),
        ("", "", []),
        (" \n", " \n", []),
        (f"\n{block(F)}", "", ["f"]),
        (f"Let me see.{block(F)}", "Let me see.", ["f"]),
        (f"Let me see.\n{block(F)}\n{block(G)}\n", "Let me see.", ["f", "g"]),
        (f"{block(F)}{block(G)}", "", ["f", "g"]),
        (f" before {block(F)} between {block(G)} after ", " before\nbetween\nafter ", ["f", "g"]),
        (f"<think>long</think>\n\n{block(F)}\n\n ", "<think>long</think>", ["f"]),
        (f"{block(F)}<|im_end|>", "<|im_end|>", ["f"]),
        (f"R&D says 1 < 2\n{block(F)}", "R&D says 1 < 2", ["f"]),
    ],
)
def test_text_around_calls_is_kept_without_the_whitespace_next_to_them(text, said, called):
    reply = parse_tool_calls(text)
    assert (reply.text, names(reply), reply.errors) == (said, called, [])


@pytest.mark.parametrize(
    "end",
    [
        "</tool_call>",
        "\n</tool_call>",
        "",
        "\n",
        "</tool_call",
        "\n</",
        "<tool_call",
        ",\n</tool_call>",
    ],
)
def test_a_call_cut_off_at_the_end_is_kept(end):
    assert call(f"<tool_call>{F}{end}") == ("f", {"x": 1})


def test_the_next_tag_closes_a_block_too():
    reply = parse_tool_calls(f"<tool_call>{F}\n<tool_call>{G}</tool_call>")
    assert names(reply) == ["f", "g"] and not reply.errors
    assert [one.span for one in reply.calls] == [(0, 48), (48, 110)]


def test_keys_may_come_in_either_order_with_others_among_them():
    for text in (
        F,
        '{"arguments": {"x": 1}, "name": "f"}',
        '{"id": 7, "arguments":{"x":1},"type":"t","name":"f"}',
    ):
        assert call(block(text)) == ("f", {"x": 1})


def test_the_last_of_two_equal_keys_counts():
    text = '{"name": "e", "arguments": {"x": 0, "x": 1}, "name": "f"}'
    assert call(block(text)) == ("f", json.loads(text)["arguments"])


@pytest.mark.parametrize(
    "arguments", ["", ', "arguments": {}', ', "arguments": null', ", 'arguments': '{}'"]
)
def test_a_call_without_arguments(arguments):
    assert call(block('{"name": "now"' + arguments + "}")) == ("now", {})


def test_names_are_taken_as_they_are():
    for name in ("Get_Weather", "get weather", " f ", "日本", "a.b-c"):
        assert call(block(json.dumps({"name": name, "arguments": {}})))[0] == name


@pytest.mark.parametrize(
    ("rest", "keys"),
    [
        ('"args": {"x": 1}', "'args'"),
        ('"parameters": {"x": 1}', "'parameters'"),
        ('"input": {"x": 1}, "id": "abcDEF123"', "'input'"),
        ('"arguments": null, "kwargs": {}', "'kwargs'"),
        ('"arguments": {}, "args": {"x": 1}', "'args'"),
        ('"arguments": " ", "city": "Rome"', "'city'"),
        ('"city": "Rome", "days": 3', "'city', 'days'"),
        ('"id": 7', "'id'"),
        ('"type": "forecast"', "'type'"),
    ],
)
def test_arguments_under_another_key_are_an_error(rest, keys):
    said = error(block('{"name": "f", ' + rest + "}"))
    assert said == (
        f"the call of 'f' has no \"arguments\", but {keys}: "
        'write {"name": ..., "arguments": {...}}'
    )


@pytest.mark.parametrize(
    "rest", ['"id": "abcDEF123", "type": "function"', '"arguments": {}, "why": "x", "args": {}']
)
def test_keys_about_a_call_without_arguments_are_no_error(rest):
    assert call(block('{"name": "now", ' + rest + "}")) == ("now", {})


def test_arguments_in_a_string_are_decoded_once():
    inner = json.dumps({"p": '{"q": "1"}'})
    assert call(block(json.dumps({"name": "f", "arguments": inner}))) == ("f", {"p": '{"q": "1"}'})
    assert call(block('{"name": "f", "arguments": " "}')) == ("f", {})
    assert "not an object in JSON" in error(block('{"name": "f", "arguments": "Paris"}'))
    assert "not an object" in error(
        block(json.dumps({"name": "f", "arguments": json.dumps(inner)}))
    )
    assert "not an object in JSON: 2 values" in error(block('{"name": "f", "arguments": "{} {}"}'))


@pytest.mark.parametrize("string", STRINGS)
def test_every_string_is_read_in_json_and_in_python(string):
    assert argument(json.dumps(string)) == string
    assert argument(json.dumps(string, ensure_ascii=False)) == string
    assert argument(repr(string)) == string


def test_line_breaks_in_strings_need_no_escape():
    assert argument('"a\nb\r\n\tc"') == argument("'a\nb\r\n\tc'") == "a\nb\r\n\tc"
    assert argument(json.dumps(STRINGS[-1]).replace("\\n", "\n")) == STRINGS[-1]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (r'"\u00e9 \/ \" \\ \b\f\n\r\t"', 'é / " \\ \b\f\n\r\t'),
        (r'"\ud83d\ude00"', "😀"),
        (r"'it\'s \x41\101\a\v\0'", "it's AA\a\v\0"),
        (r'"it\'s"', "it's"),
        (r'"\d+\.\w \N{DASH}"', r"\d+\.\w \N{DASH}"),
        ("'a\\\nb'", "ab"),
        ("'C:/x \\U0001F600'", "C:/x 😀"),
    ],
)
def test_escapes(written, value):
    assert argument(written) == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("[true, True, false, False, null, None]", [True, True, False, False, None, None]),
        ("{'a': true, \"b\": None, 'c': [1,],}", {"a": True, "b": None, "c": [1]}),
        ("(1, 'a', (), (2,), (3))", [1, "a", [], [2], 3]),
        ("[[], {}, [{}], {'a': []}]", [[], {}, [{}], {"a": []}]),
        ('[{"a": 1}, {"b": [2, {"c": 3}]}]', [{"a": 1}, {"b": [2, {"c": 3}]}]),
        ("\r\n\t[\n1\n,\n2\n]\n", [1, 2]),
        ("+1", 1),
        ("[.5, 1., -2.5e-3, 1E5]", [0.5, 1.0, -0.0025, 100000.0]),
        (str(10**30), 10**30),
        ("9" * MAX_NUMBER, int("9" * MAX_NUMBER)),
        (
            "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2),
            json.loads("[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)),
        ),
    ],
)
def test_json_python_and_mixtures(written, value):
    assert argument(written) == value


def test_numbers_keep_their_kind():
    read = argument('[1, 1.0, true, -0, -0.0, "1"]')
    assert [type(value) for value in read] == [int, float, bool, int, float, str]
    assert math.copysign(1, read[4]) == -1


def test_literals_mean_what_json_and_python_mean_by_them():
    generator = random.Random(4)
    for _ in range(500):
        value = random_value(generator, 4)
        for text in (
            json.dumps(value),
            json.dumps(value, ensure_ascii=False, indent=generator.randrange(3)),
        ):
            assert read_literals(text) == [json.loads(text)] == [value]
        assert read_literals(repr(value)) == [ast.literal_eval(repr(value))]


def test_a_damaged_literal_raises_value_error_or_can_be_written_as_json():
    generator = random.Random(5)
    survived = 0
    for _ in range(4000):
        text = generator.choice([repr, json.dumps])(random_value(generator, 3))
        at = generator.randrange(len(text))
        text = (
            text[:at]
            + generator.choice("{}[]()\"'\\,:x0.u \ud800")
            + text[at + generator.randrange(3) :]
        )
        try:
            values = read_literals(text)
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 200
        else:
            survived += 1
            json.dumps(values, allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert survived > 500


# Invalid blocks


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("", "nothing to read"),
        ("f(x=1)", "'f' at character 1 is not a value"),
        ('"f"', "an object with"),
        ("5", "an object with"),
        ("null", "an object with"),
        (f"[{F}]", "an object with"),
        (f"{F}\n{F}", "2 values"),
        (f"{F}}}", "expected a value at character 37, not '}'"),
        (f"{F} and so on", "'and' at character 38"),
        (F[:-1], "expected ',' or '}' at character 37, not the end"),
        (F.replace(",", ""), "expected ',' or '}' at character 14, not '\"'"),
        (F.replace("f", 'f"'), "expected ',' or '}' at character 13, not '\"'"),
        ("{name: 'f'}", "'name' at character 2"),
        ("{1: 2}", "key before character 3 is not a string"),
        ('{"name" "f"}', "expected ':'"),
        ('{"name"}', "expected ':'"),
        ('{"name": }', "expected a value"),
        ("{'name': 'it's'}", "expected ',' or '}' at character 14, not 's'"),
        ('{"arguments": {}}', 'no "name"'),
        ('{"name": 5}', 'no "name"'),
        ('{"name": ""}', 'no "name"'),
        ('{"name": "f", "arguments": [1]}', "are not an object"),
        ('{"name": "f", "arguments": 0}', "are not an object"),
        ("```json\n{}\n```", "expected a value"),
    ],
)
def test_a_block_that_is_not_a_call_is_one_error(inside, message):
    text = block(inside)
    assert message in error(text)
    reply = parse_tool_calls(f"a {text} b {block(G)}")
    assert reply.text == "a\nb" and names(reply) == ["g"]
    [one] = reply.errors
    assert one.span == (2, 2 + len(text)) and one.source == text


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("NaN", "'NaN' at character"),
        ("-Infinity", "not '-'"),
        ("1e999", "too large"),
        ("9" * 5001, "5001 characters"),
        ("9" * 5001 + ".5", "5003 characters"),
        ("007", "not '0'"),
        ("1_000", "not '_'"),
        ("0x1F", "not 'x'"),
        ("1+2j", "not '+'"),
        ("{1, 2}", "key before"),
        ("{'a', 'b'}", "expected ':'"),
        ("b'a'", "'b' at character"),
        ("set()", "'set' at character"),
        ("__import__('os')", "'__import__' at character"),
        ("'a' 'b'", "expected ',' or '}'"),
        ("[1,,2]", "expected a value"),
        ("[,]", "expected a value"),
        ("[1}", "expected ',' or ']'"),
        ("undefined", "'undefined' at character"),
        ('"\\ud800"', "half a surrogate pair"),
        ('"\ud800"', "half a surrogate pair"),
        ('"\\u12"', "without its hexadecimal digits"),
        ("'\\U00110000'", "beyond Unicode"),
        ("[" * 99 + "]" * 99, "more than 100 brackets"),
        ("[" * 100_000, "more than 100 brackets"),
        ("[" * 100_000 + "]" * 100_000, "more than 100 brackets"),
    ],
)
def test_a_value_that_json_cannot_hold_is_an_error(written, message):
    assert message in error(with_argument(written))
    inner = json.dumps({"name": "f", "arguments": f'{{"x": {written}}}'})
    if len(written) < 100:
        assert '"arguments" of' in error(block(inner)) or "surrogate" in error(block(inner))


def test_a_broken_block_ends_at_the_first_tag_in_it():
    unclosed = '<tool_call>{"name": "f", "arguments": {"a": "b}}</tool_call>'
    reply = parse_tool_calls(f"{unclosed}\n{block(F)} and {block(G)}")
    assert (reply.text, names(reply)) == ("and", ["f", "g"])
    [one] = reply.errors
    assert (
        one.source == unclosed and "string that begins at character 33 is not closed" in one.message
    )
    reply = parse_tool_calls(f'<tool_call>{{"name": "f" "x": "</tool_call>"}}{block(G)}')
    assert (reply.text, names(reply)) == ('"}', ["g"])
    reply = parse_tool_calls(f"<tool_call>oops {block(F)}")
    assert [one.source for one in reply.errors] == ["<tool_call>oops "] and names(reply) == ["f"]
    reply = parse_tool_calls(f"{block(F)}<tool_call>{F[:20]}")
    assert [one.source for one in reply.errors] == [f"<tool_call>{F[:20]}"] and names(reply) == [
        "f"
    ]


def test_a_readable_block_that_is_not_a_call_ends_after_its_strings():
    assert 'no "name"' in error(block('{"arguments": {"html": "</tool_call>"}}'))


def test_megabytes_of_anything_are_read():
    for text in ("x" * 10**6, " " * 10**6, "<" * 10**6, "{" * 10**6):
        assert parse_tool_calls(text).text == text
    assert "not closed" in error("<tool_call>{'" + "</tool_call" * 10**5)
    assert argument(f'"{"x" * 10**6}"') == "x" * 10**6


# Untagged JSON


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        F,
        f"\n{F}\n",
        f"[{F}]",
        f"[{F}, 5]",
        f"```json\n{F}\n```",
        f"<function_call>\n{F}\n</function_call>",
        '<function=f>{"x": 1}</function>',
        '{"name": "Ada", "born": 1815}',
        f"This is not a tool call: {F}",
        f"{F} as I said",
        F[:-3],
        "```",
        "[oops",
        "{hello world}",
    ],
)
def test_a_call_without_its_tag_is_text(text):
    assert parse_tool_calls(text) == Reply(text, [], [])


def test_only_the_tag_and_the_keys_of_a_call_count():
    assert names(parse_tool_calls(f"```xml\n{block(F)}\n```")) == ["f"]
    for inside in (f"[{F}, {G}]", f"{F}\n{G}", f"{F}, {G}", f"[{F}]\n[{G}]", f"({F}, {G})"):
        assert not parse_tool_calls(block(inside)).calls


def test_call_of_reads_arguments_in_a_string():
    assert call_of({"name": "f", "arguments": '{"x": 1}'}) == ("f", {"x": 1})
    with pytest.raises(ValueError, match="an object with"):
        call_of([])


def test_100_brackets_inside_each_other_are_the_limit():
    assert read_literals("[" * 100 + "]" * 100)
    with pytest.raises(ValueError, match="more than 100 brackets"):
        read_literals("[" * 101 + "]" * 101)


def test_a_number_of_640_characters_is_the_limit():
    assert read_literals("1" * 640) == [int("1" * 640)]
    with pytest.raises(ValueError, match="641 characters; the limit is 640"):
        read_literals("1" * 641)


def test_an_escape_beyond_unicode_is_named():
    assert read_literals('"\\U0010FFFF"') == [chr(0x10FFFF)]
    with pytest.raises(ValueError, match="an escape beyond Unicode"):
        read_literals('"\\U00110000"')


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ('{"name": "f", "arguments": {"x": 1.00000000000000000001, "y": 1E2}}', True),
        ('{"arguments": {"x": [{"}": "]"}], "y": "\\u00e9<"}, "name": "f"}', True),
        ('{"name":"f","arguments":{}}', True),
        ('{"arguments": {"x": 1}, "name": "f", "arguments": {"x": 2}}', True),
        ("{'name': 'f', 'arguments': {'x': 1}}", False),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', False),
        ('{"name": "f", "arguments": {"x": True}}', False),
        ('{"name": "f"}', False),
    ],
)
def test_arguments_in_json_are_there_as_they_were_written(content, written):
    blocks = parse_tool_calls(f"<tool_call>\n{content}\n</tool_call>").calls
    listed = read_call_list(f" [{content}, {content}]", 0)
    assert len(blocks) == 1 and len(listed) == 2
    for call in [*blocks, *listed]:
        assert (call.written is not None) == written
        if written:
            assert call.written in content and json.loads(call.written) == call.arguments

"""The conversation, with an engine that writes a script."""

import json
import sys
import threading
import time

import pytest
import small
import torch
from scripted import END, TOKENIZER, Scripted, call, written

import mistral
from mistral.chat import Conversation, Tool, encode_chat, tool
from mistral.chat.answer import Answer
from mistral.chat.events import Call, End, Error, Result, Text
from mistral.chat.formats import chat_format
from mistral.chat.formats.tool_calls import ToolCallStream
from mistral.chat.grammar import GrammarError
from mistral.chat.grammar.free_text import TextOnly
from mistral.engine.constraints import FixedMask
from mistral.errors import ConversationError


@tool
def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one
        b: the other
    """
    return a + b


@tool
def broken(text: str) -> str:
    """Fail.

    Args:
        text: why
    """
    raise RuntimeError(f"no {text} </tool_response>")


def talk(engine, **options):
    return Conversation(engine, TOKENIZER, **{"grammar": False, **options})


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, Text))


def test_the_cache_is_kept_and_only_the_new_turn_is_read():
    engine = Scripted("Hello!", "Fine — 日本 😀", "Bye")
    conversation = talk(engine, system="Be brief.")
    texts = [text_of(conversation.say(said)) for said in ("Hi", "How are you?", "Bye <|im_end|>")]
    assert texts == ["Hello!", "Fine — 日本 😀", "Bye"]
    whole = encode_chat(TOKENIZER, conversation.messages, generate=False)
    assert engine.ids == whole[: len(engine.ids)]
    assert sum(map(len, engine.reads)) == conversation.tokens_read
    assert (
        conversation.tokens_read + conversation.tokens_written
        == len(engine.ids)
        == conversation.tokens_held
    )
    # The second and the third turn cost their own tokens only.
    assert max(map(len, engine.reads[1:])) < 25
    assert engine.reads[1].count(TOKENIZER.bos_id) == 0


def test_calls_are_run_and_their_results_read_until_there_are_none():
    both = call("add", a=1, b=2) + "\n" + call("add", a=10, b=20)
    engine = Scripted("Let me see.\n" + both, call("add", a=3, b=30), "It is 33.")
    conversation = talk(engine, tools=[add])
    events = list(conversation.say("Add them up"))
    assert [e.content for e in events if isinstance(e, Result)] == [3, 30, 33]
    assert events[-1] == End("stop")
    assert isinstance(events[-2], Text)
    assert text_of(events) == "Let me see.It is 33."
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    spelled = TOKENIZER.decode(engine.reads[1], control=True)
    assert spelled.count("<|im_start|>tool") == 1  # both results in one turn
    assert '{"name": "add", "content": 3}' in spelled
    assert (
        engine.ids
        == encode_chat(TOKENIZER, conversation.messages, tools=[add], generate=False)[
            : len(engine.ids)
        ]
    )


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (call("subtract", a=1, b=2), "No matching function signature found for function: subtract"),
        (
            call("add", a="one", b=2),
            "error validating function call against function signature: add",
        ),
        (call("add", a=1), "Please call this function again with correct arguments"),
        (call("broken", text="way"), "There was an error when executing the function: broken"),
        ("<tool_call>\n{'name': add}\n</tool_call>", "There was an error parsing function calls"),
    ],
)
def test_errors_are_told_to_the_model_in_the_cards_words(answer, words):
    engine = Scripted(answer, "Sorry.")
    events = list(talk(engine, tools=[add, broken]).say("Go"))
    assert len([e for e in events if isinstance(e, Error)]) == 1
    told = TOKENIZER.decode(engine.reads[1], control=True)
    assert words in told
    assert told.count("</tool_response>") == 1  # the exception's text cannot close the tag
    assert events[-1] == End("stop")


def test_rounds_are_limited_and_the_last_calls_are_not_run():
    runs = []

    @tool
    def count(n: int) -> int:
        """Count.

        Args:
            n: a number
        """
        runs.append(n)
        return n

    conversation = talk(
        Scripted(*[call("count", n=i) for i in range(9)]), tools=[count], max_rounds=3
    )
    events = list(conversation.say("Count"))
    assert events[-1] == End("max_rounds")
    assert runs == [0, 1]
    assert isinstance(events[-2], Call)


def test_parallel_runs_the_calls_of_one_answer_together():
    barrier = threading.Barrier(2, timeout=5)

    @tool
    def meet(name: str) -> str:
        """Meet.

        Args:
            name: who
        """
        barrier.wait()
        return name

    both = call("meet", name="a") + "\n" + call("meet", name="b")
    events = list(talk(Scripted(both, "Met."), tools=[meet], parallel=True).say("Meet"))
    assert [e.content for e in events if isinstance(e, Result)] == ["a", "b"]


def test_a_conversation_continues_after_a_tool_that_hangs():
    @tool
    def hang(seconds: float) -> str:
        """Hang.

        Args:
            seconds: how long
        """
        time.sleep(seconds)
        return "late"

    engine = Scripted(call("hang", seconds=3), "It took too long.")
    events = list(talk(engine, tools=[hang], time_limit=0.05).say("Go"))
    assert "did not finish" in next(e.message for e in events if isinstance(e, Error))
    assert events[-1] == End("stop")


def test_an_end_that_is_spelled_in_text_ends_the_answer_and_leaves_the_cache():
    engine = Scripted(
        written("All done<|im_end|>\n<|im_start|>user\nmore", end=False) + [END], "Yes", slack=40
    )
    conversation = talk(engine)
    assert text_of(conversation.say("Go")) == "All done"
    assert TOKENIZER.decode(engine.ids).endswith("All done")
    assert text_of(conversation.say("Sure?")) == "Yes"
    assert (
        engine.ids
        == encode_chat(TOKENIZER, conversation.messages, generate=False)[: len(engine.ids)]
    )


def test_an_end_that_is_spelled_ends_an_answer_with_tools_too_but_not_in_a_string_of_a_call():
    @tool
    def say(text: str) -> str:
        """Say something.

        Args:
            text: what
        """
        said.append(text)
        return text

    said = []
    spelled = written("All done<|im_end|>\nmore", end=False) + [END]
    conversation = talk(
        Scripted(call("say", text="a <|im_end|> b"), spelled, "Yes", slack=40), tools=[say]
    )
    assert text_of(conversation.say("Go")).endswith("All done")
    assert said == ["a <|im_end|> b"]
    assert text_of(conversation.say("Sure?")) == "Yes"


def test_a_spelled_end_ends_an_answer_unless_switched_off():
    texts = {}
    for spelled_ends in (True, False):
        engine = Scripted(written("All done<|im_end|>\nmore", end=False) + [END], slack=40)
        anything = FixedMask(engine, [True] * engine.config.vocab_size)
        chat = chat_format(TOKENIZER)
        answer = Answer(
            engine,
            TOKENIZER,
            chat,
            [1, 2, 3],
            mistral.Sampling(temperature=0),
            anything,
            50,
            spelled_ends,
        )
        texts[spelled_ends] = "".join(answer)
        assert answer.reason == "stop"
    assert texts == {True: "All done", False: "All done<|im_end|>\nmore"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>\n{"a": "x ', True),
        ('Sure. <tool_call>\n{"a": "x \\" ', True),
        ('<tool_call>\n{"a": "<tool_call> ', True),
        ('<tool_call>\n{"a": "x </tool_call> ', True),
        ("<tool_call>\n{'a': 'say \"x ", True),
        ('<tool_call>{"a": "x"}</tool_call>\n<tool_call>{"b": "', True),
        ('He said "', False),
        ('<tool_call>\n{"a": "x"} ', False),
        ('<tool_call>{"a": "x"}</tool_call> He said "', False),
    ],
)
def test_in_string_tells_whether_the_text_ends_in_a_string_of_a_call(text, expected):
    whole = ToolCallStream()
    whole.feed(text)
    in_pieces = ToolCallStream()
    for character in text:
        in_pieces.feed(character)
    assert whole.in_string == in_pieces.in_string == expected


def test_an_answer_is_parsed_once(monkeypatch):
    """Each spelled end must be judged by its place; none of these 800 ends the turn."""
    fed = []
    feed = ToolCallStream.feed
    monkeypatch.setattr(
        ToolCallStream, "feed", lambda self, piece: fed.append(len(piece)) or feed(self, piece)
    )
    text = call("add", a="x <|im_end|> <|im_start|> " * 400, b=2)
    conversation = talk(Scripted(text, "Done", limit=30_000), tools=[add], max_new_tokens=20_000)
    events = list(conversation.say("Go"))
    assert [type(event) for event in events] == [Call, Error, Text, End]
    assert conversation.messages[1]["content"] == text
    assert sum(fed) <= 2 * len(text)


def test_max_new_tokens_end_an_answer_and_no_call_of_it_is_run():
    engine = Scripted(call("add", a=1, b=2) + " and more text", "Hm")
    conversation = talk(
        engine, tools=[add], max_new_tokens=len(written(call("add", a=1, b=2), end=False))
    )
    events = list(conversation.say("Go"))
    assert events[-1] == End("length")
    assert not any(isinstance(e, Result) for e in events)
    assert text_of(conversation.say("And?")) == "Hm"


@pytest.mark.parametrize("slack", [None, 0])
def test_what_was_heard_stays_when_the_listener_leaves(slack):
    engine = Scripted("One two three four five six", "Seven", slack=slack)
    conversation = talk(engine)
    answer = conversation.say("Count")
    heard = next(answer).text + next(answer).text
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": heard}
    assert text_of(conversation.say("Go on")) == "Seven"
    assert (
        engine.ids
        == encode_chat(TOKENIZER, conversation.messages, generate=False)[: len(engine.ids)]
    )


def test_ctrl_c_before_the_first_word_removes_the_question():
    engine = Scripted("One", "Two", fail_after=0)
    conversation = talk(engine, system="S")
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say("Count"))
    assert [message["role"] for message in conversation.messages] == ["system"]
    engine.fail_after = None
    assert text_of(conversation.say("Again")) == "Two"


def test_a_conversation_that_becomes_too_long_is_unchanged():
    engine = Scripted("Hello", "Never", limit=60)
    conversation = talk(engine)
    list(conversation.say("Hi"))
    before = list(conversation.messages)
    with pytest.raises(ConversationError, match="there is room for 60"):
        list(conversation.say("word " * 100))
    assert conversation.messages == before
    assert text_of(conversation.say("Hi")) == "Never"


def test_a_result_that_is_too_long_becomes_an_error_that_the_model_reads():
    @tool
    def page(n: int) -> str:
        """Read a page.

        Args:
            n: which
        """
        return "word " * n

    engine = Scripted(
        call("page", n=3) + "\n" + call("page", n=5000), "It was long.", "Yes", limit=1200
    )
    conversation = talk(engine, tools=[page])
    events = list(conversation.say("Read"))
    assert events[-1] == End("stop")
    told = TOKENIZER.decode(engine.reads[1])
    assert "the result is too long: 25,002 characters" in told
    assert '"content": "word word word "' in told
    assert text_of(conversation.say("Really?")) == "Yes"


def test_saying_something_else_ends_the_answer_before():
    conversation = talk(Scripted("One two three", "Four"))
    first = conversation.say("a")
    heard = next(first).text
    assert text_of(conversation.say("b")) == "Four"
    assert list(first) == []
    assert [m["content"] for m in conversation.messages] == ["a", heard, "b", "Four"]


def test_results_are_kept_if_the_caller_stops_listening():
    both = call("add", a=1, b=2) + call("add", a=3, b=4)
    conversation = talk(Scripted(both, "Seven"), tools=[add], parallel=True)
    answer = conversation.say("Add")
    while not isinstance(next(answer), Result):
        pass
    answer.close()
    assert [m["content"] for m in conversation.messages if m["role"] == "tool"] == ["3", "7"]
    assert text_of(conversation.say("And?")) == "Seven"


def test_ctrl_c_while_a_long_message_is_read_does_not_break_a_conversation_that_has_rolled(
    monkeypatch,
):
    model, tokenizer = mistral.load(small.DATA / "small", device="cpu")
    conversation = Conversation(model, tokenizer, max_new_tokens=4)
    for _ in range(3):
        list(conversation.say("Tell me more."))
    layer = model.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say("word " * 60))
    monkeypatch.setattr(layer, "forward", forward)
    before = list(conversation.messages)
    list(conversation.say("Again."))
    assert conversation.messages[:-2] == before
    fresh = mistral.Decoder(model, 1)
    fresh.prefill([encode_ids(conversation)])
    assert torch.allclose(fresh.logits, conversation.decoder.logits, atol=1e-4)


@pytest.mark.parametrize("text", ["", None, 3, "lone \ud800 surrogate"])
def test_what_cannot_be_said_is_refused(text):
    conversation = talk(Scripted("Hello"))
    with pytest.raises(ConversationError):
        list(conversation.say(text))
    assert conversation.messages == []


def test_reset_forgets_all_but_the_system_message():
    engine = Scripted("One", "Two", slack=0)
    conversation = talk(engine, system="S")
    list(conversation.say("A"))
    conversation.reset()
    list(conversation.say("B"))
    assert [message["content"] for message in conversation.messages] == ["S", "B", "Two"]
    assert engine.ids[0] == TOKENIZER.bos_id
    assert engine.ids.count(TOKENIZER.bos_id) == 1


def test_a_saved_conversation_continues(tmp_path):
    path = tmp_path / "talk.jsonl"
    engine = Scripted(call("add", a=1, b=2), "Three — 日本")
    conversation = talk(engine, tools=[add], system="S")
    list(conversation.say("1 + 2?"))
    conversation.save(path)
    assert len(path.read_text().splitlines()) == 1 + len(conversation.messages)
    other = Scripted("Welcome")
    again = Conversation.load(path, other, TOKENIZER, tools=[add], grammar=False)
    assert again.messages == conversation.messages
    assert text_of(again.say("Thanks")) == "Welcome"
    assert other.ids[: len(engine.ids)] == engine.ids
    with pytest.raises(ConversationError, match="other tools"):
        Conversation.load(path, other, TOKENIZER, grammar=False)
    with pytest.raises(
        ConversationError, match="has a format and a system already: leave them out"
    ):
        Conversation.load(path, other, TOKENIZER, tools=[add], system="T", format="chatml")


@pytest.mark.parametrize(
    "content", ["", "not json", "[1]", '{"role": "user", "content": "x"}', '{"format": "x"}\n3']
)
def test_a_file_that_is_not_a_conversation_is_refused(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises((ConversationError, ValueError), match="x.jsonl|format"):
        Conversation.load(tmp_path / "x.jsonl", Scripted(), TOKENIZER)


def test_control_tokens_and_rows_without_a_token_are_never_allowed_in_text():
    engine = Scripted("Hi")
    list(talk(engine).say("Hello"))
    allowed = set(engine.allowed[0].nonzero().flatten().tolist())
    assert allowed & TOKENIZER.control_ids <= {2, 32000, 32001}  # what ends an answer
    assert max(allowed) <= 32001


def test_tool_choice_none_parses_no_calls():
    events = list(talk(Scripted(call("add", a=1, b=2)), tools=[add], tool_choice="none").say("Go"))
    assert "<tool_call>" in text_of(events)
    assert not any(isinstance(e, Call) for e in events)


def test_invalid_arguments_are_refused():
    for options, words in (
        (dict(tool_choice="sub", tools=[add]), "no tool 'sub'"),
        (dict(format="none"), "no chat format"),
        (dict(max_rounds=0), "max_rounds"),
        (dict(tool_choice="required"), "needs tools"),
        (dict(tools=[add], format="mistral_instruct_v1"), "has no functions; use one of chatml"),
    ):
        with pytest.raises(ValueError, match=words):
            talk(Scripted(), **options)


@pytest.mark.parametrize("choice", ["required", "add"])
def test_a_choice_that_demands_a_call_is_refused_without_a_grammar(choice, monkeypatch):
    with pytest.raises(
        ConversationError,
        match=f"only a grammar can guarantee tool_choice '{choice}'.*grammar=True",
    ):
        talk(Scripted(), tools=[add], tool_choice=choice)
    odd = Tool.from_schema(
        {"name": "odd", "parameters": {"type": "object", "not": {"required": ["a"]}}}
    )
    with (
        pytest.warns(UserWarning, match="checked only after"),
        pytest.raises(ConversationError, match="only a grammar"),
    ):
        talk(Scripted(), tools=[add, odd], tool_choice=choice, grammar=True)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"needs llguidance.*\.\[chat\]"):
        talk(Scripted(), tools=[add], tool_choice=choice, grammar=True)


@pytest.mark.parametrize("choice", ["required", "add"])
def test_a_choice_that_demands_a_call_always_gets_one(choice):
    model, tokenizer = mistral.load("demo", device="cpu")
    noise = mistral.Sampling(temperature=1.5, seed=3)
    options = dict(sampling=noise, max_rounds=1, max_new_tokens=150)
    first = next(
        Conversation(model, tokenizer, tools=[add], tool_choice=choice, **options).say("Hello!")
    )
    assert isinstance(first, Call)
    assert {name: type(value) for name, value in first.arguments.items()} == {"a": int, "b": int}


def test_two_conversations_on_one_decoder_are_an_error():
    engine = Scripted("One", "Two", "Three")
    first = talk(engine)
    second = talk(engine)
    list(first.say("A"))
    before = list(engine.ids)
    with pytest.raises(ConversationError, match="a decoder of its own"):
        list(second.say("B"))
    assert (second.messages, engine.ids) == ([], before)
    engine.rewind(len(engine.ids))
    list(second.say("B"))
    assert len(engine.ids) == len(before)  # the number of tokens alone would not tell
    with pytest.raises(ConversationError, match=rf"decoder\.rewind\({len(before)}\)"):
        list(first.say("C"))
    engine.rewind(len(engine.ids))
    assert text_of(first.say("C")) == "Three"
    assert engine.ids == encode_chat(TOKENIZER, first.messages, generate=False)[: len(engine.ids)]


def test_a_decoder_of_several_rows_is_refused():
    engine = Scripted()
    engine.batch_size = 2
    with pytest.raises(ValueError, match="one row is needed, not of 2"):
        talk(engine)


V3 = mistral.Tokenizer(
    (small.TRUE_TOKENIZERS / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
)
CALLS_TOKEN = V3.control_id("[TOOL_CALLS]")


class Watched(Scripted):
    """Keeps every mask."""

    def __init__(self, *answers, **options):
        super().__init__(*answers, **options)
        self.masks = []

    def step(self, sampling, mask=None):
        self.masks.append(mask)
        return super().step(sampling, mask)


def mistral_talk(*answers, **options):
    """A conversation in the format of Mistral-7B-Instruct-v0.3.

    An answer that begins with [ is a list of calls.
    """
    ids = [
        [CALLS_TOKEN] * text.startswith("[") + V3.encode(text, bos=False) + [2] for text in answers
    ]
    engine = Watched(*ids)
    engine.config = small.config(vocab_size=32768, max_position_embeddings=4096)
    return engine, Conversation(engine, V3, **{"grammar": False, **options})


def test_mistrals_own_calls_are_read_and_their_results_refer_to_them(tmp_path):
    calls = [
        {"name": "add", "arguments": {"a": 1, "b": 2}, "id": "abcDEF123"},
        {"name": "add", "arguments": {"a": 10, "b": 20}},
        {"name": "subtract", "arguments": {}, "id": "too long, this"},
    ]
    engine, conversation = mistral_talk(
        json.dumps(calls), "It is 33 [sic].", "Bye", tools=[add], system="Be brief."
    )
    events = list(conversation.say("Add them up"))
    assert [e.id for e in events if isinstance(e, Call)] == ["abcDEF123", "000002001", "000002002"]
    assert [e.content for e in events if isinstance(e, Result)] == [3, 30]
    assert text_of(events) == "It is 33 [sic]."
    assert events[-1] == End("stop")
    told = V3.decode(engine.reads[1], control=True)
    assert '</s>[TOOL_RESULTS]{"content": 3, "call_id": "abcDEF123"}[/TOOL_RESULTS]' in told
    assert '{"content": 30, "call_id": "000002001"}' in told
    assert "No matching function signature found for function: subtract" in told
    assert "<tool_call>" not in told
    assert conversation.messages[2]["tool_calls"][0]["function"] == {
        "name": "add",
        "arguments": '{"a": 1, "b": 2}',
    }
    # The user speaks again: the tools move, and the whole conversation is encoded again.
    assert text_of(conversation.say("Bye")) == "Bye"
    whole = encode_chat(V3, conversation.messages, tools=[add], generate=False)
    assert engine.ids == whole[: len(engine.ids)]
    assert whole.count(CALLS_TOKEN) == 1
    conversation.save(tmp_path / "talk.jsonl")
    again = Conversation.load(tmp_path / "talk.jsonl", Scripted(), V3, tools=[add], grammar=False)
    assert again.messages == conversation.messages


@pytest.mark.parametrize(
    "answer", ['[{"name": "add", "arguments": [1, 2]}]', '[{"name": "add", "argum', "[]", "[3]"]
)
def test_mistrals_calls_that_cannot_be_read_are_told_to_the_model(answer):
    engine, conversation = mistral_talk(answer, "Sorry.", tools=[add])
    events = list(conversation.say("Go"))
    assert [type(event) for event in events if not isinstance(event, Text)] == [Error, End]
    assert text_of(events) == "Sorry."
    assert conversation.messages[1] == {"role": "assistant", "content": answer}
    assert "error parsing function calls" in V3.decode(engine.reads[1])


def test_the_call_token_is_allowed_only_at_the_beginning():
    calls = json.dumps([{"name": "add", "arguments": {"a": 1, "b": 2}}])
    engine, conversation = mistral_talk(calls, "Three", tools=[add])
    list(conversation.say("Go"))
    begins = len(engine.masks) - len(V3.encode("Three", bos=False)) - 1
    assert [n for n, mask in enumerate(engine.masks) if mask[0, CALLS_TOKEN]] == [0, begins]
    for options in ({}, {"tools": [add], "tool_choice": "none"}):
        engine, conversation = mistral_talk("Hello", **options)
        assert text_of(conversation.say("Go")) == "Hello"
        assert not any(mask[0, CALLS_TOKEN] for mask in engine.masks)


@pytest.mark.parametrize("choice", ["required", "add"])
def test_mistrals_calls_follow_the_tools_schemas(choice):
    torch.manual_seed(0)
    model = mistral.Mistral(small.config(vocab_size=32768, max_position_embeddings=8192))
    said = dict(tools=[add, broken], tool_choice=choice, sampling=mistral.Sampling(seed=1))
    for limit in (4000, 1):
        conversation = Conversation(model, V3, max_new_tokens=limit, max_rounds=1, **said)
        *events, end = conversation.say("Go")
        assert conversation.tokens_written and conversation.tokens_saved
        if limit == 1:
            assert end == End("length")
            continue
        assert events and all(isinstance(event, Call) for event in events)
        for event in events:
            assert choice in ("required", event.name)
            kind = int if event.name == "add" else str
            assert all(isinstance(value, kind) for value in event.arguments.values())
        assert end == End("max_rounds")


def test_mistrals_answer_is_free_until_it_begins_with_the_calls_token():
    _, conversation = mistral_talk(tools=[add], grammar=True)
    constraint = conversation._constraints["auto"]
    for first in (CALLS_TOKEN, V3.encode("Hello", bos=False)[0]):
        one = constraint.copy()
        assert one.mask()[CALLS_TOKEN] and one.mask()[first]
        one.accept(first)
        allowed = {
            V3.token_bytes(id).strip() for id in one.mask().nonzero().flatten().tolist() if id != 2
        }
        assert (b"Hello" in allowed) == (first != CALLS_TOKEN)
        assert b"[{" in allowed
        assert not one.mask()[CALLS_TOKEN]
    assert constraint.mask()[CALLS_TOKEN] and constraint.forced() == []


def test_a_promised_call_needs_the_grammar():
    with pytest.raises(ConversationError, match="only a grammar can guarantee"):
        mistral_talk(tools=[add], tool_choice="required")


def test_a_mistral_model_may_write_what_ends_a_turn_in_chatml():
    said = "ChatML ends a turn with <|im_end|> and goes on."
    _, conversation = mistral_talk(said)
    assert text_of(conversation.say("How?")) == said


def test_the_mask_of_plain_text_is_copied_to_the_device_once():
    class OnMeta(Scripted):
        logits = torch.zeros(1, 32032, device="meta")

    text_only = TextOnly(OnMeta(), TOKENIZER, (END,))
    mask = text_only.mask()
    assert mask.device.type == "meta"
    assert text_only.mask() is mask


def test_the_cards_example_runs():
    @tool
    def get_stock_fundamentals(symbol: str) -> dict:
        """Get fundamental data for a given stock symbol using yfinance API.

        Args:
            symbol: The stock symbol.
        """
        return {
            "symbol": symbol,
            "company_name": "Tesla, Inc.",
            "pe_ratio": 49.604652,
            "dividend_yield": None,
        }

    engine = Scripted(
        "<tool_call>\n{'arguments': {'symbol': 'TSLA'}, 'name': "
        "'get_stock_fundamentals'}\n</tool_call>",
        "The stock fundamentals data for Tesla (TSLA) are as follows: ...",
    )
    events = list(
        talk(engine, tools=[get_stock_fundamentals]).say(
            "Fetch the stock fundamentals data for Tesla (TSLA)"
        )
    )
    assert events[0].arguments == {"symbol": "TSLA"}
    assert '"dividend_yield": null' in TOKENIZER.decode(engine.reads[1])
    assert text_of(events).startswith("The stock fundamentals")


def test_a_conversation_rolls_over_the_window_of_a_real_model():
    model, tokenizer = mistral.load(small.DATA / "small", device="cpu")
    conversation = Conversation(model, tokenizer, max_new_tokens=6)
    for _ in range(4):
        list(conversation.say("Tell me more."))
    assert conversation.tokens_held > 4 * model.config.sliding_window
    fresh = mistral.Decoder(model, 1)
    fresh.prefill([encode_ids(conversation)])
    assert fresh.lengths == conversation.decoder.lengths
    assert torch.allclose(fresh.logits, conversation.decoder.logits, atol=1e-4)


def encode_ids(conversation):
    """The ids that the conversation's decoder holds."""
    return conversation.decoder._history[0, : conversation.tokens_held].tolist()

"""The conversation, with an engine that writes a script."""

import json
import sys
import threading
import time
from typing import Literal

import pytest
import small
import torch
from pydantic import BaseModel
from scripted import END, TOKENIZER, Scripted, call, written

import mistral
from mistral.chat import Conversation, Tool, encode_chat, tool
from mistral.chat.answer import Answer
from mistral.chat.events import Altered, Call, End, Error, Result, Text, Trimmed, Unfinished
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
    conversation = talk(engine, tools=[hang], time_limit=0.05)
    events = list(conversation.say("Go"))
    message = "hang did not finish within 0.05 seconds"
    assert [e for e in events if not isinstance(e, (Call, Text))] == [
        Unfinished("hang", message),
        End("stop"),
    ]
    told = results_of(conversation)[0]["error"]
    assert message in told and "Do not repeat this call" in told
    assert "again" not in told


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


@pytest.mark.parametrize("slack", [4096, 0])
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


def answer_of(engine, **options):
    options = dict(max_new_tokens=50, sampling=mistral.Sampling(temperature=0)) | options
    return Answer(
        decoder=engine,
        tokenizer=TOKENIZER,
        chat=chat_format(TOKENIZER),
        prompt_ids=[1, 2, 3],
        constraint=FixedMask(engine, [True] * engine.config.vocab_size),
        **options,
    )


@pytest.mark.parametrize(
    ("stop", "text", "whole"),
    [(" Sam", "Hello", True), ("o Sam", "Hell", False), ("nothing", "Hello Sam!", True)],
)
def test_an_answer_knows_whether_its_ids_spell_its_text(stop, text, whole):
    engine = Scripted("Hello Sam!", slack=40)
    answer = answer_of(engine, stop=[stop])
    assert "".join(answer) == answer.text == text
    assert (answer.reason, answer.whole) == ("stop", whole)
    spelled = TOKENIZER.decode(answer.ids)
    assert (spelled == text) is whole and text.startswith(spelled)
    assert engine.ids == [1, 2, 3, *answer.ids]


def test_an_interrupted_answer_has_the_tokens_of_its_text():
    engine = Scripted("One two STOOL", slack=40)
    answer = answer_of(engine, stop=["STOP"])
    pieces = iter(answer)
    while len(answer.ids) < len(written("One two ST", end=False)):
        heard = next(pieces)
    del heard, pieces
    assert answer.reason == "interrupted"
    assert len(TOKENIZER.decode(answer.ids)) > len(answer.text)  # it may be the begin of STOP
    answer.settle()
    spelled = TOKENIZER.decode(answer.ids)
    assert answer.text == "One two " and answer.text.startswith(spelled)
    assert (answer.reason, answer.whole) == ("interrupted", spelled == answer.text)


@pytest.mark.parametrize(("max_new_tokens", "length"), [(2, 2), (50, 5)])
def test_an_answer_that_is_cut_off_says_so(max_new_tokens, length):
    engine = Scripted("one two three four five six seven", limit=8)
    answer = answer_of(engine, max_new_tokens=max_new_tokens)
    assert "".join(answer) == answer.text == TOKENIZER.decode(answer.ids)
    assert (answer.reason, len(answer.ids)) == ("length", length)


def test_a_conversation_that_becomes_too_long_is_unchanged():
    engine = Scripted("Hello", "Never", limit=60)
    conversation = talk(engine)
    list(conversation.say("Hi"))
    before = list(conversation.messages)
    with pytest.raises(ConversationError, match="there is room for 60"):
        list(conversation.say("word " * 100))
    assert conversation.messages == before
    assert text_of(conversation.say("Hi")) == "Never"


@tool
def page(n: int, as_list: bool = False) -> list[str] | str:
    """Read a page.

    Args:
        n: which
        as_list: its words one by one
    """
    words = [f"word{i}" for i in range(n)]
    return words if as_list else " ".join(words)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_result_that_is_too_long_is_shortened_with_a_marker(as_list):
    both = call("page", n=3) + "\n" + call("page", n=5000, as_list=as_list)
    engine = Scripted(both, "It was long.", "Yes", limit=1200)
    conversation = talk(engine, tools=[page], max_new_tokens=100)
    events = list(conversation.say("Read"))
    assert events[-1] == End("stop")
    [altered] = [e for e in events if isinstance(e, Altered)]
    assert altered.name == "page" and "is too long" in altered.message
    assert len([e for e in events if isinstance(e, Result)][1].content) >= 5000  # in full
    short, long = results_of(conversation)
    assert short == {"role": "tool", "name": "page", "content": "word0 word1 word2"}
    assert "the function ran; its result of" in long["content"]
    assert long["content"].startswith('["word0"' if as_list else "word0")
    assert long["content"].endswith('"word4999"]' if as_list else "word4999")
    assert "again" not in long["content"]
    told = TOKENIZER.decode(engine.reads[1])
    assert "[the function ran; its result of" in told and told.count("word4999") == 1
    assert 1000 < len(engine.ids) < 1200 - 50  # as much as fits, and room for the answer
    assert text_of(conversation.say("Really?")) == "Yes"


def results_of(conversation):
    return [message for message in conversation.messages if message["role"] == "tool"]


def test_a_result_that_json_cannot_hold_is_told_as_text():
    @tool
    def circle() -> list:
        """Draw a circle."""
        made = [1]
        made.append(made)
        return made

    conversation = talk(Scripted(call("circle"), "Done."), tools=[circle])
    events = list(conversation.say("Go"))
    assert [type(e) for e in events if not isinstance(e, Text)] == [Call, Result, Altered, End]
    [told] = results_of(conversation)
    assert told["content"].startswith("The function ran. JSON cannot hold its result")
    assert told["content"].endswith("[1, [...]]")
    assert "again" not in told["content"]


def test_what_json_text_a_function_returns_is_not_written_twice():
    texts = {
        "object": '{"price": 19.90, "city": "Zürich"}',
        "version": "3.10",
        "words": "sunny, 日本",
    }

    @tool
    def get(which: Literal["object", "version", "words"]) -> str:
        """Get a text."""
        return texts[which]

    both = "\n".join(call("get", which=which) for which in texts)
    engine = Scripted(both, "Done.")
    conversation = talk(engine, tools=[get])
    events = list(conversation.say("Go"))
    assert [e.content for e in events if isinstance(e, Result)] == [*texts.values()]
    told = TOKENIZER.decode(engine.reads[1])
    assert '"content": {"price": 19.90, "city": "Zürich"}}' in told
    assert '"content": "3.10"}' in told
    assert '"content": "sunny, 日本"}' in told


def interrupt(name):
    """A tool that is interrupted when it is called with 2."""

    @tool(name=name)
    def made(n: int) -> int:
        """Count."""
        if n == 2:
            raise KeyboardInterrupt
        return n

    return made


THREE = "\n".join(call("count", n=n) for n in (1, 2, 3))


@pytest.mark.parametrize("time_limit", [None, 30])
def test_ctrl_c_in_a_function_leaves_a_result_for_every_call(time_limit):
    conversation = talk(Scripted(THREE, "Yes"), tools=[interrupt("count")], time_limit=time_limit)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say("Count"))
    first, second, third = results_of(conversation)
    assert first["content"] == "1"
    assert "its outcome is not known: it was interrupted" in second["error"]
    assert "count was not called" in third["error"]
    assert "again" not in second["error"]
    assert text_of(conversation.say("And?")) == "Yes"


def test_ctrl_c_while_functions_run_together_keeps_what_is_known():
    conversation = talk(Scripted(THREE, "Yes"), tools=[interrupt("count")], parallel=True)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say("Count"))
    first, second, _ = results_of(conversation)
    assert first["content"] == "1"
    assert "its outcome is not known: it was interrupted" in second["error"]


def test_a_listener_who_leaves_between_results_leaves_one_for_every_call():
    conversation = talk(Scripted(THREE, "Yes"), tools=[interrupt("count")])
    answer = conversation.say("Count")
    for event in answer:
        if isinstance(event, Result):
            break
    answer.close()
    first, *others = results_of(conversation)
    assert first["content"] == "1"
    assert all("count was not called" in one["error"] for one in others) and len(others) == 2


@pytest.mark.parametrize("heard", [Call, Text])
def test_a_listener_who_leaves_at_a_call_leaves_a_result(heard):
    conversation = talk(Scripted("I see.\n" + call("add", a=1, b=2) + " x y", "Yes"), tools=[add])
    answer = conversation.say("Count")
    for event in answer:
        if isinstance(event, heard):
            break
    answer.close()
    told = [one["error"] for one in results_of(conversation)]
    assert told == [
        "The function add was not called: the answer ended before. Nothing has happened"
    ] * (heard is Call)


def test_calls_that_are_not_run_have_a_result_too():
    conversation = talk(
        Scripted(*[call("add", a=i, b=1) for i in range(3)]), tools=[add], max_rounds=2
    )
    assert list(conversation.say("Go"))[-1] == End("max_rounds")
    assert ["content" in one for one in results_of(conversation)] == [True, False]
    limit = len(written(call("add", a=1, b=2), end=False))
    conversation = talk(
        Scripted(call("add", a=1, b=2) + " more"), tools=[add], max_new_tokens=limit
    )
    assert list(conversation.say("Go"))[-1] == End("length")
    assert "add was not called" in results_of(conversation)[0]["error"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (call("broken", text="way"), "There was an error when executing the function: broken"),
        (call("add", a="one", b=2), "There was an error validating function call"),
        ("<tool_call>\n{'name': add}\n</tool_call>", "There was an error parsing function calls"),
    ],
)
def test_the_same_call_that_fails_twice_in_a_row_ends_the_answer(answer, words):
    conversation = talk(Scripted(*[answer] * 9, "Never"), tools=[add, broken], max_rounds=9)
    events = list(conversation.say("Go"))
    assert events[-1] == End("repeated_call")
    first, second = (one["error"] for one in results_of(conversation))
    assert words in first and words in second
    assert "again with correct" in first and "again with correct" not in second
    assert "The same call has failed twice in a row: do not repeat it" in second


def test_other_calls_may_fail_in_a_row():
    answers = [call("broken", text=text) for text in "abab"]
    conversation = talk(Scripted(*answers, "Sorry."), tools=[broken])
    assert list(conversation.say("Go"))[-1] == End("stop")


def test_a_call_whose_outcome_is_not_known_is_not_started_a_second_time():
    booked = []
    free = threading.Event()

    @tool
    def book(seat: str) -> str:
        """Book a seat."""
        booked.append(seat)
        free.wait(5)
        return "done"

    conversation = talk(Scripted(*[call("book", seat="4A")] * 3), tools=[book], time_limit=0.05)
    events = list(conversation.say("Book 4A"))
    free.set()
    assert booked == ["4A"]
    assert [type(e) for e in events] == [Call, Unfinished, Call, Unfinished, End]
    assert events[-1] == End("repeated_call")
    assert not any("again" in one["error"] for one in results_of(conversation))


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


# Editing the messages


def held_is_whole(engine, conversation, **options):
    """Whether the engine holds the messages as they are now."""
    whole = encode_chat(TOKENIZER, conversation.messages, generate=False, **options)
    return engine.ids == whole[: len(engine.ids)]


def change_the_system(messages):
    messages[0]["content"] = "Be long."


def remove_a_turn(messages):
    del messages[1:3]


def change_an_answer(messages):
    messages[2] = {"role": "assistant", "content": "Yes!"}


def insert_an_example(messages):
    messages[1:1] = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2."}]


def append_an_answer(messages):
    messages += [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2."}]


@pytest.mark.parametrize(
    "edit",
    [change_the_system, remove_a_turn, change_an_answer, insert_an_example, append_an_answer],
)
@pytest.mark.parametrize("slack", [4096, 0])
def test_the_model_reads_the_messages_as_they_are(edit, slack):
    engine = Scripted("Hello there", "Fine, thanks", "Bye", slack=slack)
    conversation = talk(engine, system="Be brief.")
    list(conversation.say("Hi"))
    list(conversation.say("How are you?"))
    edit(conversation.messages)
    edited = [dict(message) for message in conversation.messages]
    assert text_of(conversation.say("Go on")) == "Bye"
    assert conversation.messages[:-2] == edited
    assert held_is_whole(engine, conversation)
    assert len(engine.ids) == conversation.tokens_held


def test_messages_may_be_replaced_by_others():
    engine = Scripted("One", "Two")
    conversation = talk(engine)
    list(conversation.say("A"))
    conversation.messages = [
        {"role": "user", "content": "X"},
        {"role": "assistant", "content": "Y"},
    ]
    assert text_of(conversation.say("B")) == "Two"
    assert [m["content"] for m in conversation.messages] == ["X", "Y", "B", "Two"]
    assert held_is_whole(engine, conversation)


def test_an_edit_while_the_answer_is_written_is_noticed():
    engine = Scripted("One two three", "Four")
    conversation = talk(engine)
    for event in conversation.say("A"):
        if isinstance(event, Text):
            conversation.messages[0]["content"] = "changed"
    assert text_of(conversation.say("B")) == "Four"
    assert [m["content"] for m in conversation.messages] == [
        "changed",
        "One two three",
        "B",
        "Four",
    ]
    assert held_is_whole(engine, conversation)


def test_only_what_differs_is_read_again():
    engine = Scripted("One two three", "Four", "Five")
    conversation = talk(engine, system="S " * 200)
    list(conversation.say("A"))
    conversation.messages[-1]["content"] = "One two"
    list(conversation.say("B"))
    assert len(engine.reads[1]) < 40


def test_messages_that_cannot_be_read_are_a_conversation_error():
    conversation = talk(Scripted("One", "Two"))
    list(conversation.say("A"))
    conversation.messages[0] = {"role": "bot", "content": "A"}
    with pytest.raises(ConversationError, match="message 0 has the role 'bot'"):
        list(conversation.say("B"))
    conversation.messages[0] = {"role": "user", "content": "A"}
    assert text_of(conversation.say("B")) == "Two"


def test_undo_removes_the_last_question_and_its_answer():
    engine = Scripted(call("add", a=1, b=2), "Three", "Four")
    conversation = talk(engine, tools=[add], system="S")
    list(conversation.say("1 + 2?"))
    assert [m["role"] for m in conversation.undo()] == ["user", "assistant", "tool", "assistant"]
    assert [m["role"] for m in conversation.messages] == ["system"]
    with pytest.raises(ConversationError, match="no message of the user"):
        conversation.undo()
    with pytest.raises(ConversationError, match="no message of the user"):
        conversation.retry()
    assert text_of(conversation.say("2 + 2?")) == "Four"
    assert held_is_whole(engine, conversation, tools=[add])


def test_retry_answers_the_last_question_anew():
    engine = Scripted("One", "Two", "Two, I mean", "Three")
    conversation = talk(engine)
    list(conversation.say("A"))
    list(conversation.say("B"))
    assert text_of(conversation.retry()) == "Two, I mean"
    assert [m["content"] for m in conversation.messages] == ["A", "One", "B", "Two, I mean"]
    assert len(engine.reads[2]) == 1  # the last token again, for its logits
    assert text_of(conversation.say("C")) == "Three"
    assert held_is_whole(engine, conversation)


def test_a_retry_that_is_not_heard_changes_nothing():
    engine = Scripted("One", "Two", "Three")
    conversation = talk(engine)
    list(conversation.say("A"))
    before = list(conversation.messages)
    engine.fail_after = 0
    with pytest.raises(KeyboardInterrupt):
        list(conversation.retry())
    engine.fail_after = None
    assert conversation.messages == before
    assert text_of(conversation.say("B")) == "Three"
    assert held_is_whole(engine, conversation)


def test_a_full_conversation_forgets_its_oldest_turns_if_it_may():
    answers = [f"Answer {i} " + "word " * 20 for i in range(12)]
    engine = Scripted(*answers, limit=300)
    conversation = talk(engine, system="Be brief.", trim=True, max_new_tokens=60)
    forgotten = 0
    for i, answer in enumerate(answers):
        events = list(conversation.say(f"Question {i}?"))
        assert text_of(events) == answer
        forgotten += sum(e.messages for e in events if isinstance(e, Trimmed))
        assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
        assert len(conversation.messages) == 1 + 2 * (i + 1) - forgotten
        assert conversation.messages[1]["role"] == "user"
        assert held_is_whole(engine, conversation)
    assert forgotten > 10
    with pytest.raises(ConversationError, match="room for 300"):
        list(conversation.say("word " * 400))


def test_without_trim_a_full_conversation_is_an_error():
    engine = Scripted(*["word " * 50] * 9, limit=300)
    conversation = talk(engine, max_new_tokens=60)
    with pytest.raises(ConversationError, match="there is room for 300: reset it, or say less"):
        for _ in range(9):
            list(conversation.say("Go"))


@pytest.mark.parametrize("tools", [[], [add]])
def test_stop_strings_end_an_answer(tools):
    engine = Scripted("One two STOP three", "Four\n\nFive", slack=40)
    conversation = talk(engine, stop=["STOP", "\n\n"], tools=tools)
    events = list(conversation.say("A"))
    assert (text_of(events), events[-1]) == ("One two ", End("stop"))
    assert text_of(conversation.say("B")) == "Four"
    assert held_is_whole(engine, conversation, tools=tools)


def test_stop_strings_do_not_end_a_call():
    said = []

    @tool
    def say(text: str) -> str:
        """Say something."""
        said.append(text)
        return text

    conversation = talk(Scripted(call("say", text="a STOP b"), "Done."), stop=["STOP"], tools=[say])
    list(conversation.say("Go"))
    assert said == ["a STOP b"]
    calls = json.dumps([{"name": "say", "arguments": {"text": "c STOP d"}}])
    _, conversation = mistral_talk(calls, "Done.", stop=["STOP"], tools=[say])
    list(conversation.say("Go"))
    assert said[1:] == ["c STOP d"]


def test_what_was_heard_is_saved_after_a_break(tmp_path):
    conversation = talk(Scripted("One two three four", "Five"))
    for event in conversation.say("Count"):
        heard = event.text
        break
    assert conversation.messages[-1] == {"role": "assistant", "content": heard}
    conversation.save(tmp_path / "talk.jsonl")
    again = Conversation.load(tmp_path / "talk.jsonl", Scripted(), TOKENIZER, grammar=False)
    assert again.messages == conversation.messages
    answer = conversation.say("Go on")
    heard = next(answer).text
    conversation.save(tmp_path / "talk.jsonl")  # while somebody still listens
    assert json.loads((tmp_path / "talk.jsonl").read_text().splitlines()[-1])["content"] == heard


def test_a_listener_who_leaves_before_the_first_word_leaves_no_question():
    engine = Scripted(*["word " * 40] * 9, limit=300)
    conversation = talk(engine, trim=True, max_new_tokens=60)
    for _ in range(9):
        before = list(conversation.messages)
        for event in conversation.say("Go"):
            if isinstance(event, Trimmed):
                break
        else:
            continue
        assert conversation.messages == before
        break
    else:
        raise AssertionError("nothing was trimmed")


def test_a_stop_string_does_not_make_calls_of_text():
    said = call("add", a=1, b=2) + " STOP"
    conversation = talk(Scripted(said), tools=[add], tool_choice="none", stop=["STOP"])
    assert text_of(conversation.say("Go")) == call("add", a=1, b=2) + " "
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]


def test_message_objects_of_a_client_are_messages(tmp_path):
    class Answer(BaseModel):
        role: str = "assistant"
        content: str | None = None

    engine = Scripted("Two")
    conversation = talk(engine)
    conversation.messages += [{"role": "user", "content": "A"}, Answer(content="One")]
    assert text_of(conversation.say("B")) == "Two"
    conversation.save(tmp_path / "talk.jsonl")
    assert held_is_whole(engine, conversation)


@pytest.mark.parametrize("content", [5, None, [1, "x"], {"a": 1}, True, "text"])
@pytest.mark.parametrize("name", [{"name": "f"}, {"tool_call_id": "c1"}])
def test_results_of_any_type_are_shortened_with_a_note(tmp_path, content, name):
    called = {"id": "c1", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [called]},
        {"role": "tool", **name, "content": content},
        {"role": "tool", **name, "content": ["x "] * 2000},
    ]
    lines = [{"format": "chatml", "tools": []}, *messages]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    conversation = Conversation.load(tmp_path / "x.jsonl", Scripted("Yes", limit=600), TOKENIZER)
    events = list(conversation.say("And?"))
    assert [type(e) for e in events] == [Altered, Text, End]
    assert conversation.messages[2] == messages[2]
    assert conversation.messages[3]["content"].startswith('["x ", "x ",')


def test_tools_whose_descriptions_changed_are_accepted_with_a_warning(tmp_path):
    def described(text, **types):
        def f(description: int):
            pass

        f.__doc__ = f"{text}.\n\nArgs:\n    description: {text}"
        f.__annotations__ |= types
        return tool(f)

    path = tmp_path / "x.jsonl"
    talk(Scripted(), tools=[described("Old")]).save(path)
    options = dict(grammar=False)
    with pytest.warns(UserWarning, match="x.jsonl was saved with other descriptions"):
        Conversation.load(path, Scripted(), TOKENIZER, tools=[described("New")], **options)
    with pytest.raises(ConversationError, match="other tools"):
        changed = [described("Old", description=str)]
        Conversation.load(path, Scripted(), TOKENIZER, tools=changed, **options)


def test_branches_of_the_chat_window_are_left_out_with_a_warning(tmp_path):
    head = {"format": "chatml", "tools": [], "branches": {"created": [1], "others": [{}]}}
    (tmp_path / "x.jsonl").write_text(json.dumps(head) + '\n{"role": "user", "content": "Hi"}\n')
    with pytest.warns(UserWarning, match="x.jsonl has other branches: they are left out"):
        loaded = Conversation.load(tmp_path / "x.jsonl", Scripted(), TOKENIZER)
    assert loaded.messages == [{"role": "user", "content": "Hi"}]


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
    ("content", "words"),
    [
        ("", "x.jsonl, line 1, is not valid JSON"),
        ("not json", "x.jsonl, line 1, is not valid JSON"),
        ("[1]", "x.jsonl, line 1, is not a message"),
        ('{"role": "user", "content": "x"}', "its first line must name the format"),
        ('{"format": "chatml"}\n3', "x.jsonl, line 2, is not a message"),
        ('{"format": "chatml"}\n{}\n{', "x.jsonl, line 3, is not valid JSON"),
    ],
)
def test_a_file_that_is_not_a_conversation_is_refused(tmp_path, content, words):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ConversationError, match=words):
        Conversation.load(tmp_path / "x.jsonl", Scripted(), TOKENIZER)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_a_message_that_json_cannot_hold_is_not_saved(tmp_path, value):
    path = tmp_path / "talk.jsonl"
    path.write_text("earlier")
    conversation = talk(Scripted())
    conversation.messages.append({"role": "user", "content": value})
    with pytest.raises(ConversationError, match="a message cannot be saved as JSON"):
        conversation.save(path)
    assert path.read_text() == "earlier"


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
        (dict(stop="x"), "stop takes a list"),
        (dict(stop=[""]), "stop takes a list"),
        (dict(tool_choice="required"), "needs tools"),
        (dict(tools=[add], format="mistral_instruct_v1"), "has no functions; use one of chatml"),
    ):
        with pytest.raises(ConversationError, match=words):
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
    with pytest.warns(UserWarning, match="tool 'odd': the grammar leaves 'not' to"):
        talk(Scripted(), tools=[add, odd], tool_choice="required", grammar=True)
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
    assert first.arguments.keys() == {"a", "b"}
    assert all(value == int(value) for value in first.arguments.values())  # 5.0 is an integer


@pytest.mark.parametrize("choice", ["required", "add", "auto"])
def test_only_the_first_answer_must_be_a_call(choice):
    chosen = []

    class Constraints(dict):
        def __getitem__(self, name):
            chosen.append(name)
            return super().__getitem__("none")  # the script is what is written

    engine = Scripted(call("add", a=1, b=2), "It is 3.", "Yes")
    conversation = talk(engine, tools=[add], tool_choice=choice, grammar=True)
    conversation._constraints = Constraints(conversation._constraints)
    for said, answer in (("1 + 2?", "It is 3."), ("Sure?", "Yes")):
        assert text_of(conversation.say(said)) == answer
    assert chosen == [choice, "auto", choice]


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
            assert all(kind(value) == value for value in event.arguments.values())
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


def test_a_prompt_that_fills_the_cache_leaves_no_room_for_an_answer():
    tokens = len(encode_chat(TOKENIZER, [{"role": "user", "content": "Hi"}]))
    with pytest.raises(ConversationError, match=f"would have {tokens} tokens"):
        list(talk(Scripted("Hello", limit=tokens)).say("Hi"))
    options = dict(
        tokenizer=TOKENIZER,
        chat=chat_format(TOKENIZER),
        sampling=mistral.Sampling(temperature=0),
        constraint=None,
        max_new_tokens=5,
    )
    with pytest.raises(ValueError, match="there is room for 3: shorten it"):
        Answer(decoder=Scripted(limit=3), prompt_ids=[1, 2, 3], **options)


def test_a_reset_empties_the_decoder():
    engine = Scripted("Hello!")
    conversation = talk(engine)
    list(conversation.say("Hi"))
    conversation.reset()
    assert engine.ids == []
    assert conversation.tokens_held == 0


def test_an_answer_that_is_edited_in_place_is_read_again():
    engine = Scripted("Hello!", "Yes")
    conversation = talk(engine)
    list(conversation.say("Hi"))
    conversation.messages[-1]["content"] = "Goodbye!"
    list(conversation.say("Really?"))
    assert "Goodbye!" in TOKENIZER.decode(engine.ids)
    assert "Hello!" not in TOKENIZER.decode(engine.ids)

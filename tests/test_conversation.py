"""The conversation driver, with an engine that writes what a script says."""

import threading
import time

import pytest
import small
import torch
from scripted import END, TOKENIZER, Scripted, call, written

import mistral
from mistral.chat import Conversation, encode_chat, tool
from mistral.chat.conversation import ConversationError
from mistral.chat.events import Call, End, Error, Result, Text


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
    assert conversation.tokens_read + conversation.tokens_written == len(engine.ids) == conversation.tokens_held
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
    assert engine.ids == encode_chat(TOKENIZER, conversation.messages, tools=[add], generate=False)[: len(engine.ids)]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (call("subtract", a=1, b=2), "No matching function signature found for function: subtract"),
        (call("add", a="one", b=2), "error validating function call against function signature: add"),
        (call("add", a=1), "Please call this function again with correct arguments"),
        (call("broken", text="way"), "There was an error when executing the function: broken"),
        ("<tool_call>\n{'name': add}\n</tool_call>", "There was an error parsing function calls"),
    ],
)
def test_what_goes_wrong_is_told_to_the_model_in_the_cards_words(answer, words):
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

    conversation = talk(Scripted(*[call("count", n=i) for i in range(9)]), tools=[count], max_rounds=3)
    events = list(conversation.say("Count"))
    assert events[-1] == End("max_rounds")
    assert runs == [0, 1]
    assert isinstance(events[-2], Call)


def test_calls_of_one_answer_run_together_where_asked():
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


def test_a_tool_that_hangs_is_given_up_and_the_conversation_goes_on():
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
    engine = Scripted(written("All done<|im_end|>\n<|im_start|>user\nmore", end=False) + [END], "Yes", slack=40)
    conversation = talk(engine)
    assert text_of(conversation.say("Go")) == "All done"
    assert TOKENIZER.decode(engine.ids).endswith("All done")
    assert text_of(conversation.say("Sure?")) == "Yes"
    assert engine.ids == encode_chat(TOKENIZER, conversation.messages, generate=False)[: len(engine.ids)]


def test_max_new_tokens_end_an_answer_and_no_call_of_it_is_run():
    engine = Scripted(call("add", a=1, b=2) + " and more text", "Hm")
    conversation = talk(engine, tools=[add], max_new_tokens=len(written(call("add", a=1, b=2), end=False)))
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
    assert engine.ids == encode_chat(TOKENIZER, conversation.messages, generate=False)[: len(engine.ids)]


def test_ctrl_c_before_the_first_word_takes_the_question_back():
    engine = Scripted("One", "Two", fail_after=0)
    conversation = talk(engine, system="S")
    with pytest.raises(KeyboardInterrupt):
        list(conversation.say("Count"))
    assert [message["role"] for message in conversation.messages] == ["system"]
    engine.fail_after = None
    assert text_of(conversation.say("Again")) == "Two"


def test_a_conversation_that_is_too_long_refuses_and_is_as_before():
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

    engine = Scripted(call("page", n=3) + "\n" + call("page", n=5000), "It was long.", "Yes", limit=1200)
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


def test_results_that_nobody_listened_to_are_kept_because_the_functions_ran():
    both = call("add", a=1, b=2) + call("add", a=3, b=4)
    conversation = talk(Scripted(both, "Seven"), tools=[add], parallel=True)
    answer = conversation.say("Add")
    while not isinstance(next(answer), Result):
        pass
    answer.close()
    assert [m["content"] for m in conversation.messages if m["role"] == "tool"] == ["3", "7"]
    assert text_of(conversation.say("And?")) == "Seven"


def test_ctrl_c_while_a_long_message_is_read_does_not_break_a_conversation_that_has_rolled(monkeypatch):
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
    fresh.read([encode_ids(conversation)])
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


def test_a_saved_conversation_goes_on_where_it_was(tmp_path):
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


@pytest.mark.parametrize("content", ["", "not json", "[1]", '{"role": "user", "content": "x"}', '{"format": "x"}\n3'])
def test_a_file_that_is_no_conversation_is_refused(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises((ConversationError, ValueError), match="x.jsonl|format"):
        Conversation.load(tmp_path / "x.jsonl", Scripted(), TOKENIZER)


def test_control_tokens_and_rows_without_a_token_are_never_allowed_in_text():
    engine = Scripted("Hi")
    list(talk(engine).say("Hello"))
    allowed = set(engine.allowed[0].nonzero().flatten().tolist())
    assert allowed & TOKENIZER.control_ids <= {2, 32000, 32001}  # what ends an answer
    assert max(allowed) <= 32001


def test_tool_choice_none_reads_no_calls():
    events = list(talk(Scripted(call("add", a=1, b=2)), tools=[add], tool_choice="none").say("Go"))
    assert "<tool_call>" in text_of(events)
    assert not any(isinstance(e, Call) for e in events)


def test_arguments_that_make_no_sense_are_refused():
    for options, words in (
        (dict(tool_choice="sub", tools=[add]), "no tool 'sub'"),
        (dict(format="none"), "no chat format"),
        (dict(max_rounds=0), "max_rounds"),
        (dict(tool_choice="required", tools=[add]), "needs tools, and a grammar"),
        (dict(tools=[add], format="mistral_instruct_v1"), "functions need a format"),
    ):
        with pytest.raises(ValueError, match=words):
            talk(Scripted(), **options)


def test_the_cards_example_runs():
    @tool
    def get_stock_fundamentals(symbol: str) -> dict:
        """Get fundamental data for a given stock symbol using yfinance API.

        Args:
            symbol: The stock symbol.
        """
        return {"symbol": symbol, "company_name": "Tesla, Inc.", "pe_ratio": 49.604652, "dividend_yield": None}

    engine = Scripted(
        "<tool_call>\n{'arguments': {'symbol': 'TSLA'}, 'name': 'get_stock_fundamentals'}\n</tool_call>",
        "The stock fundamentals data for Tesla (TSLA) are as follows: ...",
    )
    events = list(
        talk(engine, tools=[get_stock_fundamentals]).say("Fetch the stock fundamentals data for Tesla (TSLA)")
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
    fresh.read([encode_ids(conversation)])
    assert fresh.lengths == conversation.decoder.lengths
    assert torch.allclose(fresh.logits, conversation.decoder.logits, atol=1e-4)


def encode_ids(conversation):
    """The ids that the conversation's decoder holds."""
    return conversation.decoder._history[0, : conversation.tokens_held].tolist()

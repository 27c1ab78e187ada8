"""The openai package: chat completions, plain and by .stream(), and responses."""

import json
from collections.abc import Iterable
from typing import Any

import openai
from case import (
    FUNCTION,
    JSON,
    MODEL,
    MOST_TOKENS,
    OPENAI,
    TEXT_AND_TOOL,
    Answer,
    Conversation,
    Person,
    check_usage,
    converse,
    declare,
    has_tool,
    invention,
    is_streamed,
    question,
)

WITH_USAGE = {"stream_options": {"include_usage": True}}


def chat(form: str) -> Answer:
    """`create`, with stream=True or without."""
    create = openai.OpenAI(**OPENAI).chat.completions.create

    def ask(messages: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        asked = options | dict(model=MODEL, temperature=0, messages=messages)
        if is_streamed(form):
            return collected(create(stream=True, **WITH_USAGE, **asked))
        got = create(**asked)
        check_usage(got.usage)
        return got.choices[0].message.model_dump()

    return converse(ask, form)


def collected(chunks: Iterable[Any]) -> dict[str, Any]:
    """The message that chunks make up, put together as plain programs do."""
    text = ""
    calls: dict[int, dict[str, Any]] = {}
    usage = None
    finish = None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            text += choice.delta.content or ""
            for part in choice.delta.tool_calls or ():
                function = {"name": "", "arguments": ""}
                new = {"id": part.id, "type": "function", "function": function}
                function = calls.setdefault(part.index, new)["function"]
                function["name"] += part.function.name or ""
                function["arguments"] += part.function.arguments or ""
    check_usage(usage)
    if finish != ("tool_calls" if calls else "stop"):
        raise RuntimeError(f"the finish_reason is {finish}")
    return {"role": "assistant", "content": text, "tool_calls": list(calls.values())}


def stream(form: str) -> Answer:
    """`chat.completions.stream`, which puts the message together."""

    def ask(messages: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        asked = options | dict(model=MODEL, temperature=0, messages=messages)
        with openai.OpenAI(**OPENAI).chat.completions.stream(**asked, **WITH_USAGE) as events:
            got = events.get_final_completion()
        check_usage(got.usage)
        return got.choices[0].message.model_dump()

    return converse(ask, form)


def parse(form: str, n: int) -> Answer:
    """`chat.completions.parse`, and the same in a stream."""
    asked = dict(
        model=MODEL,
        messages=[{"role": "user", "content": invention(n)}],
        response_format=Person,
        seed=n,
        max_tokens=MOST_TOKENS,
    )
    api = openai.OpenAI(**OPENAI).chat.completions
    if is_streamed(form):
        with api.stream(**asked) as events:
            got = events.get_final_completion()
    else:
        got = api.parse(**asked)
    return {"json": got.choices[0].message.parsed.model_dump()}


def responses(form: str) -> Answer:
    """`responses.create` and `.stream`; results follow their call by previous_response_id."""
    api = openai.OpenAI(**OPENAI).responses
    conversation = Conversation(form)
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "input": question(form)}
    if has_tool(form):
        asked["tools"] = [{"type": "function", **FUNCTION}]

    def turn() -> str | None:
        got = streamed_response(api, asked) if is_streamed(form) else api.create(**asked)
        check_usage(got.usage)
        results = []
        for item in got.output:
            if item.type == "function_call":
                output = conversation.call(item.name, json.loads(item.arguments))
                result = {"type": "function_call_output", "call_id": item.call_id, "output": output}
                results.append(result)
        asked.update(input=results, previous_response_id=got.id)
        return None if results else got.output_text

    return conversation.run(turn)


def streamed_response(api: Any, asked: dict[str, Any]) -> Any:
    """The final response of a stream, whose deltas must have spelled its text."""
    with api.stream(**asked) as events:
        text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        got = events.get_final_response()
    if text != got.output_text:
        raise RuntimeError(f"the deltas spell {text!r}, the text is {got.output_text!r}")
    return got


def parse_response(form: str, n: int) -> Answer:
    """`responses.parse`, and the same in a stream."""
    api = openai.OpenAI(**OPENAI).responses
    asked = dict(model=MODEL, input=invention(n), text_format=Person, max_output_tokens=MOST_TOKENS)
    if is_streamed(form):
        with api.stream(**asked) as events:
            got = events.get_final_response()
    else:
        got = api.parse(**asked)
    return {"json": got.output_parsed.model_dump()}


declare("openai", TEXT_AND_TOOL, chat)
declare("openai .stream()", ("text streamed", "tool streamed"), stream)
declare("openai .parse()", JSON, parse)
declare("openai responses", TEXT_AND_TOOL, responses)
declare("openai responses .parse()", JSON, parse_response)

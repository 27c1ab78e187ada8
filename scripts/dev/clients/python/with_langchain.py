"""langchain-openai."""

from functools import partial
from typing import Any

from case import (
    JSON,
    MODEL,
    MOST_TOKENS,
    OPENAI,
    TEXT_AND_TOOL,
    Answer,
    Conversation,
    Person,
    Unfinished,
    check_usage,
    declare,
    has_tool,
    invention,
    is_streamed,
    miles,
    question,
)
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def open_model(**options: Any) -> ChatOpenAI:
    """The chat model."""
    return ChatOpenAI(model=MODEL, stream_usage=True, **OPENAI, **options)


def chat(form: str) -> Answer:
    """`invoke` and `stream`, with bind_tools."""
    model: Any = open_model(temperature=0)
    if has_tool(form):
        model = model.bind_tools([miles])
    conversation = Conversation(form)
    messages: list[Any] = [HumanMessage(question(form))]

    def turn() -> str | None:
        if is_streamed(form):
            first, *rest = model.stream(messages)
            got = sum(rest, start=first)
        else:
            got = model.invoke(messages)
        check_usage(got.usage_metadata)
        messages.append(got)
        for call in got.tool_calls:
            result = conversation.call(call["name"], call["args"])
            messages.append(ToolMessage(result, tool_call_id=call["id"]))
        return None if got.tool_calls else got.content

    return conversation.run(turn)


def structured(method: str, form: str, n: int) -> Answer:
    """`with_structured_output`."""
    model = open_model(seed=n, max_completion_tokens=MOST_TOKENS)
    if is_streamed(form):
        *_, got = model.with_structured_output(Person, method=method).stream(invention(n))
        return {"json": got.model_dump()}
    asking = model.with_structured_output(Person, method=method, include_raw=True)
    got = asking.invoke(invention(n))
    if got["raw"].response_metadata["finish_reason"] == "length":
        raise Unfinished("length")
    return {"json": got["parsed"].model_dump()}


declare("langchain", TEXT_AND_TOOL, chat)
for method in ("json_schema", "function_calling"):
    declare(f"langchain with_structured_output, {method}", JSON, partial(structured, method))

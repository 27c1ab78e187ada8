"""llama-index-llms-openai-like."""

from typing import Any

from case import (
    ADDRESS,
    MODEL,
    MOST_TOKENS,
    TEXT_AND_TOOL,
    Answer,
    Conversation,
    Person,
    declare,
    has_tool,
    invention,
    is_streamed,
    miles,
    question,
)
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

TOOL = FunctionTool.from_defaults(miles)


def open_model(**options: Any) -> OpenAILike:
    """The chat model."""
    return OpenAILike(
        model=MODEL,
        api_base=f"{ADDRESS}/v1",
        api_key="x",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        **options,
    )


def chat(form: str) -> Answer:
    """`chat` and `stream_chat`; `chat_with_tools` and `stream_chat_with_tools`."""
    model = open_model(temperature=0)
    conversation = Conversation(form)
    history = [ChatMessage(role="user", content=question(form))]

    def turn() -> str | None:
        got = answer(model, history, form)
        calls = model.get_tool_calls_from_response(got, error_on_no_tool_call=False)
        history.append(got.message)
        for call in calls:
            result = conversation.call(call.tool_name, call.tool_kwargs)
            ids = {"tool_call_id": call.tool_id}
            history.append(ChatMessage(role="tool", content=result, additional_kwargs=ids))
        return None if calls else got.message.content

    return conversation.run(turn)


def answer(model: OpenAILike, history: list[ChatMessage], form: str) -> Any:
    """The next answer; the last part of a stream has all of it."""
    if has_tool(form):
        if not is_streamed(form):
            return model.chat_with_tools([TOOL], chat_history=history)
        *_, last = model.stream_chat_with_tools([TOOL], chat_history=history)
        return last
    if not is_streamed(form):
        return model.chat(history)
    *_, last = model.stream_chat(history)
    return last


def structured(form: str, n: int) -> Answer:
    """`structured_predict`, by a call of a tool."""
    model = open_model(max_tokens=MOST_TOKENS, additional_kwargs={"seed": n})
    got = model.structured_predict(Person, PromptTemplate(invention(n)))
    return {"json": got.model_dump()}


declare("llama-index", TEXT_AND_TOOL, chat)
declare("llama-index structured_predict", ("json",), structured)

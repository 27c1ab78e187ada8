"""smolagents: its model class, and an agent that calls the tool."""

import json
from typing import Any

from case import (
    ADDRESS,
    MODEL,
    TEXT_AND_TOOL,
    Answer,
    Conversation,
    check_usage,
    declare,
    has_tool,
    is_streamed,
    miles,
    question,
)
from smolagents import OpenAIModel, tool
from smolagents.models import ChatMessage, MessageRole, agglomerate_stream_deltas

TOOL = tool(miles)


def chat(form: str) -> Answer:
    """`generate` and `generate_stream`; an observation goes back as a message."""
    model = OpenAIModel(MODEL, api_base=f"{ADDRESS}/v1", api_key="x", temperature=0)
    options: dict[str, Any] = {"stop_sequences": ["Observation:"]}
    if has_tool(form):
        # As its agents do, smolagents says tool_choice: "required"
        options["tools_to_call_from"] = [TOOL]
    conversation = Conversation(form)
    messages = [message(MessageRole.USER, question(form))]

    def turn() -> str | None:
        if is_streamed(form):
            got = agglomerate_stream_deltas(list(model.generate_stream(messages, **options)))
        else:
            got = model.generate(messages, **options)
        check_usage(got.token_usage.input_tokens)
        if not got.tool_calls:
            return got.content
        for call in got.tool_calls:
            arguments = call.function.arguments
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            result = conversation.call(call.function.name, arguments)
            messages.append(message(MessageRole.TOOL_CALL, f"Calling tools: {call}"))
            messages.append(message(MessageRole.TOOL_RESPONSE, f"Observation:\n{result}"))
        options["tool_choice"] = "auto"  # its agents have a tool for the last answer instead
        return None

    got = conversation.run(turn)
    # The results were the user's text: what the model makes of it depends on its training.
    return got | {"text": None} if has_tool(form) else got


def message(role: MessageRole, text: str) -> ChatMessage:
    """A message in parts, as the agents write them."""
    return ChatMessage(role=role, content=[{"type": "text", "text": text}])


declare("smolagents", TEXT_AND_TOOL, chat)

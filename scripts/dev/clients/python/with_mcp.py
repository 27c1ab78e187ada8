"""The tools of an MCP server, called by way of the openai package."""

import asyncio
import json
from typing import Any

import openai
from case import (
    MODEL,
    MOST_TURNS,
    OPENAI,
    QUESTION_FOR_TOOL,
    Answer,
    Conversation,
    declare,
    is_streamed,
    miles,
)
from mcp.client import Client
from mcp.server import MCPServer


def call_tools(form: str) -> Answer:
    """List the tools of a server in this process, hand them out, and call what the model calls."""
    return asyncio.run(converse(Conversation(form)))


async def converse(conversation: Conversation) -> Answer:
    """The conversation with the tools of the MCP server."""
    server = MCPServer("lengths")
    server.tool(name="miles")(miles)
    api = openai.AsyncOpenAI(**OPENAI)
    messages: list[Any] = [{"role": "user", "content": QUESTION_FOR_TOOL}]
    async with Client(server) as session:
        tools = [as_function(tool) for tool in (await session.list_tools()).tools]
        asked = dict(model=MODEL, messages=messages, tools=tools, temperature=0)
        for _ in range(MOST_TURNS):
            message = await answer(api, asked, is_streamed(conversation.form))
            if not message.tool_calls:
                return {"text": message.content, "calls": conversation.calls}
            messages.append(message)
            for call in message.tool_calls:
                arguments = json.loads(call.function.arguments)
                conversation.calls.append([call.function.name, arguments])
                result = await session.call_tool(call.function.name, arguments)
                parts = [{"type": "text", "text": part.text} for part in result.content]
                messages.append({"role": "tool", "tool_call_id": call.id, "content": parts})
    raise RuntimeError("the model calls the tool again and again")


async def answer(api: openai.AsyncOpenAI, asked: dict[str, Any], in_a_stream: bool) -> Any:
    """The next message."""
    if not in_a_stream:
        return (await api.chat.completions.create(**asked)).choices[0].message
    async with api.chat.completions.stream(**asked) as events:
        return (await events.get_final_completion()).choices[0].message


def as_function(tool: Any) -> dict[str, Any]:
    """A tool of MCP as one of OpenAI's."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
    }
    return {"type": "function", "function": function}


declare("mcp", ("tool", "tool streamed"), call_tools)

"""pydantic-ai, by chat completions and by responses."""

import asyncio
from functools import partial
from typing import Any

import openai
from case import (
    JSON,
    MODEL,
    MOST_TOKENS,
    OPENAI,
    TEXT_AND_TOOL,
    Answer,
    Conversation,
    Person,
    declare,
    has_tool,
    invention,
    is_streamed,
    question,
)
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

MODELS = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}


def open_agent(api: str, **options: Any) -> Agent:
    """An agent; `api` is chat or responses."""
    client = openai.AsyncOpenAI(**OPENAI)
    return Agent(MODELS[api](MODEL, provider=OpenAIProvider(openai_client=client)), **options)


def chat(api: str, form: str) -> Answer:
    """`run` and `run_stream`: the agent itself calls the tool."""
    agent = open_agent(api, model_settings={"temperature": 0})
    conversation = Conversation(form)
    if has_tool(form):
        agent.tool_plain(conversation.tool())

    async def ask() -> str:
        if not is_streamed(form):
            return (await agent.run(question(form))).output
        async with agent.run_stream(question(form)) as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    return {"text": asyncio.run(ask()), "calls": conversation.calls}


def structured(api: str, output: Any, form: str, n: int) -> Answer:
    """`output_type`: by a call of a tool, or by the schema of the answer (NativeOutput)."""
    settings: dict[str, Any] = {"max_tokens": MOST_TOKENS}
    if api == "chat":
        settings["seed"] = n
    agent = open_agent(api, output_type=output, model_settings=settings, retries=0)

    async def ask() -> Person:
        if not is_streamed(form):
            return (await agent.run(invention(n))).output
        async with agent.run_stream(invention(n)) as result:
            return await result.get_output()

    return {"json": asyncio.run(ask()).model_dump()}


for api in MODELS:
    declare(f"pydantic-ai {api}", TEXT_AND_TOOL, partial(chat, api))
    declare(f"pydantic-ai {api}, output_type", JSON, partial(structured, api, Person))
    native = partial(structured, api, NativeOutput(Person))
    declare(f"pydantic-ai {api}, NativeOutput", JSON, native)

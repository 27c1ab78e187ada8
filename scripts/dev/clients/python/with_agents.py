"""openai-agents, by chat completions and by responses."""

import asyncio
from functools import partial
from typing import Any

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
)
from case import (
    JSON,
    MODEL,
    MOST_TOKENS,
    MOST_TURNS,
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

MODELS = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}


def open_agent(api: str, **options: Any) -> Agent:
    """An agent; `api` is chat or responses."""
    client = openai.AsyncOpenAI(**OPENAI)
    model = MODELS[api](model=MODEL, openai_client=client)
    return Agent(name="assistant", model=model, **options)


def final_output(agent: Agent, asked: str, form: str) -> Any:
    """Run the agent to its end."""

    async def ask() -> Any:
        if not is_streamed(form):
            return (await Runner.run(agent, asked, max_turns=MOST_TURNS)).final_output
        result = Runner.run_streamed(agent, asked, max_turns=MOST_TURNS)
        async for _ in result.stream_events():
            pass
        return result.final_output

    return asyncio.run(ask())


def chat(api: str, form: str) -> Answer:
    """`run` and `run_streamed`: the runner itself calls the tool."""
    conversation = Conversation(form)
    tools = [function_tool(conversation.tool())] if has_tool(form) else []
    agent = open_agent(api, tools=tools, model_settings=ModelSettings(temperature=0))
    return {"text": final_output(agent, question(form), form), "calls": conversation.calls}


def structured(api: str, form: str, n: int) -> Answer:
    """`output_type`."""
    settings = ModelSettings(max_tokens=MOST_TOKENS)
    agent = open_agent(api, output_type=Person, model_settings=settings)
    return {"json": final_output(agent, invention(n), form).model_dump()}


for api in MODELS:
    declare(f"openai-agents {api}", TEXT_AND_TOOL, partial(chat, api))
    declare(f"openai-agents {api}, output_type", JSON, partial(structured, api))

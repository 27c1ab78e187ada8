"""The anthropic package."""

from typing import Any

import anthropic
from case import (
    ADDRESS,
    FUNCTION,
    JSON,
    MODEL,
    MOST_TOKENS,
    PARAMETERS,
    TEXT_AND_TOOL,
    Answer,
    Conversation,
    Hobby,
    Person,
    Unfinished,
    check_usage,
    declare,
    has_tool,
    invention,
    is_streamed,
    question,
)
from pydantic import ValidationError

TOOL = {"name": "miles", "description": FUNCTION["description"], "input_schema": PARAMETERS}


class WithoutLimits(Person):
    """A person. The client takes limits out of a schema, and would check them itself."""

    name: str
    age: int
    hobbies: list[Hobby]


def messages_api() -> Any:
    """The door to /v1/messages."""
    return anthropic.Anthropic(base_url=ADDRESS, api_key="x", max_retries=0).messages


def messages(form: str) -> Answer:
    """`messages.create` and `.stream`."""
    api = messages_api()
    conversation = Conversation(form)
    said: list[Any] = [{"role": "user", "content": question(form)}]
    # This client has no argument for the temperature any more.
    asked = dict(model=MODEL, max_tokens=300, messages=said, extra_body={"temperature": 0})
    if has_tool(form):
        asked["tools"] = [TOOL]

    def turn() -> str | None:
        if is_streamed(form):
            with api.stream(**asked) as events:
                got = events.get_final_message()
        else:
            got = api.create(**asked)
        check_usage(got.usage.input_tokens)
        results = []
        for block in got.content:
            if block.type == "tool_use":
                content = conversation.call(block.name, block.input)
                result = {"type": "tool_result", "tool_use_id": block.id, "content": content}
                results.append(result)
        said.append({"role": "assistant", "content": got.content})
        said.append({"role": "user", "content": results})
        return None if results else "".join(block.text for block in got.content)

    return conversation.run(turn)


def parse(form: str, n: int) -> Answer:
    """`messages.parse`, and the same in a stream."""
    asked = dict(
        model=MODEL,
        max_tokens=MOST_TOKENS,
        messages=[{"role": "user", "content": invention(n)}],
        output_format=WithoutLimits,
    )
    try:
        if is_streamed(form):
            with messages_api().stream(**asked) as events:
                got = events.get_final_message()
        else:
            got = messages_api().parse(**asked)
    except ValidationError as error:
        # The client parses an answer before anyone can see its stop_reason.
        if "EOF while parsing" in str(error):
            raise Unfinished("max_tokens") from error
        raise
    if got.stop_reason == "max_tokens":
        raise Unfinished("max_tokens")
    return {"json": got.parsed_output.model_dump()}


declare("anthropic", TEXT_AND_TOOL, messages)
declare("anthropic .parse()", JSON, parse)

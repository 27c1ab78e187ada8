"""litellm, by its provider for servers that are like OpenAI's."""

from typing import Any

import litellm
from case import (
    ADDRESS,
    JSON,
    MODEL,
    MOST_TOKENS,
    TEXT_AND_TOOL,
    Answer,
    Person,
    Unfinished,
    check_usage,
    converse,
    declare,
    invention,
    is_streamed,
)

litellm.telemetry = False
litellm.suppress_debug_info = True


def completion(form: str, **asked: Any) -> Any:
    """A reply; a stream's chunks are put together."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    got = litellm.completion(
        model=f"openai/{MODEL}",
        api_base=f"{ADDRESS}/v1",
        api_key="x",
        num_retries=0,
        **asked,
        **(options if is_streamed(form) else {}),
    )
    if is_streamed(form):
        got = litellm.stream_chunk_builder(list(got))
    check_usage(got.usage.prompt_tokens)
    return got.choices[0]


def chat(form: str) -> Answer:
    """`completion` with messages."""

    def ask(messages: list[Any], options: dict[str, Any]) -> dict[str, Any]:
        got = completion(form, messages=messages, temperature=0, **options)
        return got.message.model_dump()

    return converse(ask, form)


def as_json(form: str, n: int) -> Answer:
    """`completion` with response_format."""
    got = completion(
        form,
        messages=[{"role": "user", "content": invention(n)}],
        response_format=Person,
        seed=n,
        max_tokens=MOST_TOKENS,
    )
    if got.finish_reason == "length":
        raise Unfinished("length")
    return {"json": Person.model_validate_json(got.message.content).model_dump()}


declare("litellm", TEXT_AND_TOOL, chat)
declare("litellm response_format", JSON, as_json)

"""instructor."""

from functools import partial

import instructor
import openai
from case import (
    JSON,
    MODEL,
    MOST_TOKENS,
    OPENAI,
    Answer,
    Person,
    declare,
    invention,
    is_streamed,
)


def create(mode: str, form: str, n: int) -> Answer:
    """`create` and `create_partial` with response_model."""
    api = openai.OpenAI(**OPENAI)
    completions = instructor.from_openai(api, mode=instructor.Mode[mode]).chat.completions
    asked = dict(
        model=MODEL,
        messages=[{"role": "user", "content": invention(n)}],
        response_model=Person,
        max_retries=0,
        seed=n,
        max_tokens=MOST_TOKENS,
    )
    if not is_streamed(form):
        return {"json": completions.create(**asked).model_dump()}
    *_, last = completions.create_partial(**asked)
    return {"json": Person.model_validate(last.model_dump()).model_dump()}


for mode in ("TOOLS", "JSON_SCHEMA"):
    declare(f"instructor {mode}", JSON, partial(create, mode))

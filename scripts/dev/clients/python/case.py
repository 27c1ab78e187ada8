"""What all clients are asked, and the table of cases; each with_NAME.py adds those of a client."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

from pydantic import BaseModel, Field

ADDRESS, MODEL = sys.argv[1:3]
OPENAI: dict[str, Any] = {"base_url": f"{ADDRESS}/v1", "api_key": "x", "max_retries": 0}
QUESTION = "What is a rolling cache?"
QUESTION_FOR_TOOL = "How many miles are 42 kilometers?"
MOST_TOKENS = 200  # of an answer in JSON
MOST_TURNS = 3

TEXT_AND_TOOL = ("text", "text streamed", "tool", "tool streamed")
JSON = ("json", "json streamed")

# Text and calls, or a value; of a conversation with the tool, the text is the last answer.
Answer = dict[str, Any]
CASES: dict[tuple[str, str], Callable[..., Answer]] = {}
Hobby = Literal["chess", "hiking", "music"]


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=16)
    age: int = Field(ge=0, le=130)
    job: Literal["baker", "doctor", "pilot", "teacher"]
    hobbies: list[Hobby] = Field(max_length=3)


def miles(kilometers: float) -> float:
    """Convert a length from kilometers to miles.

    Args:
        kilometers: The length in kilometers.
    """
    return round(kilometers / 1.609344, 3)


PARAMETERS = {
    "type": "object",
    "properties": {"kilometers": {"type": "number", "description": "The length in kilometers."}},
    "required": ["kilometers"],
}
FUNCTION = {
    "name": "miles",
    "description": "Convert a length from kilometers to miles.",
    "parameters": PARAMETERS,
}
TOOLS = [{"type": "function", "function": FUNCTION}]


class Unfinished(Exception):
    """An answer that was cut off, as its finish_reason says."""


def declare(client: str, forms: tuple[str, ...], run: Callable[..., Answer]) -> None:
    """Add a client, run as `run(form)`, or `run(form, n)` for JSON."""
    for form in forms:
        CASES[client, form] = run


def is_streamed(form: str) -> bool:
    """Whether the answer is to come in a stream."""
    return form.endswith("streamed")


def has_tool(form: str) -> bool:
    """Whether the model may call `miles`."""
    return form.startswith("tool")


def question(form: str) -> str:
    """What the user asks."""
    return QUESTION_FOR_TOOL if has_tool(form) else QUESTION


def invention(n: int) -> str:
    """The n-th request for a person."""
    return f"Invent person number {n}."


def check_usage(tokens: Any) -> None:
    """RuntimeError if the usage did not arrive."""
    if not tokens:
        raise RuntimeError("no usage arrived")


class Conversation:
    """The turns of a conversation, and the calls in it."""

    def __init__(self, form: str):
        self.form = form
        self.calls: list[list[Any]] = []

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Call the tool: its result."""
        self.calls.append([name, arguments])
        return json.dumps(miles(**arguments))

    def tool(self) -> Callable[[float], float]:
        """`miles` for clients that call it themselves: its calls are noted."""

        @wraps(miles)
        def noted(kilometers: float) -> float:
            self.calls.append(["miles", {"kilometers": kilometers}])
            return miles(kilometers)

        return noted

    def run(self, turn: Callable[[], str | None]) -> Answer:
        """Take turns until one returns the last text."""
        for _ in range(MOST_TURNS):
            text = turn()
            if text is not None:
                return {"text": text, "calls": self.calls}
        raise RuntimeError("the model calls the tool again and again")


def converse(ask: Callable[[list[Any], dict[str, Any]], dict[str, Any]], form: str) -> Answer:
    """A conversation in OpenAI's messages; `ask(messages, options)` returns the next one."""
    conversation = Conversation(form)
    messages: list[Any] = [{"role": "user", "content": question(form)}]
    options = {"tools": TOOLS} if has_tool(form) else {}

    def turn() -> str | None:
        message = ask(messages, options)
        if not message.get("tool_calls"):
            return message["content"]
        messages.append(message)
        for call in message["tool_calls"]:
            function = call["function"]
            result = conversation.call(function["name"], json.loads(function["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return None

    return conversation.run(turn)

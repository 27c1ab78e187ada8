"""OpenAI's responses: the body of a request to a task."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mistral.server.protocol.chat_completions import ObjectFormat, TextFormat
from mistral.server.protocol.errors import invalid
from mistral.server.protocol.fields import Part, differs, done, ignored, refused
from mistral.server.protocol.generation import StreamableBody, StreamOptions, sampling_of
from mistral.server.protocol.task import ChatTask

_LOGPROBS = "message.output_text.logprobs"
_ANY_OBJECT = {"type": "object"}


class Tool(Part):
    """A function that the model may call."""

    type: Literal["function"] = done("other tools are refused", ...)
    name: str = done("", ...)
    description: str | None = done()
    parameters: dict[str, Any] | None = done("a schema of an object")
    strict: bool | None = differs("calls follow the schema in either case")
    allowed_callers: list[str] | None = ignored("only the client calls")
    defer_loading: bool | None = ignored("the model reads all tools")
    output_schema: dict[str, Any] | None = ignored("the model does not read it")


class NamedTool(Part):
    """A tool by its name."""

    type: Literal["function"]
    name: str


class AllowedChoice(Part):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class SchemaFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Part):
    """The form of the text."""

    format: (
        Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = differs("as response_format of chat completions")
    verbosity: str | None = ignored("ask for it in the prompt")


class ResponsesBody(StreamableBody):
    """The body of a request to /v1/responses."""

    model: str | None = differs("any name; the server has one model, and replies with its name")
    input: str | list[dict[str, Any]] = differs(
        "text, messages, function_call, function_call_output; reasoning is left out", ...
    )
    instructions: str | None = done("the system message")
    previous_response_id: str | None = differs("of the server's last responses, in its memory")
    store: bool | None = differs("false: the response cannot be continued")
    tools: list[Tool] | None = done()
    tool_choice: (
        Literal["auto", "none", "required"]
        | Annotated[NamedTool | AllowedChoice, Field(discriminator="type")]
        | None
    ) = done("held by a grammar; a function: exactly one call")
    parallel_tool_calls: bool | None = done("false: a grammar allows one call at most")
    text: TextOptions | None = done()
    max_output_tokens: int | None = differs("what does not fit is cut: incomplete", ge=1)
    temperature: float | None = differs("0 (greedy), or 0.00001 and more; not only up to 2")
    top_p: float | None = done()
    seed: int | None = differs("not in OpenAI's API: as in chat completions")
    top_logprobs: int | None = done(f"0 to 20; needs include: {_LOGPROBS}", ge=0, le=20)
    include: list[str] | None = differs(f"{_LOGPROBS}; others are ignored")
    stream: bool | None = done("server-sent events; a call comes when it is complete")
    stream_options: StreamOptions | None = differs(
        "needs stream: true; the last event has the usage in any case"
    )
    truncation: Literal["disabled"] | None = differs("only disabled: too long is an error")
    background: Literal[False] | None = differs("only false")
    background_options: None = refused("there is no background")
    context_management: None = refused("nothing is compacted")
    conversation: None = refused("use previous_response_id")
    image: None = refused("the model writes text")
    moderation: None = refused("there is no moderation")
    prompt: None = refused("there are no templates")
    access_programs: Any = ignored("there are none")
    max_tool_calls: int | None = ignored("the server calls no tools")
    metadata: dict[str, str] | None = differs("is in the reply, and not stored")
    prompt_cache_key: str | None = ignored("prefixes are found without it")
    prompt_cache_options: Any = ignored("prefixes are found without it")
    prompt_cache_retention: str | None = ignored("a prefix stays until its slot is needed")
    reasoning: dict[str, Any] | None = ignored("the models do not reason apart from their answer")
    safety_identifier: str | None = ignored("users are not told apart")
    service_tier: str | None = ignored("all requests are served in their order")
    user: str | None = ignored("users are not told apart")

    def task(self, messages: Sequence[dict[str, Any]]) -> ChatTask:
        """What the model has to do with these messages, the input among them."""
        system = []
        if self.instructions:
            system = [{"role": "system", "content": self.instructions}]
        schema, instruct, strict = self._schema()
        choice, allowed = self._choice()
        is_named = isinstance(self.tool_choice, NamedTool)
        given = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return ChatTask(
            messages=[*system, *messages],
            tools=[_tool(tool) for tool in self.tools or ()],
            tool_choice=choice,
            allowed=allowed,
            parallel=self.parallel_tool_calls is not False and not is_named,
            schema=schema,
            instruct=instruct,
            strict=strict,
            sampling=sampling_of(given),
            max_new_tokens=self.max_output_tokens,
            top_logprobs=self._top_logprobs(),
        )

    def _choice(self) -> tuple[str, tuple[str, ...] | None]:
        choice = self.tool_choice
        if choice is None or isinstance(choice, str):
            return choice or "auto", None
        if isinstance(choice, NamedTool):
            return choice.name, None
        if not choice.tools:
            raise invalid("tool_choice: allowed_tools names no tool", "tool_choice")
        return choice.mode, tuple(tool.name for tool in choice.tools)

    def _schema(self) -> tuple[dict[str, Any] | None, bool, bool]:
        format = None if self.text is None else self.text.format
        if format is None or isinstance(format, TextFormat):
            return None, False, False
        if isinstance(format, ObjectFormat):
            return _ANY_OBJECT, False, False
        return format.schema_, True, bool(format.strict)

    def _top_logprobs(self) -> int | None:
        if _LOGPROBS not in (self.include or ()):
            if self.top_logprobs:
                raise invalid(f"top_logprobs needs include: {_LOGPROBS}", "top_logprobs")
            return None
        return self.top_logprobs or 0


class Stored:
    """The messages of the last responses, in memory.

    capacity  in bytes, about; the oldest are forgotten
    """

    def __init__(self, capacity: int = 64 << 20):
        self._capacity = capacity
        self._size = 0
        self._messages: OrderedDict[str, tuple[list[dict[str, Any]], int]] = OrderedDict()

    def get(self, id: str | None) -> list[dict[str, Any]]:
        """The messages up to a response; none for no response. ApiError if it is not known."""
        if id is None:
            return []
        if id not in self._messages:
            raise invalid(
                f"there is no response {id!r}: it was not stored, or it is forgotten",
                "previous_response_id",
                "previous_response_not_found",
            )
        return self._messages[id][0]

    def put(self, id: str, messages: list[dict[str, Any]]) -> None:
        """Remember the messages up to a response."""
        size = len(repr(messages))
        self._messages[id] = (messages, size)
        self._size += size
        while self._size > self._capacity:
            _, (_, forgotten) = self._messages.popitem(last=False)
            self._size -= forgotten


def _tool(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
    }
    return {
        "type": "function",
        "function": {key: value for key, value in function.items() if value is not None},
    }

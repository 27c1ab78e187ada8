"""Anthropic's messages: the body of a request to a task."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mistral.errors import shown
from mistral.server.protocol.errors import invalid
from mistral.server.protocol.fields import Body, Part, differs, done, ignored, refused
from mistral.server.protocol.generation import sampling_of, stop_strings
from mistral.server.protocol.task import ChatTask

_BESIDE = ("cache_control", "citations", "caller", "toolset_name")  # keys that change nothing


class Message(Part):
    """A message of the conversation."""

    role: Literal["user", "assistant"] = done("", ...)
    content: str | list[dict[str, Any]] = differs(
        "blocks of the types text, tool_use and tool_result; thinking is left out, and an "
        "assistant's calls follow its text",
        ...,
    )


class Tool(Part):
    """A tool of the client."""

    name: str = done("", ...)
    description: str | None = done()
    input_schema: dict[str, Any] = done("", ...)
    type: Literal["custom"] | None = differs("only the client's own tools")
    strict: bool | None = differs("calls follow the schema in either case")
    cache_control: Any = ignored("prefixes are found without it")
    eager_input_streaming: bool | None = ignored("a call is sent when it is complete")
    input_examples: list[Any] | None = ignored("the model does not read them")
    allowed_callers: list[str] | None = ignored("only the client calls")
    defer_loading: bool | None = ignored("the model reads all tools")


class AnyChoice(Part):
    """Whether to call."""

    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(Part):
    """Which tool to call."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class Format(Part):
    """The form of an answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    """The form of an answer."""

    effort: str | None = ignored("the models do not reason apart from their answer")
    format: Format | None = done("a JSON schema, held by a grammar")


class CountBody(Body):
    """The body of a request to /v1/messages/count_tokens."""

    model: str | None = differs("any name; the server has one model, and replies with its name")
    messages: list[Message] = differs("the last one must be the user's", ...)
    system: str | list[dict[str, Any]] | None = done("text, or blocks of it")
    tools: list[Tool] | None = done()
    tool_choice: Annotated[AnyChoice | NamedChoice, Field(discriminator="type")] | None = done(
        "held by a grammar, disable_parallel_tool_use too"
    )
    output_config: OutputConfig | None = done()
    thinking: dict[str, Any] | None = differs("the models do not think apart from their answer")
    cache_control: Any = ignored("prefixes are found without it")
    speed: Any = ignored("there is one speed")
    user_profile_id: str | None = ignored("users are not told apart")
    workspace_id: str | None = ignored("users are not told apart")

    def task(self) -> ChatTask:
        """The conversation. ApiError for what cannot be expressed."""
        return ChatTask(**self._conversation(), sampling=sampling_of({}))

    def _conversation(self) -> dict[str, Any]:
        if self.messages and self.messages[-1].role == "assistant":
            raise invalid("the last message must be the user's: an answer cannot be continued")
        choice = self.tool_choice
        name = "auto" if choice is None else choice.type
        if isinstance(choice, NamedChoice):
            name = choice.name
        format = None if self.output_config is None else self.output_config.format
        return {
            "messages": [*self._system(), *self._turns()],
            "tools": [_tool(tool) for tool in self.tools or ()],
            "tool_choice": "required" if name == "any" else name,
            "parallel": not (choice is not None and choice.disable_parallel_tool_use),
            "schema": None if format is None else format.schema_,
            "strict": format is not None,
        }

    def _system(self) -> list[dict[str, Any]]:
        if not self.system:
            return []
        content = self.system
        if not isinstance(content, str):
            content = [_text_part("system", block) for block in content]
        return [{"role": "system", "content": content}]

    def _turns(self) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = []
        for i, message in enumerate(self.messages):
            where = f"messages[{i}]"
            if not message.content and message.role == "user":
                raise invalid(f"{where}: the content is empty", "messages")
            if isinstance(message.content, str):
                turns.append({"role": message.role, "content": message.content})
            elif message.role == "assistant":
                turns.append(_assistants(where, message.content))
            else:
                turns += _users(where, message.content)
        return turns


class MessagesBody(CountBody):
    """The body of a request to /v1/messages."""

    max_tokens: int = differs("what does not fit is cut: stop_reason max_tokens", ..., ge=1)
    stop_sequences: list[str] | None = differs("they do not end a call")
    stream: bool | None = done("server-sent events; a call comes when it is complete")
    temperature: float | None = differs("0 (greedy), or 0.00001 and more; not only up to 1")
    top_k: int | None = done()
    top_p: float | None = done()
    container: None = refused("there are no containers")
    diagnostics: Any = ignored("there are none")
    inference_geo: str | None = ignored("inference is where the server is")
    metadata: dict[str, Any] | None = ignored("nothing is stored")
    service_tier: str | None = ignored("all requests are served in their order")

    def task(self) -> ChatTask:
        """What the model has to do. ApiError for what cannot be expressed."""
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return ChatTask(
            **self._conversation(),
            sampling=sampling_of(given),
            max_new_tokens=self.max_tokens,
            stop=stop_strings(self.stop_sequences, "stop_sequences"),
        )


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function | {"parameters": tool.input_schema}}


def _assistants(where: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """An assistant's message; its calls follow its text."""
    texts = []
    calls = []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            fields = _fields(where, block, "id", "name", "input")
            function = {"name": fields["name"], "arguments": fields["input"]}
            calls.append({"id": fields["id"], "type": "function", "function": function})
        elif kind not in ("thinking", "redacted_thinking"):
            texts.append(_text_part(where, block))
    message: dict[str, Any] = {"role": "assistant", "content": texts}
    return message | ({"tool_calls": calls} if calls else {})


def _users(where: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results, and then the user's text. ApiError for a result after text, as of Anthropic's."""
    turns: list[dict[str, Any]] = []
    texts = []
    for block in blocks:
        if block.get("type") != "tool_result":
            texts.append(_text_part(where, block))
            continue
        if texts:
            raise invalid(f"{where}: a tool_result after text; results come first", "messages")
        fields = _fields(where, block, "tool_use_id", "content", "is_error")
        content = fields.get("content") or ""
        if not isinstance(content, str):
            content = [_text_part(where, part) for part in content]
        key = "error" if fields.get("is_error") else "content"
        turns.append({"role": "tool", "tool_call_id": fields.get("tool_use_id"), key: content})
    if texts:
        turns.append({"role": "user", "content": texts})
    return turns


def _text_part(where: str, block: Any) -> dict[str, Any]:
    """A block of text as a part of a content. ApiError for another type."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind != "text":
        raise invalid(
            f"{where}: a block of the type {shown(kind)}; the model reads text", "messages"
        )
    return {"type": "text", "text": _fields(where, block, "text").get("text")}


def _fields(where: str, block: dict[str, Any], *names: str) -> dict[str, Any]:
    """The block. ApiError for fields that are unknown or missing."""
    for name in block:
        if name not in ("type", *names, *_BESIDE):
            raise invalid(f"unknown field: {where}.content.{name}", "messages")
    for name in names:
        if name not in block and name not in ("content", "is_error"):
            raise invalid(f"missing field: {where}.content.{name}", "messages")
    return block

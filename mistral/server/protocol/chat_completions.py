"""OpenAI's chat completions: the body of a request to a task."""

from typing import Annotated, Any, Literal

from pydantic import Field

from mistral.server.protocol.details import ALTERNATIVES
from mistral.server.protocol.errors import invalid
from mistral.server.protocol.fields import Part, differs, done, ignored, refused
from mistral.server.protocol.generation import GenerationBody
from mistral.server.protocol.task import ChatTask

_ONLY_TEXT = "the model reads and writes text"
_ANY_OBJECT = {"type": "object"}


class Message(Part):
    """A message of the conversation."""

    role: str = done("system, developer (the same as system), user, assistant, tool", ...)
    content: str | list[dict[str, Any]] | None = differs("text, or parts of text, one a paragraph")
    name: str | None = differs("of the function, in a tool's message; of other roles ignored")
    tool_calls: list[dict[str, Any]] | None = done()
    tool_call_id: str | None = done()
    refusal: str | None = differs("is read as the content")
    function_call: dict[str, Any] | None = done("the form of 2023")
    audio: None = refused(_ONLY_TEXT)
    annotations: list[Any] | None = ignored("clients send back what they received")
    parsed: Any = ignored("what the clients' own stream() adds to an answer")
    reasoning: Any = ignored("clients send back what they received")
    reasoning_content: Any = ignored("clients send back what they received")


class Function(Part):
    """A function that the model may call."""

    name: str = done("", ...)
    description: str | None = done()
    parameters: dict[str, Any] | None = done(
        "a schema of an object; a keyword that the grammar cannot express is not guaranteed"
    )
    strict: bool | None = differs("calls follow the schema in either case")
    return_: dict[str, Any] | None = differs(
        "not in OpenAI's API: the schema of its result", alias="return"
    )


class Tool(Part):
    """A tool."""

    type: Literal["function"] = done("custom tools are refused", ...)
    function: Function = done("", ...)


class FunctionName(Part):
    """A function by its name."""

    name: str


class NamedTool(Part):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Part):
    """Which of the tools may be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(Part):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class JsonSchema(Part):
    """The schema of an answer."""

    name: str | None = ignored("the model does not read it")
    description: str | None = ignored("the model does not read it")
    # `schema` is the name of a method of pydantic's models
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = done("an answer that is not valid is an error")


class TextFormat(Part):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Part):
    """A JSON object."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class SchemaFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
ToolChoice = Annotated[NamedTool | AllowedChoice, Field(discriminator="type")]


class ChatBody(GenerationBody):
    """The body of a request to /v1/chat/completions."""

    messages: list[Message] = done("text that spells a control token stays text", ...)
    tools: list[Tool] | None = done()
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = done(
        "held by a grammar: auto, none, required, a function (exactly one call), allowed_tools"
    )
    parallel_tool_calls: bool | None = done("false: a grammar allows one call at most")
    response_format: ResponseFormat | None = differs(
        "text, json_object, json_schema, held by a grammar; the model reads the schema in its "
        "system message. A schema that no grammar can express is an error."
    )
    logprobs: bool | None = differs("calls have them too; a forced token is computed all the same")
    top_logprobs: int | None = done("0 to 20; needs logprobs", ge=0, le=20)
    details: bool | None = differs(
        "not in OpenAI's API: how each token was found (its probability, the alternatives, the "
        "forward pass), what each pass took, the prompt's tokens; needs n = 1"
    )
    max_tokens: int | None = differs("what does not fit is cut: finish_reason length", ge=1)
    max_completion_tokens: int | None = differs("the same as max_tokens", ge=1)
    modalities: list[Literal["text"]] | None = differs("only text")
    audio: None = refused(_ONLY_TEXT)
    function_call: None = refused("use tool_choice")
    functions: None = refused("use tools")
    moderation: None = refused("there is no moderation")
    web_search_options: None = refused("there is no web search")
    metadata: dict[str, Any] | None = ignored("nothing is stored")
    prediction: Any = ignored("speeds nothing up here")
    prompt_cache_key: str | None = ignored("prefixes are found without it")
    prompt_cache_options: Any = ignored("prefixes are found without it")
    prompt_cache_retention: str | None = ignored("a prefix stays until its slot is needed")
    reasoning_effort: str | None = ignored("the models do not reason apart from their answer")
    safety_identifier: str | None = ignored("users are not told apart")
    service_tier: str | None = ignored("all requests are served in their order")
    store: bool | None = ignored("nothing is stored")
    verbosity: str | None = ignored("ask for it in the prompt")

    def task(self) -> ChatTask:
        """What the model has to do. ApiError for fields that contradict each other."""
        choice, allowed = chosen_tools(self.tool_choice)
        is_named = isinstance(self.tool_choice, NamedTool)
        schema, instruct, strict = wanted_schema(self.response_format)
        if self.details and (self.n or 1) > 1:
            raise invalid("details needs n = 1", "details")
        return ChatTask(
            messages=[message.model_dump(exclude_none=True) for message in self.messages],
            tools=tools_to_read(self._given.get("tools")),
            tool_choice=choice,
            allowed=allowed,
            parallel=self.parallel_tool_calls is not False and not is_named,
            schema=schema,
            instruct=instruct,
            strict=strict,
            sampling=self.sampling(),
            n=self.n or 1,
            max_new_tokens=self._max_new_tokens(),
            stop=self.stop_strings(),
            top_logprobs=self._top_logprobs(),
            alternatives=ALTERNATIVES if self.details else None,
        )

    def _max_new_tokens(self) -> int | None:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise invalid("max_tokens and max_completion_tokens differ: give one", "max_tokens")
        return both.pop() if both else None

    def _top_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def tools_to_read(given: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The tools of a request as the model reads them: in their order, and without `strict`."""
    tools = []
    for tool in given or ():
        function = {
            key: value
            for key, value in tool["function"].items()
            if value is not None and key != "strict"
        }
        tools.append({"type": "function", "function": function})
    return tools


def chosen_tools(choice: Any) -> tuple[str, tuple[str, ...] | None]:
    """`tool_choice` as ChatTask's tool_choice and allowed."""
    if choice is None or isinstance(choice, str):
        return choice or "auto", None
    if isinstance(choice, NamedTool):
        return choice.function.name, None
    names = tuple(tool.function.name for tool in choice.allowed_tools.tools)
    if not names:
        raise invalid("tool_choice: allowed_tools names no tool", "tool_choice")
    return choice.allowed_tools.mode, names


def wanted_schema(format: Any) -> tuple[dict[str, Any] | None, bool, bool]:
    """A response format as ChatTask's schema, instruct and strict."""
    if format is None or isinstance(format, TextFormat):
        return None, False, False
    if isinstance(format, ObjectFormat):
        return format.schema_ or _ANY_OBJECT, format.schema_ is not None, False
    schema = format.json_schema.schema_
    if schema is None:
        raise invalid("response_format.json_schema has no schema", "response_format")
    return schema, True, bool(format.json_schema.strict)

"""Tasks to requests for the slots: prompts, constraints, and what reads each answer."""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mistral.chat.formats import ChatFormat, chat_format, choose_format
from mistral.chat.formats.messages import check_messages, tool_schemas
from mistral.chat.formats.prompts import json_prompt
from mistral.chat.grammar import GrammarError, json_constraint
from mistral.chat.grammar.free_text import TextOnly
from mistral.chat.structured import with_instruction
from mistral.chat.tool_choice import constraint_on_calls
from mistral.chat.tools.json_schema import SchemaError, compile_schema, problem
from mistral.engine.base import Constraint, Engine
from mistral.engine.constraints import AnyToken, KnownTokens
from mistral.engine.ids import check_rows
from mistral.errors import one_line
from mistral.sampling import Sampling
from mistral.server.choice import Choice, Reads
from mistral.server.protocol.errors import invalid, too_long
from mistral.server.protocol.task import ChatTask, Task, TextTask
from mistral.server.request import Request
from mistral.tokenizer import Tokenizer


class Jobs:
    """Makes the choices of tasks: each has a request for the slots, and reads its answer.

    engine          of the slots; nothing is computed with it here
    format          a name in `mistral.chat.formats.FORMATS`; None: chosen by the checkpoint
    max_new_tokens  of an answer, if a request does not say; None: as many as there is room for

    One thread at a time may use it. Raises ApiError for tasks that cannot be served.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        format: str | None = None,
        max_new_tokens: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.format = choose_format(tokenizer) if format is None else format
        self.chat = chat_format(tokenizer, self.format)
        self.limit = engine.limit
        self.vocab_size = engine.config.vocab_size
        self._engine = engine
        self._max_new_tokens = max_new_tokens
        self._text = TextOnly(engine, tokenizer, self.chat.stop_ids(tokenizer))

    def chat_prompt(self, task: ChatTask, generate: bool = True) -> list[int]:
        """The ids of a conversation, up to where the answer begins; or all, if none follows."""
        messages = task.messages
        try:
            if tools := tool_schemas(task.tools):
                self._check_choice(task)
        except ValueError as error:
            raise invalid(str(error), "tools") from None
        try:
            if task.schema is not None and task.instruct:
                check_messages(messages)
                messages = with_instruction(messages, json_prompt(task.schema))
            return self.chat.begin(self.tokenizer, messages, tools or None, generate)
        except (ValueError, RecursionError) as error:
            raise invalid(one_line(str(error)), "messages") from None

    def choices(self, task: Task) -> list[Choice]:
        """The answers that a task wants, in their order."""
        if isinstance(task, ChatTask):
            return self._chat_choices(task)
        return self._text_choices(task)

    def _chat_choices(self, task: ChatTask) -> list[Choice]:
        prompt = self.chat_prompt(task)
        constraint = self._constraint(task)
        check = _check(task.schema) if task.schema is not None and task.strict else None
        choices = []
        for n in range(task.n):
            request = self._request(task, prompt, n, constraint.copy())
            choice = Choice(
                index=n,
                request=replace(request, stop_tokens=self.chat.stop_ids(self.tokenizer)),
                tokenizer=self.tokenizer,
                chat=self.chat,
                stop=task.stop,
                # Under a grammar of JSON, a spelled end of turn can only be in a string.
                spelled_ends=task.schema is None,
                reads=_reads(task, self.chat),
                number=len(task.messages),
            )
            if check is not None:
                choice.check = check
            choices.append(choice)
        return choices

    def _text_choices(self, task: TextTask) -> list[Choice]:
        # A stop string that spells a control token means that token.
        controls = {self.tokenizer.control_id(text) for text in task.stop} - {None}
        stop_tokens = {*self.tokenizer.stop_ids, *controls}
        choices = []
        for place, prompt in enumerate(task.prompts):
            ids = self._text_prompt(prompt)
            for n in range(task.n):
                request = self._request(task, ids, n, self._known_tokens())
                choices.append(
                    Choice(
                        index=len(choices),
                        request=replace(
                            request, stop_tokens=stop_tokens, score_prompt=task.prompt_logprobs
                        ),
                        tokenizer=self.tokenizer,
                        chat=None,
                        prompt=place,
                        stop=task.stop,
                        reports_end=True,
                    )
                )
        return choices

    def _text_prompt(self, prompt: str | list[int]) -> list[int]:
        try:
            if isinstance(prompt, str):
                return self.tokenizer.encode(prompt)
            check_rows([prompt], 1, self.vocab_size)
            return prompt
        except ValueError as error:
            raise invalid(one_line(str(error)), "prompt") from None

    def _request(
        self, task: Task, prompt: list[int], n: int, constraint: Constraint | None
    ) -> Request:
        """The request of the n-th answer."""
        room = self.limit - len(prompt)
        if room < 1:
            raise too_long(len(prompt), self.limit)
        wanted = self._max_new_tokens if task.max_new_tokens is None else task.max_new_tokens
        try:
            task.sampling.check_ids(self.vocab_size)
        except ValueError as error:
            raise invalid(one_line(str(error)), "logit_bias", "invalid_value") from None
        try:
            return Request(
                prompt_ids=prompt,
                sampling=replace(task.sampling, seed=_seed(task.sampling, n)),
                max_new_tokens=room if wanted is None else min(wanted, room),
                constraint=constraint,
                top_logprobs=task.top_logprobs,
                alternatives=task.alternatives,
            )
        except ValueError as error:
            raise invalid(one_line(str(error))) from None

    def _known_tokens(self) -> Constraint | None:
        """No id without a token, if the model has such rows."""
        if self.tokenizer.vocab_size >= self.vocab_size:
            return None
        return KnownTokens(self._engine, self.tokenizer.vocab_size, AnyToken())

    def _check_choice(self, task: ChatTask) -> None:
        """ApiError for a choice of tools that do not exist."""
        if not self.chat.has_tools:
            raise invalid("the chat format of this model has no tools", "tools")
        names = [tool["function"]["name"] for tool in task.tools]
        chosen = [] if task.tool_choice in ("auto", "none", "required") else [task.tool_choice]
        for name in [*chosen, *(task.allowed or ())]:
            if name not in names:
                raise invalid(f"tool_choice: there is no tool {name!r}", "tool_choice")

    def _constraint(self, task: ChatTask) -> Constraint:
        """What the answers to a task may be; to be copied for each."""
        tools = [
            tool
            for tool in task.tools
            if task.allowed is None or tool["function"]["name"] in task.allowed
        ]
        if task.tool_choice not in ("auto", "none") and not tools:
            raise invalid(f"tool_choice {task.tool_choice!r} needs tools", "tool_choice")
        may_call = bool(tools) and task.tool_choice != "none"
        try:
            if task.schema is not None and not may_call:
                return json_constraint(
                    self.tokenizer,
                    self.vocab_size,
                    task.schema,
                    stop_tokens=self.chat.stop_ids(self.tokenizer),
                    strip_leading_space=self.chat.strip_leading_space,
                )
            if not tools:
                return self._text
            return constraint_on_calls(
                self._engine,
                self.tokenizer,
                self.chat,
                tools,
                task.tool_choice,
                self._text,
                parallel=task.parallel,
                answer=task.schema,
            )
        except (GrammarError, SchemaError, RecursionError) as error:
            field = "response_format" if task.schema is not None else "tools"
            raise invalid(one_line(str(error)), field, "invalid_schema") from None


def _reads(task: ChatTask, chat: ChatFormat) -> Reads:
    if not task.tools or task.tool_choice == "none":
        return "text"
    # A token before the calls tells them from JSON, or else their tag.
    return "calls" if task.schema is None or chat.call_token is not None else "calls or json"


def _seed(sampling: Sampling, n: int) -> int:
    """Of the n-th answer. Without one, a row would depend on what the others draw."""
    seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
    return (seed + n) % 2**64


def _check(schema: Mapping[str, Any]) -> Callable[[str], str | None]:
    """What finds the problem of an answer, or None."""
    validator = compile_schema(schema)

    def check(text: str) -> str | None:
        try:
            return problem(validator, json.loads(text))
        except (ValueError, RecursionError) as error:
            return one_line(str(error))

    return check

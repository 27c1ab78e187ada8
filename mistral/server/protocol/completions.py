"""OpenAI's completions: a text is continued, without a chat format."""

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from mistral.chat.events import Text
from mistral.server.choice import Choice, Delta
from mistral.server.protocol.errors import invalid
from mistral.server.protocol.fields import differs, done, refused
from mistral.server.protocol.generation import GenerationBody
from mistral.server.protocol.reply import Reply
from mistral.server.protocol.task import TextTask
from mistral.server.protocol.tokens_as_text import logprob, token_text
from mistral.server.protocol.usage import timings, usage
from mistral.server.request import Chosen

_DEFAULT_TOKENS = 16  # OpenAI's
_MOST_PROMPTS = 64


class CompletionBody(GenerationBody):
    """The body of a request to /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]] = differs(
        "text that spells a control token stays text; ids are taken as they are", ...
    )
    max_tokens: int | None = done("default: 16", ge=0)
    logprobs: int | None = done("0 to 20", ge=0, le=20)
    echo: bool | None = differs("with logprobs the prompt has them too, but not in a stream")
    best_of: int | None = differs("only the same as n", ge=1)
    suffix: None = refused("the models do not fill in")

    def task(self) -> TextTask:
        """What the model has to do. ApiError for fields that contradict each other."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("best_of must be n: all answers are returned", "best_of")
        prompt_logprobs = bool(self.echo) and self.logprobs is not None
        if prompt_logprobs and self.stream:
            raise invalid("echo with logprobs cannot be streamed", "echo")
        prompts = self.prompts()
        if not 1 <= len(prompts) <= _MOST_PROMPTS:
            raise invalid(f"{len(prompts)} prompts: 1 to {_MOST_PROMPTS} are allowed", "prompt")
        return TextTask(
            prompts=prompts,
            prompt_logprobs=prompt_logprobs,
            sampling=self.sampling(),
            n=self.n or 1,
            max_new_tokens=_DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens,
            stop=self.stop_strings(),
            top_logprobs=self.logprobs,
        )

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or more."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class CompletionReply(Reply):
    """The reply to one request of a completion.

    echo  whether each text begins with its prompt
    """

    def __init__(
        self,
        model: str,
        choices: Sequence[Choice],
        with_usage: bool = False,
        echo: Sequence[str | list[int]] | None = None,
    ):
        super().__init__(choices)
        self._model = model
        self._with_usage = with_usage
        self._echo = echo
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._sent = [0] * len(choices)  # tokens whose log-probabilities were sent

    def whole(self) -> dict[str, Any]:
        """The reply when all answers have ended."""
        listed = []
        for choice in self.choices:
            text = self._prompt_text(choice) + choice.text
            logprobs = self._logprobs(choice, 0, len(choice.tokens))
            if choice.request.score_prompt:
                logprobs = self._prompt_logprobs(choice, logprobs)
            listed.append(_choice(choice.index, text, logprobs, choice.finish))
        numbers = {"usage": usage(self.choices), "timings": timings(self.choices)}
        return self._envelope(listed) | numbers

    def begin(self) -> Iterator[dict[str, Any]]:
        """The prompts, if they are echoed."""
        for choice in self.choices:
            if text := self._prompt_text(choice):
                yield self._envelope([_choice(choice.index, text)])

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """One chunk."""
        choice = self.choices[delta.index]
        start = self._sent[delta.index]
        self._sent[delta.index] += len(delta.tokens)
        text = "".join(event.text for event in delta.events if isinstance(event, Text))
        logprobs = self._logprobs(choice, start, self._sent[delta.index])
        if text or logprobs or delta.finish:
            yield self._envelope([_choice(delta.index, text, logprobs, delta.finish)])

    def end(self) -> Iterator[dict[str, Any]]:
        """The usage, if it was asked for."""
        if self._with_usage:
            numbers = {"usage": usage(self.choices), "timings": timings(self.choices)}
            yield self._envelope([]) | numbers

    def _prompt_text(self, choice: Choice) -> str:
        if self._echo is None:
            return ""
        prompt = self._echo[choice.prompt]
        return prompt if isinstance(prompt, str) else choice.tokenizer.decode(prompt, control=True)

    def _logprobs(self, choice: Choice, start: int, end: int) -> dict[str, Any] | None:
        """Those of some of the tokens."""
        if choice.request.top_logprobs is None or start == end:
            return None
        return _listed(choice, choice.tokens[start:end], choice.starts[start:end])

    def _prompt_logprobs(self, choice: Choice, after: dict[str, Any] | None) -> dict[str, Any]:
        """Those of the prompt and then of the answer. The first token has none."""
        prompt = self._prompt_text(choice)
        spells_control = not isinstance(self._echo[choice.prompt], str)
        stream = choice.tokenizer.stream(strip_leading_space=True, control=spells_control)
        ends = [0]
        for id in choice.request.prompt_ids:
            ends.append(min(ends[-1] + len(stream.feed(id)), len(prompt)))
        found = _listed(choice, choice.run.prompt, ends[1:-1])
        first = token_text(choice.tokenizer, choice.request.prompt_ids[0])
        before = {
            "tokens": [first, *found["tokens"]],
            "token_logprobs": [None, *found["token_logprobs"]],
            "top_logprobs": [None, *found["top_logprobs"]],
            "text_offset": [0, *found["text_offset"]],
        }
        if after is None:
            return before
        places = [len(prompt) + place for place in after["text_offset"]]
        after = after | {"text_offset": places}
        return {key: [*values, *after[key]] for key, values in before.items()}

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def _listed(choice: Choice, tokens: Sequence[Chosen], places: Sequence[int]) -> dict[str, Any]:
    """Tokens with their log-probabilities and their places in the text."""
    tokenizer = choice.tokenizer
    tops = []
    for token in tokens:
        top = {token_text(tokenizer, id): logprob(value) for id, value in token.top}
        # The chosen token is always among them, as in OpenAI's API.
        tops.append(top | {token_text(tokenizer, token.id): logprob(token.logprob)})
    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [logprob(token.logprob) for token in tokens],
        "top_logprobs": tops,
        "text_offset": list(places),
    }


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

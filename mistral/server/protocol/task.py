"""What a request asks of the model, whichever API it came by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Task:
    """How to generate.

    n               answers to each prompt; the k-th has the seed `sampling.seed + k`
    max_new_tokens  None: as many as there is room for
    stop            strings that end an answer
    top_logprobs    None: no log-probabilities; 0: those of the chosen tokens alone
    alternatives    None: no details; else how many alternatives to each sampled token they have
    """

    sampling: Sampling
    n: int = 1
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    alternatives: int | None = None

    @property
    def num_answers(self) -> int:
        """How many answers there will be."""
        return self.n


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """Continue texts; a prompt that is a list of ids is taken as it is.

    prompt_logprobs  whether the tokens of the prompts get log-probabilities, too
    """

    prompts: Sequence[str | list[int]]
    prompt_logprobs: bool = False

    @property
    def num_answers(self) -> int:
        """How many answers there will be, to all prompts together."""
        return self.n * len(self.prompts)


@dataclass(frozen=True, kw_only=True)
class ChatTask(Task):
    """Answer a conversation.

    messages     as `encode_chat` takes them
    tools        {"type": "function", "function": {...}} each; the model reads all of them
    tool_choice  "auto", "none", "required", or the name of a tool
    allowed      the names of the tools that may be called; None: all
    parallel     False: one call at most
    schema       that the answer must follow, if it is not a call; None: any text
    instruct     whether the model reads the schema
    strict       whether an answer that is not valid is an error. It can only occur if the grammar
                 cannot express a part of the schema.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    allowed: tuple[str, ...] | None = None
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    instruct: bool = True
    strict: bool = False

"""What goes into the slots and what comes out of them, in ids: a request, its run, its tokens."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from mistral.engine.base import Constraint
from mistral.engine.ids import stop_ids, token_ids
from mistral.engine.loop import check_sampling
from mistral.errors import shown
from mistral.sampling import Sampling

MOST_TOP_LOGPROBS = 1024

State = Literal["waiting", "reading", "running", "ended"]
# "sampled": drawn from the model's distribution. "forced": a constraint left no choice, and the
# model was not asked. "drafted": drawn, too, and a guess had named it before.
Origin = Literal["sampled", "forced", "drafted"]
# What a forward pass reads: a part of a prompt, the last token of each row, ids that a constraint
# forces, or a guess.
PassKind = Literal["prompt", "step", "forced", "verify"]
# "stop": a stop token. "length": max_new_tokens. "full": the row has no more room.
Reason = Literal["stop", "length", "full", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One answer to one prompt. There is no text in it: stop strings are the caller's part.

    prompt_ids      whole numbers of any type, at least one; stored as a tuple
    max_new_tokens  0: the prompt is only read
    stop_tokens     an answer ends after one of them; stored as a frozenset
    constraint      of this request alone: it is told every id that is chosen, but no stop token
    top_logprobs    how many of the most probable ids to report with each chosen one, next to the
                    log-probability of the chosen one itself, which 0 reports alone; None: neither
    score_prompt    report the same of the prompt's ids; no prefix of it is reused then
    alternatives    report details: with each id that is sampled its log-probability and so many of
                    the most probable ids, and the forward passes of the run; None: neither. The
                    model is not asked for forced ids, which have no log-probability

    Raises ValueError for anything else.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop_tokens: Any = ()
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    score_prompt: bool = False
    alternatives: int | None = None

    def __post_init__(self) -> None:
        prompt = tuple(token_ids(self.prompt_ids))
        if not prompt:
            raise ValueError(
                "the prompt is empty: it needs one token at least, the begin-of-text token for "
                "example"
            )
        check_sampling(self.sampling)
        if not _is_count(self.max_new_tokens):
            raise ValueError(
                "max_new_tokens must be a whole number, 0 or more, not "
                f"{shown(self.max_new_tokens)}"
            )
        top = self.top_logprobs
        if top is not None and not (_is_count(top) and top <= MOST_TOP_LOGPROBS):
            raise ValueError(
                f"top_logprobs must be a whole number from 0 to {MOST_TOP_LOGPROBS}, not "
                f"{shown(top)}"
            )
        object.__setattr__(self, "prompt_ids", prompt)
        object.__setattr__(self, "stop_tokens", stop_ids(self.stop_tokens, ()))
        if self.constraint is not None:
            object.__setattr__(self, "constraint", Constraint.of(self.constraint))

    @property
    def num_reported(self) -> int | None:
        """How many ids to report with each chosen one; None: not even its log-probability."""
        wanted = [n for n in (self.top_logprobs, self.alternatives) if n is not None]
        return max(wanted, default=None)


class Forward(NamedTuple):
    """A forward pass.

    n        its number, from 1
    rows     how many rows took part
    tokens   of all of them together
    seconds  with the choice of the next ids, if it is a step
    """

    n: int
    kind: PassKind
    rows: int
    tokens: int
    seconds: float


class Chosen(NamedTuple):
    """A token of an answer.

    logprob  the log-probability that the model gave it, before penalties; None: not asked for
    top      the most probable ids with theirs, the highest first
    origin   how it was found
    forward  the number of the forward pass that appended it; None: the passes are not recorded
    """

    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    origin: Origin = "sampled"
    forward: int | None = None

    @classmethod
    def scored(cls, ids: Sequence[int], log_p: Tensor, most: int) -> list[Self]:
        """Tokens with their log-probabilities and the `most` highest of each, from log_p [T, V]."""
        own = log_p.gather(1, torch.tensor(ids, device=log_p.device)[:, None])  # [T, 1]
        values, top = log_p.topk(min(most, log_p.shape[1]))  # [T, most] each
        # Read back for all tokens together: each read waits for the device.
        scores = torch.cat((own, values), dim=1).tolist()
        return [
            cls(id, score, list(zip(best, highest)))
            for id, (score, *highest), best in zip(ids, scores, top.tolist())
        ]


@dataclass(eq=False)
class Run:
    """A request on its way through the slots.

    state          waiting for a row, reading its prompt, running, or ended
    reason         why it ended; None until then
    error          what ended it, if the reason is "error"
    generated      how many tokens were chosen
    row            that it has or had; None: it never had one
    cached_tokens  how many tokens of the prompt the row held already
    prompt         the prompt's ids from the second on, with their log-probabilities, if asked for
    forwards       its forward passes, if its request wants details
    times          seconds of `time.monotonic`: queued, admitted, first (token), ended
    """

    request: Request
    state: State = "waiting"
    reason: Reason | None = None
    error: Exception | None = None
    generated: int = 0
    row: int | None = None
    cached_tokens: int = 0
    prompt: list[Chosen] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    _news: list[Chosen] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens the prompt has."""
        return len(self.request.prompt_ids)

    def add(self, chosen: Chosen) -> None:
        """Add a token to the answer."""
        if not self.generated:
            self.note("first")
        self.generated += 1
        if self.forwards:
            chosen = chosen._replace(forward=self.forwards[-1].n)
        self._news.append(chosen)

    def add_prompt(self, log_p: Tensor) -> None:
        """Add what the model gave the next ids of the prompt: log_p [T, V]."""
        following = self.request.prompt_ids[len(self.prompt) + 1 :][: len(log_p)]
        if following:  # the last id of a prompt has none after it
            most = self.request.top_logprobs or 0
            self.prompt += Chosen.scored(following, log_p[: len(following)], most)

    def take(self) -> list[Chosen]:
        """The tokens that were added since the last call."""
        news = self._news
        self._news = []
        return news

    def end(self, reason: Reason, error: Exception | None = None) -> None:
        """The last change of a run."""
        self.state = "ended"
        self.reason = reason
        self.error = error
        self.note("ended")

    def progress(self) -> dict[str, Any]:
        """How far it has come, for a status page."""
        return {
            "state": self.state,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated": self.generated,
            "max_new_tokens": self.request.max_new_tokens,
        }

    def note(self, name: str) -> None:
        """Store the time of an event."""
        self.times[name] = time.monotonic()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

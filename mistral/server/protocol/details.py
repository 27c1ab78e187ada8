"""How each token of an answer was found: our extension of the chat completions."""

import math
from typing import Any

from mistral.server.choice import Choice, Delta
from mistral.server.protocol.tokens_as_text import token_text
from mistral.server.request import Chosen, Forward

ALTERNATIVES = 8  # the most probable tokens that are shown with each one


class AnswerDetails:
    """The details of one answer, while it is written.

    window  of the model, in tokens; None: it has none
    """

    def __init__(self, choice: Choice, window: int | None):
        self._choice = choice
        self._window = window
        self._has_prompt = False
        self._sent = 0  # forward passes

    def of(self, delta: Delta) -> dict[str, Any]:
        """The details of one delta, of the first the prompt's, of the last the end's too.

        Empty if there is nothing to tell.
        """
        forwards = self._choice.run.forwards[self._sent :]
        self._sent += len(forwards)
        details: dict[str, Any] = {}
        if delta.tokens:
            details["tokens"] = [self._token(token) for token in delta.tokens]
        if forwards:
            details["forwards"] = [_forward(one) for one in forwards]
        if not self._has_prompt:
            self._has_prompt = True
            details["prompt"] = self._prompt()
        if delta.finish is not None:
            details["end"] = self._end()
        return details

    def whole(self) -> dict[str, Any]:
        """The details when the answer has ended."""
        return {
            "tokens": [self._token(token) for token in self._choice.tokens],
            "forwards": [_forward(one) for one in self._choice.run.forwards],
            "prompt": self._prompt(),
            "end": self._end(),
        }

    def _token(self, token: Chosen) -> dict[str, Any]:
        return {
            "id": token.id,
            "text": self._text(token.id),
            "origin": token.origin,
            "p": None if token.logprob is None else _probability(token.logprob),
            "top": [[self._text(id), _probability(log_p)] for id, log_p in token.top],
            "forward": token.forward,
        }

    def _prompt(self) -> dict[str, Any]:
        run = self._choice.run
        return {
            "tokens": [[id, self._text(id)] for id in run.request.prompt_ids],
            "cached": run.cached_tokens,
            "slot": run.row,
        }

    def _end(self) -> dict[str, Any]:
        run = self._choice.run
        position = run.prompt_tokens + run.generated
        rolled = 0 if self._window is None else max(0, position - self._window)
        return {"position": position, "window": self._window, "rolled": rolled}

    def _text(self, id: int) -> str:
        return token_text(self._choice.tokenizer, id)


def _forward(one: Forward) -> dict[str, Any]:
    return {
        "n": one.n,
        "kind": one.kind,
        "rows": one.rows,
        "tokens": one.tokens,
        "ms": round(1000 * one.seconds, 3),
    }


def _probability(log_p: float) -> float:
    return round(math.exp(log_p), 6)

"""How many tokens a request took, and how long."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mistral.server.choice import Choice


class Counts(NamedTuple):
    """Tokens of a request: each prompt counts once, however many answers it gets."""

    prompt: int
    cached: int
    generated: int


def counts(choices: Sequence[Choice]) -> Counts:
    """The tokens of all answers together."""
    first = {choice.prompt: choice for choice in reversed(choices)}.values()
    return Counts(
        prompt=sum(len(choice.request.prompt_ids) for choice in first),
        cached=sum(choice.run.cached_tokens for choice in first if choice.run is not None),
        generated=sum(choice.generated for choice in choices),
    )


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """OpenAI's usage."""
    prompt, cached, generated = counts(choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(choices: Sequence[Choice]) -> dict[str, Any]:
    """Milliseconds of the first answer, under llama-server's names."""
    choice = choices[0]
    times = choice.run.times
    queued = times["queued"]
    admitted = times.get("admitted", queued)
    first = times.get("first", admitted)
    seconds = (choice.ended or first) - first
    return {
        "queue_ms": _milliseconds(admitted - queued),
        "cache_n": choice.run.cached_tokens,
        "prompt_n": choice.run.prompt_tokens - choice.run.cached_tokens,
        "prompt_ms": _milliseconds(first - admitted),
        "predicted_n": choice.generated,
        "predicted_ms": _milliseconds(seconds),
        "predicted_per_second": round(choice.generated / seconds, 3) if seconds > 0 else None,
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)

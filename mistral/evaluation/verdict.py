"""Passed or why not, and what many verdicts amount to."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mistral.chat.tools.json_schema import one_line

# Why an answer fails, in the order in which it is looked for. "crash" is for the paper's rules
# alone: their program ends with an exception there.
REASONS = {
    "function-calling": (
        "no call", "wrong count", "unknown function", "schema failure", "wrong function",
        "wrong argument", "crash",
    ),
    "json-mode": ("not JSON", "schema failure", "wrong keys", "wrong values", "crash"),
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right.

    reason  "passed", or one of REASONS
    detail  what exactly is wrong, for a person
    """

    reason: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the answer is right."""
        return self.reason == "passed"


def key_problem(expected: Any, value: Any) -> str | None:
    """How the keys of the two differ;

    None for two objects with the same keys. What is no object has none.
    """
    if isinstance(value, dict) and isinstance(expected, dict) and value.keys() == expected.keys():
        return None
    told = (
        str(list(one)) if isinstance(one, dict) else f"none, in a {type(one).__name__}"
        for one in (expected, value)
    )
    return one_line("expected the keys {}, got {}".format(*told))


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Of one or more: n, how many passed, the rate with its 95% interval, and how many failed for
    which reason.
    """
    passed = sum(verdict.passed for verdict in verdicts)
    return {
        "n": len(verdicts),
        "passed": passed,
        "rate": passed / len(verdicts),
        "interval": wilson(passed, len(verdicts)),
        "reasons": dict(Counter(verdict.reason for verdict in verdicts if not verdict.passed)),
    }


def wilson(passed: int, n: int) -> tuple[float, float]:
    """The 95% interval of a rate after n >= 1 trials: Wilson's score interval (JASA 22, 1927).

    Unlike the rate plus or minus 1.96 standard deviations it stays within 0 and 1, and is right
    near both.
    """
    z = 1.959963984540054  # the normal distribution has 95% within so many standard deviations
    rate = passed / n
    center = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Both ends are exact where none or all passed, but for rounding.
    return (center - half) / scale if passed else 0.0, (
        center + half
    ) / scale if passed < n else 1.0

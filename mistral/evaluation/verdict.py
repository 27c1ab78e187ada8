"""Whether an answer passed, or why not, and the rate of many verdicts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mistral.errors import one_line

# Why an answer fails, in the order of the checks. "crash" is only in the paper's rules: their
# program ends with an exception.
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
    detail  the exact problem, for a person
    """

    reason: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the answer is right."""
        return self.reason == "passed"


def key_problem(expected: Any, value: Any) -> str | None:
    """How the keys of two values differ; None for two objects with the same keys."""
    if isinstance(value, dict) and isinstance(expected, dict) and value.keys() == expected.keys():
        return None
    return one_line(f"expected the keys {_keys(expected)}, got {_keys(value)}")


def _keys(value: Any) -> str:
    return str(list(value)) if isinstance(value, dict) else f"none, in a {type(value).__name__}"


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """n, how many passed, the rate and its 95% interval, and how often each reason was given.

    At least one verdict is needed.
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

    Unlike the rate plus or minus 1.96 standard deviations it stays within 0 and 1, and is accurate
    near both.
    """
    z = 1.959963984540054  # 95% of a normal distribution is within so many standard deviations
    rate = passed / n
    center = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # Exact, without rounding, if none or all passed.
    low = (center - half) / scale if passed else 0.0
    high = (center + half) / scale if passed < n else 1.0
    return low, high

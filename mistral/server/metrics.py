"""Numbers for Prometheus, about this server alone."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mistral.server.choice import Choice
from mistral.server.protocol.usage import counts
from mistral.server.worker import Worker

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counts requests and tokens; `text` has all numbers."""

    def __init__(self, worker: Worker, slots: int):
        self._registry = CollectorRegistry()
        named = {"namespace": "mistral", "registry": self._registry}
        self._requests = Counter(
            "requests", "Requests, by route and status", **named, labelnames=("route", "status")
        )
        self._prompt = Counter("prompt_tokens", "Tokens of prompts, the cached ones too", **named)
        self._cached = Counter("cached_tokens", "Tokens of prompts that a slot held", **named)
        self._generated = Counter("generated_tokens", "Tokens of answers", **named)
        self._queued = Histogram("queue_seconds", "Wait for a slot", buckets=_SECONDS, **named)
        self._first = Histogram(
            "first_token_seconds", "From the request to the first token", buckets=_SECONDS, **named
        )
        self._between = Histogram(
            "token_seconds", "Mean time between the tokens of an answer", buckets=_SECONDS, **named
        )
        self._whole = Histogram(
            "answer_seconds", "From the request to the last token", buckets=_SECONDS, **named
        )
        Gauge("slots", "Slots", **named).set(slots)
        Gauge("slots_busy", "Slots with a request", **named).set_function(
            lambda: sum(row["state"] != "free" for row in worker.snapshot.rows)
        )
        Gauge("requests_waiting", "Requests without a slot", **named).set_function(
            lambda: worker.snapshot.waiting
        )

    def count_request(self, route: str, status: int) -> None:
        """A request was replied to."""
        self._requests.labels(route=route, status=str(status)).inc()

    def count_answers(self, choices: Sequence[Choice]) -> None:
        """The answers to a request have ended, or were cancelled."""
        numbers = counts(choices)
        self._prompt.inc(numbers.prompt)
        self._cached.inc(numbers.cached)
        self._generated.inc(numbers.generated)
        for choice in choices:
            times = {} if choice.run is None else choice.run.times
            if "first" not in times:
                continue
            self._queued.observe(times["admitted"] - times["queued"])
            self._first.observe(times["first"] - times["queued"])
            if choice.ended is None:  # it was cancelled
                continue
            self._whole.observe(choice.ended - times["queued"])
            if choice.generated > 1:
                self._between.observe((choice.ended - times["first"]) / (choice.generated - 1))

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

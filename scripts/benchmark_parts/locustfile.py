"""Load for locust: streams of /v1/completions, with the times of their tokens.

    locust -f scripts/benchmark_parts/locustfile.py --headless -u 8 -r 8 -t 30s \\
        --host http://127.0.0.1:8000 --prompt-tokens 128 --new-tokens 64

Needs no package but locust, which runs it. The requests are those of scripts/benchmark_serve.py:
every prompt is new, and each answer is the letter a, repeated by a bias, so that tokens can be
counted. The last line that it prints is JSON, in seconds as benchmark_serve.py prints them.
"""

import json
import random
import time
from pathlib import Path

from locust import HttpUser, constant, events, task

PATH = "/v1/completions"
FIRST, BETWEEN = "first token", "between tokens"


@events.init_command_line_parser.add_listener
def add_arguments(parser):
    """How long prompts and answers are."""
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)


class Client(HttpUser):
    """Sends one request after the other."""

    wait_time = constant(0)

    def on_start(self):
        """Ask the server for ids that prompts can be made of, and for that of the answer."""
        self.ids = sorted({*self.tokenize(Path(__file__).read_text())})
        self.answer = self.tokenize("a")[-1]

    def tokenize(self, text):
        """The ids of a text."""
        body = {"content": text, "parse_special": False}
        return self.client.post("/tokenize", json=body).json()["tokens"]

    @task
    def complete(self):
        """One request; its tokens are reported as they come."""
        options = self.environment.parsed_options
        body = {
            "prompt": random.choices(self.ids, k=options.prompt_tokens),
            "max_tokens": options.new_tokens,
            "temperature": 0,
            "logit_bias": {str(self.answer): 100},
            "stream": True,
        }
        start = last = time.perf_counter()
        seen = 0
        with self.client.post(PATH, json=body, stream=True, catch_response=True) as response:
            for line in response.iter_lines():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                now = time.perf_counter()
                # A server may send several tokens in one event.
                for _ in range(sum(choice["text"].count("a") for choice in event["choices"])):
                    self.report(BETWEEN if seen else FIRST, now - (last if seen else start))
                    last = now
                    seen += 1
            if response.status_code == 200 and seen == options.new_tokens:
                response.success()
            else:
                response.failure(f"{response.status_code}, {seen} tokens")

    def report(self, name, seconds):
        """Count a time, in milliseconds, under a name of its own."""
        self.environment.last = time.perf_counter()
        self.environment.events.request.fire(
            request_type="token",
            name=name,
            response_time=1000 * seconds,
            response_length=0,
            exception=None,
            context={},
        )


@events.test_start.add_listener
def note_start(environment, **_):
    """From when on requests are sent; locust itself notes when the first one has ended."""
    environment.began = environment.last = time.perf_counter()


@events.quitting.add_listener
def print_summary(environment, **_):
    """One line of JSON."""
    stats = environment.stats
    first = stats.get(FIRST, "token")
    between = stats.get(BETWEEN, "token")
    whole = stats.get(PATH, "POST")
    seconds = environment.last - environment.began
    summary = {
        "requests": whole.num_requests,
        "failures": {str(one.error): one.occurrences for one in stats.errors.values()},
        "seconds": round(seconds, 3),
        "tokens_per_s": round((first.num_requests + between.num_requests) / seconds, 2),
        "first_token_s": percentiles(first),
        "between_tokens_s": percentiles(between),
    }
    print(json.dumps(summary), flush=True)


def percentiles(entry):
    """The median, the 99th of 100, and the longest; locust keeps two digits of the first two."""
    return {
        "p50": entry.get_response_time_percentile(0.5) / 1000,
        "p99": entry.get_response_time_percentile(0.99) / 1000,
        "most": round((entry.max_response_time or 0) / 1000, 4),
    }

"""Measure our server under load, beside llama-server with the same file and the same slots.

Each client sends one request after the other, over this machine's loopback. Every prompt is new:
no server can reuse a prefix. Each answer is the letter a, repeated by a bias, so that the tokens of
a stream can be counted. One line of JSON for each case. With --locust the clients are those of
https://locust.io, and send for --seconds.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import common
import httpx2
import torch
from benchmark_parts import machine, sizes
from benchmark_parts.formats import FORMATS
from benchmark_parts.peers import GGUFFile
from benchmark_parts.served import SERVERS, Serving, served
from benchmark_parts.sizes import SIZES

import mistral
from mistral_kernels.engines import ENGINES

LOCUSTFILE = Path(__file__).parent / "benchmark_parts/locustfile.py"


@dataclass
class Measured:
    """One request: when its tokens came, in seconds since it was sent."""

    times: list[float] = field(default_factory=list)

    @property
    def between(self) -> list[float]:
        """Seconds between its tokens."""
        return [after - before for before, after in pairwise(self.times)]


@dataclass(frozen=True)
class Load:
    """What the clients send: `clients` at the same time, `requests` of each."""

    clients: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    ids: Sequence[int]  # that prompts are made of
    answer: int  # the id that all answers repeat

    def body(self, client: int, number: int) -> dict:
        """A request that no other one resembles."""
        prompt = random.Random(f"{client} {number}").choices(self.ids, k=self.prompt_tokens)
        return {
            "prompt": prompt,
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "logit_bias": {str(self.answer): 100},
            "stream": True,
        }


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/benchmark_serve.py --formats plain Q4_K_M --slots 1 8"
    )
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="default: small (175 million parameters)"
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=("plain", *FORMATS),
        default=("plain", "Q8_0", "Q4_K_M"),
        help="of the weights; plain is float32 (default: plain Q8_0 Q4_K_M)",
    )
    parser.add_argument(
        "--file",
        type=common.path,
        help="serve this GGUF file, packed as it is, in place of --size and --formats",
    )
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=SERVERS, help="default: both"
    )
    parser.add_argument("--engine", choices=ENGINES, default="cpu", help="of ours (default: cpu)")
    parser.add_argument("--slots", type=int, nargs="+", default=(1, 8), help="default: 1 8")
    parser.add_argument("--clients", type=int, help="at the same time (default: as many as slots)")
    parser.add_argument("--requests", type=int, default=4, help="of each client (default: 4)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--new-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--threads", type=int, default=2, help="of each server (default: 2)")
    parser.add_argument(
        "--locust",
        type=common.path,
        metavar="PROGRAM",
        help="the command locust, of an environment of its own: it sends the requests",
    )
    parser.add_argument("--seconds", type=int, default=20, help="of --locust (default: 20)")
    args = parser.parse_args()
    counts = [args.seconds, args.requests, args.prompt_tokens, args.threads, *args.slots]
    if min(counts) < 1 or (args.clients is not None and args.clients < 1):
        raise ValueError("--slots, --clients, --requests and the others must be 1 or more")
    if args.new_tokens < 2:
        raise ValueError("--new-tokens must be 2 or more: there is a time between two")
    return args


def main() -> None:
    args = arguments()
    cpu = torch.device("cpu")
    facts = machine.facts(cpu, torch.float32) | {"threads": args.threads}
    for format in [None] if args.file else args.formats:
        with weights(args, format) as path:
            tokenizer = mistral.load(path, device="cpu", packed=format != "plain")[1]
            for slots in args.slots:
                for name in args.servers:
                    case = {"server": name, "model": args.size, "format": format, "slots": slots}
                    if args.file:
                        case |= {"model": args.file.name, "format": "its own"}
                    serving = Serving(
                        path=path,
                        engine=args.engine,
                        packed=format != "plain",
                        slots=slots,
                        room=args.prompt_tokens + args.new_tokens + 16,
                        threads=args.threads,
                    )
                    load = load_for(args, slots, tokenizer)
                    with served(name, serving) as address:
                        if args.locust:
                            result = by_locust(args.locust, address, load, args.seconds)
                        else:
                            result = asyncio.run(measure(address, load))
                    common.show_json(facts | case | result)


@contextmanager
def weights(args: argparse.Namespace, format: str | None):
    """The path of the file that is served."""
    if format is None:
        yield args.file
        return
    model = sizes.make_model(args.size, torch.device("cpu"), torch.float32, format)
    file = GGUFFile(model)
    yield Path(file.path)
    del file  # it is deleted with its object


def load_for(args: argparse.Namespace, slots: int, tokenizer: mistral.Tokenizer) -> Load:
    [*_, answer] = tokenizer.encode("a", bos=False)
    text = Path(common.__file__).read_text()
    return Load(
        clients=args.clients or slots,
        requests=args.requests,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        ids=sorted({*tokenizer.encode(text, bos=False)}),
        answer=answer,
    )


async def measure(address: str, load: Load) -> dict:
    """All requests of a load, after one of each client that does not count."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=load.clients)
    async with httpx2.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        await asyncio.gather(*(ask(http, load.body(c, -1)) for c in range(load.clients)))
        start = time.perf_counter()
        by_client = await asyncio.gather(*(one_client(http, load, c) for c in range(load.clients)))
        seconds = time.perf_counter() - start
    requests = [request for requests in by_client for request in requests]
    tokens = sum(len(request.times) for request in requests)
    if tokens != len(requests) * load.new_tokens:
        common.note(f"note: {tokens} tokens came in {len(requests)} answers")
    return {
        "clients": load.clients,
        "requests": len(requests),
        "prompt_tokens": load.prompt_tokens,
        "new_tokens": load.new_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 2),
        "first_token_s": percentiles([request.times[0] for request in requests]),
        "between_tokens_s": percentiles([gap for request in requests for gap in request.between]),
    }


def by_locust(program: Path, address: str, load: Load, seconds: int) -> dict:
    """What locust measures, after one request of each client that does not count."""
    command = [program, "-f", LOCUSTFILE, "--headless", "--only-summary", "--host", address]
    command += ["-u", str(load.clients), "-r", str(load.clients), "--exit-code-on-error", "0"]
    command += ["--prompt-tokens", str(load.prompt_tokens), "--new-tokens", str(load.new_tokens)]
    for duration in (2, seconds):
        done = subprocess.run(
            [*command, "-t", f"{duration}s", "--stop-timeout", "60"],
            capture_output=True,
            text=True,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"locust ended with {done.returncode}: {done.stderr[-2000:]}")
    lengths = {"prompt_tokens": load.prompt_tokens, "new_tokens": load.new_tokens}
    result = json.loads(lines[-1])
    if result["failures"]:
        common.note(f"note: {result['failures']}")
    return {"load": "locust", "clients": load.clients, **lengths, **result}


async def one_client(http: httpx2.AsyncClient, load: Load, client: int) -> list[Measured]:
    """One request after the other."""
    return [await ask(http, load.body(client, number)) for number in range(load.requests)]


async def ask(http: httpx2.AsyncClient, body: dict) -> Measured:
    """Send a request, and note when its tokens come. RuntimeError for another status than 200."""
    measured = Measured()
    start = time.perf_counter()
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            now = time.perf_counter() - start
            # A server may send several tokens in one event.
            tokens = sum(choice["text"].count("a") for choice in event["choices"])
            measured.times += [now] * tokens
    return measured


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the 99th of 100, and the longest."""
    at_least_two = [*seconds, *seconds][: max(len(seconds), 2)]
    cuts = statistics.quantiles(at_least_two, n=100, method="inclusive")
    return {
        "p50": round(cuts[49], 4),
        "p99": round(cuts[98], 4),
        "most": round(max(seconds), 4),
    }


if __name__ == "__main__":
    common.run(main)

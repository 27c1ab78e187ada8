"""What prompt lookup gains, on answers that repeat their prompt and on answers that do not.

Each prompt is answered without and with lookup, in turns. The demo gets prompts of its own kinds, in
words that its training never used (but for talk and words to repeat); other models get summaries,
code edits, JSON and questions. The last line is JSON.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from random import Random
from typing import NamedTuple

import common
import torch
from benchmark_parts import machine
from benchmark_parts.lookup_prompts import CODE, ORDER, ORDERS, PASSAGES, QUESTIONS
from benchmark_parts.report import write_section
from demo.dialogues import echo_dialogue, record, unseen_request
from demo.talk import TALK

import mistral
from mistral.chat.formats import chat_format, encode_chat
from mistral.chat.formats.prompts import json_prompt, tool_prompt
from mistral.chat.grammar import json_constraint, tool_call_constraint
from mistral.chat.grammar.token_masks import GrammarConstraint
from mistral.engine.base import Engine
from mistral.engine.speculation import LookupDecoder
from mistral_kernels import open_engine

GREEDY = mistral.Sampling(temperature=0.0)
KINDS = ("words to repeat", "calls", "calls, grammar", "JSON", "JSON, grammar", "talk")
REAL_KINDS = ("summaries", "code edits", "orders as JSON", "orders as JSON, grammar", "questions")

SECTION = """{date}, {machine}, Python {python}, torch {torch}: answered greedily in {dtype}, engine `{engine}`.
{requests} prompts of each kind, at most {max_new_tokens} tokens an answer; {tokens} tokens are guessed at a time.{times}

{table}

Written by `python scripts/benchmark_lookup.py {arguments}`.
"""
TIMES = (
    " Each prompt is answered {repeats} times without and with lookup, in turns; the quickest turn "
    "counts, and in it the time from the first token to the last."
)


@dataclass
class Case:
    """A prompt, and the grammar of its answer."""

    ids: list[int]
    constraint: GrammarConstraint | None = None


class Prompt(NamedTuple):
    """What is asked, and what an answer under a grammar must be: a call or JSON."""

    system: str
    user: str
    tools: list[dict] | None = None
    schema: dict | None = None


@dataclass
class Side:
    """All answers of one kind, without or with lookup."""

    texts: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    forward_passes: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.texts))

    @property
    def rate(self) -> float:
        """Tokens/s after the first token of each answer, which belongs to the prefill."""
        return (self.tokens - len(self.texts)) / self.seconds if self.seconds else 0.0


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/benchmark_lookup.py smollm2 --page docs/benchmarks/lookup.md"
    )
    common.add_model_arguments(parser)
    common.add_engine_argument(parser)
    parser.add_argument(
        "--lookup", type=int, default=8, metavar="N", help="tokens to guess at a time (default: 8)"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS + REAL_KINDS, help="default: all for the model"
    )
    parser.add_argument(
        "--requests", type=int, default=20, help="of each kind, if there are so many (default: 20)"
    )
    parser.add_argument(
        "--counts", action="store_true", help="no times, only tokens per forward pass: one turn"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="turns; the quickest counts (default: 3)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, help="of an answer (default: 200)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads of PyTorch (default: 2)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the prompts (default: 1)")
    parser.add_argument(
        "--page", type=common.path, help="write the results into the model's section of this page"
    )
    args = parser.parse_args()
    if args.kinds is None:
        args.kinds = KINDS if args.model == "demo" else REAL_KINDS
    if args.counts:
        args.repeats = 1
    if min(args.lookup, args.requests, args.repeats, args.max_new_tokens, args.threads) < 1:
        raise ValueError(
            "--lookup, --requests, --repeats, --max-new-tokens and --threads must be 1 or more"
        )
    if args.page:
        common.check_output(args.page)
    common.check(args)
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = common.load(args)
    room = model.config.max_position_embeddings if model.config.sliding_window is None else None
    slack = max(args.lookup, 16)
    plain, engine = open_engine(args.engine, model, 1, room, slack=slack)
    lookup = LookupDecoder(open_engine(args.engine, model, 1, room, slack=slack)[0], args.lookup)
    stop_tokens = chat_format(tokenizer).stop_ids(tokenizer)
    results = {}
    for kind in args.kinds:
        common.note(f"{kind} ...")
        cases = make_cases(kind, args, tokenizer, model.config.vocab_size)
        results[kind] = measure((plain, lookup), cases, args, stop_tokens)
    table = to_table(results, args.counts)
    facts = machine.facts(model.device, model.dtype)
    common.show(f"{engine}\n\n{table}")
    if args.page:
        requests = [len(plain.texts) for plain, _ in results.values()]
        heading = args.model if args.model in ("demo", "smollm2") else Path(args.model).name
        write_section(args.page, heading, section(args, facts, table, engine, requests))
        common.note(f"wrote {args.page}")
    rows = {kind: row(*sides) for kind, sides in results.items()}
    common.show_json(facts | {"engine": engine, "lookup": args.lookup, "results": rows})


def make_cases(
    kind: str, args: argparse.Namespace, tokenizer: mistral.Tokenizer, vocab_size: int
) -> list[Case]:
    """Prompts of one kind; the same ones with and without a grammar."""
    make = demo_prompts if kind in KINDS else real_prompts
    cases = []
    for system, user, tools, schema in make(kind.split(",")[0], args):
        constraint = None
        if kind.endswith("grammar") and tools:
            constraint = tool_call_constraint(tokenizer, vocab_size, tools)
        elif kind.endswith("grammar"):
            constraint = json_constraint(tokenizer, vocab_size, schema)
        messages = [
            {"role": role, "content": text}
            for role, text in (("system", system), ("user", user))
            if text
        ]
        cases.append(Case(encode_chat(tokenizer, messages), constraint))
    return cases


def demo_prompts(kind: str, args: argparse.Namespace) -> Iterator[Prompt]:
    """What the demo was trained for."""
    random = Random(f"{args.seed} {kind}")
    questions = [question for questions, _ in TALK for question in questions]
    for _ in range(args.requests):
        if kind == "talk":
            yield Prompt("", random.choice(questions))
        elif kind == "words to repeat":
            yield Prompt("", echo_dialogue(random)[0].content)
        elif kind == "calls":
            tools, user, _ = unseen_request(random, 2)
            yield Prompt(tool_prompt(tools), user, tools=tools)
        else:
            schema, user, _ = record(random, held_out=True)
            yield Prompt(json_prompt(schema), user, schema=schema)


def real_prompts(kind: str, args: argparse.Namespace) -> Iterator[Prompt]:
    """What people ask a chat model."""
    if kind == "summaries":
        prompts = [Prompt("", f"Summarize this text.\n\n{text}") for text in PASSAGES]
    elif kind == "code edits":
        prompts = [Prompt("", f"{task}\n\n```python\n{code}```") for task, code in CODE]
    elif kind == "questions":
        prompts = [Prompt("", question) for question in QUESTIONS]
    else:
        prompts = [Prompt(json_prompt(ORDER), order, schema=ORDER) for order in ORDERS]
    yield from prompts[: args.requests]


def measure(
    engines: tuple[Engine, LookupDecoder],
    cases: Sequence[Case],
    args: argparse.Namespace,
    stop_tokens: Sequence[int],
) -> tuple[Side, Side]:
    """Answer all prompts without and with lookup, in turns."""
    sides = (Side(), Side())
    lookup = engines[1]
    before = lookup.plain_forwards, lookup.forwards
    for i, case in enumerate(cases):
        quickest = [float("inf"), float("inf")]
        for turn in range(args.repeats):
            for n in (0, 1) if (turn + i) % 2 else (1, 0):
                ids, seconds = answer(engines[n], case, args.max_new_tokens, stop_tokens)
                quickest[n] = min(quickest[n], seconds)
                if turn == 0:
                    sides[n].texts.append(ids)
        for side, seconds in zip(sides, quickest):
            side.seconds += seconds
    sides[0].forward_passes = (lookup.plain_forwards - before[0]) // args.repeats
    sides[1].forward_passes = (lookup.forwards - before[1]) // args.repeats
    return sides


def answer(
    decoder: Engine, case: Case, max_new_tokens: int, stop_tokens: Sequence[int]
) -> tuple[list[int], float]:
    """The ids, and the seconds from the first to the last."""
    decoder.rewind(decoder.lengths[0])
    constraint = None if case.constraint is None else case.constraint.copy()
    options = dict(max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, constraint=constraint)
    stream = mistral.generate(decoder, case.ids, GREEDY, **options)
    ids = [next(stream)]
    start = time.perf_counter()
    ids += stream
    return ids, time.perf_counter() - start


def row(plain: Side, lookup: Side) -> dict[str, float]:
    """The results of one kind of prompt."""
    return {
        "plain_tokens_per_pass": round(plain.tokens / plain.forward_passes, 2),
        "lookup_tokens_per_pass": round(lookup.tokens / lookup.forward_passes, 2),
        "plain_tokens_per_s": round(plain.rate, 1),
        "lookup_tokens_per_s": round(lookup.rate, 1),
        "ratio": round(lookup.rate / plain.rate, 2) if plain.rate else 0.0,
        "tokens_an_answer": round(plain.tokens / len(plain.texts), 1),
        "same_text": sum(one == other for one, other in zip(plain.texts, lookup.texts)),
        "answers": len(plain.texts),
    }


def to_table(results: dict[str, tuple[Side, Side]], counts: bool) -> str:
    """As Markdown."""
    lines = [
        "| answers | tokens each | tokens per forward pass: plain | lookup "
        "| tokens/s: plain | lookup | ratio | same text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, sides in results.items():
        r = row(*sides)
        times = [f"{r['plain_tokens_per_s']:.0f}", f"{r['lookup_tokens_per_s']:.0f}"]
        times += [f"{r['ratio']:.2f}"]
        if counts:
            times = ["not measured"] * 3
        lines.append(
            f"| {kind} | {r['tokens_an_answer']:.0f} "
            f"| {r['plain_tokens_per_pass']:.2f} | {r['lookup_tokens_per_pass']:.2f} "
            f"| {' | '.join(times)} | {r['same_text']} of {r['answers']} |"
        )
    return "\n".join(lines)


def section(
    args: argparse.Namespace, facts: dict, table: str, engine: str, requests: Sequence[int]
) -> str:
    """The results as a section of docs/benchmarks/lookup.md."""
    few, many = min(requests), max(requests)
    return SECTION.format(
        **facts,
        date=date.today(),
        engine=engine.removeprefix("engine: "),
        requests=few if few == many else f"{few} to {many}",
        max_new_tokens=args.max_new_tokens,
        tokens=args.lookup,
        times="" if args.counts else TIMES.format(repeats=args.repeats),
        table=table,
        arguments=" ".join(sys.argv[1:]),
    )


if __name__ == "__main__":
    common.run(main)

"""Count how often the demo calls the right function with the right arguments, on unseen tools."""

import argparse
import collections
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
from tqdm import tqdm

import mistral
from demo.dialogues import Call, record, unseen_request
from demo.everyday import EVERYDAY
from demo.talk import TALK
from demo.training import CONFIG
from mistral.chat.formats import encode_chat
from mistral.chat.formats.prompts import json_prompt, tool_prompt
from mistral.chat.formats.tool_calls import parse_tool_calls
from mistral.chat.grammar import json_constraint, tool_call_constraint
from mistral.chat.tools.json_schema import compile_schema, problem
from mistral.checkpoints.paths import DEMO
from mistral.files import write_text

MAX_NEW_TOKENS = 200

PAGE = """# The demo

`mistral.load("demo")` is a small Mistral that comes with this package: {parameters:.1f} million parameters, \
{layers} layers, hidden size {hidden}, a window of {window:,} tokens, a vocabulary of {pieces:,} pieces, in one GGUF \
file of {size:.1f} MB (Q8_0). It was trained from nothing by `scripts/demo/train_demo.py`, with the modules that run every \
other checkpoint here, on dialogues that `scripts/demo/dialogues.py` makes up. It knows the forms of ChatML, function \
calling and JSON mode, some facts about this project, and nothing else.

It took two runs on two CPU cores: `python scripts/demo/train_demo.py FOLDER --bfloat16`, 89 minutes (67 at the pace of a \
quiet machine), after which 79% of the unseen calls below were right, and 86% under a grammar; and from there `--steps \
28000`, about 100 minutes, which begins again near the full rate.

This page was written by `scripts/demo/measure_demo.py`.

## How good it is

Tools, parameters and entities below are made up, of words that none of those in training is made up of: about a sixth
of the words in `scripts/demo/words.py`, and of all made-up words. Verbs are shared, and so are familiar parameters such
as `city` or `date`. Decoding is greedy. A call counts if its name and all its arguments are exactly right, and a
request for two calls only if both are.

| task | requests | free | under a grammar |
|---|---|---|---|
{rows}

"Under a grammar" allows only calls of the listed tools with arguments that their schemas allow, or only JSON that
follows the schema. What went wrong in the calls:

| | free | under a grammar |
|---|---|---|
{errors}

## What it looks like

{examples}
"""


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, "python scripts/demo/measure_demo.py --page docs/demo.md")
    common.add_model_arguments(parser)
    common.add_engine_argument(parser)
    parser.add_argument("--requests", type=int, default=300, help="of each kind (default: 300)")
    parser.add_argument("--batch-size", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--page", type=common.path, help="write the results as a page of the documentation"
    )
    return parser.parse_args()


class Runner:
    """Answers prompts greedily, in batches."""

    def __init__(
        self, model: mistral.Mistral, tokenizer: mistral.Tokenizer, args: argparse.Namespace
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.args = args

    def answers(
        self, prompts: Sequence[tuple[str, str]], constraints: Sequence | None, note: str
    ) -> list[str]:
        """One answer for each (system, user)."""
        rows = [self._ids(*prompt) for prompt in prompts]
        size = self.args.batch_size
        empty_decoder = common.open_batch_engines(
            self.args, self.model, max(map(len, rows)) + MAX_NEW_TOKENS
        )
        texts = []
        for i in tqdm(range(0, len(rows), size), desc=note, leave=False):
            end = i + size
            made = mistral.generate_batch(
                empty_decoder(len(rows[i:end])),
                rows[i:end],
                mistral.Sampling(temperature=0),
                max_new_tokens=MAX_NEW_TOKENS,
                constraints=constraints and constraints[i:end],
            )
            texts += [self._text(row) for row in made]
        return texts

    def _text(self, ids: list[int]) -> str:
        stream = self.tokenizer.stream()
        return "".join(map(stream.feed, ids)) + stream.finish()

    def _ids(self, system: str, user: str) -> list[int]:
        turns = (("system", system), ("user", user))
        return encode_chat(
            self.tokenizer, [{"role": role, "content": text} for role, text in turns if text]
        )


def verdict(text: str, expected: list[Call]) -> str:
    """What is wrong with the calls in an answer; "right" if nothing is."""
    reply = parse_tool_calls(text)
    if reply.errors:
        return "a call that cannot be read"
    if len(reply.calls) != len(expected):
        return "too many calls" if len(reply.calls) > len(expected) else "too few calls"
    for call, wanted in zip(reply.calls, expected):
        if call.name != wanted.name:
            return "another function"
        if call.arguments.keys() != wanted.arguments.keys():
            return "other arguments"
        if call.arguments != wanted.arguments:
            return "another value"
    return "right"


def measure_calls(
    runner: Runner, args: argparse.Namespace, note: str, num_tools: int | None
) -> dict[str, Any]:
    """Free and constrained answers to requests for functions, and what is wrong with each.

    num_tools  how many made-up tools there are; None: three of everyday.py
    """
    random = Random(f"{args.seed} {note}")
    make = everyday_case if num_tools is None else lambda random: unseen_request(random, num_tools)
    size = runner.model.config.vocab_size
    cases = [make(random) for _ in range(args.requests)]
    prompts = []
    constraints = []
    for tools, text, _ in cases:
        prompts.append((tool_prompt(tools), text))
        constraints.append(tool_call_constraint(runner.tokenizer, size, tools))
    free = runner.answers(prompts, None, note)
    bound = runner.answers(prompts, constraints, f"{note}, grammar")
    verdicts = [
        [verdict(text, case[2]) for text, case in zip(texts, cases)] for texts in (free, bound)
    ]
    return {"note": note, "cases": cases, "free": free, "bound": bound, "verdicts": verdicts}


def everyday_case(random: Random) -> tuple[list[dict], str, list[Call]]:
    """A request for one of the tools of everyday.py.

    Numbers are new; names and files are those of training.
    """
    chosen = random.sample(EVERYDAY, 3)
    tool, make = chosen[0]
    made = make(random)
    tools = [schema for schema, _ in chosen]
    random.shuffle(tools)
    return tools, made.request, [Call(tool["name"], made.arguments)]


def measure_records(runner: Runner, args: argparse.Namespace) -> dict[str, Any]:
    """JSON for schemas that training never saw: valid, and exactly what was asked for."""
    random = Random(f"{args.seed} records")
    size = runner.model.config.vocab_size
    cases = [record(random, held_out=True) for _ in range(args.requests)]
    prompts = []
    constraints = []
    for schema, text, _ in cases:
        prompts.append((json_prompt(schema), text))
        constraints.append(json_constraint(runner.tokenizer, size, schema))
    counts = []
    for texts in (
        runner.answers(prompts, None, "JSON"),
        runner.answers(prompts, constraints, "JSON, grammar"),
    ):
        values = [parsed(text) for text in texts]
        valid = sum(
            problem(compile_schema(case[0]), value) is None for case, value in zip(cases, values)
        )
        exact = sum(value == case[2] for case, value in zip(cases, values))
        counts.append((valid, exact))
    return {"cases": cases, "counts": counts}


def parsed(text: str) -> Any:
    """The JSON value of a text, or None."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def measure_talk(runner: Runner) -> tuple[int, int]:
    """How many questions about the project get one of their answers, and how many there are."""
    cases = [(question, answers) for questions, answers in TALK for question in questions]
    texts = runner.answers([("", question) for question, _ in cases], None, "talk")
    right = sum(text in case[1] for text, case in zip(texts, cases))
    return right, len(cases)


def main() -> None:
    args = arguments()
    if args.page and args.model != "demo":
        raise ValueError("--page is about the demo; name no other model with it")
    if args.requests < 1 or args.batch_size < 1:
        raise ValueError("--requests and --batch-size must be 1 or more")
    if args.page:
        common.check_output(args.page)
    common.check(args)
    model, tokenizer = common.load(args)
    runner = Runner(model, tokenizer, args)

    # 1. Measure.
    kinds = (
        ("one tool", 1),
        ("two tools", 2),
        ("three tools", 3),
        ("everyday tools, seen in training", None),
    )
    calls = [measure_calls(runner, args, note, count) for note, count in kinds]
    records = measure_records(runner, args)
    right_talk, all_talk = measure_talk(runner)

    # 2. Report.
    rows = [
        row(f"calls, {made['note']}", args.requests, *map(rights, made["verdicts"]))
        for made in calls
    ]
    free, bound = (sum_of(calls[:3], i) for i in (0, 1))
    rows.insert(3, row("calls, all of the above", 3 * args.requests, free, bound))
    (valid, exact), (bound_valid, bound_exact) = records["counts"]
    rows.append(row("JSON, valid", args.requests, valid, bound_valid))
    rows.append(row("JSON, exact", args.requests, exact, bound_exact))
    share = f"{right_talk / all_talk:.0%}"
    rows.append(f"| questions about this project (seen in training) | {all_talk} | {share} | - |")
    errors = error_rows(calls[:3])
    common.show("\n".join([*rows, "", *errors]))
    if args.page:
        page = PAGE.format(
            parameters=CONFIG.num_parameters / 1e6,
            layers=CONFIG.num_hidden_layers,
            hidden=CONFIG.hidden_size,
            window=CONFIG.sliding_window,
            pieces=tokenizer.vocab_size,
            size=DEMO.stat().st_size / 1e6,
            rows="\n".join(rows),
            errors="\n".join(errors),
            examples=examples(calls),
        )
        write_text(args.page, page)
        common.note(f"wrote {args.page}")


def rights(verdicts: list[str]) -> int:
    """How many are right."""
    return verdicts.count("right")


def sum_of(calls: list[dict], i: int) -> int:
    """How many are right in all of these measurements: free (0) or under a grammar (1)."""
    return sum(rights(made["verdicts"][i]) for made in calls)


def row(name: str, total: int, free: int, bound: int) -> str:
    """A line of the table."""
    return f"| {name} | {total} | {free / total:.0%} | {bound / total:.0%} |"


def error_rows(calls: list[dict]) -> list[str]:
    """How often each thing went wrong, as a share of all requests."""
    counts = [collections.Counter(v for made in calls for v in made["verdicts"][i]) for i in (0, 1)]
    total = sum(counts[0].values())
    kinds = sorted((counts[0] + counts[1]).keys() - {"right"}, key=lambda kind: -counts[0][kind])
    return [
        f"| {kind} | {counts[0][kind] / total:.1%} | {counts[1][kind] / total:.1%} |"
        for kind in kinds
    ]


def examples(calls: list[dict]) -> str:
    """The first two requests of each kind, with the tools' names and the free answers."""
    lines = []
    for made in calls:
        for (tools, text, expected), answer, said in list(
            zip(made["cases"], made["free"], made["verdicts"][0])
        )[:2]:
            names = ", ".join(f"`{tool['name']}`" for tool in tools)
            lines.append(
                f"With {names}:\n\n```text\n> {text}\n{answer}\n```\n\n{said.capitalize()}."
            )
            if said != "right":
                lines[-1] += " Wanted: " + "; ".join(
                    f"`{call.name}({json.dumps(call.arguments)})`" for call in expected
                )
    return "\n\n".join(lines)


if __name__ == "__main__":
    common.run(main)

"""Answer many made-up schemas by the demo and by random weights: valid, cut off, or hung?

Only the schema and --max-new-tokens bound an answer: many of those by random weights are cut off.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
import torch
from demo.words import ADJECTIVES, CITIES, NOUNS
from tqdm import tqdm

import mistral
from mistral.chat.formats import encode_chat
from mistral.chat.formats.prompts import json_prompt
from mistral.chat.grammar import GrammarError, UnsupportedSchema, json_constraint
from mistral.chat.grammar.token_masks import GrammarConstraint
from mistral.chat.tools.json_schema import compile_schema, problem
from mistral.printable import on_one_line

SLOW = 10.0  # seconds; a grammar or a mask that took longer hung


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/dev/stress_grammar.py --schemas 1000 --batch-size 20"
    )
    common.add_model_arguments(parser)
    common.add_engine_argument(parser)
    parser.add_argument("--schemas", type=int, default=1000, help="default: 1000")
    parser.add_argument(
        "--batch-size", type=int, default=20, help="schemas that are answered at once (default: 20)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=500, help="the budget of one answer (default: 500)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.schemas, args.batch_size, args.max_new_tokens) < 1:
        raise ValueError("--schemas, --batch-size and --max-new-tokens must be 1 or more")
    common.check(args)
    return args


def made_up(random: Random, depth: int = 3) -> dict[str, Any]:
    """A JSON schema of any kind; `depth` levels at most."""
    kinds = [
        "string",
        "string",
        "integer",
        "number",
        "boolean",
        "enum",
        "const",
        "null",
        "any of",
        "pattern",
        "format",
    ]
    kind = random.choice(kinds + ["object", "object", "array", "open object"] * (depth > 0))
    low = random.randint(-50, 50)
    match kind:
        case "object" | "open object":
            names = random.sample(NOUNS, random.randint(1, 4))
            schema = {
                "type": "object",
                "properties": {name: made_up(random, depth - 1) for name in names},
            }
            schema["required"] = [name for name in names if random.random() < 0.7]
            return schema | ({"additionalProperties": False} if kind == "object" else {})
        case "array":
            schema = {"type": "array", "items": made_up(random, depth - 1)}
            least = random.randint(0, 2)
            return schema | random.choice(
                ({}, {"minItems": least, "maxItems": least + random.randint(0, 3)})
            )
        case "string":
            return {"type": "string"} | random.choice(
                ({}, {"maxLength": random.randint(3, 20)}, {"minLength": 3})
            )
        case "integer" | "number":
            bounds = (
                {},
                {"minimum": low},
                {"minimum": low, "maximum": low + random.randint(0, 100)},
            )
            return {"type": kind} | random.choice(bounds)
        case "enum":
            return {
                "enum": random.sample(
                    [*CITIES, 1, 2.5, True, None, ADJECTIVES[0]], random.randint(1, 5)
                )
            }
        case "const":
            return {"const": random.choice((random.choice(NOUNS), 7, False, None, [1, "a"]))}
        case "any of":
            return {"anyOf": [made_up(random, depth - 1), made_up(random, depth - 1)]}
        case "pattern":
            return {
                "type": "string",
                "pattern": random.choice(
                    ("^[a-z]{2,5}$", r"^\d{3}-\d{2}$", "^(yes|no)$", "^A+b?$")
                ),
            }
        case "format":
            return {
                "type": "string",
                "format": random.choice(("date", "time", "date-time", "uuid", "ipv4", "email")),
            }
    return {"type": kind}


def root(random: Random) -> dict[str, Any]:
    """A schema to answer: mostly an object, now and then one that refers to itself."""
    schema = made_up(random)
    while schema.get("type") != "object" and random.random() < 0.9:
        schema = made_up(random)
    if random.random() < 0.1:
        tree = {
            "type": "object",
            "properties": {"value": made_up(random, 0)},
            "required": ["value"],
        }
        tree["properties"]["children"] = {"type": "array", "items": {"$ref": "#/$defs/tree"}}
        return {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}
    return schema


def main() -> int:
    args = arguments()
    demo, tokenizer = common.load(args)
    torch.manual_seed(args.seed)
    noise = mistral.Mistral(demo.config).to(demo.device, demo.dtype)
    failed = 0
    for name, model in ((args.model, demo), ("random weights", noise)):
        counts, masks, seconds = stress(model, tokenizer, args, name)
        common.show(
            f"{name}: {json.dumps(counts)}, mean mask {1e6 * seconds / max(masks, 1):.0f} µs over "
            f"{masks:,} masks"
        )
        failed += counts["hung"] + counts["invalid"]
    return 1 if failed else 0


def stress(
    model: mistral.Mistral, tokenizer: mistral.Tokenizer, args: argparse.Namespace, name: str
) -> tuple:
    """How the answers ended, how many masks were made for them, and the seconds that those took."""
    random = Random(args.seed)
    counts = dict.fromkeys(
        ("valid", "cut off", "invalid", "hung", "not expressible", "nothing is valid"), 0
    )
    cases: list[tuple[dict, GrammarConstraint]] = []
    for schema in (root(random) for _ in range(args.schemas)):
        start = time.perf_counter()
        try:
            cases.append((schema, json_constraint(tokenizer, model.config.vocab_size, schema)))
        except UnsupportedSchema:
            counts["not expressible"] += 1
        except GrammarError as error:
            if "no value is valid" not in str(error):
                raise
            counts["nothing is valid"] += 1
        counts["hung"] += time.perf_counter() - start > SLOW
    sampling = mistral.Sampling(temperature=args.temperature, seed=args.seed)
    systems = [{"role": "system", "content": json_prompt(schema)} for schema, _ in cases]
    prompts = [
        encode_chat(tokenizer, [system, {"role": "user", "content": "Go"}]) for system in systems
    ]
    room = max(map(len, prompts), default=0) + args.max_new_tokens
    empty_decoder = common.open_batch_engines(args, model, room)
    for i in tqdm(range(0, len(cases), args.batch_size), desc=on_one_line(name), leave=False):
        batch = cases[i : i + args.batch_size]
        told = prompts[i : i + args.batch_size]
        constraints = [constraint for _, constraint in batch]
        rows = mistral.generate_batch(
            empty_decoder(len(batch)),
            told,
            sampling,
            max_new_tokens=args.max_new_tokens,
            constraints=constraints,
        )
        for (schema, constraint), ids in zip(batch, rows):
            ended = ids[-1] in tokenizer.stop_ids
            counts[verdict(tokenizer, schema, ids) if ended else "cut off"] += 1
            counts["hung"] += constraint.mask_seconds > SLOW
    masks = sum(c.mask_count for _, c in cases)
    seconds = sum(c.mask_seconds for _, c in cases)
    return counts, masks, seconds


def verdict(tokenizer: mistral.Tokenizer, schema: dict[str, Any], ids: list[int]) -> str:
    """Whether a finished answer is valid."""
    stream = tokenizer.stream()
    text = "".join(map(stream.feed, ids)) + stream.finish()
    try:
        return "invalid" if problem(compile_schema(schema), json.loads(text)) else "valid"
    except ValueError:
        return "invalid"


if __name__ == "__main__":
    common.run(main)

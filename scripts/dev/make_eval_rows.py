"""Make up rows for evaluate.py, of words that the demo checkpoint never saw in training."""

import argparse
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py, demo/

import common
from demo.dialogues import record, unseen_request

from mistral.chat.formats.prompts import json_prompt, to_json
from mistral.chat.tools import wrapped
from mistral.files import write_text


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        "python scripts/dev/make_eval_rows.py rows.jsonl --task function-calling --rows 100",
    )
    parser.add_argument("file", type=common.path, help="a new .jsonl")
    parser.add_argument("--task", choices=ROWS, required=True)
    parser.add_argument(
        "--rows", type=int, default=100, help="default: 100, as many as in the card's data sets"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    if args.rows < 1:
        raise ValueError("--rows must be 1 or more")
    common.check_output(args.file)
    if args.file.is_file():
        raise ValueError(f"{args.file} is there already; name a new file")
    return args


def function_calling_row(random: Random) -> dict[str, Any]:
    """Columns as in NousResearch/func-calling-eval."""
    tools, request, calls = unseen_request(random)
    completion = [{"name": call.name, "arguments": call.arguments} for call in calls]
    return {
        "prompt": [{"role": "user", "content": request}],
        "completion": to_json(completion if len(completion) > 1 else completion[0]),
        "tools": to_json([wrapped(tool) for tool in tools]),
    }


def json_mode_row(random: Random) -> dict[str, Any]:
    """Columns as in NousResearch/json-mode-eval."""
    schema, request, answer = record(random, held_out=True)
    system = {"role": "system", "content": json_prompt(schema)}
    return {
        "prompt": [system, {"role": "user", "content": request}],
        "completion": to_json(answer),
        "schema": to_json(schema),
    }


ROWS = {"function-calling": function_calling_row, "json-mode": json_mode_row}


def main() -> None:
    args = arguments()
    random = Random(args.seed)
    text = "".join(json.dumps(ROWS[args.task](random)) + "\n" for _ in range(args.rows))
    write_text(args.file, text)
    common.note(f"wrote {args.rows} rows to {args.file}")


if __name__ == "__main__":
    common.run(main)

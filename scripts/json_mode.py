"""Ask for JSON that follows a schema; the answer goes to stdout."""

import argparse
import sys
import time

import common

from mistral.chat import generate_json
from mistral.chat.formats import FORMATS
from mistral.chat.structured import JSONError, read_schema
from mistral.chat.tools.json_schema import compile_schema

EXAMPLE = {
    "title": "Person",
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "city": {"type": "string"},
        "member": {"type": "boolean"},
    },
    "required": ["name", "age", "city", "member"],
}
PROMPT = "Make a person named Clara Diaz, with age 42, in Lisbon, with member on."


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, 'python scripts/json_mode.py --schema person.json --prompt "Ada, 36, from London"'
    )
    common.add_model_arguments(parser)
    parser.add_argument(
        "--schema", type=common.path, help="a file with a JSON schema (default: a built-in example)"
    )
    parser.add_argument(
        "--prompt",
        help="what to ask (default: standard input, or with the example a built-in request)",
    )
    parser.add_argument(
        "--no-grammar",
        action="store_true",
        help="only validate the answer, and let the model try again",
    )
    parser.add_argument(
        "--retries", type=int, default=3, help="how often it may try again (default: 3)"
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="chat format (default: chosen by the vocabulary)"
    )
    common.add_sampling_arguments(parser, temperature=0.0)
    common.add_engine_argument(parser)
    common.add_lookup_argument(parser)
    args = parser.parse_args()
    if args.retries < 0:
        raise ValueError("--retries must be 0 or more")
    common.check(args)
    return args


def main() -> int:
    args = arguments()
    schema = read_schema(args.schema or EXAMPLE)
    compile_schema(schema)  # its errors come before the weights are read
    prompt = args.prompt
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read().strip()
        prompt = prompt or (PROMPT if args.schema is None else "")
    if not prompt:
        raise ValueError('there is no prompt: name one with --prompt "some text", or pipe it in')
    common.check_text(prompt, "--prompt")
    sampling = common.sampling(args)
    model, tokenizer = common.load(args)
    decoder, engine = common.open_chat_engine(args, model, max_tokens=None)
    common.note(f"> {prompt}")
    start = time.perf_counter()
    try:
        answer = generate_json(
            decoder,
            tokenizer,
            prompt,
            schema,
            sampling=sampling,
            grammar=not args.no_grammar,
            max_new_tokens=args.max_new_tokens,
            retries=args.retries,
            format=args.format,
        )
    except JSONError as error:
        common.note(f"{common.problem(error)}; the last answer was:")
        common.show(error.text)
        return 1
    finally:
        if args.lookup:
            common.note(f"[{decoder.summary}]")
    common.show_json(answer, indent=2)
    common.note(f"[valid after {time.perf_counter() - start:.1f} s | {engine}]")
    return 0


if __name__ == "__main__":
    common.run(main)

"""Write one HTML page about a forward pass: tokens, attention, cache, layers, time.

The text is read and continued greedily. Open the page in a browser; click a token, or move with the
arrow keys. It needs no network. What is shown was recorded by mistral/tracing.py from a real run
through the rolling cache.
"""

import argparse
from pathlib import Path

import common

from mistral.chat.formats import chat_format, encode_chat
from mistral.checkpoints.labels import checkpoint_name
from mistral.files import format_bytes, write_text
from mistral.inside import MOST_TOP, OURS, check_room, page_data, record, render


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        'python scripts/look_inside.py demo "What is a cache?" --chat --window 16 -o page.html',
    )
    common.add_model_arguments(parser)
    parser.add_argument(
        "text", help="what to look at: the beginning of a text, or with --chat a message"
    )
    parser.add_argument(
        "--chat", action="store_true", help="the text is a message to answer, sent as a chat"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=16, help="how far to continue the text (default: 16)"
    )
    parser.add_argument(
        "--top", type=int, default=8, help=f"next tokens to show, up to {MOST_TOP} (default: 8)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=common.path,
        default=Path("look_inside.html"),
        help=(
            "the page (default: look_inside.html); an earlier page is replaced, another file is not"
        ),
    )
    args = parser.parse_args()
    if args.new_tokens < 0 or not 1 <= args.top <= MOST_TOP:
        raise ValueError(f"--new-tokens must be 0 or more, and --top 1 to {MOST_TOP}")
    common.check_text(args.text, "the text")
    check_output(args.output)
    common.check(args)
    return args


def main() -> None:
    args = arguments()
    model, tokenizer = common.load(args)
    ids = tokenizer.encode(args.text)
    stop_tokens = None
    if args.chat:
        ids = encode_chat(tokenizer, [{"role": "user", "content": args.text}])
        stop_tokens = chat_format(tokenizer).stop_ids(tokenizer)
    check_room(len(ids), args.new_tokens, model.config)
    trace, watch = record(model, ids, args.new_tokens, stop_tokens)
    path = Path(args.model)
    name = checkpoint_name(path) if path.exists() else path.name
    data = page_data(model, tokenizer, trace, watch, prompt=len(ids), top=args.top, name=name)
    page = render(data, trace)
    write_text(args.output, page)
    new = len(trace.tokens) - len(ids)
    common.note(
        f"wrote {args.output}, {format_bytes(len(page.encode()))}: "
        f"{len(ids)} tokens and {new} new ones"
    )


def check_output(path: Path) -> None:
    """ValueError unless the page can be written there without the loss of another file."""
    common.check_output(path)
    if path.is_file() and not is_ours(path):
        raise ValueError(
            f"{path} exists and is not a page of this script; remove it or name another file"
        )


def is_ours(path: Path) -> bool:
    """Whether this script wrote the file."""
    with path.open("rb") as file:
        return OURS.encode() in file.read(1000)


if __name__ == "__main__":
    common.run(main)

"""Serve a model over HTTP, with the APIs of OpenAI and Anthropic: chat, tools, JSON by schema.

Requests share the rows of one engine, the slots. SIGTERM and Ctrl-C let running ones finish.
"""

import argparse
import logging
import os
import time
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import common

from mistral.chat.answer import SLACK
from mistral.server import require_extra
from mistral_kernels import open_engine

if TYPE_CHECKING:
    from mistral.server.service import Service


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/serve.py NousResearch/Hermes-2-Pro-Mistral-7B --slots 8"
    )
    common.add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    parser.add_argument("--name", help="of the model in replies (default: that of its file)")
    parser.add_argument(
        "--slots", type=int, default=4, help="requests answered at the same time (default: 4)"
    )
    parser.add_argument(
        "--queue", type=int, default=64, help="requests that may wait for a slot (default: 64)"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=128,
        help="tokens of a prompt that are read between two steps (default: 128)",
    )
    parser.add_argument(
        "--same-bits",
        action="store_true",
        help="an answer's logits do not depend on the other requests, bit for bit; slower",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="of an answer whose request does not say (default: what there is room for)",
    )
    common.add_chat_arguments(parser)
    common.add_engine_argument(parser)
    parser.add_argument(
        "--api-key", help="that clients must send (default: the variable MISTRAL_API_KEY, or none)"
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a page's origin whose scripts may call the server, or *; repeatable",
    )
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that running requests get when the server is told to end (default: 30)",
    )
    args = parser.parse_args()
    for name in ("slots", "queue", "drain"):
        if getattr(args, name) < (name == "slots"):
            raise ValueError(f"--{name} is too small: {getattr(args, name)}")
    if args.chunk < 2:
        raise ValueError(f"--chunk must be 2 or more, not {args.chunk}")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port must be between 0 and 65535, not {args.port}")
    args.batch_size = args.slots
    common.check(args)
    return args


def main() -> None:
    args = arguments()
    require_extra()
    from mistral.server.app import App, Settings
    from mistral.server.run import serve

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("mistral.server").setLevel(logging.INFO)
    settings = Settings(
        api_key=args.api_key or os.environ.get("MISTRAL_API_KEY"),
        cors_origins=tuple(args.cors_origin),
        drain=args.drain,
    )
    if settings.api_key is None and not is_this_machine(args.host):
        common.note(f"note: everybody who reaches {args.host} can use the server: no --api-key")
    serve(App(lambda: open_service(args), settings), args.host, args.port, common.note)


def open_service(args: argparse.Namespace) -> "Service":
    """Load the model and open its engine; this runs while the server says that it is loading."""
    from mistral.server.memory import plan_slots
    from mistral.server.service import Service

    start = time.perf_counter()
    model, tokenizer = common.load(args)
    max_tokens = args.max_tokens
    if model.config.sliding_window is None and max_tokens is None:
        max_tokens = model.config.max_position_embeddings
    common.note(plan_slots(model, args.slots, max_tokens, SLACK).line)
    engine, line = open_engine(
        args.engine, model, args.slots, max_tokens, slack=SLACK, say=common.note
    )
    service = Service(
        engine,
        tokenizer,
        name=args.name or Path(args.model).name,
        format=args.format,
        max_new_tokens=args.max_new_tokens,
        chunk=args.chunk,
        queue=args.queue,
        same_bits=args.same_bits,
    )
    seconds = time.perf_counter() - start
    common.note(f"{line}; ready after {seconds:.1f} s")
    return service


def is_this_machine(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    common.run(main)

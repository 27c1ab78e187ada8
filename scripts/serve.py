"""Serve a model over HTTP, with the APIs of OpenAI and Anthropic, and a chat window for a browser.

Requests share the rows of one engine, the slots. SIGTERM and Ctrl-C let running ones finish.
"""

import argparse
import logging
import os
import re
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

import common

import mistral
from mistral.chat.answer import SLACK
from mistral.chat.tools import tool_table
from mistral.engine.base import Engine
from mistral.engine.speculation import LookupDecoder
from mistral.server import require_extra
from mistral_kernels import open_engine

if TYPE_CHECKING:
    from mistral.server.service import Service
    from mistral.server.window.toolbox import Toolbox

# What the demo was trained to answer
_DEMO_QUESTIONS = [
    ("Explain", "What is a sliding window?"),
    ("Describe", "What is a rolling cache?"),
]


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
        help="the logits of an answer do not depend on other requests, bit for bit; slower: no "
        "prefix is reused, and the engines eager and compile step one row after the other",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="of an answer whose request does not say (default: what there is room for)",
    )
    common.add_chat_arguments(parser)
    common.add_engine_argument(parser)
    add_tool_arguments(parser)
    common.add_lookup_argument(parser)
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
        "--host-name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which browsers may open the page at /, besides the address; repeatable",
    )
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="that running requests get when the server is told to end (default: 30)",
    )
    args = parser.parse_args()
    for name, least in dict(slots=1, queue=0, chunk=2, drain=0, tool_seconds=0).items():
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} must be {least} or more, not {getattr(args, name)}")
    if args.lookup and args.same_bits:
        raise ValueError("--same-bits excludes --lookup: guesses that are read along change bits")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port must be between 0 and 65535, not {args.port}")
    args.batch_size = args.slots
    common.check(args)
    return args


def add_tool_arguments(parser: argparse.ArgumentParser) -> None:
    """--tools, --mcp and --tool-seconds."""
    parser.add_argument(
        "--tools",
        type=common.path,
        metavar="FILE",
        help="a Python file that makes tools with @tool, for the chat window; it is run",
    )
    parser.add_argument(
        "--mcp",
        action="append",
        default=[],
        metavar="COMMAND",
        help="an MCP server whose tools the chat window has, too; it is started; repeatable",
    )
    parser.add_argument(
        "--tool-seconds",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="that a call of a tool may take (default: 60)",
    )


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
        host_names=tuple(name.lower() for name in args.host_name),
        drain=args.drain,
    )
    if settings.api_key is None and not is_this_machine(args.host):
        what = "use the server and run its tools" if args.tools or args.mcp else "use the server"
        common.note(f"note: everybody who reaches {args.host} can {what}: no --api-key")
    serve(App(lambda: open_service(args), settings), args.host, args.port, common.note)


def open_service(args: argparse.Namespace) -> "Service":
    """Load the model and open its engine; this runs while the server says that it is loading."""
    from mistral.server.service import Service
    from mistral.server.warm_up import warm_up
    from mistral.server.window.window import Window

    start = time.perf_counter()
    tools, close = open_tools(args)
    try:
        model, tokenizer = common.load(args)
        engine, line = open_slots(args, model)
        warm_up(engine, args.chunk)
    except BaseException:
        close()
        raise
    brief = re.split("[:;] ", line.removeprefix("engine: "))[0]  # without the reasons
    service = Service(
        engine,
        tokenizer,
        name=args.name or Path(args.model).name,
        format=args.format,
        max_new_tokens=args.max_new_tokens,
        chunk=args.chunk,
        queue=args.queue,
        same_bits=args.same_bits,
        window=Window(
            model=model, engine=brief, tools=tools, close=close, questions=first_questions(args)
        ),
    )
    seconds = time.perf_counter() - start
    common.note(f"{line}; ready after {seconds:.1f} s")
    return service


def open_slots(args: argparse.Namespace, model: mistral.Mistral) -> tuple[Engine, str]:
    """The engine of the slots, and a line about it."""
    from mistral.server.memory import plan_slots

    max_tokens = args.max_tokens
    if model.config.sliding_window is None and max_tokens is None:
        max_tokens = model.config.max_position_embeddings
    slack = SLACK + args.lookup  # ends that the model spells, and wrong guesses
    common.note(plan_slots(model, args.slots, max_tokens, slack).line)
    engine, line = open_engine(
        args.engine,
        model,
        args.slots,
        max_tokens,
        slack=slack,
        say=common.note,
        progress=common.compiling,
    )
    return (LookupDecoder(engine, args.lookup) if args.lookup else engine), line


def open_tools(args: argparse.Namespace) -> "tuple[Toolbox, Callable[[], None]]":
    """The tools of --tools and --mcp, and what ends the MCP servers."""
    from mistral.server.window.mcp_servers import McpServers
    from mistral.server.window.toolbox import ServedTool, Toolbox

    own = common.read_tools(args.tools) if args.tools is not None else []
    served = [ServedTool(tool, args.tools.name) for tool in tool_table(own).values()]
    servers = McpServers(args.mcp, args.tool_seconds)
    served += servers.start(common.note, own)
    if served:
        common.note(f"tools of the chat window: {', '.join(one.tool.name for one in served)}")
    return Toolbox(served, args.tool_seconds), servers.stop


def first_questions(args: argparse.Namespace) -> list[tuple[str, str]]:
    """What the chat window proposes to ask this model; none: its own proposals."""
    has_examples = args.tools is not None and args.tools.resolve() == common.EXAMPLE_TOOLS
    tool = ("Use a tool", "What is 17 * 23?")
    if args.model == "demo":
        last = tool if has_examples else ("About itself", "What can you do?")
        return [*_DEMO_QUESTIONS, last]
    return [tool] if has_examples else []


def is_this_machine(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    common.run(main)

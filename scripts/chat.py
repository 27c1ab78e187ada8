"""Chat with a model in the terminal; it may call functions.

/help lists the commands. With --prompt it answers that and ends.
"""

import argparse
import sys

import common
from chat_parts.commands import Chat
from chat_parts.line_editor import read_message

from mistral.chat import Conversation
from mistral.chat.formats import render_chat
from mistral.chat.saved import read_lines
from mistral.chat.tool_choice import check_tool_choice
from mistral.chat.tools import tool_table
from mistral.engine.base import Engine

_HINT = 'ask about this project, for example "What is a sliding window?", "Explain attention."'
_HINT_FOR_TOOLS = 'ask, for example, "What is 17 * 23?", "How many miles are 42 kilometers?"'


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        "python scripts/chat.py NousResearch/Hermes-2-Pro-Mistral-7B --system 'Be brief.'\n"
        "  python scripts/chat.py --tools scripts/example_tools.py --prompt 'What is 17 * 23?'",
    )
    common.add_model_arguments(parser)
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--load", type=common.path, help="continue a conversation that /save wrote")
    parser.add_argument("--prompt", action="append", help="what to ask; repeatable: a conversation")
    common.add_chat_arguments(parser)
    add_tool_arguments(parser)
    common.add_sampling_arguments(parser, None, "0.7; with --tools 0")
    common.add_engine_argument(parser)
    common.add_lookup_argument(parser)
    args = parser.parse_args()
    if args.temperature is None:
        args.temperature = 0.0 if args.tools else 0.7
    if args.load and (args.system or args.format):
        raise ValueError(
            "a conversation that is loaded has its own system message and format; "
            "leave out the options"
        )
    if args.load:
        read_lines(args.load)  # its errors come before the weights are read
    if args.time_limit <= 0:
        raise ValueError("--time-limit must be more than 0 seconds")
    if args.no_grammar and args.tool_choice not in ("auto", "none"):
        raise ValueError(
            f"only a grammar can guarantee --tool-choice {args.tool_choice}: leave out --no-grammar"
        )
    common.check_text(args.system, "--system")
    for prompt in args.prompt or ():
        common.check_text(prompt, "--prompt")
    common.check(args)
    return args


def add_tool_arguments(to: argparse.ArgumentParser) -> None:
    """--tools, and how the model may call them."""
    to.add_argument(
        "--tools", type=common.path, help="a Python file that makes tools with @tool; it is run"
    )
    to.add_argument(
        "--tool-choice",
        default="auto",
        help="auto, none, required, or a tool's name (default: auto)",
    )
    to.add_argument(
        "--no-grammar", action="store_true", help="do not constrain calls to the tools' schemas"
    )
    to.add_argument(
        "--parallel", action="store_true", help="run the functions of one answer at the same time"
    )
    to.add_argument(
        "--max-rounds", type=int, default=5, help="answers to one question (default: 5)"
    )
    to.add_argument(
        "--time-limit", type=float, default=30.0, help="seconds for one function (default: 30)"
    )
    to.add_argument(
        "--show-prompt", action="store_true", help="print how a chat begins for the model"
    )


def main() -> None:
    args = arguments()
    tools = common.read_tools(args.tools) if args.tools else []
    # Every format with tools has the same choices; whether this one has them, the vocabulary says.
    check_tool_choice(args.tool_choice, tool_table(tools), args.format or "chatml")
    options = dict(
        tools=tools,
        sampling=common.sampling(args),
        grammar=not args.no_grammar,
        tool_choice=args.tool_choice,
        max_rounds=args.max_rounds,
        max_new_tokens=args.max_new_tokens,
        time_limit=args.time_limit,
        parallel=args.parallel,
    )
    model, tokenizer = common.load(args)
    decoder, engine = common.open_chat_engine(args, model, args.max_tokens)
    chat = Chat(
        decoder, tokenizer, system=args.system, format=args.format, load=args.load, **options
    )
    introduce(args, chat.conversation, engine)
    for prompt in args.prompt or ():
        common.show(f"> {prompt}", style="bold cyan")
        chat.say(prompt)
        report(args, decoder)
    if not args.prompt:
        converse(chat, args)


def introduce(args: argparse.Namespace, conversation: Conversation, engine: str) -> None:
    """Say which format and engine there are, and to a person what to ask."""
    common.note(f"format {conversation.format}; {engine}", style="dim")
    if args.show_prompt:
        messages = [*conversation.messages, {"role": "user", "content": "..."}]
        tools = list(conversation.tools.values()) or None
        text = render_chat(
            conversation.tokenizer, messages, tools=tools, format=conversation.format
        )
        common.show(f"{text}\n")
    if args.prompt or not sys.stdin.isatty():
        return
    if conversation.tools:
        common.note(f"tools: {', '.join(conversation.tools)}", style="dim")
    if args.tools and args.tools.resolve() == common.EXAMPLE_TOOLS:
        common.note(_HINT_FOR_TOOLS)
    elif args.model == "demo" and not args.tools:
        common.note(_HINT)
    common.note("/help lists the commands")


def converse(chat: Chat, args: argparse.Namespace) -> None:
    """Answer what the person types, until the input ends."""
    while (text := read_message()) is not None:
        if not text:
            continue
        try:
            if text.startswith("/") and "\n" not in text:
                chat.obey(text)
            else:
                chat.say(text)
                report(args, chat.conversation.decoder)
        except EOFError:
            return
        except KeyboardInterrupt:
            pass  # the answer was stopped, and its end said so
        except (ValueError, OSError) as error:
            common.note(common.problem(error), style="red")


def report(args: argparse.Namespace, decoder: Engine) -> None:
    """What --lookup has gained so far."""
    if args.lookup:
        common.note(f"[{decoder.summary}]", style="dim")


if __name__ == "__main__":
    common.run(main)

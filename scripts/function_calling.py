"""Ask a model that can call functions; shows each call, its result and the answer.

Without --prompt it asks you.
"""

import argparse
import runpy
from collections.abc import Iterator
from pathlib import Path

import common

from mistral.chat import Conversation, events
from mistral.chat.formats import render_chat
from mistral.chat.tool_choice import check_tool_choice
from mistral.chat.tools import Tool, tool_table
from mistral.printable import on_one_line, printable_json

TOOLS = Path(__file__).with_name("example_tools.py")
_WORDS = {events.Error: "error", events.Altered: "note", events.Unfinished: "unknown"}


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, 'python scripts/function_calling.py --prompt "How many miles are 42 kilometers?"'
    )
    common.add_model_arguments(parser)
    parser.add_argument("--prompt", action="append", help="what to ask; repeatable: a conversation")
    parser.add_argument(
        "--tools",
        type=common.path,
        default=TOOLS,
        help="a Python file that makes tools with @tool; it is run",
    )
    parser.add_argument(
        "--tool-choice",
        default="auto",
        help="auto, none, required, or a tool's name (default: auto)",
    )
    parser.add_argument(
        "--no-grammar", action="store_true", help="do not constrain calls to the tools' schemas"
    )
    parser.add_argument(
        "--parallel", action="store_true", help="run the functions of one answer at the same time"
    )
    parser.add_argument(
        "--max-rounds", type=int, default=5, help="answers to one question (default: 5)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=30.0, help="seconds for one function (default: 30)"
    )
    parser.add_argument(
        "--show-prompt", action="store_true", help="print how the tools are described to the model"
    )
    common.add_chat_arguments(parser)
    common.add_sampling_arguments(parser, temperature=0.0)
    common.add_engine_argument(parser)
    common.add_lookup_argument(parser)
    args = parser.parse_args()
    if args.time_limit <= 0:
        raise ValueError("--time-limit must be more than 0 seconds")
    if args.no_grammar and args.tool_choice not in ("auto", "none"):
        raise ValueError(
            f"only a grammar can guarantee --tool-choice {args.tool_choice}: leave out --no-grammar"
        )
    for prompt in args.prompt or ():
        common.check_text(prompt, "--prompt")
    common.check(args)
    return args


def main() -> None:
    args = arguments()
    tools = read_tools(args.tools)
    # Every format with tools has the same choices; whether this one has them, the vocabulary says.
    check_tool_choice(args.tool_choice, tool_table(tools), args.format or "chatml")
    sampling = common.sampling(args)
    model, tokenizer = common.load(args)
    decoder, engine = common.open_chat_engine(args, model, args.max_tokens)
    conversation = Conversation(
        decoder,
        tokenizer,
        tools=tools,
        sampling=sampling,
        grammar=not args.no_grammar,
        tool_choice=args.tool_choice,
        max_rounds=args.max_rounds,
        max_new_tokens=args.max_new_tokens,
        format=args.format,
        time_limit=args.time_limit,
        parallel=args.parallel,
    )
    common.note(f"format {conversation.format}; {engine}; tools: {', '.join(conversation.tools)}")
    if args.show_prompt:
        messages = [{"role": "user", "content": "..."}]
        text = render_chat(tokenizer, messages, tools=tools, format=conversation.format)
        common.show(f"{text}\n")
    for prompt in args.prompt or asked():
        if args.prompt:
            common.show(f"> {prompt}")
        try:
            show(conversation.say(prompt))
        except (ValueError, KeyboardInterrupt) as error:
            if args.prompt:
                raise
            common.note(common.problem(error) if str(error) else "stopped")
    common.note(
        f"[{conversation.tokens_read} tokens read, {conversation.tokens_written} written, "
        f"{conversation.tokens_saved} of them without asking the model]"
    )
    if args.lookup:
        common.note(f"[{decoder.summary}]")


def read_tools(path: Path) -> list[Tool]:
    """The tools that a Python file makes, in its order."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; --tools takes a Python file that makes tools with @tool"
        )
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    tools = list({id(value): value for value in names.values() if isinstance(value, Tool)}.values())
    if not tools:
        raise ValueError(f"{path} makes no tools; decorate functions with mistral.chat.tool")
    return tools


def asked() -> Iterator[str]:
    """What a person types, until the input ends."""
    while (text := common.read_message()) is not None:
        if text:
            yield text


def show(answer) -> None:
    """Print events as they come: text as it is, calls and results on lines of their own."""
    within_line = False
    for event in answer:
        if isinstance(event, events.Text):
            common.show(event.text, end="")
            within_line = not event.text.endswith("\n")
            continue
        common.show("\n" if within_line else "", end="")
        within_line = False
        if isinstance(event, events.Call):
            line = f"  call    {event.name}({printable_json(event.arguments)})"
        elif isinstance(event, events.Result):
            line = f"  result  {printable_json(event.content)}"
        elif isinstance(event, events.End):
            line = "" if event.reason == "stop" else f"  ended   {event.reason}"
        else:
            line = f"  {_WORDS[type(event)]:<8}{event.message}"
        common.show(on_one_line(line) + "\n" * bool(line), end="")


if __name__ == "__main__":
    common.run(main)

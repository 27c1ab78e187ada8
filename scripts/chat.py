"""Chat with a model in the terminal.

/help lists the commands; a line that ends with \\ continues in the next one.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import common

import mistral
from mistral.chat import Conversation, events
from mistral.chat.saved import read_lines

HELP = """/reset          forget what was said
/undo           forget the last question and its answer
/retry          answer the last question again; with --seed, with the next seed
/system TEXT    begin anew with this system message (none: without one)
/save FILE      write the conversation as JSON lines
/load FILE      continue a saved one
/help           this list
/quit           leave (or Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ continues in the next one.
A line of \"\"\" begins a longer text, and another one ends it."""


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__, "python scripts/chat.py NousResearch/Hermes-2-Pro-Mistral-7B --system 'Be brief.'"
    )
    common.add_model_arguments(parser)
    parser.add_argument("--system", help="the system message")
    parser.add_argument("--load", type=common.path, help="continue a conversation that /save wrote")
    common.add_chat_arguments(parser)
    common.add_sampling_arguments(parser, temperature=0.7)
    common.add_engine_argument(parser)
    common.add_lookup_argument(parser)
    args = parser.parse_args()
    if args.load and (args.system or args.format):
        raise ValueError(
            "a conversation that is loaded has its own system message and format; "
            "leave out the options"
        )
    if args.load:
        read_lines(args.load)  # its errors come before the weights are read
    common.check_text(args.system, "--system")
    common.check(args)
    return args


def main() -> None:
    args = arguments()
    options = dict(sampling=common.sampling(args), max_new_tokens=args.max_new_tokens)
    model, tokenizer = common.load(args)
    decoder, engine = common.open_chat_engine(args, model, args.max_tokens)

    def begin(system: str | None) -> Conversation:
        decoder.rewind(decoder.lengths[0])
        return Conversation(decoder, tokenizer, system=system, format=args.format, **options)

    def resume(path: Path) -> Conversation:
        # If the file cannot be loaded, the previous conversation is prefilled again.
        decoder.rewind(decoder.lengths[0])
        return Conversation.load(path, decoder, tokenizer, **options)

    conversation = resume(args.load) if args.load else begin(args.system)
    common.note(f"format {conversation.format}; {engine}; /help lists the commands")
    while (text := common.read_message()) is not None:
        if text.startswith("/") and "\n" not in text:
            try:
                conversation = command(text, conversation, begin, resume)
            except EOFError:
                return
            except (ValueError, OSError) as error:
                common.note(common.problem(error))
        elif text:
            answer(conversation, conversation.say(text))
            if args.lookup:
                common.note(f"[{decoder.summary}]")


def command(
    text: str,
    conversation: Conversation,
    begin: Callable[[str | None], Conversation],
    resume: Callable[[Path], Conversation],
) -> Conversation:
    """Obey a line that begins with /; returns the conversation to continue. EOFError: leave."""
    name, _, rest = text.partition(" ")
    if name in ("/save", "/load") and not rest:
        raise ValueError(f"{name} needs the name of a file")
    match name:
        case "/quit" | "/exit":
            raise EOFError
        case "/reset":
            conversation.reset()
        case "/undo":
            conversation.undo()
            common.note(f"{len(conversation.messages)} messages")
        case "/retry":
            conversation.sampling = with_next_seed(conversation.sampling)
            answer(conversation, conversation.retry())
        case "/system":
            conversation = begin(rest or None)
        case "/save":
            conversation.save(rest)
            common.note(f"wrote {rest}")
        case "/load":
            conversation = resume(Path(rest))
            common.note(f"{len(conversation.messages)} messages")
        case "/help":
            show_help()
        case _:
            raise ValueError(f"there is no command {name}; /help lists them")
    return conversation


def with_next_seed(sampling: mistral.Sampling) -> mistral.Sampling:
    """The same with the next seed: with the same one an answer would be the same again."""
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + 1) % 2**64)


def show_help() -> None:
    """The commands, on stderr."""
    for line in HELP.splitlines():
        common.note(line)


def answer(conversation: Conversation, heard: Iterator[events.Event]) -> None:
    """Print the answer as it comes, and then what it took."""
    before = conversation.tokens_written
    start = time.perf_counter()
    first = None
    reason = "stopped"
    try:
        for event in heard:
            if isinstance(event, events.Text):
                first = first or time.perf_counter()
                common.show(event.text, end="")
            elif isinstance(event, events.End):
                reason = event.reason
    except KeyboardInterrupt:
        pass
    except ValueError as error:
        common.show("\n" if first else "", end="")
        common.note(common.problem(error))
        return
    end = time.perf_counter()
    written = conversation.tokens_written - before
    common.show()
    window = conversation.decoder.config.sliding_window
    length = conversation.tokens_held
    rolled = f", {length - window:,} have left the window" if window and length > window else ""
    rate = f"{(written - 1) / (end - first):.1f} tokens/s" if first and written > 1 else "no rate"
    waited = f"{(first or end) - start:.2f} s to the first"
    ended = "" if reason == "stop" else f" | ended: {reason}"
    common.note(f"[{written} tokens, {rate}, {waited} | {length:,} tokens in all{rolled}{ended}]")


if __name__ == "__main__":
    common.run(main)

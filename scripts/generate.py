"""Continue a text with a Mistral checkpoint, streamed to stdout; speed and memory go to stderr."""

import argparse
import sys
import time

import common

import mistral
from mistral.chat.formats import chat_format, encode_chat
from mistral.engine.base import Constraint
from mistral.engine.speculation import LookupDecoder
from mistral_kernels import open_engine


class Clock(Constraint):
    """Allows every token and notes when it came."""

    is_static = True  # no mask: an engine may keep steps in flight

    def __init__(self):
        self.start = time.perf_counter()
        self.times: list[float] = []

    def accept(self, id: int) -> None:
        self.times.append(time.perf_counter() - self.start)


def arguments() -> argparse.Namespace:
    parser = common.parser(
        __doc__,
        'python scripts/generate.py ~/Mistral-7B-v0.1 --prompt "The capital of France is"',
    )
    common.add_model_arguments(parser)
    parser.add_argument("--prompt", help="the text to continue (default: standard input)")
    parser.add_argument(
        "--special",
        action="store_true",
        help="parse control tokens such as <|im_start|> in the prompt",
    )
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message to answer, sent as a chat"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )
    common.add_sampling_arguments(parser, temperature=0.7)
    common.add_engine_argument(parser)
    common.add_lookup_argument(parser)
    args = parser.parse_args()
    if args.chat and args.special:
        raise ValueError("--chat writes the control tokens itself; leave out --special")
    for text in args.stop:
        common.check_text(text, "--stop")
    common.check(args)
    return args


def main() -> None:
    args = arguments()
    prompt = prompt_text(args)
    sampling = common.sampling(args)
    model, tokenizer = common.load(args)
    ids = tokenizer.encode(prompt, special=args.special)
    ends = dict(stop=args.stop)
    if args.chat:
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
        chat = chat_format(tokenizer)
        stop = [*args.stop, *chat.spelled_ends]
        ends = dict(
            stop=stop,
            stop_tokens=chat.stop_ids(tokenizer),
            strip_leading_space=chat.strip_leading_space,
        )
    room = room_for(ids, args.max_new_tokens, model.config)
    decoder, engine = open_engine(
        args.engine,
        model,
        1,
        room,
        slack=max(args.lookup, 16),
        say=common.note,
        progress=common.compiling,
    )
    if args.lookup:
        decoder = LookupDecoder(decoder, args.lookup)
    clock = Clock()
    pieces = mistral.generate_text(
        decoder,
        tokenizer,
        ids,
        sampling,
        max_new_tokens=args.max_new_tokens,
        constraint=clock,
        **ends,
    )
    interrupted = False
    try:
        for piece in pieces:
            common.show_text(piece)
    except KeyboardInterrupt:
        interrupted = True
    common.show()
    report(clock, len(ids), model.device, engine)
    if args.lookup:
        common.note(f"[{decoder.summary}]")
    if interrupted:
        raise KeyboardInterrupt


def prompt_text(args: argparse.Namespace) -> str:
    """--prompt, or standard input."""
    if args.prompt is None and sys.stdin.isatty():
        raise ValueError('there is no prompt: name one with --prompt "some text", or pipe it in')
    try:
        prompt = sys.stdin.buffer.read().decode("utf-8") if args.prompt is None else args.prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from None
    if not prompt:
        raise ValueError("the prompt is empty; give it at least one character to continue")
    common.check_text(prompt, "--prompt")
    return prompt


def room_for(ids: list[int], new: int, config: mistral.Config) -> int:
    """Tokens at the end. ValueError at once for more than the checkpoint can take."""
    if (room := len(ids) + new) > (limit := config.max_position_embeddings):
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {new} new ones make {room}, and the checkpoint was "
            f"made for {limit}: shorten the prompt or lower --max-new-tokens"
        )
    return max(room, 1)


def report(clock: Clock, prompt_tokens: int, device, engine: str) -> None:
    """What it took, in one line."""
    times = clock.times
    if not times:
        common.note(
            f"[no token was generated | peak memory {common.peak_memory(device)} | {engine}]"
        )
        return
    rate = (
        f"{(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s"
        if len(times) > 1
        else "one token"
    )
    common.note(
        f"[prompt {prompt_tokens} tokens | first token after {times[0]:.2f} s | then {rate} | "
        f"{len(times)} new tokens | peak memory {common.peak_memory(device)} | {engine}]"
    )


if __name__ == "__main__":
    common.run(main)

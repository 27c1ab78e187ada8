"""Write one HTML page about a forward pass: tokens, attention, cache, layers, time.

The text is read and continued greedily. Open the page in a browser; click a token, or move with the
arrow keys. It needs no network. What is shown was recorded by mistral/tracing.py from a real run
through the rolling cache.
"""

import argparse
import base64
import hashlib
import html
import json
import re
import zlib
from pathlib import Path

import common
import numpy as np

import mistral
from mistral.chat.formats import chat_format, encode_chat
from mistral.checkpoints.labels import checkpoint_name
from mistral.checkpoints.reader import dtype_name
from mistral.files import format_bytes, write_text
from mistral.tracing import Recorder, Stopwatch, logit_lens, most_tokens

TEMPLATES = Path(__file__).parent / "look_inside_page"
SCRIPTS = (
    "record.js",
    "panels.js",
    "drawings.js",
    "page.js",
)  # one after the other, they are one script
# in every page that this script wrote
OURS = '<meta name="generator" content="scripts/look_inside.py">'
GREEDY = mistral.Sampling(temperature=0)
MOST_TOKENS = 512  # of prompt and continuation
MOST_BYTES = 5_000_000  # of the page
MOST_TOP = 20

# Which part of the model each module is, by the last word of its name.
PART_OF = {
    "embed_tokens": "embedding",
    "input_layernorm": "norms",
    "post_attention_layernorm": "norms",
    "norm": "norms",
    "q_proj": "q, k, v projections",
    "k_proj": "q, k, v projections",
    "v_proj": "q, k, v projections",
    "self_attn": "attention and cache",
    "o_proj": "o projection",
    "mlp": "MLP",
    "lm_head": "output matrix",
}
PARTS = [*dict.fromkeys(PART_OF.values()), "the rest"]


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


def check_room(prompt: int, new: int, config: mistral.Config) -> None:
    """ValueError for a text that is too long to record."""
    if prompt + new > (most := min(MOST_TOKENS, most_tokens(config))):
        raise ValueError(
            f"the text has {prompt} tokens, and with {new} new ones that makes {prompt + new}; a "
            f"page holds {most} of this model: shorten the text or lower --new-tokens"
        )


def record(
    model: mistral.Mistral, ids: list[int], new: int, stop_tokens: tuple[int, ...] | None
) -> tuple[Recorder, Stopwatch]:
    """Generate up to `new` tokens under a recorder, then read them again under a stopwatch."""
    with Recorder(model) as trace:
        # One more than is shown: the last token that generation chooses is never read.
        chosen = list(
            mistral.generate(model, ids, GREEDY, max_new_tokens=new + 1, stop_tokens=stop_tokens)
        )
    decoder = mistral.Decoder(model, 1, len(ids) + new + 1, slack=0)
    with Stopwatch(model) as watch:
        for row in (ids, *([id] for id in chosen[:-1])):
            decoder.prefill([row])
    return trace, watch


def page_data(
    model: mistral.Mistral,
    tokenizer: mistral.Tokenizer,
    trace: Recorder,
    watch: Stopwatch,
    *,
    prompt: int,
    top: int,
    name: str,
) -> dict:
    """What the page shows, but for the attention weights; large tables are packed."""
    config = model.config
    lens = logit_lens(model, trace, min(top, config.vocab_size))
    residual = trace.residual().float().norm(dim=-1)  # [layers + 1, T]
    used = sorted({*trace.tokens, *lens.ids.flatten().tolist()})
    return {
        "model": {
            "name": name,
            "parameters": config.num_parameters,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "groups": config.num_attention_heads // config.num_key_value_heads,
            "window": config.sliding_window,
            "where": f"{dtype_name(model.dtype)} on {model.device}",
        },
        "prompt": prompt,
        "tokens": trace.tokens,
        "texts": {id: token_text(tokenizer, id) for id in used},
        "control": sorted(tokenizer.control_ids & set(used)),
        "slots": len(trace.steps[-1].slots),
        "steps": [
            {
                "start": step.start,
                "end": step.end,
                "writes": step.writes,
                "times": milliseconds(seconds),
            }
            for step, seconds in zip(trace.steps, watch.steps, strict=True)
        ],
        "parts": PARTS,
        "top": lens.ids.shape[-1],
        "lens_ids": pack(lens.ids.numpy().astype("<u4")),
        "lens_probabilities": pack(sixteen_bits(lens.probabilities.numpy())),
        "following": pack(sixteen_bits(lens.following.numpy())),
        "norms": pack(
            np.concatenate((residual.numpy(), *map(np.asarray, trace.added_norms()))).astype("<f4")
        ),
    }


def milliseconds(seconds: dict[str, float]) -> list[float]:
    """What each of PARTS took of one forward; together they are the whole of it."""
    times = dict.fromkeys(PARTS, 0.0)
    for name, s in seconds.items():
        last = name.rpartition(".")[2]
        if last in PART_OF:
            times[PART_OF[last]] += s
        if last in ("q_proj", "k_proj", "v_proj", "o_proj"):  # they stand inside of self_attn
            times["attention and cache"] -= s
    times["the rest"] = seconds[""] - sum(times.values())
    return [round(1000 * s, 4) for s in times.values()]


def token_text(tokenizer: mistral.Tokenizer, id: int) -> str:
    """A token as one can see it: a space as \u2581, a newline as \u21b5, a lone byte as \\xe2."""
    if (text := tokenizer.control_text(id)) is None:
        if (raw := tokenizer.token_bytes(id)) is None:
            return f"[{id}]"
        text = raw.decode("utf-8", errors="backslashreplace")
    text = text.replace(" ", "\u2581").replace("\n", "\u21b5")
    # What does not print may hide text or turn its direction.
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def sixteen_bits(probabilities: np.ndarray) -> np.ndarray:
    """0 .. 1 as 0 .. 65535."""
    return np.rint(probabilities.astype(np.float64) * 65535).astype("<u2")


def pack(array: np.ndarray) -> str:
    """Bytes, deflated, in base64. `unpack` in record.js is the way back."""
    return base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()


def eight_bits(weights: np.ndarray) -> np.ndarray:
    """Attention weights [N, T, T] as 0 .. 255, the past alone: [N, T (T + 1) / 2]."""
    return np.rint(weights.astype(np.float32) * 255).astype(np.uint8)[
        :, *np.tril_indices(weights.shape[1])
    ]


def render(data: dict, trace: Recorder, most_bytes: int = MOST_BYTES) -> str:
    """The page; small attention weights are dropped, from 1/255 up, until it fits.

    Raises ValueError if it never does.
    """
    layers = [
        eight_bits(trace.attention(layer).numpy())
        for layer in range(trace.config.num_hidden_layers)
    ]
    for least in (1, 2, 3, 5, 8, 13, 26, 51, 102, 204):
        attention = [pack(np.where(layer < least, 0, layer).astype(np.uint8)) for layer in layers]
        page = fill({**data, "attention": attention, "least": least})
        if len(page.encode()) <= most_bytes:
            return page
    raise ValueError(
        f"the page would be larger than {format_bytes(most_bytes)}; shorten the text or lower --top"
    )


def fill(data: dict) -> str:
    """The templates with `data` in them.

    Nothing in it can end the script element or become markup.
    """
    style, *scripts = (
        (TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", *SCRIPTS)
    )
    script = "".join(scripts)
    fields = {
        "generator": OURS,
        "title": html.escape(data["model"]["name"]),
        # The browser runs this script and this style and nothing else, and fetches nothing.
        "policy": f"default-src 'none'; style-src '{digest(style)}'; script-src '{digest(script)}'",
        "style": style,
        "script": script,
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = (TEMPLATES / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found[1]], template)


def digest(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


if __name__ == "__main__":
    common.run(main)

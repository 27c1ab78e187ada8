"""One HTML page about a recorded run: tokens, attention, cache, layers, time.

It is a single file that needs no network. What is shown was recorded by mistral/tracing.py.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistral.files import format_bytes
from mistral.model import Mistral
from mistral.tokenizer import Tokenizer
from mistral.tracing import Recorder, Stopwatch, logit_lens

TEMPLATES = Path(__file__).parent / "template"
SCRIPTS = ("record.js", "panels.js", "drawings.js", "page.js")  # in this order they are one script
# In every page: by it, scripts/look_inside.py knows which files it may replace.
OURS = '<meta name="generator" content="scripts/look_inside.py">'
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


def page_data(
    model: Mistral,
    tokenizer: Tokenizer,
    trace: Recorder,
    watch: Stopwatch,
    *,
    prompt: int,
    top: int,
    name: str,
    greedy: bool = True,
) -> dict[str, Any]:
    """What the page shows, but for the attention weights; large tables are packed.

    greedy  whether each generated token was the most probable one
    """
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
            "where": f"{str(model.dtype).removeprefix('torch.')} on {model.device}",
        },
        "opens": telling_head(trace),
        "prompt": prompt,
        "greedy": greedy,
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


def telling_head(trace: Recorder) -> dict[str, int]:
    """The layer and head that the page opens on: those whose attention is the least trivial.

    The rows of a trivial head have all weight on the first token, the same on every token in sight,
    or always the same weights at the same distances: on the token before, for example. A row's
    distance is that to the nearest of the three (total variation, 0 to 1), a head's the mean over
    the rows that see two tokens or more. The first of equal heads is taken.
    """
    config = trace.config
    scores = torch.stack(
        [
            _distances(trace.attention(layer), config.sliding_window)
            for layer in range(config.num_hidden_layers)
        ]
    )  # [layers, N]
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return {"layer": layer, "head": head}


def _distances(weights: Tensor, window: int | None) -> Tensor:
    """How far each head is from a trivial one: weights [N, T, T] -> [N]."""
    T = weights.shape[-1]
    if T == 1:
        return weights.new_zeros(weights.shape[0])
    weights = weights.float()[:, 1:]  # the first token sees itself alone
    back = torch.arange(1, T)[:, None] - torch.arange(T)  # how far back each key is, [T - 1, T]
    in_sight = (back >= 0) & (back < (window or T))
    # 1. The first token, and every token alike.
    to_first = 1 - weights[:, :, 0]  # [N, T - 1]
    uniform = in_sight / in_sight.sum(dim=-1, keepdim=True)
    to_uniform = (weights - uniform).abs().sum(dim=-1) / 2
    # 2. The mean weight at each distance, in the place of every weight.
    distance = back[in_sight]
    sums = weights.new_zeros(weights.shape[0], T).index_add_(1, distance, weights[:, in_sight])
    means = sums / distance.bincount(minlength=T).clamp(min=1)  # [N, T]
    steady = torch.zeros_like(weights)
    steady[:, in_sight] = means[:, distance]
    steady /= steady.sum(dim=-1, keepdim=True).clamp(min=1e-9)
    to_steady = (weights - steady).abs().sum(dim=-1) / 2
    return torch.stack((to_first, to_uniform, to_steady)).amin(dim=0).mean(dim=-1)


def milliseconds(seconds: dict[str, float]) -> list[float]:
    """What each of PARTS took of one forward pass; together they are the whole of it."""
    times = dict.fromkeys(PARTS, 0.0)
    for name, s in seconds.items():
        last = name.rpartition(".")[2]
        if last in PART_OF:
            times[PART_OF[last]] += s
        if last in ("q_proj", "k_proj", "v_proj", "o_proj"):  # they are inside of self_attn
            times["attention and cache"] -= s
    times["the rest"] = seconds[""] - sum(times.values())
    return [round(1000 * s, 4) for s in times.values()]


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token made visible: a space as \u2581, a newline as \u21b5, a lone byte as \\xe2."""
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


def render(data: dict[str, Any], trace: Recorder, most_bytes: int = MOST_BYTES) -> str:
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


def fill(data: dict[str, Any]) -> str:
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

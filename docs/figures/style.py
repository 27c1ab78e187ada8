"""What all figures share: their colours, their size, how they are saved.

The ink is the page's own text colour: black on a light page, white on a dark one. The other colours
are of middle lightness and readable on both. Backgrounds are transparent. An SVG carries the
numbers that it shows, so that a test can compare them with what the code computes.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

import torch
from torch import Tensor

import mistral
from mistral.chat import encode_chat

FOLDER = Path(__file__).parent
WIDTH = 5.6  # inches: as wide as can be read on a phone
INK = "#010203"  # stands for the page's text colour until the file is saved
BLUE, ORANGE, GREEN, PURPLE, RED = "#3d84d6", "#d5752a", "#35985a", "#9769d4", "#d65350"
INK_FOLLOWS_THE_PAGE = "svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e4e6eb}}"
FONTS = "'DejaVu Sans', Verdana, 'Segoe UI', Roboto, sans-serif"


@functools.cache
def demo() -> tuple[mistral.Mistral, mistral.Tokenizer]:
    """The demo and its tokenizer, loaded once for all figures."""
    return mistral.load("demo", device="cpu")


QUESTION = "What is a sliding window?"


def question_ids() -> list[int]:
    """The prompt that the book follows through the model: one question, as a ChatML turn."""
    return encode_chat(demo()[1], [{"role": "user", "content": QUESTION}])


@torch.inference_mode()
def hidden_states(ids: list[int]) -> list[Tensor]:
    """What enters each layer of the demo for a text, and what leaves the last one, [T, D] each."""
    model, states = demo()[0], []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
        for layer in model.model.layers
    ]
    hooks.append(
        model.model.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
    )
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return states


def label(id: int) -> str:
    """The text of one of the demo's tokens, with signs for blanks."""
    tokenizer = demo()[1]
    text = tokenizer.control_text(id) or (tokenizer.token_bytes(id) or b"?").decode(
        errors="replace"
    )
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def start(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of the book's width, `height` inches high, and its axes; options as for
    plt.subplots.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcdefaults()
    plt.rcParams |= {
        # the same names in every run, so that files change with what they show
        "svg.hashsalt": "mistral",
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PURPLE, RED]),
        "legend.frameon": False,
        "savefig.transparent": True,
    }
    plt.rcParams |= {key: INK for key in plt.rcParams if re.search(r"^(text|.*label)color$", key)}
    plt.rcParams |= {f"{key}.color": INK for key in ("text", "xtick", "ytick")}
    plt.rcParams |= {"axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK}
    options.setdefault("layout", "constrained")
    return plt.subplots(rows, columns, figsize=(WIDTH, height), **options)


def shades(color: str) -> Any:
    """A colour map from nothing to `color`, for tables of numbers; the page shines through where
    they are small.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    return LinearSegmentedColormap.from_list(
        "shades", [(*to_rgb(color), 0.0), (*to_rgb(color), 1.0)]
    )


def cell(
    ax: Any,
    x: float,
    y: float,
    text: str = "",
    color: str | None = None,
    width: float = 1,
    **options: Any,
) -> None:
    """A box of height 1 with its lower left corner at (x, y), tinted with `color`; options as for
    `text`.
    """
    from matplotlib.patches import Rectangle

    if color:
        ax.add_patch(Rectangle((x, y), width, 1, facecolor=color, alpha=0.4, linewidth=0))
    ax.add_patch(Rectangle((x, y), width, 1, fill=False, edgecolor=INK, linewidth=0.8))
    ax.text(x + width / 2, y + 0.5, text, **{"ha": "center", "va": "center_baseline", **options})


def bare(ax: Any, width: float, height: float) -> None:
    """Axes to put cells on: no frame, squares are square, from (0, 0) to (width, height)."""
    ax.set(xlim=(-0.1, width + 0.1), ylim=(-0.1, height + 0.1), aspect="equal")
    ax.axis("off")


def rounded(data: Any) -> Any:
    """The same lists and dicts with four digits of each number."""
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [rounded(value) for value in data]
    return float(f"{data:.4g}") if isinstance(data, float) else data


def save(figure: Any, name: str, data: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write NAME.svg: the picture, and in its metadata the numbers that it shows."""
    import matplotlib.pyplot as plt

    path = folder / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    svg = path.read_text().replace(INK, "currentColor").replace("'DejaVu Sans'", FONTS)
    numbers = f'<metadata id="data">{escape(json.dumps(rounded(data)))}</metadata>\n'
    svg = svg.replace("<defs>", f"{numbers} <style>{INK_FOLLOWS_THE_PAGE}</style>\n <defs>", 1)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


def saved_data(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The numbers in NAME.svg."""
    svg = (folder / f"{name}.svg").read_text()
    return json.loads(unescape(re.search(r'<metadata id="data">(.*?)</metadata>', svg, re.S)[1]))

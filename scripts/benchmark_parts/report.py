"""Tables, sections of pages, and the plot of cost per token against context."""

import re
from collections.abc import Sequence
from pathlib import Path

from mistral.files import format_bytes, whole_file, write_text

HEAD = (
    f"{'tokens/s':<23}{'decode':>9}{'of roof':>9}{'to peer':>9}{'medians':>9}"
    f"{'prefill':>11}{'of roof':>9}{'first':>10}{'peak':>11}"
)


def table(title: str, results: Sequence[dict]) -> str:
    """One case: tokens/s, their share of the roof, and the ratio to the peer.

    The peer is transformers, or llama.cpp if transformers was not measured.
    """
    measured = {r["engine"]: r for r in results if "failed" not in r}
    peer = measured.get("transformers") or measured.get("llama.cpp")
    lines = [title, HEAD]
    for result in results:
        if "failed" in result:
            lines.append(f"{result['engine']:<23}not measured: {result['failed']}")
            continue
        ratios = [
            result[key] / peer[key] if peer else None
            for key in ("decode_tokens_per_s", "decode_median")
        ]
        ratio, medians = (f"{r:.2f}" if r else "-" for r in ratios)
        first = f"{1e3 * result['first_token_s']:,.1f} ms"
        peak = result["peak_bytes"]
        lines.append(
            f"{result['engine']:<23}{result['decode_tokens_per_s']:>9,.1f}{result['decode_of_roof']:>9.1%}{ratio:>9}"
            f"{medians:>9}{result['prefill_tokens_per_s']:>11,.1f}{result['prefill_of_roof']:>9.1%}{first:>10}"
            f"{format_bytes(peak) if peak else '-':>11}"
        )
    notes = [
        f"  {r['engine']}: {r['note'].removeprefix('engine: ')}" for r in results if r.get("note")
    ]
    return "\n".join([*lines, *notes, ""])


def costs_of_length(results: Sequence[dict]) -> list[str]:
    """A line for each engine and batch: a step at the longest context against one at 4,096."""
    cost = {
        (r["engine"], r["batch"], r["context"]): r["ms_per_step"]
        for r in results
        if "failed" not in r
    }
    longest = max((key[2] for key in cost), default=0)
    lines = []
    for (engine, batch, context), ms in cost.items():
        short = cost.get((engine, batch, 4096))
        if context == longest > 4096 and short is not None:
            lines.append(
                f"{engine}, batch {batch}: a step at {longest:,} tokens costs {ms / short:.3f} "
                "times one at 4,096"
            )
    return lines


def write_section(page: Path, heading: str, text: str) -> None:
    """Replace a page's section "## heading" by a text, or append it; the rest stays."""
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    before, *sections = re.split(r"^(?=## )", old, flags=re.M)
    new = f"## {heading}\n\n{text.strip()}\n"
    names = [section.splitlines()[0] for section in sections]
    if f"## {heading}" in names:
        sections[names.index(f"## {heading}")] = new
    else:
        sections.append(new)
    parts = [part.strip() for part in (before, *sections) if part.strip()]
    write_text(page, "\n\n".join(parts) + "\n")


def require_matplotlib() -> None:
    """ValueError where it is missing: before anything is measured, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None


def plot(path: Path, results: Sequence[dict], title: str) -> None:
    """Milliseconds a decode step against tokens of context, a line for each engine and batch."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    measured = [r for r in results if "failed" not in r]
    engines = list(dict.fromkeys(r["engine"] for r in measured))
    for engine, batch in dict.fromkeys((r["engine"], r["batch"]) for r in measured):
        points = sorted(
            (r["context"], r["ms_per_step"])
            for r in measured
            if (r["engine"], r["batch"]) == (engine, batch)
        )
        color = f"C{engines.index(engine)}"
        mark = "o^sDvP*X"[batch.bit_length() % 8]
        axes.plot(*zip(*points), color=color, marker=mark, label=f"{engine}, batch {batch}")
    axes.set(
        xscale="log", xlabel="tokens of context", ylabel="ms a step", title=title, ylim=(0, None)
    )
    contexts = sorted({r["context"] for r in measured})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()  # whose labels would stand across these
    axes.legend(fontsize="small")
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or "png")

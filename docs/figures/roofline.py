"""The roofline of one H200 and where a 7B in bfloat16 stands under it. Arithmetic from a datasheet,
not a measurement.

Sources: Williams, Waterman, Patterson: Roofline, https://doi.org/10.1145/1498765.1498785;
NVIDIA's H200 datasheet: 4.8 TB/s, and 989 TFLOP/s in bfloat16 (half of what it states for sparse
matrices).
"""

import style
from decode_bytes import matrix_bytes

BANDWIDTH, PEAK = 4.8e12, 989e12  # bytes/s, FLOP/s
TOKENS = (1, 8, 64, 1024)  # in one forward, of one text or of several


def data() -> dict:
    """For each number of tokens at once: arithmetic intensity in FLOP/byte, attainable FLOP/s,
    tokens/s.

    Counted are the matrices: 2 operations for each weight and token, and 2 bytes for each weight
    and forward.
    """
    size = sum(matrix_bytes("BF16").values())
    points = []
    for tokens in TOKENS:
        flops = size * tokens  # size / 2 weights, 2 operations each
        seconds = max(size / BANDWIDTH, flops / PEAK)
        points.append(
            {
                "tokens": tokens,
                "intensity": flops / size,
                "rate": flops / seconds,
                "per_s": tokens / seconds,
            }
        )
    return {"ridge": PEAK / BANDWIDTH, "points": points}


def draw(folder=style.FOLDER) -> None:
    numbers = data()
    figure, ax = style.start(3.2)
    ridge = numbers["ridge"]
    ax.plot([0.5, ridge, 1e4], [0.5 * BANDWIDTH, PEAK, PEAK], color=style.INK, linewidth=1.2)
    for point in numbers["points"]:
        color = style.ORANGE if point["intensity"] < ridge else style.BLUE
        ax.plot(point["intensity"], point["rate"], "o", color=color)
        text = f"{point['tokens']:,} at once\n{point['per_s']:,.0f} tokens/s"
        ax.annotate(
            text,
            (point["intensity"], point["rate"]),
            (4, -9),
            textcoords="offset points",
            va="top",
            fontsize=8,
        )
    ax.set(xscale="log", yscale="log", xlim=(0.5, 2e4), ylim=(4e11, 2e15))
    ax.set(xlabel="operations for each byte read", ylabel="attainable FLOP/s")
    ax.text(1.2, 1.3e13, "bound by memory", rotation=32, color=style.ORANGE)
    ax.text(700, 1.2e15, "bound by arithmetic", color=style.BLUE)
    style.save(figure, "roofline", numbers, folder)

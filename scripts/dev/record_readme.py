"""Make the README's two pictures again, from real runs with the demo.

docs/pictures/session.svg     a session of scripts/chat.py in a pseudo-terminal
docs/pictures/look_inside.png the top of the page that scripts/look_inside.py writes, as Chromium
                              (`apt-get install chromium`) shows it

Both run on the CPU, so that another machine makes the same pictures.
"""

import argparse
import os
import pty
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from html import escape
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py

import common

from mistral.files import whole_file, write_text

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs/pictures"
# The command, line by line. The engine is not the default, whose line differs from machine to
# machine.
SESSION = (
    ("scripts/chat.py", "--engine", "eager"),
    ("--tools", "scripts/example_tools.py"),
    ("--prompt", "How many miles are 42 kilometers?"),
)
QUESTION = "What is a rolling cache?"
INSIDE = ("--chat", "--window", "24", "--new-tokens", "64")  # the answer ends, and the cache rolls
COLUMNS = 68  # of the terminal: legible on a telephone, too
CHARACTER = 8.4  # width in pixels, at a font size of 14
LINE = 20  # height in pixels
MARGIN = 16
COLOURS = {"$ ": "#ffffff", "> ": "#8cc8ff", "  call": "#ffd479", "  result": "#9fe08f"}
ANSWER = "#ffffff"  # colour of the line after a result
NOTE = "#9aa4ad"  # colour of what the script says about itself
PAGE_SIZE = (1120, 1380)  # of the window, in CSS pixels
PIXEL_RATIO = 1


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, "python scripts/dev/record_readme.py")
    parser.add_argument(
        "--only", choices=("session", "look_inside"), help="one of the pictures (default: both)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    PICTURES.mkdir(exist_ok=True)
    if args.only != "look_inside":
        write_text(PICTURES / "session.svg", draw(record_session()))
        common.note(f"wrote {PICTURES / 'session.svg'}")
    if args.only != "session":
        take_screenshot(PICTURES / "look_inside.png")
        common.note(f"wrote {PICTURES / 'look_inside.png'}")


def record_session() -> list[str]:
    """Run the script in a pseudo-terminal; the command line and the screen without its last line.

    RuntimeError if the script fails.
    """
    ours, theirs = pty.openpty()
    environment = _without_gpu() | {"NO_COLOR": "1"}  # `draw` has colours of its own
    process = subprocess.Popen(
        [sys.executable, *chain(*SESSION)],
        cwd=ROOT,
        env=environment,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    while chunk := _read(ours):
        output += chunk
    os.close(ours)
    if process.wait():
        raise RuntimeError(f"{SESSION[0][0]} has failed:\n{output.decode()}")
    lines = [shlex.join(line).replace("'", '"') for line in SESSION]
    command = [f"$ .venv/bin/python {lines[0]} \\", f"    {lines[1]} \\", f"    {lines[2]}"]
    *screen, took = _screen(output.decode())  # the time that it took is another one each time
    if not took.startswith("["):
        raise RuntimeError(f"the last line is not that of the time: {took}")
    return command + screen


def _without_gpu() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _read(terminal: int) -> bytes:
    """The next bytes of a pseudo-terminal, b"" at its end."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux reports the end in this way
        return b""


def _screen(output: str) -> list[str]:
    """What remains on a terminal of COLUMNS columns; long lines are wrapped between words."""
    lines = []
    for line in output.replace("\r\n", "\n").splitlines():
        shown = line.split("\r")[-1]  # a progress bar overwrites itself, and then it is cleared
        indent = " " * 10 if shown.startswith("  ") else ""  # below the arguments of a call
        lines += textwrap.wrap(
            shown, COLUMNS, subsequent_indent=indent, drop_whitespace=True, break_on_hyphens=False
        ) or [""]
    return lines


def draw(lines: list[str]) -> str:
    """The lines as an SVG of a dark terminal: text in the reader's own monospaced font."""
    width = round(COLUMNS * CHARACTER) + 2 * MARGIN
    height = LINE * len(lines) + 2 * MARGIN
    title = escape(" ".join(chain(*SESSION)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#1b2127"/>',
        "<g font-family=\"ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace\""
        ' font-size="14">',
    ]
    colour = NOTE
    for number, line in enumerate(lines):
        colour = _colour(line, colour)
        baseline = MARGIN + LINE * number + 14
        length = round(len(line) * CHARACTER, 1)  # the same in every font: columns stay columns
        text = escape(line).replace(" ", "\u00a0")  # plain spaces in a row would become one
        parts.append(
            f'<text x="{MARGIN}" y="{baseline}" fill="{colour}" textLength="{length}"'
            f' lengthAdjust="spacingAndGlyphs">{text}</text>'
        )
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _colour(line: str, previous: str) -> str:
    """The colour of a line, by its beginning and by the colour of the line before it."""
    for beginning, colour in COLOURS.items():
        if line.startswith(beginning):
            return colour
    if line.startswith("    "):  # continues the line before it
        return previous
    return ANSWER if previous == COLOURS["  result"] else NOTE


def take_screenshot(path: Path) -> None:
    """The top of the page that scripts/look_inside.py writes.

    ValueError without a Chromium, RuntimeError if the script or Chromium fails.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise ValueError("this needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        script = ("scripts/look_inside.py", "demo", QUESTION, *INSIDE, "-o", page)
        subprocess.run([sys.executable, *script], cwd=ROOT, env=_without_gpu(), check=True)
        command = [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            f"--user-data-dir={folder}/profile",
            f"--force-device-scale-factor={PIXEL_RATIO}",
            "--virtual-time-budget=10000",  # the heads are drawn layer by layer
            "--window-size={},{}".format(*PAGE_SIZE),
            f"--screenshot={folder}/page.png",
            page.as_uri(),
        ]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=120)
        with whole_file(path) as file:
            shutil.copyfile(f"{folder}/page.png", file)


if __name__ == "__main__":
    common.run(main)

"""Draw the book's figures again, all of them or those named: python docs/figures/draw.py [NAME
...]
"""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("draw", "style"))


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        importlib.import_module(name).draw()
        print("drew", name)


if __name__ == "__main__":
    main()

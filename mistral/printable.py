"""Text from files and models, made safe for a terminal.

A terminal obeys what it is sent: ESC sequences write the clipboard, move the cursor and change the
title, a carriage return hides the beginning of a line, and bidirectional controls change the order
of what a person reads. Here each such character becomes its escape in Python: \\x1b, \\u202e.
"""

import json
import re
from typing import Any

# Left as they are: letters of all scripts, emoji and their joiners, spaces, newlines and tabs.
_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f"  # C0 controls, with ESC and carriage return
    "\x7f-\x9f"  # DEL and the C1 controls
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # marks, embeddings and isolates of direction
    "\u2028\u2029"  # separators of lines and paragraphs
    "\ud800-\udfff"  # lone surrogates, which no encoding can write
    "\ufeff\ufff9-\ufffb"  # the byte order mark, and the controls of annotations
    "\U000e0000-\U000e007f"  # tags: a copy of ASCII that nothing shows
    "]"
)


def printable(text: str) -> str:
    """The text with controls as escapes, but for newlines and tabs.

    Each character is treated by itself: a text may be passed piece by piece as it is generated.
    """
    return _UNSAFE.sub(lambda found: repr(found[0])[1:-1], text)


def on_one_line(text: object) -> str:
    """The same for a name or a message: newlines and tabs are escapes, too."""
    return printable(str(text)).replace("\n", "\\n").replace("\t", "\\t")


def printable_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON that is safe to show: the escapes are those of JSON, so it stays equal."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _UNSAFE.sub(lambda found: json.dumps(found[0])[1:-1], text)

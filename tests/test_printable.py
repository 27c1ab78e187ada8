"""Text from files and models must not command the terminal."""

import json
import unicodedata

import pytest

from mistral import CheckpointError
from mistral.printable import on_one_line, printable, printable_json

OSC_52 = "\x1b]52;c;cm0gLXJmIH4=\x07"  # writes the clipboard
HOSTILE = f"{OSC_52}\x1b[2J\x9b31m\r\u202etxt\u2066\u200f\u2028\ufeff\ud800\U000e0041"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (OSC_52, r"\x1b]52;c;cm0gLXJmIH4=\x07"),
        ("a\rb\x00\x7f\x85\x9b", r"a\rb\x00\x7f\x85\x9b"),
        ("\u202a\u202e\u2066\u2069\u200e\u200f", r"\u202a\u202e\u2066\u2069\u200e\u200f"),
        ("\u2028\u2029\ufeff\ud800\udfff", r"\u2028\u2029\ufeff\ud800\udfff"),
        ("\U000e0001\U000e0041\U000e007f", r"\U000e0001\U000e0041\U000e007f"),
        ("a\n\tb", "a\n\tb"),
        ("naïve 日本語 שלום 👩\u200d💻 \\x1b \xa0", "naïve 日本語 שלום 👩\u200d💻 \\x1b \xa0"),
    ],
)
def test_controls_become_escapes_and_all_other_text_stays(text, shown):
    assert printable(text) == shown
    assert "".join(map(printable, text)) == shown  # piece by piece
    assert on_one_line(text) == shown.replace("\n", "\\n").replace("\t", "\\t")


def test_no_control_of_unicode_is_left():
    everything = "".join(map(chr, range(0x110000)))
    left = {c for c in printable(everything) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
    assert left == {"\n", "\t"}
    bidirectional = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    assert not [c for c in printable(everything) if unicodedata.bidirectional(c) in bidirectional]


def test_json_stays_equal():
    value = {HOSTILE: [HOSTILE, "é日😀\n\t\x7f", 1.5, None]}
    for indent in (None, 2):
        text = printable_json(value, indent)
        assert json.loads(text) == value
        assert printable(text) == text
        assert "é日😀" in text


def test_an_error_of_the_package_is_one_printable_line():
    message = str(CheckpointError(f"folder/{HOSTILE}\nname is missing"))
    assert message.isprintable()
    assert message.startswith(r"folder/\x1b]52;c;")
    assert message.endswith(r"\ud800\U000e0041 name is missing")

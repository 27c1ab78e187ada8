"""200 texts that people wrote, from what the tests' own packages install."""

import sysconfig
from importlib import metadata
from pathlib import Path

WRITTEN = (
    "🙂 👍🏽 👩‍👩‍👧‍👦 🇫🇷 ☕️ ❤️‍🔥",
    "1234567890 3.14159 1,000,000 0x1F ½ ² Ⅷ ٣ ४ 12:30",
    "    four spaces\n\ttab\n\n\n\nfour newlines \n  \t mixed   ",
    " " * 40 + "x" + "\n" * 40 + "\t" * 20,
    "\r\nWindows\r\nlines\r\n",
    "",
    " ",
    "\n",
    "a",
    "I'm you're we've they'll he'd it's don't DON'T I'M",
    "naïve café e\u0301 \u1e69 \u0323\u0307",
    "日本語のテキストです。漢字とかな、カタカナ。",
    "한국어 문장입니다. 잘 지내세요?",
    "Привет, мир! Как дела? Ёлка.",
    "שלום עולם, مرحبا بالعالم",
    "नमस्ते दुनिया, สวัสดีชาวโลก",
    "<|im_start|>user\nThis is text.<|im_end|>",
    "\u200b\u00a0\u2003\ufeff zero width, no-break, em space",
    "x" * 300 + " " + "ab" * 200,
    "def f(x):\n    return [i**2 for i in range(x) if i % 2 == 0]  # 100%\n",
)


def texts() -> list[str]:
    """60 languages, 60 licences, 60 Python modules, and what is written above."""
    return [*_languages(), *_licences(), *_code(), *WRITTEN]


def _languages() -> list[str]:
    folder = metadata.distribution("mkdocs-material").locate_file(
        "material/templates/partials/languages"
    )
    files = sorted(Path(str(folder)).glob("*.html"))
    return [file.read_text(encoding="utf-8")[:2000] for file in files[:60]]


def _licences() -> list[str]:
    found = set()
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            if ".dist-info" in str(file) and file.name.upper().startswith("LICEN"):
                path = Path(str(distribution.locate_file(file)))
                if path.is_file():
                    found.add(path.read_text(encoding="utf-8", errors="replace")[:3000])
    return sorted(found)[:60]


def _code() -> list[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [file.read_text(encoding="utf-8")[1000:3000] for file in files]
    return [part for part in parts if len(part) > 500][:60]

"""Bring the libraries of the chat page from npm into mistral/server/page/vendor, or check them.

Each file is kept as it was published. A file whose hash differs from the table is refused.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # common.py

import common

from mistral.files import whole_file, write_text

VENDOR = Path(__file__).resolve().parents[2] / "mistral/server/page/vendor"
HASHES = Path(__file__).with_suffix(".json")
# Grammars of highlight.js; the page loads one when an answer has code in its language.
_LANGUAGES = "bash cpp diff javascript json python sql xml yaml".split()


@dataclass(frozen=True)
class Package:
    """A package of npm. files: path in the package -> name in the folder."""

    name: str
    version: str
    files: dict[str, str]


PACKAGES = (
    Package(
        name="marked",
        version="18.2.1",
        files={"lib/marked.esm.js": "marked.esm.js"},
    ),
    Package(
        name="dompurify",
        version="3.5.0",
        files={"dist/purify.min.js": "purify.min.js"},
    ),
    Package(
        name="@highlightjs/cdn-assets",
        version="11.12.0",
        files={
            "es/core.min.js": "highlight.core.js",
            **{f"es/languages/{name}.min.js": f"highlight.{name}.js" for name in _LANGUAGES},
        },
    ),
)


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__, "python scripts/dev/vendor_page.py --check")
    parser.add_argument("--check", action="store_true", help="only compare the hashes; no network")
    parser.add_argument(
        "--new", action="store_true", help="write the table of hashes anew, after new versions"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not args.check:
        found = {}
        for package in PACKAGES:
            found |= _fetch(package)
        if args.new:
            hashes = {name: sha256(found[name]) for name in sorted(found)}
            write_text(HASHES, json.dumps(hashes, indent=1) + "\n")
        check(found)  # before anything is replaced
        for name, content in found.items():
            with whole_file(VENDOR / name) as temporary:
                temporary.write_bytes(content)
    check({path.name: path.read_bytes() for path in vendored()})
    common.show(f"{len(vendored())} files in {VENDOR} have the hashes of {HASHES.name}")


def check(contents: dict[str, bytes]) -> None:
    """ValueError that names every file that is wrong."""
    if wrong := problems(contents):
        raise ValueError("; ".join(f"{name} {text}" for name, text in wrong.items()))


def vendored() -> list[Path]:
    """The files of the folder that come from npm."""
    return sorted(VENDOR.iterdir())


def problems(contents: dict[str, bytes]) -> dict[str, str]:
    """File -> what is wrong with it."""
    expected = json.loads(HASHES.read_text())
    wrong = {}
    for name in sorted(expected.keys() | contents.keys()):
        if name not in contents:
            wrong[name] = "is missing"
        elif name not in expected:
            wrong[name] = "is not in the table of hashes"
        elif sha256(contents[name]) != expected[name]:
            wrong[name] = "differs from the version in the table of hashes"
    return wrong


def sha256(content: bytes) -> str:
    """The hash, as sha256sum prints it."""
    return hashlib.sha256(content).hexdigest()


def _fetch(package: Package) -> dict[str, bytes]:
    """Name in the folder -> content, with the licence and the version of the package."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:

            def content(path: str) -> bytes:
                file = archive.extractfile(f"package/{path}")
                if file is None:
                    raise ValueError(f"{package.name} has no file {path}")
                return file.read()

            found = {name: content(path) for path, name in package.files.items()}
            title = f"{package.name} {package.version}, https://www.npmjs.com/package/{package.name}\n\n"
            licence = title.encode() + content("LICENSE")
    return found | {f"LICENSE.{package.name.split('/')[0].strip('@')}.txt": licence}


if __name__ == "__main__":
    common.run(main)

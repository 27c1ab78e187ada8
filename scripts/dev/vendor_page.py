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
HASHES = VENDOR / "hashes.json"
# Grammars of highlight.js; the page loads one when an answer has code in its language.
_LANGUAGES = ("bash cpp diff go java javascript json python rust sql xml yaml").split()


@dataclass(frozen=True)
class Package:
    """A package of npm. files: path in the package -> name in the folder."""

    name: str
    version: str
    files: dict[str, str]
    licence: str  # its file in the package


PACKAGES = (
    Package(
        name="marked",
        version="18.2.1",
        files={"lib/marked.esm.js": "marked.esm.js"},
        licence="LICENSE",
    ),
    Package(
        name="dompurify",
        version="3.5.0",
        files={"dist/purify.min.js": "purify.min.js"},
        licence="LICENSE",
    ),
    Package(
        name="@highlightjs/cdn-assets",
        version="11.12.0",
        files={
            "es/core.min.js": "highlight.core.js",
            **{f"es/languages/{name}.min.js": f"highlight.{name}.js" for name in _LANGUAGES},
        },
        licence="LICENSE",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare the hashes; no network")
    parser.add_argument(
        "--new", action="store_true", help="write the table of hashes anew, after new versions"
    )
    args = parser.parse_args()
    if not args.check:
        found = {}
        for package in PACKAGES:
            found |= _fetch(package)
        if args.new:
            hashes = {name: sha256(found[name]) for name in sorted(found)}
            write_text(HASHES, json.dumps(hashes, indent=1) + "\n")
        for name, wrong in problems(found).items():
            sys.exit(f"error: {name} {wrong}; nothing was written")
        for name, content in found.items():
            with whole_file(VENDOR / name) as temporary:
                temporary.write_bytes(content)
    if wrong := problems({path.name: path.read_bytes() for path in vendored()}):
        sys.exit("\n".join(f"error: {name} {text}" for name, text in wrong.items()))
    common.show(f"{len(vendored())} files in {VENDOR} have the hashes of {HASHES.name}")


def vendored() -> list[Path]:
    """The files of the folder that come from npm."""
    return sorted(path for path in VENDOR.iterdir() if path != HASHES)


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
            licence = title.encode() + content(package.licence)
    return found | {f"LICENSE.{package.name.split('/')[0].strip('@')}.txt": licence}


if __name__ == "__main__":
    main()

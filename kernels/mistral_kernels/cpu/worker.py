"""The process that compiles: `python -m mistral_kernels.cpu.worker FOLDER`.

It reads names of kernels from its input, a line each, writes a file for each into the folder, and
answers with a line: `done`, or the error.
"""

import hashlib
import sys
import tempfile
from pathlib import Path


def write_kernel(name: str, folder: Path) -> None:
    """Compile a kernel into a file: a hash, the number of its arguments, its object code."""
    from mistral_kernels.cpu.catalog import kernel
    from mistral_kernels.cpu.compiler import object_code

    code, arguments = object_code(kernel(name))
    body = bytes([arguments]) + code
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as stream:
        stream.write(hashlib.sha256(body).digest() + body)
    # At once: other processes see all of it or nothing.
    try:
        Path(stream.name).replace(folder / name)
    except PermissionError:  # Windows, while another process reads the one that it has written
        Path(stream.name).unlink()
        if not (folder / name).exists():
            raise


def main() -> None:
    """Compile what is asked for until the input ends."""
    folder = Path(sys.argv[1])
    for line in sys.stdin:
        try:
            write_kernel(line.strip(), folder)
            answer = "done"
        except Exception as error:  # also from numba's import: it may not fit NumPy or Python
            answer = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(answer, flush=True)


if __name__ == "__main__":
    main()

"""Compiled kernels, by name: from a cache on disk, or compiled by processes of their own.

A kernel is a function of int64 that numba compiles to object code (compiler.py). This file loads
the code with LLVM's loader alone, from llvmlite, numba's lower half. Numba itself takes 130 MB and
more than a second to start, so only the processes that compile import it (worker.py), several at
the same time.

The cache is in NUMBA_CACHE_DIR if that is set, else in the user's cache. Each version of this
package, of numba, of llvmlite and each processor has a folder of its own there, named after a hash.
If no folder can be written, everything is compiled at every start (`cache_problem` says so).
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from llvmlite import binding as llvm

_MOST_WORKERS = 4  # 250 MB each
# That change the code
_SETTINGS = (
    *("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"),
    *("NUMBA_OPT", "NUMBA_LOOP_VECTORIZE", "NUMBA_SLP_VECTORIZE"),
)
_SLOWEST = ("step", "product")  # begun first: what is left at the end is short

Progress = Callable[[int, int, str], object]


def silent(done: int, total: int, name: str) -> None:
    """No progress is shown."""


def prepare(names: Sequence[str], progress: Progress = silent) -> None:
    """Load kernels, and compile those that are in no cache.

    progress  called before the first of n kernels is compiled, with (0, n, ""), and when one is
              done, with the number that are done, n, and its name

    Raises RuntimeError if one cannot be compiled.
    """
    missing = [name for name in dict.fromkeys(names) if not _is_loaded(name, _folder())]
    if not missing:
        return
    missing.sort(key=lambda name: not name.startswith(_SLOWEST))
    with contextlib.ExitStack() as stack:
        folder = _folder() or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress(0, len(missing), "")
        for done, name in enumerate(_compile(missing, folder), 1):
            if not _is_loaded(name, folder):
                raise RuntimeError(f"the compiled {name!r} cannot be read back from {folder}")
            progress(done, len(missing), name)


def function(name: str) -> Callable[..., int]:
    """A kernel for Python: it takes int64, and releases the GIL."""
    return _kernel(name).function


def address(name: str) -> int:
    """A kernel for compiled code to call."""
    return _kernel(name).address


def _kernel(name: str) -> "_Kernel":
    if name not in _loaded:
        prepare([name])
    return _loaded[name]


def cache_problem() -> str | None:
    """Why compiled code is not kept between starts; None if it is."""
    return None if _folder() else "no cache folder can be written: set NUMBA_CACHE_DIR to one"


@functools.cache
def _folder() -> Path | None:
    """Where compiled code is kept; None if no folder can be written."""
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(root).expanduser() / "mistral_kernels" / _version()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None


def _version() -> str:
    """A hash of all that compiled code depends on."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    known = [metadata.version(package) for package in ("numba", "llvmlite")]
    known += [llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    known += [os.environ.get(name, "") for name in _SETTINGS]
    digest.update(repr(known).encode())
    return digest.hexdigest()[:16]


# ---- Loading ----


class _Kernel:
    """Object code in memory that may be executed, for as long as this object lives."""

    def __init__(self, code: bytes, arguments: int):
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        # An engine for each kernel: all have the same symbol.
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.address = self._engine.get_function_address("kernel")
        signature = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)
        self.function: Callable[..., int] = signature(self.address)


_loaded: dict[str, _Kernel] = {}


def _is_loaded(name: str, folder: Path | None) -> bool:
    """Load a kernel from its file, unless it is; False if there is none, or if it is damaged."""
    if name in _loaded or folder is None:
        return name in _loaded
    try:
        data = (folder / name).read_bytes()
    except OSError:
        return False
    body = data[32:]
    if hashlib.sha256(body).digest() != data[:32]:
        (folder / name).unlink(missing_ok=True)
        return False
    _initialize()
    _loaded[name] = _Kernel(code=body[1:], arguments=body[0])
    return True


@functools.cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


# ---- Compiling ----


def _compile(names: Sequence[str], folder: Path) -> Iterator[str]:
    """Let several processes write kernels into a folder; yields each name when it is done."""
    left: queue.SimpleQueue[str] = queue.SimpleQueue()  # each is taken once
    for name in names:
        left.put(name)
    answers: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def drive(worker: _Worker) -> None:
        while not left.empty():
            try:
                name = left.get_nowait()
            except queue.Empty:  # another thread has taken the last one
                return
            another_was_faster = (folder / name).exists()  # another process
            answers.put((name, "done" if another_was_faster else worker.compile(name)))

    with contextlib.ExitStack() as stack:
        for _ in range(min(_MOST_WORKERS, os.cpu_count() or 1, len(names))):
            worker = _Worker(folder)
            # A daemon: a process that ends does not wait for kernels that another thread wants.
            driver = threading.Thread(
                target=drive, args=(worker,), name="mistral-compile", daemon=True
            )
            driver.start()
            stack.callback(driver.join)
            stack.callback(worker.end)  # before the thread is waited for
        for _ in names:
            name, answer = answers.get()
            if answer != "done":
                raise RuntimeError(f"{name!r} cannot be compiled: {answer}")
            yield name


class _Worker:
    """A process that compiles (worker.py), with the modules that this process finds."""

    def __init__(self, folder: Path):
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mistral_kernels.cpu.worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
        )

    def compile(self, name: str) -> str:
        """Compile one kernel: "done", or why it did not."""
        answer = ""
        with contextlib.suppress(OSError, ValueError):  # it ended, or `end` was called
            self._process.stdin.write(f"{name}\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        return answer or self._last_words()

    def _last_words(self) -> str:
        """What the process said last: LLVM ends it for what it cannot compile."""
        lines = []
        with contextlib.suppress(ValueError):  # `end` was called
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines()
        return " ".join(["the compiler ended", *lines[-1:]])

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):  # what could not be written
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()

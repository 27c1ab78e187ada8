"""Numba's compiler, with a cache on disk that follows the sources of this package.

Numba's own cache notices a change of the file that a function is in, and not of the files whose
functions it calls. So each version of the package has a folder of its own in the cache, named
after a hash of all its files. Numba adds the processor and its own version to the key.

A process may load functions that several earlier ones have compiled. Numba names the symbols of
compiled code after functions and a number that each process counts from 1, so two functions of the
same name could get the same symbol, and one would be called in place of the other. Therefore a
cached function is named after its key, and a part after the process that compiles it.

The folder is in NUMBA_CACHE_DIR if that is set, else in the user's cache. If it cannot be written,
everything is compiled at every start (`cache_problem` says so).
"""

import functools
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

# A product and a sum may be one instruction; the order of sums is the order of the source.
_FAST = {"contract"}


@functools.cache
def _folder() -> Path | None:
    """Where compiled code is kept; None if no folder can be written."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    root = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(root).expanduser() / "mistral_kernels" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None


def cache_problem() -> str | None:
    """Why compiled code is not kept between starts; None if it is."""
    return None if _folder() else "no cache folder can be written: set NUMBA_CACHE_DIR to one"


def is_cached() -> bool:
    """Whether an earlier start has compiled something for this version of the package."""
    folder = _folder()
    return folder is not None and any(folder.rglob("*.nbi"))  # numba's indices


class _ByName(FunctionCache):
    """Numba's cache with a key that is the same at every start.

    Numba's own key holds what a function refers to, and that differs each time for functions which
    refer to compiled ones. Here the folder stands for all sources, so a name is enough.
    """

    def __init__(self, function: Callable, name: str):
        super().__init__(function)
        self._by_name = name

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        return self._by_name, sig, codegen.magic_tuple()


def _with_cache(made: Any, function: Callable, name: str) -> Any:
    """Give a dispatcher or a C function of numba its cache on disk, if there is a folder."""
    folder = _folder()
    if folder is not None:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder)  # read when the cache is created
        try:
            made._cache = _ByName(function, name)
        finally:
            numba.config.CACHE_DIR = before
    return made


def compiled(name: str) -> Callable:
    """Decorates a function of numbers and arrays: compiled at its first call, runs without the GIL.

    name  under which it is cached: two functions with the same name are the same
    """

    def decorate(function: Callable) -> Callable:
        function.__qualname__ = _symbol(name)
        return _with_cache(numba.njit(nogil=True, fastmath=_FAST)(function), function, name)

    return decorate


def address_of(function: Callable, signature: Any, name: str) -> int:
    """Compile a function of numbers now, for other compiled code to call it by its address."""
    function.__qualname__ = _symbol(name)
    made = CFunc(function, (signature.args, signature.return_type), {}, dict(fastmath=_FAST))
    _with_cache(made, function, name).compile()
    _kept.append(made)  # the code lives as long as this object
    return made.address


_kept: list[CFunc] = []

_PROCESS = secrets.token_hex(8)


def part(function: Callable) -> Callable:
    """Decorates a function that only compiled code calls: it becomes part of its callers."""
    function.__qualname__ += f"_{_PROCESS}"
    return numba.njit(nogil=True, fastmath=_FAST)(function)


def _symbol(name: str) -> str:
    return re.sub(r"\W", "_", name)

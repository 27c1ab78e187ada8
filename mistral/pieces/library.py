"""Calls of the library `tokenizers`, whose errors are of any class."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mistral.errors import CheckpointError, one_line

_stderr = threading.Lock()  # held while it leads nowhere


def guarded(action: Callable[[], Any]) -> Any:
    """What `action` returns; CheckpointError for everything that the library raises."""
    try:
        return action()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is not an Exception
        reason = one_line(str(error), 200)
        raise CheckpointError(f"the library tokenizers cannot use it: {reason}") from error


@contextmanager
def without_messages() -> Iterator[None]:
    """Within it, the lines that the library writes to stderr when it panics are lost.

    The error says the same in one line. What other threads write to stderr is lost, too: this is
    for short calls.
    """
    with _stderr:
        try:
            kept = os.dup(2)
        except OSError:  # stderr is closed
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(nowhere)
            os.close(kept)

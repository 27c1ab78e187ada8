"""Calls of the library `tokenizers`, whose errors are of any class."""

from collections.abc import Callable
from typing import Any

from mistral.errors import CheckpointError, one_line


def guarded(action: Callable[[], Any]) -> Any:
    """What `action` returns; CheckpointError for everything that the library raises."""
    try:
        return action()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is not an Exception
        reason = one_line(str(error), 200)
        raise CheckpointError(f"the library tokenizers cannot use it: {reason}") from error

"""Token ids as callers have them: lists, tensors, arrays, padded batches."""

import operator
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mistral.errors import shown

_STOP = "stop_tokens"


def token_ids(given: Iterable[int] | Any, what: str = "the prompt") -> list[int]:
    """Ids of any integer type and of shape [T] or [1, T], as a list.

    Takes lists, tuples, ranges, tensors on any device and numpy arrays. Raises ValueError,
    which begins with `what`, for everything else.
    """
    if isinstance(given, (set, frozenset)) and what != _STOP:
        raise ValueError(f"{what} is a set, which has no order; pass a list")
    if isinstance(given, (str, bytes)):
        raise ValueError(f"{what} is text, and ids are needed: tokenizer.encode returns them")
    if isinstance(given, Tensor):
        given = given.tolist()  # one read back, not one per id
    try:
        values = list(given)
        if len(values) == 1 and not _is_number(values[0]):
            values = list(values[0])  # [1, T]
        return [_id(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"{what} must be whole numbers, [T] or [1, T], not {shown(given)}"
        ) from None


def stop_ids(given: int | Iterable[int] | None, default: Iterable[int]) -> frozenset[int]:
    """Stop tokens, of any integer type; None: the default's. ValueError for everything else."""
    if given is None:
        given = default
    return frozenset(whole_numbers(given, _STOP))


def whole_numbers(given: Any, what: str, repeated: int = 1) -> list[int]:
    """`token_ids` that takes a single number, too; it is repeated."""
    return token_ids([given] * repeated if _is_number(given) else given, what)


def unpadded(input_ids: Tensor | Any, attention_mask: Tensor | Any) -> list[list[int]]:
    """The rows of a padded batch without their pads: what `generate_batch` takes.

    input_ids       integers [B, T]
    attention_mask  [B, T]: 1 for a token, 0 for a pad; the pads may be left or right

    Raises ValueError for other shapes and values, and for a row with a pad between its tokens.
    """
    try:
        ids = torch.as_tensor(input_ids)
        mask = torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            "input_ids and attention_mask must be [B, T] both, not "
            f"{shown(input_ids)} and {shown(attention_mask)}"
        ) from None
    if ids.dim() != 2 or ids.shape != mask.shape:
        both = f"{list(ids.shape)} and {list(mask.shape)}"
        raise ValueError(f"input_ids and attention_mask must be [B, T] both, not {both}")
    rows = []
    for b, (row, marks) in enumerate(zip(ids.tolist(), mask.tolist())):
        if not set(marks) <= {0, 1}:
            raise ValueError(f"attention_mask has values other than 0 and 1 in row {b}")
        tokens = [i for i, mark in enumerate(marks) if mark]
        if tokens and tokens[-1] - tokens[0] + 1 != len(tokens):
            raise ValueError(f"attention_mask has a pad between the tokens of row {b}")
        rows.append(token_ids([row[i] for i in tokens], f"row {b}"))
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "shape", None) == ()


def _id(value: Any) -> int:
    """A whole number of any type as int; TypeError for a bool and for everything else."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def check_sizes(**sizes: Any) -> None:
    """Raises ValueError, which names it, for a size that is not a whole number or is too small.

    sizes  batch_size and max_tokens, at least 1, or None for max_tokens; slack, at least 0
    """
    for name, size in sizes.items():
        least = 0 if name == "slack" else 1
        is_whole = isinstance(size, Integral) and not isinstance(size, bool)
        if not (is_whole and size >= least) and not (name == "max_tokens" and size is None):
            raise ValueError(f"{name} must be a whole number of {least} or more, not {shown(size)}")


def check_rows(rows: Sequence[Any], batch_size: int, vocab_size: int) -> list[list[int]]:
    """The ids of each row of an engine, see `token_ids`.

    Raises ValueError for another number of rows and for ids outside the vocabulary.
    """
    if isinstance(rows, (str, bytes)) or not hasattr(rows, "__len__"):
        raise ValueError(f"a list of ids for each row is needed, not {shown(rows)}")
    if len(rows) != batch_size:
        raise ValueError(f"{len(rows)} rows for a decoder of {batch_size}")
    checked = [token_ids(row, f"row {b}") for b, row in enumerate(rows)]
    for id in set().union(*checked):
        if not 0 <= id < vocab_size:
            raise ValueError(f"token id {id} lies outside the vocabulary of {vocab_size}")
    return checked

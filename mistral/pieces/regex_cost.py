"""Whether a regular expression of a tokenizer.json takes time in proportion to the text.

The library `tokenizers` backtracks. `\\s+$` reads a run of spaces again from each space in it, and
`(a+)+$` tries every way to divide a run: a text of a few kilobytes takes minutes. The form of an
expression does not tell: `\\s*[\\r\\n]+|\\s+` of Llama 3 looks alike and is linear, because its
second part takes the whole run. So the time is measured at load, on texts that repeat one or two
characters: of each class that expressions distinguish, and those of the expression itself.
"""

import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator

from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from mistral.errors import CheckpointError, shown
from mistral.pieces.library import guarded, without_messages

# Space, line end, tab, letters of each case and of none, digit, punctuation, mark, symbol
_CHARACTERS = " \n\taA\u02b0日1.'_\u0301$"
_MOST_LITERALS = 6  # characters, and words, of the expression that are tried in addition
_SYNTAX = re.compile(r"\\[pP]\{[^}]*\}|\\[a-zA-Z]|(?<!\\)[()\[\]{}|?*+^.:]")
_MOST_LETTERS = 20_000  # of an expression
# Characters of each text. The steps are small at first: exponential time shows before it is long.
_LENGTHS = (16, 24, 40, 64, 512)
_LONG = (2048, 8192, 16384)  # of the texts that took longest
_KEPT = 8  # how many these are
# Two limits, and an expression is refused only beyond both. The first is CPU seconds, of a call of
# the library and of a character: the expressions in use take a fifth of it for the longest texts,
# the least quadratic one of the tests 4 times as much. A virtual machine that waits for its host
# counts the wait as CPU time, usually some milliseconds: of a call, that much is always allowed.
_CALL = 0.02
_SECONDS = 1e-6
# The second is for a slow machine, on which every expression exceeds the first: so many times the
# CPU seconds of an expression that matches each character alone. Those in use take less than 3
# times as long for the longest texts, the quadratic ones more than 30 times.
_TIMES = 8
_REFERENCE = "."
# A busy machine makes single calls seem slow: the quickest of so many counts, with pauses between.
_CALLS = 8
_PAUSE = 0.02  # seconds


@functools.lru_cache(64)
def require_linear(expression: str) -> None:
    """CheckpointError if a text may take far longer than its length explains."""
    if len(expression) > _MOST_LETTERS:
        raise CheckpointError(
            f"the regular expression {shown(expression)} has more than {_MOST_LETTERS} characters"
        )
    split = _split(expression)
    parts = list(_parts(expression))
    for length in _LENGTHS:
        took = [_checked(expression, split, part, length) for part in parts]
    slowest = sorted(zip(took, parts), reverse=True)[:_KEPT]
    for length in _LONG:
        for _, part in slowest:
            _checked(expression, split, part, length)


def _split(expression: str) -> Callable[[str], object]:
    """A function that splits a text by an expression. CheckpointError if the library refuses it."""
    return guarded(lambda: Split(Regex(expression), "removed").pre_tokenize_str)


def _parts(expression: str) -> Iterator[tuple[str, str]]:
    """What a text repeats, and how it ends."""
    literals = _SYNTAX.sub(" ", expression)
    words = re.findall(r"[^\W\d_]{2,}|\d{2,}", literals)[:_MOST_LITERALS]
    others = [one for one in dict.fromkeys(literals) if one not in _CHARACTERS]
    characters = [*_CHARACTERS, *others[:_MOST_LITERALS]]
    # The library first looks for text that each match has: without it nothing is tried.
    everything = "".join((*characters, *words))
    for first, second in itertools.permutations(characters, 2):
        yield first, second + everything
    for first, second in itertools.combinations(characters, 2):
        yield first + second, "\n" + everything
    for word in words:
        yield word, "\n" + everything


def _checked(
    expression: str, split: Callable[[str], object], part: tuple[str, str], length: int
) -> float:
    """The CPU seconds of one text. CheckpointError if they exceed both limits."""
    repeated, end = part
    text = repeated * (length // len(repeated)) + end
    allowed = _CALL + _SECONDS * len(text)
    try:
        took = _least_seconds(split, text, allowed)
    except CheckpointError as error:  # the library gives up after too many attempts
        reason = f"may take hours for a long text: {error}"
        raise CheckpointError(f"the regular expression {shown(expression)} {reason}") from None
    if took <= allowed or took <= _TIMES * _least_seconds(_split(_REFERENCE), text, 0.0):
        return took
    raise CheckpointError(
        f"the regular expression {shown(expression)} may take hours for a long text: "
        f"{len(text):,} characters took {took:.1g} s"
    )


def _least_seconds(split: Callable[[str], object], text: str, enough: float) -> float:
    """The CPU seconds of the quickest of `_CALLS` calls, or of the first within `enough`."""
    least = float("inf")
    for _ in range(_CALLS):
        with without_messages():  # the library panics after too many attempts
            start = time.thread_time()
            guarded(lambda: split(text))
            took = time.thread_time() - start
        least = min(least, took)
        if least <= enough:
            break
        time.sleep(_PAUSE)
    return least

"""Constrained decoding: each step's mask allows the tokens after which the text can become valid.

llguidance (https://github.com/guidance-ai/llguidance) follows the text byte by byte and knows every
token's bytes. This file has its vocabulary and the constraint for `mistral.generate`; the grammars
are in constraints.py. Needs the extra `chat`.
"""

import re
import time
import weakref
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from mistral.engine.base import Constraint
from mistral.errors import MistralError, one_line
from mistral.tokenizer import Tokenizer

_KEPT = 32  # compiled grammars of one vocabulary
_BITS = torch.tensor([1 << i for i in range(31)] + [-(1 << 31)], dtype=torch.int32)


class GrammarError(MistralError, ValueError):
    """A grammar cannot be built, or it does not allow a token."""


class UnsupportedSchema(GrammarError):
    """A schema that no grammar can express, because of `keyword`: validate answers instead."""

    def __init__(self, keyword: str, reason: str):
        super().__init__(f"the grammar cannot express {keyword!r}: {reason}")
        self.keyword = keyword
        self.reason = reason


class GrammarConstraint(Constraint):
    """Keeps a text within a grammar: a `Constraint` for `mistral.generate`.

    Control tokens and ids without a token are never allowed, a stop token only when the text may
    end. All methods raise GrammarError. A constraint is for one text: `copy` a fresh one for the
    next.

    mask_count    how many masks were computed
    mask_seconds  how long that took, all together
    """

    def __init__(self, matcher: Any, vocabulary: "_Vocabulary", tokenizer: Tokenizer):
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer  # the vocabulary does not keep it alive
        self._accepted = 0
        self._ended = False  # llguidance is not told of the stop token
        self.mask_count = 0
        self.mask_seconds = 0.0

    def mask(self) -> Tensor:
        """bool [V] on the CPU: True for every id that may come next."""
        if self._ended:
            raise GrammarError("the text has ended")
        start = time.perf_counter()
        vocabulary = self._vocabulary
        words = torch.empty_like(vocabulary.usable_words)  # one bit per id
        self._matcher.unsafe_compute_mask_ptr(
            words.data_ptr(), words.numel() * words.element_size()
        )
        self._check()
        words &= vocabulary.usable_words
        if not words.any():
            raise GrammarError(
                "no token can come next: the vocabulary cannot spell what the grammar asks for"
            )
        mask = ((words[:, None] & _BITS) != 0).flatten()[: vocabulary.size]
        self.mask_count += 1
        self.mask_seconds += time.perf_counter() - start
        return mask

    def accept(self, id: int) -> None:
        """Continue after this id. An error changes nothing."""
        stops = id in self._vocabulary.stop and self.accepting
        is_text = id in self._vocabulary.text
        if self._ended or not (stops or (is_text and self._matcher.try_consume_tokens([id]))):
            self._check()
            raise GrammarError(f"token {id} is not allowed here")
        self._ended = stops
        self._accepted += 1

    def forced(self) -> list[int]:
        """The ids that must come next if the text is cut as the tokenizer cuts it; often none.

        The caller may append them without asking the model, and must `accept` them like others.
        """
        ids = [] if self.is_finished else self._matcher.compute_ff_tokens()
        self._check()
        return list(takewhile(self._vocabulary.text.__contains__, ids))

    def rollback(self, n: int) -> None:
        """Roll back the last n ids."""
        if not 0 <= n <= self._accepted:
            raise GrammarError(f"cannot roll back {n} of {self._accepted} tokens")
        self._matcher.rollback(n - 1 if n and self._ended else n)
        self._check()
        self._accepted -= n
        self._ended = self._ended and n == 0

    def copy(self) -> "GrammarConstraint":
        """An independent constraint in the same state, with no masks counted."""
        other = GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, self._tokenizer)
        other._accepted = self._accepted
        other._ended = self._ended
        return other

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether the text must end here, or has ended."""
        return self._ended or self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(one_line(self._matcher.get_error()))


def grammar_constraint(
    grammar: str, tokenizer: Tokenizer, vocab_size: int, stop_tokens: Sequence[int] | None
) -> GrammarConstraint:
    """A constraint to a grammar in llguidance's language.

    vocab_size   the model's, which may be larger than the tokenizer's
    stop_tokens  None: the tokenizer's

    A grammar is compiled once: the last ones are kept with the tokenizer. Raises UnsupportedSchema
    for a grammar that is too large, GrammarError if the extra `chat` is not installed.
    """
    llguidance = _llguidance()
    stop = tokenizer.stop_ids if stop_tokens is None else tuple(stop_tokens)
    vocabulary = _vocabulary(llguidance, tokenizer, vocab_size, stop)
    matchers = vocabulary.matchers
    if grammar not in matchers:
        matcher = llguidance.LLMatcher(
            vocabulary.for_matchers, grammar, log_level=0, limits=_limits(llguidance)
        )
        matcher.compute_bitmask()  # a too large grammar fails here, not in the midst of a text
        if matcher.is_error():
            raise UnsupportedSchema("schema", _cause(matcher.get_error()))
        matchers[grammar] = matcher
        while len(matchers) > _KEPT:
            del matchers[next(iter(matchers))]
    return GrammarConstraint(matchers[grammar].deep_copy(), vocabulary, tokenizer)


def why_refused(grammar: str) -> str | None:
    """Why llguidance refuses a grammar, in one line; None if it does not."""
    llguidance = _llguidance()
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
        grammar, limits=_limits(llguidance)
    )
    return _cause(messages[0]) if failed else None


def _limits(llguidance: Any) -> Any:
    return llguidance.LLParserLimits(verbose_errors=False, max_items_in_row=20_000)


def _cause(error: str) -> str:
    error = error.rpartition("failed to compile JSON schema: ")[2]
    return one_line(re.split(r"\n *\d+ \| ", error)[0])  # without the whole grammar after it


class _Vocabulary:
    """A tokenizer for llguidance; it does not keep ours alive, so that the cache can drop both."""

    def __init__(
        self, llguidance: Any, tokenizer: Tokenizer, vocab_size: int, stop: tuple[int, ...]
    ):
        pieces = [None if id in stop else tokenizer.token_bytes(id) for id in range(vocab_size)]
        # The byte ff occurs in no text: it marks control tokens and ids without a token.
        self.tokens = [
            b"\xff<%d>" % id if piece is None else piece for id, piece in enumerate(pieces)
        ]
        self.special_token_ids = [id for id, piece in enumerate(pieces) if piece is None]
        self.matchers: dict[str, Any] = {}  # by grammar, as they are before the first token
        self.eos_token_id = stop[0]
        self.bos_token_id = tokenizer.bos_id
        self._tokenizer = weakref.ref(tokenizer)
        self.stop = frozenset(stop)
        self.size = vocab_size
        self.text = frozenset(id for id, piece in enumerate(pieces) if piece is not None)
        usable = torch.tensor([piece is not None or id in stop for id, piece in enumerate(pieces)])
        padded = torch.zeros(-(-vocab_size // 32), 32, dtype=torch.bool)
        padded.view(-1)[:vocab_size] = usable
        self.usable_words = (padded * _BITS).sum(dim=1, dtype=torch.int32)
        wrapper = llguidance.TokenizerWrapper(self)
        self.for_matchers = llguidance.LLTokenizer(
            wrapper, n_vocab=vocab_size, eos_token=list(stop)
        )

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer().encode(text, bos=False, prefix_space=False)


# Building one takes a tenth of a second
_VOCABULARIES: weakref.WeakKeyDictionary[Tokenizer, dict[tuple, _Vocabulary]] = (
    weakref.WeakKeyDictionary()
)


def _vocabulary(
    llguidance: Any, tokenizer: Tokenizer, vocab_size: int, stop: tuple[int, ...]
) -> _Vocabulary:
    if vocab_size < tokenizer.vocab_size:
        raise GrammarError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {vocab_size}"
        )
    if not stop or not all(0 <= id < vocab_size for id in stop):
        raise GrammarError(f"a grammar needs a stop token to end a text, and {list(stop)} has none")
    known = _VOCABULARIES.setdefault(tokenizer, {})
    if (vocab_size, stop) not in known:
        known[vocab_size, stop] = _Vocabulary(llguidance, tokenizer, vocab_size, stop)
    return known[vocab_size, stop]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise GrammarError(
            'a grammar needs llguidance; install the extra: pip install -e ".[chat]"'
        ) from None
    return llguidance

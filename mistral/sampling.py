"""Logits to the next id, by the rules of Hugging Face's `generate`, in its order, ties included.

bias:      a number added to the logits of some ids
penalties: repetition (CTRL, section 4.1, https://arxiv.org/abs/1909.05858); frequency and presence
           (https://platform.openai.com/docs/api-reference/chat), which Hugging Face does not have;
           n-grams
mask:      the ids that a grammar allows
warpers:   temperature, top-k, top-p (https://arxiv.org/abs/1904.09751), min-p
           (https://arxiv.org/abs/2407.01082), typical-p (https://arxiv.org/abs/2202.00666). Each
           takes a new softmax of the scores that the previous one kept.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mistral.errors import shown

NEVER = -math.inf

# A step returns these for a row instead of an id.
NO_NUMBERS = -1  # the chosen score is not finite: the logits are NaN or infinite
NOTHING_LEFT = -2  # every score is -inf: mask, penalties and logits leave no id
IDLE = -3  # the row is idle


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. The defaults leave the model's distribution as it is.

    temperature           divides the logits; 0 is greedy: the highest score after penalties and
                          mask (the first of equals), no warper
    top_k                 keep the k highest scores, and those equal to the k-th; 0: all
    top_p                 keep the most probable tokens that together reach p; 1: all
    min_p                 keep tokens at least min_p times as probable as the most probable; 0: all
    typical_p             keep the tokens whose surprise is nearest to the entropy, until p is
                          reached; 1: all
    repetition_penalty    divides the scores of ids that occurred (prompt included) if they are
                          positive, and multiplies them if they are negative; 1: none
    frequency_penalty     subtracted from the score of an id as often as the answer has it; 0: none
    presence_penalty      subtracted once from the score of every id that the answer has; 0: none
    no_repeat_ngram_size  never complete an n-gram that occurred before (prompt included); 0: off
    logit_bias            added to the logits of these ids, before the penalties; -inf excludes an
                          id. A mapping from id to number, stored as a sorted tuple of pairs
    seed                  of the random numbers, see `RandomNumbers` (engine/draws.py); None:
                          PyTorch's global generator

    The answer is what follows the prompt (`Engine.answer_starts`): of the repetition penalty's ids
    the prompt is a part, of those of the frequency and presence penalties it is not, as in vLLM.

    Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Any = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        counted = ("frequency_penalty", "presence_penalty")
        numbers = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")
        for name in (*numbers, *counted):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            _require(is_number, name, "a number", value)
        # A division by a smaller number would overflow; a larger one is no float.
        sane = self.temperature == 0 or 1e-5 <= self.temperature <= sys.float_info.max
        _require(sane, "temperature", "0 (greedy) or 0.00001 or more", self.temperature)
        _require(0 <= self.top_p <= 1, "top_p", "between 0 and 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        _require(0 < self.typical_p <= 1, "typical_p", "above 0 and at most 1", self.typical_p)
        sane = 1e-5 <= self.repetition_penalty <= 1e5
        _require(sane, "repetition_penalty", "between 0.00001 and 100000", self.repetition_penalty)
        for name in counted:
            value = getattr(self, name)
            _require(-100 <= value <= 100, name, "between -100 and 100", value)
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        for name in ("top_k", "no_repeat_ngram_size"):
            value = getattr(self, name)
            _require(_is_whole(value) and value >= 0, name, "a whole number of 0 or more", value)
        valid_seed = self.seed is None or (_is_whole(self.seed) and 0 <= self.seed < 2**64)
        _require(valid_seed, "seed", "a whole number from 0 to 2**64 - 1", self.seed)

    @property
    def counts_answer(self) -> bool:
        """Whether a score depends on how often its id is in the answer."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def reads_history(self) -> bool:
        """Whether a score depends on earlier ids."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0 or self.counts_answer

    def check_ids(self, V: int) -> None:
        """Raises ValueError for a biased id outside a vocabulary of V."""
        if self.logit_bias and self.logit_bias[-1][0] >= V:
            raise ValueError(
                f"logit_bias: token id {self.logit_bias[-1][0]} lies outside the vocabulary of {V}"
            )


def next_ids(
    logits: Tensor,
    sampling: Sampling,
    history: Tensor,
    lengths: Sequence[int],
    mask: Tensor | None,
    generator: torch.Generator | None,
    starts: Sequence[int] = (),
) -> Tensor:
    """One id a row, NO_NUMBERS or NOTHING_LEFT: int64 [B] on the logits' device.

    logits     [B, V], any float dtype
    history    int64 [B, n]: each row's ids so far, from the left; -1 after them
    lengths    how many ids each row has
    mask       bool [B, V] or [V]: True for an id that is allowed
    generator  of the logits' device; None: the global one
    starts     where the answer of each row starts; empty: all of its ids count

    Never synchronizes: whether there was a choice is part of the result.
    """
    scores = processed_scores(logits, sampling, history, lengths, mask, starts)
    if sampling.temperature == 0:
        best, ids = scores.max(dim=-1)
        return _checked(ids, best.isfinite(), best)
    # argmax(p / e) with e ~ Exp(1) is a draw from p. torch.multinomial does the same with the same
    # random numbers, but its checks would synchronize.
    exponential = torch.empty_like(scores).exponential_(1, generator=generator)
    p = scores.softmax(dim=-1)  # NaN in the whole row if a score is NaN or +inf, or all are -inf
    ids = (p / exponential).argmax(dim=-1)
    return _checked(ids, p[:, 0].isfinite(), scores.amax(dim=-1))


def _checked(ids: Tensor, are_chosen: Tensor, best: Tensor) -> Tensor:
    """ids [B], with the reason for the rows in which nothing was chosen; `best`: highest scores."""
    reason = torch.where(best == NEVER, NOTHING_LEFT, NO_NUMBERS)
    return torch.where(are_chosen, ids, reason)


def processed_scores(
    logits: Tensor,
    sampling: Sampling,
    history: Tensor,
    lengths: Sequence[int],
    mask: Tensor | None = None,
    starts: Sequence[int] = (),
) -> Tensor:
    """Scores after bias, penalties, mask and warpers: float32 [B, V], -inf for an excluded id.

    Shapes as in `next_ids`. At temperature 0 no warper runs. Raises ValueError for a bias on an id
    outside the vocabulary.
    """
    scores = _penalized(logits.float(), sampling, history, lengths, starts)
    if mask is not None:
        scores = scores.masked_fill(~mask.to(scores.device, non_blocking=True), NEVER)
    if sampling.temperature == 0:
        return scores
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if sampling.top_k:
        scores = keep_top_k(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = keep_top_p(scores, sampling.top_p)
    if sampling.min_p > 0:
        scores = keep_min_p(scores, sampling.min_p)
    if sampling.typical_p < 1:
        scores = keep_typical(scores, sampling.typical_p)
    return scores


def _penalized(
    scores: Tensor,
    sampling: Sampling,
    history: Tensor,
    lengths: Sequence[int],
    starts: Sequence[int],
) -> Tensor:
    """The scores after bias and penalties: [B, V] -> [B, V]."""
    if sampling.logit_bias:
        sampling.check_ids(scores.shape[-1])
        scores = add_bias(scores, sampling.logit_bias)
    if sampling.repetition_penalty != 1:
        scores = penalize_repetition(scores, history, sampling.repetition_penalty)
    if sampling.counts_answer:
        occurrences = _occurrences(scores, history, starts)
        scores = scores - sampling.frequency_penalty * occurrences
        scores = scores - sampling.presence_penalty * (occurrences > 0)
    if sampling.no_repeat_ngram_size:
        scores = ban_repeated_ngrams(scores, history, lengths, sampling.no_repeat_ngram_size)
    return scores


def add_bias(scores: Tensor, pairs: Sequence[tuple[int, float]]) -> Tensor:
    """Add a number to the scores of some ids: [B, V] -> [B, V]."""
    ids, values = zip(*pairs)
    index = torch.tensor(ids).to(scores.device, non_blocking=True)
    bias = torch.tensor(values, dtype=torch.float32).to(scores.device, non_blocking=True)
    return scores.index_add(1, index, bias.expand(len(scores), -1))


def penalize_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Lower the score of every id that occurred, once however often it did.

    scores [B, V], history [B, n] -> [B, V]
    """
    seen = _marked(scores, history)
    penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, penalized, scores)


def ban_repeated_ngrams(scores: Tensor, history: Tensor, lengths: Sequence[int], n: int) -> Tensor:
    """Forbid every id that would complete an n-gram that the row already has.

    Shapes as in `next_ids`.
    """
    if history.shape[1] < n:
        return scores
    ends = torch.as_tensor(lengths).to(history.device, non_blocking=True)[:, None]  # [B, 1]
    grams = history.unfold(1, n, 1)  # [B, grams, n]
    last = ends - (n - 1) + torch.arange(n - 1, device=history.device)  # [B, n - 1]: positions
    tail = history.gather(1, last.clamp(min=0))  # [B, n - 1]: the row's last ids
    repeats = (grams[:, :, :-1] == tail[:, None]).all(dim=-1) & (ends >= n - 1)  # [B, grams]
    banned = grams[:, :, -1].masked_fill(~repeats, -1)
    return scores.masked_fill(_marked(scores, banned), NEVER)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k highest scores, and those equal to the k-th."""
    kth = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < kth, NEVER)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keep the fewest most probable tokens that together reach p; at least one."""
    ascending, order = scores.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop[:, -1] = False
    return scores.masked_fill(drop.scatter(1, order, drop), NEVER)


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Keep the tokens that are at least min_p times as probable as the most probable."""
    p = scores.softmax(dim=-1)
    return scores.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), NEVER)


def keep_typical(scores: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise -log p is nearest to the entropy, until `mass` is reached.

    Tokens as near as the last one that is kept are kept too.
    """
    log_p = scores.log_softmax(dim=-1)
    entropy = -(log_p * log_p.exp()).nansum(dim=-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort(dim=-1)
    reached = scores.gather(1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    drop = distance > distance.gather(1, last)
    drop[:, 0] = False
    return scores.masked_fill(drop.scatter(1, order, drop), NEVER)


def _marked(scores: Tensor, ids: Tensor) -> Tensor:
    """True at each row's ids: ids [B, n], -1 for none -> bool [B, V]."""
    B, V = scores.shape
    marked = torch.zeros(B, V + 1, dtype=torch.bool, device=scores.device)
    return marked.scatter_(1, torch.where(ids < 0, V, ids), True)[:, :V]


def _occurrences(scores: Tensor, history: Tensor, starts: Sequence[int]) -> Tensor:
    """How often each id is in the answer of each row: float32 [B, V]."""
    B, V = scores.shape
    counted = history >= 0  # [B, n]
    if starts:
        first = torch.tensor(starts).to(history.device, non_blocking=True)[:, None]  # [B, 1]
        counted = counted & (torch.arange(history.shape[1], device=history.device) >= first)
    ids = torch.where(counted, history, V)
    counts = torch.zeros(B, V + 1, device=scores.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))[:, :V]


def _bias_pairs(given: object) -> tuple[tuple[int, float], ...]:
    """A logit bias as sorted pairs. Raises ValueError for what is not one."""
    pairs = given.items() if isinstance(given, Mapping) else given or ()
    must = "a mapping from token ids to numbers"
    try:
        pairs = [(id, float(value)) for id, value in pairs]
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias must be {must}, not {shown(given)}") from None
    sane = all(_is_whole(id) and id >= 0 and value < math.inf for id, value in pairs)
    _require(sane and len(dict(pairs)) == len(pairs), "logit_bias", must, given)
    return tuple(sorted(pairs))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, name: str, must: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {must}, not {shown(value)}")

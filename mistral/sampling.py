"""Logits to the next id, by the rules of Hugging Face's `generate`, in its order and with its
treatment of ties.

penalties: repetition (CTRL, section 4.1, https://arxiv.org/abs/1909.05858), n-grams
mask:      what a grammar allows
warpers:   temperature, top-k, top-p (https://arxiv.org/abs/1904.09751), min-p
           (https://arxiv.org/abs/2407.01082), typical-p (https://arxiv.org/abs/2202.00666). Each
           takes a new softmax of what the one before it left.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = -math.inf


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. The defaults leave the model's distribution as it is.

    temperature           divides the logits; 0 is greedy: the highest score after penalties and
                          mask (the first of several), no warper
    top_k                 keep the k highest scores, and what ties with the k-th; 0: all
    top_p                 keep the most probable tokens that together reach p; 1: all
    min_p                 keep what is at least min_p times as probable as the most probable; 0: all
    typical_p             keep the tokens whose surprise is nearest to the entropy, until p is
                          reached; 1: all
    repetition_penalty    scores of ids that occurred (prompt included) are divided by it where
                          positive, multiplied where negative; 1: none
    no_repeat_ngram_size  never complete an n-gram that occurred before (prompt included); 0: off
    seed                  start of the random numbers; None: PyTorch's global generator. The rows of
                          a batch share one generator, as in Hugging Face's `generate`, so a row's
                          text depends on how many rows there are. A decoder that is used again goes
                          on with its random numbers and does not start anew.

    Raises ValueError for values that make no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        # Scores that are divided by next to nothing overflow.
        sane = self.temperature == 0 or 1e-5 <= self.temperature < math.inf
        _require(sane, "temperature", "0 (greedy) or 0.00001 or more", self.temperature)
        _require(0 <= self.top_p <= 1, "top_p", "between 0 and 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "between 0 and 1", self.min_p)
        _require(0 < self.typical_p <= 1, "typical_p", "above 0 and at most 1", self.typical_p)
        sane = 1e-5 <= self.repetition_penalty <= 1e5
        _require(sane, "repetition_penalty", "between 0.00001 and 100000", self.repetition_penalty)
        for name in ("top_k", "no_repeat_ngram_size"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and value >= 0, name, "a whole number of 0 or more", value
            )
        valid_seed = self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed < 2**64)
        _require(valid_seed, "seed", "a whole number from 0 to 2**64 - 1", self.seed)


def next_ids(
    logits: Tensor,
    sampling: Sampling,
    history: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One id a row: int64 [B], on the logits' device, with no host synchronisation.

    logits     [B, V], any float dtype
    history    int64 [B, n]: each row's ids so far, from the left; -1 behind them
    lengths    int64 [B]: how many they are
    mask       bool [B, V] or [V]: True where an id is allowed
    generator  of the logits' device; None: the global one

    Where nothing is allowed, or the logits are not numbers, the result means nothing; `generate`
    looks for both.
    """
    scores = processed_scores(logits, sampling, history, lengths, mask)
    if sampling.temperature == 0:
        return scores.argmax(dim=-1)
    # argmax(p / e) with e ~ Exp(1) is a draw from p: what torch.multinomial does on the same random
    # numbers, without its checks, for which the host would wait.
    exponential = torch.empty_like(scores).exponential_(1, generator=generator)
    return (scores.softmax(dim=-1) / exponential).argmax(dim=-1)


def processed_scores(
    logits: Tensor, sampling: Sampling, history: Tensor, lengths: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Scores after penalties, mask and warpers: float32 [B, V], -inf where an id cannot be drawn.

    Shapes as in `next_ids`. With temperature 0 there are no warpers.
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1:
        scores = penalize_repetition(scores, history, sampling.repetition_penalty)
    if sampling.no_repeat_ngram_size:
        scores = ban_repeated_ngrams(scores, history, lengths, sampling.no_repeat_ngram_size)
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


def penalize_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Push down every id that occurred, once however often it did. scores [B, V], history [B, n] ->
    [B, V].
    """
    seen = _marked(scores, history)
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def ban_repeated_ngrams(scores: Tensor, history: Tensor, lengths: Tensor, n: int) -> Tensor:
    """Forbid every id that would complete an n-gram that the row already has.

    Shapes as in `next_ids`.
    """
    if history.shape[1] < n:
        return scores
    grams = history.unfold(1, n, 1)  # [B, grams, n]
    last = (
        lengths[:, None] - (n - 1) + torch.arange(n - 1, device=history.device)
    )  # [B, n - 1]: where the tail stands
    tail = history.gather(1, last.clamp(min=0))
    repeats = (grams[:, :, :-1] == tail[:, None]).all(dim=-1) & (lengths >= n - 1)[
        :, None
    ]  # [B, grams]
    banned = grams[:, :, -1].masked_fill(~repeats, -1)
    return scores.masked_fill(_marked(scores, banned), NEVER)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """The k highest; what ties with the k-th stays."""
    kth = scores.topk(min(k, scores.shape[-1])).values[:, -1:]
    return scores.masked_fill(scores < kth, NEVER)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """The fewest most probable tokens that reach probability p; at least one."""
    ascending, order = scores.sort(dim=-1)
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    drop[:, -1] = False
    return scores.masked_fill(drop.scatter(1, order, drop), NEVER)


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Everything at least min_p times as probable as the most probable."""
    probabilities = scores.softmax(dim=-1)
    return scores.masked_fill(
        probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), NEVER
    )


def keep_typical(scores: Tensor, mass: float) -> Tensor:
    """The tokens whose surprise -log p is nearest to the entropy, until `mass` is reached; ties
    stay.
    """
    log_p = scores.log_softmax(dim=-1)
    entropy = -(log_p * log_p.exp()).nansum(dim=-1, keepdim=True)
    distance, order = (-log_p - entropy).abs().sort(dim=-1)
    reached = scores.gather(1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (reached < mass).sum(dim=-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    drop = distance > distance.gather(1, last)
    drop[:, 0] = False
    return scores.masked_fill(drop.scatter(1, order, drop), NEVER)


def random_numbers(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """The generator that the seed starts;

    None, which is PyTorch's global one, where there is no seed.
    """
    return None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed)


def _marked(scores: Tensor, ids: Tensor) -> Tensor:
    """True at each row's ids (-1: none): bool [B, V]."""
    B, V = scores.shape
    marked = torch.zeros(B, V + 1, dtype=torch.bool, device=scores.device)
    return marked.scatter_(1, torch.where(ids < 0, V, ids), True)[:, :V]


def _require(holds: bool, name: str, must: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {must}, not {value!r}")

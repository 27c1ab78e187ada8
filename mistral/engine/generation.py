"""Prompt to continuation: the naive loop, and generation by an engine."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Generic, TypeVar

import torch

from mistral.engine.base import Constraint, Engine
from mistral.engine.given import only_model
from mistral.engine.ids import stop_ids, token_ids
from mistral.engine.loop import Loop, Reason, Token, batch_loop, check_choice, check_sampling
from mistral.model import Mistral
from mistral.sampling import Sampling, next_ids

Item = TypeVar("Item")


class Generated(Iterator[Item]):
    """An iterator over what is generated, as it is chosen.

    It uses its decoder until it ends or is closed. If the decoder is used otherwise before, it
    keeps what was yielded and what that use adds, and the iterator raises ValueError.

    reasons  why each row ended; None until then
    """

    def __init__(self, steps: Iterator[Item], reasons: list[Reason | None]):
        self._steps = steps
        self.reasons = reasons

    def __next__(self) -> Item:
        return next(self._steps)

    def close(self) -> None:
        """End it here; the decoder keeps what was yielded, and rolls back steps in flight."""
        self._steps.close()

    @property
    def reason(self) -> Reason | None:
        """Why the only row ended; None until then."""
        return self.reasons[0]


class Rows(list, Generic[Item]):
    """What `generate_batch` returns: a list with an entry per row, and why each row ended.

    reasons  a `Reason` per row
    """

    def __init__(self, rows: Iterable[Item], reasons: Sequence[Reason]):
        super().__init__(rows)
        self.reasons = list(reasons)


@torch.inference_mode()
def generate_naive(
    model: Mistral,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
) -> Iterator[int]:
    """Generation without a cache: every step computes the whole sequence again.

    The loop to learn from. `generate` yields the same tokens with a fraction of the work, and a
    test compares the two. Arguments and result are those of `generate`; raises ValueError for
    an empty prompt.
    """
    model = only_model(model)
    check_sampling(sampling)
    stop = stop_ids(stop_tokens, model.config.eos_token_id)
    generator = None  # PyTorch's global one
    if sampling.seed is not None:
        generator = torch.Generator(model.device).manual_seed(sampling.seed)
    ids = torch.tensor([token_ids(prompt_ids)], device=model.device)  # [1, T]
    starts = [ids.shape[1]]  # of the answer
    for _ in range(max_new_tokens):
        logits = model(ids, last_only=True)  # [1, V]
        new = next_ids(logits, sampling, ids, [ids.shape[1]], None, generator, starts)  # [1]
        check_choice(new.tolist())
        ids = torch.cat((ids, new[:, None]), dim=1)
        yield new.item()
        if new.item() in stop:
            return


def generate(
    model_or_decoder: Mistral | Engine,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    constraint: Constraint | None = None,
    logprobs: bool = False,
) -> Generated[int] | Generated[Token]:
    """Continue one prompt; yields each id as it is chosen, the stop token included.

    The iterator's `reason` says why it ended.

    model_or_decoder  a decoder continues after what it has read already, and keeps what is
                      generated. A `speculation.LookupDecoder` produces several tokens from one
                      forward pass when a sequence repeats itself.
    prompt_ids        whole numbers of any type, [T] or [1, T]
    stop_tokens       None: the checkpoint's; (): none
    constraint        a mask for every step, one host synchronization a token: a `Constraint`, or an
                      object with its `mask` and `accept`
    logprobs          yield Token(id, logprob) instead of ids

    Raises ValueError for an empty prompt and for more tokens than there is room for: with a model
    at the call, with a decoder when the room is used up. Also raises ValueError for ids outside the
    vocabulary, if constraint and penalties together allow no id, and if the best score is NaN or
    infinite (float16 overflows in some fine-tunes); the decoder then holds what was yielded.
    NotEnoughMemory if a model's cache does not fit.
    """
    check_sampling(sampling)
    constraints = None if constraint is None else [constraint]
    prompt = token_ids(prompt_ids)
    loop = batch_loop(
        model_or_decoder, [prompt], sampling, max_new_tokens, stop_tokens, constraints, logprobs
    )
    return Generated(_only_row(loop), loop.reasons)


def _only_row(loop: Loop) -> Iterator:
    """The steps of one row. Raises ValueError if the decoder is full before the text has ended."""
    with closing(loop.steps()) as steps:
        for step in steps:
            yield step[0]
    if loop.reasons[0] == "full":
        limit = loop.decoder.limit
        raise ValueError(f"{limit + 1} tokens in a row, and the limit here is {limit}")


def generate_batch(
    model_or_decoder: Mistral | Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    constraints: Sequence[Constraint] | None = None,
    logprobs: bool = False,
) -> Rows[list[int]] | Rows[list[Token]]:
    """Continue several prompts of any lengths at once; each row ends at its own stop token.

    sampling     one for all rows: one generator for the batch, as in Hugging Face's `generate`, so
                 a row's text depends on the other rows. Or one per row: each row gets the text that
                 it gets alone, up to the rounding of a larger batch, by every engine.
    constraints  one per row. Their `forced` is not asked: rows are forced at different steps, and a
                 step is one forward pass for all of them.

    Returns a list of ids per row, the stop token included, with the `reasons` for which the rows
    ended. Afterwards each row of a decoder holds its prompt and what is returned for it. A row that
    fills the decoder ends; the others continue. The other arguments and errors are those of
    `generate`. Padded batches: `mistral.unpadded` returns their rows.
    """
    loop = batch_loop(
        model_or_decoder, prompts, sampling, max_new_tokens, stop_tokens, constraints, logprobs
    )
    rows: list[list] = [[] for _ in loop.prompts]
    for step in loop.steps():
        for row, token in zip(rows, step):
            if token is not None:
                row.append(token)
    return Rows(rows, loop.reasons)

"""One run of a model, recorded: what the page about it shows."""

import copy
from collections.abc import Sequence

from mistral.config import Config
from mistral.engine.decoder import Decoder
from mistral.engine.generation import generate
from mistral.model import Mistral
from mistral.quantization.packed import Packed
from mistral.sampling import Sampling
from mistral.tracing import Recorder, Stopwatch, most_tokens

MOST_TOKENS = 512  # of prompt and continuation
_GREEDY = Sampling(temperature=0)


def longest(config: Config) -> int:
    """How many tokens a page can show."""
    return min(MOST_TOKENS, most_tokens(config))


def check_room(prompt: int, new: int, config: Config) -> None:
    """ValueError for a text that is too long to record."""
    if prompt + new > (most := longest(config)):
        raise ValueError(
            f"the text has {prompt} tokens, and with {new} new ones that makes {prompt + new}; a "
            f"page holds {most} of this model: shorten the text or lower --new-tokens"
        )


def record(
    model: Mistral, ids: list[int], new: int, stop_tokens: Sequence[int] | None
) -> tuple[Recorder, Stopwatch]:
    """Generate up to `new` tokens under a recorder, then read them again under a stopwatch."""
    with Recorder(model) as trace:
        # One more than is shown: the last token that generation chooses is never read.
        chosen = list(
            generate(model, ids, _GREEDY, max_new_tokens=new + 1, stop_tokens=stop_tokens)
        )
    with Stopwatch(model) as watch:
        _read(model, [ids, *([id] for id in chosen[:-1])])
    return trace, watch


def record_given(model: Mistral, parts: Sequence[list[int]]) -> tuple[Recorder, Stopwatch]:
    """Read a sequence that is known, part by part, under a recorder, then under a stopwatch."""
    with Recorder(model) as trace:
        _read(model, parts)
    with Stopwatch(model) as watch:
        _read(model, parts)
    return trace, watch


def with_own_hooks(model: Mistral) -> Mistral:
    """The model with modules of its own and the same weights.

    A recorder's hooks on it are not seen by an engine that runs the model in another thread.
    """
    shared = [*model.parameters(), *model.buffers()]
    shared += [module.keeper for module in model.modules() if isinstance(module, Packed)]
    return copy.deepcopy(model, {id(one): one for one in shared if one is not None})


def _read(model: Mistral, parts: Sequence[list[int]]) -> None:
    decoder = Decoder(model, 1, sum(map(len, parts)) + 1, slack=0)
    for ids in parts:
        decoder.prefill([ids])

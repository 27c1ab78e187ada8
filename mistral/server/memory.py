"""How many slots fit into memory, and what each of them holds: known before they are created."""

from dataclasses import dataclass

from mistral.cache import cache_slots
from mistral.engine.ids import check_sizes
from mistral.engine.memory import how_often_fits
from mistral.errors import NotEnoughMemory
from mistral.files import format_bytes
from mistral.model import Mistral


@dataclass(frozen=True, kw_only=True)
class SlotMemory:
    """What slots take.

    slots      how many
    window     of the model: a slot with one serves sequences of any length up to `limit`
    positions  keys and values of so many tokens are kept in a slot
    limit      how many tokens a slot can hold, prompt and answer together
    slot_bytes of one slot
    fitting    how many slots would fit; None: the free memory is unknown
    """

    slots: int
    window: int | None
    positions: int
    limit: int
    slot_bytes: int
    fitting: int | None

    @property
    def line(self) -> str:
        """One line for a person."""
        each = format_bytes(self.slot_bytes)
        total = format_bytes(self.slots * self.slot_bytes)
        text = f"slots: {self.slots} of {self.limit:,} tokens, {each} each and {total} in all"
        if self.positions < self.limit:
            text += f" (keys and values of the last {self.positions:,})"
        return text if self.fitting is None else f"{text}; {self.fitting:,} would fit"


def plan_slots(model: Mistral, slots: int, max_tokens: int | None, slack: int) -> SlotMemory:
    """The memory of so many slots, next to the weights that are loaded already.

    max_tokens  capacity of a slot; None: with a window as much as the checkpoint was made for,
                because the keys of a window are enough; without one it is required
    slack       of the engine

    Raises ValueError for impossible sizes and without a window and max_tokens; NotEnoughMemory,
    with the options that help, if the slots do not fit. Buffers of an engine come on top.
    """
    check_sizes(batch_size=slots, max_tokens=max_tokens, slack=slack)
    config = model.config
    most = config.max_position_embeddings
    if config.sliding_window is None and max_tokens is None:
        raise ValueError(
            "this model has no sliding window, so a slot keeps every token: say with --max-tokens "
            f"how many (the checkpoint was made for {most:,})"
        )
    positions = cache_slots(config.sliding_window, max_tokens, slack)
    rolls = config.sliding_window is not None and positions == config.sliding_window + slack
    slot_bytes = config.cache_bytes(positions, model.dtype.itemsize)
    fitting = how_often_fits(slot_bytes, model.device)
    if fitting is not None and fitting < slots:
        fewer = f"--slots {fitting}, or lower --max-tokens" if fitting else "a lower --max-tokens"
        raise NotEnoughMemory(
            f"{slots} slots need {format_bytes(slots * slot_bytes)} on {model.device}, "
            f"{format_bytes(slot_bytes)} each for {positions:,} tokens, and {fitting} would fit: "
            f"use {fewer}"
        )
    return SlotMemory(
        slots=slots,
        window=config.sliding_window,
        positions=positions,
        limit=most if rolls else min(most, positions),
        slot_bytes=slot_bytes,
        fitting=fitting,
    )

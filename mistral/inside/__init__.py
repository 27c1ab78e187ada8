"""Looking inside a model: a run is recorded, and becomes one HTML page."""

from mistral.inside.page import MOST_TOP, OURS, page_data, render
from mistral.inside.recording import (
    check_room,
    longest,
    record,
    record_given,
    with_own_hooks,
)

__all__ = [
    "MOST_TOP",
    "OURS",
    "check_room",
    "longest",
    "page_data",
    "record",
    "record_given",
    "render",
    "with_own_hooks",
]

"""What a server process keeps for the page."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mistral.model import Mistral
from mistral.server.window.toolbox import Toolbox


@dataclass(kw_only=True)
class Window:
    """What the page has that other clients have not.

    model   that is served; None: the page shows nothing of its weights
    engine  its name, for a person
    tools   that the person may let the server run
    close   is called when the server ends
    token   a secret of this process, which the page sends along; a page of another origin cannot
            read it
    questions  (title, text) of some that this model can answer; none: the page asks general ones
    """

    model: Mistral | None = None
    engine: str = ""
    tools: Toolbox = field(default_factory=Toolbox)
    close: Callable[[], None] = lambda: None
    questions: Sequence[tuple[str, str]] = ()
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)

"""Pages that look inside the model at a conversation."""

import asyncio
import secrets

from mistral.inside import longest, page_data, record_given, render, with_own_hooks
from mistral.model import Mistral
from mistral.server.protocol.errors import ApiError, invalid
from mistral.tokenizer import Tokenizer

_TOP = 8  # next tokens to show
_KEPT = 4  # pages, of up to 5 MB each


class InsidePages:
    """Makes pages, one at a time, and keeps the last ones.

    The slots' thread is not disturbed: a page has a forward pass of its own, in a thread of its
    own, on modules that share the model's weights and nothing else.
    """

    def __init__(self, model: Mistral, tokenizer: Tokenizer, name: str):
        self._model = model
        self._tokenizer = tokenizer
        self._name = name
        self._is_busy = False
        self._pages: dict[str, str] = {}  # by their names, the newest last

    async def make(self, prompt: list[int], answer: list[int]) -> str:
        """Make a page of a prompt and its answer, which may be empty; returns the page's name.

        ApiError for a text that is too long (400), and while another page is made (429).
        """
        most = longest(self._model.config)
        if len(prompt) + len(answer) > most:
            raise invalid(
                f"the conversation has {len(prompt) + len(answer)} tokens; a page that looks "
                f"inside holds {most} of this model: begin a new one, or switch off tools, whose "
                "descriptions count too",
                "messages",
                "context_length_exceeded",
            )
        if self._is_busy:
            raise ApiError(429, "another page is being made: try again later")
        self._is_busy = True
        try:
            page = await asyncio.to_thread(self._page, prompt, answer)
        finally:
            self._is_busy = False
        name = secrets.token_urlsafe(16)
        self._pages[name] = page
        while len(self._pages) > _KEPT:
            del self._pages[next(iter(self._pages))]
        return name

    def get(self, name: str) -> str:
        """A page that was made. ApiError (404) if it is not kept any more."""
        if name not in self._pages:
            raise ApiError(404, "this page is not kept any more: make it again", code="not_found")
        return self._pages[name]

    def _page(self, prompt: list[int], answer: list[int]) -> str:
        model = with_own_hooks(self._model)
        trace, watch = record_given(model, [ids for ids in (prompt, answer) if ids])
        facts = {"prompt": len(prompt), "top": _TOP, "name": self._name, "greedy": False}
        return render(page_data(model, self._tokenizer, trace, watch, **facts), trace)

"""A model that is served: its slots, the thread that runs them, and what makes requests for it."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from mistral.engine.base import Engine
from mistral.server.answering import Answering
from mistral.server.jobs import Jobs
from mistral.server.metrics import Metrics
from mistral.server.protocol.errors import invalid
from mistral.server.protocol.responses import Stored
from mistral.server.protocol.task import Task
from mistral.server.slots import Slots
from mistral.server.watch import Passes
from mistral.server.window.inside_pages import InsidePages
from mistral.server.window.window import Window
from mistral.server.worker import Worker
from mistral.tokenizer import Tokenizer

Result = TypeVar("Result")


class Service:
    """One model on an engine of several rows, each of which is a slot.

    name            of the model, in replies
    stored          what `previous_response_id` refers to
    created         when it was opened, in seconds since 1970
    chunk, queue, same_bits  those of `Slots`
    format, max_new_tokens  those of `Jobs`
    window          what the page at / has
    inside          pages that look inside the model; None: there is no model to look inside
    passes          the forward passes, recorded for those who ask
    """

    def __init__(  # noqa: PLR0913
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        format: str | None = None,
        max_new_tokens: int | None = None,
        chunk: int = 128,
        queue: int = 64,
        same_bits: bool = False,
        window: Window | None = None,
    ):
        self.name = name
        self.created = int(time.time())
        self.engine = engine
        self.tokenizer = tokenizer
        self.window = window or Window()
        self.jobs = Jobs(engine, tokenizer, format=format, max_new_tokens=max_new_tokens)
        model = self.window.model
        self.passes = Passes(None if model is None else model.device)
        slots = Slots(engine, chunk=chunk, queue=queue, same_bits=same_bits, watch=self.passes)
        self.worker = Worker(slots)
        self.inside = None if model is None else InsidePages(model, tokenizer, name)
        self._most_choices = engine.batch_size + queue
        self.stored = Stored()
        self.metrics = Metrics(self.worker, engine.batch_size)
        # Grammars take their time, and streams continue meanwhile. One thread: see `Jobs`.
        self._making_jobs = ThreadPoolExecutor(1, "jobs")

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """A function of `jobs`, in the thread that may use it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._making_jobs, function, *arguments)

    async def answer(self, task: Task) -> Answering:
        """Begin to answer. ApiError for a task that cannot be served."""
        if task.num_answers > self._most_choices:
            raise invalid(
                f"{task.num_answers} answers at once; the slots and their queue hold "
                f"{self._most_choices}",
                "n",
            )
        choices = await self.in_thread(self.jobs.choices, task)
        return await Answering.begin(self.worker, choices)

"""One answer while it is written: the tokens of its run, to text, calls and a reason."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mistral.chat.events import Call, Error, Event, Text
from mistral.chat.formats import ChatFormat
from mistral.chat.reader import AnswerReader
from mistral.server.protocol.errors import ApiError, internal, invalid_answer, unavailable
from mistral.server.request import Chosen, Request, Run
from mistral.server.worker import Stopped
from mistral.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

Finish = Literal["stop", "length", "tool_calls"]
# What an answer is read as: text alone; text and calls; or calls, unless it begins like JSON
Reads = Literal["text", "calls", "calls or json"]


@dataclass(frozen=True)
class Delta:
    """More of one answer.

    index   of the answer
    events  text and calls
    tokens  those that spell the text so far, the calls included; only if log-probabilities or
            details were asked for
    finish  why it ended; None: it continues
    """

    index: int
    events: Sequence[Text | Call]
    tokens: Sequence[Chosen] = ()
    finish: Finish | None = None


@dataclass(kw_only=True)
class Choice:
    """One answer.

    prompt  which of the job's prompts it answers
    stop    strings that end it, and are not part of it
    check   the problem of a whole answer that is not a call; None: it is valid
    number  of the answer in the conversation: see `AnswerReader.last_events`
    reports_end  whether the stop token is among `tokens`

    parts, tokens, finish  what all deltas so far make up
    generated  how many tokens the answer took; those after a stop string do not count
    ended      when all of it was known, in seconds of `time.monotonic`
    """

    index: int
    request: Request
    tokenizer: Tokenizer
    chat: ChatFormat | None
    prompt: int = 0
    stop: Sequence[str] = ()
    spelled_ends: bool = True
    reads: Reads = "text"
    check: Callable[[str], str | None] = lambda text: None
    number: int = 0
    reports_end: bool = False
    parts: list[Text | Call] = field(default_factory=list)
    tokens: list[Chosen] = field(default_factory=list)
    finish: Finish | None = None
    generated: int = 0
    ended: float | None = None
    run: Run | None = None

    def __post_init__(self) -> None:
        self._reader = AnswerReader(self.tokenizer, self.chat, self.stop, self.spelled_ends)
        self._written: list[Chosen] = []  # the tokens of the reader's ids

    @property
    def text(self) -> str:
        """The text outside of calls."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def calls(self) -> list[Call]:
        """The calls."""
        return [part for part in self.parts if isinstance(part, Call)]

    @property
    def stop_string(self) -> str | None:
        """Which of `stop` has ended the answer."""
        found = self._reader.stop_string
        return found if found in self.stop else None

    @property
    def starts(self) -> list[int]:
        """For each token: its place in the text, if no call is in it; and the text's length."""
        return self._reader.starts

    @property
    def is_complete(self) -> bool:
        """Whether later tokens do not matter: a stop string has ended the text."""
        return self._reader.ended_by is not None

    def feed(self, chosen: Sequence[Chosen]) -> Delta:
        """What some more tokens make certain."""
        events: list[Event] = []
        for token in chosen:
            if self.is_complete:
                break
            self.generated += 1
            self._written.append(token)
            if piece := self._reader.feed(token.id):
                events += self._events(piece)
        return self._delta(events, self._num_final())

    def end(self) -> Delta:
        """What only the end makes certain. ApiError if the run failed, or the answer is invalid."""
        run = self.run
        self.ended = time.monotonic()
        if run.reason == "error" and not self.is_complete:
            raise _failure(run.error)
        if run.reason == "cancelled" and not self.is_complete:
            raise unavailable("the server is shutting down")
        events: list[Event] = []
        if piece := self._reader.finish():
            events += self._events(piece)
        if self.reads != "text":
            events += self._reader.last_events(self.number)
        by_string = self._reader.ended_by == "string"
        final = self._reader.num_written if by_string else len(self._reader.ids)
        if self.reports_end and not by_string:
            final = len(self._written)
        delta = self._delta(events, final)
        self.finish = "stop" if self.is_complete or run.reason == "stop" else "length"
        if self.finish == "stop" and self.calls:
            self.finish = "tool_calls"
        elif self.finish == "stop" and (problem := self.check(self.text)):
            raise invalid_answer(problem)
        return Delta(self.index, delta.events, delta.tokens, self.finish)

    def _add(self, parts: Sequence[Text | Call]) -> None:
        """Add to `parts`; texts in a row are one."""
        for part in parts:
            last = self.parts[-1] if self.parts else None
            if isinstance(part, Text) and isinstance(last, Text):
                self.parts[-1] = Text(last.text + part.text)
            else:
                self.parts.append(part)

    def _events(self, piece: str) -> list[Event]:
        begins_like_json = self._reader.text.lstrip()[:1] not in ("", "<")
        if self.reads == "text":
            return [Text(piece)]
        if self.reads == "calls or json" and begins_like_json:
            self.reads = "text"
            return [Text(self._reader.text)]
        return self._reader.events(piece)

    def _num_final(self) -> int:
        """How many tokens can be reported."""
        return 0 if self.request.num_reported is None else self._reader.num_written

    def _delta(self, events: Sequence[Event], final: int) -> Delta:
        """The events as a delta; what cannot be read as a call is text."""
        readable: list[Text | Call] = []
        for event in events:
            if isinstance(event, Error):
                event = Text(event.source)
            readable.append(event)
        self._add(readable)
        tokens: list[Chosen] = []
        if self.request.num_reported is not None:
            tokens = self._written[len(self.tokens) : final]
            self.tokens += tokens
        return Delta(self.index, readable, tokens)


def _failure(error: BaseException | None) -> ApiError:
    """The ApiError of a run that failed."""
    if isinstance(error, Stopped):
        return unavailable(str(error))
    if isinstance(error, ValueError):  # a constraint, or logits that are not numbers
        return internal(str(error))
    _log.error("a run failed", exc_info=error)
    return internal()

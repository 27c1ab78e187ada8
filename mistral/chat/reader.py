"""The ids of one answer, one at a time, to its text, its calls and its events."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from mistral.chat.events import Call, Event, Text
from mistral.chat.formats import ChatFormat
from mistral.chat.formats.call_list import call_list_message, read_call_list
from mistral.chat.formats.tool_calls import ToolCallStream
from mistral.engine.text import UntilStop
from mistral.tokenizer import Tokenizer


class AnswerReader:
    """Reads an answer in a chat format: `feed` it each id, and `finish` it when none follows.

    text      returned so far
    ids       fed so far, without the stop token
    ended_by  what has ended the answer; None: it continues. Later ids must not be fed.

    chat          None: a text without a format, which ends at the tokenizer's stop tokens, and in
                  which nothing is a call
    stop          strings that end the answer, and are not part of it
    spelled_ends  whether an end of turn that is spelled as text ends the answer, as in `ChatFormat`

    Neither ends it inside a call.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatFormat | None,
        stop: Sequence[str] = (),
        spelled_ends: bool = True,
    ):
        self.text = ""
        self.ids: list[int] = []
        self.ended_by: Literal["token", "string"] | None = None
        self._stop_tokens = tokenizer.stop_ids if chat is None else chat.stop_ids(tokenizer)
        self._until_stop = _until_stop(tokenizer, chat, stop, spelled_ends, self._is_quoted)
        self._ends: list[int] = []  # for each of the ids: how many characters there are after it
        self._has_calls = chat is not None
        self._call_token: int | None = None
        if chat is not None and chat.call_token is not None:
            self._call_token = tokenizer.control_id(chat.call_token)
        # The only parser of the text: finds the calls, and knows which places are in a string.
        self._stream = ToolCallStream()
        self._parsed = 0  # characters that it was fed
        self._found: list[Event] = []  # by it, not yet returned
        self._calls: list[Call] = []  # in the text
        self._listed: list[Call] = []  # calls of a list

    def feed(self, id: int) -> str:
        """The text that one more id makes final."""
        piece = self._until_stop.feed(id)
        if id in self._stop_tokens:
            piece += self._until_stop.finish()
            self.ended_by = "token"
        else:
            self.ids.append(id)
            self._ends.append(self._until_stop.length)
        if self._until_stop.has_stopped:
            self.ended_by = "string"
        self.text += piece
        return piece

    def finish(self) -> str:
        """The text still held back, if no id follows."""
        piece = self._until_stop.finish() if self.ended_by is None else ""
        self.text += piece
        return piece

    def events(self, piece: str) -> list[Event]:
        """The events that are certain after a piece that `feed` or `finish` has returned."""
        if self._has_calls and self._call_token is None:
            self._parse(self.text, len(self.text))
            return self._take_found()
        return [Text(piece)] if piece and not self._is_list else []

    def last_events(self, number: int) -> list[Event]:
        """The events that only the end of the answer makes certain.

        number  of the answer in the conversation: part of the ids of its calls, in formats that
                need some
        """
        if self._call_token is None:
            self._add_found(self._stream.finish())
        elif self._is_list:
            self._found = [*read_call_list(self.text, number)]
            self._listed = [event for event in self._found if isinstance(event, Call)]
        return self._take_found()

    @property
    def stop_string(self) -> str | None:
        """The stop string or spelled end that has ended the answer."""
        return self._until_stop.stopped_at

    @property
    def calls(self) -> list[Call]:
        """The calls in the text; the listener may not have heard all of them."""
        return self._listed or [call for call in self._calls if call.span[1] <= len(self.text)]

    def message(self) -> dict[str, Any]:
        """The answer as a message; a list of calls takes the place of its text."""
        if self._listed:
            return call_list_message(self._listed)
        return {"role": "assistant", "content": self.text}

    @property
    def starts(self) -> list[int]:
        """How many characters there were before each of the ids, and are now."""
        return [0, *self._ends]

    @property
    def num_written(self) -> int:
        """How many of the ids spell the text; those after them were held back, or spell its end."""
        length = len(self.text)
        before = 0
        for n, end in enumerate(self._ends):
            if before >= length or end > length:
                return n
            before = end
        return len(self.ids)

    def drop_unwritten(self) -> bool:
        """Reduce `ids` to those that spell the text; False if the text ends within a token."""
        n = self.num_written
        if n == len(self.ids):
            return True
        del self.ids[n:]
        length = self._ends[n - 1] if n else 0
        return length >= len(self.text)

    @property
    def _is_list(self) -> bool:
        """Whether the text is a list of calls: the call token says so."""
        return self._call_token is not None and self.ids[:1] == [self._call_token]

    def _is_quoted(self, text: str, at: int) -> bool:
        """Whether a place of the text lies in a string of a call; places come in their order."""
        if self._is_list:
            return True
        self._parse(text, at)
        return self._stream.in_string

    def _parse(self, text: str, end: int) -> None:
        """Feed the text up to `end` to the parser, each character once."""
        self._add_found(self._stream.feed(text[self._parsed : end]))
        self._parsed = max(self._parsed, end)

    def _add_found(self, events: list[Event]) -> None:
        self._found += events
        self._calls += [event for event in events if isinstance(event, Call)]

    def _take_found(self) -> list[Event]:
        events = self._found
        self._found = []
        return events


def _until_stop(
    tokenizer: Tokenizer,
    chat: ChatFormat | None,
    stop: Sequence[str],
    spelled_ends: bool,
    is_quoted: Callable[[str, int], bool],
) -> UntilStop:
    if chat is None:
        return UntilStop(tokenizer, stop)
    spelled = chat.spelled_ends if spelled_ends else ()
    return UntilStop(tokenizer, (*spelled, *stop), chat.strip_leading_space, is_quoted)

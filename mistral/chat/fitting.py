"""Makes a conversation fit into the cache: shortens new results, forgets the oldest turns."""

from collections.abc import Callable
from typing import Any

from mistral.chat.events import Altered, Event, Trimmed
from mistral.chat.tools import feedback
from mistral.chat.tools.results import result_text
from mistral.errors import ConversationError

_SHORTEST_END = 100  # characters that a shortened result keeps at least of its begin and its end


_INSTRUCTIONS = ("system", "developer")  # roles of messages that are never forgotten


class Fitting:
    """Changes a list of messages until they fit; the messages themselves stay as they are.

    messages  the list
    read      how many of them the model has read as they are
    limit     how many tokens there may be
    reserved  how many of those the answer may need
    events    what the caller is told
    """

    def __init__(self, messages: list[dict[str, Any]], read: int, limit: int, reserved: int):
        self.events: list[Event] = []
        self._messages = messages
        self._read = read
        self._limit = limit
        self._room = limit - min(reserved, limit // 4)
        self._forgotten = 0
        # Of the results that were shortened, by their place:
        self._full: dict[int, str] = {}
        self._kept: dict[int, int] = {}  # characters of each end
        self._altered: dict[int, Altered] = {}

    def fit(self, count: Callable[[], int], trim: bool) -> None:
        """Change the messages if they do not fit.

        count  how many tokens the messages are
        trim   whether the oldest turns may be forgotten

        Raises ConversationError if they do not fit even then.
        """
        tokens = count()
        if trim and tokens >= self._room:
            # A quarter more than needed: after each trim all that stays has to be prefilled again.
            while tokens >= self._room * 3 // 4 and self._forget_oldest_turn():
                tokens = count()
        if tokens >= self._limit:
            while tokens >= self._room and self._shorten_result():
                tokens = count()
        if self._forgotten:
            self.events.append(Trimmed(self._forgotten))
        self.events += self._altered.values()
        if tokens >= self._limit:
            raise ConversationError(
                f"the conversation would have {tokens} tokens, and there is room for "
                f"{self._limit}: reset it, or say less"
            )

    def _forget_oldest_turn(self) -> bool:
        """Remove all from the first user's message to the next one; False if there is one only."""
        roles = [message["role"] for message in self._messages]
        users = [i for i, role in enumerate(roles) if role == "user"]
        if len(users) < 2:
            return False
        first = next(i for i, role in enumerate(roles) if role not in _INSTRUCTIONS)
        end = users[1] if first == users[0] else users[0]
        del self._messages[first:end]
        self._read = max(0, self._read - (end - first))
        self._forgotten += end - first
        return True

    def _shorten_result(self) -> bool:
        """Shorten the longest result that the model has not read; False if all are short."""
        lengths = {
            i: 2 * self._kept[i] if i in self._kept else len(result_text(message["content"]))
            for i, message in enumerate(self._messages)
            if i >= self._read and message["role"] == "tool" and message.get("content") is not None
        }
        if not lengths:
            return False
        place = max(lengths, key=lengths.__getitem__)
        keep = min(lengths[place] * 2 // 5, 8 * self._limit)
        if keep < _SHORTEST_END:
            return False
        self._kept[place] = keep
        full = self._full.setdefault(place, result_text(self._messages[place]["content"]))
        message = self._messages[place]
        text = feedback.shortened(full[:keep], full[-keep:], len(full))
        self._messages[place] = message | {"content": text}
        name = message.get("name") or ""
        told = (
            f"the result of {name}, {len(full):,} characters, is too long for the conversation: "
            f"the model reads {2 * keep:,} of them"
        )
        self._altered[place] = Altered(name, told)
        return True

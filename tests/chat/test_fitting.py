"""How a conversation is made to fit, with characters in the place of tokens."""

import pytest

from mistral.chat.fitting import Fitting
from mistral.errors import ConversationError


def message(role, length):
    return {"role": role, "content": "x" * length} | ({"name": "f"} if role == "tool" else {})


def fitted(messages, limit, read=0, reserved=0, trim=False):
    """The lengths of the messages that are left, and the events."""
    fitting = Fitting(messages, read, limit, reserved)
    fitting.fit(lambda: sum(len(one["content"]) for one in messages), trim)
    return [len(one["content"]) for one in messages], fitting.events


def turns(count):
    return [message(role, 50) for _ in range(count) for role in ("user", "assistant")]


def test_a_quarter_of_the_room_is_free_after_a_trim():
    lengths, [trimmed] = fitted(turns(10), 1000, trim=True)
    assert sum(lengths) == 700 and trimmed.messages == 6
    assert fitted(turns(9), 1000, trim=True) == ([50] * 18, [])


def test_the_room_for_an_answer_is_a_quarter_at_most():
    assert len(fitted(turns(7), 1000, reserved=900, trim=True)[0]) == 14
    assert len(fitted(turns(8), 1000, reserved=900, trim=True)[0]) == 10
    assert len(fitted(turns(8), 1000, reserved=100, trim=True)[0]) == 16


def test_what_the_model_said_before_the_first_question_is_forgotten_first():
    messages = [message("system", 10), message("assistant", 300), *turns(2)]
    assert fitted(messages, 500, trim=True)[0] == [10, 50, 50, 50, 50]


def test_the_last_question_is_never_forgotten():
    messages = [*turns(1), message("user", 900)]
    with pytest.raises(ConversationError, match="would have 900 tokens, and there is room for 800"):
        fitted(messages, 800, trim=True)


def test_a_result_is_shortened_after_the_messages_before_it_are_forgotten():
    messages = [*turns(2), message("tool", 5000)]
    lengths, events = fitted(messages, 3000, read=4, trim=True)
    assert lengths[:2] == [50, 50] and 1000 < lengths[2] < 3000
    assert [type(event).__name__ for event in events] == ["Trimmed", "Altered"]


def test_what_the_model_has_read_stays_and_the_longest_other_result_is_shortened():
    roles = {"user": 50, "assistant": 50}
    messages = [message(role, length) for role, length in roles.items()]
    messages += [message("tool", length) for length in (6000, 700, 5000)]
    lengths, [altered] = fitted(messages, 11_000, read=3)
    assert lengths[:4] == [50, 50, 6000, 700] and 3000 < lengths[4] < 5000
    assert "5,000 characters" in altered.message

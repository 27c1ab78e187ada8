"""Messages of errors: one printable line, whatever a file or a model put into them."""

import pytest

from mistral.chat.grammar import UnsupportedSchema
from mistral.errors import CheckpointError, ConversationError, MistralError, one_line

RAW = "a\x1b]0;t\x07\r\nb\u202e\u2028\u2066\ud800\x85c é😀"
LINE = r"a\x1b]0;t\x07 b\u202e \u2066\ud800 c é😀"


@pytest.mark.parametrize("kind", [MistralError, CheckpointError, ConversationError])
def test_a_message_is_one_printable_line(kind):
    assert str(kind(RAW)) == LINE
    assert str(UnsupportedSchema("allOf", RAW)).endswith(LINE)
    assert one_line(RAW) == LINE


def test_a_message_without_such_characters_stays():
    assert str(MistralError("naïve  café: 日本 'x'")) == "naïve  café: 日本 'x'"

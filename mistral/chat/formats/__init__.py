"""Chat formats: messages to ids, and an answer's text to calls."""

from mistral.chat.formats.base import ChatFormat
from mistral.chat.formats.choose import (
    FORMATS,
    chat_format,
    choose_format,
    encode_chat,
    render_chat,
)

__all__ = ["FORMATS", "ChatFormat", "chat_format", "choose_format", "encode_chat", "render_chat"]

"""Chat formats: messages to ids, and what a model wrote back to text and calls."""

from mistral.chat.formats.choose import (
    FORMATS,
    ChatFormat,
    chat_format,
    choose_format,
    encode_chat,
    render_chat,
)

__all__ = ["FORMATS", "ChatFormat", "chat_format", "choose_format", "encode_chat", "render_chat"]

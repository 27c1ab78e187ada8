"""Text to ids and back: llama-server's and vLLM's /tokenize and /detokenize."""

from typing import Any

from mistral.errors import one_line
from mistral.sampling import Sampling
from mistral.server.protocol.chat_completions import Message, Tool, tools_to_read
from mistral.server.protocol.errors import invalid
from mistral.server.protocol.fields import Body, differs, done, ignored
from mistral.server.protocol.task import ChatTask
from mistral.server.protocol.tokens_as_text import token_text
from mistral.tokenizer import Tokenizer


class TokenizeBody(Body):
    """The body of a request to /tokenize: a text, or a conversation."""

    model: str | None = ignored("the server has one model")
    content: str | None = done("the text, as llama-server names it")
    prompt: str | None = done("the text, as vLLM names it")
    messages: list[Message] | None = done("a conversation, up to where the answer begins")
    tools: list[Tool] | None = done("of the conversation")
    add_special: bool | None = differs("begin with the begin-of-text token; default: false")
    add_special_tokens: bool | None = differs("the same; default: false, in vLLM true")
    parse_special: bool | None = differs(
        "parse control tokens that the text spells; default: false, in llama-server true"
    )
    with_pieces: bool | None = done("each token with its text")

    def task(self) -> ChatTask | None:
        """The conversation; None for a text. ApiError unless there is one of the two."""
        given = [one for one in (self.content, self.prompt, self.messages) if one is not None]
        if len(given) != 1:
            raise invalid("give one of content, prompt, messages", "content")
        if self.messages is None:
            return None
        return ChatTask(
            messages=[message.model_dump(exclude_none=True) for message in self.messages],
            tools=tools_to_read(self._given.get("tools")),
            sampling=Sampling(),
        )

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The ids of the text."""
        try:
            return tokenizer.encode(
                self.prompt if self.content is None else self.content,
                bos=bool(self.add_special or self.add_special_tokens),
                special=bool(self.parse_special),
            )
        except ValueError as error:
            raise invalid(one_line(str(error)), "content") from None

    def reply(self, ids: list[int], tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
        """The reply; `limit` is the room of a slot."""
        tokens: list[Any] = list(ids)
        if self.with_pieces:
            tokens = [{"id": id, "piece": token_text(tokenizer, id)} for id in ids]
        return {"tokens": tokens, "count": len(ids), "max_model_len": limit}


class DetokenizeBody(Body):
    """The body of a request to /detokenize."""

    model: str | None = ignored("the server has one model")
    tokens: list[int] = differs("control tokens are spelled", ...)
    after_text: bool | None = differs(
        "not in other APIs. False (default): the space that /tokenize puts before a text is not "
        "part of it, so the text comes back; true: the tokens follow others, and so does the space"
    )

    def reply(self, tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
        """The reply, under both servers' names."""
        for id in self.tokens:
            if not 0 <= id < vocab_size:
                raise invalid(f"token id {id} is not in the vocabulary of {vocab_size}", "tokens")
        stream = tokenizer.stream(strip_leading_space=not self.after_text, control=True)
        text = "".join([*map(stream.feed, self.tokens), stream.finish()])
        return {"content": text, "prompt": text}

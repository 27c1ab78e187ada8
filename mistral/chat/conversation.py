"""A conversation: the user says something, the model answers, calls functions, reads their results, and answers.

The decoder keeps what it has read between the turns, so that each turn costs its own tokens only.
"""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mistral.chat import feedback
from mistral.chat.answer import SPELLED, Answer, TextOnly
from mistral.chat.events import End, Event, Text
from mistral.chat.formats import chat_format, choose_format
from mistral.chat.grammar import UnsupportedSchema, tool_call_constraint
from mistral.chat.outcomes import outcome, outcomes_together
from mistral.chat.saved import ConversationError, read_lines, write_lines
from mistral.chat.tool_calls import Reply, ToolCallStream
from mistral.chat.tools import Tool, tool_table
from mistral.decoder import Decoder, Engine
from mistral.generation import Constraint
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

WITH_TOOLS = ("chatml", "hermes_tool_use")  # formats whose calls `ToolCallStream` reads
SLACK = 32  # tokens that can be taken back after the window rolled: an end of turn that the model spelled


class Conversation:
    """A chat with a model, kept in the decoder's cache.

    model_or_decoder  a model (a `Decoder` is made for it), or any engine for one row that nobody else uses
    tools             functions that the model may call; needs the extra `chat`
    system            the system message
    sampling          how tokens are chosen; None: greedily
    grammar           allow only calls that the tools' schemas allow (needs the extra `chat`). A schema that no grammar
                      can express is a warning, and calls are then checked only after they are written.
    tool_choice       "auto"; "none"; "required": the first answer is a call; or the name of the tool to call first
    format            a name of `mistral.chat.formats`; None: what the checkpoint's tokens tell
    max_rounds        how many answers may follow one thing that the user says
    max_new_tokens    of one answer
    max_tokens        room in the cache for a model without a window; None: what the checkpoint was made for
    time_limit        seconds for one function; None: no limit
    parallel          run the functions of one answer at the same time

    messages      what was said, as OpenAI's interface has it; an assistant's content is what the model wrote
    tokens_read   how many tokens the model was given, and `tokens_written` how many it chose
    tokens_saved  how many of those the grammar left no choice about, so that no forward pass was needed
    tokens_held   how many tokens of the conversation the decoder holds; 0: it will read all of it

    Raises ConversationError for arguments that make no sense.
    """

    def __init__(
        self,
        model_or_decoder: Mistral | Engine,
        tokenizer: Tokenizer,
        *,
        tools: Iterable[Tool] = (),
        system: str | None = None,
        sampling: Sampling | None = None,
        grammar: bool = True,
        tool_choice: str = "auto",
        format: str | None = None,
        max_rounds: int = 5,
        max_new_tokens: int = 512,
        max_tokens: int | None = None,
        time_limit: float | None = 30.0,
        parallel: bool = False,
    ):
        if max_rounds < 1 or max_new_tokens < 1:
            raise ConversationError("max_rounds and max_new_tokens must be 1 or more")
        self.tools = tool_table(tools)
        if tool_choice not in ("auto", "none", "required", *self.tools):
            raise ConversationError(f"there is no tool {tool_choice!r} to choose; there are {', '.join(self.tools)}")
        self.format = choose_format(tokenizer) if format is None else format
        self._chat = chat_format(tokenizer, self.format)
        if self.tools and self.format not in WITH_TOOLS:
            raise ConversationError(f"functions need a format of {', '.join(WITH_TOOLS)}, not {self.format}")
        self.tokenizer, self.sampling = tokenizer, sampling or Sampling(temperature=0)
        self.max_rounds, self.max_new_tokens, self.time_limit = max_rounds, max_new_tokens, time_limit
        self.parallel, self.tool_choice = parallel, tool_choice
        self.decoder = _decoder(model_or_decoder, max_tokens)
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.tokens_read = self.tokens_written = self.tokens_saved = 0
        self._stop_tokens = tuple(dict.fromkeys((*tokenizer.stop_ids, *self._chat.stop_ids(tokenizer))))
        self.tokens_held = 0  # tokens of the conversation in the decoder; 0: it has to read all messages again
        self._read = 0  # messages that those are
        self._constraints: dict[str, Constraint] = {}
        self._text_only = TextOnly(tokenizer, self.decoder.config.vocab_size, self._stop_tokens)
        self._speaking: Iterator[Event] | None = None
        if grammar and self.tools:
            self._make_grammars()
        if tool_choice not in ("auto", "none") and not self._constraints:
            raise ConversationError(f"tool_choice {tool_choice!r} needs tools, and a grammar that can express them")

    def say(self, text: str) -> Iterator[Event]:
        """Say something; the answer comes as events while it is made, `End` being the last.

        End's reason: "stop", "length" (max_new_tokens), or "max_rounds". If the caller stops listening (by Ctrl-C, or
        by saying something else), what was heard until then stays. Raises ConversationError for text that is empty or
        no Unicode, and where the conversation has become too long; nothing is lost then.
        """
        if not isinstance(text, str) or not text:
            raise ConversationError("there is nothing to say: the text is empty")
        self._stop_speaking()
        self._speaking = self._rounds({"role": "user", "content": text})
        return self._speaking

    def reset(self) -> None:
        """Forget all that was said, except for the system message."""
        self._stop_speaking()
        self.decoder.rewind(self.decoder.lengths[0])
        self.tokens_held = self._read = 0
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON lines, whole or not at all: its format, then the messages."""
        write_lines(Path(path), [{"format": self.format, "tools": self._schemas()}, *self.messages])

    @classmethod
    def load(
        cls,
        path: str | Path,
        model_or_decoder: Mistral | Engine,
        tokenizer: Tokenizer,
        *,
        tools: Iterable[Tool] = (),
        **options: Any,
    ) -> "Conversation":
        """Go on with a saved conversation; `options` are those of the constructor.

        Functions are not saved: `tools` must be those of the conversation. ConversationError where they differ, and for
        a file that holds no conversation.
        """
        head, *messages = read_lines(Path(path))
        made = cls(model_or_decoder, tokenizer, tools=tools, **{"format": head.get("format"), **options})
        if head.get("tools") != made._schemas():
            raise ConversationError(f"{path} is a conversation with other tools; give those that it was begun with")
        try:
            made._chat.begin(
                tokenizer, messages, list(made.tools.values()) or None, generate=False
            ) if messages else None
        except ValueError as error:
            raise ConversationError(f"{path}: {error}") from error
        made.messages = messages
        return made

    def _schemas(self) -> list[dict[str, Any]]:
        return [tool.schema() for tool in self.tools.values()]

    def _rounds(self, message: dict[str, Any]) -> Iterator[Event]:
        self.messages.append(message)
        choice = self.tool_choice
        for round in range(self.max_rounds):
            events: list[Event] = []
            answer = self._begin_answer(choice)
            for event in self._listen(answer):
                events.append(event)
                yield event
            reply, choice = Reply.of(events), "none" if self.tool_choice == "none" else "auto"
            if answer.reason == "length" or not (reply.calls or reply.errors):
                yield End(answer.reason)
                return
            if round < self.max_rounds - 1:
                yield from self._results(reply)
        yield End("max_rounds")

    def _stop_speaking(self) -> None:
        """End an answer that somebody may still listen to."""
        if self._speaking is not None:
            self._speaking.close()

    def _begin_answer(self, choice: str) -> Answer:
        """Let the model read what it has not read yet."""
        self._forget_surplus()
        try:
            ids = self._encode()
            while (room := self.decoder.limit - self.tokens_held - len(ids)) < 1 and self._shorten_results():
                ids = self._encode()
            if room < 1:
                raise ConversationError(
                    f"the conversation would have {self.tokens_held + len(ids)} tokens, and there is room for "
                    f"{self.decoder.limit}: reset it, or say less"
                )
        except ConversationError:
            self._take_back()
            raise
        constraint = self._constraint(choice)
        return Answer(
            self.decoder,
            self.tokenizer,
            ids,
            self.sampling,
            constraint,
            max_new_tokens=min(self.max_new_tokens, room),
            stop_tokens=self._stop_tokens,
            begins_text=self._chat.reply_begins_text,
            # In a call, what spells the end is text; without a grammar nobody knows where calls are.
            spelled=SPELLED if constraint is self._text_only else (),
        )

    def _listen(self, answer: Answer) -> Iterator[Event]:
        """The events of one answer; however it ends, the conversation then holds what was heard of it."""
        stream = ToolCallStream() if self.tools and self.tool_choice != "none" else None
        try:
            for piece in answer:
                yield from stream.feed(piece) if stream else [Text(piece)]
            yield from stream.finish() if stream else []
        finally:
            answer.settle()
            if answer.ids or answer.reason != "interrupted":
                self.messages.append({"role": "assistant", "content": answer.text})
                self.tokens_held += len(answer.prompt_ids) + len(answer.ids)
                self._read = len(self.messages)
                self.tokens_read += len(answer.prompt_ids)
                self.tokens_written += len(answer.ids)
                self.tokens_saved += answer.saved
            else:
                self._take_back()

    def _forget_surplus(self) -> None:
        """Bring the decoder back to what was heard, where the caller stopped listening while it went on."""
        try:
            self.decoder.rewind(self.decoder.lengths[0] - self.tokens_held)
        except ValueError:  # more than the cache can take back: everything is read again
            self.decoder.rewind(self.decoder.lengths[0])
            self.tokens_held = self._read = 0

    def _shorten_results(self) -> bool:
        """Put an error in the place of the longest result that the model has not read; False if there is none."""
        results = [m for m in self.messages[self._read :] if m["role"] == "tool" and "content" in m]
        if not results:
            return False
        longest = max(results, key=lambda message: len(message["content"]))
        size = len(longest.pop("content"))
        longest["error"] = feedback.not_executed(longest["name"], f"the result is too long: {size:,} characters")
        return True

    def _take_back(self) -> None:
        """Forget what the user said if no answer to it was heard; results of functions stay, they have happened."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def _encode(self) -> list[int]:
        """The ids to read next: all of the conversation, or what follows the last answer."""
        tools = list(self.tools.values()) or None
        history, new = self.messages[: max(self._read - 1, 0)], self.messages[self._read :]
        try:
            if self.tokens_held and self._chat.can_go_on(history, new, tools):
                return self._chat.go_on(self.tokenizer, new)
            ids = self._chat.begin(self.tokenizer, self.messages, tools)
            self.decoder.rewind(self.decoder.lengths[0])
            self.tokens_held = self._read = 0
            return ids
        except ValueError as error:
            raise ConversationError(str(error)) from error

    def _results(self, reply: Reply) -> Iterator[Event]:
        """Run the calls; each outcome is a message and an event."""
        if self.parallel:
            ran = outcomes_together(reply.calls, self.tools, self.time_limit)
            self.messages += [message for _, message in ran]  # all have happened, whoever is still listening
            yield from (event for event, _ in ran)
        else:
            for call in reply.calls:
                event, message = outcome(call, self.tools, self.time_limit)
                self.messages.append(message)
                yield event
        for error in reply.errors:  # they were events when they were found
            self.messages.append({"role": "tool", "name": "", "error": feedback.not_readable(error.message)})

    def _make_grammars(self) -> None:
        try:
            for choice in {"auto" if self.tool_choice != "none" else "none", self.tool_choice}:
                self._constraints[choice] = tool_call_constraint(
                    self.tokenizer,
                    self.decoder.config.vocab_size,
                    self._schemas(),
                    choice=choice,
                    stop_tokens=self._stop_tokens,
                )
        except UnsupportedSchema as error:
            self._constraints = {}
            warnings.warn(f"calls are checked only after they are written: {error}", stacklevel=3)

    def _constraint(self, choice: str) -> Constraint:
        return self._constraints[choice].copy() if choice in self._constraints else self._text_only


def _decoder(model_or_decoder: Mistral | Engine, max_tokens: int | None) -> Engine:
    if not isinstance(model_or_decoder, Mistral):
        if model_or_decoder.batch_size != 1:
            raise ConversationError(f"a conversation needs a decoder of one row, not {model_or_decoder.batch_size}")
        return model_or_decoder
    config = model_or_decoder.config
    if config.sliding_window is None and max_tokens is None:
        max_tokens = config.max_position_embeddings
    return Decoder(model_or_decoder, 1, max_tokens, slack=SLACK)

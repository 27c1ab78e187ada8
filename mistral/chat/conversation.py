"""A conversation: the user says something, the model answers, calls functions, reads their results,
and answers.

The decoder keeps what it has read between the turns, so that each turn costs its own tokens only.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mistral.chat.answer import Answer, one_row
from mistral.chat.events import Call, End, Event, Text
from mistral.chat.formats import chat_format, choose_format
from mistral.chat.formats.call_list import CallListStream, assistant_message
from mistral.chat.formats.tool_calls import Reply, ToolCallStream
from mistral.chat.held import Held
from mistral.chat.saved import ConversationError, read_lines, write_lines
from mistral.chat.tool_choice import call_constraints, check_tool_choice
from mistral.chat.tools import Tool, feedback, tool_table
from mistral.chat.tools.outcomes import outcome, outcomes_together
from mistral.engine.decoder import Engine
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer


class Conversation:
    """A chat with a model, kept in the decoder's cache.

    model_or_decoder  a model (a `Decoder` is made for it), or any empty engine for one row, for
                      this conversation alone
    tools             functions that the model may call; needs the extra `chat`
    system            the system message
    sampling          how tokens are chosen; None: greedily
    grammar           allow only calls that the tools' schemas allow (needs the extra `chat`). A
                      schema that no grammar can express is a warning, and calls are then checked
                      only after they are written.
    tool_choice       "auto"; "none"; "required": the first answer is a call; or the name of the
                      tool to call first. The last two need the grammar.
    format            a name of `mistral.chat.formats`; None: what the checkpoint's tokens tell
    max_rounds        how many answers may follow one thing that the user says
    max_new_tokens    of one answer
    max_tokens        room in the cache for a model without a window; None: what the checkpoint was
                      made for
    time_limit        seconds for one function; None: no limit
    parallel          run the functions of one answer at the same time

    messages      what was said, as OpenAI's interface has it; an assistant's content is what the
                  model wrote, calls in `<tool_call>` included
    tokens_read   how many tokens the model was given, and `tokens_written` how many it chose
    tokens_saved  how many of those the grammar left no choice about, so that no forward pass was
                  needed

    Raises ValueError for arguments that make no sense.
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
        self.format = choose_format(tokenizer) if format is None else format
        self._chat = chat_format(tokenizer, self.format)
        check_tool_choice(tool_choice, self.tools, self.format)
        self.tokenizer, self.sampling = tokenizer, sampling or Sampling(temperature=0)
        self.max_rounds, self.max_new_tokens, self.time_limit = (
            max_rounds,
            max_new_tokens,
            time_limit,
        )
        self.parallel, self.tool_choice = parallel, tool_choice
        self.decoder = one_row(model_or_decoder, max_tokens)
        self.messages: list[dict[str, Any]] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.tokens_read = self.tokens_written = self.tokens_saved = 0
        self._held = Held(self.decoder)
        self._constraints = call_constraints(
            self.decoder, tokenizer, self._chat, self.tools, tool_choice, grammar
        )
        self._speaking: Iterator[Event] | None = None

    @property
    def tokens_held(self) -> int:
        """How many tokens of the conversation the decoder holds; 0: it will read all of it."""
        return self._held.tokens

    def say(self, text: str) -> Iterator[Event]:
        """Say something; the answer comes as events while it is made, `End` being the last.

        End's reason: "stop", "length" (max_new_tokens), or "max_rounds". If the caller stops
        listening (by Ctrl-C, or by saying something else), what was heard until then stays. Raises
        ConversationError for text that is empty or no Unicode, where the conversation has become
        too long, and where something else used its decoder; nothing is lost then.
        """
        if not isinstance(text, str) or not text:
            raise ConversationError("there is nothing to say: the text is empty")
        self._stop_speaking()
        self._speaking = self._rounds({"role": "user", "content": text})
        return self._speaking

    def reset(self) -> None:
        """Forget all that was said, except for the system message."""
        self._stop_speaking()
        self._held.forget()
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON lines, whole or not at all: its format, then the
        messages.
        """
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

        Functions are not saved: `tools` must be those of the conversation. ConversationError where
        they differ, for a system message or a format, which the file has, and for a file that holds
        no conversation.
        """
        if given := [name for name in ("format", "system") if options.get(name) is not None]:
            raise ConversationError(
                f"{path} says what {' and '.join(given)} it has: leave them out"
            )
        head, *messages = read_lines(Path(path))
        made = cls(
            model_or_decoder, tokenizer, tools=tools, **(options | {"format": head.get("format")})
        )
        if head.get("tools") != made._schemas():
            raise ConversationError(
                f"{path} is a conversation with other tools; give those that it was begun with"
            )
        try:
            if messages:
                made._chat.begin(
                    tokenizer, messages, list(made.tools.values()) or None, generate=False
                )
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
        try:
            self._held.go_back()
            ids, limit = self._encode(), self.decoder.limit
            while self.tokens_held + len(ids) >= limit and self._shorten_results():
                ids = self._encode()
            if (tokens := self.tokens_held + len(ids)) >= limit:
                raise ConversationError(
                    f"the conversation would have {tokens} tokens, and there is room for {limit}: "
                    f"reset it, or say less"
                )
        except ConversationError:
            self._take_back()
            raise
        constraint = self._constraints[choice].copy()
        return Answer(
            self.decoder,
            self.tokenizer,
            self._chat,
            ids,
            self.sampling,
            constraint,
            self.max_new_tokens,
        )

    def _listen(self, answer: Answer) -> Iterator[Event]:
        """The events of one answer; however it ends, the conversation then holds what was heard of
        it.
        """
        stream, calls = self._stream(answer), []
        try:
            for piece in answer:
                yield from stream.feed(piece) if stream else [Text(piece)]
            rest = stream.finish() if stream else []
            calls = [event for event in rest if isinstance(event, Call)]
            yield from rest
        finally:
            answer.settle()
            if answer.ids or answer.reason != "interrupted":
                self.messages.append(assistant_message(answer.text, calls))
                self._held.add(len(answer.prompt_ids) + len(answer.ids), len(self.messages))
                self.tokens_read += len(answer.prompt_ids)
                self.tokens_written += len(answer.ids)
                self.tokens_saved += answer.saved
            else:
                self._take_back()
            self._held.leave()

    def _stream(self, answer: Answer) -> ToolCallStream | CallListStream | None:
        """What finds the calls in an answer."""
        if not self.tools or self.tool_choice == "none":
            return None
        return (
            ToolCallStream()
            if self._chat.call_token is None
            else CallListStream(answer, len(self.messages))
        )

    def _shorten_results(self) -> bool:
        """Put an error in the place of the longest result that the model has not read;

        False if there is none.
        """
        results = [
            m
            for m in self.messages[self._held.messages :]
            if m["role"] == "tool" and "content" in m
        ]
        if not results:
            return False
        longest = max(results, key=lambda message: len(message["content"]))
        size = len(longest.pop("content"))
        problem = f"the result is too long: {size:,} characters"
        longest["error"] = feedback.not_executed(
            longest["name"], problem, "tool_call_id" not in longest
        )
        return True

    def _take_back(self) -> None:
        """Forget what the user said if no answer to it was heard; results of functions stay, they
        have happened.
        """
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def _encode(self) -> list[int]:
        """The ids to read next: all of the conversation, or what follows the last answer."""
        tools = list(self.tools.values()) or None
        history, new = (
            self.messages[: max(self._held.messages - 1, 0)],
            self.messages[self._held.messages :],
        )
        try:
            if self.tokens_held and self._chat.can_go_on(history, new, tools):
                return self._chat.go_on(self.tokenizer, new)
            ids = self._chat.begin(self.tokenizer, self.messages, tools)
            self._held.forget()
            return ids
        except ValueError as error:
            raise ConversationError(str(error)) from error

    def _results(self, reply: Reply) -> Iterator[Event]:
        """Run the calls; each outcome is a message and an event."""
        if self.parallel:
            ran = outcomes_together(reply.calls, self.tools, self.time_limit)
            self.messages += [
                message for _, message in ran
            ]  # all have happened, whoever is still listening
            yield from (event for event, _ in ran)
        else:
            for call in reply.calls:
                event, message = outcome(call, self.tools, self.time_limit)
                self.messages.append(message)
                yield event
        for error in reply.errors:  # they were events when they were found
            self.messages.append(
                {"role": "tool", "name": "", "error": feedback.not_readable(error.message)}
            )

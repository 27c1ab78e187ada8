"""A conversation: the user speaks, the model answers, calls functions, reads results, and answers.

The decoder keeps its tokens between the turns, so that each turn costs only its own tokens.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mistral.chat.answer import Answer, one_row
from mistral.chat.events import End, Event, Text
from mistral.chat.formats import chat_format, choose_format
from mistral.chat.formats.tool_calls import Reply
from mistral.chat.held import Held
from mistral.chat.saved import read_lines, write_lines
from mistral.chat.tool_choice import call_constraints, check_tool_choice
from mistral.chat.tools import Tool, feedback, tool_table
from mistral.chat.tools.outcomes import outcome, outcomes_together
from mistral.engine.base import Engine
from mistral.errors import ConversationError
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer


class Conversation:
    """A chat with a model, kept in the decoder's cache.

    model_or_decoder  a model (a `Decoder` is created for it), or any empty engine for one row,
                      used by this conversation alone
    tools             functions that the model may call; needs the extra `chat`
    system            the system message
    sampling          None: greedy
    grammar           allow only calls that the tools' schemas allow (needs the extra `chat`). A
                      schema that no grammar can express causes a warning, and calls are then
                      checked only after they are written.
    tool_choice       "auto"; "none"; "required": the first answer is a call; or the name of the
                      tool to call first. The last two need the grammar.
    format            a name in `mistral.chat.formats.FORMATS`; None: chosen by the checkpoint's
                      control tokens
    max_rounds        how many answers may follow one message of the user
    max_new_tokens    of one answer
    max_tokens        room in the cache of a model without a window; None: max_position_embeddings
    time_limit        seconds for one function; None: no limit
    parallel          run the functions of one answer at the same time

    messages        in the form of OpenAI's interface; an assistant's content is the model's text,
                    calls in `<tool_call>` included
    tokens_read     how many tokens were prefilled
    tokens_written  how many tokens were generated
    tokens_saved    how many of those the grammar forced, without a forward pass of their own

    Raises ValueError for arguments that contradict each other or are out of range.
    """

    def __init__(  # noqa: PLR0913
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
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling(temperature=0)
        self.max_rounds = max_rounds
        self.max_new_tokens = max_new_tokens
        self.time_limit = time_limit
        self.parallel = parallel
        self.tool_choice = tool_choice
        self.decoder = one_row(model_or_decoder, max_tokens)
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.tokens_read = 0
        self.tokens_written = 0
        self.tokens_saved = 0
        self._held = Held(self.decoder)
        self._constraints = call_constraints(
            self.decoder, tokenizer, self._chat, self.tools, tool_choice, grammar
        )
        self._speaking: Iterator[Event] | None = None  # the answer in progress

    @property
    def tokens_held(self) -> int:
        """How many tokens of the conversation the decoder holds; 0: it will prefill all of it."""
        return self._held.tokens

    def say(self, text: str) -> Iterator[Event]:
        """Say something; yields the answer as events while it is written, `End` last.

        End's reason: "stop", "length" (max_new_tokens), or "max_rounds". If the caller stops
        listening (by Ctrl-C, or by saying something else), the part that was heard stays. Raises
        ConversationError, and leaves the conversation as it was, for text that is empty or not
        valid Unicode, when the conversation becomes too long, and if something else used its
        decoder.
        """
        if not isinstance(text, str) or not text:
            raise ConversationError("there is nothing to say: the text is empty")
        self._stop_speaking()
        self._speaking = self._rounds({"role": "user", "content": text})
        return self._speaking

    def reset(self) -> None:
        """Forget all messages except for the system message."""
        self._stop_speaking()
        self._held.forget()
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]

    def save(self, path: str | Path) -> None:
        """Write the format, the tools and the messages as JSON lines, the whole file or nothing."""
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
        """Continue a saved conversation; `options` are those of the constructor.

        Functions are not saved: `tools` must be those of the conversation. Raises
        ConversationError if they differ, for the options system and format, which the file has,
        and for a file that is not a saved conversation.
        """
        if given := [name for name in ("format", "system") if options.get(name) is not None]:
            raise ConversationError(f"{path} has a {' and a '.join(given)} already: leave them out")
        head, *messages = read_lines(Path(path))
        options = options | {"format": head["format"]}
        loaded = cls(model_or_decoder, tokenizer, tools=tools, **options)
        if head.get("tools") != loaded._schemas():
            raise ConversationError(
                f"{path} is a conversation with other tools; pass those that it began with"
            )
        try:
            if messages:
                tools = list(loaded.tools.values()) or None
                loaded._chat.begin(tokenizer, messages, tools, generate=False)
        except ValueError as error:
            raise ConversationError(f"{path}: {error}") from error
        loaded.messages = messages
        return loaded

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
            reply = Reply.of(events)
            choice = "none" if self.tool_choice == "none" else "auto"
            if answer.reason == "length" or not (reply.calls or reply.errors):
                yield End(answer.reason)
                return
            if round < self.max_rounds - 1:
                yield from self._results(reply)
        yield End("max_rounds")

    def _stop_speaking(self) -> None:
        """End an answer that the caller may still listen to."""
        if self._speaking is not None:
            self._speaking.close()

    def _begin_answer(self, choice: str) -> Answer:
        """Prefill the part of the conversation that the decoder does not hold."""
        try:
            self._held.go_back()
            ids = self._encode()
            limit = self.decoder.limit
            while self.tokens_held + len(ids) >= limit and self._shorten_results():
                ids = self._encode()
            if (tokens := self.tokens_held + len(ids)) >= limit:
                raise ConversationError(
                    f"the conversation would have {tokens} tokens, and there is room for {limit}: "
                    "reset it, or say less"
                )
        except ConversationError:
            self._take_back()
            raise
        return Answer(
            decoder=self.decoder,
            tokenizer=self.tokenizer,
            chat=self._chat,
            prompt_ids=ids,
            sampling=self.sampling,
            constraint=self._constraints[choice].copy(),
            max_new_tokens=self.max_new_tokens,
        )

    def _listen(self, answer: Answer) -> Iterator[Event]:
        """The events of one answer; the conversation keeps the part that was heard."""
        may_call = bool(self.tools) and self.tool_choice != "none"
        try:
            if may_call:
                yield from answer.events(len(self.messages))
            else:
                yield from map(Text, answer)
        finally:
            answer.settle()
            if answer.ids or answer.reason != "interrupted":
                self.messages.append(answer.message())
                self._held.add(len(answer.prompt_ids) + len(answer.ids), len(self.messages))
                self.tokens_read += len(answer.prompt_ids)
                self.tokens_written += len(answer.ids)
                self.tokens_saved += answer.saved
            else:
                self._take_back()
            self._held.leave()

    def _shorten_results(self) -> bool:
        """Replace the longest result that the model has not read by an error; False without one."""
        new = self.messages[self._held.messages :]
        results = [m for m in new if m["role"] == "tool" and "content" in m]
        if not results:
            return False
        longest = max(results, key=lambda message: len(message["content"]))
        size = len(longest.pop("content"))
        problem = f"the result is too long: {size:,} characters"
        tags = "tool_call_id" not in longest
        longest["error"] = feedback.not_executed(longest["name"], problem, tags)
        return True

    def _take_back(self) -> None:
        """Forget the user's message if no answer was heard; results stay, the functions ran."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def _encode(self) -> list[int]:
        """The ids to prefill: the whole conversation, or the messages after the last answer."""
        tools = list(self.tools.values()) or None
        history = self.messages[: max(self._held.messages - 1, 0)]
        new = self.messages[self._held.messages :]
        try:
            if self.tokens_held and self._chat.can_extend(history, new, tools):
                return self._chat.extend(self.tokenizer, new)
            ids = self._chat.begin(self.tokenizer, self.messages, tools)
            self._held.forget()
            return ids
        except ValueError as error:
            raise ConversationError(str(error)) from error

    def _results(self, reply: Reply) -> Iterator[Event]:
        """Run the calls; each outcome is a message and an event."""
        if self.parallel:
            ran = outcomes_together(reply.calls, self.tools, self.time_limit)
            # All functions ran, even if the caller stops listening.
            self.messages += [message for _, message in ran]
            yield from (event for event, _ in ran)
        else:
            for call in reply.calls:
                event, message = outcome(call, self.tools, self.time_limit)
                self.messages.append(message)
                yield event
        for error in reply.errors:  # their events were yielded when they were found
            problem = feedback.not_readable(error.message)
            self.messages.append({"role": "tool", "name": "", "error": problem})

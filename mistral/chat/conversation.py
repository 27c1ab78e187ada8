"""A conversation: the user speaks, the model answers, calls functions, reads results, and answers.

The decoder keeps its tokens between the turns, so that each turn costs only its own tokens.
"""

import copy
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral.chat.answer import Answer, one_row
from mistral.chat.events import End, Error, Event, Text
from mistral.chat.fitting import Fitting
from mistral.chat.formats import chat_format, choose_format
from mistral.chat.formats.messages import as_mapping
from mistral.chat.formats.tool_calls import Reply
from mistral.chat.held import Held
from mistral.chat.saved import read_lines, without_descriptions, write_lines
from mistral.chat.tool_choice import call_constraints, check_tool_choice
from mistral.chat.tools import Tool, feedback, tool_table
from mistral.chat.tools.outcomes import OpenCall, call_key, run_calls
from mistral.engine.base import Engine
from mistral.errors import ConversationError, shown
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
    stop              strings that end an answer, and are not part of it; not in a call
    trim              forget the oldest turns when the cache is full, which is an event; False: that
                      is an error. A model with a window forgets by itself.

    messages        in the form of OpenAI's interface; an assistant's content is the model's text,
                    calls in `<tool_call>` included. You may edit, remove and replace them: what the
                    model has read otherwise is prefilled again.
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
        stop: Sequence[str] = (),
        trim: bool = False,
    ):
        if isinstance(stop, str) or not all(stop):
            raise ConversationError(f"stop takes a list of non-empty strings, not {shown(stop)}")
        if max_rounds < 1 or max_new_tokens < 1:
            raise ConversationError("max_rounds and max_new_tokens must be 1 or more")
        self.tools = tool_table(tools)
        self.format = choose_format(tokenizer) if format is None else format
        try:
            self._chat = chat_format(tokenizer, self.format)
        except ValueError as error:
            raise ConversationError(str(error)) from None
        check_tool_choice(tool_choice, self.tools, self.format)
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling(temperature=0)
        self.max_rounds = max_rounds
        self.max_new_tokens = max_new_tokens
        self.time_limit = time_limit
        self.parallel = parallel
        self.stop = tuple(stop)
        self.trim = trim
        self.tool_choice = tool_choice
        self.decoder = one_row(model_or_decoder, max_tokens)
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.tokens_read = 0
        self.tokens_written = 0
        self.tokens_saved = 0
        self._unanswered: list[Any] = []  # the messages before the user's last one
        self._asked: list[dict[str, Any]] = []  # copies of those that the answer in progress reads
        self._held = Held(self.decoder)
        self._constraints = call_constraints(
            self.decoder, tokenizer, self._chat, self.tools, tool_choice, grammar
        )
        # The answer in progress. A caller who leaves its loop lets go of it, which ends it.
        self._speaking: weakref.ref[Iterator[Event]] | None = None

    @property
    def tokens_held(self) -> int:
        """How many tokens of the conversation the decoder holds; 0: it will prefill all of it."""
        return len(self._held.ids)

    def say(self, text: str) -> Iterator[Event]:
        """Say something; yields the answer as events while it is written, `End` last.

        End's reason: "stop", "length" (max_new_tokens), "max_rounds", or "repeated_call" (the same
        call had no result twice in a row). If the caller stops listening (by leaving the loop, by
        Ctrl-C, or by saying something else), the part that was heard stays, and every call in it
        has a result or a text that says what is known of it. Raises ConversationError, and leaves
        the conversation as it was, for text that is empty or not valid Unicode, when the
        conversation becomes too long, and if something else used its decoder.
        """
        if not isinstance(text, str) or not text:
            raise ConversationError("there is nothing to say: the text is empty")
        self._stop_speaking()
        return self._speak({"role": "user", "content": text})

    def retry(self) -> Iterator[Event]:
        """Answer the last message of the user again; the previous answer is forgotten.

        Functions that the previous answer called have run. With the same `sampling` the text is the
        same, too: change its seed first. Events and errors as from `say`.
        """
        self._stop_speaking()
        self._last_users()
        return self._speak(None)

    def undo(self) -> list[dict[str, Any]]:
        """Remove and return the last message of the user and all messages after it.

        Raises ConversationError if there is none.
        """
        self._stop_speaking()
        start = self._last_users()
        removed = self.messages[start:]
        del self.messages[start:]
        return removed

    def reset(self) -> None:
        """Forget all messages except for the system message."""
        self._stop_speaking()
        self._held.forget()
        self.messages = [m for m in self.messages[:1] if _role(m) in ("system", "developer")]

    def save(self, path: str | Path) -> None:
        """Write the format, the tools and the messages as JSON lines, the whole file or nothing.

        An answer that the caller still listens to is ended.
        """
        self._stop_speaking()
        write_lines(
            Path(path),
            [{"format": self.format, "tools": self._schemas()}, *map(as_mapping, self.messages)],
        )

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

        Functions are not saved: `tools` must be those of the conversation; other descriptions cause
        a warning. Raises ConversationError if they differ, for the options system and format, which
        the file has, and for a file that is not a saved conversation.
        """
        if given := [name for name in ("format", "system") if options.get(name) is not None]:
            raise ConversationError(f"{path} has a {' and a '.join(given)} already: leave them out")
        head, *messages = read_lines(Path(path))
        options = options | {"format": head["format"]}
        loaded = cls(model_or_decoder, tokenizer, tools=tools, **options)
        saved, schemas = head.get("tools"), loaded._schemas()
        if without_descriptions(saved) != without_descriptions(schemas):
            raise ConversationError(
                f"{path} is a conversation with other tools; pass those that it began with "
                "as tools=..."
            )
        if saved != schemas:
            warnings.warn(
                f"{path} was saved with other descriptions of its tools: the model reads the new",
                stacklevel=2,
            )
        try:
            if messages:
                tools = list(loaded.tools.values()) or None
                loaded._chat.begin(tokenizer, messages, tools, generate=False)
        except ValueError as error:
            raise ConversationError(f"{path}: {error}") from error
        if head.get("branches"):  # the chat window wrote the file
            warnings.warn(
                f"{path} has other branches: they are left out, also when this one is saved",
                stacklevel=2,
            )
        loaded.messages = messages
        return loaded

    @property
    def _may_call(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    def _schemas(self) -> list[dict[str, Any]]:
        return [tool.schema() for tool in self.tools.values()]

    def _last_users(self) -> int:
        """The place of the last message of the user. ConversationError without one."""
        for i in reversed(range(len(self.messages))):
            if _role(self.messages[i]) == "user":
                return i
        raise ConversationError("the conversation has no message of the user")

    def _speak(self, message: dict[str, Any] | None) -> Iterator[Event]:
        speaking = self._rounds(message)
        self._speaking = weakref.ref(speaking)
        return speaking

    def _rounds(self, message: dict[str, Any] | None) -> Iterator[Event]:
        """Answer a message of the user; None: the last one, again."""
        self._unanswered = list(self.messages)
        if message is None:
            del self.messages[self._last_users() + 1 :]
        else:
            self.messages.append(message)
        choice = self.tool_choice
        # The calls of the previous answer that have no result; None: one that cannot be parsed
        previous: dict[str, OpenCall | None] = {}
        for round in range(self.max_rounds):
            answer, events = self._begin_answer(choice)
            calls: list[OpenCall] = []
            try:
                for event in self._listen(answer, tuple(events)):
                    events.append(event)
                    yield event
            finally:
                # Every call has its message, even if it is never run.
                called = answer.calls if self._may_call else []
                calls += [OpenCall(one, self.tools, previous.get(call_key(one))) for one in called]
                self.messages += [call.message for call in calls]
            errors = Reply.of(events).errors
            choice = "none" if self.tool_choice == "none" else "auto"
            if answer.reason == "length" or not (calls or errors):
                yield End(answer.reason)
                return
            if round == self.max_rounds - 1:
                break
            failed = yield from self._results(calls, errors, previous)
            if failed.keys() & previous.keys():
                yield End("repeated_call")
                return
            previous = failed
        yield End("max_rounds")

    def _stop_speaking(self) -> None:
        """End an answer that the caller may still listen to."""
        speaking = self._speaking and self._speaking()
        if speaking is not None:
            speaking.close()

    def _begin_answer(self, choice: str) -> tuple[Answer, list[Event]]:
        """The answer, which prefills what the decoder does not hold, and what was done to fit."""
        try:
            self._held.go_back()
            ids, events = self._encode_to_fit()
        except ConversationError:
            self._take_back()
            raise
        answer = Answer(
            decoder=self.decoder,
            tokenizer=self.tokenizer,
            chat=self._chat,
            prompt_ids=ids,
            sampling=self.sampling,
            constraint=self._constraints[choice].copy(),
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
        )
        return answer, events

    def _encode_to_fit(self) -> tuple[list[int], list[Event]]:
        """The ids to prefill, and what was done to the messages so that they fit."""
        messages = [as_mapping(message) for message in self.messages]
        encoded: tuple[list[int], list[int]] = ([], [])

        def count() -> int:
            nonlocal encoded
            encoded = self._encode(messages)
            return sum(map(len, encoded))

        read = self._held.count_read(messages)
        fitting = Fitting(messages, read, self.decoder.limit, self.max_new_tokens)
        fitting.fit(count, self.trim)
        self.messages[:] = messages
        self._asked = copy.deepcopy(messages)
        held, ids = encoded
        if not held:
            ids = ids[self._held.keep(ids) :]
        return ids, fitting.events

    def _encode(self, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
        """The ids that the decoder holds, and those that follow; or none, and all ids."""
        tools = list(self.tools.values()) or None
        read = self._held.count_read(messages)
        history = messages[: max(read - 1, 0)]
        new = messages[read:]
        try:
            if read and new and self._chat.can_extend(history, new, tools):
                return self._held.ids, self._chat.extend(self.tokenizer, new)
            return [], self._chat.begin(self.tokenizer, messages, tools)
        except ValueError as error:
            raise ConversationError(str(error)) from error

    def _listen(self, answer: Answer, first: Sequence[Event]) -> Iterator[Event]:
        """`first` and the events of one answer; the conversation keeps the part that was heard."""
        try:
            yield from first
            if self._may_call:
                yield from answer.events(len(self.messages))
            else:
                yield from map(Text, answer)
        finally:
            answer.settle()
            if answer.ids or answer.reason != "interrupted":
                message = answer.message()
                self.messages.append(message)
                read = [*self._asked, message] if answer.whole else []
                self._held.add([*answer.prompt_ids, *answer.ids], read)
                self.tokens_read += len(answer.prompt_ids)
                self.tokens_written += len(answer.ids)
                self.tokens_saved += answer.saved
            else:
                self._take_back()
            self._held.leave()

    def _take_back(self) -> None:
        """Restore the messages if no answer was heard; results stay, the functions ran."""
        if self.messages and _role(self.messages[-1]) == "user":
            self.messages[:] = self._unanswered

    def _results(
        self,
        calls: Sequence[OpenCall],
        errors: Sequence[Error],
        previous: Mapping[str, OpenCall | None],
    ) -> Generator[Event, None, dict[str, OpenCall | None]]:
        """Run the calls; each outcome is a message and events. Returns those without a result.

        previous  those of the previous answer that have none
        """
        failed: dict[str, OpenCall | None] = {}
        for error in errors:  # their events were yielded when they were found
            problem = feedback.not_readable(error.message, repeated=error.source in previous)
            self.messages.append({"role": "tool", "name": "", "error": problem})
            failed[error.source] = None
        yield from run_calls(calls, self.time_limit, self.parallel)
        return failed | {call.key: call for call in calls if call.failed}


def _role(message: Any) -> Any:
    return as_mapping(message).get("role")

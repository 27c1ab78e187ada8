"""The commands of a chat: lines that begin with /."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import common

from chat_parts.answers import show_answer
from chat_parts.line_editor import confirm
from mistral.chat import Conversation
from mistral.chat.saved import read_lines
from mistral.chat.tools import Tool
from mistral.engine.base import Engine
from mistral.errors import one_line
from mistral.files import expanded
from mistral.printable import on_one_line
from mistral.tokenizer import Tokenizer

HELP = """/undo           forget the last question and its answer
/retry          answer the last question again; with --seed, with the next seed
/reset          forget what was said
/system TEXT    begin anew with this system message (none: without one)
/tools          list the functions that the model may call
/save FILE      write the conversation as JSON lines
/load FILE      continue a saved one
/help           this list
/quit           leave (or Ctrl-D)
Ctrl-C stops an answer. What you paste is one message. A line that ends with \\
continues in the next one. A line of \"\"\" begins a longer text, and another one ends it."""


class Chat:
    """A conversation with a person in a terminal, whose commands replace, undo and save it.

    system   the system message
    format   chat format; None: chosen by the vocabulary
    load     a saved conversation, which has its own system message and format
    options  more arguments of `Conversation`, the tools among them
    """

    def __init__(
        self,
        decoder: Engine,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        format: str | None = None,
        load: Path | None = None,
        **options: object,
    ):
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._format = format
        self._options = options
        self._saved: list[dict] = []  # the messages that are in a file
        self._file: Path | None = None  # the last one that this chat wrote or read
        self._commands: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/retry": self._retry,
            "/reset": self._reset,
            "/system": self._system,
            "/tools": self._list_tools,
            "/save": self._save,
            "/load": self._load,
            "/help": self._help,
            "/quit": self._quit,
            "/exit": self._quit,
        }
        self.conversation = self._begin(system) if load is None else self._resume(load)

    def say(self, text: str) -> None:
        """Show the answer to a message."""
        show_answer(self.conversation, self.conversation.say(text))

    def obey(self, line: str) -> None:
        """Run the command in the line. EOFError: leave; ValueError, OSError: it did nothing."""
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ValueError(f"there is no command {name}; /help lists them")
        self._commands[name](rest.strip())

    def _begin(self, system: str | None) -> Conversation:
        self._decoder.rewind(self._decoder.lengths[0])
        return Conversation(
            self._decoder, self._tokenizer, system=system, format=self._format, **self._options
        )

    def _resume(self, path: Path) -> Conversation:
        # If the file cannot be loaded, the previous conversation is prefilled again.
        self._decoder.rewind(self._decoder.lengths[0])
        conversation = Conversation.load(path, self._decoder, self._tokenizer, **self._options)
        self._saved = copy.deepcopy(conversation.messages)
        self._file = expanded(path)
        return conversation

    def _may_forget(self) -> bool:
        """Whether the messages may be forgotten; the person is asked if they are in no file."""
        messages = self.conversation.messages
        is_lost = messages != self._saved and any(m.get("role") == "user" for m in messages)
        if not is_lost or confirm(f"Forget {len(messages)} messages that are not saved?"):
            return True
        common.note("nothing was forgotten", style="dim")
        return False

    def _undo(self, _: str) -> None:
        question = self.conversation.undo()[0]["content"]
        left = _count(self.conversation.messages)
        common.note(f"forgot: {one_line(str(question), 60)} | {left}", style="dim")

    def _retry(self, _: str) -> None:
        sampling = self.conversation.sampling
        if sampling.temperature == 0:
            common.note("note: at --temperature 0 the answer stays the same", style="dim")
        if sampling.seed is not None:  # the same seed would make the same answer
            sampling = replace(sampling, seed=(sampling.seed + 1) % 2**64)
            self.conversation.sampling = sampling
        show_answer(self.conversation, self.conversation.retry())

    def _reset(self, _: str) -> None:
        if self._may_forget():
            self.conversation.reset()

    def _system(self, text: str) -> None:
        if self._may_forget():
            self.conversation = self._begin(text or None)

    def _list_tools(self, _: str) -> None:
        if not self.conversation.tools:
            common.note("there are none; --tools FILE names a Python file that makes some")
        for tool in self.conversation.tools.values():
            common.note(signature(tool))

    def _save(self, name: str) -> None:
        path = self._named("/save", name)
        is_other = path.exists() and path != self._file
        if is_other and not confirm(f"Replace {on_one_line(path)}?"):
            return
        self.conversation.save(path)
        self._saved = copy.deepcopy(self.conversation.messages)
        self._file = path
        common.note(f"wrote {path}", style="dim")

    def _load(self, name: str) -> None:
        path = self._named("/load", name)
        read_lines(path)  # its errors come before the question
        if self._may_forget():
            self.conversation = self._resume(path)
            common.note(_count(self.conversation.messages), style="dim")

    def _named(self, command: str, name: str) -> Path:
        """The path that a command names, with ~ as the home. ValueError for none."""
        if not name:
            raise ValueError(f"{command} needs the name of a file")
        return expanded(name)

    def _help(self, _: str) -> None:
        for line in HELP.splitlines():
            common.note(line)

    def _quit(self, _: str) -> None:
        raise EOFError


def _count(messages: list[dict]) -> str:
    return f"{len(messages)} message{'' if len(messages) == 1 else 's'}"


def signature(tool: Tool) -> str:
    """A tool on one line: calculate(expression: string)  Calculate an arithmetic expression."""
    parameters = tool.parameters.get("properties", {})
    typed = [f"{name}: {_type_name(schema)}" for name, schema in parameters.items()]
    description = one_line(tool.description.partition("\n")[0])
    return f"{tool.name}({', '.join(typed)})  {description}"


def _type_name(schema: object) -> str:
    """The type that a schema names, if it is a simple one."""
    named = schema.get("type") if isinstance(schema, dict) else None
    return named if isinstance(named, str) else "any"

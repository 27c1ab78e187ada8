"""scripts/chat.py at a terminal: what it asks, shows, shortens and keeps."""

import argparse
import io
import json
import os
import re
import sys
from dataclasses import replace

import chat
import common
import console
import pytest
import serve
import small
from chat_parts import answers, commands, line_editor
from scripted import TOKENIZER, Scripted, call
from terminal import Terminal

from mistral.chat import Conversation, tool
from mistral.printable import printable

COLOURS = re.compile(r"\x1b\[[\d;]*m")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def at_terminal(monkeypatch, tmp_path):
    """Starts scripts/chat.py at a terminal, with an engine that writes the given answers."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NO_COLOR", raising=False)

    def start(*written, options=(), fail_after=None, **terminal):
        engine = Scripted(*written, fail_after=fail_after)
        monkeypatch.setattr(sys, "argv", ["chat.py", "--engine", "eager", *map(str, options)])
        monkeypatch.setattr(common, "load", lambda args: (None, TOKENIZER))
        monkeypatch.setattr(common, "open_chat_engine", lambda *_: (engine, "engine: scripted"))
        return Terminal(chat.main, **{"TERM": "dumb"} | terminal)

    return start


def test_what_would_be_lost_is_asked_about_and_what_is_saved_is_not(at_terminal, tmp_path):
    terminal = at_terminal("One.", "Two.", "Three.")
    terminal.until("/help lists the commands")
    terminal.type("/reset\rHello\r")  # nothing is lost by the first
    terminal.until("[")
    assert "Forget" not in terminal.until("2 tokens")
    terminal.type("/load ~/missing\r")
    assert "Forget" not in terminal.until("No such file")
    terminal.type("/system Be brief.\r")
    terminal.until("Forget 2 messages that are not saved? [y/N] ")
    terminal.type("\r")
    terminal.until("nothing was forgotten")
    terminal.type("/save ~/talk.jsonl\r")
    terminal.until(f"wrote {tmp_path}/talk.jsonl")
    terminal.type("/system Be brief.\rAgain\r")
    assert "Forget" not in terminal.until("Two.")
    terminal.type("/reset\r")
    terminal.until("Forget 3 messages that are not saved? [y/N] ")
    terminal.type("y\r/undo\r")
    terminal.until("error: the conversation has no message of the user")
    terminal.type("/load ~/talk.jsonl\r")
    terminal.until("2 messages")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end()[0] == 0
    _, *messages = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [message["content"].strip() for message in messages] == ["Hello", "One."]


def test_another_file_is_replaced_only_if_the_person_agrees(at_terminal, tmp_path):
    (tmp_path / "mine").write_text("dear")
    terminal = at_terminal("One.")
    terminal.type("Hello\r/save ~/mine\r")
    terminal.until(f"Replace {tmp_path}/mine? [y/N] ")
    terminal.type("\r/quit\r")  # Enter alone is no
    assert terminal.end()[0] == 0
    assert (tmp_path / "mine").read_text() == "dear"
    terminal = at_terminal("One.")
    terminal.type("Hello\r/save ~/mine\ry\r/save ~/mine\r/quit\r")
    code, screen = terminal.end()
    assert (code, screen.count("[y/N]"), screen.count("wrote")) == (0, 1, 2)
    assert (tmp_path / "mine").read_text() != "dear"


def test_ctrl_c_keeps_what_was_written_and_the_chat_continues(at_terminal, tmp_path):
    terminal = at_terminal("One two three four five.", "Six.", fail_after=14)
    terminal.type("Hello\r")
    terminal.until(", stopped]")
    terminal.type(f"/save {tmp_path}/talk.jsonl\r")
    terminal.type("/quit\r")
    code, screen = terminal.end()
    assert (code, "Traceback" in screen) == (0, False)
    _, *messages = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert "One two three four five.".startswith(messages[1]["content"].strip())


def test_ctrl_c_with_a_prompt_ends_the_script(at_terminal):
    options = ("--prompt", "Hello", "--prompt", "Again")
    terminal = at_terminal("One two three four five.", "Six.", fail_after=14, options=options)
    code, screen = terminal.end()
    assert (code, "Again" in screen, ", stopped]" in screen) == (130, False, True)


LONG = """from mistral.chat import tool

@tool
def read_all() -> str:
    "Read a long text.\\n\\nThe rest."
    return "[red]\\x1b[31m" + "word " * 200
"""


@pytest.mark.parametrize("columns", [40, 100])
def test_long_results_are_shortened_on_the_screen_and_whole_in_the_file(
    columns, at_terminal, tmp_path
):
    (tmp_path / "tools.py").write_text(LONG)
    options = ("--tools", tmp_path / "tools.py", "--no-grammar")
    terminal = at_terminal(
        call("read_all"), "Done.", options=options, columns=columns, TERM="xterm"
    )
    terminal.type("/tools\rGo\r")
    lines = terminal.until("Done.").replace("\r", "").splitlines()
    terminal.type(f"/save {tmp_path}/talk.jsonl\r/quit\r")
    terminal.end()
    assert any(line.endswith("read_all()  Read a long text.") for line in lines)
    [result] = [line for line in lines if "result  " in line]
    shown = COLOURS.sub("", result)
    assert printable(shown) == shown
    assert result != shown  # it has a colour
    kept, left_out = re.fullmatch(r"  result  (.*) \.\.\. ([\d,]+) more characters", shown).groups()
    whole = 1 + len("[red]\\u001b[31m") + 5 * 200 + 1
    assert kept.startswith('"[red]\\u001b[31mword word')
    assert len(kept) + int(left_out.replace(",", "")) == whole
    assert 2 * columns < len(shown) <= 3 * columns
    messages = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert messages[3]["content"] == "[red]\x1b[31m" + "word " * 200


@pytest.mark.parametrize(
    ("environment", "has_colours"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
    ids=["xterm", "NO_COLOR", "dumb"],
)
def test_colours_are_for_terminals_that_want_them(environment, has_colours, at_terminal):
    hostile = "a\x1b[2Jb \x9b31m [bold]c[/bold] :smile:"
    terminal = at_terminal(hostile, options=("--prompt", f"Hi {hostile}"), **environment)
    code, screen = terminal.end()
    assert code == 0
    assert bool(COLOURS.search(screen)) == has_colours
    plain = COLOURS.sub("", screen.replace("\r\n", "\n"))
    assert printable(plain) == plain
    assert plain.count(printable(hostile)) == 2  # the question and the answer


def test_a_stream_that_is_no_terminal_gets_no_colour(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert console.styled("a", "bold red", io.StringIO()) == "a"


def test_an_ascii_console_shows_the_rest(at_terminal):
    terminal = at_terminal("naïve 日本", options=("--prompt", "Hi"), encoding="ascii")
    code, screen = terminal.end()
    assert (code, "na?ve ??" in screen) == (0, True)


def test_a_person_is_told_what_to_ask_and_a_pipe_is_not(at_terminal, run_here, monkeypatch):
    terminal = at_terminal()
    terminal.type("/quit\r")
    assert chat._HINT in terminal.end()[1]
    terminal = at_terminal(options=("--tools", small.ROOT / "scripts/example_tools.py"))
    terminal.type("/quit\r")
    screen = terminal.end()[1]
    assert chat._HINT_FOR_TOOLS in screen
    assert "tools: calculate, current_time" in screen
    monkeypatch.setattr(sys, "stdin", io.StringIO("/system new\n"))
    code, out, err = run_here("chat", "--engine", "eager")
    assert (code, out, chat._HINT in err) == (0, "", False)


def test_the_demo_knows_what_the_hint_names():
    from demo import talk

    known = {question for questions, _ in talk.TALK for question in questions}
    assert set(re.findall('"(.*?)"', chat._HINT)) <= known
    window = serve.first_questions(argparse.Namespace(model="demo", tools=None))
    assert len(window) == 3 and {text for _, text in window} <= known


def test_the_help_lists_every_command():
    listed = set(re.findall(r"^/\w+", commands.HELP, re.M))
    assert listed | {"/exit"} == set(commands.Chat(Scripted(), TOKENIZER)._commands)


def test_a_line_says_how_a_tool_is_called():
    @tool
    def find(name: str, limit: int = 3, tags: list[str] | None = None) -> str:
        """Find a thing.

        It has a second paragraph.
        """

    assert (
        commands.signature(find) == "find(name: string, limit: integer, tags: array)  Find a thing."
    )


def noted(conversation, capsys):
    """The note after an answer to "Go"."""
    answers.show_answer(conversation, conversation.say("Go"))
    return capsys.readouterr().err.strip()


def test_the_note_is_short_and_says_more_when_there_is_more_to_say(capsys):
    assert re.fullmatch(r"\[5 tokens, [\d.]+ tokens/s\]", noted(talk("a b c d e"), capsys))
    assert re.fullmatch(r"\[1 token in [\d.]+ s\]", noted(talk("a"), capsys))
    note = noted(talk("a b c d e", max_new_tokens=3), capsys)
    assert note.endswith(" tokens/s, cut off at --max-new-tokens]")
    assert re.search(
        r"s, \d+ of 40 tokens of the conversation\]", noted(talk("a " * 24, limit=40), capsys)
    )

    assert "window" not in noted(talk("a b c d e", window=4096), capsys)
    assert re.search(r"s, \d+ have left the window\]", noted(talk("a " * 24, window=20), capsys))

    @tool
    def fail() -> str:
        """Fail."""
        raise ValueError("no")

    note = noted(talk(call("fail"), call("fail"), tools=[fail], grammar=False), capsys)
    assert re.fullmatch(r"\[\d+ tokens in [\d.]+ s, ended: the same call failed twice\]", note)


def talk(*written, limit=4096, window=None, **options):
    """A conversation with a model without a window that writes these answers."""
    engine = Scripted(*written, limit=limit)
    engine.config = replace(engine.config, sliding_window=window)
    return Conversation(engine, TOKENIZER, **options)


def test_ctrl_c_at_a_prompt_drops_what_was_typed_and_is_no(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert line_editor.read_message() == ""
    assert "Ctrl-D or /quit leaves" in capsys.readouterr().err
    assert not line_editor.confirm("Forget all?")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(KeyboardInterrupt):
        line_editor.read_message()


def test_commands_from_a_pipe_are_not_asked_about(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert line_editor.confirm("Forget all?")

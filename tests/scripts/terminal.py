"""A pseudo-terminal for a script that runs in a fork of the test, which has imported everything."""

import os
import pty
import select
import sys

import common
import console


class Terminal:
    """Runs `main` as a script at a terminal, to which the test types.

    screen  what the terminal was sent and `until` has not passed yet
    """

    def __init__(self, main, *, columns=80, encoding="utf-8", **environment):
        self.screen = ""
        self._child, self._terminal = pty.fork()
        if self._child == 0:
            self._run(main, encoding, {"COLUMNS": str(columns), **environment})

    @staticmethod
    def _run(main, encoding, environment):
        code = 99
        try:
            os.environ.update(environment)
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                mode = "w" if number else "r"
                setattr(sys, name, os.fdopen(number, mode, encoding=encoding, closefd=False))
            console._prepare()
            common.run(main)
        except SystemExit as ended:
            code = ended.code
        finally:
            os._exit(code)

    def type(self, text):
        """Send keys: \\r is Enter, \\x03 Ctrl-C, \\x04 Ctrl-D."""
        os.write(self._terminal, text.encode())

    def until(self, words):
        """What appears up to these words; fails if nothing comes for 20 s."""
        while words not in self.screen and (more := self._read()):
            self.screen += more
        assert words in self.screen, self.screen
        passed, _, self.screen = self.screen.partition(words)
        return passed

    def end(self):
        """The exit code and the rest of what appears."""
        while more := self._read():
            self.screen += more
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._child, 0)[1]), self.screen

    def _read(self):
        if not select.select([self._terminal], [], [], 20)[0]:
            return ""
        try:
            return os.read(self._terminal, 1 << 16).decode(errors="replace")
        except OSError:  # Linux reports the end in this way
            return ""

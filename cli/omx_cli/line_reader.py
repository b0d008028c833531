"""Reads what a person writes at the prompt: with history, over several lines between three quotes.

The standard readline: it is there wherever Python is, knows everybody's key bindings, and takes a
millisecond to load.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

from omx_cli.running import Interrupted

PROMPT = ">>> "
CONTINUED = "... "
QUOTES = '"""'
HISTORY_LINES_MAX = 1_000


class Ended(Enum):
    """Why there is no line."""

    LEFT = "Ctrl-D, or Ctrl-C twice at an empty prompt"
    INTERRUPTED = "Ctrl-C"


@contextmanager
def open_line_reader(history: Path, *, keeps_history: bool = True) -> Iterator["LineReader"]:
    """Own the terminal's Ctrl-C for as long as the block is open: it ends what is being written,
    and what else takes it over for a while (an answer); in between it does nothing, so that one
    pressed too often does not end the program.

    history: its file; one that cannot be read or written is done without.
    """
    reader = LineReader(history, keeps_history)
    before = signal.signal(signal.SIGINT, reader._on_ctrl_c)
    before_term = signal.signal(signal.SIGTERM, _end)
    try:
        yield reader
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, before_term)


def _end(number: int, frame: object) -> None:
    """SIGTERM ends the conversation in order: a node of its own is closed."""
    raise Interrupted("interrupted")


class LineReader:
    """One conversation's prompt."""

    def __init__(self, history: Path, keeps_history: bool) -> None:
        import readline

        self._readline = readline
        self._history = history
        self.keeps_history = keeps_history
        self._is_reading = False
        self._interrupted = False
        self._was_empty = True
        # Pasted lines are one text with their line breaks, not a question each.
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.set_history_length(HISTORY_LINES_MAX)
        if hasattr(readline, "set_auto_history"):
            readline.set_auto_history(False)
        with suppress(OSError):
            readline.read_history_file(history)

    def read(self) -> str | Ended:
        """What was written up to Enter, or between three quotes."""
        try:
            self._is_reading = True
            text = self._read_line(PROMPT)
            if opens_quotes(text):
                text = self._read_quoted(text)
        except EOFError:
            print()  # noqa: T201 - a terminal's line is ended here, nothing is told
            return Ended.LEFT
        except KeyboardInterrupt:
            return self._interrupt()
        finally:
            self._is_reading = False
        self._interrupted = False
        return text

    def _on_ctrl_c(self, number: int, frame: object) -> None:
        if self._is_reading:
            self._is_reading = False
            self._was_empty = not self._readline.get_line_buffer()  # gone once input() has ended
            raise KeyboardInterrupt

    def _interrupt(self) -> Ended:
        print()  # noqa: T201 - as above
        if self._was_empty and self._interrupted:
            return Ended.LEFT
        self._interrupted = self._was_empty
        if self._was_empty:
            print("Ctrl-C again, Ctrl-D or /bye leaves.")  # noqa: T201 - to the terminal
        return Ended.INTERRUPTED

    def _read_quoted(self, first: str) -> str:
        lines = [first]
        while opens_quotes("\n".join(lines)):
            lines.append(self._read_line(CONTINUED))
        return "\n".join(lines)

    def _read_line(self, prompt: str) -> str:
        line = input(prompt)
        if self.keeps_history and line.strip():
            self._readline.add_history(line)
            with suppress(OSError):
                self._readline.write_history_file(self._history)
        return line


def opens_quotes(text: str) -> bool:
    """Whether three quotes begin a text, or what a command is given, and none end it yet."""
    begin = text.find(QUOTES)
    if begin < 0 or (begin > 0 and not text.startswith("/")):
        return False
    return QUOTES not in text[begin + len(QUOTES) :]


def unquoted(text: str) -> str:
    """Without the three quotes around it."""
    text = text.strip()
    if not text.startswith(QUOTES):
        return text
    return text.removeprefix(QUOTES).partition(QUOTES)[0].strip("\n")

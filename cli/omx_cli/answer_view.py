"""How an answer is shown as it comes: to a person, into a pipe, to a program."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from omx_cli.output import duration, printable, say_json

if TYPE_CHECKING:
    from ollamamax_p2p import AnswerFrame

SPINNER_INTERVAL_S = 0.1
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CLEAR_LINE = "\r\x1b[K"


class WordWrap:
    """Breaks lines between words, though the words come in bits: one that does not fit is taken
    back and written again on the next line.
    """

    def __init__(self, columns: int) -> None:
        """columns: of the terminal. The last is left free: what a cursor there does differs."""
        self._columns = max(columns - 1, 1)
        self._column = 0
        self._word = ""
        self._word_columns = 0

    def feed(self, text: str) -> str:
        """The same text as it goes to the terminal."""
        return "".join(map(self._placed, text))

    def _placed(self, char: str) -> str:
        if char == "\n":
            self._column = 0
            self._begin_word()
            return char
        width = columns_of(char)
        does_fit = self._column + width <= self._columns
        if char.isspace() and not does_fit:
            self._begin_word()
            return ""  # the line ends here anyway
        broken = "" if does_fit else self._break()
        self._column += width
        if char.isspace() or width > 1:  # where scripts without spaces may break, too
            self._begin_word()
            return broken + char
        self._word += char
        self._word_columns += width
        return broken + char

    def _break(self) -> str:
        starts_line = self._word_columns >= self._column
        if not self._word or starts_line:
            self._column = 0
            self._begin_word()
            return "\n"
        self._column = self._word_columns
        return f"\x1b[{self._word_columns}D\x1b[K\n{self._word}"

    def _begin_word(self) -> None:
        self._word, self._word_columns = "", 0


def columns_of(char: str) -> int:
    """How many columns of a terminal a character takes."""
    if unicodedata.combining(char) or char in "\u200b\u200d\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


@dataclass(kw_only=True)
class AnswerView:
    """One answer. `show` takes its frames in order, `end` comes after the last or instead."""

    wrap: bool = True
    verbose: bool = False
    hide_thinking: bool = False
    as_json: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    text: str = ""
    """What was answered so far; without the thinking."""
    thinking: str = ""
    servers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._on_terminal = not self.as_json and self.out.isatty()
        self._tells = not self.as_json and self.err.isatty()
        columns = shutil.get_terminal_size().columns
        self._wrap = WordWrap(columns) if self.wrap and self._on_terminal else None
        self._waits = "" if self._tells else None
        """What the spinner says; None once there is none any more."""
        self._turn = 0
        self._is_thinking = False
        self._line_is_open = False

    # -- frames

    def show(self, frame: "AnswerFrame") -> None:
        """The next frame."""
        if frame.type in ("start", "moved"):
            self.servers.append(f"{frame.node} ({frame.backend})")
        if self.as_json:
            say_json(self._for_programs(frame))
        elif frame.type == "queue":
            self._wait(place_text(frame.position, frame.eta_s))
        elif frame.type == "start":
            self._wait("")
        elif frame.type == "delta":
            self._show_delta(frame.line)
        elif frame.type == "done":
            self._show_end(frame.line)

    def _show_delta(self, line: Mapping[str, Any]) -> None:
        message: Mapping[str, Any] = line.get("message", line)
        thinking = printable(message.get("thinking", ""))
        text = printable(message.get("content", message.get("response", "")))
        if thinking:
            self.thinking += thinking
            if not self.hide_thinking:
                self._begin_thinking()
                self._write(thinking)
        if text:
            self.text += text
            self._end_thinking()
            self._write(text)
        self.out.flush()

    def _begin_thinking(self) -> None:
        if not self._is_thinking:
            self._is_thinking = True
            self._style(_DIM)
            self._write("Thinking...\n")

    def _end_thinking(self) -> None:
        if self._is_thinking:
            self._is_thinking = False
            self._open_line()
            self._write("...done thinking.\n")
            self._style(_PLAIN)
            self._write("\n")

    def _show_end(self, line: Mapping[str, Any]) -> None:
        self._end_thinking()
        self.end()
        if self.verbose:
            self.err.write("\n" + "".join(f"{each}\n" for each in timings(line)))
        if self.servers and (self.verbose or self._tells):
            self._tell_servers()
        self.err.flush()

    def _tell_servers(self) -> None:
        gap = "" if self.verbose or not self._on_terminal else "\n"
        self.err.write(f"{gap}{dimmed(printable(servers_text(self.servers)), self.err)}\n")

    @staticmethod
    def _for_programs(frame: "AnswerFrame") -> dict[str, Any]:
        if frame.type == "queue":
            return {"type": "queue", "position": frame.position, "eta_s": frame.eta_s}
        if frame.type in ("start", "moved"):
            return {"type": frame.type, "node": frame.node, "backend": frame.backend}
        return {"type": frame.type, "line": frame.line}

    # -- the terminal

    async def keep_turning(self) -> None:
        """Turn the spinner until the first word comes."""
        import trio

        while self._waits is not None:
            self._draw_waiting()
            await trio.sleep(SPINNER_INTERVAL_S)

    def end(self) -> None:
        """Nothing more comes: leave the terminal as others want to find it."""
        self._stop_waiting()
        if self._is_thinking:
            self._is_thinking = False
            self._style(_PLAIN)
        if not self.as_json:
            self._open_line()
        self.out.flush()

    def _write(self, text: str) -> None:
        self._stop_waiting()
        self._line_is_open = not text.endswith("\n")
        self.out.write(text if self._wrap is None else self._wrap.feed(text))

    def _style(self, code: str) -> None:
        self._stop_waiting()
        if has_colour(self.out):
            self.out.write(code)

    def _open_line(self) -> None:
        """Be at the beginning of a line."""
        if self._line_is_open:
            self._write("\n")

    def _wait(self, text: str) -> None:
        if self._waits is not None:
            self._waits = text
            self._draw_waiting()

    def _draw_waiting(self) -> None:
        sign = _SPINNER[self._turn % len(_SPINNER)]
        self._turn += 1
        self.err.write(f"{_CLEAR_LINE}{sign} {self._waits}")
        self.err.flush()

    def _stop_waiting(self) -> None:
        if self._waits is not None:
            self._waits = None
            self.err.write(_CLEAR_LINE)
            self.err.flush()


def has_colour(stream: TextIO) -> bool:
    """Whether what is written there may be dim (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def dimmed(text: str, stream: TextIO) -> str:
    """The text, dim where that can be shown."""
    return f"{_DIM}{text}{_PLAIN}" if has_colour(stream) else text


def place_text(position: int, eta_s: float | None) -> str:
    """`waiting: place 3, about 12s`."""
    place = "next" if position == 1 else f"place {position}"
    return f"waiting: {place}" + (f", about {duration(eta_s)}" if eta_s is not None else "")


def servers_text(servers: list[str]) -> str:
    """`answered by kitchen (embedded), moved to attic (ollama)`."""
    first, *others = servers
    return f"answered by {first}" + "".join(f", moved to {each}" for each in others)


def timings(line: Mapping[str, Any]) -> list[str]:
    """What an answer took, in Ollama's words and layout; what it does not say is left out."""
    found = list[tuple[str, str]]()
    for title, key in (("total duration", "total_duration"), ("load duration", "load_duration")):
        if line.get(key):
            found.append((title, go_duration(line[key])))
    for title, key in (("prompt eval", "prompt_eval"), ("eval", "eval")):
        count, took = line.get(f"{key}_count", 0), line.get(f"{key}_duration", 0)
        if count:
            found.append((f"{title} count", f"{count} token(s)"))
        if took:
            found.append((f"{title} duration", go_duration(took)))
            found.append((f"{title} rate", f"{count / (took / 1e9):.2f} tokens/s"))
    return [f"{title + ':':<22}{value}" for title, value in found]


def go_duration(nanoseconds: int) -> str:
    """A duration as Go prints it: `1m3.25s`, `130.079ms`, `0s`."""
    if nanoseconds == 0:
        return "0s"
    for unit, size in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000)):
        if nanoseconds < size * 1_000:
            return f"{_fraction(nanoseconds, size)}{unit}"
    minutes, rest = divmod(nanoseconds, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{_fraction(rest, 1_000_000_000)}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _fraction(count: int, size: int) -> str:
    whole, part = divmod(count, size)
    digits = str(part).zfill(len(str(size)) - 1).rstrip("0") if part else ""
    return f"{whole}.{digits}" if digits else str(whole)

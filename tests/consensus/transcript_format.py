"""Scripts with expected output: commands, a line of dashes, what they print.

    command argument key=value key=(1,2)
    lines of input
    ----
    expected output, up to a blank line

Output that holds blank lines stands between doubled lines of dashes. `#` begins a comment.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

DASHES = "----"


@dataclass(frozen=True)
class Argument:
    """`key`, `key=value` or `key=(value,value)`."""

    key: str
    values: tuple[str, ...] = ()


@dataclass
class Directive:
    """One command and what it should print."""

    line: int
    """Where it stands, from 1."""
    command: str
    arguments: list[Argument]
    input: str = ""
    expected: str = ""
    output_begins: int = 0
    """The line that follows the first dashes, from 0."""
    output_ends: int = 0
    named: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.named = {each.key: each.values for each in self.arguments if each.values}

    @property
    def plain(self) -> list[str]:
        """The arguments without a value."""
        return [each.key for each in self.arguments if not each.values]


def parse_line(text: str) -> tuple[str, list[Argument]]:
    """A command and its arguments; no command, `""`, in a blank line. Raises ValueError."""
    command, _, rest = text.strip().partition(" ")
    words: list[Argument] = []
    while rest := rest.strip():
        key = re.match("[^ =]*", rest)[0]  # type: ignore[index]
        if not key:
            raise ValueError(f"cannot read {rest!r} of {text!r}")
        rest = rest[len(key) :]
        if not rest.startswith("="):
            words.append(Argument(key))
        elif rest.startswith("=("):
            end = _closing(rest, text)
            words.append(Argument(key, tuple(_top_level(rest[2:end]))))
            rest = rest[end + 1 :]
        else:
            value, _, rest = rest[1:].partition(" ")
            words.append(Argument(key, (value,)))
    return command, words


def _closing(rest: str, text: str) -> int:
    """Where the parenthesis that rest opens with ends."""
    depth = 0
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and not depth:
            return place
    raise ValueError(f"a parenthesis of {text!r} is never closed")


def _top_level(inside: str) -> list[str]:
    """The values between commas that stand in no inner parenthesis."""
    values, depth = [""], 0
    for letter in inside:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    return [values[0], *(value.lstrip(" ") for value in values[1:])]


def directives(text: str) -> Iterator[Directive]:
    """Those of a script, in order. Raises ValueError if it is none."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begun = at
        line = line.strip()
        while line.endswith("\\") and at < len(lines):
            line = f"{line[:-1]} {lines[at].strip()}"
            at += 1
        command, arguments = parse_line(line)
        given: list[str] = []
        while at < len(lines) and lines[at] != DASHES:
            given.append(lines[at])
            at += 1
        if at == len(lines):
            raise ValueError(f"line {begun}: no {DASHES} after {command}")
        at += 1
        output_begins = at
        expected, at = _expected(lines, at)
        yield Directive(
            begun,
            command,
            arguments,
            input="\n".join(given).strip(),
            expected=expected,
            output_begins=output_begins,
            output_ends=at,
        )


def _expected(lines: list[str], at: int) -> tuple[str, int]:
    found: list[str] = []
    doubled = at < len(lines) and lines[at] == DASHES
    if doubled:
        at += 1
    while at < len(lines):
        line = lines[at]
        if doubled and line == DASHES and lines[at + 1 : at + 2] == [DASHES]:
            return "\n".join(found), at + 2
        if not doubled and not line.strip():
            return "\n".join(found), at
        found.append(line)
        at += 1
    if doubled:
        raise ValueError("the output's second pair of dashes is missing")
    return "\n".join(found), at

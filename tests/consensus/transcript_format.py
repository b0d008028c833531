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
    named: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.named = {each.key: each.values for each in self.arguments if each.values}

    @property
    def plain(self) -> list[str]:
        """The arguments without a value."""
        return [each.key for each in self.arguments if not each.values]


_WORD = re.compile(r"\s*([^\s=()]+)(?:=(?:\(([^()]*)\)|([^\s()]*)))?(?=\s|$)")


def parse_line(text: str) -> tuple[str, list[Argument]]:
    """A command and its arguments. Raises ValueError."""
    place = 0
    words: list[Argument] = []
    text = text.strip()
    while place < len(text):
        found = _WORD.match(text, place)
        if found is None:
            raise ValueError(f"cannot read {text[place:]!r} of {text!r}")
        key, several, single = found.groups()
        if several is not None:
            words.append(Argument(key, tuple(re.split(r"[\s,]+", several.strip())) or ("",)))
        elif single is not None:
            words.append(Argument(key, (single,)))
        else:
            words.append(Argument(key))
        place = found.end()
    if not words or words[0].values:
        raise ValueError(f"no command in {text!r}")
    return words[0].key, words[1:]


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
        while line.endswith("\\") and at < len(lines):
            line = line[:-1] + lines[at]
            at += 1
        command, arguments = parse_line(line)
        given: list[str] = []
        while at < len(lines) and lines[at] != DASHES:
            given.append(lines[at])
            at += 1
        if at == len(lines):
            raise ValueError(f"line {begun}: no {DASHES} after {command}")
        at += 1
        expected, at = _expected(lines, at)
        yield Directive(
            begun, command, arguments, input="\n".join(given).strip("\n"), expected=expected
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

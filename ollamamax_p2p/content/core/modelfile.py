"""Modelfiles: read as Ollama reads them, written as `ollama show --modelfile` writes them.

One instruction a line: `FROM …`, `PARAMETER <name> <value>`, `MESSAGE <role> <text>` and so on, in
any case; `#` at the start of a line begins a comment. A value may stand in `"` or `\"""` and then
goes on over line ends until a line ends with the same quote; inside, nothing is escaped.
Source: Ollama's docs/modelfile.md and its parser's behaviour.
"""

import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ollamamax_p2p.content.core.go_json import go_float
from ollamamax_p2p.errors import BadModelFile

MODELFILE_BYTES_MAX = 16 * 1024 * 1024
"""Licenses are the longest part, some 100 KB."""

COMMANDS = (
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter",
    "message", "requires",
)  # fmt: skip
ROLES = ("system", "user", "assistant")

_INTEGERS = {
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "seed", "num_predict",
    "draft_num_predict", "top_k", "repeat_last_n",
}  # fmt: skip
_FLOATS = {
    "temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty",
    "frequency_penalty",
}  # fmt: skip
_BOOLS = {"use_mmap"}
_LISTS = {"stop"}
_IGNORED = {
    "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat",
    "mirostat_tau", "mirostat_eta",
}  # fmt: skip
"""Parameters that Ollama had and no longer knows; it warns and goes on."""

_TRUE = {"1", "t", "T", "TRUE", "true", "True"}
_FALSE = {"0", "f", "F", "FALSE", "false", "False"}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

Parameter: TypeAlias = bool | int | float | str | list[str]


@dataclass(frozen=True, slots=True)
class Message:
    """One line of the conversation that a model begins with."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Origin:
    """What a FROM, ADAPTER or DRAFT line names: a file or a model."""

    text: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelfile:
    """A Modelfile as read. Empty text: not given."""

    origins: tuple[Origin, ...]
    """FROM lines, at least one; a model and its projector are two."""
    adapters: tuple[Origin, ...] = ()
    drafts: tuple[Origin, ...] = ()
    template: str = ""
    system: str = ""
    licenses: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter]
    messages: tuple[Message, ...] = ()
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    ignored: tuple[str, ...] = ()
    """Parameters that have no meaning any more."""


@dataclass(frozen=True, slots=True)
class _Instruction:
    command: str
    word: str
    """The parameter's name or the message's role."""
    value: str
    line: int


def parse_modelfile(text: str | bytes, where: str = "Modelfile") -> Modelfile:
    """Read a Modelfile.

    text: bytes are UTF-8, or UTF-16 with a byte order mark. where: names it in errors.
    Raises BadModelFile with the line: an unknown command, parameter or role, a value of the wrong
    type, a quote that is not closed, no FROM.
    """
    decoded = _decoded(text, where)
    read = list(_instructions(decoded, where))

    def of(command: str) -> list[_Instruction]:
        return [instruction for instruction in read if instruction.command == command]

    def last(command: str) -> str:
        return next((found.value for found in reversed(of(command))), "")

    def origins(command: str) -> tuple[Origin, ...]:
        return tuple(Origin(found.value, found.line) for found in of(command))

    if not of("from"):
        raise BadModelFile(where, "it has no FROM line")
    parameters = of("parameter")
    return Modelfile(
        origins=origins("from"),
        adapters=origins("adapter"),
        drafts=origins("draft"),
        template=last("template"),
        system=last("system"),
        licenses=tuple(found.value for found in of("license")),
        parameters=_parameters(parameters, where),
        messages=tuple(Message(found.word, found.value) for found in of("message")),
        renderer=last("renderer"),
        parser=last("parser"),
        requires=_version(of("requires"), where),
        ignored=tuple(found.word for found in parameters if found.word in _IGNORED),
    )


def _decoded(text: str | bytes, where: str) -> str:
    if len(text) > MODELFILE_BYTES_MAX:
        raise BadModelFile(where, f"it is longer than {MODELFILE_BYTES_MAX} bytes")
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    encoding = "utf-16" if text.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    return text.decode(encoding, errors="replace")


# -- reading -----------------------------------------------------------------------------------


class _Lines:
    """The text, line by line, with what is needed to read a value over several of them."""

    def __init__(self, text: str, where: str) -> None:
        self.lines = re.split("\r\n|\r|\n", text)
        self.where = where
        self.number = 0
        """Of the line that is read now, from 1."""

    def next(self) -> str | None:
        """The next line without what cannot be seen, or None."""
        if self.number == len(self.lines):
            return None
        line = self.lines[self.number]
        self.number += 1
        return line if line.isprintable() else "".join(filter(_is_kept, line))

    def bad(self, problem: str, line: int) -> BadModelFile:
        return BadModelFile(f"{self.where}, line {line}", problem)


def _is_kept(character: str) -> bool:
    return character == "\t" or character.isprintable()


def _instructions(text: str, where: str) -> Iterator[_Instruction]:
    lines = _Lines(text, where)
    while (line := lines.next()) is not None:
        line = line.lstrip(" \t")
        if line and not line.startswith("#"):
            yield _instruction(lines, line, lines.number)


def _instruction(lines: _Lines, line: str, number: int) -> _Instruction:
    command, rest = _word(line)
    if command.lower() in COMMANDS and line == command:
        raise lines.bad(f"{command.upper()} has no value", number)
    if command.lower() not in COMMANDS:
        expected = ", ".join(name.upper() for name in COMMANDS)
        raise lines.bad(f"unknown command {command[:40]!r}; it may be {expected}", number)
    command, word = command.lower(), ""
    if command in ("parameter", "message"):
        word, rest = _word(rest.lstrip(" \t"))
        if not rest:
            raise lines.bad(f"{command.upper()} needs two values", number)
    if command == "message" and word not in ROLES:
        raise lines.bad(f"unknown role {word[:40]!r}; it may be {', '.join(ROLES)}", number)
    return _Instruction(command, word, _value(lines, rest, number), number)


def _word(text: str) -> tuple[str, str]:
    """Up to the first space or tab, and the rest with it."""
    match = re.match(r"[^ \t]*", text)
    assert match is not None  # it matches nothing too
    return match[0], text[match.end() :]


def _value(lines: _Lines, first: str, number: int) -> str:
    value = first.strip()
    quote = next((quote for quote in ('"""', '"') if value.startswith(quote)), "")
    read = [first.lstrip()]
    # Joined only where a line ends with the quote, so that a long text is not joined line by line.
    while quote and not (read[-1].rstrip().endswith(quote) and _closed(value, read, quote)):
        line = lines.next()
        if line is None:
            raise lines.bad(f"the quote {quote} that begins here is not closed", number)
        read.append(line)
    whole = "\n".join(read).strip()
    return whole[len(quote) : len(whole) - len(quote)]


def _closed(value: str, read: Sequence[str], quote: str) -> bool:
    """Whether the quote that a line ends with is another one than that which began the value."""
    return len(read) > 1 or len(value) >= 2 * len(quote)


def _version(found: list[_Instruction], where: str) -> str:
    if not found:
        return ""
    version = found[-1].value.removeprefix("v")
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){0,2}([-+][0-9A-Za-z.+-]{1,80})?", version):
        place = f"{where}, line {found[-1].line}"
        raise BadModelFile(place, f"{found[-1].value[:40]!r} is no version such as 0.14.0")
    return version


def _parameters(found: Iterable[_Instruction], where: str) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    for instruction in found:
        name, text = instruction.word, instruction.value
        if name in _IGNORED:
            continue
        try:
            value = typed_parameter(name, text)
        except ValueError as error:
            raise BadModelFile(f"{where}, line {instruction.line}", str(error)) from error
        held = parameters.get(name)
        parameters[name] = [*held, *value] if _both_lists(held, value) else value  # type: ignore[misc]  # a list plus a list
    return parameters


def _both_lists(one: object, two: object) -> bool:
    return isinstance(one, list) and isinstance(two, list)


def typed_parameter(name: str, text: str) -> Parameter:
    """A parameter's text as its type. Raises ValueError: an unknown name, or not of that type."""
    if name in _LISTS:
        return [text]
    if name in _INTEGERS and _INTEGER.fullmatch(text):
        return int(text)
    if name in _FLOATS and _FLOAT.fullmatch(text):
        return as_float32(float(text))
    if name in _BOOLS and text in _TRUE | _FALSE:
        return text in _TRUE
    for kind, names in (
        ("an integer", _INTEGERS),
        ("a number", _FLOATS),
        ("true or false", _BOOLS),
    ):
        if name in names:
            raise ValueError(f"parameter {name} must be {kind}, not {text[:40]!r}")
    raise ValueError(f"unknown parameter {name[:40]!r}")


def as_float32(value: float) -> float:
    """The number that Ollama stores: rounded to 32 bits, then the shortest decimal of those."""
    single = _single(value)
    if not math.isfinite(single):
        raise ValueError(f"{value} is out of range")
    # Nine digits tell any two 32-bit numbers apart; six give back any decimal that has no more, but
    # for the smallest numbers, which have fewer bits.
    fewest = 6 if abs(single) >= 2**-126 else 1
    shorter = (float(f"{single:.{digits}g}") for digits in range(fewest, 10))
    return next(short for short in shorter if _single(short) == single)


def _single(value: float) -> float:
    try:
        (single,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        return math.inf
    return float(single)


# -- writing -----------------------------------------------------------------------------------


def render_modelfile(
    *,
    origins: Iterable[str],
    adapters: Iterable[str] = (),
    template: str = "",
    system: str = "",
    parameters: Mapping[str, object],
    licenses: Iterable[str] = (),
    messages: Iterable[Message] = (),
    renderer: str = "",
    parser: str = "",
) -> str:
    """The instructions that make such a model, one a line."""
    lines = [f"FROM {origin}" for origin in origins]
    lines += [f"ADAPTER {_quoted(adapter)}" for adapter in adapters]
    named = {"TEMPLATE": template, "SYSTEM": system, "RENDERER": renderer, "PARSER": parser}
    lines += [f"{command} {_quoted(value)}" for command, value in named.items() if value]
    lines += [f"PARAMETER {name} {_quoted(_plain(value))}" for name, value in _each(parameters)]
    lines += [f"LICENSE {_quoted(text)}" for text in licenses]
    lines += [f"MESSAGE {message.role} {_quoted(message.content)}" for message in messages]
    return "".join(f"{line}\n" for line in lines)


def render_parameters(parameters: Mapping[str, object]) -> str:
    """One a line, names in a column of 30, text in quotes; as `ollama show --parameters`."""
    return "\n".join(f"{name:<30} {_literal(value)}" for name, value in _each(parameters))


def _each(parameters: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name in sorted(parameters):
        value = parameters[name]
        for item in value if isinstance(value, list) else [value]:
            yield name, item


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # Ollama writes large integers with an exponent here and cannot read that back; we don't.
    return go_float(value) if isinstance(value, float) else str(value)


def _literal(value: object) -> str:
    return go_quoted(value) if isinstance(value, str) else _plain(value)


_GO_ESCAPES = {
    "\a": "\\a", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\v": "\\v",
    "\\": "\\\\", '"': '\\"',
}  # fmt: skip


def go_quoted(text: str) -> str:
    """A string as Go writes a literal of it."""

    def escaped(character: str) -> str:
        if character in _GO_ESCAPES:
            return _GO_ESCAPES[character]
        if character.isprintable():
            return character
        number = ord(character)
        if number < 0x80:
            return f"\\x{number:02x}"
        return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"

    return '"' + "".join(map(escaped, text)) + '"'


def _quoted(text: str) -> str:
    if "\n" in text or text.startswith('"') or text != text.strip():
        return f'"""{text}"""' if '"' in text else f'"{text}"'
    return text


def human_number(count: int) -> str:
    """How Ollama writes a number of weights: 134.52M, 8.0B, 7B."""
    for unit, letter, decimals in ((10**9, "B", 1), (10**6, "M", 2)):
        if count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else decimals}f}{letter}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)

"""Tables and texts for people, JSON for programs."""

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, TextIO

COLUMN_GAP = 4
"""Ollama's, so that scripts made for its lists work on ours."""


_CONTROL = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Without what a terminal would obey: names, notes and licenses come from strangers."""
    return text.translate(_CONTROL)


def say(text: str = "") -> None:
    """Lines on stdout."""
    sys.stdout.write(printable(text) + "\n")


def say_json(value: Any) -> None:
    """A value as one line of JSON on stdout, at once: the reader may be waiting for it."""
    import msgspec

    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def tell(text: str) -> None:
    """Lines on stderr. Where nobody can be told, the exit code still says it."""
    if sys.stderr is None:
        return
    try:
        sys.stderr.write(printable(text) + "\n")
        sys.stderr.flush()
    except OSError:
        drop(sys.stderr)


def drop(stream: TextIO) -> None:
    """Let a stream that takes nothing end in nothing: Python would complain when it flushes."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def table(head: Sequence[str], rows: Sequence[Sequence[str]], gap: int = COLUMN_GAP) -> str:
    """Columns as wide as their widest cell, four spaces between, no borders."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        (" " * gap)
        .join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        .rstrip()
        for line in lines
    )


def terminal_columns() -> int:
    """How wide the terminal is; without one, as wide as anybody wants."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def fitting_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], columns: int, spare: Sequence[str]
) -> str:
    """A table no wider than the terminal: with smaller gaps, then without the spare columns, the
    first of them first, then with its first column cut; what is too wide even so is left whole.
    """
    text = table(head, rows)
    if _width(text) <= columns:
        return text
    text = table(head, rows, 2)
    if _width(text) <= columns:
        return text
    if spare:
        kept = [at for at, title in enumerate(head) if title != spare[0]]
        fewer = [[row[at] for at in kept] for row in rows]
        return fitting_table([head[at] for at in kept], fewer, columns, spare[1:])
    room = max(len(row[0]) for row in rows) - (_width(text) - columns)
    if room < len(head[0]):
        return text
    return table(head, [[_cut(row[0], room), *row[1:]] for row in rows], 2)


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: columns - 1] + "…"


def fields(pairs: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Names and values below each other."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{indent}{name.ljust(width)}    {value}" for name, value in pairs)


def human_bytes(count: int) -> str:
    """As Ollama shows sizes: powers of 1000, one decimal below ten: `4.7 GB`, `98 MB`."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    if value >= 10 or value == int(value):
        return f"{int(value)} {unit}"
    return f"{int(value * 10) / 10:.1f} {unit}"


def human_age(then: datetime, now: datetime) -> str:
    """As Ollama shows ages: `3 days ago`."""
    seconds = int((now - then).total_seconds())
    return f"{_span(seconds)} ago" if seconds >= 0 else f"{_span(-seconds)} from now"


def _span(seconds: int) -> str:
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if seconds < 1:
        return "Less than a second"
    if seconds < 60:
        return _count(seconds, "second")
    if minutes < 60:
        return "About a minute" if minutes == 1 else _count(minutes, "minute")
    if hours < 48:
        return "About an hour" if hours == 1 else _count(hours, "hour")
    if days < 14:
        return _count(days, "day")
    if days < 60:
        return _count(days // 7, "week")
    if days < 730:
        return _count(days // 30, "month")
    return _count(days // 365, "year")


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"


def duration(seconds: float) -> str:
    """`9s`, `1m3s`, `2h5m`: as Go writes it, without the smallest part when it is long."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60}m"
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"


def short_peer(peer: str, tail: int = 6) -> str:
    """A peer id as people can tell it from others: all begin alike, so the end is what differs."""
    return f"{peer[:8]}…{peer[-tail:]}" if peer.startswith("12D3KooW") else peer


def short_digest(digest: str) -> str:
    """The twelve hex digits that people are shown."""
    return digest.removeprefix("sha256:")[:12]

"""What `omx pull` and `omx push` show while they run: like Ollama's, and where bytes come from.

Three views: a terminal (redrawn in place on stderr), a log (one plain line per state), programs
(NDJSON on stdout). What a line says is decided by pure functions on its states.
"""

import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from omx_cli.output import (
    duration,
    human_bytes,
    printable,
    say_json,
    short_digest,
    short_peer,
    tell,
)

if TYPE_CHECKING:
    from ollamamax_p2p import PullProgress, PullReport, PushReport, SourceShare

RATE_WINDOW_S = 5.0
"""The rate shown is that of the last seconds: an average since the start hides a stall."""

REDRAW_INTERVAL_S = 0.1
WIDE_COLUMNS = 100
"""From this width on there is room for each source's share."""

SOURCES_SHOWN = 8
BAR_COLUMNS_MAX = 40
_MOVING = "pulling ", "pushing "
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class View(Protocol):
    """Takes the states of a pull."""

    def show(self, progress: "PullProgress") -> None:
        """A new state."""


@dataclass
class BlobLine:
    """What is known of one blob, with enough history for a rate."""

    title: str
    total: int = 0
    completed: int = 0
    active_sources: int = 0
    history: deque[tuple[float, int]] = field(default_factory=deque)

    def update(self, progress: "PullProgress", now: float) -> None:
        """A new state of this blob."""
        self.total, self.completed = progress.total, progress.completed
        self.active_sources = progress.active_sources
        self.history.append((now, progress.completed))

    def rate(self, now: float) -> float:
        """Bytes per second over the window; 0 while there is nothing to divide."""
        while len(self.history) > 1 and self.history[1][0] <= now - RATE_WINDOW_S:
            self.history.popleft()
        if not self.history:
            return 0.0
        since, bytes_then = self.history[0]
        elapsed = now - since
        return (self.completed - bytes_then) / elapsed if elapsed > 0.2 else 0.0

    @property
    def is_done(self) -> bool:
        """Whether all of it is here."""
        return self.completed >= self.total > 0


def blob_text(line: BlobLine, now: float, columns: int) -> str:
    """`pulling 0123456789ab:  42% ▕███   ▏ 1.2 GB/4.7 GB  35 MB/s  1m3s  3 sources`."""
    percent = 100 * line.completed // line.total if line.total else 0
    head = f"{line.title}: {percent:3d}% "
    tail = f" {human_bytes(line.completed):>6}/{human_bytes(line.total)}"
    if line.is_done:
        tail = f" {human_bytes(line.total):>6}"
    else:
        tail += _speed_text(line, now)
    if len(head) + len(tail) > columns:  # what is cut off is the end
        head = f"{percent:3d}% {line.title}:"
    room = columns - len(head) - len(tail) - 2
    return head + (bar(line, min(room, BAR_COLUMNS_MAX)) if room >= 4 else "") + tail


def _speed_text(line: BlobLine, now: float) -> str:
    rate = line.rate(now)
    left = duration((line.total - line.completed) / rate) if rate >= 1 else "-"
    speed = f"  {human_bytes(int(rate))}/s  {left}"
    if line.title.startswith("pushing"):
        return speed
    count = line.active_sources
    return f"{speed}  {'1 source' if count == 1 else f'{count} sources'}"


def bar(line: BlobLine, columns: int) -> str:
    """How much is here, to an eighth of a column."""
    eighths = columns * 8 * line.completed // line.total if line.total else 0
    full, part = divmod(min(eighths, columns * 8), 8)
    return f"▕{('█' * full + (_EIGHTHS[part] if part else '')).ljust(columns)}▏"


def shares_text(sources: "Sequence[SourceShare]") -> list[str]:
    """One line per source, largest first: who sent how much."""
    everything = sum(share.bytes for share in sources) or 1
    shown = list(sources[:SOURCES_SHOWN])
    lines = [
        f"    {source_name(share):<24} {100 * share.bytes // everything:3d}% "
        f"{human_bytes(share.bytes):>7}"
        for share in shown
    ]
    hidden = sources[SOURCES_SHOWN:]
    if hidden:
        lines.append(f"    and {len(hidden)} more, {human_bytes(sum(s.bytes for s in hidden))}")
    return lines


def source_name(share: "SourceShare") -> str:
    """A peer by its short id, an origin by its host."""
    return short_peer(share.name) if share.kind == "peer" else share.name


def report_line(report: "PullReport") -> str:
    """The one honest line at the end."""
    rate = report.bytes_fetched / report.seconds if report.seconds > 0 else 0
    parts = [
        f"pulled {report.model}: {human_bytes(report.bytes_total)} in {_seconds(report.seconds)}"
    ]
    if report.bytes_fetched:
        parts[0] += f", {human_bytes(int(rate))}/s"
    here_already = report.bytes_total - report.bytes_fetched
    if here_already > 0:
        parts.append(f"{human_bytes(here_already)} was here already")
    sent = [f"{human_bytes(s.bytes)} from {source_name(s)}" for s in report.sources if s.bytes]
    if sent:
        parts.append(", ".join(sent))
    parts.append(f"{human_bytes(report.bytes_refetched)} fetched twice")
    if report.banned:
        parts.append("banned " + ", ".join(map(short_peer, report.banned)))
    return "; ".join(parts)


def push_line(report: "PushReport") -> str:
    """The same for a push."""
    rate = report.bytes_sent / report.seconds if report.seconds > 0 else 0
    line = f"pushed {report.model}: {human_bytes(report.bytes_total)} in {_seconds(report.seconds)}"
    if report.bytes_sent:
        line += f", {human_bytes(int(rate))}/s"
    there_already = report.bytes_total - report.bytes_sent
    return f"{line}; {human_bytes(there_already)} was there already" if there_already else line


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


# -- the views ---------------------------------------------------------------------------------


class JsonView:
    """One JSON object per state on stdout."""

    def show(self, progress: "PullProgress") -> None:
        """A new state."""
        say_json(progress)


class LogView:
    """One plain line per state, for pipes and logs."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def show(self, progress: "PullProgress") -> None:
        """A new state. Blobs come side by side, so a state returns; it is told the first time."""
        is_blob = progress.status.startswith(_MOVING) and progress.total
        line = f"{progress.status}: {human_bytes(progress.total)}" if is_blob else progress.status
        if line not in self._told:
            tell(line)
            self._told.add(line)
        if progress.note and progress.note not in self._told:  # every later state repeats it
            tell(progress.note)
            self._told.add(progress.note)


class TerminalView:
    """Redrawn in place: a line per blob, the newest state, and on a wide terminal the sources."""

    def __init__(self, live: Any, clock: Any) -> None:
        self._live = live
        self._now = clock
        self._lines: dict[str, BlobLine] = {}
        self._status = "connecting"
        self._noted: set[str] = set()
        self._sources: Sequence[SourceShare] = ()

    def show(self, progress: "PullProgress") -> None:
        """A new state. Drawn by `keep_fresh`, so that a fast pull costs no more than a slow one."""
        self._sources = progress.sources or self._sources
        if progress.note and progress.note not in self._noted:  # every later state repeats it
            self._live.console.print(printable(progress.note), markup=False, highlight=False)
            self._noted.add(progress.note)
        is_blob = progress.digest is not None and progress.status.startswith(_MOVING)
        self._status = "" if is_blob else progress.status
        if progress.digest is None:
            return
        verb = "pushing" if progress.status.startswith("pushing ") else "pulling"
        title = f"{verb} {short_digest(progress.digest)}"
        line = self._lines.setdefault(progress.digest, BlobLine(title))
        line.update(progress, self._now())

    async def keep_fresh(self) -> None:
        """Draw, again and again: a stall must be seen as one."""
        import trio

        while True:
            self.draw()
            await trio.sleep(REDRAW_INTERVAL_S)

    def draw(self) -> None:
        """Draw what is known."""
        console = self._live.console
        lines = self.lines(console.width)
        room = max(console.height - 1, 3)  # what scrolls away cannot be redrawn
        self._live.update(_text(printable("\n".join(lines[-room:]))), refresh=True)

    def lines(self, columns: int) -> list[str]:
        """Everything that is on the screen, top to bottom."""
        now = self._now()
        lines = [blob_text(line, now, columns) for line in self._lines.values()]
        if columns >= WIDE_COLUMNS and self._sources:
            lines += shares_text(self._sources)
        if self._status:
            frame = "" if self._status == "success" else _SPINNER[int(now * 10) % len(_SPINNER)]
            lines.append(f"{self._status} {frame}".rstrip())
        return lines


def _text(lines: str) -> Any:
    from rich.text import Text

    return Text(lines, no_wrap=True, overflow="crop")


@asynccontextmanager
async def open_view(as_json: bool) -> AsyncIterator[View]:
    """The view that suits where the output goes."""
    if as_json:
        yield JsonView()
    elif not sys.stderr.isatty():
        yield LogView()
    else:
        async with _open_terminal_view() as view:
            yield view


@asynccontextmanager
async def _open_terminal_view() -> AsyncIterator[View]:
    import trio
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False, transient=False) as live:
        view = TerminalView(live, trio.current_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(view.keep_fresh)
            try:
                yield view
            finally:
                view.draw()
                nursery.cancel_scope.cancel()

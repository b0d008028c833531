"""check_log: read a log without opening or changing it, and say what is there."""

from pathlib import Path

import msgspec

from ollamamax_p2p.consensus.log_files import FolderReader, named
from ollamamax_p2p.consensus.log_reading import ReadLog, ReadSegment, read_log
from ollamamax_p2p.errors import NotFound

_ADVICE = (
    "do not start, change or delete anything here; copy the folder, then follow "
    "docs/runbooks/damaged-wal.md"
)


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong."""

    file: str
    offset: int
    """Bytes from the file's start."""
    last_index: int
    """Of the last entry before it."""
    problem: str
    advice: str = _ADVICE


class SegmentReport(msgspec.Struct, frozen=True):
    """One file of the log, as far as it can be read."""

    file: str
    batches: int
    first_index: int
    """Of the entries in it; 0 if there are none."""
    last_index: int
    used_bytes: int
    size: int
    sealed: bool
    """Whether the next one has been made, as the file itself says."""


class LogReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a log holds; of a damaged one, up to the damage. Indexes are 0 if there are no entries.

    `msgspec.json.encode` or `msgspec.to_builtins` make JSON of it.
    """

    folder: str
    ok: bool
    """Whether a node can start with it."""
    in_use: bool
    """A node runs on it now; then the end may look torn because it is being written."""
    segments: tuple[SegmentReport, ...]
    first_index: int
    last_index: int
    last_term: int
    """Of the last entry; of the snapshot if there are none behind it."""
    term: int
    """The newest that this node has heard of."""
    vote: int
    commit: int
    snapshot_index: int
    torn_bytes: int
    """At the end, left by a crash; the next start cuts them off. None was acknowledged."""
    torn_at: int
    """Where in the last segment they begin; 0 if there are none."""
    leftovers: tuple[str, ...]
    """Files that nothing needs any more; the next start removes them."""
    damage: tuple[Finding, ...] = ()


def check_log(folder: Path) -> LogReport:
    """Read every segment of a log; blocks. Raises NotFound if there is none, AccessRefused, or
    StoreDamaged if the system can't read it.
    """
    files = FolderReader(folder)
    try:
        files.names()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"{folder}: there is no log, and no such folder") from error
    except OSError as error:
        raise named(error, str(folder), "read") from error
    log = read_log(files)
    if not log.segments and not log.damage:
        raise NotFound(f"{folder}: there is no log in this folder")
    damage = tuple(
        Finding(each.file, each.offset, each.last_index, each.problem) for each in log.damage
    )
    return LogReport(
        folder=str(folder),
        ok=not damage,
        in_use=files.in_use(),
        segments=tuple(map(_segment, log.segments)),
        first_index=log.entries[0].index if log.entries else 0,
        last_index=log.entries[-1].index if log.entries else 0,
        last_term=_last_term(log),
        term=log.hard_state.term,
        vote=log.hard_state.vote,
        commit=log.hard_state.commit,
        snapshot_index=log.snapshot.metadata.index if log.snapshot else 0,
        torn_bytes=log.torn_bytes,
        torn_at=log.segments[-1].scan.end if log.torn_bytes else 0,
        leftovers=tuple(log.leftovers),
        damage=damage,
    )


def _last_term(log: ReadLog) -> int:
    if log.entries:
        return log.entries[-1].term
    return log.snapshot.metadata.term if log.snapshot else 0


def _segment(segment: ReadSegment) -> SegmentReport:
    scan = segment.scan
    indexes = [entry.index for record in scan.records for entry in record.entries]
    return SegmentReport(
        file=segment.name,
        batches=len(scan.records),
        first_index=min(indexes, default=0),
        last_index=max(indexes, default=0),
        used_bytes=scan.end,
        size=scan.header.size,
        sealed=scan.sealed,
    )

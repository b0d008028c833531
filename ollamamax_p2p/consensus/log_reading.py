"""read_log: what a folder of segments holds, without changing it. `FileLog` opens with it, and
`log_check` reports it. `core/log_records.py` has the format.
"""

import re
from dataclasses import dataclass, field
from typing import Protocol

from ollamamax_p2p.consensus.core.log_records import (
    SEGMENT_HEADER_BYTES,
    Damage,
    Record,
    Scan,
    Tail,
    decode_segment_header,
    scan_segment,
)
from ollamamax_p2p.consensus.core.messages import Entry, HardState, Snapshot
from ollamamax_p2p.consensus.log_files import named

BEGUN = "begun"
"""An empty file that says: segments have been here. A log without them has lost them."""

UNFINISHED = "next.tmp"
"""A segment that is being made."""

_NAME = re.compile(r"([0-9]{16})\.wal")


class ReadableFiles(Protocol):
    """The reading half of `LogFiles`."""

    @property
    def place(self) -> str:
        """See LogFiles."""

    def names(self) -> list[str]:
        """See LogFiles."""

    def size(self, name: str) -> int:
        """See LogFiles."""

    def read(self, name: str, offset: int, count: int) -> bytes:
        """See LogFiles."""


@dataclass(frozen=True, slots=True)
class FoundDamage:
    """Something that was durable and is not there any more."""

    file: str
    offset: int
    last_index: int
    """Of the last entry before it."""
    problem: str


@dataclass(slots=True)
class ReadSegment:
    """One file, as far as it could be read."""

    name: str
    scan: Scan
    last_index: int
    """Of any entry in it that may count; it may go once that is compacted. 0: none counts."""


@dataclass(slots=True)
class ReadLog:
    """What there is. With damage: what stands before the first."""

    begun: bool = False
    segments: list[ReadSegment] = field(default_factory=list)
    """In order and without a gap."""
    leftovers: list[str] = field(default_factory=list)
    """Files that nothing needs: what a crash left when segments were made or removed."""
    base: tuple[int, int] = (0, 0)
    """Term and index of the entry before the first."""
    entries: list[Entry] = field(default_factory=list)
    hard_state: HardState = field(default_factory=HardState)
    snapshot: Snapshot | None = None
    damage: list[FoundDamage] = field(default_factory=list)

    @property
    def torn_bytes(self) -> int:
        """What a crash left of a write, at the end of the last segment."""
        if not self.segments or self.segments[-1].scan.tail is not Tail.TORN:
            return 0
        scan = self.segments[-1].scan
        return max(scan.dirty_end - scan.end, 0)


def segment_name(sequence: int) -> str:
    """`0000000000000001.wal`."""
    return f"{sequence:016d}.wal"


def read_log(files: ReadableFiles) -> ReadLog:
    """Read all of it. Damage is reported, not raised; raises AccessRefused, or StoreDamaged if the
    system can't read.
    """
    try:
        names = files.names()
    except OSError as error:
        raise named(error, files.place, "read") from error
    log = ReadLog(begun=BEGUN in names)
    segments = [name for name in names if _NAME.fullmatch(name)]
    run = _last_run(segments)
    # Segments are removed oldest first, but a crash may bring any of them back: those before a
    # gap are leftovers, if what is behind the gap is whole without them.
    log.leftovers = segments[: len(segments) - len(run)]
    log.leftovers += [name for name in names if name == UNFINISHED]
    if not run:
        if log.begun:
            problem = "the log's segments are gone"
            log.damage.append(FoundDamage(segment_name(1), 0, 0, problem))
        return log
    replay = _Replay()
    for name in run:
        _add(log, replay, files, name)
    if log.segments and log.segments[-1].name == run[-1]:
        _judge_end(log, replay, log.segments[-1])
    _settle(log, replay)
    return log


def _last_run(names: list[str]) -> list[str]:
    """The segments that follow each other without a gap, up to the newest."""
    start = len(names)
    while start and (
        start == len(names) or int(names[start - 1][:16]) + 1 == _number(names, start)
    ):
        start -= 1
    return names[start:]


def _number(names: list[str], place: int) -> int:
    return int(names[place][:16])


def _add(log: ReadLog, replay: "_Replay", files: ReadableFiles, name: str) -> None:
    """One more segment; its own end is judged when the next one is known."""
    try:
        scan = _scan(files, name)
        _check_continues(log, replay, name, scan)
        last_index = scan.header.first_index - 1
        if not log.segments:
            replay.begin(scan.header.first_index)
        for record in scan.records:
            if log.damage:
                break  # what stands behind damage is looked at, and not relied on
            last_index = replay.add(record, last_index)
            if record.anew:
                for earlier in log.segments:
                    earlier.last_index = 0
        log.segments.append(ReadSegment(name, scan, last_index))
    except Damage as damage:
        found = FoundDamage(name, damage.offset, replay.last_index, damage.problem)
        log.damage.append(found)
    except OSError as error:
        raise named(error, f"{files.place}/{name}", "read") from error


def _scan(files: ReadableFiles, name: str) -> Scan:
    size = files.size(name)
    if size < 0:
        raise Damage(0, "it is not an ordinary file")
    header = decode_segment_header(files.read(name, 0, SEGMENT_HEADER_BYTES))
    if header.sequence != int(name[:16]):
        raise Damage(0, f"it is segment {header.sequence}, under another segment's name")
    if size > header.size:
        # Not read: there is no telling how long it is.
        raise Damage(0, f"the file has {size:,} bytes, it was made with {header.size:,}")
    return scan_segment(header, files.read(name, 0, header.size))


def _check_continues(log: ReadLog, replay: "_Replay", name: str, scan: Scan) -> None:
    if not log.segments:
        return
    before = log.segments[-1]
    if int(before.name[:16]) + 1 != scan.header.sequence:
        return  # the one between is damaged, and has been reported
    if before.scan.chain != scan.header.chain:
        problem = before.scan.problem or "the end of the segment is missing"
        found = FoundDamage(before.name, before.scan.end, replay.last_index, problem)
        log.damage.append(found)


def _judge_end(log: ReadLog, replay: "_Replay", last: ReadSegment) -> None:
    scan = last.scan
    problem = scan.problem if scan.tail is Tail.DAMAGED else ""
    if scan.sealed:
        problem = "the segment behind it is missing"
    if problem:
        log.damage.append(FoundDamage(last.name, scan.end, replay.last_index, problem))


def _settle(log: ReadLog, replay: "_Replay") -> None:
    """Put together what the records say."""
    log.hard_state, log.snapshot, log.base = replay.hard_state, replay.snapshot, replay.base
    kept = replay.base[1] + 1 - replay.start
    if not log.damage and kept < 0:
        problem = f"the segments with entries before {replay.start} are missing"
        log.damage.append(FoundDamage(log.segments[0].name, 0, replay.base[1], problem))
    elif not log.damage and kept > len(replay.entries):
        problem = f"it was compacted up to entry {replay.base[1]}, beyond its end"
        log.damage.append(FoundDamage(log.segments[-1].name, 0, replay.last_index, problem))
    if kept < 0:
        log.base = (0, replay.start - 1)
    log.entries = replay.entries[max(kept, 0) :]


class _Replay:
    """Puts records together in the order in which they were written."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.start = 1
        """Index of the first of them."""
        self.base = (0, 0)
        self.hard_state = HardState()
        self.snapshot: Snapshot | None = None

    @property
    def last_index(self) -> int:
        return self.start + len(self.entries) - 1

    def begin(self, index: int) -> None:
        """What was before this entry is in segments that are gone; `_settle` sees whether it had
        been compacted.
        """
        self.start = index

    def add(self, record: Record, last_index: int) -> int:
        """The greater of last_index and the record's last. Raises Damage."""
        if record.anew and record.snapshot is not None:
            metadata = record.snapshot.metadata
            self.entries, self.start = [], metadata.index + 1
            self.base = (metadata.term, metadata.index)
        self.hard_state = record.hard_state or self.hard_state
        self.snapshot = record.snapshot or self.snapshot
        self.base = record.base or self.base
        if record.entries:
            self._put(record.entries)
        return max(last_index, self.last_index if record.entries else 0)

    def _put(self, entries: list[Entry]) -> None:
        first = entries[0].index
        for index, entry in enumerate(entries, first):
            if entry.index != index:
                raise Damage(0, f"entry {entry.index} stands where {index} should")
        place = first - self.start
        if place > len(self.entries):
            raise Damage(0, f"entry {first} does not follow entry {self.last_index}")
        if place < 0:  # it replaces entries of a segment that is gone
            self.entries, self.start = list(entries), first
        else:
            self.entries[place:] = entries

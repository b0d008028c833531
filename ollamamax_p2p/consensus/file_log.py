"""FileLog: the log on disk, a write-ahead log in segments. `core/log_records.py` has the format.

What is read is in RAM (`RamLog`); the files are written, and read only when the log is opened.
`append` is one write and one fdatasync for the whole batch. Segments are allocated in full before
they get their names, so that a write changes no file's size and seldom finds the disk full.

A segment begins with a record of all state but the entries, so older segments can go as soon as
every entry in them has been compacted away. What must be durable before what:

- A new segment: the end of the old one; the file with its first record; its name; the seal of the
  old one. A received snapshot is the first record of a new segment, so its name is the switch.
- A compaction: the record that says so; then segments are removed, oldest first. A crash may bring
  any of them back; opening removes them again.
- At opening: what was read is synced before anybody relies on it, because the process that wrote it
  may have been killed before its sync.

**Errors.** A full disk raises StoreFull; what was written of the batch is filled with zeros, and
nothing has changed. A failed sync raises LogSyncFailed, now and at every later call: the system may
take the lost pages for clean, so trying again would lie (Rebello et al., ATC 2020). Damage raises
LogDamaged at opening, and nothing is changed; `log_records` tells damage from a torn write.
"""

import contextlib
import errno
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ollamamax_p2p.consensus.core.log_records import (
    ALIGN,
    RESERVED_BYTES,
    SEGMENT_BYTES_MAX,
    SEGMENT_HEADER_BYTES,
    Record,
    SegmentHeader,
    Tail,
    encode_frame,
    encode_record,
    encode_segment_header,
    frame_bytes,
)
from ollamamax_p2p.consensus.core.messages import (
    ConfState,
    Entry,
    HardState,
    Snapshot,
)
from ollamamax_p2p.consensus.log_files import DiskFiles, LogFiles, is_full, named
from ollamamax_p2p.consensus.log_reading import (
    BEGUN,
    UNFINISHED,
    ReadLog,
    read_log,
    segment_name,
)
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import LocalTrouble, LogDamaged, LogSyncFailed, StoreFull

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_ADVICE = "nothing was changed; see docs/runbooks/damaged-wal.md"


def open_file_log(
    folder: Path, settings: ConsensusSettings, files: LogFiles | None = None
) -> "FileLog":
    """Open a log, or begin one; blocks. files: in the place of the folder.

    Raises LogDamaged, LogSyncFailed, StoreFull, AccessRefused, StoreDamaged if it can't be read, or
    DataDirInUse if another process has it open.
    """
    given = files or DiskFiles(folder)
    try:
        return FileLog(given, settings)
    except BaseException:
        given.close()
        raise


@dataclass(slots=True)
class _Segment:
    name: str
    size: int
    last_index: int
    """Of the entries in it; it may go once that is compacted."""
    end: int = SEGMENT_HEADER_BYTES
    """Where the next frame goes."""
    frames: int = 0
    chain: int = 0
    synced: int = 0
    """Up to here it is durable."""
    dirty_end: int = 0
    """Behind what is left of a failed write; nothing is written before that is zeros again."""


class FileLog:
    """LogStorage on disk. Made by `open_file_log`."""

    def __init__(self, files: LogFiles, settings: ConsensusSettings) -> None:
        self._files = files
        self._segment_bytes = settings.segment_bytes
        self._ram = RamLog()
        self._writing = threading.Lock()
        self._broken: tuple[str, str] | None = None
        self._closed = False
        self._older: list[_Segment] = []
        self._sequence = 0
        self._vouched = False
        """Whether the last frame is the one that closing writes."""
        found = read_log(files)
        self.torn_bytes = found.torn_bytes
        """Cut off now: what a crash had left of a write."""
        self._current = self._recover(found)

    # -- reading

    def initial_state(self) -> tuple[HardState, ConfState]:
        """See LogReader."""
        self._check_usable()
        return self._ram.initial_state()

    def entries(self, low: int, high: int, max_bytes: int) -> list[Entry]:
        """See LogReader."""
        self._check_usable()
        return self._ram.entries(low, high, max_bytes)

    def term(self, index: int) -> int:
        """See LogReader."""
        self._check_usable()
        return self._ram.term(index)

    def first_index(self) -> int:
        """See LogReader."""
        self._check_usable()
        return self._ram.first_index()

    def last_index(self) -> int:
        """See LogReader."""
        self._check_usable()
        return self._ram.last_index()

    def snapshot(self) -> Snapshot:
        """See LogReader."""
        self._check_usable()
        return self._ram.snapshot()

    # -- writing

    def append(
        self,
        entries: Sequence[Entry] = (),
        hard_state: HardState | None = None,
        *,
        sync: bool = True,
    ) -> None:
        """See LogStorage. Raises ValueError if the entries would leave a gap, or are too long."""
        with self._writing:
            fitting = self._ram.fitting(entries)
            if fitting or hard_state is not None:
                self._put(Record(fitting, hard_state))
                self._ram.append(fitting, hard_state)
                if fitting:
                    self._current.last_index = max(self._current.last_index, fitting[-1].index)
            if sync:
                self._sync()

    def install_snapshot(self, snapshot: Snapshot, hard_state: HardState | None = None) -> None:
        """See LogStorage."""
        with self._writing:
            self._check_usable()
            self._ram.check_newer(snapshot)
            metadata = snapshot.metadata
            state = hard_state or self._ram.initial_state()[0]
            base = (metadata.term, metadata.index)
            self._begin_segment(Record([], state, snapshot, base, anew=True), metadata.index + 1)
            self._ram.install_snapshot(snapshot, hard_state)
            for segment in self._older:
                segment.last_index = 0
            self._remove_compacted()

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """See LogStorage."""
        with self._writing:
            self._check_usable()
            self._ram.check_saved(snapshot)
            self._put(Record(snapshot=snapshot))
            self._ram.save_snapshot(snapshot)
            self._sync()

    def compact(self, index: int) -> None:
        """See LogStorage."""
        with self._writing:
            self._check_usable()
            base = (self._ram.check_compactable(index), index)
            self._put(Record(base=base))
            self._ram.compact(index)
            self._sync()
            self._remove_compacted()

    def close(self) -> None:
        """See LogStorage."""
        with self._writing:
            if self._closed:
                return
            with contextlib.suppress(LocalTrouble):
                self._vouch()
            self._closed = True
            self._files.close()

    # -- one batch

    def _put(self, record: Record) -> None:
        """Write it; the caller changes what is in RAM, then syncs."""
        self._check_usable()
        payload = encode_record(record)
        room = frame_bytes(len(payload)) + RESERVED_BYTES
        if self._current.end + room > self._current.size:
            self._begin_segment(self._state(), self._ram.last_index() + 1, room)
        self._write(payload)
        self._vouched = False

    def _write(self, payload: bytes) -> None:
        segment = self._current
        frame, chain = encode_frame(
            payload,
            chain=segment.chain,
            offset=segment.end,
            synced=segment.synced,
            number=segment.frames,
        )
        if segment.dirty_end:
            self._clean(segment)
        try:
            self._files.write(segment.name, segment.end, frame)
        except OSError as error:
            if not is_full(error):
                raise self._broke(segment.name, error) from error
            segment.dirty_end = segment.end + len(frame)
            with contextlib.suppress(StoreFull):  # then it is tried again before the next write
                self._clean(segment)
            raise self._full(len(frame)) from error
        segment.end += len(frame)
        segment.frames += 1
        segment.chain = chain

    def _clean(self, segment: _Segment) -> None:
        """Fill what a write left behind the end with zeros, durably: what comes there next must not
        be mixed with it.

        First the last byte, without which no frame is whole, then the rest, then the header: so it
        is a torn frame still wherever a full disk ends this, and not a damaged one.
        """
        start, stop = segment.end, segment.dirty_end
        body = min(start + ALIGN, stop)
        try:
            for first, end in ((stop - 1, stop), (body, stop - 1), (start, body)):
                if first < end:
                    self._files.write(segment.name, first, bytes(end - first))
        except OSError as error:
            if is_full(error):
                raise self._full(segment.dirty_end - segment.end) from error
            raise self._broke(segment.name, error) from error
        self._sync_file(segment.name)
        segment.synced, segment.dirty_end = segment.end, 0

    def _sync(self) -> None:
        self._check_usable()
        segment = self._current
        if segment.synced < segment.end:
            self._sync_file(segment.name)
            segment.synced = segment.end

    def _vouch(self) -> None:
        """Write a frame behind the last batch that says it was durable: from now on damage to it
        can't be taken for a torn write.
        """
        segment = self._current
        if self._vouched or segment.end + RESERVED_BYTES > segment.size:
            return
        self._sync()
        self._write(b"")
        self._sync()

    # -- segments

    def _state(self) -> Record:
        """All state but the entries; what was compacted stays so."""
        hard_state, _ = self._ram.initial_state()
        return Record([], hard_state, self._ram.newest_snapshot(), self._ram.base())

    def _begin_segment(self, first: Record, first_index: int, room: int = 0) -> None:
        """Make the next segment the current one, with its first record in it, durable."""
        self._sync()
        new = self._make_segment(first, first_index, self._current.chain, room)
        self._seal(self._current)
        self._older.append(self._current)
        self._current = new

    def _make_segment(self, first: Record, first_index: int, chain: int, room: int) -> _Segment:
        payload = encode_record(first)
        end = SEGMENT_HEADER_BYTES + frame_bytes(len(payload))
        size = max(min(self._segment_bytes, SEGMENT_BYTES_MAX), end + room + RESERVED_BYTES)
        sequence = self._sequence + 1
        header = SegmentHeader(sequence, chain, first_index, size)
        frame, chain = encode_frame(
            payload, chain=chain, offset=SEGMENT_HEADER_BYTES, synced=SEGMENT_HEADER_BYTES, number=0
        )
        name = segment_name(sequence)
        with self._making(size):
            self._files.create(UNFINISHED, size)
            self._files.write(UNFINISHED, 0, encode_segment_header(header) + frame)
        self._sync_file(UNFINISHED)
        with self._making(size):
            self._files.rename(UNFINISHED, name)
        self._sync_folder()
        self._sequence = sequence
        return _Segment(name, size, first_index - 1, end, 1, chain, end)

    @contextlib.contextmanager
    def _making(self, size: int) -> Iterator[None]:
        """Until a new segment has its name, nothing depends on it."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):  # opening the log removes it then
                self._files.remove(UNFINISHED)
            if is_full(error):
                raise self._full(size) from error
            if error.errno in _REFUSED:
                raise named(error, self._files.place, "write") from error
            raise self._broke(UNFINISHED, error) from error

    def _seal(self, segment: _Segment) -> None:
        """Say in a segment that there is one behind it."""
        frame, _ = encode_frame(
            b"",
            chain=segment.chain,
            offset=segment.end,
            synced=segment.synced,
            number=segment.frames,
            seal=True,
        )
        try:
            self._files.write(segment.name, segment.end, frame)
        except OSError as error:
            if is_full(error):
                return  # it would only show that a later file was taken away; opening seals it
            raise self._broke(segment.name, error) from error
        self._sync_file(segment.name)

    def _remove_compacted(self) -> None:
        compacted = self._ram.first_index() - 1
        removed = False
        while self._older and self._older[0].last_index <= compacted:
            try:
                self._files.remove(self._older[0].name)
            except OSError:
                break  # the next compaction, or opening the log, tries again
            del self._older[0]
            removed = True
        if removed:
            self._sync_folder()

    # -- opening

    def _recover(self, found: ReadLog) -> _Segment:
        if found.damage:
            raise self._damaged(found)
        self._remove_leftovers(found.leftovers)
        if not found.segments:
            current = self._make_segment(Record(), 1, 0, 0)
        else:
            current = self._reopen(found)
        if not found.begun:
            with self._making(0):
                self._files.create(BEGUN, 0)
            self._sync_folder()
        return current

    def _reopen(self, found: ReadLog) -> _Segment:
        self._ram.restore(found.base, found.entries, found.hard_state, found.snapshot)
        segments = []
        for each in found.segments:
            scan = each.scan
            segments.append(
                _Segment(
                    each.name, scan.header.size, each.last_index, scan.end, scan.frames, scan.chain
                )
            )
        *self._older, current = segments
        self._sequence = found.segments[-1].scan.header.sequence
        if found.segments[-1].scan.tail is Tail.TORN:
            current.dirty_end = found.segments[-1].scan.dirty_end
            self._clean(current)
        self._sync_file(current.name)
        self._sync_folder()
        current.synced = current.end
        if self._older and not found.segments[-2].scan.sealed:
            self._seal(self._older[-1])
        self._remove_compacted()
        return current

    def _remove_leftovers(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # it does no harm, and the next opening tries again
                self._files.remove(name)

    def _damaged(self, found: ReadLog) -> LogDamaged:
        first = found.damage[0]
        return LogDamaged(
            f"{self._files.place}/{first.file}",
            f"at byte {first.offset:,}, behind entry {first.last_index:,}: {first.problem}; "
            f"{_ADVICE}",
        )

    # -- what fails

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise LogSyncFailed(*self._broken)
        if self._closed:
            raise LocalTrouble(f"the log in {self._files.place} is closed")

    def _sync_file(self, name: str) -> None:
        try:
            self._files.sync(name)
        except OSError as error:
            raise self._broke(name, error) from error

    def _sync_folder(self) -> None:
        try:
            self._files.sync_folder()
        except OSError as error:
            raise self._broke("", error) from error

    def _broke(self, name: str, error: OSError) -> LogSyncFailed:
        """Nobody knows now what is on the disk; every later call is refused."""
        path = f"{self._files.place}/{name}" if name else self._files.place
        self._broken = (path, str(error.strerror))
        return LogSyncFailed(*self._broken)

    def _full(self, needed: int) -> StoreFull:
        try:
            free = self._files.free_bytes()
        except OSError:
            free = 0
        return StoreFull(self._files.place, needed, free)

"""DiskPartial: an unfinished blob on disk, and the record of what is there.

Order of things, so that no crash can make a record claim bytes that are not there:

    write:   data into the file -> entry into the record. Survives the end of the process.
    sync:    fsync data -> mark into the record -> fsync record. Survives a power cut.
    open:    entries behind the last mark are checked by their CRC before they count.
    commit:  fsync data -> sha256 of the whole -> rename -> fsync folder -> remove the record.

The file is locked while it is open: a second process that shares the folder is refused.
"""

import os
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial as bind
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest, file_name
from ollamamax_p2p.content.core.partial_record import (
    Record,
    decode_record,
    encode_head,
    encode_map,
    encode_sync,
    encode_write,
)
from ollamamax_p2p.content.core.ranges import Ranges
from ollamamax_p2p.content.durable_files import (
    is_named,
    lock,
    open_file,
    read_exactly,
    replace_file,
    sync,
    sync_folder,
    translated,
    write_all,
)
from ollamamax_p2p.content.map_building import build_chunk_map
from ollamamax_p2p.errors import DataDirInUse, MalformedMessage

_RECORD_BYTES_MAX = 64 * 1024 * 1024
"""A record of a few thousand writes has 100 KB."""

_READ_BYTES = 1024 * 1024

Args = TypeVarTuple("Args")
Result = TypeVar("Result")


class DiskPartial:
    """An unfinished blob. Made by `open_disk_partial`."""

    def __init__(
        self,
        digest: Digest,
        size: int,
        folder: Path,
        *,
        record_interval_bytes: int,
        limiter: trio.CapacityLimiter,
        hash_limiter: trio.CapacityLimiter,
        on_close: Callable[["DiskPartial"], None],
        on_commit: Callable[["DiskPartial", ChunkMap], None],
    ) -> None:
        self.digest, self.size = digest, size
        self.missing_bytes = size
        self.path = folder / file_name(digest)
        self._record_path = record_path(folder, digest)
        self._interval = record_interval_bytes
        self._limiter, self._hash_limiter = limiter, hash_limiter
        self._on_close, self._on_commit = on_close, on_commit
        self._have = Ranges()
        self._map_digest: Digest | None = None
        self._data = -1
        self._record = -1
        # Threads share the record; the data are written outside of the lock, so that many sources
        # can write at once.
        self._lock = threading.Lock()
        self._writes_noted = 0
        self._unsynced_bytes = 0
        # Only the event loop looks at these.
        self._closed = False
        self._alone = False
        self._busy = 0
        self._idle = trio.lowlevel.ParkingLot()

    @property
    def map_digest(self) -> Digest | None:
        """See PartialBlob."""
        return self._map_digest

    def missing(self) -> list[tuple[int, int]]:
        """See PartialBlob."""
        return self._have.gaps(self.size)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        """See PartialBlob."""
        end = offset + len(data)
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"[{offset}, {end}) is outside [0, {self.size})")
        if self._alone:
            raise ValueError(f"the unfinished blob {self.digest} is being checked as a whole")
        if data:
            await self._in_thread(self._write, offset, end, data)
            self._have.add(offset, end)
            self._count_missing()

    def _count_missing(self) -> None:
        self.missing_bytes = self.size - self._have.total

    def _write(self, offset: int, end: int, data: bytes | memoryview) -> None:
        with translated(self.path, "write", end - offset):
            write_all(self._data, data, offset)
            entry = encode_write(offset, end, zlib.crc32(data))
            with self._lock:
                self._append(entry)
                self._writes_noted += 1
                self._unsynced_bytes += end - offset
                due = self._unsynced_bytes >= self._interval
            if due:
                self._sync()

    def _append(self, entry: bytes) -> None:
        # One write of a few bytes at the end of a file: whole, or cut short by the end of the
        # disk, and then taken back so that the next entry does not stand behind half a one.
        end = os.lseek(self._record, 0, os.SEEK_END)
        try:
            write_all(self._record, entry, end)
        except OSError:
            os.ftruncate(self._record, end)
            raise

    def _sync(self) -> None:
        """Everything noted before this is called becomes durable."""
        with self._lock:
            count, self._unsynced_bytes = self._writes_noted, 0
        sync(self._data)
        with self._lock:
            self._append(encode_sync(count))
        sync(self._record)

    async def read_at(self, offset: int, length: int) -> bytes:
        """See PartialBlob."""
        end = offset + length
        if not 0 <= offset <= end <= self.size or not self._have.covers(offset, end):
            raise ValueError(f"[{offset}, {end}) has not been written")
        return await self._in_thread(read_exactly, self._data, length, offset, self.path)

    async def use_map(self, chunk_map: ChunkMap | None) -> None:
        """See PartialBlob."""
        if chunk_map is not None:
            chunk_map.check_fits(self.digest, self.size)
        if (chunk_map.digest if chunk_map else None) != self._map_digest:
            async with self._alone_with_it():
                await self._in_thread(self._use_map, chunk_map)
                self._count_missing()

    def _use_map(self, chunk_map: ChunkMap | None) -> None:
        with translated(self.path, "write"):
            if chunk_map is not None:
                self._have = self._matching(chunk_map)
            self._map_digest = chunk_map.digest if chunk_map else None
            self._rewrite_record()

    def _matching(self, chunk_map: ChunkMap) -> Ranges:
        kept = Ranges()
        for index, at in enumerate(chunk_map.offsets):
            length = chunk_map.lengths[index]
            if self._have.covers(at, at + length) and chunk_map.matches(
                index, read_exactly(self._data, length, at, self.path)
            ):
                kept.add(at, at + length)
        return kept

    async def flush(self) -> None:
        """See PartialBlob."""
        await self._in_thread(self._flush)

    def _flush(self) -> None:
        with translated(self.path, "write"):
            self._sync()

    async def commit(self) -> None:
        """See PartialBlob."""
        if self.missing():
            raise ValueError(f"{self.digest} is not complete")
        async with self._alone_with_it():
            await self.flush()
            read_at = bind(_read_for_hash, self._data, self.path)
            # The map is made on the way: whoever fetched a blob serves it next.
            built = await build_chunk_map(self.digest, self.size, read_at, self._hash_limiter)
            await self._in_thread(self._on_commit, self, built)
            self.abandon()

    async def discard(self) -> None:
        """See PartialBlob."""
        await self._in_thread(self._remove)
        self.abandon()

    def _remove(self) -> None:
        with translated(self.path, "remove"):
            self.path.unlink(missing_ok=True)
            self._record_path.unlink(missing_ok=True)
            sync_folder(self.path.parent)

    async def __aenter__(self) -> "DiskPartial":
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._closed:
            return
        with trio.CancelScope(shield=True):  # bounded: one fsync
            try:
                await self.flush()
            finally:
                self.abandon()

    # -- opening and closing -------------------------------------------------------------------

    def open(self) -> None:
        """Take the files, read the record, check what it may not be trusted with. In a thread."""
        self._data = self._open_data()
        try:
            record = self._read_record()
            if record is not None:
                self._map_digest = record.map_digest
                self._have = self._trusted(record)
                self._count_missing()
            # The record first: an old one must never stand beside a file of the full size whose
            # bytes it does not know.
            self._rewrite_record()
            os.ftruncate(self._data, self.size)
        except BaseException:
            self.close()
            raise

    def _open_data(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not lock(descriptor):
                os.close(descriptor)
                raise DataDirInUse(str(self.path.parent), None)
            # Another process may have given the file its final name before we had the lock, and
            # then what we hold is a blob of the store, not to be written.
            if is_named(descriptor, self.path):
                # It becomes the blob: no umask may make a blob that Ollama cannot read.
                os.fchmod(descriptor, 0o644)
                return descriptor
            os.close(descriptor)

    def _read_record(self) -> Record | None:
        try:
            with open_file(self._record_path, os.O_RDONLY) as descriptor:
                size = min(os.fstat(descriptor).st_size, _RECORD_BYTES_MAX)
                record = decode_record(read_exactly(descriptor, size, 0, self._record_path))
        except (FileNotFoundError, MalformedMessage):
            return None
        return record if (record.blob, record.size) == (self.digest, self.size) else None

    def _trusted(self, record: Record) -> Ranges:
        have = Ranges()
        held = os.fstat(self._data).st_size
        for claim in record.claims:
            start, end = claim.start, claim.end
            if end <= held and (claim.synced or self._crc(start, end) == claim.crc):
                have.add(claim.start, claim.end)
            else:
                have.remove(claim.start, claim.end)
        return have

    def _crc(self, start: int, end: int) -> int:
        crc = 0
        for offset in range(start, end, _READ_BYTES):
            length = min(_READ_BYTES, end - offset)
            crc = zlib.crc32(read_exactly(self._data, length, offset, self.path), crc)
        return crc

    def _rewrite_record(self) -> None:
        """A new record that says what we have, all of it durable."""
        sync(self._data)
        with self._lock:
            parts = [encode_head(self.digest, self.size), encode_map(self._map_digest)]
            # A synced entry is taken by its word, so its CRC is never looked at.
            parts += [encode_write(start, end, 0) for start, end in self._have]
            self._writes_noted = len(parts) - 2
            self._unsynced_bytes = 0
            parts.append(encode_sync(self._writes_noted))
            replace_file(self._record_path, b"".join(parts), self.path.parent)
            if self._record != -1:
                os.close(self._record)
                self._record = -1  # if nothing can be opened now, it must not be closed twice
            self._record = os.open(self._record_path, os.O_RDWR | os.O_CLOEXEC)

    def abandon(self) -> None:
        """No more calls; the files are closed as soon as no thread uses them."""
        self._closed = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        # A descriptor that is closed under a writing thread could name another file by then.
        if self._busy == 0 and self._data != -1:
            self.close()
            self._on_close(self)

    def close(self) -> None:
        """Close the files, and with them give up the lock."""
        for descriptor in (self._data, self._record):
            if descriptor != -1:
                os.close(descriptor)
        self._data = self._record = -1

    async def _in_thread(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        if self._closed:
            raise ValueError(f"the unfinished blob {self.digest} is closed")
        self._busy += 1
        try:
            with translated(self.path, "use"):
                return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)
        finally:
            self._busy -= 1
            if self._busy == 0:
                self._idle.unpark_all()
            if self._closed:
                self._close_if_idle()

    @asynccontextmanager
    async def _alone_with_it(self) -> AsyncIterator[None]:
        """Nobody else writes within the block; whoever is writing finishes first."""
        if self._alone:
            raise ValueError(f"the unfinished blob {self.digest} is being checked as a whole")
        self._alone = True
        try:
            while self._busy:
                await self._idle.park()
            yield
        finally:
            self._alone = False


def record_path(folder: Path, digest: Digest) -> Path:
    """The record beside a partial blob's data."""
    return folder / f"{file_name(digest)}.record"


def remove_given_up(folder: Path, digest: Digest, before: float) -> bool:
    """Remove an unfinished blob that nobody has open and nobody wrote to since; says whether it
    went. before: Unix seconds.
    """
    data, record = folder / file_name(digest), record_path(folder, digest)
    if _last_written(data, record) >= before:
        return False
    # Made if only the record is left, because the lock is on the data.
    with open_file(data, os.O_RDWR | os.O_CREAT) as descriptor:
        if not lock(descriptor) or not is_named(descriptor, data):
            return False
        if _last_written(data, record) >= before:
            return False
        # The record first: what is left if this ends here vouches for nothing.
        record.unlink(missing_ok=True)
        data.unlink()
        return True


def _last_written(data: Path, record: Path) -> float:
    """When a pull last had it: every write notes itself in the record, and opening renews it."""
    try:
        return record.stat().st_mtime
    except FileNotFoundError:
        about = data.stat()
        return about.st_mtime if about.st_size else 0.0


def _read_for_hash(descriptor: int, path: Path, offset: int, length: int) -> bytes:
    with translated(path, "read"):
        return read_exactly(descriptor, length, offset, path)

"""LogFiles: the few things that a log does with its folder, so that a simulated disk can do them
too (`testing.simulated_disk`).
"""

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Protocol

from ollamamax_p2p.errors import (
    AccessRefused,
    DataDirInUse,
    LocalTrouble,
    StoreDamaged,
    StoreFull,
)

_LOCK = "lock"


class LogFiles(Protocol):
    """A flat folder, this process's alone. Each method raises OSError as the system does."""

    @property
    def place(self) -> str:
        """For errors."""

    def names(self) -> list[str]:
        """The files there, in order."""

    def size(self, name: str) -> int:
        """Bytes; of what is no ordinary file -1."""

    def read(self, name: str, offset: int, count: int) -> bytes:
        """Up to count bytes; fewer only where the file ends."""

    def create(self, name: str, size: int) -> None:
        """A new file of this many zeros, in the place of an old one; its name is durable after
        `sync_folder`.
        """

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Durable after `sync`. If it raises, any part of it may have been written."""

    def sync(self, name: str) -> None:
        """Make what was written durable, and the file's size."""

    def rename(self, old: str, new: str) -> None:
        """Durable after `sync_folder`."""

    def remove(self, name: str) -> None:
        """Durable after `sync_folder`."""

    def sync_folder(self) -> None:
        """Make names durable that came and went."""

    def free_bytes(self) -> int:
        """About how much room there is."""

    def close(self) -> None:
        """Give everything back; never raises."""


class FolderReader:
    """The reading half of LogFiles, of a real folder, which it neither locks nor changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def place(self) -> str:
        """See LogFiles."""
        return str(self._folder)

    def names(self) -> list[str]:
        """See LogFiles."""
        return sorted(os.listdir(self._folder))

    def size(self, name: str) -> int:
        """See LogFiles."""
        found = (self._folder / name).stat()
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def read(self, name: str, offset: int, count: int) -> bytes:
        """See LogFiles."""
        # NONBLOCK: a FIFO in a segment's place must not be waited for.
        handle = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(handle, "rb", buffering=0) as file:
            parts = []
            while count and (part := os.pread(file.fileno(), count, offset)):
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def in_use(self) -> bool:
        """Whether a process has the log open to write."""
        try:
            handle = os.open(self._folder / _LOCK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(handle)
        return False


class DiskFiles(FolderReader):
    """A real folder, made if it is missing, locked against a second process."""

    def __init__(self, folder: Path) -> None:
        """Raises AccessRefused, DataDirInUse, StoreDamaged, StoreFull, LocalTrouble."""
        super().__init__(folder)
        self._open: dict[str, int] = {}
        self._folder_handle = self._lock_handle = -1
        try:
            _make_folder(folder)
            self._folder_handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock_handle = os.open(
                folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            self._lock()
        except OSError as error:
            self.close()
            raise named(error, str(folder), "write") from error
        except DataDirInUse:
            self.close()
            raise

    def create(self, name: str, size: int) -> None:
        """See LogFiles."""
        self._forget(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        handle = self._open[name] = os.open(self._folder / name, flags, 0o600)
        if hasattr(os, "posix_fallocate") and size:
            # Real blocks: then a write finds no full disk, and fdatasync has no size to write.
            os.posix_fallocate(handle, 0, size)
        else:
            os.ftruncate(handle, size)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """See LogFiles."""
        handle, view = self._handle(name), memoryview(data)
        while view:
            written = os.pwrite(handle, view, offset)
            offset += written
            view = view[written:]

    def sync(self, name: str) -> None:
        """See LogFiles."""
        if hasattr(os, "fdatasync"):
            os.fdatasync(self._handle(name))
        else:
            _sync_to_the_platter(self._handle(name))

    def rename(self, old: str, new: str) -> None:
        """See LogFiles."""
        os.rename(self._folder / old, self._folder / new)
        self._forget(new)
        if old in self._open:
            self._open[new] = self._open.pop(old)

    def remove(self, name: str) -> None:
        """See LogFiles."""
        self._forget(name)
        os.unlink(self._folder / name)

    def sync_folder(self) -> None:
        """See LogFiles."""
        os.fsync(self._folder_handle)

    def free_bytes(self) -> int:
        """See LogFiles."""
        found = os.statvfs(self._folder)
        return found.f_bavail * found.f_frsize

    def close(self) -> None:
        """See LogFiles."""
        for handle in (*self._open.values(), self._lock_handle, self._folder_handle):
            with contextlib.suppress(OSError):  # -1, if opening failed; and what close reports late
                os.close(handle)
        self._open = {}
        self._folder_handle = self._lock_handle = -1

    def _handle(self, name: str) -> int:
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC)
        return self._open[name]

    def _forget(self, name: str) -> None:
        handle = self._open.pop(name, None)
        if handle is not None:
            os.close(handle)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lock_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock_handle, 20, 0).strip()
            pid = int(holder) if holder.isdigit() else None
            raise DataDirInUse(str(self._folder), pid) from None
        with contextlib.suppress(
            OSError
        ):  # a full disk: whoever is refused then isn't told by whom
            os.ftruncate(self._lock_handle, 0)
            os.pwrite(self._lock_handle, b"%d\n" % os.getpid(), 0)


def is_full(error: OSError) -> bool:
    """Whether there is only no room now."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def named(error: OSError, place: str, doing: str, needed: int = 0, free: int = 0) -> LocalTrouble:
    """The error of ours that says what the system said. doing: a verb; needed: bytes."""
    if is_full(error):
        return StoreFull(place, needed, free)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessRefused(place, doing)
    if error.errno == errno.EROFS:
        return LocalTrouble(
            f"cannot {doing} {place}: the file system is read-only; make it writable, start again"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StoreDamaged(place, "there is a file where the log's folder should be; move it away")
    return StoreDamaged(place, f"cannot {doing} it ({error.strerror}); check path and disk")


def _make_folder(folder: Path) -> None:
    """With those above it; durable, so that no crash can take the log away whole."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    handle = os.open(folder.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_to_the_platter(handle: int) -> None:
    # On macOS fsync leaves the data in the drive's cache; this is the call that does not.
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
    else:
        os.fsync(handle)

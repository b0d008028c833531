"""Files that survive: written whole or not at all, on the disk before they are named.

Blocking functions, to be run in threads. What the operating system refuses comes out as one of our
errors, translated here and nowhere else.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ollamamax_p2p.errors import AccessRefused, StoreDamaged, StoreFull, StoreReadOnly

_FICLONE = 0x40049409
"""Linux's ioctl that makes one file share another's blocks until either is written."""


@contextlib.contextmanager
def translated(path: Path, doing: str, needed: int = 0) -> Iterator[None]:
    """Turn an OSError about the store's disk into the error that names it.

    doing: a verb, for AccessRefused; needed: bytes, for StoreFull.
    """
    try:
        yield
    except OSError as error:
        raise _named(error, path, doing, needed) from error


def _named(error: OSError, path: Path, doing: str, needed: int) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(str(path), needed, free_bytes(path))
    if error.errno == errno.EROFS:
        return StoreReadOnly(str(path))
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessRefused(error.filename or str(path), doing)
    if error.errno == errno.EIO:
        return StoreDamaged(error.filename or str(path), "the disk reports an error; check it")
    if error.errno == errno.ENOTDIR:
        return StoreDamaged(error.filename or str(path), "there is a file where a folder should be")
    return error


def free_bytes(path: Path) -> int:
    """What may still be written on the file system of a path, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably, with the mode that Ollama gives them."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o755)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    with open_file(path, os.O_RDONLY | os.O_DIRECTORY) as file:
        sync(file)


def sync(descriptor: int) -> None:
    """Wait until a file is on the disk."""
    if sys.platform == "darwin":
        # There fsync ends in the drive's own cache, which a power cut empties.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


@contextlib.contextmanager
def open_file(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    """A file descriptor that is closed at the end of the block."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """pwrite until everything is written; a nearly full disk takes a part."""
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def read_exactly(descriptor: int, length: int, offset: int, path: Path) -> bytes:
    """pread until the length is reached. Raises StoreDamaged if the file ends before."""
    parts = []
    while length:
        part = os.pread(descriptor, length, offset)
        if not part:
            raise StoreDamaged(str(path), f"it ends at byte {offset:,}, too early; fetch it again")
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextlib.contextmanager
def new_file(folder: Path) -> Iterator[tuple[Path, int]]:
    """A new file in a folder, under a name that nobody uses; gone at the end of the block unless
    it was moved away.
    """
    path = folder / f"new-{secrets.token_hex(8)}"
    try:
        with open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as descriptor:
            # The umask of whoever started us must not make a store that Ollama cannot read.
            os.fchmod(descriptor, 0o644)
            lock(descriptor)
            yield path, descriptor
    finally:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove new files that a killed process left behind; those of a living one are locked."""
    for path in folder.glob("new-*"):
        with contextlib.suppress(OSError), open_file(path, os.O_RDONLY) as descriptor:
            if lock(descriptor):
                path.unlink()


def replace_file(path: Path, data: bytes, folder: Path) -> None:
    """Write a file so that a power cut leaves the old or the new one.

    folder: where it is written first; on the same file system as path.
    """
    with new_file(folder) as (new, descriptor):
        write_all(descriptor, data, 0)
        sync(descriptor)
        new.replace(path)
    sync_folder(path.parent)


def share_blocks(source: int, target: int) -> bool:
    """Make target a copy of source that takes no room (a reflink); False where the file system
    cannot.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def lock(descriptor: int) -> bool:
    """Take a file for this process until it is closed; False if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def can_rename(source_folder: Path, target_folder: Path) -> bool:
    """Whether a file can be moved from one folder to the other in one step. Tried, because two
    mounts of one file system look alike and refuse it.
    """
    with new_file(source_folder) as (path, _):
        try:
            moved = path.rename(target_folder / f".{path.name}")
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            raise
        moved.unlink()
    return True

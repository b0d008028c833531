"""Files that survive: written whole or not at all, on the disk before they are named.

Blocking functions, to be run in threads. What the operating system refuses comes out as one of our
errors, translated here and nowhere else.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from ollamamax_p2p.errors import (
    AccessRefused,
    LocalTrouble,
    StoreDamaged,
    StoreFull,
    StoreReadOnly,
)

_FICLONE = 0x40049409
"""Linux's ioctl that makes one file share another's blocks until either is written."""

_NEW_FILE = re.compile(r"\.?new-[0-9a-f]{16}(-link)?")
"""Names under which files are made here."""

SHARED_FOLDER_MODE = 0o755
"""Of what Ollama reads too; it gives its folders the same."""
PRIVATE_FOLDER_MODE = 0o700
"""Of what is this node's alone."""


@contextlib.contextmanager
def translated(path: Path, doing: str, needed: int = 0) -> Iterator[None]:
    """Turn any OSError about the store's disk into the LocalTrouble that names it.

    doing: a verb, for the message; needed: bytes, for StoreFull.
    """
    try:
        yield
    except OSError as error:
        raise _named(error, path, doing, needed) from error


def _named(error: OSError, path: Path, doing: str, needed: int) -> LocalTrouble:
    where = str(error.filename or path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull(str(path), needed, _free_bytes_if_known(path))
    if error.errno == errno.EROFS:
        return StoreReadOnly(str(path))
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessRefused(where, doing)
    if error.errno == errno.EIO:
        return StoreDamaged(where, "the disk reports an error; check it")
    if error.errno == errno.ENOTDIR:
        return StoreDamaged(where, "there is a file where a folder should be")
    if out_of_descriptors(error):
        return LocalTrouble(
            f"cannot {doing} {where}: too many open files; raise the limit (`ulimit -n`) "
            "and start the node again"
        )
    return LocalTrouble(f"cannot {doing} {where}: {error.strerror or error}; check path and disk")


def out_of_descriptors(error: OSError) -> bool:
    """Whether it says nothing about the file, only that no more can be opened now."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def _free_bytes_if_known(path: Path) -> int:
    try:
        return free_bytes(path)
    except OSError:
        return 0


def free_bytes(path: Path) -> int:
    """What may still be written on the file system of a path, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def make_folder(path: Path, mode: int = SHARED_FOLDER_MODE) -> None:
    """Make a folder and those above it, durably, with this mode whatever the umask."""
    if path.is_dir():
        return
    make_folder(path.parent, mode)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=mode)
        # Added to what it has: a group that the folder above hands down must stay.
        path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)
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
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for path in (folder / name for name in names if _NEW_FILE.fullmatch(name)):
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


def is_named(descriptor: int, path: Path) -> bool:
    """Whether what is open is what the path names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


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

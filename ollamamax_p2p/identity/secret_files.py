"""Small files that only this user may read: written whole or not at all, refused when exposed."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ollamamax_p2p.errors import AccessRefused, KeyExposed, StoreDamaged, StoreFull

SECRET_BYTES_MAX = 8 * 1024 * 1024
"""A longer file is not one of ours: the largest, 256 tickets with 256 redeemers each, has 4 MB."""

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def write_secret(path: Path, data: bytes) -> None:
    """Replace the file by one of mode 0600 that holds data; returns once that survives a power cut.

    Makes the folder (0700) if it is missing. Raises AccessRefused, StoreFull or StoreDamaged (a
    folder in its place); then the old file, if any, is as it was.
    """
    # Beside it, so that the rename stays on one file system; a dot keeps it out of plain listings.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_leftovers(path)
        with _new_file(temporary) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _named(error, path, "write", len(data)) from error


def read_secret(path: Path) -> bytes | None:
    """The file's bytes; None if there is none.

    Raises KeyExposed if group or others may read or write it, AccessRefused, or StoreDamaged if it
    is no ordinary file, empty or absurdly long.
    """
    try:
        # NONBLOCK: a FIFO in the place of the file must be refused, not waited for.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _named(error, path, "read", 0) from error
    try:
        # The mode of what is open, not of what the name meant a moment earlier.
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise StoreDamaged(str(path), "not an ordinary file; move it away")
        if found.st_mode & _OTHERS:
            raise KeyExposed(str(path), stat.S_IMODE(found.st_mode))
        with open(handle, "rb", closefd=False) as file:
            data = file.read(SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise _named(error, path, "read", 0) from error
    finally:
        os.close(handle)
    if not data or len(data) > SECRET_BYTES_MAX:
        problem = "the file is empty" if not data else "the file is too long to be ours"
        raise StoreDamaged(str(path), f"{problem}; restore it from a backup or remove it")
    return data


def remove_secret(path: Path) -> None:
    """Unlink the file if it is there, and what a killed process left of its successors; returns
    once that survives a power cut. Raises AccessRefused.
    """
    try:
        # First, so that whoever ends in between still finds the file and removes it again.
        _remove_leftovers(path)
        path.unlink()
        _sync_folder(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _named(error, path, "remove", 0) from error


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, locked until the end of the block so that nobody takes it for a leftover."""
    # Created with its final mode: there is no moment in which others could open it.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as file:
        _lock(handle)
        yield file


def _remove_leftovers(path: Path) -> None:
    """Remove what a process that was killed while it wrote this secret left of it: they are whole
    keys. Only this user's ordinary files of the very name that `write_secret` gives, which no
    living process is writing.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}")
    try:
        names = os.listdir(path.parent)
    except FileNotFoundError:
        return
    for name in filter(ours.fullmatch, names):
        _remove_leftover(path.with_name(name))


def _remove_leftover(path: Path) -> None:
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        if _lock(handle):
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named(
    error: OSError, path: Path, doing: str, needed: int
) -> AccessRefused | StoreFull | StoreDamaged:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(str(path.parent), needed, shutil.disk_usage(path.parent).free)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessRefused(str(path), doing)
    return StoreDamaged(str(path), f"cannot {doing} it ({error.strerror}); check path and disk")

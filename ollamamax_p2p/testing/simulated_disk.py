"""SimulatedDisk: a folder for a log, on a disk that forgets what was not synced.

    disk = SimulatedDisk()
    log = open_file_log(Path("unused"), settings, disk)
    ...                       # the process writes; at any moment:
    disk.crash(rng)           # the machine loses its power
    log = open_file_log(Path("unused"), settings, disk)

A crash keeps of each sector that was written since the last sync one of the versions it had since
then; so writes are lost, torn and reordered. Names that came, went or changed since the last sync
of the folder did so or not, each by itself. A killed process, unlike a crash, loses nothing: open
the log again without `crash`.

Deterministic: the caller's dice decide, there is no clock. A write costs a few microseconds however
large the file is; zeros that nobody has written take no memory.
"""

import copy
import errno
import random
from collections.abc import Callable
from enum import Enum

SECTOR = 512


class Loss(Enum):
    """What happens to what was not synced when the power goes."""

    EVERYTHING = "everything"
    """All of it is lost."""
    NOTHING = "nothing"
    """All of it is there."""
    TORN = "torn"
    """It is there up to a moment, in the order in which it was done; of the write of that moment
    any sectors are."""
    REORDERED = "reordered"
    """Any write and any change of a name is there or not, whatever its order."""
    ANY = "any"
    """Any sector of any write, and any change of a name: everything above and between."""


class _File:
    __slots__ = ("data", "durable", "durable_size", "size", "unsynced")

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = bytearray()
        """What is read; zeros behind it up to the size."""
        self.durable = bytearray()
        self.durable_size = 0
        self.unsynced: list[tuple[int, bytes]] = []

    def sync(self) -> None:
        for offset, data in self.unsynced:
            _overwrite(self.durable, offset, data)
        self.unsynced.clear()
        self.durable_size = self.size


_Change = tuple[str | None, str | None, _File]
"""A name that goes, a name that comes, and whose they are."""


class SimulatedDisk:
    """A `LogFiles` in memory. One process uses it at a time."""

    def __init__(self, capacity: int = 2**40) -> None:
        """capacity: bytes; beyond it files can't be made, as on a full disk."""
        self.capacity = capacity
        self.steps = 0
        """Writes, syncs and changes of names so far: each is a moment at which it may crash."""
        self.crash_at: int | None = None
        """Before the step of this number (from 1) `Crashed` is raised, and at every later one."""
        self.syncs = 0
        self.fail_sync_at: int | None = None
        """The sync of this number (from 1), of a file or of the folder, fails as on a dying disk;
        what it should have made durable may be lost with the next crash."""
        self.writes = 0
        self.fail_write_at: int | None = None
        """From the write of this number (from 1) on, none gets more than its first half written,
        and raises `write_error`; as where space is not allocated in advance. None: no more."""
        self.write_error = errno.ENOSPC
        self._files: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._changes: list[_Change] = []

    # -- LogFiles

    @property
    def place(self) -> str:
        """See LogFiles."""
        return "simulated disk"

    def names(self) -> list[str]:
        """See LogFiles."""
        return sorted(self._files)

    def size(self, name: str) -> int:
        """See LogFiles."""
        return self._file(name).size

    def read(self, name: str, offset: int, count: int) -> bytes:
        """See LogFiles."""
        file = self._file(name)
        count = max(min(count, file.size - offset), 0)
        return bytes(file.data[offset : offset + count]).ljust(count, b"\0")

    def create(self, name: str, size: int) -> None:
        """See LogFiles."""
        self._step()
        if size > self.free_bytes():
            raise OSError(errno.ENOSPC, "No space left on device")
        file = self._files[name] = _File(size)
        self._changes.append((None, name, file))

    def write(self, name: str, offset: int, data: bytes) -> None:
        """See LogFiles."""
        self._step()
        self.writes += 1
        file = self._file(name)
        if offset + len(data) > file.size:
            raise OSError(errno.EFBIG, "a log writes into what is allocated only")
        refused = self.fail_write_at is not None and self.writes >= self.fail_write_at
        if refused:
            data = data[: len(data) // 2]
        file.unsynced.append((offset, data))
        _overwrite(file.data, offset, data)
        if refused:
            raise OSError(self.write_error, "injected by a test")

    def sync(self, name: str) -> None:
        """See LogFiles."""
        self._begin_sync()
        self._file(name).sync()

    def rename(self, old: str, new: str) -> None:
        """See LogFiles."""
        self._step()
        file = self._file(old)
        del self._files[old]
        self._files[new] = file
        self._changes.append((old, new, file))

    def remove(self, name: str) -> None:
        """See LogFiles."""
        self._step()
        file = self._file(name)
        del self._files[name]
        self._changes.append((name, None, file))

    def sync_folder(self) -> None:
        """See LogFiles."""
        self._begin_sync()
        self._durable_names = dict(self._files)
        self._changes.clear()

    def free_bytes(self) -> int:
        """See LogFiles."""
        return self.capacity - sum(file.size for file in self._files.values())

    def close(self) -> None:
        """See LogFiles."""

    # -- what the disk does

    def crash(self, rng: random.Random, loss: Loss = Loss.ANY) -> None:
        """The machine loses its power, and comes up again. Ends injected faults."""
        kept = _chooser(rng, loss)
        names = dict(self._durable_names)
        for gone, come, file in self._changes:
            if kept():
                if gone is not None and names.get(gone) is file:
                    del names[gone]
                if come is not None:
                    names[come] = file
        # By name, so that equal dice give equal disks.
        for name in sorted(names):
            _settle(names[name], rng, loss, kept)
        self._files, self._durable_names = names, dict(names)
        self._changes.clear()
        self.crash_at = self.fail_sync_at = self.fail_write_at = None

    @property
    def has_unsynced(self) -> bool:
        """Whether a crash could take anything away that was done."""
        return bool(self._changes) or any(
            file.unsynced or file.size != file.durable_size for file in self._files.values()
        )

    def copy(self) -> "SimulatedDisk":
        """Another disk in the same state, to crash differently."""
        return copy.deepcopy(self)

    # -- damage

    def flip(self, name: str, bit: int) -> None:
        """Turn one durable bit of a file; bit 0 is the lowest of its first byte."""
        offset, place = divmod(bit, 8)
        self.overwrite(name, offset, bytes([self.read(name, offset, 1)[0] ^ (1 << place)]))

    def overwrite(self, name: str, offset: int, data: bytes) -> None:
        """Put durable bytes there; no step."""
        file = self._file(name)
        file.sync()
        for content in (file.data, file.durable):
            _overwrite(content, offset, data)
        file.size = file.durable_size = max(file.size, offset + len(data))

    def cut(self, name: str, size: int) -> None:
        """Make a file shorter, durably; no step."""
        file = self._file(name)
        file.sync()
        del file.data[size:], file.durable[size:]
        file.size = file.durable_size = size

    def lose(self, name: str) -> None:
        """Take a file away, durably; no step."""
        del self._files[name]
        self._durable_names.pop(name, None)

    # -- inside

    def _file(self, name: str) -> _File:
        file = self._files.get(name)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return file

    def _begin_sync(self) -> None:
        self._step()
        self.syncs += 1
        if self.fail_sync_at == self.syncs:
            raise OSError(errno.EIO, "Input/output error")

    def _step(self) -> None:
        self.steps += 1
        if self.crash_at is not None and self.steps >= self.crash_at:
            raise Crashed


class Crashed(BaseException):
    """The process ends here; then `SimulatedDisk.crash`. No Exception: nothing may go on after it
    because it handles errors.
    """


def _overwrite(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _chooser(rng: random.Random, loss: Loss) -> Callable[[], bool]:
    """Says of one thing after the other whether it is there after the crash."""
    if loss is Loss.EVERYTHING:
        return lambda: False
    if loss is Loss.NOTHING:
        return lambda: True
    likely = rng.random()
    if loss is not Loss.TORN:
        return lambda: rng.random() < likely
    alive = True

    def until_the_moment() -> bool:
        nonlocal alive
        alive = alive and rng.random() < likely
        return alive

    return until_the_moment


def _settle(file: _File, rng: random.Random, loss: Loss, kept: Callable[[], bool]) -> None:
    """Decide what became of a file's unsynced writes."""
    if file.durable_size != file.size and not kept():
        file.size = file.durable_size
        file.unsynced.clear()
    _KEEPERS[loss](file, rng, kept)
    del file.durable[file.size :]
    file.data = bytearray(file.durable)
    file.durable_size = file.size
    file.unsynced.clear()


def _keep_first_writes(file: _File, rng: random.Random, kept: Callable[[], bool]) -> None:
    for offset, data in file.unsynced:
        if kept():
            _overwrite(file.durable, offset, data)
            continue
        for start, part in _parts(offset, data):
            if rng.random() < 0.5:
                _overwrite(file.durable, start, part)
        return


def _keep_writes(file: _File, rng: random.Random, kept: Callable[[], bool]) -> None:
    # A sector is written as it is at that moment: with a write come the earlier ones to its sector.
    newest: dict[int, int] = {}
    for number, (offset, data) in enumerate(file.unsynced):
        if kept():
            newest.update((start // SECTOR, number) for start, _ in _parts(offset, data))
    for number, (offset, data) in enumerate(file.unsynced):
        for start, part in _parts(offset, data):
            if number <= newest.get(start // SECTOR, -1):
                _overwrite(file.durable, start, part)


def _keep_sectors(file: _File, rng: random.Random, kept: Callable[[], bool]) -> None:
    # For the same reason the first few changes of a sector are kept, not any.
    over: set[int] = set()
    for offset, data in file.unsynced:
        for start, part in _parts(offset, data):
            if start // SECTOR not in over and kept():
                _overwrite(file.durable, start, part)
            else:
                over.add(start // SECTOR)


_KEEPERS = {
    Loss.EVERYTHING: _keep_writes,
    Loss.NOTHING: _keep_writes,
    Loss.TORN: _keep_first_writes,
    Loss.REORDERED: _keep_writes,
    Loss.ANY: _keep_sectors,
}


def _parts(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """A write, cut at the ends of sectors."""
    parts = []
    start = offset
    while start < offset + len(data):
        stop = min((start // SECTOR + 1) * SECTOR, offset + len(data))
        parts.append((start, data[start - offset : stop - offset]))
        start = stop
    return parts

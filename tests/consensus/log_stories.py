"""Things done to a log in tests, one step at a time, and what must be there after a crash."""

import errno
from collections.abc import Callable
from pathlib import Path

from ollamamax_p2p.consensus.core.log_errors import SnapshotTemporarilyUnavailable
from ollamamax_p2p.consensus.core.messages import (
    NO_LIMIT,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Snapshot,
    SnapshotMetadata,
)
from ollamamax_p2p.consensus.file_log import FileLog, open_file_log
from ollamamax_p2p.consensus.log_storage import LogStorage
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.testing.simulated_disk import SimulatedDisk

VOTERS = ConfState(voters=(1, 2, 3))
Step = Callable[[LogStorage], None]


def entries(first, last, term=1, size=10):
    """Each with data of its own."""
    return [
        Entry(term, index, EntryType.NORMAL, bytes([(index + term) % 255 + 1]) * size)
        for index in range(first, last + 1)
    ]


def snapshot(index, term=1):
    return Snapshot(SnapshotMetadata(index, term, VOTERS), b"handle %d" % index)


def held(log):
    """All that can be read of a log."""
    low, high = log.first_index(), log.last_index() + 1
    try:
        newest = log.snapshot()
    except SnapshotTemporarilyUnavailable:
        newest = None
    kept = log.entries(low, high, NO_LIMIT) if high > low else []
    return log.initial_state(), low, tuple(kept), log.term(low - 1), newest


def opened(disk: SimulatedDisk, segment_bytes: int = 2048) -> FileLog:
    return open_file_log(Path("unused"), ConsensusSettings(segment_bytes=segment_bytes), disk)


def append(first, last, term=1, *, size=10, state=None, sync=True) -> Step:
    return lambda log: log.append(entries(first, last, term, size), state, sync=sync)


STORY: list[Step] = [
    append(1, 1, state=HardState(1, 1, 0)),
    append(2, 5, state=HardState(1, 1, 1)),
    append(6, 9, size=150),
    lambda log: log.append(hard_state=HardState(2, 3, 5)),
    append(8, 8, 2, size=700),  # replaces 8 and 9
    append(9, 11, 2, sync=False),
    append(10, 12, 3, sync=False, state=HardState(3, 0, 9)),
    append(13, 13, 3, sync=False, size=600),
    append(14, 14, 3),
    append(15, 24, 3, size=200, state=HardState(3, 0, 14)),  # into the next segment, and more
    lambda log: log.save_snapshot(snapshot(14, 3)),
    append(25, 30, 3, size=250),
    lambda log: log.compact(12),
    append(28, 40, 4, size=100, state=HardState(4, 2, 27)),
    lambda log: log.append([*entries(41, 44, 4), Entry(4, 45, EntryType.NORMAL, bytes(1500))]),
    lambda log: log.save_snapshot(snapshot(40, 4)),
    lambda log: log.compact(40),
    append(46, 47, 4, state=HardState(4, 2, 46)),
    lambda log: log.install_snapshot(snapshot(100, 5), HardState(5, 0, 100)),
    append(101, 103, 5, sync=False),
    lambda log: log.install_snapshot(snapshot(102, 5)),
    append(103, 120, 6, size=220, state=HardState(6, 1, 103)),
    lambda log: log.append(hard_state=HardState(7, 1, 110)),
    lambda log: log.append(hard_state=HardState(8, 2, 111)),
]
"""Appends, replaced tails, zeros, rotation, snapshots, compaction: all that a log can do."""

UNSYNCED = {5, 6, 7, 19}
"""Of these steps nothing is promised until the next one."""


def states() -> list:
    """What a log holds before the story and after each of its steps."""
    log = RamLog()
    found = [held(log)]
    for step in STORY:
        step(log)
        found.append(held(log))
    return found


def allowed(all_states: list, done: int) -> list:
    """What may be there after a crash, when so many steps had returned and one more had begun."""
    first = done
    while first and first - 1 in UNSYNCED:
        first -= 1
    return all_states[first : done + 2]


FULL = errno.ENOSPC
BROKEN = errno.EIO

"""What every LogStorage keeps to: the one on disk, the same on a simulated disk, and the one in
RAM.
"""

import threading

import pytest

from ollamamax_p2p.consensus.core.log_errors import (
    Compacted,
    SnapshotTemporarilyUnavailable,
    Unavailable,
)
from ollamamax_p2p.consensus.core.messages import (
    NO_LIMIT,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Snapshot,
    SnapshotMetadata,
    entry_size,
)
from ollamamax_p2p.consensus.file_log import open_file_log
from ollamamax_p2p.consensus.log_storage import LogStorage
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.testing.simulated_disk import SimulatedDisk

SMALL = ConsensusSettings(segment_bytes=1024)
VOTERS = ConfState(voters=(1, 2, 3), learners=(4,))


class Opener:
    """Opens the same log again and again."""

    def __init__(self, kind, folder):
        self.kind = kind
        self.folder = folder
        self.ram = RamLog()
        self.disk = SimulatedDisk()

    def open(self) -> LogStorage:
        if self.kind == "ram":
            return self.ram
        disk = self.disk if self.kind == "simulated" else None
        return open_file_log(self.folder / "log", SMALL, disk)


@pytest.fixture(params=["ram", "simulated", "files"])
def opener(request, tmp_path):
    return Opener(request.param, tmp_path)


@pytest.fixture
def log(opener):
    log = opener.open()
    yield log
    log.close()


def entries(first, last, term=1, size=10):
    return [
        Entry(term, index, EntryType.NORMAL, bytes([index % 256]) * size)
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
    return log.initial_state(), low, kept, log.term(low - 1), newest


def test_a_new_log_is_empty(log):
    assert log.initial_state() == (HardState(), ConfState())
    assert (log.first_index(), log.last_index(), log.term(0)) == (1, 0, 0)
    with pytest.raises(SnapshotTemporarilyUnavailable):
        log.snapshot()
    with pytest.raises(Unavailable):
        log.term(1)


def test_what_was_appended_is_read_back(log):
    written = [
        Entry(1, 1, EntryType.CONF_CHANGE_V2, b"change"),
        Entry(1, 2),
        Entry(2, 3, EntryType.NORMAL, b"\0" * 2000),
        Entry(2, 4, EntryType.CONF_CHANGE, b"old"),
    ]
    log.append(written[:3], HardState(2, 7, 1))
    log.append(written[3:])
    assert log.entries(1, 5, NO_LIMIT) == written
    assert [log.term(index) for index in range(5)] == [0, 1, 1, 2, 2]
    assert log.initial_state()[0] == HardState(2, 7, 1)


def test_a_hard_state_alone_is_remembered(log):
    log.append(hard_state=HardState(5, 2, 0))
    log.append()
    assert log.initial_state()[0] == HardState(5, 2, 0)


def test_entries_stop_where_the_bytes_do_but_give_at_least_one(log):
    log.append(entries(1, 5, size=100))
    one = entry_size(log.entries(1, 2, NO_LIMIT)[0])
    assert len(log.entries(1, 6, one * 3)) == 3
    assert len(log.entries(1, 6, one * 3 - 1)) == 2
    assert len(log.entries(2, 6, 0)) == 1
    assert len(log.entries(2, 4, NO_LIMIT)) == 2


def test_what_is_not_there_is_refused(log):
    log.append(entries(1, 9))
    log.save_snapshot(snapshot(6))
    log.compact(4)
    with pytest.raises(Compacted):
        log.entries(4, 6, NO_LIMIT)
    with pytest.raises(Unavailable):
        log.entries(5, 11, NO_LIMIT)
    with pytest.raises(Compacted):
        log.term(3)
    with pytest.raises(Unavailable):
        log.term(10)
    assert log.term(4) == 1
    assert (log.first_index(), log.last_index()) == (5, 9)


def test_a_conflicting_tail_is_replaced(log):
    log.append(entries(1, 9))
    log.append(entries(4, 5, term=2), HardState(2, 0, 3))
    assert log.entries(1, log.last_index() + 1, NO_LIMIT) == entries(1, 3) + entries(4, 5, term=2)


def test_a_gap_is_refused_and_changes_nothing(log):
    log.append(entries(1, 3))
    before = held(log)
    with pytest.raises(ValueError, match="does not follow"):
        log.append(entries(5, 6), HardState(9, 9, 9))
    with pytest.raises(ValueError, match="do not follow each other"):
        log.append([*entries(4, 4), *entries(6, 6)])
    assert held(log) == before


def test_entries_that_were_compacted_are_dropped(log):
    log.append(entries(1, 9))
    log.save_snapshot(snapshot(6))
    log.compact(6)
    log.append(entries(5, 8, term=2))
    assert log.entries(7, 9, NO_LIMIT) == entries(7, 8, term=2)
    log.append(entries(2, 5, term=3))
    assert (log.first_index(), log.last_index()) == (7, 8)


def test_a_saved_snapshot_keeps_the_entries(log):
    log.append(entries(1, 9))
    log.save_snapshot(snapshot(6))
    assert log.snapshot() == snapshot(6)
    assert log.initial_state()[1] == VOTERS
    assert log.entries(1, 10, NO_LIMIT) == entries(1, 9)


def test_a_snapshot_that_can_not_be_saved_is_refused(log):
    log.append(entries(1, 9))
    log.save_snapshot(snapshot(6))
    for index in (5, 10):
        with pytest.raises(ValueError, match="snapshot"):
            log.save_snapshot(snapshot(index))
    log.save_snapshot(snapshot(6))
    assert log.snapshot() == snapshot(6)


def test_compaction_needs_a_snapshot_that_covers_it(log):
    log.append(entries(1, 9))
    with pytest.raises(ValueError, match="no snapshot"):
        log.compact(1)
    log.save_snapshot(snapshot(6))
    with pytest.raises(ValueError, match="no snapshot"):
        log.compact(7)
    log.compact(6)
    for index in (6, 3):
        with pytest.raises(Compacted):
            log.compact(index)


def test_everything_may_be_compacted(log):
    log.append(entries(1, 9, term=3))
    log.save_snapshot(snapshot(9, term=3))
    log.compact(9)
    assert (log.first_index(), log.last_index(), log.term(9)) == (10, 9, 3)
    log.append(entries(10, 11, term=4))
    assert log.last_index() == 11


def test_an_installed_snapshot_begins_anew(log):
    log.append(entries(1, 9), HardState(1, 2, 5))
    log.install_snapshot(snapshot(7, term=3), HardState(3, 0, 7))
    assert (log.first_index(), log.last_index(), log.term(7)) == (8, 7, 3)
    assert log.initial_state() == (HardState(3, 0, 7), VOTERS)
    assert log.snapshot() == snapshot(7, term=3)
    log.append(entries(8, 9, term=3))
    assert log.entries(8, 10, NO_LIMIT) == entries(8, 9, term=3)


def test_an_installed_snapshot_may_be_far_ahead_and_keeps_the_hard_state(log):
    log.append(entries(1, 2), HardState(1, 2, 1))
    log.install_snapshot(snapshot(1_000))
    assert (log.first_index(), log.last_index()) == (1_001, 1_000)
    assert log.initial_state()[0] == HardState(1, 2, 1)
    with pytest.raises(ValueError, match="older"):
        log.install_snapshot(snapshot(999))
    with pytest.raises(Compacted):
        log.term(999)


STORIES = {
    "nothing": lambda log: None,
    "entries": lambda log: log.append(entries(1, 50), HardState(1, 1, 20)),
    "many segments": lambda log: [
        log.append(entries(n, n, size=200), HardState(1, 1, n - 1)) for n in range(1, 40)
    ],
    "a batch longer than a segment": lambda log: log.append(entries(1, 30, size=300)),
    "replaced": lambda log: [log.append(entries(n, n + 3, term=n)) for n in range(1, 20)],
    "snapshot": lambda log: [log.append(entries(1, 9)), log.save_snapshot(snapshot(6))],
    "compacted": lambda log: [
        [log.append(entries(n, n, size=200), HardState(1, 1, n - 1)) for n in range(1, 40)],
        log.save_snapshot(snapshot(35)),
        log.compact(31),
    ],
    "all compacted": lambda log: [
        log.append(entries(1, 9), HardState(1, 3, 9)),
        log.save_snapshot(snapshot(9)),
        log.compact(9),
    ],
    "installed": lambda log: [
        log.append(entries(1, 20, size=200), HardState(1, 3, 9)),
        log.install_snapshot(snapshot(15, 4), HardState(4, 0, 15)),
        log.append(entries(16, 18, term=4)),
    ],
    "installed twice": lambda log: [
        log.install_snapshot(snapshot(15, 4), HardState(4, 0, 15)),
        log.install_snapshot(snapshot(15, 4)),
        log.install_snapshot(snapshot(16, 4)),
    ],
    "synced later": lambda log: [
        log.append(entries(1, 3), sync=False),
        log.append(entries(3, 5, term=2), HardState(2, 0, 0), sync=False),
        log.append(),
    ],
}


@pytest.mark.parametrize("story", STORIES)
def test_opened_again_it_is_as_it_was(opener, story):
    log = opener.open()
    STORIES[story](log)
    before = held(log)
    for _ in range(3):
        log.close()
        log = opener.open()
        assert held(log) == before
    after = log.last_index() + 1
    log.append(entries(after, after + 3, term=9), HardState(9, 1, 1))
    before = held(log)
    log.close()
    assert held(opener.open()) == before


def test_reading_goes_on_while_another_thread_writes(log):
    """Whatever a reader sees is a state that there was."""
    problems = []
    stop = threading.Event()

    def read():
        while not stop.is_set():
            low, last = log.first_index(), log.last_index()
            try:
                found = log.entries(low, last + 1, NO_LIMIT) if last >= low else []
            except (Compacted, Unavailable):
                continue  # it moved on between the questions
            if [entry.index for entry in found] != list(range(low, last + 1)):
                problems.append((low, last, found))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for index in range(1, 300):
            log.append(entries(index, index + 1, term=index))
            if index % 50 == 0:
                log.save_snapshot(snapshot(index, term=index))
                log.compact(index - 10)
    finally:
        stop.set()
        reader.join()
    assert problems == []


def test_closing_twice_does_no_harm(log):
    log.append(entries(1, 3))
    log.close()
    log.close()

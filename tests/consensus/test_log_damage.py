"""A log that is not what was written: cut off anywhere, any bit of it turned, files that are gone,
foreign or made up. It opens with all that was acknowledged, or not at all.
"""

import os
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest

from ollamamax_p2p.consensus.core.log_records import (
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    encode_segment_header,
)
from ollamamax_p2p.consensus.core.messages import Entry, EntryType, HardState
from ollamamax_p2p.consensus.log_reading import segment_name
from ollamamax_p2p.errors import LogDamaged
from ollamamax_p2p.testing.simulated_disk import Loss, SimulatedDisk
from tests.consensus.log_stories import append, entries, held, opened, snapshot

FIRST, SECOND = segment_name(1), segment_name(2)


def damaged_or_whole(disk, whole) -> bool:
    """Whether it opened; then it has all. If not, nothing was changed."""
    before = disk.copy()
    try:
        log = opened(disk)
    except LogDamaged as error:
        said = str(error)
        assert "at byte" in said
        assert "docs/runbooks/damaged-wal.md" in said
        assert contents(disk) == contents(before)
        return False
    assert held(log) == whole
    return True


def contents(disk):
    return {name: disk.read(name, 0, disk.size(name)) for name in disk.names()}


def small_log(*, closed: bool = False) -> tuple[SimulatedDisk, object]:
    """4 KB in two segments, everything acknowledged."""
    disk = SimulatedDisk()
    log = opened(disk)
    append(1, 1, state=HardState(1, 1, 0))(log)
    append(2, 9, size=120)(log)
    append(10, 12, 2, size=80, state=HardState(2, 1, 9))(log)
    log.save_snapshot(snapshot(9))
    append(13, 14, 2, size=200)(log)
    log.append([Entry(2, 15, EntryType.NORMAL, bytes(300)), *entries(16, 16, 2)])
    append(14, 15, 3, size=60, state=HardState(3, 2, 13))(log)
    log.append([Entry(3, 16, EntryType.NORMAL, bytes(620))])  # a sector of zeros, acknowledged
    whole = held(log)
    if closed:
        log.close()
    assert sum(map(disk.size, disk.names())) == 4096
    assert opened(disk.copy()).torn_bytes == 0
    return disk, whole


@pytest.mark.parametrize("closed", [False, True], ids=["crashed", "closed"])
@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_any_bit_turned_gives_the_right_data_or_refusal(name, closed):
    disk, whole = small_log(closed=closed)
    refused = 0
    for bit in range(disk.size(name) * 8):
        flipped = disk.copy()
        flipped.flip(name, bit)
        refused += not damaged_or_whole(flipped, whole)
    assert refused > 1024 * 8  # the greater part of it holds data


@pytest.mark.parametrize("closed", [False, True], ids=["crashed", "closed"])
@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_cut_off_at_any_byte_it_is_refused(name, closed):
    disk, whole = small_log(closed=closed)
    for size in range(disk.size(name)):
        cut = disk.copy()
        cut.cut(name, size)
        assert not damaged_or_whole(cut, whole)
    disk.overwrite(name, disk.size(name), b"\0")
    assert not damaged_or_whole(disk, whole)


@pytest.mark.parametrize("size", [0, 5, 300, 700])
def test_a_write_that_ended_at_any_byte_is_cut_off(size):
    """Not in sectors, as of a process that was killed while it wrote."""
    disk = SimulatedDisk()
    log = opened(disk)
    append(1, 3, size=60)(log)
    before = held(log)
    start = len(disk.read(FIRST, 0, 2048).rstrip(b"\0"))
    append(4, 5, 2, size=size, state=HardState(2, 0, 1))(log)
    after = held(log)
    end = len(disk.read(FIRST, 0, 2048).rstrip(b"\0"))
    for stop in range(start, end):
        torn = disk.copy()
        torn.overwrite(FIRST, stop, bytes(end - stop))
        log = opened(torn)
        assert held(log) == before
        append(4, 5, 3)(log)
        torn.crash(random.Random(stop), Loss.EVERYTHING)
        assert opened(torn).last_index() == 5
    assert held(opened(disk)) == after


def test_sectors_that_turn_to_zeros_are_noticed_once_the_log_was_closed():
    """But for the last, in which the frame stands that closing wrote."""
    disk, whole = small_log(closed=True)
    last = (SECOND, len(disk.read(SECOND, 0, 2048).rstrip(b"\0")) // 512)
    sectors = [(name, sector) for name in (FIRST, SECOND) for sector in range(4)]
    for name, sector in sectors[: sectors.index(last)]:
        rotten = disk.copy()
        rotten.overwrite(name, sector * 512, bytes(512))
        assert not damaged_or_whole(rotten, whole) or not any(disk.read(name, sector * 512, 512))


def test_zeros_in_the_very_last_batch_are_taken_for_a_torn_write():
    """What can't be told apart, as `log_records` says: whole sectors, and nothing written since."""
    disk, _ = small_log()
    rotten = disk.copy()
    end = len(disk.read(SECOND, 0, 2048).rstrip(b"\0"))
    rotten.overwrite(SECOND, end // 512 * 512, bytes(512))
    log = opened(rotten)
    assert log.torn_bytes > 0
    assert log.last_index() == 15


def test_random_damage_of_any_length_is_never_wrong_data(rng):
    disk, whole = small_log(closed=True)
    for _ in range(3000):
        rotten = disk.copy()
        name = rng.choice((FIRST, SECOND))
        start = rng.randrange(2048)
        count = min(rng.choice((1, 2, 8, 32, 200, 512, 2048)), 2048 - start)
        rotten.overwrite(name, start, rng.randbytes(count))
        damaged_or_whole(rotten, whole)


def test_older_contents_of_a_segment_are_noticed():
    """A disk that lost a write it had acknowledged shows what was there before."""
    disk, _ = small_log()
    older = disk.read(SECOND, 0, 2048)
    log = opened(disk)
    append(17, 17, 3, size=300)(log)
    append(18, 18, 3, size=10)(log)
    whole = held(log)
    current = disk.read(SECOND, 0, 2048)
    for sector in range(4):
        stale = disk.copy()
        part = older[sector * 512 : sector * 512 + 512]
        stale.overwrite(SECOND, sector * 512, part)
        if part == current[sector * 512 : sector * 512 + 512]:
            continue
        lost_the_end = not any(older[(sector + 1) * 512 :]) and sector == 3
        if not lost_the_end:
            assert not damaged_or_whole(stale, whole)


def long_log() -> SimulatedDisk:
    """Some segments, the first two compacted away."""
    disk = SimulatedDisk()
    log = opened(disk)
    for index in range(1, 60):
        append(index, index, 1, size=200, state=HardState(1, 1, index - 1))(log)
    log.save_snapshot(snapshot(20))
    log.compact(19)
    assert len(disk.names()) > 5
    assert FIRST not in disk.names()
    return disk


def test_a_segment_that_is_gone_is_noticed():
    segments = [name for name in long_log().names() if name.endswith(".wal")]
    for name in segments:
        disk = long_log()
        disk.lose(name)
        with pytest.raises(LogDamaged, match="missing"):
            opened(disk)


def test_a_log_whose_segments_are_all_gone_is_no_new_log():
    disk, _ = small_log()
    disk.lose(FIRST)
    disk.lose(SECOND)
    with pytest.raises(LogDamaged, match="segments are gone"):
        opened(disk)


def test_two_segments_that_changed_their_names_are_noticed():
    disk, whole = small_log()
    disk.rename(FIRST, "x")
    disk.rename(SECOND, FIRST)
    disk.rename("x", SECOND)
    assert not damaged_or_whole(disk, whole)


def test_a_segment_of_another_log_is_noticed():
    disk, whole = small_log()
    other = SimulatedDisk()
    log = opened(other)
    append(1, 1, size=300)(log)
    append(2, 9, size=200)(log)
    append(2, 9, size=200)(log)
    disk.overwrite(SECOND, 0, other.read(SECOND, 0, 2048))
    assert not damaged_or_whole(disk, whole)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\0",
        b"\0" * 2048,
        b"omx wal\n",
        b"omx wal\n" + b"\xff" * 2040,
        b"#!/bin/sh\necho not a log\n" * 20,
        random.Random(1).randbytes(5000),
    ],
)
@pytest.mark.parametrize("name", [FIRST, SECOND, segment_name(3), segment_name(9)])
def test_garbage_in_a_segments_place_is_refused(name, garbage):
    disk, whole = small_log()
    disk.create(name, 0)
    disk.sync_folder()
    disk.overwrite(name, 0, garbage)
    assert not damaged_or_whole(disk, whole)


def test_foreign_files_are_left_alone():
    disk, whole = small_log()
    foreign = ["notes.txt", "1.wal", "0000000000000003.wal.bak", "000000000000000x.wal", ".wal"]
    for name in foreign:
        disk.create(name, 7)
    assert damaged_or_whole(disk, whole)
    assert set(foreign) < set(disk.names())


def test_what_a_killed_process_left_of_a_new_segment_is_removed():
    disk, whole = small_log()
    disk.create("next.tmp", 2048)
    assert damaged_or_whole(disk, whole)
    assert "next.tmp" not in disk.names()


def reheaded(data: bytes, offset: int, **changes: int) -> bytes:
    """A segment in which a frame's header says something else, with a CRC that fits."""
    layout = struct.Struct("<4sBBHIIIIII")
    names = ("mark", "flags", "mask", "zero", "length", "offset", "synced", "number", "chain")
    fields = dict(zip(names, layout.unpack_from(data, offset)[:-1], strict=True)) | changes
    plain = layout.pack(*fields.values(), 0)[:-4]
    return data[:offset] + plain + struct.pack("<I", zlib.crc32(plain)) + data[offset + 32 :]


@pytest.mark.parametrize("length", [2**31, 2**32 - 1, 64 * 2**20, 2**20, 1985])
def test_a_length_that_lies_allocates_nothing(length):
    disk, whole = small_log()
    for name in (FIRST, SECOND):
        lying = disk.copy()
        data = reheaded(disk.read(name, 0, 2048), SEGMENT_HEADER_BYTES, length=length)
        lying.overwrite(name, 0, data)
        tracemalloc.start()
        try:
            assert not damaged_or_whole(lying, whole)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_a_file_far_longer_than_it_says_is_not_read(tmp_path):
    path = tmp_path / FIRST
    path.write_bytes(encode_segment_header(SegmentHeader(1, 0, 1, 2048)))
    os.truncate(path, 2**40)
    tracemalloc.start()
    try:
        with pytest.raises(LogDamaged, match="1,099,511,627,776 bytes"):
            open_real(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_header_that_claims_a_huge_file_is_refused(tmp_path):
    path = tmp_path / FIRST
    path.write_bytes(encode_segment_header(SegmentHeader(1, 0, 1, 2**41)))
    os.truncate(path, 2**41)
    with pytest.raises(LogDamaged, match="claims"):
        open_real(tmp_path)


def test_a_folder_in_a_segments_place_is_refused(tmp_path):
    open_real(tmp_path).close()
    (tmp_path / SECOND).mkdir()
    with pytest.raises(LogDamaged, match="not an ordinary file"):
        open_real(tmp_path)


def test_a_pipe_in_a_segments_place_is_not_waited_for(tmp_path):
    open_real(tmp_path).close()
    os.mkfifo(tmp_path / SECOND)
    with pytest.raises(LogDamaged, match="not an ordinary file"):
        open_real(tmp_path)


def open_real(folder: Path):
    from ollamamax_p2p.consensus.file_log import open_file_log
    from ollamamax_p2p.consensus.settings import ConsensusSettings

    return open_file_log(folder, ConsensusSettings(segment_bytes=2048))

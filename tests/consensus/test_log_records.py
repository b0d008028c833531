"""The format of the log's segments: what is read back, and what a bad tail is taken for."""

import itertools
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollamamax_p2p.consensus.core.log_records import (
    PAYLOAD_BYTES_MAX,
    SECTOR,
    SEGMENT_HEADER_BYTES,
    Damage,
    Record,
    Scan,
    SegmentHeader,
    Tail,
    decode_segment_header,
    encode_frame,
    encode_record,
    encode_segment_header,
    frame_bytes,
    scan_segment,
)
from ollamamax_p2p.consensus.core.messages import Entry, EntryType, HardState

HEADER = SegmentHeader(sequence=3, chain=77, first_index=12, size=8192)


class Writer:
    """A segment in memory."""

    def __init__(self, size: int = 8192) -> None:
        self.header = SegmentHeader(3, 77, 12, size)
        self.data = bytearray(encode_segment_header(self.header))
        self.chain, self.frames, self.synced = 77, 0, len(self.data)

    def add(self, payload: bytes, *, seal: bool = False, synced: bool = True) -> int:
        """Gives the frame's offset."""
        offset = len(self.data)
        frame, self.chain = encode_frame(
            payload,
            chain=self.chain,
            offset=offset,
            synced=self.synced,
            number=self.frames,
            seal=seal,
        )
        self.data += frame
        self.frames += 1
        if synced:
            self.synced = len(self.data)
        return offset

    def batch(self, *sizes: int, synced: bool = True) -> int:
        made = [Entry(1, n + 1, EntryType.NORMAL, b"d" * size) for n, size in enumerate(sizes)]
        return self.add(encode_record(Record(made)), synced=synced)

    def scan(self) -> Scan:
        return scan_segment(self.header, bytes(self.data).ljust(self.header.size, b"\0"))


records = st.builds(
    Record,
    st.lists(
        st.builds(
            Entry,
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**64 - 1),
            st.sampled_from(EntryType),
            st.binary(max_size=50)
            | st.integers(0, 255).map(lambda byte: bytes([byte]) * 600)
            | st.just(b"".join(bytes([byte]) * 512 for byte in (0, 1, 2, 3))),
        ),
        max_size=4,
    ),
    st.none() | st.builds(HardState, st.integers(0, 2**63), st.integers(0, 2**63)),
)


@given(st.lists(records, max_size=6))
def test_records_are_read_back(written):
    writer = Writer(size=65536)
    for record in written:
        writer.add(encode_record(record))
    scan = writer.scan()
    assert scan.records == written
    assert (scan.end, scan.frames, scan.chain) == (len(writer.data), len(written), writer.chain)
    assert (scan.tail, scan.sealed) == (Tail.CLEAN, False)


@given(st.lists(records, min_size=1, max_size=3))
def test_no_sector_of_a_frame_is_all_zeros(written):
    writer = Writer(size=65536)
    for record in written:
        start = writer.add(encode_record(record))
        data = bytes(writer.data)
        cut = [start, *range((start // SECTOR + 1) * SECTOR, len(data), SECTOR), len(data)]
        assert all(any(data[low:high]) for low, high in itertools.pairwise(cut))


def test_a_batch_that_no_mask_helps_is_written_all_the_same():
    payload = encode_record(
        Record([Entry(1, 1, EntryType.NORMAL, b"".join(bytes([b]) * 512 for b in range(256)))])
    )
    writer = Writer(size=2**20)
    writer.add(payload)
    assert writer.scan().records[0].entries[0].data[512 * 7] == 7


def test_a_segments_header_is_read_back():
    assert decode_segment_header(encode_segment_header(HEADER)) == HEADER
    assert len(encode_segment_header(HEADER)) == SEGMENT_HEADER_BYTES


def reversioned(version: int) -> bytes:
    data = bytearray(encode_segment_header(HEADER))
    data[8] = version
    data[40:44] = zlib.crc32(bytes(data[:40]) + bytes(4)).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "shorter"),
        (encode_segment_header(HEADER)[:63], "shorter"),
        (bytes(64), "does not begin"),
        (b"x" * 64, "does not begin"),
        (encode_segment_header(HEADER)[:20] + b"x" * 44, "header is damaged"),
        (reversioned(2), "a newer one wrote it"),
        (encode_segment_header(SegmentHeader(1, 0, 1, 63)), "claims"),
        (encode_segment_header(SegmentHeader(1, 0, 1, 2**31)), "claims"),
    ],
)
def test_what_is_no_segments_header_is_refused(data, problem):
    with pytest.raises(Damage, match=problem):
        decode_segment_header(data)


def test_a_batch_beyond_the_limit_is_refused():
    entry = Entry(1, 1, EntryType.NORMAL, bytes(PAYLOAD_BYTES_MAX))
    with pytest.raises(ValueError, match="limit"):
        encode_record(Record([entry]))


def test_frames_begin_where_no_header_lies_across_two_sectors():
    for length in range(0, 200):
        assert frame_bytes(length) % 32 == 0
        assert frame_bytes(length) >= 32 + length + 8


def test_a_seal_ends_a_segment():
    writer = Writer()
    writer.batch(10)
    chain = writer.chain
    writer.add(b"", seal=True)
    writer.data += b"whatever follows"
    scan = writer.scan()
    assert (scan.sealed, scan.chain, scan.frames, scan.tail) == (True, chain, 2, Tail.CLEAN)


def test_a_sign_of_life_is_no_record():
    writer = Writer()
    writer.batch(10)
    writer.add(b"")
    assert len(writer.scan().records) == 1


def test_a_file_of_another_size_is_damaged():
    writer = Writer()
    writer.batch(10)
    assert scan_segment(writer.header, bytes(writer.data)).tail is Tail.DAMAGED


def test_a_segment_may_be_full_to_its_last_byte():
    writer = Writer(size=SEGMENT_HEADER_BYTES + frame_bytes(len(encode_record(Record()))))
    writer.add(encode_record(Record()))
    assert len(writer.data) == writer.header.size
    assert writer.scan().tail is Tail.CLEAN


def torn_or_damaged(writer: Writer) -> Tail:
    return writer.scan().tail


def test_zeros_where_a_sector_was_are_a_torn_write():
    for lost in range(4):
        writer = Writer()
        start = writer.batch(1600)
        first = start // SECTOR + lost
        low, high = max(first * SECTOR, start), min((first + 1) * SECTOR, len(writer.data))
        writer.data[low:high] = bytes(high - low)
        scan = writer.scan()
        assert (scan.tail, scan.end, scan.records) == (Tail.TORN, start, [])


def test_a_part_of_a_header_is_a_torn_write():
    for length in range(1, 33):
        writer = Writer()
        start = writer.batch(100)
        del writer.data[start + length :]
        assert torn_or_damaged(writer) is Tail.TORN


def test_anything_else_is_damage():
    writer = Writer()
    start = writer.batch(1600)
    whole = bytes(writer.data)
    for place in range(start, len(whole)):
        writer.data[:] = whole
        writer.data[place] ^= 0x55
        assert torn_or_damaged(writer) is Tail.DAMAGED


def test_a_later_frame_vouches_for_what_was_durable_before_it():
    writer = Writer()
    start = writer.batch(1600)
    writer.batch(10)
    writer.data[SECTOR : 2 * SECTOR] = bytes(SECTOR)
    scan = writer.scan()
    assert (scan.tail, scan.end) == (Tail.DAMAGED, start)
    assert "later one shows" in scan.problem


def test_a_later_frame_does_not_vouch_for_what_was_not_synced():
    writer = Writer()
    writer.batch(1600, synced=False)
    writer.batch(10)
    writer.data[SECTOR : 2 * SECTOR] = bytes(SECTOR)
    assert torn_or_damaged(writer) is Tail.TORN


def test_a_frame_that_a_command_carries_vouches_for_nothing():
    """Commands come from others; none may make a torn write look like damage."""
    writer = Writer()
    forged, _ = encode_frame(b"", chain=0, offset=1024, synced=1024, number=9)
    data = bytearray(b"x" * 3000)
    start = writer.add(encode_record(Record([Entry(1, 1, EntryType.NORMAL, bytes(data))])))
    writer.data[1024 : 1024 + len(forged)] = forged
    assert start < 1024
    del writer.data[-200:]
    assert torn_or_damaged(writer) is Tail.TORN


def test_a_frame_from_another_place_is_damage():
    writer = Writer()
    writer.batch(10)
    stale = bytes(writer.data[SEGMENT_HEADER_BYTES:])
    writer.data += stale
    assert torn_or_damaged(writer) is Tail.DAMAGED


@pytest.mark.parametrize("change", ["chain", "number"])
def test_a_frame_that_does_not_continue_the_one_before_is_damage(change):
    writer = Writer()
    writer.batch(10)
    if change == "chain":
        writer.chain ^= 1
    else:
        writer.frames += 1
    writer.batch(10)
    scan = writer.scan()
    assert (scan.tail, scan.frames) == (Tail.DAMAGED, 1)
    assert "another was written" in scan.problem


def test_a_frame_longer_than_its_file_is_damage():
    writer = Writer(size=SEGMENT_HEADER_BYTES + 64)
    writer.batch(500)
    scan = scan_segment(writer.header, bytes(writer.data[: writer.header.size]))
    assert (scan.tail, scan.problem) == (Tail.DAMAGED, "a frame is longer than the file")


@pytest.mark.parametrize(
    "payload",
    [b"\xc1", b"\x93", b"\x90\x90", b"\xa3abc", b"\x91\xdd\xff\xff\xff\xff", b"\x91\x91\x94\x01"],
)
def test_a_batch_with_a_good_checksum_and_bad_contents_is_damage(payload):
    writer = Writer()
    writer.add(payload)
    scan = writer.scan()
    assert scan.tail is Tail.DAMAGED
    assert "can't read" in scan.problem


def test_any_bytes_behind_the_end_give_a_verdict(rng):
    for _ in range(2000):
        writer = Writer()
        writer.batch(rng.randrange(300))
        end = len(writer.data)
        junk = bytearray(rng.randbytes(rng.randrange(1, 2000)))
        for _ in range(rng.randrange(3)):
            place = rng.randrange(len(junk))
            junk[place : place + 4] = b"omxb"
        writer.data += bytes(rng.choice((0, 0, 600))) + junk
        scan = writer.scan()
        assert (scan.end, scan.frames) == (end, 1)
        assert scan.tail is not Tail.CLEAN


def test_masks_are_undone(rng: random.Random):
    for byte in (0, 1, 255, rng.randrange(256)):
        data = bytes(700) + bytes([byte]) * 700
        writer = Writer()
        writer.add(encode_record(Record([Entry(1, 1, EntryType.NORMAL, data)])))
        assert writer.scan().records[0].entries[0].data == data

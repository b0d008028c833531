"""The format of the write-ahead log, without its files.

A segment is a file of fixed size, made of zeros before it gets its name, and never of another size
after. It holds a header and then frames. A frame is one batch, all that was written together, so a
batch is there whole or not at all. Numbers are little-endian, frames begin at multiples of 32.

    segment header   magic 8, version 4, chain 4, sequence 8, first index 8, size 8, CRC 4, zeros
    frame header     mark 4, flags 1, mask 1, zero 2, length 4, offset 4, synced 4, number 4,
                     chain before 4, header CRC 4
    payload          `length` bytes, MessagePack of a Record, each byte XORed with the mask; zeros
    commit           chain 4, mark 4: the last 8 bytes of the frame

`chain` is the CRC of every frame since the log began, also across segments: it verifies the payload
and shows a frame, or the end of a segment, that is missing or in a wrong place. `synced` is the
offset in this segment up to which all was durable when the frame was written. A *seal*, a frame
without a record, is the last of a segment; it is written when the next segment exists.

**What a crash can leave.** Disks write sectors of 512 bytes whole or not at all, in any order; what
was not written reads as zeros, because a segment is made of zeros and what is cut off is filled
with zeros before anything else is written there. So where the last segment stops verifying:

- A later frame that says `synced` beyond this place proves that it was durable: damage.
- Otherwise a sector of the frame that is all zeros, or an end that is still zero, is what an
  unfinished write leaves: torn, never acknowledged, cut off. A good frame can't look like that,
  because no sector of it is zero: that is what the mask is for, which is chosen so.
- Otherwise every sector was written, and one of them is wrong now: damage.

What can't be told from a crash: whole sectors of the very last batch turned to zeros after it was
acknowledged and before anything was written behind them (closing the log writes a frame behind it).
A batch of more than 128 KiB that has every byte 512 times in a row has no mask; its zeros too.

Zlib's CRC-32, not Castagnoli's: it is in the standard library and runs at 3 GB/s.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from ollamamax_p2p.consensus.core.messages import Entry, HardState, Snapshot

MAGIC = b"omx wal\n"
VERSION = 1
ALIGN = 32
"""A divisor of SECTOR, and a frame's header is as long: so none lies across two sectors."""
SECTOR = 512
SEGMENT_HEADER_BYTES = 64
EMPTY_FRAME_BYTES = 64
"""A seal, or the frame that closing writes; room for one of each is kept in every segment."""
RESERVED_BYTES = 2 * EMPTY_FRAME_BYTES
PAYLOAD_BYTES_MAX = 64 * 1024 * 1024
"""Longer ones are never written, and a length beyond it is damage: nothing is allocated for it."""
SEGMENT_BYTES_MAX = 1024 * 1024 * 1024
"""The same for a file."""

_FRAME_MARK = b"omxb"
_COMMIT_MARK = b"omxc"
_SEAL = 1
_SEGMENT = struct.Struct("<8sIIQQQI")
_FRAME = struct.Struct("<4sBBHIIIIII")
_FRAME_FIELDS = struct.Struct("<4sBBHIIIII")
_COMMIT = struct.Struct("<I4s")
_ZERO_SECTOR = bytes(SECTOR)


class Record(msgspec.Struct, frozen=True, array_like=True):
    """One batch."""

    entries: list[Entry] = []
    """They replace what stands from the first one's index on."""
    hard_state: HardState | None = None
    snapshot: Snapshot | None = None
    """The newest; made here, or received if `anew`."""
    base: tuple[int, int] | None = None
    """Term and index of the last entry that is dropped: the log begins behind it."""
    anew: bool = False
    """All entries go: the log begins behind the snapshot."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


class Damage(ValueError):
    """Bytes that can't be what was written."""

    def __init__(self, offset: int, problem: str) -> None:
        """offset: in the segment."""
        super().__init__(problem)
        self.offset = offset
        self.problem = problem


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a file of the log begins with."""

    sequence: int
    """1 for the first segment ever; also in the file's name."""
    chain: int
    """At the end of the segment before; 0 for the first."""
    first_index: int
    """The log's last index when it was made, plus 1."""
    size: int
    """Bytes of the file, always."""


class Tail(Enum):
    """What follows the last good frame of a segment."""

    CLEAN = "clean"
    TORN = "torn"
    DAMAGED = "damaged"


@dataclass(slots=True)
class Scan:
    """What a segment holds, as far as it verifies."""

    header: SegmentHeader
    records: list[Record] = field(default_factory=list)
    frames: int = 0
    """The next frame's number."""
    end: int = SEGMENT_HEADER_BYTES
    """Where the next frame goes."""
    chain: int = 0
    """Up to the end, without a seal."""
    sealed: bool = False
    tail: Tail = Tail.CLEAN
    problem: str = ""
    dirty_end: int = 0
    """Behind the last byte that is not zero."""


def encode_segment_header(header: SegmentHeader) -> bytes:
    """64 bytes."""
    plain = _SEGMENT.pack(
        MAGIC, VERSION, header.chain, header.sequence, header.first_index, header.size, 0
    )
    crc = zlib.crc32(plain)
    return (plain[:-4] + crc.to_bytes(4, "little")).ljust(SEGMENT_HEADER_BYTES, b"\0")


def decode_segment_header(data: bytes) -> SegmentHeader:
    """Of the first 64 bytes of a file. Raises Damage."""
    if len(data) < SEGMENT_HEADER_BYTES:
        raise Damage(0, "the file is shorter than a segment's header")
    magic, version, chain, sequence, first_index, size, crc = _SEGMENT.unpack_from(data)
    if magic != MAGIC:
        raise Damage(0, "it does not begin as a segment of this log")
    if crc != zlib.crc32(data[: _SEGMENT.size - 4] + bytes(4)):
        raise Damage(0, "the segment's header is damaged")
    if version != VERSION:
        raise Damage(0, f"its version is {version}, this omx reads {VERSION}; a newer one wrote it")
    if not SEGMENT_HEADER_BYTES <= size <= SEGMENT_BYTES_MAX:
        raise Damage(0, f"it claims to have {size} bytes")
    return SegmentHeader(sequence, chain, first_index, size)


def encode_record(record: Record) -> bytes:
    """The payload of a frame, not yet masked. Raises ValueError if it is too long."""
    payload = _encoder.encode(record)
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"a batch of {len(payload)} bytes; the limit is {PAYLOAD_BYTES_MAX}")
    return payload


def frame_bytes(payload_bytes: int) -> int:
    """How long the frame of such a payload is."""
    return -(-(ALIGN + payload_bytes + _COMMIT.size) // ALIGN) * ALIGN


def encode_frame(
    payload: bytes, *, chain: int, offset: int, synced: int, number: int, seal: bool = False
) -> tuple[bytes, int]:
    """A frame and the chain behind it. payload: of `encode_record`; empty: only a sign of life."""
    mask = 0
    if _ZERO_SECTOR in payload:
        mask, payload = _masked(payload)
    fields = _FRAME_FIELDS.pack(
        _FRAME_MARK,
        _SEAL if seal else 0,
        mask,
        0,
        len(payload),
        offset,
        synced,
        number,
        chain,
    )
    header = fields + zlib.crc32(fields).to_bytes(4, "little")
    padding = bytes(frame_bytes(len(payload)) - ALIGN - len(payload) - _COMMIT.size)
    body = header + payload + padding
    after = zlib.crc32(body, chain)
    return body + _COMMIT.pack(after, _COMMIT_MARK), after


def scan_segment(header: SegmentHeader, data: bytes) -> Scan:
    """Read a segment's frames up to the first that does not verify. data: the whole file.

    Whether what is behind matters, the caller knows: behind the end of any segment but the last
    nothing does if the next one's chain continues this one's.
    """
    scan = Scan(header, chain=header.chain, dirty_end=len(data.rstrip(b"\0")))
    if len(data) != header.size:
        # Before anything else: a file that was cut off lacks what would show where it ended.
        scan.tail = Tail.DAMAGED
        scan.problem = f"the file has {len(data):,} bytes, it was made with {header.size:,}"
        return scan
    try:
        _read_frames(scan, data)
    except Damage as damage:
        scan.tail, scan.problem = Tail.DAMAGED, damage.problem
    return scan


@dataclass(frozen=True, slots=True)
class _Header:
    flags: int
    mask: int
    length: int
    synced: int
    number: int
    chain: int


def _read_frames(scan: Scan, data: bytes) -> None:
    view = memoryview(data)
    while not scan.sealed:
        header = _header_at(data, scan.end)
        if header is None:
            return _judge_header(scan, data)
        end = scan.end + frame_bytes(header.length)
        if end > len(data):
            raise Damage(scan.end, "a frame is longer than the file")
        chain, mark = _COMMIT.unpack_from(data, end - _COMMIT.size)
        body = view[scan.end : end - _COMMIT.size]
        if mark != _COMMIT_MARK or chain != zlib.crc32(body, header.chain):
            return _judge_frame(scan, data, end)
        if (header.chain, header.number) != (scan.chain, scan.frames):
            raise Damage(scan.end, "a frame stands where another was written")
        if header.length:
            payload = view[scan.end + ALIGN : scan.end + ALIGN + header.length]
            scan.records.append(_decode(payload, header.mask, scan.end))
        scan.sealed = bool(header.flags & _SEAL)
        scan.chain = scan.chain if scan.sealed else chain
        scan.end, scan.frames = end, scan.frames + 1


def _header_at(data: bytes, offset: int) -> _Header | None:
    """The frame header that begins here, if one does and was written for this place."""
    if offset + ALIGN > len(data):
        return None
    mark, flags, mask, _, length, place, synced, number, chain, crc = _FRAME.unpack_from(
        data, offset
    )
    if mark != _FRAME_MARK or place != offset or length > PAYLOAD_BYTES_MAX:
        return None
    if crc != zlib.crc32(data[offset : offset + _FRAME_FIELDS.size]):
        return None
    return _Header(flags, mask, length, synced, number, chain)


def _decode(payload: memoryview, mask: int, offset: int) -> Record:
    try:
        return _decoder.decode(bytes(payload).translate(_mask_table(mask)) if mask else payload)
    except ValueError as error:
        raise Damage(offset, f"a batch that this omx can't read: {error}") from None


def _judge_header(scan: Scan, data: bytes) -> None:
    """No frame begins at the end: is it the end, a torn write, or damage?"""
    if scan.dirty_end <= scan.end:
        return
    _check_nothing_vouches(scan, data, scan.end + ALIGN)
    rest_of_sector = data[scan.end : (scan.end // SECTOR + 1) * SECTOR]
    only_a_part_of_a_header = scan.dirty_end <= scan.end + ALIGN
    if any(rest_of_sector) and not only_a_part_of_a_header:
        raise Damage(scan.end, "a frame's header is damaged")
    scan.tail = Tail.TORN


def _judge_frame(scan: Scan, data: bytes, end: int) -> None:
    """A header, but a payload that does not verify: torn, or damage?"""
    # Behind it: what a command carries in it vouches for nothing.
    _check_nothing_vouches(scan, data, end)
    # The commit's last byte is not zero; also without sectors it is what is written last.
    if data[end - 1] and all(any(part) for part in _sectors(data, scan.end, end)):
        raise Damage(scan.end, "a batch is damaged that had been written whole")
    scan.tail = Tail.TORN


def _check_nothing_vouches(scan: Scan, data: bytes, start: int) -> None:
    """Raise if a frame from start on says that what stands at the end was durable."""
    for place in _marks(data, start):
        later = _header_at(data, place)
        if later is not None and later.synced > scan.end:
            raise Damage(scan.end, "a batch is damaged, and a later one shows that it was durable")


def _marks(data: bytes, start: int) -> Iterator[int]:
    place = data.find(_FRAME_MARK, start)
    while place >= 0:
        if place % ALIGN == 0:
            yield place
        place = data.find(_FRAME_MARK, place + 1)


def _sectors(data: bytes, start: int, end: int) -> Iterator[bytes]:
    """The parts of [start, end) by the sectors they lie in."""
    while start < end:
        stop = min((start // SECTOR + 1) * SECTOR, end)
        yield data[start:stop]
        start = stop


def _masked(payload: bytes) -> tuple[int, bytes]:
    """The payload without 512 zeros in a row, if any mask makes it so, and that mask."""
    for mask in range(1, 256):
        if bytes([mask]) * SECTOR not in payload:
            return mask, payload.translate(_mask_table(mask))
    return 0, payload


def _mask_table(mask: int) -> bytes:
    return bytes([byte ^ mask for byte in range(256)])

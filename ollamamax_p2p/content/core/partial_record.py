"""The record beside an unfinished blob: which bytes of it are there.

An append-only log. A write appends one entry as soon as its bytes are in the file, without waiting
for the disk: that survives the end of the process. Now and then the data are made durable and a
mark says up to which entry; so only the entries behind the last mark can claim bytes that a power
cut took away. Those few carry a CRC-32 of their bytes and are looked at again when the record is
opened (`Claim.synced`), whatever ended the last run. The CRC is against accidents, not against
liars: the chunk map and the blob's sha256 are.

    head:   `omx-partial-1\\n`, the blob's raw sha256, its size (8 bytes), CRC-32
    entry:  one letter, its fields, CRC-32 of both; all numbers big-endian
            W  offset (8), length (8), CRC-32 of the bytes (4)
            S  number of W entries before it that are durable (8)
            M  raw sha256 of the chunk map that verified what follows, or 32 zero bytes (32)

Reading stops at the first entry that is not whole: that is where the last run ended.
"""

import struct
import zlib
from dataclasses import dataclass

from ollamamax_p2p.content.core.digest import Digest, digest_of_hash, raw_hash
from ollamamax_p2p.errors import MalformedMessage

_MAGIC = b"omx-partial-1\n"
_HEAD = struct.Struct(f">{len(_MAGIC)}s32sQ")
_LAYOUTS = {b"W": struct.Struct(">cQQI"), b"S": struct.Struct(">cQ"), b"M": struct.Struct(">c32s")}
_CRC = struct.Struct(">I")
_NO_MAP = bytes(32)


@dataclass(frozen=True, slots=True)
class Claim:
    """What one W entry says."""

    start: int
    end: int
    crc: int
    synced: bool
    """Its bytes are known to be on the disk."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record as read."""

    blob: Digest
    size: int
    map_digest: Digest | None
    claims: tuple[Claim, ...]
    """In the order in which they were written; a later one holds where two overlap."""


def encode_head(blob: Digest, size: int) -> bytes:
    """How a record begins."""
    return _sealed(_HEAD.pack(_MAGIC, raw_hash(blob), size))


def encode_write(start: int, end: int, crc: int) -> bytes:
    """Those bytes are in the file."""
    return _sealed(_LAYOUTS[b"W"].pack(b"W", start, end - start, crc))


def encode_sync(write_count: int) -> bytes:
    """The first so many writes of this record are durable."""
    return _sealed(_LAYOUTS[b"S"].pack(b"S", write_count))


def encode_map(map_digest: Digest | None) -> bytes:
    """What is written is verified by that map."""
    return _sealed(_LAYOUTS[b"M"].pack(b"M", raw_hash(map_digest) if map_digest else _NO_MAP))


def _sealed(fields: bytes) -> bytes:
    return fields + _CRC.pack(zlib.crc32(fields))


def decode_record(data: bytes) -> Record:
    """Read a record as far as it is whole. Raises MalformedMessage if even its head is not."""
    head = _opened(data[: _HEAD.size + _CRC.size])
    if head is None or len(head) != _HEAD.size or not head.startswith(_MAGIC):
        raise MalformedMessage("", "not the record of an unfinished blob")
    _, raw, size = _HEAD.unpack(head)
    writes: list[tuple[int, int, int]] = []
    synced, map_raw, at = 0, _NO_MAP, _HEAD.size + _CRC.size
    while layout := _LAYOUTS.get(data[at : at + 1]):
        fields = _opened(data[at : at + layout.size + _CRC.size])
        if fields is None or len(fields) != layout.size:
            break
        kind, *values = layout.unpack(fields)
        if kind == b"W":
            start, length, crc = values
            if start + length > size:
                break
            writes.append((start, start + length, crc))
        elif kind == b"S":
            synced = max(synced, min(values[0], len(writes)))
        else:
            map_raw = values[0]
        at += layout.size + _CRC.size
    claims = tuple(Claim(*write, synced=index < synced) for index, write in enumerate(writes))
    map_digest = None if map_raw == _NO_MAP else digest_of_hash(map_raw)
    return Record(digest_of_hash(raw), size, map_digest, claims)


def _opened(sealed: bytes) -> bytes | None:
    """The fields of a sealed entry, or None if it is cut short or damaged."""
    fields, seal = sealed[: -_CRC.size], sealed[-_CRC.size :]
    return fields if seal == _CRC.pack(zlib.crc32(fields)) else None

"""Chunk maps: how a blob is cut, and the sha256 of every part.

A registry names a blob by the sha256 of the whole. So that a receiver can verify each part as it
arrives, the first node that holds a blob cuts it into chunks and lists their digests; that list is
the chunk map, and the sha256 of its encoding is the map's digest. The cut follows from the bytes
alone (`chunking.cut`), so honest holders all have the same map and two different map digests for
one blob mean that somebody lies.

Encoding, for the digest and on disk: `omx-chunk-map-1\\n`, then the blob's raw 32-byte sha256, then
per chunk its length as 4 bytes big-endian and its raw 32-byte sha256.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from ollamamax_p2p.content.core.digest import Digest, digest_of, digest_of_hash, raw_hash
from ollamamax_p2p.errors import MalformedMessage

MiB = 1024 * 1024

CHUNK_BYTES_MIN = 1 * MiB
"""Smaller chunks cost more map and more round trips than they save; short tails and single small
blobs may be less.
"""

CHUNK_BYTES_MAX = 16 * MiB
"""Larger ones cost too much to fetch again after a wrong byte, and too much memory in flight."""

CHUNK_COUNT_MAX = 1_000_000
"""A map of 36 MB; over a terabyte at the smallest size. A peer cannot make us hold more."""

_MAGIC = b"omx-chunk-map-1\n"
_ENTRY_BYTES = 36


@dataclass(frozen=True)
class ChunkMap:
    """The cut of one blob. Indexes count from 0; chunk i covers [offsets[i], offsets[i] +
    lengths[i]).
    """

    blob: Digest
    lengths: tuple[int, ...]
    """Bytes of each chunk, 1 to CHUNK_BYTES_MAX; an empty blob has none."""
    hashes: tuple[bytes, ...]
    """Raw 32-byte sha256 of each chunk."""

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.hashes):
            raise MalformedMessage("", "a chunk map needs one hash per length")
        if len(self.lengths) > CHUNK_COUNT_MAX:
            raise MalformedMessage("", f"a chunk map may have {CHUNK_COUNT_MAX} chunks at most")
        if any(not 1 <= length <= CHUNK_BYTES_MAX for length in self.lengths):
            raise MalformedMessage("", f"a chunk must have 1 to {CHUNK_BYTES_MAX} bytes")
        if any(len(raw) != 32 for raw in self.hashes):
            raise MalformedMessage("", "a chunk's hash must have 32 bytes")

    @property
    def chunk_count(self) -> int:
        """How many chunks."""
        return len(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each chunk begins."""
        return (0, *accumulate(self.lengths))[:-1] if self.lengths else ()

    @cached_property
    def size(self) -> int:
        """Bytes of the whole blob."""
        return sum(self.lengths)

    @cached_property
    def digest(self) -> Digest:
        """The digest of the map itself."""
        return digest_of(self.encode())

    def matches(self, chunk_index: int, data: bytes | memoryview) -> bool:
        """Whether data are exactly that chunk's bytes. Hashes: call it in a thread for large
        chunks.
        """
        return (
            len(data) == self.lengths[chunk_index]
            and hashlib.sha256(data).digest() == self.hashes[chunk_index]
        )

    def check_fits(self, blob: Digest, size: int) -> None:
        """Raises ValueError if this is the map of another blob, or of one of another size."""
        if (self.blob, self.size) != (blob, size):
            raise ValueError(f"map {self.digest} is not one of {blob} with {size} bytes")

    def encode(self) -> bytes:
        """The bytes that `digest` is of."""
        entries = (
            n.to_bytes(4, "big") + raw for n, raw in zip(self.lengths, self.hashes, strict=True)
        )
        return b"".join((_MAGIC, raw_hash(self.blob), *entries))


def decode_chunk_map(data: bytes) -> ChunkMap:
    """Read an encoded map. Raises MalformedMessage."""
    body = data[len(_MAGIC) + 32 :]
    if not data.startswith(_MAGIC) or len(data) < len(_MAGIC) + 32 or len(body) % _ENTRY_BYTES:
        raise MalformedMessage("", "not a chunk map of version 1")
    entries = [body[at : at + _ENTRY_BYTES] for at in range(0, len(body), _ENTRY_BYTES)]
    return ChunkMap(
        blob=digest_of_hash(data[len(_MAGIC) : len(_MAGIC) + 32]),
        lengths=tuple(int.from_bytes(entry[:4], "big") for entry in entries),
        hashes=tuple(entry[4:] for entry in entries),
    )

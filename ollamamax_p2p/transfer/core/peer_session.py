"""The serving side of one stream: what may be asked, in what order it is answered. Sans-IO.

`received` takes the fetcher's messages; `next_step` gives what to do next: look a blob up, send a
message, send a page of a map, send a part of a chunk. One step at a time, so that a fetcher that
does not read holds up nothing but its own stream, and costs one part of memory. What a fetcher can
make us remember is bounded: opened blobs, wants, requests for a map; beyond that it misbehaves.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest, digest_of_hash, raw_hash
from ollamamax_p2p.errors import PeerMisbehaved
from ollamamax_p2p.transfer.core.messages import (
    HAVE_MORE_CHUNKS_MAX,
    OPEN_BLOBS_MAX,
    PART_BYTES,
    PART_BYTES_MIN,
    Cancel,
    Choke,
    FromFetcher,
    FromSource,
    GetMap,
    Have,
    HaveMore,
    NotHeld,
    Open,
    Unchoke,
    Want,
)

WANTS_MAX = 256
"""Chunks wanted and not yet sent, per stream. Our fetcher has half as many out at most."""

MAP_REQUESTS_MAX = 4
"""Pages of maps asked for and not yet sent, per stream."""

PART_BYTES_FIRST = 256 * 1024
"""The first part's size; it doubles while parts leave quickly, halves while they leave slowly."""

PART_S_SLOW = 1.0
PART_S_QUICK = 0.25
"""So that a fetcher on a slow link hears of us at least every few seconds."""


@dataclass(frozen=True, slots=True)
class LookUp:
    """Find out what is held of this blob, then tell `found`."""

    blob: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Send:
    """Send this message."""

    message: FromSource


@dataclass(frozen=True, slots=True)
class SendMap:
    """Send a page of this map."""

    blob: int
    chunk_map: ChunkMap
    first: int


@dataclass(frozen=True, slots=True)
class SendPart:
    """Read these bytes and send them; then tell `part_sent`, or `lost` if they cannot be read."""

    blob: int
    chunk_map: ChunkMap
    chunk: int
    offset: int
    length: int


Step = LookUp | Send | SendMap | SendPart


@dataclass(slots=True)
class Holding:
    """What is held of a blob."""

    chunk_map: ChunkMap
    chunks: set[int] | None
    """None: all of them."""

    def has(self, chunk: int) -> bool:
        """Whether that chunk is held."""
        return self.chunks is None or chunk in self.chunks


@dataclass(slots=True)
class _Opened:
    digest: Digest
    holding: Holding | None = None
    looked_up: bool = False
    gained: list[int] = field(default_factory=list)


class PeerSession:
    """What one stream's fetcher has asked for."""

    def __init__(self) -> None:
        self._opened: dict[int, _Opened] = {}
        self._look_ups: deque[int] = deque()
        self._replies: deque[FromSource] = deque()
        self._map_requests: deque[tuple[int, int]] = deque()
        self._wants: dict[tuple[int, int], None] = {}  # in order
        self._sending: SendPart | None = None  # the part that comes next of a chunk begun
        self._served = False  # as decided; `_told` is what the fetcher knows
        self._told = False
        self._part_bytes = PART_BYTES_FIRST

    @property
    def interested(self) -> bool:
        """Whether it has opened a blob of which something is held."""
        return any(opened.holding is not None for opened in self._opened.values())

    def digests(self) -> Collection[Digest]:
        """The blobs it has opened."""
        return {opened.digest for opened in self._opened.values()}

    # -- what the fetcher says -----------------------------------------------------------------

    def received(self, message: FromFetcher) -> None:
        """Take a message. Raises PeerMisbehaved."""
        match message:
            case Open():
                self._open(message)
            case GetMap():
                self._get_map(message)
            case Want():
                self._want(message)
            case Cancel():
                self._known(message.blob)
                self._unwant(message.blob, message.chunk)
            case _:  # Close
                self._known(message.blob)
                del self._opened[message.blob]
                self._forget_wants(message.blob)

    def _open(self, message: Open) -> None:
        if message.blob in self._opened:
            raise PeerMisbehaved("", f"it opened two blobs under the number {message.blob}")
        if len(self._opened) >= OPEN_BLOBS_MAX:
            raise PeerMisbehaved("", f"it opened more than {OPEN_BLOBS_MAX} blobs")
        self._opened[message.blob] = _Opened(digest_of_hash(message.digest))
        self._look_ups.append(message.blob)

    def _get_map(self, message: GetMap) -> None:
        holding = self._known(message.blob).holding
        if holding is None:
            return  # it was told so, or will be
        if message.first >= max(1, holding.chunk_map.chunk_count):
            raise PeerMisbehaved("", f"it asked for a map from chunk {message.first} on")
        if len(self._map_requests) >= MAP_REQUESTS_MAX:
            raise PeerMisbehaved("", f"it asked for more than {MAP_REQUESTS_MAX} map pages at once")
        self._map_requests.append((message.blob, message.first))

    def _want(self, message: Want) -> None:
        holding = self._known(message.blob).holding
        if holding is None or not self._told:
            return  # the two messages crossed; it knows that the want is forgotten
        if not (message.chunk < holding.chunk_map.chunk_count and holding.has(message.chunk)):
            raise PeerMisbehaved("", f"it wants chunk {message.chunk}, which it was not offered")
        if len(self._wants) >= WANTS_MAX:
            raise PeerMisbehaved("", f"it wants more than {WANTS_MAX} chunks at once")
        self._wants[message.blob, message.chunk] = None

    def _known(self, blob: int) -> _Opened:
        opened = self._opened.get(blob)
        if opened is None:
            raise PeerMisbehaved("", f"it asked for blob {blob}, which it has not opened")
        return opened

    def _unwant(self, blob: int, chunk: int) -> None:
        self._wants.pop((blob, chunk), None)
        if self._sending and (self._sending.blob, self._sending.chunk) == (blob, chunk):
            self._sending = None

    def _forget_wants(self, blob: int) -> None:
        for number, chunk in [key for key in self._wants if key[0] == blob]:
            del self._wants[number, chunk]
        if self._sending and self._sending.blob == blob:
            self._sending = None

    # -- what happens here ---------------------------------------------------------------------

    def serve(self, served: bool) -> None:
        """It has a slot now, or has it no longer. A chunk that was begun is sent to its end."""
        self._served = served

    def found(self, blob: int, holding: Holding | None) -> None:
        """The answer to a `LookUp`."""
        opened = self._opened.get(blob)
        if opened is None:
            return
        opened.looked_up = True
        opened.holding = holding
        self._replies.append(NotHeld(blob=blob) if holding is None else _have(blob, holding))

    def available(self, digest: Digest, chunk_map: ChunkMap, chunks: Iterable[int]) -> None:
        """This node has begun to hold a blob: those who asked in vain are told."""
        for blob, opened in self._opened.items():
            if opened.digest == digest and opened.looked_up and opened.holding is None:
                self.found(blob, Holding(chunk_map, set(chunks)))

    def gained(self, digest: Digest, chunk: int) -> None:
        """This node has got one more chunk of a blob that it does not hold whole."""
        for opened in self._opened.values():
            if opened.digest == digest and opened.holding and opened.holding.chunks is not None:
                opened.holding.chunks.add(chunk)
                opened.gained.append(chunk)

    def lost(self, digest: Digest) -> None:
        """This node holds the blob no longer."""
        for blob, opened in self._opened.items():
            if opened.digest == digest and opened.holding is not None:
                opened.holding = None
                opened.gained.clear()
                self._forget_wants(blob)
                self._replies.append(NotHeld(blob=blob))

    def part_sent(self, *, seconds: float) -> None:
        """The part of the last step has left, and took this long."""
        if seconds > PART_S_SLOW:
            self._part_bytes = max(PART_BYTES_MIN, self._part_bytes // 2)
        elif seconds < PART_S_QUICK:
            self._part_bytes = min(PART_BYTES, self._part_bytes * 2)

    # -- what to do next -----------------------------------------------------------------------

    def next_step(self) -> Step | None:
        """What to do next; None until something happens."""
        if self._replies:
            return Send(self._replies.popleft())
        while self._look_ups:
            blob = self._look_ups.popleft()
            if blob in self._opened:
                return LookUp(blob, self._opened[blob].digest)
        for blob, opened in self._opened.items():
            if opened.gained:
                batch = opened.gained[:HAVE_MORE_CHUNKS_MAX]
                del opened.gained[:HAVE_MORE_CHUNKS_MAX]
                return Send(HaveMore(blob=blob, chunks=batch))
        return self._next_page() or self._next_turn() or self._next_part()

    def _next_page(self) -> SendMap | None:
        while self._map_requests:
            blob, first = self._map_requests.popleft()
            opened = self._opened.get(blob)
            if opened is not None and opened.holding is not None:
                return SendMap(blob, opened.holding.chunk_map, first)
        return None

    def _next_turn(self) -> Send | None:
        if self._served == self._told or self._sending is not None:
            return None
        self._told = self._served
        if not self._served:
            self._wants.clear()
        return Send(Unchoke() if self._served else Choke())

    def _next_part(self) -> SendPart | None:
        if self._sending is None:
            if not self._wants:
                return None
            blob, chunk = next(iter(self._wants))
            del self._wants[blob, chunk]
            holding = self._opened[blob].holding
            assert holding is not None, "wants are forgotten when a blob is lost"
            self._sending = SendPart(blob, holding.chunk_map, chunk, 0, 0)
        begun = self._sending
        whole = begun.chunk_map.lengths[begun.chunk]
        length = self._part_length(whole - begun.offset)
        step = SendPart(begun.blob, begun.chunk_map, begun.chunk, begun.offset, length)
        end = begun.offset + length
        self._sending = (
            None if end == whole else SendPart(begun.blob, begun.chunk_map, begun.chunk, end, 0)
        )
        return step

    def _part_length(self, rest: int) -> int:
        return min(rest, self._part_bytes)


def _have(blob: int, holding: Holding) -> Have:
    chunk_map = holding.chunk_map
    return Have(
        blob=blob,
        size=chunk_map.size,
        chunk_count=chunk_map.chunk_count,
        map_digest=raw_hash(chunk_map.digest),
        complete=holding.chunks is None,
        chunks=b""
        if holding.chunks is None
        else encode_bits(holding.chunks, chunk_map.chunk_count),
    )


def encode_bits(chunks: Iterable[int], count: int) -> bytes:
    """One bit per chunk, the first in the highest bit of the first byte."""
    bits = bytearray((count + 7) // 8)
    for chunk in chunks:
        bits[chunk // 8] |= 0x80 >> chunk % 8
    return bytes(bits)


def decode_bits(bits: bytes, count: int) -> list[int]:
    """The chunks whose bits are set. Raises PeerMisbehaved if the field is not `count` long."""
    if len(bits) != (count + 7) // 8:
        raise PeerMisbehaved("", f"it told {len(bits)} bytes of bits for {count} chunks")
    chunks = [
        place * 8 + bit
        for place, byte in enumerate(bits)
        if byte
        for bit in range(8)
        if byte & 0x80 >> bit
    ]
    if chunks and chunks[-1] >= count:
        raise PeerMisbehaved("", f"it says it has chunk {chunks[-1]} of {count}")
    return chunks

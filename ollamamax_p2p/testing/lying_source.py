"""A source that lies: it speaks the transfer protocol well and serves what it should not."""

import hashlib
from collections.abc import Awaitable, Callable

from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.errors import PeerGone
from ollamamax_p2p.host import ByteStream, MessageStream
from ollamamax_p2p.testing.faults import Lie
from ollamamax_p2p.transfer.core.messages import (
    MAP_PAGE_CHUNKS,
    ChunkPart,
    FromFetcher,
    FromSource,
    MapPage,
    fetcher_codec,
    source_codec,
)
from ollamamax_p2p.transfer.core.peer_session import (
    Holding,
    LookUp,
    PeerSession,
    Send,
    SendMap,
    SendPart,
    Step,
)

TOO_MUCH = 10
"""As many times as asked for."""

HonestCopy = Callable[[Digest], Awaitable[tuple[bytes, ChunkMap] | None]]
"""A blob's true bytes and map, or None: a good liar knows the truth."""

_MAP_LIES = (Lie.PARTIAL_MAP, Lie.CHOKE, Lie.MAP_SWITCH, Lie.OTHER_SIZE)
"""Those that are told with the map, before any chunk is asked for."""

Talk = MessageStream[FromSource, FromFetcher]


class LyingSource:
    """A handler for `/omx/transfer/1`. Everybody gets an upload slot at once."""

    def __init__(self, lie: Lie, honest_copy: HonestCopy) -> None:
        self.lie = lie
        self.lies = 0
        """How many chunks, or parts of them, or maps it has lied about so far."""
        self._honest_copy = honest_copy
        self._served: dict[Digest, tuple[bytes, ChunkMap]] = {}  # by the digest of the map

    async def answer(self, stream: ByteStream) -> None:
        """Serve one fetcher until it has had enough."""
        talk: Talk = MessageStream(stream, sends=source_codec, receives=fetcher_codec)
        session = PeerSession()
        session.serve(self.lie is not Lie.CHOKE)
        try:
            while (message := await talk.receive()) is not None:
                session.received(message)
                while (step := session.next_step()) is not None:
                    await self._take(step, session, talk)
        except PeerGone:
            return

    async def _take(self, step: Step, session: PeerSession, talk: Talk) -> None:
        match step:
            case LookUp():
                session.found(step.blob, holding := await self._holding(step.digest))
                if self.lie is Lie.MAP_SWITCH and holding is not None:
                    session.lost(step.digest)
                    session.found(step.blob, await self._holding(step.digest))
            case Send():
                await talk.send(step.message)
            case SendMap():
                await talk.send(_page(step))
            case SendPart():
                await self._send_part(step, talk)

    async def _holding(self, digest: Digest) -> Holding | None:
        copy = await self._honest_copy(digest)
        if copy is None:
            return None
        data, chunk_map = copy
        if self.lie in _MAP_LIES:
            self.lies += 1
        if self.lie in (Lie.PARTIAL_MAP, Lie.MAP_SWITCH):
            data = _spoilt(data, chunk_map, bits=self.lies % 255 + 1)
        elif self.lie in (Lie.WRONG_CHUNK, Lie.WRONG_MAP, Lie.CHOKE):
            data = _spoilt(data, chunk_map)
        lengths = chunk_map.lengths
        if self.lie is Lie.OTHER_SIZE:
            data, lengths = data + b"?", (*lengths[:-1], lengths[-1] + 1)
        if self.lie in (Lie.WRONG_MAP, *_MAP_LIES):
            chunk_map = _map_of(digest, data, lengths)
        self._served[chunk_map.digest] = (data, chunk_map)
        partial = self.lie is Lie.PARTIAL_MAP
        return Holding(chunk_map, set(range(chunk_map.chunk_count)) if partial else None)

    async def _send_part(self, step: SendPart, talk: Talk) -> None:
        self.lies += 1
        if self.lie is Lie.NOTHING:
            return
        data, chunk_map = self._served[step.chunk_map.digest]
        await talk.send(_part(step, step.chunk, data, chunk_map))
        if self.lie is Lie.TOO_MUCH:
            for further in range(1, TOO_MUCH):
                chunk = (step.chunk + further) % chunk_map.chunk_count
                await talk.send(_part(step, chunk, data, chunk_map))


def _part(step: SendPart, chunk: int, data: bytes, chunk_map: ChunkMap) -> ChunkPart:
    """The asked part, of this chunk instead."""
    start = chunk_map.offsets[chunk] + step.offset
    end = min(start + step.length, chunk_map.offsets[chunk] + chunk_map.lengths[chunk])
    return ChunkPart(blob=step.blob, chunk=chunk, offset=step.offset, data=data[start:end] or b"?")


def _page(step: SendMap) -> MapPage:
    shown = slice(step.first, step.first + MAP_PAGE_CHUNKS)
    return MapPage(
        blob=step.blob,
        first=step.first,
        lengths=list(step.chunk_map.lengths[shown]),
        hashes=list(step.chunk_map.hashes[shown]),
    )


def _spoilt(data: bytes, chunk_map: ChunkMap, *, bits: int = 1) -> bytes:
    """These bits are wrong in every chunk."""
    spoilt = bytearray(data)
    for offset in chunk_map.offsets:
        spoilt[offset] ^= bits
    return bytes(spoilt)


def _map_of(digest: Digest, data: bytes, lengths: tuple[int, ...]) -> ChunkMap:
    hashes: list[bytes] = []
    at = 0
    for length in lengths:
        hashes.append(hashlib.sha256(data[at : at + length]).digest())
        at += length
    return ChunkMap(digest, lengths, tuple(hashes))

"""The transfer protocol's messages (`/omx/transfer/1`).

The fetcher opens a stream to a source and keeps it; several blobs may share it, each under a number
that the fetcher chose. All that follows is by chunk index in the map whose digest the source told
in `Have`. A chunk travels as parts of PART_BYTES_MIN to PART_BYTES. A stream begins choked.
docs/protocols/swarm-transfer.md tells the whole conversation.
"""

from typing import Annotated

from msgspec import Meta

from ollamamax_p2p.content.core.chunk_map import (
    CHUNK_BYTES_MAX,
    CHUNK_BYTES_MIN,
    CHUNK_COUNT_MAX,
)
from ollamamax_p2p.wire import Codec, Message

PART_BYTES = 1024 * 1024
"""One write on a py-libp2p stream: 1 MiB moved twice as fast as 64 KiB (design 4.2)."""

PART_BYTES_MIN = 64 * 1024
"""A part that is not its chunk's last has at least this many bytes. A source on a slow link sends
smaller parts, so that the fetcher hears of it; one that sends drops only pretends to serve.
"""

MAP_PAGE_CHUNKS = 8_192
"""Chunks in one page of a map: 36 bytes each, under 300 KB a page."""

HAVE_MORE_CHUNKS_MAX = 1_024
"""Chunks told in one `HaveMore`; more make another."""

MESSAGE_BYTES_MAX = PART_BYTES + 4_096

OPEN_BLOBS_MAX = 256
"""How many blobs one stream may have open; a model has a handful."""

ANSWERS_MAX = 64
"""`Have` and `NotHeld` in one conversation. A source that begins to fetch a blob, gives up and
begins again says both each time.
"""

BlobNumber = Annotated[int, Meta(ge=0, lt=2**32)]
ChunkIndex = Annotated[int, Meta(ge=0, lt=CHUNK_COUNT_MAX)]
RawHash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Bitfield = Annotated[bytes, Meta(max_length=CHUNK_COUNT_MAX // 8 + 1)]


class Open(Message, tag="open", frozen=True):
    """Fetcher: which chunks of this blob have you?"""

    blob: BlobNumber
    digest: RawHash


class Have(Message, tag="have", frozen=True):
    """Source: what it holds of an opened blob."""

    blob: BlobNumber
    size: Annotated[int, Meta(ge=0, lt=2**50)]
    chunk_count: Annotated[int, Meta(ge=0, le=CHUNK_COUNT_MAX)]
    map_digest: RawHash
    complete: bool
    """It holds the whole and has computed the map itself, so it answers for it."""
    chunks: Bitfield
    """One bit per chunk, first chunk in the highest bit of the first byte; empty when complete."""


class HaveMore(Message, tag="have_more", frozen=True):
    """Source: chunks of an opened blob that it has got since."""

    blob: BlobNumber
    chunks: Annotated[list[ChunkIndex], Meta(max_length=HAVE_MORE_CHUNKS_MAX)]


class NotHeld(Message, tag="not_held", frozen=True):
    """Source: it holds nothing of this blob (any more). A `Have` follows if that changes."""

    blob: BlobNumber


class GetMap(Message, tag="get_map", frozen=True):
    """Fetcher: the map from this chunk on."""

    blob: BlobNumber
    first: Annotated[int, Meta(ge=0, le=CHUNK_COUNT_MAX)]


class MapPage(Message, tag="map_page", frozen=True):
    """Source: up to MAP_PAGE_CHUNKS entries from `first` on."""

    blob: BlobNumber
    first: Annotated[int, Meta(ge=0, le=CHUNK_COUNT_MAX)]
    lengths: Annotated[
        list[Annotated[int, Meta(ge=1, le=CHUNK_BYTES_MAX)]], Meta(max_length=MAP_PAGE_CHUNKS)
    ]
    hashes: Annotated[list[RawHash], Meta(max_length=MAP_PAGE_CHUNKS)]


class Want(Message, tag="want", frozen=True):
    """Fetcher: send this chunk."""

    blob: BlobNumber
    chunk: ChunkIndex


class Cancel(Message, tag="cancel", frozen=True):
    """Fetcher: the chunk is not wanted any more; a part on its way may still arrive."""

    blob: BlobNumber
    chunk: ChunkIndex


class ChunkPart(Message, tag="part", frozen=True):
    """Source: bytes of a wanted chunk, in order, `offset` within the chunk."""

    blob: BlobNumber
    chunk: ChunkIndex
    offset: Annotated[int, Meta(ge=0, lt=CHUNK_BYTES_MAX)]
    data: Annotated[bytes, Meta(min_length=1, max_length=PART_BYTES)]


class Choke(Message, tag="choke", frozen=True):
    """Source: no upload slot for you now; all wants are forgotten, ask again after `Unchoke`."""


class Unchoke(Message, tag="unchoke", frozen=True):
    """Source: you may ask."""


class Close(Message, tag="close", frozen=True):
    """Fetcher: nothing more of this blob; the number may be used again."""

    blob: BlobNumber


FromFetcher = Open | GetMap | Want | Cancel | Close
FromSource = Have | HaveMore | NotHeld | MapPage | ChunkPart | Choke | Unchoke

fetcher_codec: Codec[FromFetcher] = Codec(FromFetcher, max_bytes=4_096)
source_codec: Codec[FromSource] = Codec(FromSource, max_bytes=MESSAGE_BYTES_MAX)


def chunk_count_fits(count: int, size: int) -> bool:
    """Whether `chunking.cut` can cut so many bytes into so many chunks, wherever tensors begin.

    It cuts most finely where small tensors alternate with ones of a byte over CHUNK_BYTES_MIN: the
    small one is a chunk, the large one is halved. One more each may come of the header and the end.
    """
    most = min(size, 3 * size // CHUNK_BYTES_MIN + 2)
    return size <= count * CHUNK_BYTES_MAX and count <= most

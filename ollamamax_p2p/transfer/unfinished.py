"""The blobs that are being fetched now, as the serving side sees them.

A blob is here from the moment its chunk map is known until it is committed or given up; only chunks
that were verified by that map are in it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ollamamax_p2p.content import PartialBlob
from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest


@dataclass(frozen=True, slots=True, eq=False)
class UnfinishedBlob:
    """One of them."""

    chunk_map: ChunkMap
    partial: PartialBlob
    chunks: set[int]
    """Those that are here, verified; grows."""


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who wants to know at once."""

    began: Callable[[UnfinishedBlob], None]
    gained: Callable[[Digest, int], None]
    gave_up: Callable[[Digest], None]


class UnfinishedBlobs:
    """All of them, by digest."""

    def __init__(self) -> None:
        self._blobs: dict[Digest, UnfinishedBlob] = {}
        self._watchers: list[Watcher] = []

    def watch(self, watcher: Watcher) -> None:
        """Tell it from now on."""
        self._watchers.append(watcher)

    def get(self, digest: Digest) -> UnfinishedBlob | None:
        """The blob, if it is being fetched and its map is known."""
        return self._blobs.get(digest)

    def begin(self, blob: UnfinishedBlob) -> None:
        """It can be served from now on."""
        self._blobs[blob.chunk_map.blob] = blob
        for watcher in self._watchers:
            watcher.began(blob)

    def gained(self, digest: Digest, chunk: int) -> None:
        """One more chunk of it has been verified and written."""
        blob = self._blobs.get(digest)
        if blob is not None:
            blob.chunks.add(chunk)
            for watcher in self._watchers:
                watcher.gained(digest, chunk)

    def finished(self, digest: Digest) -> None:
        """It is in the store: whoever reads it finds it there."""
        self._blobs.pop(digest, None)

    def give_up(self, digest: Digest) -> None:
        """It is not being fetched any more, and not in the store."""
        if self._blobs.pop(digest, None) is not None:
            for watcher in self._watchers:
                watcher.gave_up(digest)

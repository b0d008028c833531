"""RamStore: the BlobStore contract in memory, for tests, simulations and small caches."""

from collections.abc import AsyncIterable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import trio

from ollamamax_p2p.content.blob_store import StoredModel
from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest, digest_of
from ollamamax_p2p.content.core.manifest import Manifest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.content.core.ranges import Ranges
from ollamamax_p2p.content.map_building import chunk_map_of
from ollamamax_p2p.errors import (
    AccessRefused,
    BadModelFile,
    BlobNotFound,
    DigestMismatch,
    ModelNotFound,
    StoreFull,
    StoreReadOnly,
)

_WHERE = "memory"


def _utc_now() -> datetime:
    return datetime.now(UTC)


class RamStore:
    """Blobs in a dictionary, and no threads, so that a virtual clock may run beside it.

    capacity_bytes: for whole blobs and unfinished ones together.

    now: the time that a manifest gets; a simulation gives its own.
    """

    def __init__(
        self,
        capacity_bytes: int = 2**40,
        *,
        writable: bool = True,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self._writable = writable
        self._now = now
        self._blobs: dict[Digest, bytes] = {}
        self._maps: dict[Digest, ChunkMap] = {}
        self._unfinished: dict[Digest, _Unfinished] = {}
        self._manifests: dict[str, tuple[ModelName, Manifest, datetime]] = {}

    @property
    def writable(self) -> bool:
        """False if it was made so."""
        return self._writable

    @property
    def place(self) -> str:
        """See BlobStore."""
        return _WHERE

    def _check_writable(self) -> None:
        if not self._writable:
            raise StoreReadOnly(_WHERE)

    async def has(self, digest: Digest) -> bool:
        """See BlobStore."""
        return digest in self._blobs

    async def size_of(self, digest: Digest) -> int:
        """See BlobStore."""
        return len(self._bytes_of(digest))

    async def open(self, digest: Digest) -> "RamReader":
        """See BlobStore."""
        return RamReader(self._bytes_of(digest))

    def _bytes_of(self, digest: Digest) -> bytes:
        try:
            return self._blobs[digest]
        except KeyError:
            raise BlobNotFound(digest) from None

    async def put(self, data: bytes) -> Digest:
        """See BlobStore."""
        self._check_writable()
        digest = digest_of(data)
        if digest not in self._blobs:
            self._make_room(len(data))
            self._blobs[digest] = bytes(data)
        return digest

    async def receive(
        self, digest: Digest, parts: AsyncIterable[bytes], *, size: int | None = None
    ) -> None:
        """See BlobStore."""
        self._check_writable()
        self._make_room(size or 0)
        data = bytearray()
        async for part in parts:
            data += part
            self._make_room(len(data))
        actual = digest_of(bytes(data))
        if actual != digest:
            raise DigestMismatch(digest, actual)
        await self.put(bytes(data))

    async def import_file(self, path: Path, *, link: bool = False) -> Digest:
        """See BlobStore; there is nothing to link to in memory."""
        self._check_writable()
        try:
            size = (await trio.Path(path).stat()).st_size
            self._make_room(size)
            data = await trio.Path(path).read_bytes()
        except PermissionError as error:
            raise AccessRefused(str(path), "read") from error
        except (FileNotFoundError, IsADirectoryError) as error:
            raise BadModelFile(str(path), "there is no such file") from error
        return await self.put(data)

    def _make_room(self, size: int) -> None:
        if size > self._room():
            raise StoreFull(_WHERE, size, self._room())

    def _room(self) -> int:
        held = sum(map(len, self._blobs.values()))
        return max(0, self.capacity_bytes - held - sum(u.size for u in self._unfinished.values()))

    async def partial(self, digest: Digest, size: int) -> "RamPartial":
        """See BlobStore."""
        self._check_writable()
        held = self._unfinished.get(digest)
        if held is not None and held.open:
            raise ValueError(f"{digest} is being written already")
        if held is None or held.size != size:
            self._unfinished.pop(digest, None)
            self._make_room(size)
            held = self._unfinished[digest] = _Unfinished(size)
        held.open = True
        return RamPartial(self, digest, held)

    async def blobs(self) -> list[Digest]:
        """See BlobStore."""
        return sorted(self._blobs)

    async def partials(self) -> list[Digest]:
        """See BlobStore."""
        return sorted(self._unfinished)

    async def missing_bytes(self, digest: Digest) -> int | None:
        """See BlobStore; an unfinished blob has all of its room from the beginning."""
        return 0 if digest in self._unfinished else None

    async def chunk_map(self, digest: Digest) -> ChunkMap:
        """See BlobStore."""
        if digest not in self._maps:
            await trio.lowlevel.checkpoint()
            self._maps[digest] = chunk_map_of(self._bytes_of(digest))
        return self._maps[digest]

    async def manifest(self, name: ModelName) -> Manifest:
        """See BlobStore."""
        try:
            return self._manifests[name.key][1]
        except KeyError:
            raise ModelNotFound(str(name)) from None

    async def modified_at(self, name: ModelName) -> datetime:
        """See BlobStore."""
        try:
            return self._manifests[name.key][2]
        except KeyError:
            raise ModelNotFound(str(name)) from None

    async def put_manifest(self, name: ModelName, manifest: Manifest) -> None:
        """See BlobStore."""
        self._check_writable()
        for digest, _ in manifest.blobs():
            self._bytes_of(digest)
        first = self._manifests.get(name.key, (name,))[0]
        self._manifests[name.key] = (first, manifest, self._now())

    async def remove_manifest(self, name: ModelName) -> list[Digest]:
        """See BlobStore."""
        self._check_writable()
        manifest = await self.manifest(name)
        del self._manifests[name.key]
        return await self.remove_unused([digest for digest, _ in manifest.blobs()])

    async def models(self) -> list[StoredModel]:
        """See BlobStore."""
        stored = [
            StoredModel(name, manifest.digest, manifest.size, when)
            for name, manifest, when in self._manifests.values()
        ]
        return sorted(stored, key=lambda model: model.modified_at, reverse=True)

    async def remove_unused(self, candidates: Sequence[Digest]) -> list[Digest]:
        """See BlobStore."""
        self._check_writable()
        needed = {
            digest for _, manifest, _ in self._manifests.values() for digest, _ in manifest.blobs()
        }
        unused = [d for d in dict.fromkeys(candidates) if d in self._blobs and d not in needed]
        for digest in unused:
            del self._blobs[digest]
            self._maps.pop(digest, None)
        return unused

    async def free_bytes(self) -> int:
        """See BlobStore."""
        return self._room()

    def _finish(self, digest: Digest, data: bytes | None) -> None:
        """A partial blob is whole (data) or given up (None)."""
        del self._unfinished[digest]
        if data is not None:
            self._blobs.setdefault(digest, data)


class RamReader:
    """A blob in memory; it stays readable if the blob is removed meanwhile."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    async def read_at(self, offset: int, length: int) -> bytes:
        """See BlobReader."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"[{offset}, {offset + length}) is outside [0, {self.size})")
        await trio.lowlevel.checkpoint()
        return self._data[offset : offset + length]

    async def __aenter__(self) -> "RamReader":
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None


class _Unfinished:
    """What is kept of an unfinished blob while nobody writes it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = bytearray(size)
        self.have = Ranges()
        self.map_digest: Digest | None = None
        self.open = False


class RamPartial:
    """An unfinished blob in memory."""

    def __init__(self, store: RamStore, digest: Digest, held: _Unfinished) -> None:
        self.digest, self.size = digest, held.size
        self._store, self._held = store, held
        self._open = True

    @property
    def map_digest(self) -> Digest | None:
        """See PartialBlob."""
        return self._held.map_digest

    def missing(self) -> list[tuple[int, int]]:
        """See PartialBlob."""
        return self._held.have.gaps(self.size)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        """See PartialBlob."""
        self._check_open()
        end = offset + len(data)
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"[{offset}, {end}) is outside [0, {self.size})")
        await trio.lowlevel.checkpoint()
        self._check_open()
        self._held.data[offset:end] = data
        self._held.have.add(offset, end)

    async def read_at(self, offset: int, length: int) -> bytes:
        """See PartialBlob."""
        end = offset + length
        if not 0 <= offset <= end <= self.size or not self._held.have.covers(offset, end):
            raise ValueError(f"[{offset}, {end}) has not been written")
        await trio.lowlevel.checkpoint()
        return bytes(self._held.data[offset:end])

    async def use_map(self, chunk_map: ChunkMap | None) -> None:
        """See PartialBlob."""
        self._check_open()
        if chunk_map is None or chunk_map.digest == self.map_digest:
            self._held.map_digest = chunk_map.digest if chunk_map else None
            return
        chunk_map.check_fits(self.digest, self.size)
        kept = Ranges()
        for index, (at, length) in enumerate(
            zip(chunk_map.offsets, chunk_map.lengths, strict=True)
        ):
            if self._held.have.covers(at, at + length) and chunk_map.matches(
                index, memoryview(self._held.data)[at : at + length]
            ):
                kept.add(at, at + length)
        self._held.have, self._held.map_digest = kept, chunk_map.digest

    async def flush(self) -> None:
        """See PartialBlob; memory is as durable as it gets."""
        self._check_open()

    async def commit(self) -> None:
        """See PartialBlob."""
        self._check_open()
        if self.missing():
            raise ValueError(f"{self.digest} is not complete")
        await trio.lowlevel.checkpoint()
        self._check_open()
        data = bytes(self._held.data)
        actual = digest_of(data)
        if actual != self.digest:
            raise DigestMismatch(self.digest, actual)
        self._close()
        self._store._finish(self.digest, data)

    async def discard(self) -> None:
        """See PartialBlob."""
        self._check_open()
        self._close()
        self._store._finish(self.digest, None)

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"the unfinished blob {self.digest} is closed")

    def _close(self) -> None:
        if self._open:
            self._open = self._held.open = False

    async def __aenter__(self) -> "RamPartial":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._close()

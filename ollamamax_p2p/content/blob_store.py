"""BlobStore: the blobs, manifests and unfinished blobs of this node.

Implementations: `disk_store` (Ollama's layout, byte for byte) and `ram_store`; one contract suite
(`tests/contracts/test_blob_store.py`). All methods that touch the disk are async and run in
threads.
"""

from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.content.core.manifest import Manifest
from ollamamax_p2p.content.core.model_name import ModelName


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One manifest in the store."""

    name: ModelName
    manifest_digest: Digest
    """sha256 of the manifest's bytes; what `list` shows as ID."""
    size: int
    """Bytes of all its blobs."""
    modified_at: datetime
    """When the manifest was written, in UTC."""


class BlobReader(Protocol):
    """An open blob. Use as an async context manager."""

    size: int

    async def read_at(self, offset: int, length: int) -> bytes:
        """Exactly that range, also if the blob was removed meanwhile. Raises StoreDamaged if the
        file became shorter, ValueError outside [0, size).
        """

    async def __aenter__(self) -> "BlobReader": ...
    async def __aexit__(self, *exc: object) -> None: ...


class PartialBlob(Protocol):
    """A blob that is being fetched. Durable progress; use as an async context manager, leaving
    keeps what is there.

    What `write` has returned for survives the end of the process. A power cut takes at most what
    was written since the last `flush`, or since `record_interval_bytes` before: each is on the disk
    before the record vouches for it.
    """

    digest: Digest
    size: int

    @property
    def map_digest(self) -> Digest | None:
        """The chunk map by which it was verified so far; None before the first or for an origin's
        unverified bytes.
        """

    def missing(self) -> list[tuple[int, int]]:
        """Byte ranges [start, end) not yet written, in order, disjoint, not touching."""

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write verified bytes and note the range. Raises StoreFull (nothing noted), ValueError
        outside [0, size).
        """

    async def read_at(self, offset: int, length: int) -> bytes:
        """Bytes that were written. Raises ValueError if any of them were not."""

    async def use_map(self, chunk_map: ChunkMap | None) -> None:
        """Remember which map the next writes were verified by. What was written before under
        another map is hashed again, and only ranges that match the new map are kept; with None,
        everything is. Raises ValueError for a map of another blob or size.
        """

    async def flush(self) -> None:
        """Make all that was written durable and noted."""

    async def commit(self) -> None:
        """Hash the whole; if it is what its name says, it becomes visible in the store atomically
        and durably.

        Raises DigestMismatch: nothing became visible, the bytes stay until `discard` or `use_map`.
        ValueError if ranges are missing.
        """

    async def discard(self) -> None:
        """Forget it: data and record."""

    async def __aenter__(self) -> "PartialBlob": ...
    async def __aexit__(self, *exc: object) -> None: ...


class BlobStore(Protocol):
    """What a node holds."""

    @property
    def writable(self) -> bool:
        """False if the folder can only be read; then every writing method raises StoreReadOnly."""

    @property
    def place(self) -> str:
        """Where it is, for errors: the folder."""

    # blobs
    async def has(self, digest: Digest) -> bool:
        """Whether the whole blob is here."""

    async def size_of(self, digest: Digest) -> int:
        """Bytes. Raises BlobNotFound."""

    async def open(self, digest: Digest) -> BlobReader:
        """Raises BlobNotFound."""

    async def put(self, data: bytes) -> Digest:
        """Store a small blob (config, template) from memory."""

    async def receive(
        self, digest: Digest, parts: AsyncIterable[bytes], *, size: int | None = None
    ) -> None:
        """Store a blob as it arrives; it becomes visible whole, verified, or not at all.

        size: how long it says it will be, if it says so; what does not fit is refused before it
        begins.
        Raises DigestMismatch, StoreFull, StoreReadOnly, and what iterating over parts raises;
        nothing stays then.
        """

    async def import_file(self, path: Path, *, link: bool = False) -> Digest:
        """Make a file a blob; the file itself is neither moved nor changed. It is copied, without
        taking room where the file system can share blocks (reflink).

        link: make a hard link instead where that can be. Then nobody may edit the file in place
        any more: the blob would change with it, and no longer be what its name says.
        Raises AccessRefused, StoreFull, BadModelFile if it is no file or changed meanwhile.
        """

    async def partial(self, digest: Digest, size: int) -> PartialBlob:
        """Begin or go on with a blob. One at a time per digest (ValueError). Raises StoreFull if
        what is missing does not fit, counting other unfinished blobs that are open.
        """

    async def blobs(self) -> list[Digest]:
        """Every whole blob, sorted."""

    async def partials(self) -> list[Digest]:
        """Every unfinished one, sorted."""

    async def missing_bytes(self, digest: Digest) -> int | None:
        """What the rest of an unfinished blob will still take of `free_bytes`; 0 while it is open,
        for its room is set aside then. None if nothing of it is here.
        """

    async def chunk_map(self, digest: Digest) -> ChunkMap:
        """The blob's map; built, and kept beside the store, at the first call. Raises BlobNotFound,
        StoreDamaged if the blob is not what its name says: then it must not be served.
        """

    # manifests
    async def manifest(self, name: ModelName) -> Manifest:
        """Raises ModelNotFound, StoreDamaged. Names match case-insensitively, as in Ollama."""

    async def modified_at(self, name: ModelName) -> datetime:
        """When the manifest was written, in UTC; no other is looked at. Raises ModelNotFound."""

    async def put_manifest(self, name: ModelName, manifest: Manifest) -> None:
        """Name a model, atomically. Raises BlobNotFound if a blob of it is missing."""

    async def remove_manifest(self, name: ModelName) -> list[Digest]:
        """Remove the name and every blob that no other manifest needs; gives those. Raises
        ModelNotFound.
        """

    async def models(self) -> list[StoredModel]:
        """Every readable manifest, newest first."""

    async def remove_unused(self, candidates: Sequence[Digest]) -> list[Digest]:
        """Remove those of the candidates that no manifest refers to; gives what went. Nothing is
        ever removed for being unnamed alone: in a store shared with Ollama, Ollama does that.
        """

    async def free_bytes(self) -> int:
        """Room left for new blobs."""

"""Snapshots as files: `<index>-<term>.db`, whole and durable once its `.meta` is beside it; one
that is being received has a folder of its own.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from ollamamax_p2p.cluster.settings import ClusterStateSettings
from ollamamax_p2p.consensus.core.messages import SnapshotMetadata
from ollamamax_p2p.content.durable_files import (
    make_folder,
    open_file,
    sync,
    sync_folder,
    translated,
    write_all,
)
from ollamamax_p2p.errors import BlobNotFound, MalformedMessage, StoreDamaged

_READ_BYTES = 1024 * 1024
_META = re.compile(r"(\d{20}-\d{20})\.meta")


class Offer(msgspec.Struct, frozen=True):
    """What is known of a snapshot before its bytes."""

    metadata: SnapshotMetadata
    size: int
    sha256: bytes


_offers = msgspec.msgpack.Decoder(Offer)


class StoredSnapshot:
    """A SnapshotReader: a whole snapshot, open; it can be read even after it has been removed."""

    def __init__(self, path: Path, offer: Offer) -> None:
        self.metadata = offer.metadata
        self.size = offer.size
        self.sha256 = offer.sha256
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, count: int) -> bytes:
        """Up to count bytes from offset; b"" at the end."""
        return os.pread(self._descriptor, count, offset)

    def close(self) -> None:
        """Give the file back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class PartialSnapshot:
    """A SnapshotWriter: one that is being received."""

    def __init__(self, path: Path, size: int) -> None:
        """path: what is here of it, if anything; size: bytes when it is whole."""
        self._path = path
        self._size = size
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.received = os.fstat(self._descriptor).st_size
        if self.received > size:
            os.ftruncate(self._descriptor, 0)
            self.received = 0

    def write(self, data: bytes) -> None:
        """Add the next piece. Raises StoreFull; MalformedMessage if it is more than was offered."""
        if self.received + len(data) > self._size:
            raise MalformedMessage("", f"more than the {self._size:,} bytes of the snapshot")
        with translated(self._path, "write", len(data)):
            write_all(self._descriptor, data, self.received)
        self.received += len(data)

    def close(self) -> None:
        """Stop for now; what is here stays."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            # Best effort: what a power cut takes of it anyway, the hash finds out.
            with contextlib.suppress(OSError):
                sync(descriptor)
            os.close(descriptor)


class StateSnapshots:
    """All snapshots in a folder. Raises LocalTrouble for what the disk refuses."""

    def __init__(self, folder: Path, settings: ClusterStateSettings) -> None:
        self._folder = folder
        self._settings = settings
        self._receiving = folder / "receiving"
        make_folder(self._receiving, 0o700)
        self._take_back()
        self._remove_others(self._names())

    def newest(self) -> SnapshotMetadata | None:
        """The one with the greatest index."""
        offers = (self._offer_of(name) for name in self._names())
        return next((offer.metadata for offer in offers if offer is not None), None)

    def make(self, write: Callable[[Path], SnapshotMetadata]) -> SnapshotMetadata:
        """Keep what `write` makes of an empty file, durable when this returns."""
        new = self._folder / "making.new"
        with translated(new, "write"):
            new.unlink(missing_ok=True)
            with open_file(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600):
                pass
            try:
                metadata = write(new)
                if self._offer_of(_name(metadata)) is None:
                    with open_file(new, os.O_RDWR) as descriptor:
                        sync(descriptor)
                    self._keep(new, Offer(metadata, new.stat().st_size, _sha256(new)))
            finally:
                new.unlink(missing_ok=True)
        return metadata

    def open(self, metadata: SnapshotMetadata) -> StoredSnapshot:
        """Raises BlobNotFound if it is gone."""
        name = _name(metadata)
        offer = self._offer_of(name)
        if offer is None:
            raise BlobNotFound(f"of the snapshot at index {metadata.index}")
        try:
            return StoredSnapshot(self._folder / f"{name}.db", offer)
        except FileNotFoundError:
            raise BlobNotFound(f"of the snapshot at index {metadata.index}") from None

    def receive(self, metadata: SnapshotMetadata, size: int, sha256: bytes) -> PartialSnapshot:
        """Begin, or go on if it is the one begun last. Raises MalformedMessage if too long."""
        if not 0 < size <= self._settings.snapshot_bytes_max:
            raise MalformedMessage("", f"a snapshot of {size:,} bytes")
        offer = Offer(metadata, size, sha256)
        with translated(self._receiving, "write"):
            if self.begun() != offer:
                self.give_up()
                _write_secret(self._receiving / "offer", msgspec.msgpack.encode(offer))
            return PartialSnapshot(self.partial, size)

    def begun(self) -> Offer | None:
        """What is being received."""
        return _read_offer(self._receiving / "offer")

    @property
    def partial(self) -> Path:
        """The file in which it is received."""
        return self._receiving / "partial.db"

    def is_whole(self, offer: Offer) -> bool:
        """Whether this one has been received, to the last bit."""
        if self.begun() != offer:
            return False
        with translated(self.partial, "read"):
            return (
                self.partial.exists()
                and self.partial.stat().st_size == offer.size
                and _sha256(self.partial) == offer.sha256
            )

    def sync_received(self) -> None:
        """What has been received survives a power cut from here on."""
        with translated(self.partial, "keep"):
            with open_file(self.partial, os.O_RDWR) as descriptor:
                sync(descriptor)
            sync_folder(self._receiving)

    def keep_received(self, offer: Offer) -> None:
        """Count what has been received, which is whole and durable, among the others."""
        with translated(self.partial, "keep"):
            self._keep(self.partial, offer)
            self.give_up()

    def _take_back(self) -> None:
        """After a crash in the middle of `_keep`: the bytes are what was received, as before it."""
        begun = self.begun()
        if begun is None or self.partial.exists():
            return
        moved = self._folder / f"{_name(begun.metadata)}.db"
        with translated(self._folder, "keep"):
            if moved.exists() and not moved.with_suffix(".meta").exists():
                moved.replace(self.partial)

    def give_up(self) -> None:
        """Throw away what has been received."""
        with translated(self._receiving, "remove"):
            # The offer first: bytes without one are never taken for those of another.
            (self._receiving / "offer").unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)
            sync_folder(self._receiving)

    def _keep(self, path: Path, offer: Offer) -> None:
        name = _name(offer.metadata)
        path.replace(self._folder / f"{name}.db")
        sync_folder(self._folder)
        _write_secret(self._folder / f"{name}.meta", msgspec.msgpack.encode(offer))
        self._remove_others(self._names())

    def _names(self) -> list[str]:
        """Of the whole ones, the newest first."""
        with translated(self._folder, "read"):
            found = map(_META.fullmatch, os.listdir(self._folder))
            return sorted((match[1] for match in found if match), reverse=True)

    def _remove_others(self, names: list[str]) -> None:
        kept = set(names[: self._settings.snapshots_kept])
        with translated(self._folder, "remove"):
            # .new before .meta before .db: what is counted as whole has its bytes at every moment.
            for path in sorted(self._folder.iterdir(), key=lambda each: each.suffix, reverse=True):
                if path.is_file() and (path.stem not in kept or path.suffix == ".new"):
                    path.unlink(missing_ok=True)

    def _offer_of(self, name: str) -> Offer | None:
        if not (self._folder / f"{name}.db").exists():
            return None
        return _read_offer(self._folder / f"{name}.meta")


def _name(metadata: SnapshotMetadata) -> str:
    return f"{metadata.index:020d}-{metadata.term:020d}"


def _read_offer(path: Path) -> Offer | None:
    try:
        with translated(path, "read"), contextlib.suppress(FileNotFoundError):
            return _offers.decode(path.read_bytes())
        return None
    except ValueError as error:
        raise StoreDamaged(str(path), "not a snapshot's description; remove it") from error


def _write_secret(path: Path, data: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    with open_file(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) as descriptor:
        write_all(descriptor, data, 0)
        sync(descriptor)
    new.replace(path)
    sync_folder(path.parent)


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()

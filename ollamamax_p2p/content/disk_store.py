"""DiskStore: Ollama's model store on disk, byte for byte, and beside it what is ours.

    models/                                  shared with Ollama
      blobs/sha256-<hex>                     whole blobs only, mode 0644
      manifests/<host>/<namespace>/<model>/<tag>
      .omx/                                  only if side is on another file system: unfinished
                                             blobs, so that finishing one is a rename
    side/                                    the node's own data folder
      partials/sha256-<hex>[.record]         unfinished blobs
      chunk-maps/sha256-<hex>                chunk maps, each with the blob file's size and time

Nothing is created in models before something is written there, and nothing at all in a store that
cannot be written: that is served in place. Opening a store that can be written removes unfinished
blobs that were given up (`partial_lifetime_s`), never a whole blob that no manifest names: another
program may be about to name it. docs/adr/0003-chunk-maps.md has the reasons.
"""

import hashlib
import logging
import os
import re
import stat
import struct
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import trio

from ollamamax_p2p.content.blob_store import StoredModel
from ollamamax_p2p.content.core.chunk_map import ChunkMap, decode_chunk_map
from ollamamax_p2p.content.core.digest import (
    Digest,
    digest_of,
    digest_of_hash,
    file_name,
    parse_digest,
)
from ollamamax_p2p.content.core.manifest import MANIFEST_BYTES_MAX, Manifest, parse_manifest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.content.durable_files import (
    PRIVATE_FOLDER_MODE,
    can_rename,
    free_bytes,
    make_folder,
    new_file,
    out_of_descriptors,
    read_exactly,
    remove_leftovers,
    replace_file,
    share_blocks,
    sync,
    sync_folder,
    translated,
    write_all,
)
from ollamamax_p2p.content.map_building import build_chunk_map
from ollamamax_p2p.content.partial_blob import DiskPartial, record_path, remove_given_up
from ollamamax_p2p.content.settings import ContentSettings
from ollamamax_p2p.errors import (
    AccessRefused,
    BadModelFile,
    BadName,
    BlobNotFound,
    DigestMismatch,
    MalformedMessage,
    ModelNotFound,
    OmxError,
    StoreDamaged,
    StoreFull,
    StoreReadOnly,
)

log = logging.getLogger(__name__)

_BLOB_FILE = re.compile(r"sha256-[0-9a-f]{64}")
_DIGEST_IN_TEXT = re.compile(rb"sha256[:-]([0-9a-fA-F]{64})")
_STAMP = struct.Struct(">QQ")
_FILE_NAME_CHARS_MAX = 255
"""Of every file system that we know; Ollama's grammar allows hosts of 350."""
_COPY_BYTES = 4 * 1024 * 1024

Args = TypeVarTuple("Args")
Result = TypeVar("Result")


def _utc_now() -> datetime:
    return datetime.now(UTC)


@asynccontextmanager
async def open_disk_store(
    models: Path,
    side: Path,
    settings: ContentSettings,
    *,
    read_only: bool = False,
    now: Callable[[], datetime] = _utc_now,
) -> AsyncIterator["DiskStore"]:
    """Serve and fill a model store for as long as the block is open.

    models: Ollama's folder; it need not exist yet. side: a folder of this node alone.
    read_only: never write to models, even if it could be.
    now: the time of day, by which an unfinished blob that was given up is told.
    """
    with translated(models, "use"):
        store = DiskStore(models, side, settings, read_only=read_only)
    await store.tidy(now().timestamp())
    try:
        yield store
    finally:
        store.close()


class DiskStore:
    """A store on disk. Made by `open_disk_store`."""

    def __init__(
        self, models: Path, side: Path, settings: ContentSettings, *, read_only: bool = False
    ) -> None:
        self.folder, self.side = models, side = models.expanduser(), side.expanduser()
        self._settings = settings
        self._blobs = models / "blobs"
        self._manifests = models / "manifests"
        self._maps = side / "chunk-maps"
        self._writable = not read_only and all(
            _may_write(folder) for folder in (models, self._blobs, self._manifests)
        )
        self._partial_places = (side / "partials", models / ".omx")
        self._partials: Path | None = None
        self._open: dict[Digest, DiskPartial | None] = {}
        self._building: dict[Digest, trio.Lock] = {}
        self._choosing = trio.Lock()
        self._limiter = trio.CapacityLimiter(settings.disk_threads)
        self._hash_limiter = trio.CapacityLimiter(settings.hash_threads)

    def close(self) -> None:
        """Let go of what is open; what was written stays."""
        for partial in list(self._open.values()):
            if partial is not None:
                partial.abandon()

    @property
    def writable(self) -> bool:
        """See BlobStore."""
        return self._writable

    @property
    def place(self) -> str:
        """See BlobStore."""
        return str(self.folder)

    def _check_writable(self) -> None:
        if not self._writable:
            raise StoreReadOnly(str(self.folder))

    async def _in_thread(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        # The last net: whatever the system says to any method is a trouble of this machine.
        with translated(self.folder, "use"):
            return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)

    async def tidy(self, now: float) -> None:
        """Remove what nobody will come back for: files of a killed process, and unfinished blobs
        that no pull has had for long. now: Unix seconds.
        """
        await self._in_thread(self._tidy, now)

    def _tidy(self, now: float) -> None:
        remove_leftovers(self._maps)
        if not self._writable:
            return
        remove_leftovers(self.folder)
        for folder in self._partial_places:
            remove_leftovers(folder)
            try:
                for digest in _unfinished_in(folder):
                    if remove_given_up(folder, digest, now - self._settings.partial_lifetime_s):
                        log.info("removed the unfinished blob %s, which was given up", digest)
            except OSError as error:
                # Room that is not won back must not stop a node.
                log.warning("cannot remove what was given up in %s: %s", folder, error)

    # -- blobs ---------------------------------------------------------------------------------

    async def has(self, digest: Digest) -> bool:
        """See BlobStore."""
        return await self._in_thread(self.blob_path(digest).is_file)

    async def size_of(self, digest: Digest) -> int:
        """See BlobStore."""
        return (await self._in_thread(self._stat_blob, digest)).st_size

    async def open(self, digest: Digest) -> "DiskReader":
        """See BlobStore."""
        path = self.blob_path(digest)
        descriptor = await self._in_thread(_open_blob, path, digest)
        return DiskReader(path, descriptor, self._limiter)

    def blob_path(self, digest: Digest) -> Path:
        """Where the blob is, or would be; for engines that read files, and for people."""
        return self._blobs / file_name(digest)

    def _stat_blob(self, digest: Digest) -> os.stat_result:
        try:
            about = self.blob_path(digest).stat()
        except FileNotFoundError:
            raise BlobNotFound(digest) from None
        if not stat.S_ISREG(about.st_mode):
            raise BlobNotFound(digest)
        return about

    async def put(self, data: bytes) -> Digest:
        """See BlobStore."""
        self._check_writable()
        digest = digest_of(data)
        folder = await self._partial_folder()
        await self._in_thread(self._put, digest, data, folder)
        return digest

    def _put(self, digest: Digest, data: bytes, folder: Path) -> None:
        path = self.blob_path(digest)
        if path.is_file():
            return
        with translated(self.folder, "write", len(data)), new_file(folder) as (new, descriptor):
            write_all(descriptor, data, 0)
            sync(descriptor)
            new.rename(path)
            sync_folder(self._blobs)

    async def receive(
        self, digest: Digest, parts: AsyncIterable[bytes], *, size: int | None = None
    ) -> None:
        """See BlobStore."""
        self._check_writable()
        folder = await self._partial_folder()
        if size is not None:
            await self._in_thread(self._check_fits, size)
        opened = ExitStack()
        try:
            arriving = await self._in_thread(opened.enter_context, _arriving(self.folder, folder))
            gathered = bytearray()
            async for part in parts:
                gathered += part
                # Small parts are written together: a thread for each would cost more than it does.
                if len(gathered) >= _COPY_BYTES:
                    await self._in_thread(self._take, arriving, bytes(gathered))
                    gathered.clear()
            await self._in_thread(self._take, arriving, bytes(gathered))
            await self._in_thread(self._finish_receiving, digest, arriving)
        finally:
            with trio.CancelScope(shield=True):  # bounded: removes one file
                await self._in_thread(opened.close)

    def _check_fits(self, size: int) -> None:
        room = self._room()
        if size > room:
            raise StoreFull(str(self.folder), size, room)

    def _take(self, arriving: "_Arriving", data: bytes) -> None:
        # Every time: nobody need say how much is to come, and others write here too.
        self._check_fits(len(data))
        arriving.hashing.update(data)
        with translated(self.folder, "write", len(data)):
            write_all(arriving.descriptor, data, arriving.size)
        arriving.size += len(data)

    def _finish_receiving(self, digest: Digest, arriving: "_Arriving") -> None:
        actual = digest_of_hash(arriving.hashing.digest())
        if actual != digest:
            raise DigestMismatch(digest, actual)
        with translated(self.folder, "write"):
            sync(arriving.descriptor)
            arriving.path.rename(self.blob_path(digest))
            sync_folder(self._blobs)

    async def import_file(self, path: Path, *, link: bool = False) -> Digest:
        """See BlobStore.

        The copy shares the original's blocks where the file system can do that (a reflink: Btrfs,
        XFS, bcachefs), and takes no room then. A hard link would be cheaper still, but editing the
        original would change the blob behind its digest; so it is made on demand only.
        """
        self._check_writable()
        folder = await self._partial_folder()
        return await trio.to_thread.run_sync(
            self._import_file, path, folder, link, limiter=self._hash_limiter
        )

    def _import_file(self, path: Path, folder: Path, link: bool) -> Digest:
        path = path.expanduser()
        with translated(path, "read"), _opened_to_import(path) as source:
            before = os.fstat(source)
            if not stat.S_ISREG(before.st_mode):
                raise BadModelFile(str(path), "it is not a file")
            return self._imported(source, before, path, folder, link)

    def _imported(
        self, source: int, before: os.stat_result, path: Path, folder: Path, link: bool
    ) -> Digest:
        size = before.st_size
        if self._size_is_known(size):
            digest = _copy(source, None, size, path)
            if self.blob_path(digest).is_file():
                return digest
        with translated(self.folder, "write", size), new_file(folder) as (new, target):
            if link and _try_link(path, new):
                digest = _copy(source, None, size, path)
            else:
                digest = self._copied(source, target, size, path)
            _check_unchanged(path, before, os.fstat(source))
            new.rename(self.blob_path(digest))
            sync_folder(self._blobs)
            return digest

    def _copied(self, source: int, target: int, size: int, path: Path) -> Digest:
        if share_blocks(source, target):
            # The clone no longer follows the original, so it is the clone that is hashed.
            sync(target)
            return _copy(target, None, size, path)
        self._check_fits(size)
        digest = _copy(source, target, size, path)
        sync(target)
        return digest

    def _size_is_known(self, size: int) -> bool:
        """Whether some blob has this size; hashing first spares a copy then."""
        with suppress(FileNotFoundError), os.scandir(self._blobs) as entries:
            return any(entry.stat().st_size == size for entry in entries)
        return False

    async def blobs(self) -> list[Digest]:
        """See BlobStore."""
        return await self._in_thread(_digests_in, self._blobs)

    # -- unfinished blobs ----------------------------------------------------------------------

    async def _partial_folder(self) -> Path:
        async with self._choosing:
            if self._partials is None:
                self._partials = await self._in_thread(self._choose_partial_folder)
        return self._partials

    def _choose_partial_folder(self) -> Path:
        ours, hidden = self._partial_places
        with translated(self.folder, "write"):
            make_folder(self._blobs)
        with translated(self.side, "write"):
            make_folder(ours, PRIVATE_FOLDER_MODE)
        with translated(self.folder, "write"):
            if not can_rename(ours, self.folder):
                make_folder(hidden)
                ours = hidden
        return ours

    async def partial(self, digest: Digest, size: int) -> DiskPartial:
        """See BlobStore."""
        self._check_writable()
        folder = await self._partial_folder()
        if digest in self._open:
            raise ValueError(f"{digest} is being written already")
        self._open[digest] = None
        partial = DiskPartial(
            digest,
            size,
            folder,
            record_interval_bytes=self._settings.record_interval_bytes,
            limiter=self._limiter,
            hash_limiter=self._hash_limiter,
            on_close=self._closed,
            on_commit=self._commit,
        )
        try:
            await self._in_thread(self._open_partial, partial)
        except BaseException:
            del self._open[digest]
            raise
        self._open[digest] = partial
        return partial

    def _closed(self, partial: DiskPartial) -> None:
        del self._open[partial.digest]

    def _open_partial(self, partial: DiskPartial) -> None:
        with translated(self.folder, "write", partial.size):
            partial.open()
            room = self._room()
            if partial.missing_bytes > room:
                partial.close()
                raise StoreFull(str(self.folder), partial.missing_bytes, room)

    def _commit(self, partial: DiskPartial, built: ChunkMap) -> None:
        """Give a hashed blob its name. A blob that has it already has the same bytes, so replacing
        it does no harm, and readers keep the one they opened.
        """
        path = self.blob_path(partial.digest)
        with translated(self.folder, "write"):
            partial.path.rename(path)
            sync_folder(self._blobs)
            record_path(partial.path.parent, partial.digest).unlink(missing_ok=True)
        self._keep_map(built, _stamp(path.stat()))

    async def partials(self) -> list[Digest]:
        """See BlobStore."""
        folders = [self._partials] if self._partials else self._partial_places
        found = [await self._in_thread(_digests_in, folder) for folder in folders]
        return sorted(set().union(*found))

    async def missing_bytes(self, digest: Digest) -> int | None:
        """See BlobStore."""
        return await self._in_thread(self._missing_bytes, digest)

    def _missing_bytes(self, digest: Digest) -> int | None:
        if self._open.get(digest) is not None:
            return 0
        for folder in self._partial_places:
            with suppress(FileNotFoundError):
                about = (folder / file_name(digest)).stat()
                # The file is sparse; st_blocks counts in units of 512 bytes on every system.
                return max(0, about.st_size - about.st_blocks * 512)
        return None

    async def free_bytes(self) -> int:
        """See BlobStore."""
        return await self._in_thread(self._room)

    def _room(self) -> int:
        open_now = list(self._open.values())  # a copy, because this runs in a thread
        promised = sum(partial.missing_bytes for partial in open_now if partial)
        return max(0, free_bytes(self.folder) - self._settings.reserve_bytes - promised)

    # -- chunk maps ----------------------------------------------------------------------------

    async def chunk_map(self, digest: Digest) -> ChunkMap:
        """See BlobStore. Raises StoreDamaged if the blob is not what its name says: it must not be
        served.
        """
        async with self._building.setdefault(digest, trio.Lock()):
            try:
                return await self._chunk_map(digest)
            finally:
                if not self._building[digest].statistics().tasks_waiting:
                    del self._building[digest]

    async def _chunk_map(self, digest: Digest) -> ChunkMap:
        about = await self._in_thread(self._stat_blob, digest)
        stamp = _stamp(about)
        kept = await self._in_thread(self._kept_map, digest, stamp)
        if kept is not None:
            return kept
        path = self.blob_path(digest)
        async with await self.open(digest) as reader:
            try:
                built = await build_chunk_map(
                    digest, about.st_size, reader.read_now, self._hash_limiter
                )
            except DigestMismatch as error:
                # Not `omx rm`: that leaves a blob which another model needs too.
                problem = f"its bytes are {error.actual}; delete this file and pull the model again"
                raise StoreDamaged(str(path), problem) from error
        await self._in_thread(self._keep_map, built, stamp)
        return built

    def _kept_map(self, digest: Digest, stamp: bytes) -> ChunkMap | None:
        try:
            data = (self._maps / file_name(digest)).read_bytes()
            kept = decode_chunk_map(data[_STAMP.size :])
        except (OSError, MalformedMessage):
            return None
        return kept if data.startswith(stamp) and kept.blob == digest else None

    def _keep_map(self, built: ChunkMap, stamp: bytes) -> None:
        path = self._maps / file_name(built.blob)
        try:
            make_folder(self._maps, PRIVATE_FOLDER_MODE)
            replace_file(path, stamp + built.encode(), self._maps)
        except OSError as error:
            # The map can be built again; a full or read-only side folder must not stop serving.
            log.warning("cannot keep the chunk map %s: %s", path, error)

    # -- manifests -----------------------------------------------------------------------------

    async def manifest(self, name: ModelName) -> Manifest:
        """See BlobStore."""
        return await self._in_thread(self._read_manifest, name)

    def _read_manifest(self, name: ModelName) -> Manifest:
        path = self._manifest_path(name)
        try:
            return parse_manifest(_read_bounded(path))
        except FileNotFoundError:
            raise ModelNotFound(str(name)) from None
        except PermissionError as error:
            raise AccessRefused(str(path), "read") from error
        except MalformedMessage as error:
            problem = f"{error.problem}; remove the model and pull it again"
            raise StoreDamaged(str(path), problem) from error

    def _manifest_path(self, name: ModelName) -> Path:
        """Where the manifest is, in whatever case it was written; or where it would be."""
        if len(name.host) > _FILE_NAME_CHARS_MAX:
            raise BadName(name.full(), "its host is too long for a folder's name")
        if (exact := self._manifests.joinpath(*name.parts)).is_file():
            return exact
        for found, path in self._named_manifests():
            if found.matches(name):
                return path
        return exact

    def _named_manifests(self) -> Iterator[tuple[ModelName, Path]]:
        for path in sorted(self._manifests.glob("*/*/*/*")):
            try:
                name = ModelName(*path.relative_to(self._manifests).parts)
            except BadName:
                log.info("not a manifest: %s", path)
                continue
            yield name, path

    async def modified_at(self, name: ModelName) -> datetime:
        """See BlobStore."""
        return await self._in_thread(self._modified_at, name)

    def _modified_at(self, name: ModelName) -> datetime:
        try:
            written = self._manifest_path(name).stat().st_mtime
        except FileNotFoundError:
            raise ModelNotFound(str(name)) from None
        return _date(written)

    async def put_manifest(self, name: ModelName, manifest: Manifest) -> None:
        """See BlobStore."""
        self._check_writable()
        folder = await self._partial_folder()
        await self._in_thread(self._put_manifest, name, manifest, folder)

    def _put_manifest(self, name: ModelName, manifest: Manifest, folder: Path) -> None:
        for digest, _ in manifest.blobs():
            self._stat_blob(digest)
        path = self._manifest_path(name)
        with translated(self.folder, "write", len(manifest.raw)):
            make_folder(path.parent)
            replace_file(path, manifest.raw, folder)

    async def remove_manifest(self, name: ModelName) -> list[Digest]:
        """See BlobStore."""
        self._check_writable()
        return await self._in_thread(self._remove_manifest, name)

    def _remove_manifest(self, name: ModelName) -> list[Digest]:
        path = self._manifest_path(name)
        with translated(self.folder, "remove"):
            try:
                needed = _digests_said_in(_read_bounded(path))
                path.unlink()
            except FileNotFoundError:
                raise ModelNotFound(str(name)) from None
            # Before any blob goes: a power cut must not bring back a name without its blobs.
            sync_folder(path.parent)
            self._remove_empty_folders(path.parent)
            return self._remove_unused(sorted(needed))

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder != self._manifests:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent
        sync_folder(folder)

    async def remove_unused(self, candidates: Sequence[Digest]) -> list[Digest]:
        """See BlobStore."""
        self._check_writable()
        return await self._in_thread(self._remove_unused, list(candidates))

    def _remove_unused(self, candidates: Sequence[Digest]) -> list[Digest]:
        needed = self._needed()
        removed = []
        with translated(self.folder, "remove"):
            for digest in dict.fromkeys(candidates):
                if digest in needed:
                    continue
                try:
                    self.blob_path(digest).unlink()
                except FileNotFoundError:
                    continue
                (self._maps / file_name(digest)).unlink(missing_ok=True)
                removed.append(digest)
        return removed

    def _needed(self) -> set[Digest]:
        """Every digest that any file under a folder of manifests mentions: also those that we
        cannot parse, and those of a newer Ollama that keeps them elsewhere. A blob too many kept is
        a nuisance, one too few is a loss.
        """
        needed: set[Digest] = set()
        for folder in self.folder.glob("manifests*"):
            with translated(folder, "read"):
                for path in _files_below(folder) if folder.is_dir() else ():
                    with suppress(FileNotFoundError):
                        needed |= _digests_said_in(_read_bounded(path))
        return needed

    async def models(self) -> list[StoredModel]:
        """See BlobStore."""
        return await self._in_thread(self._list_models)

    def _list_models(self) -> list[StoredModel]:
        found = []
        for name, path in self._named_manifests():
            try:
                manifest = parse_manifest(_read_bounded(path))
                written = _date(path.stat().st_mtime)
            except (OSError, OmxError) as error:
                if isinstance(error, OSError) and out_of_descriptors(error):
                    raise
                log.warning("skipping the manifest %s: %s", path, error)
                continue
            found.append(StoredModel(name, manifest.digest, manifest.size, written))
        return sorted(found, key=lambda model: model.modified_at, reverse=True)


class _Arriving:
    """A blob that is being received."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.hashing = hashlib.sha256()
        self.size = 0


@contextmanager
def _arriving(store: Path, folder: Path) -> Iterator[_Arriving]:
    """A new file to receive into, gone at the end of the block unless it was moved away."""
    with translated(store, "write"), new_file(folder) as (path, descriptor):
        yield _Arriving(path, descriptor)


class DiskReader:
    """An open blob; it stays readable if the blob is removed meanwhile."""

    def __init__(self, path: Path, descriptor: int, limiter: trio.CapacityLimiter) -> None:
        self._path, self._descriptor, self._limiter = path, descriptor, limiter
        self._busy = 0
        self._closed = False
        self.size = os.fstat(descriptor).st_size

    async def read_at(self, offset: int, length: int) -> bytes:
        """See BlobReader."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"[{offset}, {offset + length}) is outside [0, {self.size})")
        if self._closed:
            raise ValueError("the reader is closed")
        self._busy += 1
        try:
            return await trio.to_thread.run_sync(
                self.read_now, offset, length, limiter=self._limiter
            )
        finally:
            self._busy -= 1
            self._close_if_idle()

    def read_now(self, offset: int, length: int) -> bytes:
        """The same, blocking; for threads."""
        with translated(self._path, "read"):
            return read_exactly(self._descriptor, length, offset, self._path)

    async def __aenter__(self) -> "DiskReader":
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closed = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        # A descriptor that is closed under a reading thread could name another file by then.
        if self._closed and self._busy == 0 and self._descriptor != -1:
            os.close(self._descriptor)
            self._descriptor = -1


def _may_write(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK)


def _open_blob(path: Path, digest: Digest) -> int:
    with translated(path, "read"):
        if not path.is_file():
            raise BlobNotFound(digest)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise BlobNotFound(digest) from None


@contextmanager
def _opened_to_import(path: Path) -> Iterator[int]:
    try:
        # NONBLOCK: a FIFO is refused a moment later, not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise BadModelFile(str(path), "there is no such file") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _digests_in(folder: Path) -> list[Digest]:
    return sorted(parse_digest(name) for name in _names_in(folder) if _BLOB_FILE.fullmatch(name))


def _unfinished_in(folder: Path) -> list[Digest]:
    """Those too of which only the record is left."""
    names = {name.removesuffix(".record") for name in _names_in(folder)}
    return sorted(parse_digest(name) for name in names if _BLOB_FILE.fullmatch(name))


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and those in it. Raises OSError for what cannot be listed, where
    `rglob` passes over it in silence.
    """
    for path in map(folder.joinpath, _names_in(folder)):
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _files_below(path)


def _digests_said_in(text: bytes) -> set[Digest]:
    return {digest_of_hash(bytes.fromhex(raw.decode())) for raw in _DIGEST_IN_TEXT.findall(text)}


def _date(unix_s: float) -> datetime:
    try:
        return datetime.fromtimestamp(unix_s, UTC)
    except (ValueError, OverflowError):  # a file may have a time that no calendar has
        return datetime.fromtimestamp(0, UTC)


def _stamp(about: os.stat_result) -> bytes:
    return _STAMP.pack(about.st_size, about.st_mtime_ns)


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MANIFEST_BYTES_MAX + 1)


def _check_unchanged(path: Path, before: os.stat_result, after: os.stat_result) -> None:
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadModelFile(str(path), "it changed while it was imported; try again")


def _copy(source: int, target: int | None, size: int, path: Path) -> Digest:
    """Hash a file, and copy it where there is a target."""
    hashing = hashlib.sha256()
    for offset in range(0, size, _COPY_BYTES):
        try:
            data = read_exactly(source, min(_COPY_BYTES, size - offset), offset, path)
        except StoreDamaged as error:
            raise BadModelFile(str(path), "it became shorter while it was imported") from error
        hashing.update(data)
        if target is not None:
            write_all(target, data, offset)
    return digest_of_hash(hashing.digest())


def _try_link(path: Path, new: Path) -> bool:
    """Put a hard link of path in the place of new; False where there can be none."""
    linked = new.with_name(f"{new.name}-link")
    try:
        linked.hardlink_to(path)
    except OSError:
        return False
    linked.replace(new)
    return True

"""Answer fetchers: whole blobs from the store, and those being fetched now.

One task reads what a fetcher says, one does the next step that `core.peer_session` names. A fetcher
that does not read stops its own second task, and costs the part that is being sent.
"""

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import trio

from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.errors import (
    BlobNotFound,
    LocalTrouble,
    OmxError,
    PeerGone,
    PeerMisbehaved,
)
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.transfer.carrier import FetcherConversation
from ollamamax_p2p.transfer.core.messages import (
    MAP_PAGE_CHUNKS,
    ChunkPart,
    FromSource,
    MapPage,
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
from ollamamax_p2p.transfer.core.upload_slots import UploadSlots
from ollamamax_p2p.transfer.open_readers import OpenReaders
from ollamamax_p2p.transfer.settings import TransferSettings
from ollamamax_p2p.transfer.shared_work import SharedWork
from ollamamax_p2p.transfer.unfinished import UnfinishedBlob, UnfinishedBlobs, Watcher

STREAMS_PER_PEER_MAX = 32
"""Our fetcher opens one per blob that it fetches, some at a time; more is misbehaviour."""

SEND_TIMEOUT_S = 60.0
"""A fetcher that does not take one message in this time is gone; a part of 64 KiB then moves at
1 KB/s.
"""

MAPS_KEPT = 32
"""Chunk maps in memory, the last used: 36 bytes a chunk, some tens of KB for a usual blob."""

TURN_INTERVAL_S = 1.0

_log = logging.getLogger(__name__)


class BlobServer:
    """Serves this node's blobs within the upload limits."""

    def __init__(
        self,
        store: BlobStore,
        unfinished: UnfinishedBlobs,
        settings: TransferSettings,
        nursery: trio.Nursery,
    ) -> None:
        """nursery: the owner's; the slots' turns run in it."""
        self._store = store
        self._unfinished = unfinished
        self._slots: UploadSlots[PeerId] = UploadSlots(
            slots=settings.upload_slots, rotation_s=settings.upload_rotation_s
        )
        self._uploads: dict[PeerId, list[_Upload]] = {}
        self._maps: OrderedDict[Digest, ChunkMap] = OrderedDict()
        self._readers = OpenReaders(store)
        self._look_ups: SharedWork[Digest, ChunkMap] = SharedWork(nursery)
        self.bytes_sent = 0
        """Of chunks, since the node was started."""
        unfinished.watch(Watcher(self._began, self._gained, self._gave_up))
        nursery.start_soon(self._take_turns)

    async def serve(self, conversation: FetcherConversation) -> None:
        """Answer one stream until it ends. Raises PeerGone, PeerMisbehaved."""
        peer = conversation.peer
        uploads = self._uploads.setdefault(peer, [])
        if len(uploads) >= STREAMS_PER_PEER_MAX:
            raise PeerMisbehaved(peer, f"it opened more than {STREAMS_PER_PEER_MAX} streams")
        upload = _Upload(self, conversation)
        upload.session.serve(self._slots.is_served(peer))
        uploads.append(upload)
        try:
            await upload.run()
        finally:
            uploads.remove(upload)
            if not uploads:
                del self._uploads[peer]
            self.interest_changed(peer)
            if not self._uploads:
                await self._readers.aclose()

    def interest_changed(self, peer: PeerId) -> None:
        """It has opened or closed blobs, or what is held of them has changed."""
        if any(upload.session.interested for upload in self._uploads.get(peer, ())):
            self._slots.wants(peer)
        else:
            self._slots.leaves(peer)
            self._serve(peer, False)
        self._turn()

    async def look_up(self, digest: Digest) -> Holding | None:
        """What is held of a blob."""
        unfinished = self._unfinished.get(digest)
        if unfinished is not None:
            return Holding(unfinished.chunk_map, set(unfinished.chunks))
        try:
            if not await self._store.has(digest):
                return None
            return Holding(await self._map_of(digest), None)
        except BlobNotFound:
            return None
        except (LocalTrouble, OSError) as error:
            _log.error("cannot serve %s: %s", digest, error)
            return None

    async def _map_of(self, digest: Digest) -> ChunkMap:
        if digest not in self._maps:

            async def load() -> ChunkMap:
                return await self._store.chunk_map(digest)

            self._maps[digest] = await self._look_ups.run(digest, load)
            while len(self._maps) > MAPS_KEPT:
                self._maps.popitem(last=False)
        self._maps.move_to_end(digest)
        return self._maps[digest]

    def unfinished_blob(self, digest: Digest) -> UnfinishedBlob | None:
        """The blob, if it is being fetched now."""
        return self._unfinished.get(digest)

    async def read(self, digest: Digest, at: int, length: int) -> bytes:
        """From a whole blob in the store. Raises BlobNotFound, LocalTrouble."""
        return await self._readers.read_at(digest, at, length)

    # -- slots ---------------------------------------------------------------------------------

    async def _take_turns(self) -> None:
        while True:
            await trio.sleep(TURN_INTERVAL_S)
            self._turn()
            await self._readers.close_idle(trio.current_time())

    def _turn(self) -> None:
        choked, unchoked = self._slots.turn(now=trio.current_time())
        for peer in choked:
            self._serve(peer, False)
        for peer in unchoked:
            self._serve(peer, True)

    def _serve(self, peer: PeerId, served: bool) -> None:
        for upload in self._uploads.get(peer, ()):
            upload.session.serve(served)
            upload.wake()

    # -- blobs that are being fetched ----------------------------------------------------------

    def _began(self, blob: UnfinishedBlob) -> None:
        for peer, upload in self._all_uploads():
            upload.session.available(blob.chunk_map.blob, blob.chunk_map, blob.chunks)
            upload.wake()
            self.interest_changed(peer)

    def _gained(self, digest: Digest, chunk: int) -> None:
        for _, upload in self._all_uploads():
            upload.session.gained(digest, chunk)
            upload.wake()

    def _gave_up(self, digest: Digest) -> None:
        for peer, upload in self._all_uploads():
            upload.session.lost(digest)
            upload.wake()
            self.interest_changed(peer)

    def _all_uploads(self) -> list[tuple[PeerId, "_Upload"]]:
        return [(peer, upload) for peer, each in self._uploads.items() for upload in each]


class _Upload:
    """One fetcher's stream."""

    def __init__(self, server: BlobServer, conversation: FetcherConversation) -> None:
        self.session = PeerSession()
        self._server = server
        self._conversation = conversation
        self._peer = conversation.peer
        self._woken = trio.Event()
        self._problem: OmxError | None = None

    def wake(self) -> None:
        """The session may have something to do."""
        self._woken.set()

    async def run(self) -> None:
        """Until the stream ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_with, nursery, self._listen)
            nursery.start_soon(self._end_with, nursery, self._work)
        if self._problem is not None:
            raise self._problem

    async def _end_with(self, nursery: trio.Nursery, task: Callable[[], Awaitable[None]]) -> None:
        """Whichever task ends first ends the other; what it raised is raised once."""
        try:
            await task()
        except OmxError as error:
            self._problem = self._problem or error
        nursery.cancel_scope.cancel()

    async def _listen(self) -> None:
        while (message := await self._conversation.receive()) is not None:
            try:
                self.session.received(message)
            except PeerMisbehaved as error:
                raise type(error)(self._peer, error.problem) from None
            self._server.interest_changed(self._peer)
            self.wake()

    async def _work(self) -> None:
        while True:
            step = self.session.next_step()
            if step is None:
                self._woken = trio.Event()
                await self._woken.wait()
            else:
                await self._do(step)

    async def _do(self, step: Step) -> None:
        match step:
            case Send():
                await self._send(step.message)
            case LookUp():
                self.session.found(step.blob, await self._server.look_up(step.digest))
                self._catch_up(step.digest)
                self._server.interest_changed(self._peer)
            case SendMap():
                await self._send(_page(step))
            case SendPart():
                await self._send_part(step)

    def _catch_up(self, digest: Digest) -> None:
        """The blob may have been begun, and have grown, while it was looked up."""
        blob = self._server.unfinished_blob(digest)
        if blob is not None:
            self.session.available(digest, blob.chunk_map, blob.chunks)

    async def _send_part(self, step: SendPart) -> None:
        try:
            data = await self._read(step)
        except (BlobNotFound, LocalTrouble, OSError) as error:
            _log.warning("cannot serve %s any more: %s", step.chunk_map.blob, error)
            self.session.lost(step.chunk_map.blob)
            self._server.interest_changed(self._peer)
            return
        began = trio.current_time()
        await self._send(ChunkPart(blob=step.blob, chunk=step.chunk, offset=step.offset, data=data))
        self.session.part_sent(seconds=trio.current_time() - began)
        self._server.bytes_sent += len(data)

    async def _read(self, step: SendPart) -> bytes:
        digest = step.chunk_map.blob
        at = step.chunk_map.offsets[step.chunk] + step.offset
        unfinished = self._server.unfinished_blob(digest)
        if unfinished is not None:
            try:
                return await unfinished.partial.read_at(at, step.length)
            except ValueError:
                pass  # committed this moment: it is in the store now
        return await self._server.read(digest, at, step.length)

    async def _send(self, message: FromSource) -> None:
        with trio.move_on_after(SEND_TIMEOUT_S) as waiting:
            await self._conversation.send(message)
        if waiting.cancelled_caught:
            raise PeerGone(self._peer, f"it has not read for {SEND_TIMEOUT_S:g} s")


def _page(step: SendMap) -> MapPage:
    end = step.first + MAP_PAGE_CHUNKS
    return MapPage(
        blob=step.blob,
        first=step.first,
        lengths=list(step.chunk_map.lengths[step.first : end]),
        hashes=list(step.chunk_map.hashes[step.first : end]),
    )

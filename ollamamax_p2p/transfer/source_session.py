"""The fetcher's end of one conversation about one blob: sends what is decided, checks what comes.

Holds no policy: what arrives is told to the download's owner (`Fetcher`), in order.
"""

from collections import deque
from typing import Protocol

import trio

from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest, digest_of_hash, raw_hash
from ollamamax_p2p.errors import OmxError, PeerGone, PeerMisbehaved, WrongMap
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.transfer.carrier import SourceConversation
from ollamamax_p2p.transfer.core.messages import (
    ANSWERS_MAX,
    MAP_PAGE_CHUNKS,
    Cancel,
    Choke,
    ChunkPart,
    FromFetcher,
    FromSource,
    GetMap,
    Have,
    HaveMore,
    MapPage,
    NotHeld,
    Open,
    Unchoke,
    Want,
    chunk_count_fits,
)
from ollamamax_p2p.transfer.core.peer_session import decode_bits

BLOB_NUMBER = 0
"""One blob per stream, for now: a stream costs 5 ms to open, and its end ends what it carried."""


class Fetcher(Protocol):
    """Who owns the download."""

    def has_offered(self, session: "SourceSession") -> None:
        """The source holds the blob, all or part: `map_digest`, `chunks`, `complete` are set."""

    def has_another_size(self, session: "SourceSession", size: int) -> None:
        """It holds a blob of that name, but of this size: somebody is wrong, and it may be whoever
        told us the size.
        """

    def has_gained(self, session: "SourceSession", chunks: list[int]) -> None:
        """It has got these since."""

    def has_lost(self, session: "SourceSession") -> None:
        """It holds nothing of the blob."""

    def has_turned(self, session: "SourceSession") -> None:
        """`choked` has changed."""

    async def has_sent(self, session: "SourceSession", part: ChunkPart) -> None:
        """A part of a chunk. Nothing more is read of the source until this returns."""


class SourceSession:
    """One source."""

    def __init__(
        self, conversation: SourceConversation, digest: Digest, size: int, fetcher: Fetcher
    ) -> None:
        self.peer: PeerId = conversation.peer
        self.answered = False
        """It has said whether it holds the blob."""
        self.map_digest: Digest | None = None
        """The map under which it serves; None while it holds nothing."""
        self.complete = False
        self.chunk_count = 0
        self.chunks: set[int] = set()
        self.choked = True
        self.round_trip_s = 0.0
        """From our asking what it has to its first answer; longer if it had to look it up."""
        self.buffers: dict[int, list[bytes]] = {}
        """Parts of chunks that are not whole yet."""
        self._conversation = conversation
        self._digest = digest
        self._size = size
        self._fetcher = fetcher
        self.ended = False
        """By us."""
        self._answers = 0
        self._owed_bytes = 0  # asked for and not sent, taken back or not
        self._outbox: deque[FromFetcher] = deque()
        self._posted = trio.Event()
        self._page: MapPage | None = None
        self._page_arrived = trio.Event()
        self._page_expected = False
        self._problem: OmxError | None = None
        self._scope = trio.CancelScope()

    def end(self) -> None:
        """Have `run` return; nothing more is wanted of the source."""
        self.map_digest = None
        self.ended = True
        self._scope.cancel()

    @property
    def owes(self) -> bool:
        """Whether bytes that it was asked for, and perhaps not any more, may still come."""
        return self._owed_bytes > 0

    def ask(self, chunk: int, length: int) -> None:
        """Ask for a chunk."""
        self.buffers.pop(chunk, None)
        self._owed_bytes += length
        self._post(Want(blob=BLOB_NUMBER, chunk=chunk))

    def cancel(self, chunk: int) -> None:
        """Take the request back; what is under way may still come."""
        self.buffers.pop(chunk, None)
        self._post(Cancel(blob=BLOB_NUMBER, chunk=chunk))

    def _post(self, message: FromFetcher) -> None:
        """Send it as soon as the source reads. What can pile up is what `core.download` bounds."""
        self._outbox.append(message)
        self._posted.set()

    async def run(self) -> None:
        """Until the conversation ends. Raises PeerGone; PeerMisbehaved that names the source."""
        self._opened_at = trio.current_time()
        self._post(Open(blob=BLOB_NUMBER, digest=raw_hash(self._digest)))
        with self._scope:
            await self._talk()
        if self._problem is not None:
            raise self._problem

    async def _talk(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, nursery)
            try:
                await self._listen()
            except PeerMisbehaved as error:
                self._problem = type(error)(self.peer, error.problem)
            except OmxError as error:
                self._problem = self._problem or error
            nursery.cancel_scope.cancel()

    async def _send(self, nursery: trio.Nursery) -> None:
        try:
            while True:
                while self._outbox:
                    await self._conversation.send(self._outbox.popleft())
                self._posted = trio.Event()
                await self._posted.wait()
        except OmxError as error:
            self._problem = error
            nursery.cancel_scope.cancel()

    async def _listen(self) -> None:
        while (message := await self._conversation.receive()) is not None:
            if isinstance(message, ChunkPart):
                self._check_number(message.blob)
                self._owed_bytes -= len(message.data)
                if self._owed_bytes < 0:
                    raise PeerMisbehaved("", "it sent more than it was ever asked for")
                await self._fetcher.has_sent(self, message)
            else:
                self._take(message)

    def _take(self, message: FromSource) -> None:
        match message:
            case Have():
                self._check_number(message.blob)
                self._count_answer()
                self._offered(message)
            case HaveMore():
                self._check_number(message.blob)
                self._gained(message.chunks)
            case NotHeld():
                self._check_number(message.blob)
                self._count_answer()
                self._has_answered()
                self.map_digest = None
                self.buffers.clear()
                self._fetcher.has_lost(self)
            case MapPage():
                self._check_number(message.blob)
                if not self._page_expected:
                    raise PeerMisbehaved("", "it sent a page of a map that was not asked for")
                self._page, self._page_expected = message, False
                self._page_arrived.set()
            case Choke() | Unchoke():
                self.choked = isinstance(message, Choke)
                self.buffers.clear()
                self._fetcher.has_turned(self)

    def _check_number(self, blob: int) -> None:
        if blob != BLOB_NUMBER:
            raise PeerMisbehaved("", f"it speaks of blob {blob}, which was not opened")

    def _count_answer(self) -> None:
        """No lie, so no ban: it may really be unable to keep what it fetches."""
        self._answers += 1
        if self._answers > ANSWERS_MAX:
            raise PeerGone(self.peer, f"it changed its mind {ANSWERS_MAX} times")

    def _offered(self, message: Have) -> None:
        if not chunk_count_fits(message.chunk_count, message.size):
            raise PeerMisbehaved("", f"it cuts {message.size} bytes into {message.chunk_count}")
        if message.complete and message.chunks:
            raise PeerMisbehaved("", "it told which chunks it has, of a blob that it has whole")
        if message.size != self._size:
            self._has_answered()
            self._fetcher.has_another_size(self, message.size)
            return
        if self.map_digest is not None:
            raise PeerMisbehaved("", "it told twice what it has")
        self._has_answered()
        self.map_digest = digest_of_hash(message.map_digest)
        self.complete = message.complete
        self.chunk_count = message.chunk_count
        self.chunks = set()
        if not message.complete:
            self.chunks = set(decode_bits(message.chunks, message.chunk_count))
        self._fetcher.has_offered(self)

    def _has_answered(self) -> None:
        if not self.answered:
            self.answered = True
            self.round_trip_s = trio.current_time() - self._opened_at

    def _gained(self, chunks: list[int]) -> None:
        if self.map_digest is None or self.complete:
            raise PeerMisbehaved("", "it has got more of what it did not have in part")
        if any(chunk >= self.chunk_count for chunk in chunks):
            raise PeerMisbehaved("", f"it has got a chunk beyond the {self.chunk_count} there are")
        self.chunks.update(chunks)
        self._fetcher.has_gained(self, chunks)

    async def fetch_map(self) -> ChunkMap:
        """The map under which the source serves, checked against the digest that it told.

        Raises WrongMap, PeerGone if the source has stopped offering it.
        """
        wanted, count = self.map_digest, self.chunk_count
        lengths: list[int] = []
        hashes: list[bytes] = []
        while len(lengths) < count:
            page = await self._next_page(len(lengths))
            expected = min(MAP_PAGE_CHUNKS, count - len(lengths))
            if not len(page.lengths) == len(page.hashes) == expected:
                raise WrongMap(self.peer, "it sent a page of a map with too few or too many lines")
            lengths += page.lengths
            hashes += page.hashes
        chunk_map = ChunkMap(self._digest, tuple(lengths), tuple(hashes))
        # In a thread: a terabyte's map takes a second to encode and hash.
        if await trio.to_thread.run_sync(lambda: chunk_map.digest) != wanted:
            raise WrongMap(self.peer, "it sent another chunk map than the one it had told")
        return chunk_map

    async def _next_page(self, first: int) -> MapPage:
        if self.map_digest is None:
            raise PeerGone(self.peer, "it does not hold the blob any more")
        self._page_arrived = trio.Event()
        self._page_expected = True
        self._post(GetMap(blob=BLOB_NUMBER, first=first))
        await self._page_arrived.wait()
        assert self._page is not None, "set before the event"
        if self._page.first != first:
            raise WrongMap(self.peer, f"it sent the map from {self._page.first}, not {first}")
        return self._page

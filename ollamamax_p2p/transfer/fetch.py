"""Fetch one blob: from peers and, where there are none, from its origin; verify; commit.

Everything that decides is in `core.download` (which chunk of whom) and `core.map_votes` (which map
to believe). Here is what surrounds them: sources are looked for and spoken to, chunks are hashed
and written, time is told. All of it runs in one nursery for as long as bytes are missing.

Without a chunk map (an origin gives none, and no peer may know one yet) the blob is cut into blocks
of one size, which are written as they come; the whole blob's sha256 then is the only check. As soon
as a peer tells a map, what is there is verified by it, and the rest is fetched by it.
"""

import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import trio

from ollamamax_p2p.content import BlobStore, PartialBlob
from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest, short
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.discovery import ProviderDirectory
from ollamamax_p2p.errors import (
    BadInput,
    DigestMismatch,
    LocalTrouble,
    NetworkTrouble,
    NoSources,
    NotAdmitted,
    NotFound,
    OmxError,
    OriginTrouble,
    PeerGone,
    PeerMisbehaved,
    WrongChunk,
    WrongMap,
)
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.transfer.ban_list import BanList
from ollamamax_p2p.transfer.carrier import ChunkCarrier
from ollamamax_p2p.transfer.core.download import (
    Arrival,
    Ask,
    Claim,
    Download,
    Drop,
    Leave,
    present_chunks,
)
from ollamamax_p2p.transfer.core.map_votes import MapVotes
from ollamamax_p2p.transfer.core.messages import ChunkPart
from ollamamax_p2p.transfer.origin import Origin
from ollamamax_p2p.transfer.progress import SourceShare
from ollamamax_p2p.transfer.settings import TransferSettings
from ollamamax_p2p.transfer.source_session import SourceSession
from ollamamax_p2p.transfer.unfinished import UnfinishedBlob, UnfinishedBlobs

MiB = 1024 * 1024

BLOCK_BYTES = 4 * MiB
"""Without a map: what is written at once, and what a broken connection to an origin can lose."""

TICK_S = 0.25
"""How often silence is noticed; the shortest time that matters is LATE_S of `core.download`."""

MAP_CHOICE_S = 0.5
"""How long after the first offer others may still tell another map, before one is chosen."""

ORIGIN_GRACE_S = 3.0
"""How long peers have the first word, before an origin is asked."""

ORIGIN_REST_S = 10.0
"""Pause of an origin's connection after it failed; the client behind it has retried already."""

ORIGIN_FAILURES_MAX = 3
"""An origin that fails this often without a byte in between is left alone."""

PEER_FAILURES_MAX = 5
"""A peer whose conversations ended this often without a verified chunk is left alone."""

FIRST_FINDS_S = (1.0, 2.0)
"""The first look-ups follow sooner: those who began at the same time announce themselves now."""

PATIENCE_S = 600.0
"""A download that has got no byte for this long ends, whatever its sources promise."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchServices:
    """What every fetch uses."""

    own_id: PeerId
    store: BlobStore
    providers: ProviderDirectory
    carrier: ChunkCarrier
    unfinished: UnfinishedBlobs
    bans: BanList
    connected_peers: Callable[[], Sequence[PeerId]]
    settings: TransferSettings
    origin_connections: int
    hashing: trio.CapacityLimiter
    rng: random.Random


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginOffer:
    """Where a blob can be had if no peer has it."""

    origin: Origin
    model: ModelName
    insecure: bool = False


@dataclass(slots=True)
class FetchTally:
    """What a fetch has got so far and of whom."""

    size: int
    completed: int = 0
    """Bytes here; those of an earlier fetch included."""
    fetched: int = 0
    refetched: int = 0
    by_source: dict[tuple[Literal["peer", "origin"], str], int] = field(default_factory=dict)
    active_sources: int = 0
    banned: dict[PeerId, None] = field(default_factory=dict)
    note: str = ""
    verifying: bool = False

    def shares(self) -> tuple[SourceShare, ...]:
        """Largest first."""
        shares = [SourceShare(name=n, kind=k, bytes=b) for (k, n), b in self.by_source.items()]
        return tuple(sorted(shares, key=lambda share: (-share.bytes, share.name)))


class _StartOver(Exception):
    """What is there cannot be trusted: discard it and begin again."""


class BlobFetch:
    """One blob being fetched."""

    def __init__(
        self, digest: Digest, size: int, services: FetchServices, offer: OriginOffer | None
    ) -> None:
        self.digest = digest
        self.size = size
        self.tally = FetchTally(size)
        self._services = services
        self._settings = services.settings
        self._offer = offer
        self._votes = MapVotes()
        self._failures: dict[PeerId, int] = {}
        self._left: set[PeerId] = set()
        self._origin_failures = 0
        self._discards = 0

    async def run(self) -> None:
        """Until the blob is in the store. Raises NoSources, StoreFull and other LocalTrouble,
        OriginTrouble, DigestMismatch; what was verified is kept.
        """
        store = self._services.store
        try:
            while not await store.has(self.digest):
                async with await store.partial(self.digest, self.size) as partial:
                    try:
                        await self._complete(partial)
                    except _StartOver:
                        await partial.discard()
        except BaseException:
            self._services.unfinished.give_up(self.digest)
            with trio.move_on_after(1) as bounded:
                bounded.shield = True
                await self._services.providers.withdraw([self.digest])
            raise
        self._services.unfinished.finished(self.digest)
        await self._services.providers.announce([self.digest])

    async def _complete(self, partial: PartialBlob) -> None:
        """Fetch and commit, with one map after another until one proves right."""
        absent = sum(end - start for start, end in partial.missing())
        self.tally.completed = self.size - absent
        while True:
            fill = _Fill(self, partial)
            if partial.missing() or self._votes_against(partial):
                await fill.run()
            self.tally.completed = self.size
            self.tally.verifying = True
            try:
                await partial.commit()
            except DigestMismatch as error:
                self._blame(partial, error)
            else:
                return
            finally:
                self.tally.verifying = False

    def _votes_against(self, partial: PartialBlob) -> bool:
        return partial.map_digest is not None and self._votes.is_rejected(partial.map_digest)

    def _blame(self, partial: PartialBlob, error: DigestMismatch) -> None:
        """The whole is wrong though every chunk was right: the map lied, or the origin."""
        self._services.unfinished.give_up(self.digest)
        if partial.map_digest is None:
            self._discards += 1
            if self._discards > 1:
                raise error
            self.tally.note = "what the origin sent was not the blob; fetching it again"
            raise _StartOver
        for peer in self._votes.reject(partial.map_digest):
            self.ban(
                PeerId(peer),
                WrongMap(peer, f"its chunk map of {self.digest} does not make that blob"),
            )

    def ban(self, peer: PeerId, error: PeerMisbehaved) -> None:
        """It lied."""
        self._services.bans.ban(peer, error)
        self._votes.leaves(peer)
        self.tally.banned[peer] = None
        self.tally.note = f"banned {peer}: {error.problem}"


class _Fill:
    """One go at filling what is missing, in a nursery of its own."""

    def __init__(self, fetch: BlobFetch, partial: PartialBlob) -> None:
        self._fetch = fetch
        self._partial = partial
        self._digest = fetch.digest
        self._services = fetch._services
        self._settings = fetch._settings
        self._votes = fetch._votes
        self._tally = fetch.tally
        self._sessions: dict[PeerId, SourceSession] = {}
        self._opening: set[PeerId] = set()
        self._map: ChunkMap | None = None
        self._download: Download | None = None
        self._ranges: dict[str, trio.CancelScope] = {}
        self._changed = trio.Event()
        self._ended = trio.Event()
        self._failure: Exception | None = None
        self._origin_error: OmxError | None = None
        self._writing = trio.Lock()

    async def run(self) -> None:
        """Until nothing is missing. Raises what ends the fetch."""
        now = trio.current_time()
        self._began_at = self._fed_at = self._sourced_at = now
        self._found_once = False
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._find_sources)
            nursery.start_soon(self._choose_map)
            nursery.start_soon(self._tick)
            await self._ended.wait()
            nursery.cancel_scope.cancel()
        self._tally.active_sources = 0
        if self._failure is not None:
            raise self._failure

    def _end(self, failure: Exception | None = None) -> None:
        self._failure = self._failure or failure
        self._ended.set()

    # -- sources -------------------------------------------------------------------------------

    async def _find_sources(self) -> None:
        pauses = iter(FIRST_FINDS_S)
        self._try(self._guesses(), limit=self._settings.sources_max)
        while True:
            try:
                found = list(await self._services.providers.find(self._digest))
            except NetworkTrouble as error:
                _log.info("looking for %s: %s", short(self._digest), error)
                found = []
            self._found_once = True
            # Room is kept for those that are said to hold it; the rest are guesses.
            self._try(found, limit=2 * self._settings.sources_max)
            self._try(self._guesses(), limit=self._settings.sources_max)
            self._changed.set()
            await trio.sleep(next(pauses, self._settings.find_interval_s))

    def _guesses(self) -> list[PeerId]:
        """Members may hold it and not have told yet; those who do not say so later, if they do."""
        peers = list(self._services.connected_peers())
        self._services.rng.shuffle(peers)
        return peers

    def _try(self, peers: Sequence[PeerId], *, limit: int) -> None:
        for peer in peers:
            if len(self._opening) >= limit:
                return
            if (
                peer not in self._opening
                and peer not in self._services.bans
                and peer not in self._fetch._left
                and peer != self._services.own_id
            ):
                self._opening.add(peer)
                self._nursery.start_soon(self._converse, peer)

    async def _converse(self, peer: PeerId) -> None:
        """One peer's task: its errors end it and nothing else."""
        try:
            await self._speak_with(peer)
        except PeerMisbehaved as error:
            self._ban(peer, error)
        except (NetworkTrouble, NotFound) as error:
            _log.info("source %s of %s: %s", peer, short(self._digest), error)
            self._count_failure(peer, refused=isinstance(error, NotAdmitted))
        except LocalTrouble as error:
            self._end(error)
        finally:
            self._opening.discard(peer)
            self._sessions.pop(peer, None)
            self._votes.leaves(peer)
            if self._download is not None:
                self._download.source_removed(peer)
            self._changed.set()
            self._decide()

    async def _speak_with(self, peer: PeerId) -> None:
        with trio.move_on_after(self._settings.stall_timeout_s) as opening:
            conversation = await self._services.carrier.open(peer)
        if opening.cancelled_caught:
            raise PeerGone(peer, "it did not open a stream")
        try:
            session = SourceSession(conversation, self._digest, self._fetch.size, self)
            self._sessions[peer] = session
            await session.run()
            raise PeerGone(peer)
        finally:
            with trio.CancelScope(shield=True):  # never waits for the peer
                await conversation.aclose()

    def _count_failure(self, peer: PeerId, *, refused: bool) -> None:
        failures = self._fetch._failures.get(peer, 0) + 1
        self._fetch._failures[peer] = failures
        if failures >= PEER_FAILURES_MAX or refused:
            self._fetch._left.add(peer)

    def _ban(self, peer: PeerId, error: PeerMisbehaved) -> None:
        if self._download is not None:
            self._download.source_banned(peer)
        self._fetch.ban(peer, error)

    # -- what sources say ----------------------------------------------------------------------

    def has_offered(self, session: SourceSession) -> None:
        """See Fetcher."""
        assert session.map_digest is not None, "it has just offered it"
        self._votes.claims(session.peer, session.map_digest, complete=session.complete)
        self._changed.set()
        self._enlist(session)
        self._decide()

    def has_gained(self, session: SourceSession, chunks: list[int]) -> None:
        """See Fetcher."""
        if self._serves_our_map(session):
            assert self._download is not None, "there is a map"
            self._download.source_has(session.peer, chunks)
            self._decide()

    def has_lost(self, session: SourceSession) -> None:
        """See Fetcher."""
        self._votes.leaves(session.peer)
        if self._download is not None:
            self._download.source_removed(session.peer)
        self._changed.set()
        self._decide()

    def has_turned(self, session: SourceSession) -> None:
        """See Fetcher."""
        if self._download is not None:
            turned = self._download.choked if session.choked else self._download.unchoked
            turned(session.peer, now=trio.current_time())
            self._decide()

    async def has_sent(self, session: SourceSession, part: ChunkPart) -> None:
        """See Fetcher."""
        download = self._download
        if download is None or session.peer not in download.sources():
            return  # it has been taken out, and its task is about to end
        now = trio.current_time()
        arrival = download.part_arrived(
            session.peer, part.chunk, part.offset, len(part.data), now=now
        )
        if arrival is Arrival.STRAY:
            self._note_bytes()
            return
        session.buffers.setdefault(part.chunk, []).append(part.data)
        if arrival is Arrival.WHOLE:
            parts = session.buffers.pop(part.chunk)
            await self._take_chunk(download, session.peer, part.chunk, parts)
        else:
            self._decide()

    async def _take_chunk(
        self, download: Download, peer: PeerId, chunk: int, parts: list[bytes]
    ) -> None:
        chunk_map = self._map
        assert chunk_map is not None, "peers are asked by a map only"
        self._decide()  # ask for the next before this one is hashed
        right = await trio.to_thread.run_sync(
            _matches, chunk_map, chunk, parts, limiter=self._services.hashing
        )
        if not right:
            download.chunk_wrong(peer, chunk)
            raise WrongChunk(peer, f"chunk {chunk} of {self._digest} is not what its map says")
        if chunk not in download.verified:
            at = chunk_map.offsets[chunk]
            async with self._writing:
                for part in parts:
                    await self._partial.write(at, part)
                    at += len(part)
        self._fetch._failures.pop(peer, None)
        self._verified(download, peer, chunk)

    def _verified(self, download: Download, source: str, chunk: int) -> None:
        now = trio.current_time()
        download.chunk_verified(source, chunk, now=now)
        if download is not self._download:
            return  # the map was changed meanwhile, and what is there counted anew
        self._fed_at = self._sourced_at = now
        if self._map is not None:
            self._services.unfinished.gained(self._digest, chunk)
        self._note_bytes()
        if download.complete:
            self._end()
        else:
            self._decide()

    # -- maps ----------------------------------------------------------------------------------

    async def _choose_map(self) -> None:
        """Have a map as soon as anybody tells one; then there is nothing left to choose."""
        while self._map is None:
            best = self._votes.best()
            if best is None:
                self._changed = trio.Event()
                await self._changed.wait()
                continue
            await self._hear_all()
            best = self._votes.best()
            if best is not None:
                await self._get_map(best)

    async def _hear_all(self) -> None:
        """Wait a little for the others' first words, that one voice may not decide."""
        with trio.move_on_after(MAP_CHOICE_S):
            while not self._found_once or self._unanswered():
                self._changed = trio.Event()
                await self._changed.wait()

    def _unanswered(self) -> bool:
        return any(
            peer not in self._sessions or not self._sessions[peer].answered
            for peer in self._opening
        )

    async def _get_map(self, map_digest: Digest) -> None:
        holders = [s for s in self._sessions.values() if s.map_digest == map_digest]
        session = max(holders, key=lambda s: (s.complete, s.peer), default=None)
        if session is None:
            return
        if self._votes.disputed:
            _log.warning("peers disagree about the chunk map of %s", self._digest)
            self._tally.note = "peers disagree about this blob; going with the majority"
        peer = session.peer
        chunk_map = None
        try:
            with trio.move_on_after(self._settings.stall_timeout_s):
                chunk_map = await session.fetch_map()
        except PeerMisbehaved as error:
            self._ban(peer, type(error)(peer, error.problem))
            self._leave(peer, "")
            return
        except PeerGone:
            return
        if chunk_map is None:
            self._leave(peer, "it did not send its chunk map")
        elif chunk_map.size != self._fetch.size:
            self._reject(map_digest)
        else:
            await self._adopt(chunk_map)

    def _reject(self, map_digest: Digest) -> None:
        for peer in self._votes.reject(map_digest):
            self._ban(PeerId(peer), WrongMap(peer, f"its chunk map of {self._digest} is too long"))
            self._leave(PeerId(peer), "")
        for session in list(self._sessions.values()):
            if session.map_digest == map_digest:
                self._votes.leaves(session.peer)

    async def _adopt(self, chunk_map: ChunkMap) -> None:
        """Go by this map from now on; what is there already is verified by it."""
        self._note_bytes()
        self._download = None
        for scope in self._ranges.values():
            scope.cancel()
        try:
            async with self._writing:
                await self._partial.use_map(chunk_map)
        except LocalTrouble as error:
            self._end(error)
            return
        self._map = chunk_map
        self._fed_at = trio.current_time()  # hashing what is there may have taken minutes
        download = self._begin_download(chunk_map.offsets, chunk_map.lengths)
        blob = UnfinishedBlob(chunk_map, self._partial, set(download.verified))
        self._services.unfinished.begin(blob)
        await self._services.providers.announce([self._digest])
        for session in list(self._sessions.values()):
            self._enlist(session)
        self._decide()

    def _begin_download(self, offsets: Sequence[int], lengths: Sequence[int]) -> Download:
        download = Download(
            lengths,
            present=list(present_chunks(offsets, lengths, self._partial.missing())),
            settings=self._settings,
            rng=self._services.rng,
            own=self._services.own_id,
        )
        self._download = download
        self._note_bytes()
        if download.complete:
            self._end()
        return download

    def _serves_our_map(self, session: SourceSession) -> bool:
        return (
            self._map is not None
            and self._download is not None
            and session.map_digest == self._map.digest
            and session.peer in self._download.sources()
        )

    def _enlist(self, session: SourceSession) -> None:
        """Let a peer that serves under our map take part, if there is room for one more."""
        if self._map is None or self._download is None or session.map_digest != self._map.digest:
            return
        peers = [name for name in self._download.sources() if name not in self._origin_names()]
        if session.peer in peers or len(peers) >= self._settings.sources_max:
            return
        if session.chunk_count != self._map.chunk_count:
            self._ban(session.peer, PeerMisbehaved(session.peer, "it miscounts its own map"))
            self._leave(session.peer, "")
            return
        self._download.source_added(
            session.peer,
            has=None if session.complete else session.chunks,
            choked=session.choked,
            round_trip_s=session.round_trip_s,
            now=trio.current_time(),
        )

    # -- what is decided -----------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            for session in list(self._sessions.values()):
                self._enlist(session)
            if self._download is not None:
                self._download.tick(now=now)
            self._consider_origin(now)
            self._decide()
            self._consider_giving_up(now)

    def _decide(self) -> None:
        """Do what the download says."""
        if self._download is None or self._ended.is_set():
            return
        for intention in self._download.decide(now=trio.current_time()):
            match intention:
                case Ask(source, chunk):
                    self._sessions[PeerId(source)].ask(chunk, self._download.lengths[chunk])
                case Drop(source, chunk):
                    self._drop(source, chunk)
                case Claim():
                    self._nursery.start_soon(self._fetch_range, self._download, intention)
                case Leave(source, reason):
                    self._leave(PeerId(source), reason)
        self._note_bytes()

    def _drop(self, source: str, chunk: int) -> None:
        session = self._sessions.get(PeerId(source))
        if session is not None:
            session.cancel(chunk)
        elif source in self._ranges and not self._owes(source):
            self._ranges[source].cancel()

    def _owes(self, source: str) -> bool:
        return self._download is not None and bool(self._download.outstanding(source))

    def _leave(self, peer: PeerId, reason: str) -> None:
        """Have nothing more to do with a peer, for this download."""
        if reason:
            _log.warning("source %s of %s: %s", peer, short(self._digest), reason)
            self._tally.note = f"left {peer}: {reason}"
        self._fetch._left.add(peer)
        session = self._sessions.get(peer)
        if session is not None:
            self._votes.leaves(peer)
            session.end()

    def _note_bytes(self) -> None:
        download, tally = self._download, self._tally
        if download is None:
            return
        tally.completed = download.verified_bytes
        tally.active_sources = download.active_sources()
        credits, refetched = download.settle()
        for source, size in credits.items():
            key = self._share_of(source)
            tally.by_source[key] = tally.by_source.get(key, 0) + size
            tally.fetched += size
        tally.refetched += refetched

    def _share_of(self, source: str) -> tuple[Literal["peer", "origin"], str]:
        if source in self._origin_names() and self._fetch._offer is not None:
            return "origin", self._fetch._offer.model.host
        return "peer", source

    # -- origin --------------------------------------------------------------------------------

    def _origin_names(self) -> list[str]:
        if self._fetch._offer is None:
            return []
        return [f"origin {number}" for number in range(self._services.origin_connections)]

    def _origin_is_left_alone(self) -> bool:
        return self._fetch._origin_failures >= ORIGIN_FAILURES_MAX

    def _consider_origin(self, now: float) -> None:
        """Let the origin take part once the peers have had the first word."""
        fetch = self._fetch
        if fetch._offer is None or self._origin_is_left_alone():
            return
        heard = self._found_once and not self._unanswered()
        if not heard and now - self._began_at < ORIGIN_GRACE_S:
            return
        if self._download is None:
            if self._map is not None or self._votes.best() is not None:
                return  # a map is on its way
            if fetch._votes_against(self._partial):
                self._end(_StartOver())
                return
            self._begin_without_map()
        if self._download is not None:
            for name in self._origin_names():
                if name not in self._download.sources() and name not in self._ranges:
                    self._download.source_added(name, kind="origin", now=now)

    def _begin_without_map(self) -> None:
        size = self._fetch.size
        lengths = [min(BLOCK_BYTES, size - at) for at in range(0, size, BLOCK_BYTES)]
        self._begin_download(range(0, size, BLOCK_BYTES), lengths)

    async def _fetch_range(self, download: Download, claim: Claim) -> None:
        """One claim of an origin: its task."""
        with trio.CancelScope() as scope:
            self._ranges[claim.source] = scope
            try:
                await self._read_range(download, claim)
                self._fetch._origin_failures = 0
            except (OriginTrouble, NotFound, BadInput, PeerMisbehaved) as error:
                _log.warning("origin of %s: %s", short(self._digest), error)
                self._tally.note = str(error)
                self._fetch._origin_failures += 1
                self._origin_error = error
                download.source_removed(claim.source)
                self._decide()
                await trio.sleep(ORIGIN_REST_S)
            except LocalTrouble as error:
                self._end(error)
            finally:
                if self._ranges.get(claim.source) is scope:
                    del self._ranges[claim.source]
        self._decide()

    async def _read_range(self, download: Download, claim: Claim) -> None:
        offer = self._fetch._offer
        assert offer is not None, "origins are added with an offer only"
        last = claim.first + claim.count - 1
        start, end = download.offsets[claim.first], download.offsets[last] + download.lengths[last]
        if self._map is None and self._partial.map_digest is not None:
            async with self._writing:
                await self._partial.use_map(None)
        async with offer.origin.fetch_range(
            offer.model, self._digest, start, end, insecure=offer.insecure
        ) as stream:
            chunk, buffer = claim.first, bytearray()
            async for data in stream:
                rest = memoryview(data)
                while rest:
                    whole = download.lengths[chunk]
                    taken = rest[: whole - len(buffer)]
                    if chunk in download.outstanding(claim.source):
                        download.part_arrived(
                            claim.source, chunk, len(buffer), len(taken), now=trio.current_time()
                        )
                    buffer += taken
                    rest = rest[len(taken) :]
                    if len(buffer) == whole:
                        await self._take_block(download, claim.source, chunk, bytes(buffer))
                        chunk, buffer = chunk + 1, bytearray()

    async def _take_block(self, download: Download, source: str, chunk: int, data: bytes) -> None:
        if chunk not in download.outstanding(source) or chunk in download.verified:
            return
        if self._map is not None:
            right = await trio.to_thread.run_sync(
                self._map.matches, chunk, data, limiter=self._services.hashing
            )
            if not right:
                download.chunk_wrong(source, chunk)
                raise PeerMisbehaved("", f"the origin's bytes of chunk {chunk} are not the blob's")
        async with self._writing:
            if download is self._download:
                await self._partial.write(download.offsets[chunk], data)
        self._verified(download, source, chunk)

    # -- giving up -----------------------------------------------------------------------------

    def _consider_giving_up(self, now: float) -> None:
        if self._can_go_on():
            self._sourced_at = now
        elif self._origin_error is not None and self._origin_is_left_alone():
            self._end(self._origin_error)
        alone_s, hungry_s = now - self._sourced_at, now - self._fed_at
        limit_s = self._settings.give_up_after_s
        if alone_s < limit_s and hungry_s < PATIENCE_S:
            return
        banned = len(self._tally.banned)
        problem = f"nobody who holds what is missing could be reached for {limit_s:g} s"
        if alone_s < limit_s:
            problem = f"its sources have sent nothing for {PATIENCE_S:g} s"
        if banned:
            problem += f"; {banned} lying peer{'s' if banned > 1 else ''} banned"
        problem += "; what is here is kept, the same pull resumes it"
        self._end(NoSources(f"blob {short(self._digest)}", problem))

    def _can_go_on(self) -> bool:
        if self._download is not None:
            return self._download.can_go_on()
        # A holder may be building its map: the first time, for a large blob, that takes minutes.
        unanswered = any(not session.answered for session in self._sessions.values())
        return unanswered or self._votes.best() is not None


def _matches(chunk_map: ChunkMap, chunk: int, parts: list[bytes]) -> bool:
    """Whether the parts together are that chunk."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    length = sum(map(len, parts))
    return length == chunk_map.lengths[chunk] and hashed.digest() == chunk_map.hashes[chunk]

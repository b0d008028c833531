"""Fetch one blob: from peers and, where there are none, from its origin; verify; commit.

Everything that decides is in `core.download` (which chunk of whom) and `core.map_votes` (which map
to believe). Here is what surrounds them: sources are looked for and spoken to, chunks are hashed
and written, time is told. All of it runs in one nursery for as long as bytes are missing.

Without a chunk map (an origin gives none, and no peer may know one yet) the blob is cut into blocks
of one size, which are written as they come; the whole blob's sha256 then is the only check. As soon
as a peer tells a map, what is there is verified by it, and the rest is fetched by it.
"""

import contextlib
import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

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
    OriginUnavailable,
    PeerGone,
    PeerMisbehaved,
    WrongChunk,
    WrongMap,
    code,
    restored,
)
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.transfer.agreements import AgreedMaps
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
from ollamamax_p2p.transfer.core.map_votes import REJECTED_MAX, MapVotes
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

KEPT = "; what is here is kept, the same pull resumes it"

MAP_DRY_S = 300.0
"""A map by which bytes come, but never a whole chunk, gives way to another after this long. Shorter
would take a slow link for a liar: sixteen sources' first chunks are up to 256 MiB.
"""

MAP_LOSS_MAX = 1 / 8
"""Of the blob: what may be thrown away to try another map. With more here it is better to end, keep
it and wait for an honest holder than to let a liar's map undo it.
"""

SUSPECTS_MAX = 8
"""Maps kept, to be judged by the blob once it is here; each has 36 bytes a chunk."""

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
    agreed_maps: AgreedMaps | None = None
    """None where nothing is agreed on."""


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


class _MapDisputed(Exception):
    """An origin's bytes are not what the map says; one of the two is wrong."""


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
        self._votes = MapVotes(services.rng)
        if services.agreed_maps is not None:
            self._votes.agreed = services.agreed_maps.chunk_map_of(digest)
        self._other_sizes: dict[PeerId, int] = {}
        self._suspects: dict[Digest, tuple[ChunkMap, int]] = {}
        self._failures: dict[PeerId, int] = {}
        self._left: set[PeerId] = set()
        self._origin_failures = 0
        self._discards = 0

    async def run(self) -> None:
        """Until the blob is in the store. Raises NoSources, StoreFull and other LocalTrouble,
        OriginTrouble, DigestMismatch, and what else an origin raises; what was verified is kept.
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
        await self._judge_suspects()
        await self._services.providers.announce([self.digest])

    def suspect(self, chunk_map: ChunkMap, chunk: int) -> None:
        """This chunk will tell whether the map lied."""
        if chunk_map.digest in self._suspects or len(self._suspects) < SUSPECTS_MAX:
            self._suspects[chunk_map.digest] = (chunk_map, chunk)

    async def _judge_suspects(self) -> None:
        """The blob is here and right, so a map that it does not match is a lie."""
        with contextlib.suppress(NotFound, LocalTrouble):  # it will be told when it is read
            for chunk_map, chunk in self._suspects.values():
                async with await self._services.store.open(self.digest) as reader:
                    at, length = chunk_map.offsets[chunk], chunk_map.lengths[chunk]
                    data = await reader.read_at(at, length)
                if not await trio.to_thread.run_sync(
                    chunk_map.matches, chunk, data, limiter=self._services.hashing
                ):
                    self._reject(chunk_map.digest)

    async def _complete(self, partial: PartialBlob) -> None:
        """Fetch and commit, with one map after another until one proves right."""
        absent = sum(end - start for start, end in partial.missing())
        self.tally.completed = self.size - absent
        while True:
            self._votes.here = partial.map_digest
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
                self._tell_map(partial.map_digest)
                return
            finally:
                self.tally.verifying = False

    def _tell_map(self, map_digest: Digest | None) -> None:
        """The whole blob is right, so the map by which it came is."""
        if self._services.agreed_maps is not None and map_digest is not None:
            self._services.agreed_maps.tell_chunk_map(self.digest, map_digest, self.size)

    def _votes_against(self, partial: PartialBlob) -> bool:
        return partial.map_digest is not None and self._votes.is_rejected(partial.map_digest)

    def _blame(self, partial: PartialBlob, error: DigestMismatch) -> None:
        """The whole is wrong though every chunk was right: the map lied, or the origin."""
        self._services.unfinished.give_up(self.digest)
        if partial.map_digest is None:
            self._discards += 1
            if self._discards > 1 and not self.believe_maps_again():
                raise error
            self.tally.note = "what the origin sent was not the blob; fetching it again"
            raise _StartOver
        self._reject(partial.map_digest)
        if self._votes.exhausted and self._offer is None:
            problem = f"{REJECTED_MAX} chunk maps that peers told did not make it"
            raise NoSources(f"blob {short(self.digest)}", problem + self.blamed() + KEPT)

    def _reject(self, map_digest: Digest) -> None:
        if self._services.agreed_maps is not None and map_digest == self._votes.agreed:
            _log.warning("the chunk map of %s that was agreed on is wrong", self.digest)
            self._services.agreed_maps.tell_wrong_chunk_map(self.digest, map_digest)
        for peer in self._votes.reject(map_digest):
            self.ban(
                PeerId(peer),
                WrongMap(peer, f"its chunk map of {self.digest} does not make that blob"),
            )

    def believe_maps_again(self) -> bool:
        """The origin that contradicted maps is not to be trusted either: go by them, without it.
        Whether there are any.
        """
        if not self._votes.restore():
            return False
        self._origin_failures = ORIGIN_FAILURES_MAX
        return True

    def blamed(self) -> str:
        """Who is to blame that it fails, as the end of a sentence."""
        told = ""
        if banned := len(self.tally.banned):
            told = f"; {banned} lying peer{'s' if banned > 1 else ''} banned"
        if self._other_sizes:
            sizes = ", ".join(map(str, sorted(set(self._other_sizes.values()))[:3]))
            told += (
                f"; peers hold it with {sizes} bytes, where the manifest says {self.size}: "
                "the manifest may be wrong"
            )
        return told

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
        self._contradicted: int | None = None
        """A chunk of which an origin says that it is not what the map says."""
        self._disputed = False
        """So the map has to go."""
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
        self._heard_at = self._verified_at = now  # by the map that we go by now
        self._gained_bytes = 0  # the same
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
            if not session.ended:
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
        if not self._votes.claims(session.peer, session.map_digest, complete=session.complete):
            self._leave(session.peer, "it has told too many chunk maps")
            return
        self._changed.set()
        self._enlist(session)
        self._decide()

    def has_another_size(self, session: SourceSession, size: int) -> None:
        """See Fetcher."""
        self._fetch._other_sizes[session.peer] = size
        self._changed.set()
        self._leave(session.peer, f"it holds {size} bytes, not {self._fetch.size}")

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
        self._heard_at = now
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
        self._votes.supplied(peer, chunk_map.digest)
        if chunk not in download.verified:
            at = chunk_map.offsets[chunk]
            async with self._writing:
                if download is not self._download:
                    return  # what is there is verified by another map now
                for part in parts:
                    await self._partial.write(at, part)
                    at += len(part)
        self._gained_bytes += chunk_map.lengths[chunk]
        self._fetch._failures.pop(peer, None)
        self._verified(download, peer, chunk)

    def _verified(self, download: Download, source: str, chunk: int) -> None:
        now = trio.current_time()
        download.chunk_verified(source, chunk, now=now)
        if download is not self._download:
            return  # the map was changed meanwhile, and what is there counted anew
        self._fed_at = self._sourced_at = self._heard_at = self._verified_at = now
        if self._map is not None:
            self._services.unfinished.gained(self._digest, chunk)
        self._note_bytes()
        if download.complete:
            self._end()
        else:
            self._decide()

    # -- maps ----------------------------------------------------------------------------------

    async def _choose_map(self) -> None:
        """Have a map as soon as anybody tells one, and another one if nothing comes by it."""
        while True:
            if self._disputed:
                await self._put_map_aside()
            best = self._map_to_try()
            if best is None:
                self._changed = trio.Event()
                await self._changed.wait()
                continue
            if self._map is None:
                await self._hear_all()
                best = self._map_to_try()
            if best is not None:
                await self._get_map(best)

    def _map_to_try(self) -> Digest | None:
        """None if the map that we go by serves us, or nobody tells another one."""
        return self._votes.best() if self._map is None else self._better_map()

    def _better_map(self) -> Digest | None:
        """Another map, whose sources let us ask them, while those of ours send nothing. One that
        was left for that reason before has to wait longer each time.
        """
        assert self._map is not None, "asked only if there is one"
        other = self._votes.best(self._other_maps(unchoked=True))
        if other is None or not self._map_is_silent(periods=1 + self._votes.doubts(other)):
            return None
        return other

    def _other_maps(self, *, unchoked: bool = False) -> set[Digest]:
        """Those that may be tried instead of ours."""
        ours = self._map.digest if self._map is not None else None
        if self._gained_bytes > MAP_LOSS_MAX * self._fetch.size:
            return set()
        return {
            session.map_digest
            for session in self._sessions.values()
            if session.map_digest is not None
            and session.map_digest != ours
            and not (unchoked and session.choked)
        }

    def _map_is_silent(self, *, periods: int) -> bool:
        now = trio.current_time()
        return (
            now - self._heard_at >= periods * self._settings.stall_timeout_s
            or now - self._verified_at >= periods * MAP_DRY_S
        )

    async def _put_map_aside(self) -> None:
        """The origin contradicts the map: the whole blob's sha256 will tell which of them lies."""
        self._disputed = False
        if self._map is not None:
            self._votes.set_aside(self._map.digest)
            self._fetch._origin_failures = 0
            self._tally.note = "peers and the origin disagree about this blob; going by its sha256"
            await self._adopt(None)

    async def _hear_all(self) -> None:
        """Wait a little for the others' first words, that one voice may not decide; unless it says
        what was agreed.
        """
        agreed = self._votes.agreed
        if agreed is not None and self._map_to_try() == agreed:
            return
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
        if not holders:
            await trio.lowlevel.checkpoint()
            return
        self._services.rng.shuffle(holders)
        session = max(holders, key=lambda s: s.complete)
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
            self._reject(map_digest, peer)
        elif self._map is None or self._better_map() == map_digest:  # still, after all that time
            await self._adopt(chunk_map)

    def _reject(self, map_digest: Digest, teller: PeerId) -> None:
        """It is not as long as the blob. Who tells the blob's size with it lies, vouching or not:
        whoever goes by a map has added up its lines.
        """
        for liar in dict.fromkeys([teller, *map(PeerId, self._votes.reject(map_digest))]):
            self._ban(liar, WrongMap(liar, f"its chunk map of {self._digest} has another length"))
            self._leave(liar, "")

    async def _adopt(self, chunk_map: ChunkMap | None) -> None:
        """Go by this map from now on, or by none; what is there already is verified by it."""
        if not await self._change_map(chunk_map):
            return
        if chunk_map is None:
            self._begin_without_map()
            return
        download = self._begin_download(chunk_map.offsets, chunk_map.lengths)
        blob = UnfinishedBlob(chunk_map, self._partial, set(download.verified))
        self._services.unfinished.begin(blob)
        await self._services.providers.announce([self._digest])
        for session in list(self._sessions.values()):
            self._enlist(session)
        self._decide()

    async def _change_map(self, chunk_map: ChunkMap | None) -> bool:
        self._note_bytes()
        self._download = None
        self._leave_map()
        for scope in self._ranges.values():
            scope.cancel()
        began = trio.current_time()
        try:
            async with self._writing:
                await self._partial.use_map(chunk_map)
        except LocalTrouble as error:
            self._end(error)
            return False
        self._map = chunk_map
        now = trio.current_time()
        self._fed_at += now - began  # hashing what is there may have taken minutes
        self._heard_at = self._verified_at = now
        self._gained_bytes = 0
        return True

    def _leave_map(self) -> None:
        """Those who serve under the map that we go by are not asked any more."""
        if self._map is None:
            return
        self._votes.doubt(self._map.digest)
        if self._contradicted is None:
            self._contradicted = self._services.rng.randrange(self._map.chunk_count)
        self._fetch.suspect(self._map, self._contradicted)
        self._contradicted = None
        self._services.unfinished.give_up(self._digest)
        for session in self._sessions.values():
            if session.map_digest == self._map.digest and session.owes:
                self._votes.leaves(session.peer)
                session.end()  # what it may still send was asked for by the old map

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
            self._consider_map()
            self._consider_origin(now)
            self._decide()
            self._consider_giving_up(now)

    def _consider_map(self) -> None:
        if self._map is None or self._download is None:
            return
        if self._contradicted is not None and self._map_is_silent(periods=1):
            self._disputed = True
        if self._disputed or self._better_map() is not None:
            self._changed.set()

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
        if download is not self._download:
            return  # the map was changed before the task began
        with trio.CancelScope() as scope:
            self._ranges[claim.source] = scope
            try:
                await self._read_range(download, claim)
                self._fetch._origin_failures = 0
            except _MapDisputed:
                pass  # who is right will show
            except (OriginTrouble, NotFound, BadInput) as error:
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
            if download is not self._download:
                return
            if not right:
                download.chunk_wrong(source, chunk)
                self._dispute(chunk)
        async with self._writing:
            if download is self._download:
                await self._partial.write(download.offsets[chunk], data)
        self._verified(download, source, chunk)

    def _dispute(self, chunk: int) -> NoReturn:
        """A map by which no peer has served anything does not outrank an origin. One that has
        proved useful does, until nothing comes by it any more.
        """
        assert self._map is not None, "it is one of the two who disagree"
        assert self._fetch._offer is not None, "the other"
        self._contradicted = chunk
        if self._votes.has_served(self._map.digest):
            problem = f"what it sent is not what the peers' chunk map says of chunk {chunk}"
            raise OriginUnavailable(self._fetch._offer.model.host, problem)
        self._disputed = True
        self._changed.set()
        raise _MapDisputed

    # -- giving up -----------------------------------------------------------------------------

    def _consider_giving_up(self, now: float) -> None:
        if self._can_go_on():
            self._sourced_at = now
        elif self._origin_error is not None and self._origin_is_left_alone():
            if not self._fetch.believe_maps_again():
                self._end(self._with_blame(self._origin_error))
            self._changed.set()
        alone_s, hungry_s = now - self._sourced_at, now - self._fed_at
        limit_s = self._settings.give_up_after_s
        if alone_s < limit_s and hungry_s < PATIENCE_S:
            return
        problem = f"nobody who holds what is missing could be reached for {limit_s:g} s"
        if alone_s < limit_s:
            problem = f"its sources have sent nothing for {PATIENCE_S:g} s"
        problem += self._fetch.blamed() + KEPT
        self._end(NoSources(f"blob {short(self._digest)}", problem))

    def _with_blame(self, error: OmxError) -> OmxError:
        """An origin's error, and that the peers did not have it either: who reads only that a
        registry cannot be reached looks for the fault in the wrong place.
        """
        told = f"{error}; no peer could give the rest{self._fetch.blamed()}{KEPT}"
        return restored(code(error), told)

    def _can_go_on(self) -> bool:
        # A holder may be building its map: the first time, for a large blob, that takes minutes. An
        # origin that fails meanwhile, as it does where there is no internet, is not the last word.
        if any(not session.answered for session in self._sessions.values()):
            return True
        if self._download is not None:
            return self._download.can_go_on() or self._votes.best(self._other_maps()) is not None
        return self._votes.best() is not None


def _matches(chunk_map: ChunkMap, chunk: int, parts: list[bytes]) -> bool:
    """Whether the parts together are that chunk."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    length = sum(map(len, parts))
    return length == chunk_map.lengths[chunk] and hashed.digest() == chunk_map.hashes[chunk]

"""Pull a model: what its name means, then every blob that is missing, then the manifest.

The manifest is written last, so a name never stands for a model that is not whole.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.content.core.digest import Digest, short
from ollamamax_p2p.content.core.manifest import Manifest
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.errors import (
    BadInput,
    BlobNotFound,
    ModelNotFound,
    NetworkTrouble,
    NoSources,
    OmxError,
    OriginTrouble,
    StoreFull,
    StoreReadOnly,
)
from ollamamax_p2p.transfer.agreements import AgreedNames
from ollamamax_p2p.transfer.fetch import FetchTally, OriginOffer
from ollamamax_p2p.transfer.models_exchange import ModelsExchange
from ollamamax_p2p.transfer.origin import Origin
from ollamamax_p2p.transfer.progress import PullProgress, PullReport, SourceShare

PROGRESS_INTERVAL_S = 0.2
"""Five states a second look smooth and cost little."""

BLOBS_AT_ONCE = 3
"""A model is one large blob and some small ones; a small one need not wait for the large one, and
three do not split the link into slow parts.
"""

AGREEING_MAX = 5
"""Rounds with others who pull the same name at the same moment; one is enough for any number of
them, unless somebody pushes new versions meanwhile.
"""

FILLS_MAX = 3
"""A blob that is removed under a pull is fetched again; who removes it each time wants that."""

OnProgress = Callable[[PullProgress], None]
PutManifest = Callable[[ModelName, Manifest], Awaitable[None]]
Fetch = Callable[[Digest, int, OriginOffer | None], Awaitable[FetchTally]]

_log = logging.getLogger(__name__)


class Pull:
    """One model being pulled."""

    def __init__(
        self,
        name: ModelName,
        *,
        store: BlobStore,
        exchange: ModelsExchange,
        origin: Origin | None,
        fetch: Fetch,
        tally_of: Callable[[Digest], FetchTally | None],
        put_manifest: PutManifest,
        from_origin: bool,
        insecure: bool,
        agreed: AgreedNames | None = None,
    ) -> None:
        self.name = name
        self._store = store
        self._exchange = exchange
        self._origin = origin
        self._fetch = fetch
        self._tally_of = tally_of
        self._put_manifest = put_manifest
        self._from_origin = from_origin
        self._insecure = insecure
        self._agreed = agreed
        self._listeners: list[OnProgress] = []
        self._begin()

    def _begin(self) -> None:
        self._last: PullProgress | None = None
        self._done: dict[Digest, FetchTally] = {}
        self._running: dict[Digest, None] = {}
        self.wanted: frozenset[Digest] = frozenset()
        """The blobs of its model, once they are known."""
        self._told: dict[Digest, tuple[object, ...]] = {}

    def add_listener(self, listener: OnProgress) -> None:
        """Tell it every state from now on, the present one first."""
        self._listeners.append(listener)
        if self._last is not None:
            listener(self._last)

    def remove_listener(self, listener: OnProgress) -> None:
        """Tell it nothing more."""
        self._listeners.remove(listener)

    async def run(self) -> PullReport:
        """Raises ModelNotFound, StoreFull, StoreReadOnly, NoSources, OriginTrouble and what else
        `fetch` raises.
        """
        began = trio.current_time()
        self._begin()  # it may be run again by a caller who came as the first run was cancelled
        if not self._store.writable:
            raise StoreReadOnly(self._store.place)
        self._tell(PullProgress(status="pulling manifest"))
        manifest = await self._agreed_manifest()
        self.wanted = frozenset(digest for digest, _ in manifest.blobs())
        await self._fill(manifest)
        self._tell(PullProgress(status="success", sources=self._shares()))
        return self._report(manifest, trio.current_time() - began)

    async def _fill(self, manifest: Manifest) -> None:
        """Fetch what is missing and name it. A blob that was here may be removed meanwhile, with
        another model that had it too; then that blob is fetched as well.
        """
        for again in range(FILLS_MAX):
            missing = [blob for blob in manifest.blobs() if not await self._store.has(blob[0])]
            await self._check_room(missing)
            absent = dict(missing)
            for digest, size in manifest.blobs():
                if digest not in absent and not again:
                    self._tell_blob(digest, FetchTally(size, completed=size))
            await self._fetch_all(missing)
            self._tell(PullProgress(status="verifying sha256 digest", sources=self._shares()))
            self._tell(PullProgress(status="writing manifest", sources=self._shares()))
            try:
                return await self._put_manifest(self.name, manifest)
            except BlobNotFound:
                if again == FILLS_MAX - 1:
                    raise

    async def _agreed_manifest(self) -> Manifest:
        """What the swarm has agreed that the name means; if it has not, what we find is proposed,
        and what comes first holds for everybody.
        """
        if self._agreed is None:
            return await self._manifest(None)
        known = await self._agreed.meaning(self.name)
        for _ in range(AGREEING_MAX):
            manifest = await self._manifest(known)
            if manifest.digest == known:
                return manifest
            try:
                decided = await self._agreed.agree(self.name, manifest.digest, replaces=known)
            except (NetworkTrouble, BadInput) as error:
                note = f"not agreed with the other members: {error}"
                self._tell(PullProgress(status="pulling manifest", note=note))
                return manifest
            if decided == manifest.digest:
                return manifest
            known = decided
        raise NoSources(str(self.name), "its meaning changes faster than it can be pulled")

    async def _manifest(self, wanted: Digest | None) -> Manifest:
        if not self._from_origin:
            try:
                meaning = await self._exchange.meaning(self.name, wanted)
            except (ModelNotFound, NoSources) as error:
                if self._origin is None:
                    return await self._held_already(error)
            else:
                if meaning.others:
                    total = meaning.holders + meaning.others
                    note = f"members differ: {meaning.holders} of {total} hold this version"
                    self._tell(PullProgress(status="pulling manifest", note=note))
                return meaning.manifest
        if self._origin is None:
            raise ModelNotFound(str(self.name))
        try:
            return await self._origin.manifest(self.name, insecure=self._insecure)
        except (OriginTrouble, ModelNotFound) as error:
            return await self._held_already(error)

    async def _held_already(self, error: OmxError) -> Manifest:
        """What this node has under the name, if the origin has no better answer."""
        if self._from_origin:
            raise error
        try:
            manifest = await self._store.manifest(self.name)
        except ModelNotFound:
            raise error from None
        self._tell(PullProgress(status="pulling manifest", note=f"kept what is here: {error}"))
        return manifest

    async def _check_room(self, missing: list[tuple[Digest, int]]) -> None:
        """Before the first byte. What is here of an unfinished blob has its room already."""
        needed = 0
        for digest, size in missing:
            rest = await self._store.missing_bytes(digest)
            needed += size if rest is None else min(rest, size)
        free = await self._store.free_bytes()
        if needed > free:
            raise StoreFull(self._store.place, needed, free)

    async def _fetch_all(self, missing: list[tuple[Digest, int]]) -> None:
        failures: list[Exception] = []
        places = trio.Semaphore(BLOBS_AT_ONCE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_regularly)
            async with trio.open_nursery() as fetches:
                for digest, size in missing:
                    await places.acquire()
                    if failures:
                        break
                    fetches.start_soon(self._fetch_one, digest, size, places, failures, fetches)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]

    async def _fetch_one(
        self,
        digest: Digest,
        size: int,
        places: trio.Semaphore,
        failures: list[Exception],
        fetches: trio.Nursery,
    ) -> None:
        offer = None
        if self._origin is not None:
            offer = OriginOffer(origin=self._origin, model=self.name, insecure=self._insecure)
        self._running[digest] = None
        try:
            self._done[digest] = await self._fetch(digest, size, offer)
            self._tell_blob(digest, self._done[digest])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised when all have ended
            failures.append(error)
            fetches.cancel_scope.cancel()  # without this blob the others are of no use now
        finally:
            del self._running[digest]
            places.release()

    # -- telling -------------------------------------------------------------------------------

    async def _tell_regularly(self) -> None:
        while True:
            for digest in self._running:
                tally = self._tally_of(digest)
                if tally is not None:
                    self._tell_blob(digest, tally)
            await trio.sleep(PROGRESS_INTERVAL_S)

    def _tell_blob(self, digest: Digest, tally: FetchTally) -> None:
        status = "verifying sha256 digest" if tally.verifying else f"pulling {short(digest)}"
        state = (status, tally.completed, tally.active_sources, tally.note)
        if self._told.get(digest) == state:
            return
        self._told[digest] = state
        self._tell(
            PullProgress(
                status=status,
                digest=digest,
                total=tally.size,
                completed=tally.completed,
                sources=self._shares(),
                active_sources=tally.active_sources,
                note=tally.note,
            )
        )

    def _tell(self, progress: PullProgress) -> None:
        self._last = progress
        for listener in list(self._listeners):
            listener(progress)

    def _tallies(self) -> list[FetchTally]:
        running = [self._tally_of(digest) for digest in self._running]
        return [*self._done.values(), *(tally for tally in running if tally is not None)]

    def _shares(self) -> tuple[SourceShare, ...]:
        shares: dict[tuple[str, str], SourceShare] = {}
        for tally in self._tallies():
            for share in tally.shares():
                known = shares.get((share.kind, share.name))
                total = share.bytes + (known.bytes if known else 0)
                shares[share.kind, share.name] = replace(share, bytes=total)
        return tuple(sorted(shares.values(), key=lambda share: (-share.bytes, share.name)))

    def _report(self, manifest: Manifest, seconds: float) -> PullReport:
        tallies = self._tallies()
        return PullReport(
            model=str(self.name),
            manifest_digest=manifest.digest,
            bytes_total=manifest.size,
            bytes_fetched=sum(tally.fetched for tally in tallies),
            bytes_refetched=sum(tally.refetched for tally in tallies),
            seconds=seconds,
            sources=self._shares(),
            banned=tuple(dict.fromkeys(peer for tally in tallies for peer in tally.banned)),
        )

"""open_transfer(): what a node's transfer is made of, put together."""

import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any

import trio

from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.content.core.manifest import Manifest
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.discovery import ProviderDirectory
from ollamamax_p2p.errors import LocalTrouble, ModelNotFound, StoreDamaged, code, first_named
from ollamamax_p2p.host import PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.observability import Event, EventFeed
from ollamamax_p2p.transfer.agreements import AgreedMaps, AgreedNames
from ollamamax_p2p.transfer.ban_list import BanList
from ollamamax_p2p.transfer.chunk_streams import StreamCarrier, serve_streams
from ollamamax_p2p.transfer.fetch import BlobFetch, FetchServices, FetchTally, OriginOffer
from ollamamax_p2p.transfer.models_exchange import ModelsExchange, model_key, open_models_exchange
from ollamamax_p2p.transfer.origin import Origin
from ollamamax_p2p.transfer.progress import PullReport
from ollamamax_p2p.transfer.pull import OnProgress, Pull
from ollamamax_p2p.transfer.serve import BlobServer
from ollamamax_p2p.transfer.settings import OriginSettings, TransferSettings
from ollamamax_p2p.transfer.shared_work import SharedWork
from ollamamax_p2p.transfer.unfinished import UnfinishedBlobs

HASHING_THREADS = 2
"""One core hashes 1.5 GB/s, more than a 10 Gb/s link brings; the second hides the waits."""

_log = logging.getLogger(__name__)


class Transfer:
    """Fetches and serves blobs, pulls models. Made by `open_transfer`."""

    def __init__(
        self,
        services: FetchServices,
        server: BlobServer,
        exchange: ModelsExchange,
        origin: Origin | None,
        feed: EventFeed,
        wall_clock: Callable[[], float],
        nursery: trio.Nursery,
        agreed_names: AgreedNames | None = None,
    ) -> None:
        self.bans = services.bans
        """Peers found lying."""
        self._services = services
        self._server = server
        self._exchange = exchange
        self._origin = origin
        self._feed = feed
        self._wall_clock = wall_clock
        self._agreed_names = agreed_names
        self._fetches: dict[Digest, BlobFetch] = {}
        self._pulls: dict[str, Pull] = {}
        self._fetching: SharedWork[Digest, FetchTally] = SharedWork(nursery)
        self._pulling: SharedWork[str, PullReport] = SharedWork(nursery)

    @property
    def bytes_served(self) -> int:
        """Of chunks, to all peers, since this was opened."""
        return self._server.bytes_sent

    async def announce(self, name: ModelName) -> None:
        """Tell the swarm that this node holds a model: its name and its blobs. Raises
        ModelNotFound if it does not.
        """
        manifest = await self._services.store.manifest(name)
        blobs = [digest for digest, _ in manifest.blobs()]
        await self._services.providers.announce([*blobs, model_key(name)])

    async def withdraw(self, name: ModelName, removed: Sequence[Digest]) -> None:
        """Tell the swarm that the model is gone from here, and those of its blobs."""
        await self._services.providers.withdraw([*removed, model_key(name)])

    async def put_manifest(self, name: ModelName, manifest: Manifest) -> None:
        """Name a model here; what only the version before it needed is removed and withdrawn.
        Raises BlobNotFound if a blob of it is missing, LocalTrouble.
        """
        store = self._services.store
        before = await _blobs_of(store, name)
        await store.put_manifest(name, manifest)
        needed = {digest for digest, _ in manifest.blobs()}
        needed.update(*(pull.wanted for pull in self._pulls.values()))
        try:
            removed = await store.remove_unused([d for d in before if d not in needed])
        except LocalTrouble as error:
            _log.warning("%s has a new version; cannot remove the old: %s", name, error)
        else:
            if removed:
                await self._services.providers.withdraw(removed)

    def pulls(self) -> tuple[str, ...]:
        """The models that are being pulled now."""
        return tuple(str(pull.name) for pull in self._pulls.values())

    async def pull(
        self,
        name: str | ModelName,
        *,
        from_origin: bool = False,
        insecure: bool = False,
        on_progress: OnProgress | None = None,
    ) -> PullReport:
        """Fetch a model from whoever has it; who pulls the same one meanwhile shares the pull.

        from_origin: ask the origin, not the members, what the name means now; the bytes may still
        come from peers.
        insecure: this origin may be spoken to by plain http.
        on_progress: called in the event loop with every state; must not block.
        Raises BadName, ModelNotFound, StoreFull and other LocalTrouble, NoSources, OriginTrouble.
        Cancelling keeps what is there, for the next pull.
        """
        model = parse_model_name(name) if isinstance(name, str) else name
        pull = self._pulls.get(model.key)
        if pull is None:
            pull = self._pulls[model.key] = Pull(
                model,
                store=self._services.store,
                exchange=self._exchange,
                origin=self._origin,
                fetch=self._fetch,
                tally_of=self._tally_of,
                put_manifest=self.put_manifest,
                from_origin=from_origin,
                insecure=insecure,
                agreed=self._agreed_names,
            )
        if on_progress is not None:
            pull.add_listener(on_progress)
        try:
            return await self._pulling.run(model.key, partial(self._pull, model, pull))
        finally:
            if on_progress is not None:
                pull.remove_listener(on_progress)

    async def _pull(self, model: ModelName, pull: Pull) -> PullReport:
        self._pulls[model.key] = pull
        self._report("pull.started", model=str(model))
        try:
            report = await pull.run()
        except Exception as error:
            named = first_named(error)
            facts = (code(named), str(named)) if named else ("internal_error", type(error).__name__)
            self._report("pull.failed", model=str(model), error=facts[0], message=facts[1])
            raise
        finally:
            if self._pulls.get(model.key) is pull:
                del self._pulls[model.key]
        await self.announce(model)
        self._report(
            "pull.finished",
            model=str(model),
            bytes_fetched=report.bytes_fetched,
            bytes_refetched=report.bytes_refetched,
            seconds=round(report.seconds, 3),
        )
        return report

    async def fetch(self, digest: Digest, size: int) -> FetchTally:
        """Fetch one blob from peers; nothing to do if it is here. Raises as `pull` does."""
        return await self._fetch(digest, size, None)

    async def _fetch(self, digest: Digest, size: int, offer: OriginOffer | None) -> FetchTally:
        return await self._fetching.run(digest, partial(self._fetch_now, digest, size, offer))

    async def _fetch_now(self, digest: Digest, size: int, offer: OriginOffer | None) -> FetchTally:
        fetch = self._fetches[digest] = BlobFetch(digest, size, self._services, offer)
        try:
            await fetch.run()
        finally:
            del self._fetches[digest]
        return fetch.tally

    def _tally_of(self, digest: Digest) -> FetchTally | None:
        fetch = self._fetches.get(digest)
        return fetch.tally if fetch else None

    def _report(self, kind: str, **facts: Any) -> None:
        at = datetime.fromtimestamp(self._wall_clock(), UTC).isoformat()
        self._feed.report(Event(kind=kind, at=at, facts=facts))


async def _blobs_of(store: BlobStore, name: ModelName) -> list[Digest]:
    """The blobs of what a name stands for now; none if it stands for nothing that can be read."""
    try:
        return [digest for digest, _ in (await store.manifest(name)).blobs()]
    except (ModelNotFound, StoreDamaged):
        return []


@asynccontextmanager
async def open_transfer(
    host: PeerHost,
    store: BlobStore,
    providers: ProviderDirectory,
    settings: TransferSettings,
    *,
    origin: Origin | None,
    connected_peers: Callable[[], Sequence[PeerId]],
    rng: random.Random,
    feed: EventFeed,
    wall_clock: Callable[[], float],
    origin_settings: OriginSettings | None = None,
    agreed_names: AgreedNames | None = None,
    agreed_maps: AgreedMaps | None = None,
) -> AsyncIterator[Transfer]:
    """Serve this node's blobs and fetch others', for as long as the block is open.

    origin: None if no registry is to be asked.
    connected_peers: the members connected now.
    wall_clock: Unix seconds, for events.
    agreed_names: what names mean; None where nothing is agreed on, then most members decide.
    agreed_maps: how blobs are cut; None where nothing is agreed on, then most holders decide.
    """
    bans = BanList(feed, wall_clock)
    unfinished = UnfinishedBlobs()
    async with (
        trio.open_nursery() as nursery,
        open_models_exchange(
            host, store, connected_peers, providers, bans.ban, bans.__contains__, wall_clock
        ) as exchange,
    ):
        server = BlobServer(store, unfinished, settings, nursery)
        services = FetchServices(
            own_id=host.peer_id,
            store=store,
            providers=providers,
            carrier=StreamCarrier(host),
            unfinished=unfinished,
            bans=bans,
            connected_peers=connected_peers,
            settings=settings,
            origin_connections=(origin_settings or OriginSettings()).connections,
            hashing=trio.CapacityLimiter(HASHING_THREADS),
            rng=rng,
            agreed_maps=agreed_maps,
        )
        serve_streams(host, server.serve)
        names = [model_key(model.name) for model in await store.models()]
        await providers.announce([*await store.blobs(), *names])
        yield Transfer(services, server, exchange, origin, feed, wall_clock, nursery, agreed_names)
        nursery.cancel_scope.cancel()

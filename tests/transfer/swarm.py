"""A small swarm on the simulated network: nodes with a store in memory and a transfer each."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import trio

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.content.core.digest import Digest, digest_of
from ollamamax_p2p.content.core.manifest import Layer, Manifest, build_manifest
from ollamamax_p2p.host import (
    LinkConditions,
    MessageStream,
    SimulatedHost,
    SimulatedNetwork,
    open_simulated_network,
)
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.transfer import Origin, Transfer, TransferSettings, open_transfer
from ollamamax_p2p.transfer.agreements import AgreedMaps
from ollamamax_p2p.transfer.core.messages import (
    FromFetcher,
    FromSource,
    fetcher_codec,
    source_codec,
)
from ollamamax_p2p.wire import protocol_ids

MiB = 1024 * 1024


def some_bytes(size: int, *, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class Directory:
    """Who announced what, for the whole swarm at once: discovery without a network."""

    def __init__(self) -> None:
        self.holders: dict[Digest, dict[PeerId, None]] = {}
        self.hosts: dict[PeerId, SimulatedHost] = {}
        self.dials = False
        """Whether `find` connects to the holders, as the real ones do."""

    def of(self, host: SimulatedHost) -> "DirectoryOf":
        self.hosts[host.peer_id] = host
        return DirectoryOf(self, host)


class DirectoryOf:
    """One node's view."""

    def __init__(self, directory: Directory, host: SimulatedHost) -> None:
        self._directory = directory
        self._host = host

    async def announce(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            self._directory.holders.setdefault(digest, {})[self._host.peer_id] = None

    async def withdraw(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            self._directory.holders.get(digest, {}).pop(self._host.peer_id, None)

    async def find(self, digest: Digest) -> Sequence[PeerId]:
        known = self._directory.holders.get(digest, {})
        if self._directory.dials:
            for peer in known:
                other = self._directory.hosts[peer]
                await self._host.connect(other.addresses)
                self._host.admit(peer)
                other.admit(self._host.peer_id)
        connected = {connection.peer for connection in self._host.connections()}
        return [peer for peer in known if peer in connected][:32]


@dataclass
class Node:
    host: SimulatedHost
    store: RamStore
    transfer: Transfer
    feed: EventFeed

    @property
    def id(self) -> PeerId:
        return self.host.peer_id

    def start_fetch(self, nursery: trio.Nursery, data: bytes) -> trio.Event:
        """Fetch in the background; the event tells that it has succeeded."""
        done = trio.Event()

        async def fetch() -> None:
            await self.transfer.fetch(digest_of(data), len(data))
            done.set()

        nursery.start_soon(fetch)
        return done


class Swarm:
    """Everybody is connected to everybody and admitted."""

    def __init__(self, network: SimulatedNetwork, stack: AsyncExitStack, seed: int) -> None:
        self.network = network
        self.directory = Directory()
        self.hosts: list[SimulatedHost] = []
        self._stack = stack
        self._seed = seed

    async def add_host(self, **rates: float) -> SimulatedHost:
        host = self.network.add_host(f"node {len(self.hosts)}", **rates)
        for other in self.hosts:
            await host.connect(other.addresses)
            host.admit(other.peer_id)
            other.admit(host.peer_id)
        self.hosts.append(host)
        return host

    async def add(
        self,
        *,
        holding: Sequence[bytes] = (),
        settings: TransferSettings | None = None,
        origin: Origin | None = None,
        store: RamStore | None = None,
        agreed_maps: AgreedMaps | None = None,
        **rates: float,
    ) -> Node:
        host = await self.add_host(**rates)
        return await self.start(
            host,
            holding=holding,
            settings=settings,
            origin=origin,
            store=store,
            agreed_maps=agreed_maps,
        )

    async def start(
        self,
        host: SimulatedHost,
        *,
        holding: Sequence[bytes] = (),
        settings: TransferSettings | None = None,
        origin: Origin | None = None,
        store: RamStore | None = None,
        agreed_maps: AgreedMaps | None = None,
    ) -> Node:
        store = store or RamStore()
        for data in holding:
            await store.put(data)
        feed = EventFeed()
        transfer = await self._stack.enter_async_context(
            open_transfer(
                host,
                store,
                self.directory.of(host),
                settings or TransferSettings(),
                origin=origin,
                connected_peers=lambda: [c.peer for c in host.connections() if c.admitted],
                rng=random.Random(f"{self._seed} {host.peer_id}"),
                feed=feed,
                wall_clock=lambda: 1_800_000_000.0,
                agreed_maps=agreed_maps,
            )
        )
        return Node(host, store, transfer, feed)

    async def add_evil(
        self,
        behave: Callable[["EvilStream"], Awaitable[None]],
        *,
        claims: Sequence[Digest] = (),
        **rates: float,
    ) -> SimulatedHost:
        """A peer that speaks the protocol as `behave` likes, and says that it holds `claims`."""
        host = await self.add_host(**rates)

        async def handle(stream) -> None:
            await behave(
                MessageStream[FromSource, FromFetcher](
                    stream, sends=source_codec, receives=fetcher_codec
                )
            )

        host.set_handler(protocol_ids.TRANSFER, handle)
        await self.directory.of(host).announce(claims)
        return host


EvilStream = MessageStream[FromSource, FromFetcher]


@asynccontextmanager
async def open_swarm(seed: int, conditions: LinkConditions | None = None) -> AsyncIterator[Swarm]:
    async with (
        open_simulated_network(
            rng=random.Random(seed), conditions=conditions or LinkConditions()
        ) as network,
        AsyncExitStack() as stack,
    ):
        yield Swarm(network, stack, seed)


def model_of(*blobs: bytes, config: bytes = b"{}") -> Manifest:
    layers = [
        Layer("application/vnd.ollama.image.model", digest_of(blob), len(blob)) for blob in blobs
    ]
    return build_manifest(
        Layer("application/vnd.docker.container.image.v1+json", digest_of(config), len(config)),
        layers,
    )

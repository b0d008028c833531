"""Whole nodes in one process, on a simulated network and the virtual clock.

    def test_two_nodes_pull_from_a_third():
        async def story():
            async with open_simulated_swarm(3, seed=1) as swarm:
                model = swarm.make_model(bytes_total=8 * MiB)
                await swarm.nodes[0].hold(model)
                async with trio.open_nursery() as nursery:
                    for node in swarm.nodes[1:]:
                        nursery.start_soon(node.pull, model)
        run_simulation(story, seed=1)

A node is what `open_node` runs, less the HTTP API, mDNS and Kademlia: links and heartbeats, finder,
provider records, transfer, and a store in memory that outlives the node's death. All nodes are
members of one private swarm from the start. While the block is open the invariants are checked
every virtual second, and once more at its end.

Run it with `run_simulation` or inside `deterministic(seed)`: else threads make the clock jump.
"""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import trio

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.content.core.chunk_map import ChunkMap
from ollamamax_p2p.content.core.digest import Digest, digest_of
from ollamamax_p2p.content.core.manifest import (
    CONFIG_TYPE,
    MODEL_TYPE,
    Layer,
    Manifest,
    build_manifest,
)
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.discovery import Discovery, DiscoverySettings, open_discovery
from ollamamax_p2p.errors import OmxError
from ollamamax_p2p.host import (
    Connections,
    HostSettings,
    LinkConditions,
    SimulatedHost,
    SimulatedNetwork,
    open_connections,
    open_simulated_network,
)
from ollamamax_p2p.identity import Address, Membership
from ollamamax_p2p.observability import Event, EventFeed
from ollamamax_p2p.testing.agreed_members import AgreedMembers
from ollamamax_p2p.testing.faults import Fault, FaultKind, FaultSchedule, Lie
from ollamamax_p2p.testing.invariants import Invariants, PullRecord
from ollamamax_p2p.testing.lying_source import LyingSource
from ollamamax_p2p.transfer import (
    Origin,
    PullProgress,
    PullReport,
    Transfer,
    TransferSettings,
    open_transfer,
)
from ollamamax_p2p.wire import protocol_ids

MiB = 1024 * 1024

STARTS_AT_UNIX_S = 1_767_225_600
"""The wall clock when a simulation begins: 2026-01-01."""

CHECK_INTERVAL_S = 1.0
"""How often everything visible is checked. Blobs are hashed once, so this is cheap."""

FLAP_INTERVAL_S = 3.0
"""Between two resets of a flapping node: less than a heartbeat's timeout."""


class NodeDied(Exception):
    """What was asked of a node ended with the node: it was killed meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmSettings:
    """What the nodes of a simulated swarm are like."""

    upload_bytes_s: float = 12_500_000.0
    """Of each node; 100 Mbit/s."""

    download_bytes_s: float = 12_500_000.0
    """Of each node."""

    link: LinkConditions = field(default_factory=LinkConditions)
    """Between any two."""

    bootstrap_peers: int = 4
    """How many others each node knows from the start, drawn at random, besides the first node,
    whose tickets all have joined by; each is told of more.
    """

    host: HostSettings = field(default_factory=HostSettings)
    discovery: DiscoverySettings = field(
        default_factory=lambda: DiscoverySettings(mdns=False, dht=False)
    )
    """Without mDNS and Kademlia, which need real networks; bootstrap is each node's own."""

    transfer: TransferSettings = field(default_factory=TransferSettings)


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """A model of random bytes."""

    name: ModelName
    manifest: Manifest
    blobs: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """Bytes of all its blobs."""
        return self.manifest.size


class SimulatedNode:
    """One node; running, unless it was killed."""

    def __init__(
        self,
        swarm: "SimulatedSwarm",
        number: int,
        host: SimulatedHost,
        bootstrap: Sequence[Address],
    ) -> None:
        self.number = number
        self.name = host.name
        self.host = host
        self.store = RamStore(now=swarm.utc_now)
        self.events: list[Event] = []
        """Everything it reported, over all its lives."""
        self.bootstrap = tuple(map(str, bootstrap))
        self.liar: LyingSource | None = None
        self._swarm = swarm
        self._services: _Services | None = None
        self._tasks: dict[trio.CancelScope, None] = {}
        self._ended = trio.Event()

    def __repr__(self) -> str:
        return f"<{self.name}>"

    # -- what a user does with it

    @property
    def running(self) -> bool:
        """Whether it was started and has not been killed."""
        return self._services is not None

    @property
    def connections(self) -> Connections:
        """Its links. Raises NodeDied."""
        return self._alive.connections

    @property
    def transfer(self) -> Transfer:
        """What pulls and serves. Raises NodeDied."""
        return self._alive.transfer

    async def hold(self, model: SimulatedModel) -> None:
        """Have the model as if it had been imported, and tell the others. Raises NodeDied."""
        for blob in model.blobs:
            await self.store.put(blob)
        await self.store.put_manifest(model.name, model.manifest)
        await self.transfer.announce(model.name)

    async def holds(self, model: SimulatedModel) -> bool:
        """Whether the model is whole in its store."""
        names = [stored.name for stored in await self.store.models()]
        return model.name in names

    async def bytes_kept(self, model: SimulatedModel) -> int:
        """How much of the model is in its store, unfinished blobs included; call it between pulls
        or while the node is down.
        """
        kept = 0
        for digest, size in model.manifest.blobs():
            if await self.store.has(digest):
                kept += size
            elif digest in await self.store.partials():
                async with await self.store.partial(digest, size) as partial_blob:
                    missing = sum(end - start for start, end in partial_blob.missing())
                    kept += size - missing
        return kept

    async def pull(
        self,
        model: SimulatedModel,
        *,
        on_progress: Callable[[PullProgress], None] | None = None,
    ) -> PullReport:
        """Pull it by its name. Raises what `Transfer.pull` raises, or NodeDied."""
        record = self._swarm.pull_begins(self, model)
        scope = trio.CancelScope()
        self._tasks[scope] = None
        try:
            with scope:
                record.report = await self.transfer.pull(
                    model.name, on_progress=on_progress or _ignore
                )
                return record.report
            record.abandoned = "the node died"
            raise NodeDied(self.name)
        except OmxError as error:
            record.error = error
            raise
        except trio.Cancelled:
            record.abandoned = "cancelled"
            raise
        finally:
            self._tasks.pop(scope, None)
            self._swarm.pull_ended(record)

    # -- what happens to it

    async def start(self) -> None:
        """Run it; returns when its services are up."""
        await self._swarm.nursery.start(self._live)

    async def kill(self) -> None:
        """It is gone from one moment to the next; its store keeps what it has."""
        self._swarm.trouble()
        self._swarm.network.kill(self.host)
        if self.running:
            for scope in self._tasks:
                scope.cancel()
            await self._ended.wait()

    async def revive(self) -> None:
        """Start a killed node again, with its store."""
        self._swarm.trouble()
        self._swarm.network.revive(self.host)
        await self.start()

    def lie(self, lie: Lie) -> None:
        """From now on its chunks and maps are lies; all else it does stays honest. What it lies
        about are the blobs that it holds.
        """
        self.liar = LyingSource(lie, self._honest_copy)
        if self.running:
            self.host.set_handler(protocol_ids.TRANSFER, self.liar.answer)

    @property
    def _alive(self) -> "_Services":
        if self._services is None:
            raise NodeDied(self.name)
        return self._services

    async def _honest_copy(self, digest: Digest) -> tuple[bytes, ChunkMap] | None:
        if not await self.store.has(digest):
            return None
        async with await self.store.open(digest) as reader:
            data = await reader.read_at(0, reader.size)
        return data, await self.store.chunk_map(digest)

    async def _live(self, task_status: trio.TaskStatus[None]) -> None:
        life = trio.CancelScope()
        self._tasks[life] = None
        self._ended = trio.Event()
        try:
            with life:
                async with self._swarm.open_services(self) as services:
                    self._services = services
                    if self.liar is not None:
                        self.host.set_handler(protocol_ids.TRANSFER, self.liar.answer)
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self._services = None
            self._tasks.pop(life, None)
            self._ended.set()


class SimulatedSwarm:
    """The nodes and what is between them. Made by `open_simulated_swarm`."""

    def __init__(
        self,
        network: SimulatedNetwork,
        nursery: trio.Nursery,
        *,
        rng: random.Random,
        settings: SwarmSettings,
        origin: Origin | None,
    ) -> None:
        self.network = network
        self.nursery = nursery
        self.rng = rng
        self.settings = settings
        self.nodes: list[SimulatedNode] = []
        self.invariants = Invariants(in_flight_bytes_max=settings.transfer.in_flight_bytes_max)
        self.troubles = 0
        """How many things have gone wrong so far, counted by whom they happened to."""
        self._origin = origin
        self._membership = Membership.create(None, token_bytes=rng.randbytes)
        self._members = AgreedMembers(self.wall_clock)
        self._models = 0

    # -- building it

    async def add_nodes(self, count: int) -> list[SimulatedNode]:
        """Start so many more nodes; each knows some that were there before it or come with it."""
        settings = self.settings
        hosts = [
            self.network.add_host(
                f"node {len(self.nodes) + n}",
                swarm_key=self._membership.swarm_key,
                upload_bytes_s=settings.upload_bytes_s,
                download_bytes_s=settings.download_bytes_s,
            )
            for n in range(count)
        ]
        for host in hosts:
            self._members.add(host.peer_id)
        known = [*(node.host for node in self.nodes), *hosts]
        added = []
        for host in hosts:
            others = [other for other in known[1:] if other is not host]
            drawn = self.rng.sample(others, min(settings.bootstrap_peers, len(others)))
            bootstrap = [other.addresses[0] for other in [known[0], *drawn] if other is not host]
            added.append(SimulatedNode(self, len(self.nodes), host, bootstrap))
            self.nodes.append(added[-1])
        async with trio.open_nursery() as nursery:
            for node in added:
                nursery.start_soon(node.start)
        return added

    def make_model(self, *, bytes_total: int) -> SimulatedModel:
        """A new model; no node holds it yet. bytes_total: about."""
        self._models += 1
        config = b'{"model_format":"gguf","model_family":"simulated %d"}' % self._models
        weights = self.rng.randbytes(bytes_total)
        manifest = build_manifest(
            Layer(CONFIG_TYPE, digest_of(config), len(config)),
            [Layer(MODEL_TYPE, digest_of(weights), len(weights))],
        )
        name = parse_model_name(f"simulated{self._models}:latest")
        return SimulatedModel(name, manifest, (weights, config))

    async def settle(self, seconds: float = 5.0) -> None:
        """Let links be made and announcements arrive."""
        await trio.sleep(seconds)

    # -- what goes wrong

    def trouble(self, count: int = 1) -> None:
        """Something has gone wrong, or was mended: either may cost a pull what is in flight."""
        self.troubles += count

    async def freeze(self, node: SimulatedNode, seconds: float) -> None:
        """The node stands still for so long, and then goes on."""
        self.trouble()
        self.network.freeze(node.host)
        await trio.sleep(seconds)
        self.network.thaw(node.host)
        self.trouble()

    async def flap(self, node: SimulatedNode, seconds: float) -> None:
        """All the node's connections are reset, again and again, for so long."""
        ends_at = trio.current_time() + seconds
        while trio.current_time() < ends_at:
            for connection in node.host.connections():
                self.trouble()
                self.network.drop(node.host, self.network.host_of(connection.peer))
            await trio.sleep(FLAP_INTERVAL_S)

    async def cut_off(self, nodes: Sequence[SimulatedNode], seconds: float) -> None:
        """These nodes and all others cannot reach one another for so long."""
        self.trouble(len(self.nodes))
        partition = self.network.partition([node.host for node in nodes])
        await trio.sleep(seconds)
        self.network.heal(partition)
        self.trouble(len(self.nodes))

    async def restart(self, node: SimulatedNode, seconds: float) -> None:
        """Kill the node, and start it again after so long."""
        await node.kill()
        await trio.sleep(seconds)
        if not node.running:
            await node.revive()

    async def play(self, schedule: FaultSchedule) -> None:
        """Let everything happen as drawn; returns when the schedule is over, even if its last fault
        would have hit a node that was down and so did not happen.

        Its liars begin to lie at once.
        """
        for number, lie in schedule.liars:
            self.trouble()
            self.nodes[number].lie(lie)
        begun_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            for fault in schedule.faults:
                await trio.sleep_until(begun_at + fault.at_s)
                nursery.start_soon(self._inflict, fault)
            await trio.sleep_until(begun_at + schedule.over_at_s)

    async def _inflict(self, fault: Fault) -> None:
        nodes = [self.nodes[number] for number in fault.nodes]
        if not all(node.running for node in nodes):
            return  # it is down already, which is worse
        match fault.kind:
            case FaultKind.VANISH:
                await nodes[0].kill()
            case FaultKind.REJOIN:
                await self.restart(nodes[0], fault.lasts_s)
            case FaultKind.STALL:
                await self.freeze(nodes[0], fault.lasts_s)
            case FaultKind.FLAP:
                await self.flap(nodes[0], fault.lasts_s)
            case FaultKind.PARTITION:
                await self.cut_off(nodes, fault.lasts_s)

    # -- what nodes ask of it

    def pull_begins(self, node: SimulatedNode, model: SimulatedModel) -> PullRecord:
        """Note it for the invariants."""
        record = PullRecord(node.name, model.name, trio.current_time(), self.troubles)
        self.invariants.pulls.append(record)
        return record

    def pull_ended(self, record: PullRecord) -> None:
        """Note it, and check it."""
        record.ended_at = trio.current_time()
        record.troubles = self.troubles - record.troubles_before
        self.invariants.check_pull(record)

    def wall_clock(self) -> float:
        """Unix seconds."""
        return STARTS_AT_UNIX_S + trio.current_time()

    def utc_now(self) -> datetime:
        """The same as a datetime."""
        return datetime.fromtimestamp(self.wall_clock(), UTC)

    def _dice(self) -> random.Random:
        return random.Random(self.rng.getrandbits(64))

    @asynccontextmanager
    async def open_services(self, node: SimulatedNode) -> AsyncIterator["_Services"]:
        """One life of a node."""
        feed = EventFeed()
        settings = self.settings
        membership = self._membership
        learned: list[Callable[[Sequence[Address]], None]] = []

        def on_addresses(addresses: Sequence[Address]) -> None:
            for learn in learned:
                learn(addresses)

        async with (
            open_connections(
                node.host,
                membership,
                settings.host,
                rng=self._dice(),
                feed=feed,
                agent=f"simulated {node.name}",
                wall_clock=self.wall_clock,
                on_addresses=on_addresses,
                gate=self._members,
            ) as connections,
            open_discovery(
                node.host,
                connections,
                membership.mdns_fingerprint(),
                replace(settings.discovery, bootstrap=node.bootstrap),
                data_dir=None,
                rng=self._dice(),
                feed=feed,
                wall_clock=self.wall_clock,
            ) as discovery,
            open_transfer(
                node.host,
                node.store,
                discovery.providers,
                settings.transfer,
                origin=self._origin,
                connected_peers=lambda: [status.peer for status in connections.peers()],
                rng=self._dice(),
                feed=feed,
                wall_clock=self.wall_clock,
            ) as transfer,
            trio.open_nursery() as nursery,
        ):
            learned.append(discovery.learn)
            await nursery.start(_collect, feed, node.events)
            yield _Services(connections, discovery, transfer)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_simulated_swarm(
    count: int,
    *,
    seed: int,
    settings: SwarmSettings = SwarmSettings(),
    origin: Origin | None = None,
    trace: Callable[[str], None] | None = None,
) -> AsyncIterator[SimulatedSwarm]:
    """So many running nodes, linked, for as long as the block is open.

    seed: of all dice: the network's, every node's, the models' bytes.
    origin: what every node asks for models that no node has; None: nothing.
    trace: is given a line for whatever happens to a connection.
    Raises InvariantBroken, inside or at the end of the block.
    """
    rng = random.Random(seed)
    network_rng = random.Random(rng.getrandbits(64))
    async with (
        open_simulated_network(rng=network_rng, conditions=settings.link, trace=trace) as network,
        trio.open_nursery() as nursery,
    ):
        swarm = SimulatedSwarm(network, nursery, rng=rng, settings=settings, origin=origin)
        await swarm.add_nodes(count)
        await swarm.settle()
        nursery.start_soon(_check_all_the_time, swarm)
        yield swarm
        await swarm.invariants.check(swarm.nodes)
        swarm.invariants.check_all_ended()
        nursery.cancel_scope.cancel()


def small_steps(settings: SwarmSettings = SwarmSettings(), *, chunks: int = 4) -> SwarmSettings:
    """The same settings with little in flight, so that faults hit small models in the middle and
    the bound on bytes fetched again is tight. chunks: of a mebibyte, in flight in one pull.
    """
    transfer = replace(
        settings.transfer,
        requests_in_flight_bytes=max(1, chunks // 2) * MiB,
        in_flight_bytes_max=chunks * MiB,
    )
    return replace(settings, transfer=transfer)


@dataclass(frozen=True, slots=True)
class _Services:
    """What a node runs while it lives."""

    connections: Connections
    discovery: Discovery
    transfer: Transfer


async def _check_all_the_time(swarm: SimulatedSwarm) -> None:
    while True:
        await trio.sleep(CHECK_INTERVAL_S)
        await swarm.invariants.check(swarm.nodes)


async def _collect(
    feed: EventFeed, events: list[Event], task_status: trio.TaskStatus[None]
) -> None:
    async with feed.subscribe() as subscription:
        task_status.started()
        async for event in subscription:
            events.append(event)


def _ignore(progress: PullProgress) -> None:
    """For pulls that nobody watches."""

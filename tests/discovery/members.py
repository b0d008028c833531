"""Members of one swarm on a simulated network, with discovery, for tests."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from ollamamax_p2p.discovery import (
    Discovery,
    DiscoverySettings,
    SwarmProviders,
    open_discovery,
    open_swarm_providers,
)
from ollamamax_p2p.host import (
    Connections,
    HostSettings,
    SimulatedHost,
    SimulatedNetwork,
    open_connections,
    open_simulated_network,
)
from ollamamax_p2p.identity import Membership, PeerId


@dataclass
class Member:
    host: SimulatedHost
    connections: Connections
    providers: SwarmProviders | None = None
    discovery: Discovery | None = None

    @property
    def peer(self) -> PeerId:
        return self.host.peer_id

    def linked(self) -> set[PeerId]:
        return {status.peer for status in self.connections.peers()}

    async def link(self, other: "Member") -> None:
        await self.connections.reach(other.host.addresses)


class Swarm:
    """Makes members; everything ends with the block that made it."""

    def __init__(self, network: SimulatedNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self.membership = Membership.create(None)
        self._nursery = nursery
        self._count = 0

    async def _open(self, block):
        """Open a block in a task of its own: a fixture's task may not be the test's."""

        async def hold(*, task_status) -> None:
            async with block as opened:
                task_status.started(opened)
                await trio.sleep_forever()

        return await self._nursery.start(hold)

    async def add(self, membership: Membership | None = None) -> Member:
        """A member with connections only."""
        self._count += 1
        learnt = []
        host = self.network.add_host(f"member {self._count}")
        connections = await self._open(
            open_connections(
                host,
                membership or self.membership,
                HostSettings(),
                rng=random.Random(self._count),
                feed=None,
                agent="test",
                wall_clock=trio.current_time,
                on_addresses=lambda addresses: [learn(addresses) for learn in learnt],
            )
        )
        member = Member(host, connections)
        member.learnt = learnt
        return member

    async def add_with_providers(self, **settings) -> Member:
        member = await self.add()
        member.providers = await self._open(
            open_swarm_providers(
                member.host,
                member.connections,
                DiscoverySettings(**settings),
                rng=random.Random(self._count),
            )
        )
        return member

    async def add_with_discovery(self, *, data_dir=None, wall_clock=None, **settings) -> Member:
        member = await self.add()
        member.discovery = await self._open(
            open_discovery(
                member.host,
                member.connections,
                self.membership.mdns_fingerprint(),
                DiscoverySettings(mdns=False, **settings),
                data_dir=data_dir,
                rng=random.Random(self._count),
                feed=None,
                wall_clock=wall_clock or trio.current_time,
            )
        )
        member.learnt.append(member.discovery.learn)
        return member


@asynccontextmanager
async def open_swarm() -> AsyncIterator[Swarm]:
    async with (
        open_simulated_network(rng=random.Random(7)) as network,
        trio.open_nursery() as nursery,
    ):
        yield Swarm(network, nursery)
        nursery.cancel_scope.cancel()

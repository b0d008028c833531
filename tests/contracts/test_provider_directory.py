"""What every ProviderDirectory does. An implementation joins by a factory in `IMPLEMENTATIONS`."""

import hashlib
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
import trio
import trio.testing

from ollamamax_p2p.cluster import AgreedProviders, open_shared_catalogue
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.discovery import (
    DiscoverySettings,
    ProviderDirectory,
    open_dht,
    open_swarm_providers,
)
from ollamamax_p2p.host import (
    HostSettings,
    PeerHost,
    SimulatedNetwork,
    open_connections,
    open_libp2p_host,
    open_simulated_network,
)
from ollamamax_p2p.identity import Membership
from ollamamax_p2p.testing.determinism import deterministic, run_on_virtual_clock
from tests.cluster.whole_clusters import Machines, open_machines, same_state

BLOB = digest_of(b"a blob")
OTHER = digest_of(b"another blob")


@dataclass
class Member:
    host: PeerHost
    connections: object
    providers: ProviderDirectory

    async def link(self, other: "Member") -> None:
        await self.connections.reach(other.host.addresses)


class Swarm(Protocol):
    """Members of one implementation, for the length of a test."""

    async def add(self) -> Member:
        """A new member, linked with nobody."""

    async def settle(self) -> None:
        """Wait until what was announced has been told."""


class SimulatedSwarm:
    """`swarm_providers` on a simulated network."""

    def __init__(self, network: SimulatedNetwork, stack: AsyncExitStack) -> None:
        self.network = network
        self._stack = stack
        self._founder = Membership.create(None)
        self._count = 0

    async def add(self) -> Member:
        self._count += 1
        rng = random.Random(self._count)
        host = self.network.add_host(f"member {self._count}")
        connections = await self._stack.enter_async_context(
            links(host, self._founder, HostSettings(), rng)
        )
        providers = await self._stack.enter_async_context(
            open_swarm_providers(host, connections, DiscoverySettings(), rng=rng)
        )
        return Member(host, connections, providers)

    async def settle(self) -> None:
        await trio.sleep(2)


@asynccontextmanager
async def simulated_swarm() -> AsyncIterator[SimulatedSwarm]:
    async with (
        open_simulated_network(rng=random.Random(7)) as network,
        AsyncExitStack() as stack,
    ):
        yield SimulatedSwarm(network, stack)


class DhtSwarm:
    """`dht` over TCP on loopback."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._founder = Membership.create(None)
        self._members: list[Member] = []

    async def add(self) -> Member:
        enter = self._stack.enter_async_context
        settings = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))
        number = len(self._members)
        seed = hashlib.sha256(f"dht {number}".encode()).digest()
        host = await enter(open_libp2p_host(seed, settings, swarm_key=self._founder.swarm_key))
        connections = await enter(links(host, self._founder, settings, random.Random(number)))
        dht = await enter(open_dht(host, connections, host.libp2p))
        self._members.append(Member(host, connections, dht))
        return self._members[-1]

    async def settle(self) -> None:
        with trio.fail_after(60):
            while any(member.providers.waiting for member in self._members):  # noqa: ASYNC110 - no event
                await trio.sleep(0.05)


@asynccontextmanager
async def dht_swarm() -> AsyncIterator[DhtSwarm]:
    async with AsyncExitStack() as stack:
        yield DhtSwarm(stack)


class AgreedSwarm:
    """`AgreedProviders` over `swarm_providers`: what the catalogue knows comes on top."""

    def __init__(self, folder: Path, stack: AsyncExitStack, machines: Machines) -> None:
        self._stack = stack
        self._machines = machines
        self._given = 0

    async def add(self) -> Member:
        if self._given:
            await self._machines.add(may_vote=False)
            await same_state(*self._machines.all)  # or those that do not know it yet refuse it
        machine = self._machines[self._given]
        self._given += 1
        assert machine.connections is not None
        enter = self._stack.enter_async_context
        rng = random.Random(self._given)
        providers = await enter(
            open_swarm_providers(machine.host, machine.connections, DiscoverySettings(), rng=rng)
        )
        catalogue = await enter(open_shared_catalogue(machine.up))
        agreed = AgreedProviders(providers, catalogue, machine.connections)
        return Member(machine.host, machine.connections, agreed)

    async def settle(self) -> None:
        await trio.sleep(8)


@asynccontextmanager
async def agreed_swarm() -> AsyncIterator[AgreedSwarm]:
    with tempfile.TemporaryDirectory() as folder, deterministic(1):
        async with open_machines(Path(folder)) as machines, AsyncExitStack() as stack:
            yield AgreedSwarm(Path(folder), stack, machines)


def links(host: PeerHost, membership: Membership, settings: HostSettings, rng: random.Random):
    return open_connections(
        host, membership, settings, rng=rng, feed=None, agent="test", wall_clock=lambda: 0.0
    )


Open = Callable[[], AbstractAsyncContextManager[Swarm]]

IMPLEMENTATIONS = [
    pytest.param(
        simulated_swarm, id="swarm_providers", marks=pytest.mark.trio(run=run_on_virtual_clock)
    ),
    pytest.param(dht_swarm, id="dht", marks=pytest.mark.network),
    pytest.param(agreed_swarm, id="agreed", marks=pytest.mark.trio(run=run_on_virtual_clock)),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def open_swarm(request) -> Open:
    return request.param


async def test_a_holder_that_announced_is_found(open_swarm):
    async with open_swarm() as swarm:
        holder, seeker = await swarm.add(), await swarm.add()
        await seeker.link(holder)
        await holder.providers.announce([BLOB])
        await swarm.settle()
        assert await seeker.providers.find(BLOB) == [holder.host.peer_id]


async def test_what_was_announced_before_the_link_is_found_after_it(open_swarm):
    async with open_swarm() as swarm:
        holder, seeker = await swarm.add(), await swarm.add()
        await holder.providers.announce([BLOB])
        await seeker.link(holder)
        await swarm.settle()
        assert await seeker.providers.find(BLOB) == [holder.host.peer_id]


async def test_a_blob_that_nobody_holds_has_no_holders_and_the_answer_comes_in_time(open_swarm):
    async with open_swarm() as swarm:
        one, other = await swarm.add(), await swarm.add()
        await one.link(other)
        await other.providers.announce([OTHER])
        await swarm.settle()
        with trio.fail_after(20):
            assert await one.providers.find(BLOB) == []


async def test_a_node_alone_finds_nobody(open_swarm):
    async with open_swarm() as swarm:
        alone = await swarm.add()
        await alone.providers.announce([BLOB])
        with trio.fail_after(20):
            assert await alone.providers.find(BLOB) == []


async def test_a_node_never_finds_itself(open_swarm):
    async with open_swarm() as swarm:
        one, other = await swarm.add(), await swarm.add()
        await one.link(other)
        await one.providers.announce([BLOB])
        await other.providers.announce([BLOB])
        await swarm.settle()
        assert await one.providers.find(BLOB) == [other.host.peer_id]


async def test_a_holder_two_steps_away_is_found_and_connected(open_swarm):
    async with open_swarm() as swarm:
        holder, middle, seeker = await swarm.add(), await swarm.add(), await swarm.add()
        await middle.link(holder)
        await seeker.link(middle)
        await holder.providers.announce([BLOB])
        await swarm.settle()
        assert await seeker.providers.find(BLOB) == [holder.host.peer_id]
        assert holder.host.peer_id in {c.peer for c in seeker.host.connections()}


async def test_announcing_twice_is_announcing_once(open_swarm):
    async with open_swarm() as swarm:
        holder, seeker = await swarm.add(), await swarm.add()
        await seeker.link(holder)
        await holder.providers.announce([BLOB, BLOB])
        await holder.providers.announce([BLOB])
        await swarm.settle()
        assert await seeker.providers.find(BLOB) == [holder.host.peer_id]


async def test_withdrawing_what_was_never_announced_does_nothing(open_swarm):
    async with open_swarm() as swarm:
        holder, seeker = await swarm.add(), await swarm.add()
        await seeker.link(holder)
        await holder.providers.announce([BLOB])
        await holder.providers.withdraw([OTHER])
        await swarm.settle()
        assert await seeker.providers.find(BLOB) == [holder.host.peer_id]


@pytest.mark.parametrize("open_swarm", IMPLEMENTATIONS[:1], indirect=True)
async def test_at_most_32_holders_are_found(open_swarm):
    # Of 34 nodes, so on the simulated network only: on real hosts they take a minute.
    async with open_swarm() as swarm:
        seeker = await swarm.add()
        for _ in range(34):
            holder = await swarm.add()
            await holder.providers.announce([BLOB])
            await holder.link(seeker)
        await swarm.settle()
        found = await seeker.providers.find(BLOB)
        assert len(found) == len(set(found)) == 32

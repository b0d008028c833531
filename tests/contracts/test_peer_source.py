"""What every PeerSource does. An implementation joins by a factory in `SOURCES`."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from ollamamax_p2p.discovery import DiscoverySettings, PeerSource, open_dht
from ollamamax_p2p.discovery.core.address_book import SOURCE_RANKS
from ollamamax_p2p.discovery.mdns import open_mdns
from ollamamax_p2p.discovery.static_peers import StaticPeers
from ollamamax_p2p.host import HostSettings, open_connections, open_libp2p_host
from ollamamax_p2p.identity import Address, Membership, parse_address, peer_id_of

BUDGET_S = 30
LOOPBACK = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))


def address_of(number: int) -> Address:
    return parse_address(f"/ip4/127.0.0.1/tcp/4011/p2p/{peer_id_of(bytes([number]) * 32)}")


@asynccontextmanager
async def static_peers() -> AsyncIterator[tuple[PeerSource, Address, Address]]:
    yield StaticPeers([address_of(1)]), address_of(1), address_of(2)


@asynccontextmanager
async def mdns() -> AsyncIterator[tuple[PeerSource, Address, Address]]:
    swarm = random.SystemRandom().randbytes(8).hex()
    async with mdns_node(2, swarm) as source, mdns_node(1, swarm):
        yield source, address_of(1), address_of(2)


def mdns_node(number: int, swarm: str):
    return open_mdns(
        lambda: [address_of(number)],
        address_of(number).peer,
        swarm,
        DiscoverySettings(mdns_interfaces=("127.0.0.1",)),
        rng=random.SystemRandom(),
        unavailable=pytest.fail,
    )


@asynccontextmanager
async def dht() -> AsyncIterator[tuple[PeerSource, Address, Address]]:
    membership = Membership.create(None)
    async with (
        dht_node(1, membership) as (there, _, _),
        dht_node(2, membership) as (here, connections, source),
    ):
        await connections.reach(there.addresses)
        yield source, there.addresses[0], here.addresses[0]


@asynccontextmanager
async def dht_node(number: int, membership: Membership):
    async with (
        open_libp2p_host(bytes([number]) * 32, LOOPBACK, swarm_key=membership.swarm_key) as host,
        open_connections(
            host,
            membership,
            LOOPBACK,
            rng=random.Random(number),
            feed=None,
            agent="test",
            wall_clock=lambda: 0.0,
        ) as connections,
        open_dht(host, connections, host.libp2p) as source,
    ):
        yield host, connections, source


@pytest.fixture(
    params=[
        static_peers,
        pytest.param(mdns, marks=pytest.mark.network),
        pytest.param(dht, marks=pytest.mark.network),
    ]
)
def open_source(request):
    return request.param


async def test_a_peer_that_is_there_is_found_with_an_address_that_names_it(open_source):
    async with open_source() as (source, expected, _):
        with trio.fail_after(BUDGET_S):
            async for found in source.find_peers():
                assert expected in found.addresses
                assert {address.peer for address in found.addresses} == {expected.peer}
                assert 1 <= len(found.addresses) <= 8
                assert found.source == source.name
                assert found.expires > trio.current_time()
                return
    pytest.fail("it ended without a find")


async def test_the_source_has_a_rank(open_source):
    async with open_source() as (source, _, _):
        assert source.name in SOURCE_RANKS


async def test_this_node_itself_is_never_found(open_source):
    async with open_source() as (source, _, own):
        found_peers = []
        with trio.move_on_after(3):
            async for found in source.find_peers():
                found_peers.append(found.addresses[0].peer)
        assert found_peers
        assert own.peer not in found_peers

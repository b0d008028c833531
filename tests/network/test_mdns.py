"""Multicast DNS on the loopback interface."""

import random
import socket
from contextlib import asynccontextmanager

import pytest
import trio
import zeroconf

from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.discovery import DiscoverySettings, open_discovery
from ollamamax_p2p.discovery.core.mdns_records import service_type
from ollamamax_p2p.discovery.mdns import CLOSE_S, open_mdns
from ollamamax_p2p.host import HostSettings, open_connections, open_libp2p_host
from ollamamax_p2p.identity import Membership, parse_address, peer_id_of

pytestmark = pytest.mark.network

SETTINGS = DiscoverySettings(mdns_interfaces=("127.0.0.1",))
BUDGET_S = 30
"""Of real time; finding takes about one second on an idle machine."""


def fingerprint() -> str:
    """Of a swarm of this test's own, so that tests that run beside each other do not meet."""
    return random.SystemRandom().randbytes(8).hex()


def address_of(number: int, port: int = 4011):
    return parse_address(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id_of(bytes([number]) * 32)}")


@asynccontextmanager
async def node(number: int, swarm: str | None, addresses=None, trouble=None, settings=SETTINGS):
    mine = addresses if addresses is not None else [address_of(number)]
    async with open_mdns(
        lambda: mine,
        address_of(number).peer,
        swarm,
        settings,
        rng=random.SystemRandom(),
        unavailable=(trouble if trouble is not None else []).append,
    ) as mdns:
        yield mdns


async def first_find(mdns):
    with trio.fail_after(BUDGET_S):
        async for found in mdns.find_peers():
            return found


async def test_two_members_find_each_other_inside_a_private_swarm():
    swarm = fingerprint()
    async with node(1, swarm) as one, node(2, swarm) as other:
        assert (await first_find(one)).addresses == (address_of(2),)
        assert (await first_find(other)).addresses == (address_of(1),)
        assert one.trouble == ""


async def test_a_new_address_is_told_to_those_who_know_the_old_one():
    swarm, mine = fingerprint(), [address_of(1)]
    async with node(1, swarm, mine), node(2, swarm) as other:
        assert (await first_find(other)).addresses == (address_of(1),)
        mine.append(address_of(1, 5000))
        assert (await first_find(other)).addresses == (address_of(1), address_of(1, 5000))


async def test_other_swarms_do_not_find_us_and_only_learn_a_pseudonym():
    ours, theirs = fingerprint(), fingerprint()
    async with node(1, ours), node(3, ours) as ally, node(2, theirs) as stranger:
        await first_find(ally)
        with trio.fail_after(BUDGET_S):
            while ours not in stranger.other_swarms():  # noqa: ASYNC110 - no event
                await trio.sleep(0.05)
        assert stranger.peers() == ()


async def test_hostile_records_are_ignored():
    swarm = fingerprint()
    async with node(1, swarm) as victim:
        hostile = await trio.to_thread.run_sync(
            lambda: zeroconf.Zeroconf(
                interfaces=["127.0.0.1"], ip_version=zeroconf.IPVersion.V4Only
            )
        )
        try:
            for number, txt in enumerate(
                [b"\xff\xff", b"\x08dnsaddr=", b"\x00" * 200, b"\x10dnsaddr=/ip4/::1"]
            ):
                info = zeroconf.ServiceInfo(
                    service_type(swarm),
                    f"evil{number}.{service_type(swarm)}",
                    port=1,
                    properties=txt,
                    server="evil.local.",
                )
                await trio.to_thread.run_sync(
                    lambda info=info: hostile.register_service(info, strict=False)
                )
            async with node(2, swarm):
                assert (await first_find(victim)).addresses == (address_of(2),)
            assert len(victim.peers()) == 1
        finally:
            await trio.to_thread.run_sync(hostile.close)


async def test_no_multicast_is_one_warning_and_the_node_goes_on(caplog):
    # An address that no interface of this machine has: as on a machine without a network.
    settings = DiscoverySettings(mdns_interfaces=("192.0.2.1",))
    trouble: list[str] = []
    with pytest.raises(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # noqa: PT011 - the premise
        probe.bind(("192.0.2.1", 0))
    async with node(1, fingerprint(), trouble=trouble, settings=settings) as mdns:
        assert len(trouble) == 1
        assert "no multicast" in mdns.trouble
        assert mdns.peers() == ()
    assert caplog.text.count("multicast DNS does not work") == 1


async def test_it_closes_in_time():
    with trio.fail_after(BUDGET_S):
        async with node(1, fingerprint()) as mdns:
            assert mdns.trouble == ""
            closing = trio.current_time()
    assert trio.current_time() - closing < CLOSE_S + 5  # a busy machine; a hang would be endless


@asynccontextmanager
async def whole_node(number: int, membership: Membership, *, open_swarm: bool = False):
    """A real host with connections and all of discovery."""
    loopback = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))
    async with (
        open_libp2p_host(bytes([number]) * 32, loopback, swarm_key=membership.swarm_key) as host,
        open_connections(
            host,
            membership,
            loopback,
            rng=random.Random(number),
            feed=None,
            agent="test",
            wall_clock=lambda: 0.0,
        ) as connections,
        open_discovery(
            host,
            connections,
            membership.mdns_fingerprint(),
            SETTINGS,
            data_dir=None,
            libp2p=host.libp2p,
            rng=random.Random(number),
            feed=None,
            wall_clock=lambda: 0.0,
            open_swarm=open_swarm,
        ) as discovery,
    ):
        yield host.peer_id, connections, discovery


async def test_two_nodes_without_any_address_link_and_find_each_others_blobs():
    membership = Membership.create(None)
    blob, holders = digest_of(b"a blob"), ()
    async with (
        whole_node(1, membership) as (first, _, one),
        whole_node(2, membership) as (_, connections, other),
    ):
        await one.providers.announce([blob])
        # The first to hear of the other dials it. So the blob may be found, over that link, before
        # the one that was dialled has heard of anybody: wait for both.
        with trio.move_on_after(BUDGET_S):
            while not (holders and other.known_peers()):
                holders = await other.providers.find(blob)
                await trio.sleep(0.1)
        linked = [status.peer for status in connections.peers()]
        known, state = other.known_peers(), other.mdns_state
    # Out here, where a failure is not the innermost of twenty groups of exceptions.
    assert (list(holders), linked, list(known), state) == ([first], [first], [first], "on")

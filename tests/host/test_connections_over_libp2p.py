"""The same links over py-libp2p and real sockets, between tasks and between processes."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from ollamamax_p2p.errors import NotAdmitted, PeerUnreachable, TicketUsedUp
from ollamamax_p2p.host import Connections, HostSettings, open_connections
from ollamamax_p2p.host.libp2p_host import Libp2pHost, open_libp2p_host
from ollamamax_p2p.host.requests import open_requests
from ollamamax_p2p.identity import Membership, PeerId, parse_address
from ollamamax_p2p.testing.agreed_members import AgreedMembers
from ollamamax_p2p.wire import Codec, Message

pytestmark = pytest.mark.network

SETTINGS = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",), relay=False)


def wall_clock() -> float:
    return datetime.now(UTC).timestamp()


@asynccontextmanager
async def node(
    number: int,
    membership: Membership | None,
    swarm_key: bytes | None,
    gate: AgreedMembers | None = None,
) -> AsyncIterator[tuple[Libp2pHost, Connections]]:
    async with (
        open_libp2p_host(
            number.to_bytes(32, "big"),
            SETTINGS,
            swarm_key=swarm_key,
            admit_all=membership is not None and membership.is_open,
        ) as host,
        open_connections(
            host,
            membership,
            SETTINGS,
            rng=random.Random(number),
            feed=None,
            agent=f"omx test {number}",
            wall_clock=wall_clock,
            gate=gate,
        ) as links,
    ):
        yield host, links


async def until(condition: Callable[[], bool], *, within_s: float = 10.0) -> None:
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 - sockets have no event for it
            await trio.sleep(0.02)


def linked(links: Connections) -> set[PeerId]:
    return {status.peer for status in links.peers()}


async def test_nodes_join_by_ticket_find_each_other_and_ask():
    founder = Membership.create(None)
    key, gate = founder.swarm_key, AgreedMembers(wall_clock)
    async with (
        node(1, founder, key, gate) as (host1, links1),
        node(2, None, key, gate) as (host2, links2),
    ):
        gate.add(host1.peer_id)
        ticket = founder.new_ticket(host1.addresses, uses=2, lifetime_s=60, now=wall_clock())
        gate.issue(ticket, uses=2)
        redeemed = await links2.redeem(ticket)
        links2.adopt(Membership.join(None, ticket))
        await links2.reach(redeemed.peers)
        await until(lambda: linked(links1) == {host2.peer_id})

        async with node(3, None, key, gate) as (host3, links3):
            redeemed = await links3.redeem(ticket)
            links3.adopt(Membership.join(None, ticket))
            await links3.reach([each for each in redeemed.peers if each.peer == host1.peer_id])
            await links3.reach_peer(host2.peer_id)
            await until(lambda: linked(links2) == {host1.peer_id, host3.peer_id})
            await ask_each_other(host2, host3)
        await until(lambda: linked(links2) == {host1.peer_id}, within_s=2)

        async with node(4, None, key, gate) as (_, links4):
            with pytest.raises(TicketUsedUp):
                await links4.redeem(ticket)


class Number(Message, tag="number", frozen=True):
    value: int


numbers: Codec[Number] = Codec(Number, max_bytes=100)


async def ask_each_other(one: Libp2pHost, two: Libp2pHost) -> None:
    async def double(peer: PeerId, number: Number) -> Number:
        return Number(value=2 * number.value)

    async def ask(number: int) -> None:
        assert (await asking.ask(two.peer_id, Number(value=number))).value == 2 * number

    codecs = {"requests": numbers, "answers": numbers, "answer": double}
    async with (
        open_requests(two, "/omx/doubles/1", **codecs),
        open_requests(one, "/omx/doubles/1", **codecs) as asking,
        trio.open_nursery() as nursery,
    ):
        for number in range(200):
            nursery.start_soon(ask, number)


async def test_nodes_that_dial_each_other_at_once_stay_linked():
    member = Membership.create(None)
    key = member.swarm_key
    async with node(1, member, key) as (host1, links1), node(2, member, key) as (host2, links2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(links1.reach, host2.addresses)
            nursery.start_soon(links2.reach, host1.addresses)
        await until(lambda: bool(links1.peers() and links2.peers()))
        since = [links.peers()[0].connected_since for links in (links1, links2)]
        await trio.sleep(5)  # two heartbeats
        assert [links.peers()[0].connected_since for links in (links1, links2)] == since
        rtt_s = links1.peers()[0].rtt_s
        assert rtt_s is not None


async def test_a_stranger_with_another_key_or_no_ticket_gets_nowhere():
    member, gate = Membership.create(None), AgreedMembers(wall_clock)
    async with node(1, member, member.swarm_key, gate) as (host1, links1):
        other = Membership.create(None)
        async with node(2, other, other.swarm_key) as (_, links2):
            with pytest.raises(PeerUnreachable):
                await links2.reach(host1.addresses)
        for theirs in (other, member):  # of another swarm; of this one, but not a member
            async with node(3, theirs, member.swarm_key) as (host3, links3):
                with pytest.raises(NotAdmitted):
                    await links3.reach(host1.addresses)
                await until(lambda host=host3: not host.connections())
        assert not links1.peers()


@pytest.mark.parametrize(
    ("signal_number", "within_s"), [(signal.SIGSTOP, 10.0), (signal.SIGKILL, 2.0)]
)
async def test_a_process_that_is_frozen_or_killed_is_noticed(tmp_path, signal_number, within_s):
    founder = Membership.create(tmp_path / "swarm")
    process = subprocess.Popen(  # noqa: ASYNC220 - it only starts it
        [sys.executable, __file__, str(tmp_path / "swarm")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        line = await trio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)
        address = parse_address(line.strip())
        async with node(2, founder, founder.swarm_key) as (_, links):
            await links.reach([address])
            await trio.sleep(0.5)
            assert linked(links) == {address.peer}
            process.send_signal(signal_number)
            await until(lambda: not links.peers(), within_s=within_s)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


async def be_a_member(path: str) -> None:
    """What the other process does."""
    membership = Membership.load(Path(path))
    async with node(9, membership, membership.swarm_key) as (host, _):
        print(host.addresses[0], flush=True)  # noqa: T201
        await trio.sleep_forever()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        trio.run(be_a_member, sys.argv[1])

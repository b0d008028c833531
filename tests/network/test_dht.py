"""The swarm's Kademlia between real hosts on loopback; the raw protocol, the door, the bounds."""

import hashlib
import itertools
import random

import pytest
import trio
import varint
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.common import PROTOCOL_ID as LIBRARY_PROTOCOL
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID

from ollamamax_p2p.content.core.digest import digest_of, raw_hash
from ollamamax_p2p.discovery import open_dht
from ollamamax_p2p.discovery.kademlia_host import KADEMLIA, KademliaStream
from ollamamax_p2p.errors import NotAdmitted, PeerGone
from ollamamax_p2p.host import HostSettings, open_connections, open_libp2p_host
from ollamamax_p2p.identity import Membership

pytestmark = pytest.mark.network

BLOB = digest_of(b"a blob")
KEY = b"\x12\x20" + raw_hash(BLOB)
LOOPBACK = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",))
BUDGET_S = 60


class Member:
    def __init__(self, host, connections=None, dht=None) -> None:
        self.host, self.connections, self.dht = host, connections, dht
        self.peer = host.peer_id

    async def announced(self) -> None:
        with trio.fail_after(BUDGET_S):
            while self.dht.waiting:  # noqa: ASYNC110 - no event
                await trio.sleep(0.05)


class Swarm:
    def __init__(self, nursery) -> None:
        self._nursery, self._count = nursery, 0
        self.membership = Membership.create(None)

    async def add(self, *, member: bool = True, dht: bool = True) -> Member:
        self._count += 1
        return await self._nursery.start(self._run, self._count, member, dht)

    async def _run(self, number, member, with_dht, *, task_status) -> None:
        seed = hashlib.sha256(f"kad {number}".encode()).digest()
        async with open_libp2p_host(seed, LOOPBACK, swarm_key=self.membership.swarm_key) as host:
            if not member:
                task_status.started(Member(host))
                await trio.sleep_forever()
            async with open_connections(
                host,
                self.membership,
                LOOPBACK,
                rng=random.Random(number),
                feed=None,
                agent="test",
                wall_clock=lambda: 0.0,
            ) as connections:
                if not with_dht:
                    task_status.started(Member(host, connections))
                    await trio.sleep_forever()
                async with open_dht(host, connections, host.libp2p) as dht:
                    task_status.started(Member(host, connections, dht))
                    await trio.sleep_forever()


@pytest.fixture
async def swarm():
    async with trio.open_nursery() as nursery:
        yield Swarm(nursery)
        nursery.cancel_scope.cancel()


async def ask(stream, message: Message) -> Message | None:
    data = message.SerializeToString()
    await stream.send_all(varint.encode(len(data)) + data)
    return await read(stream)


async def read(stream) -> Message | None:
    """One answer; None if the stream ended instead."""
    reader = KademliaStream(stream)
    with trio.fail_after(BUDGET_S):
        size = 0
        for place in range(5):
            try:
                byte = await reader.read(1)
            except PeerGone:
                return None
            if not byte:
                return None
            size |= (byte[0] & 0x7F) << 7 * place
            if byte[0] < 0x80:
                break
        answer = Message()
        answer.ParseFromString(await reader.read(size))
        return answer


async def answer_of(asker: Member, answerer: Member, message: Message) -> Message:
    stream = await asker.host.open_stream(answerer.peer, KADEMLIA)
    answer = await ask(stream, message)
    if answer is None:
        raise PeerGone(answerer.peer)
    return answer


async def test_it_speaks_our_own_protocol_and_never_the_public_one(swarm):
    one = await swarm.add()
    protocols = set(one.host.libp2p.get_mux().get_protocols())
    assert KADEMLIA == "/omx/kad/1.0.0"
    assert KADEMLIA in protocols
    assert LIBRARY_PROTOCOL not in protocols


async def test_a_chain_of_members_finds_a_holder_beyond_the_neighbours(swarm):
    chain = [await swarm.add() for _ in range(5)]
    for left, right in itertools.pairwise(chain):
        await left.connections.reach(right.host.addresses)
    with trio.fail_after(BUDGET_S):
        while not all(member.dht.table_size for member in chain):  # noqa: ASYNC110 - no event
            await trio.sleep(0.05)
    await chain[0].dht.announce([BLOB])
    await chain[0].announced()
    with trio.fail_after(BUDGET_S):
        assert await chain[-1].dht.find(BLOB) == [chain[0].peer]
    assert chain[0].peer in {status.peer for status in chain[-1].connections.peers()}


async def test_what_is_withdrawn_is_not_given_by_the_holder_any_more(swarm):
    holder, seeker = await swarm.add(), await swarm.add()
    await holder.dht.announce([BLOB])
    await seeker.connections.reach(holder.host.addresses)
    await holder.announced()
    await holder.dht.withdraw([BLOB])
    stream = await seeker.host.open_stream(holder.peer, KADEMLIA)
    answer = await ask(stream, Message(type=Message.GET_PROVIDERS, key=KEY))
    assert len(answer.providerPeers) == 0


async def test_a_stranger_gets_no_provider_record_and_no_peer(swarm):
    """It has the swarm's key, so the handshake succeeds, but it is no member."""
    holder, stranger = await swarm.add(), await swarm.add(member=False)
    await holder.dht.announce([BLOB])
    await stranger.host.connect(holder.host.addresses)
    stranger.host.admit(holder.peer)
    for kind, key in (
        (Message.GET_PROVIDERS, KEY),
        (Message.FIND_NODE, ID.from_base58(holder.peer).to_bytes()),
    ):
        with pytest.raises((NotAdmitted, PeerGone)):
            await answer_of(stranger, holder, Message(type=kind, key=key))
    with pytest.raises(Exception):  # noqa: B017, PT011 - py-libp2p's own, whichever it is
        await stranger.host.libp2p.new_stream(
            ID.from_base58(holder.peer), [TProtocol(LIBRARY_PROTOCOL)]
        )


async def test_a_member_cannot_store_values_in_us(swarm):
    victim, member = await swarm.add(), await swarm.add(dht=False)
    await member.connections.reach(victim.host.addresses)
    stream = await member.host.open_stream(victim.peer, KADEMLIA)
    message = Message(type=Message.PUT_VALUE, key=b"/pk/x")
    message.record.key, message.record.value = b"/pk/x", b"y" * 1_000
    assert await ask(stream, message) is None


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff\xff\x01", varint.encode(200_000_000), b"\x05\xff\xff\xff\xff\xff"],
    ids=["endless length", "huge length", "not protobuf"],
)
async def test_garbage_ends_the_stream_and_the_node_goes_on(swarm, data):
    victim, member = await swarm.add(), await swarm.add(dht=False)
    await member.connections.reach(victim.host.addresses)
    stream = await member.host.open_stream(victim.peer, KADEMLIA)
    await stream.send_all(data)
    assert await read(stream) is None
    stream = await member.host.open_stream(victim.peer, KADEMLIA)
    answer = await ask(stream, Message(type=Message.PING))
    assert answer.type == Message.PING


async def test_a_member_cannot_announce_for_another_nor_what_is_not_a_blob(swarm):
    victim, member = await swarm.add(), await swarm.add(dht=False)
    await member.connections.reach(victim.host.addresses)
    for key, holder in ((KEY, victim.peer), (b"not a multihash", member.peer)):
        stream = await member.host.open_stream(victim.peer, KADEMLIA)
        message = Message(type=Message.ADD_PROVIDER, key=key)
        provider = message.providerPeers.add()
        provider.id = ID.from_base58(holder).to_bytes()
        provider.addrs.append(b"\x04\x7f\x00\x00\x01\x06\x0f\xab")
        await ask(stream, message)
        stream = await member.host.open_stream(victim.peer, KADEMLIA)
        answer = await ask(stream, Message(type=Message.GET_PROVIDERS, key=key))
        assert len(answer.providerPeers) == 0


async def test_many_blobs_are_announced_at_a_pace_that_the_other_side_takes(swarm):
    """py-libp2p resets the eleventh announcement within ten seconds from one peer."""
    holder, other = await swarm.add(), await swarm.add()
    await other.connections.reach(holder.host.addresses)
    blobs = [digest_of(bytes([number])) for number in range(12)]
    await holder.dht.announce(blobs)
    await holder.announced()
    for blob in blobs:
        stream = await holder.host.open_stream(other.peer, KADEMLIA)
        key = b"\x12\x20" + raw_hash(blob)
        answer = await ask(stream, Message(type=Message.GET_PROVIDERS, key=key))
        assert len(answer.providerPeers) == 1


async def test_a_failure_inside_the_library_is_logged_and_the_node_goes_on(swarm, caplog):
    one, other = await swarm.add(), await swarm.add()
    await one.connections.reach(other.host.addresses)

    async def broken(*args: object) -> None:
        raise RuntimeError("a mistake in the library")

    one.dht._records.provide = broken
    await one.dht.announce([BLOB])
    await one.announced()
    assert "a mistake in the library" in caplog.text
    await other.dht.announce([BLOB])
    await other.announced()
    assert await one.dht.find(BLOB) == [other.peer]


async def test_the_routing_table_is_a_source_of_peers(swarm):
    one, other = await swarm.add(), await swarm.add()
    await one.connections.reach(other.host.addresses)
    with trio.fail_after(BUDGET_S):
        async for found in one.dht.find_peers():
            assert found.addresses == other.host.addresses
            break

"""What Raft's transport does over every PeerHost: the simulated one, and py-libp2p on loopback."""

import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from ollamamax_p2p.consensus.core.messages import Entry, Message, MessageType
from ollamamax_p2p.consensus.core.raft_frames import FRAME_BYTES_MAX, encode_hello
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.stream_transport import StreamTransport, open_stream_transport
from ollamamax_p2p.errors import NotAdmitted, PeerGone
from ollamamax_p2p.host import HostSettings, PeerHost, open_libp2p_host, open_simulated_network
from ollamamax_p2p.testing.determinism import run_on_virtual_clock
from ollamamax_p2p.wire import encode_frame, protocol_ids

BUDGET_S = 30


class Member:
    """A replica's place: its host, its transport, and what came."""

    def __init__(self, raft_id: int, host: PeerHost) -> None:
        self.raft_id = raft_id
        self.host = host
        self.transport: StreamTransport | None = None
        self.arrived: list[Message] = []
        self.unreachable: list[int] = []

    def knows(self, other: "Member") -> bool:
        """Whether its transport, if it has one, has noticed the connection."""
        return self.transport is None or self.transport.is_connected(other.host.peer_id)

    def of(self, other: int):
        """Its statistics of another."""
        return next((s for s in self.transport.statistics() if s.raft_id == other), None)


class Cluster:
    """Members that are connected and admitted, each to each."""

    def __init__(self, open_host: Callable, nursery: trio.Nursery) -> None:
        self._open_host = open_host
        self._nursery = nursery
        self.members: dict[int, Member] = {}
        self.ids: dict[str, int] = {}

    async def add(self, raft_id: int, **settings) -> Member:
        member = await self.add_stranger(raft_id)
        self.ids[member.host.peer_id] = raft_id
        member.transport = await self._nursery.start(
            hold,
            open_stream_transport(
                member.host,
                peer_of=lambda raft_id: next(
                    (peer for peer, each in self.ids.items() if each == raft_id), None
                ),
                id_of=self.ids.get,
                deliver=member.arrived.extend,
                report_unreachable=member.unreachable.append,
                settings=ConsensusSettings(**settings),
            ),
        )
        for other in [each for each in self.members.values() if each is not member]:
            await self.connect(member, other)
        return member

    async def add_stranger(self, raft_id: int) -> Member:
        """A host without transport, connected to nobody and in no configuration."""
        host = await self._nursery.start(hold, self._open_host(raft_id))
        self.members[raft_id] = Member(raft_id, host)
        return self.members[raft_id]

    async def connect(self, one: Member, other: Member) -> None:
        await one.host.connect(other.host.addresses)
        await until(lambda: len(other.host.connections()) > 0)
        await until(lambda: any(c.peer == one.host.peer_id for c in other.host.connections()))
        one.host.admit(other.host.peer_id)
        other.host.admit(one.host.peer_id)
        for here, there in ((one, other), (other, one)):
            await until(lambda a=here, b=there: a.knows(b))


async def hold(opened, *, task_status: trio.TaskStatus) -> None:
    """Keep a block open in a task of its own."""
    async with opened as what:
        task_status.started(what)
        await trio.sleep_forever()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(BUDGET_S):
        while not condition():  # noqa: ASYNC110 - nothing tells when
            await trio.sleep(0.01)


@asynccontextmanager
async def simulated_cluster() -> AsyncIterator[Cluster]:
    async with (
        open_simulated_network(rng=random.Random(0)) as network,
        trio.open_nursery() as nursery,
    ):

        @asynccontextmanager
        async def open_host(raft_id: int):
            yield network.add_host(f"member {raft_id}")

        yield Cluster(open_host, nursery)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def libp2p_cluster() -> AsyncIterator[Cluster]:
    async with trio.open_nursery() as nursery:

        def open_host(raft_id: int):
            return open_libp2p_host(
                hashlib.sha256(f"member {raft_id}".encode()).digest(),
                HostSettings(listen=("/ip4/127.0.0.1/tcp/0",), relay=False),
                swarm_key=hashlib.sha256(b"swarm").digest(),
            )

        yield Cluster(open_host, nursery)
        nursery.cancel_scope.cancel()


IMPLEMENTATIONS = [
    pytest.param(
        simulated_cluster, id="simulated", marks=pytest.mark.trio(run=run_on_virtual_clock)
    ),
    pytest.param(libp2p_cluster, id="libp2p", marks=pytest.mark.network),
]


@pytest.fixture(params=IMPLEMENTATIONS)
async def cluster(request) -> AsyncIterator[Cluster]:
    async with request.param() as made:
        yield made


def heartbeat(to: int, sender: int, commit: int = 1, **fields) -> Message:
    return Message(
        type=MessageType.HEARTBEAT,
        **{"to": to, "from_": sender, "term": 1, **fields},
        commit=commit,
    )


def app(to: int, sender: int, index: int, data: bytes = b"x") -> Message:
    entries = (Entry(term=1, index=index + 1, data=data),)
    return Message(
        type=MessageType.APP,
        to=to,
        from_=sender,
        term=1,
        log_term=min(index, 1),
        index=index,
        entries=entries,
    )


async def test_messages_arrive_in_their_order_and_are_counted(cluster: Cluster) -> None:
    one, two = await cluster.add(1), await cluster.add(2)
    sent = [app(2, 1, index, bytes(2000)) for index in range(400)]
    for start in range(0, 400, 40):
        one.transport.send(sent[start : start + 40])
        await trio.sleep(0.001)
    await until(lambda: len(two.arrived) == 400)
    assert two.arrived == sent
    ours, theirs = one.of(2), two.of(1)
    assert (ours.sent, ours.dropped, ours.queued, ours.queued_bytes) == (400, 0, 0, 0)
    assert (theirs.received, theirs.refused) == (400, 0)
    assert ours.sent_bytes == theirs.received_bytes > 400 * 2000
    assert theirs.last_contact <= trio.current_time()
    assert one.unreachable == []


async def test_each_hears_only_what_is_for_it(cluster: Cluster) -> None:
    members = [await cluster.add(raft_id) for raft_id in (1, 2, 3)]
    for one in members:
        one.transport.send(heartbeat(to.raft_id, one.raft_id) for to in members if to is not one)
    await until(lambda: all(len(each.arrived) == 2 for each in members))
    for each in members:
        assert {message.from_ for message in each.arrived} == {1, 2, 3} - {each.raft_id}


async def test_a_message_in_anothers_name_is_dropped_and_the_rest_heard(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await cluster.add(1), await cluster.add(2)
    one.transport.send([heartbeat(2, 3), heartbeat(2, 1, commit=7), heartbeat(2, 9)])
    await until(lambda: bool(two.arrived))
    assert two.arrived == [heartbeat(2, 1, commit=7)]
    assert two.of(1).refused == 2
    warnings = [each for each in caplog.records if "another's name" in each.message]
    assert len(warnings) == 1
    assert one.host.peer_id in warnings[0].message


async def test_a_member_that_was_not_admitted_is_not_heard(cluster: Cluster) -> None:
    one, stranger = await cluster.add(1), await cluster.add_stranger(2)
    await stranger.host.connect(one.host.addresses)
    with pytest.raises(NotAdmitted):
        await stranger.host.open_stream(one.host.peer_id, protocol_ids.RAFT)
    assert one.arrived == []


async def test_an_admitted_peer_that_is_no_member_is_read_nothing_of(cluster: Cluster) -> None:
    one, guest = await cluster.add(1), await cluster.add_stranger(2)
    await cluster.connect(one, guest)
    stream = await guest.host.open_stream(one.host.peer_id, protocol_ids.RAFT)
    await expect_end(stream)
    assert one.transport.statistics() == ()


async def test_a_removed_member_is_heard_no_more_at_once(cluster: Cluster) -> None:
    one, two = await cluster.add(1), await cluster.add(2)
    one.transport.send([heartbeat(2, 1)])
    await until(lambda: len(two.arrived) == 1)
    removed = cluster.ids.pop(one.host.peer_id)
    one.transport.send([heartbeat(2, 1)])
    await trio.sleep(0.2)
    assert len(two.arrived) == 1
    cluster.ids[one.host.peer_id] = removed


async def test_a_lost_connection_is_reported_and_used_again_when_it_is_back(
    cluster: Cluster,
) -> None:
    one, two = await cluster.add(1), await cluster.add(2)
    for round_number in range(3):
        one.transport.send([heartbeat(2, 1)])
        await until(lambda wanted=round_number + 1: len(two.arrived) == wanted)
        await one.host.disconnect(two.host.peer_id)
        await until(lambda: not one.host.connections() and not two.host.connections())
        await until(lambda: not one.of(2).connected)
        one.unreachable.clear()
        one.transport.send([heartbeat(2, 1)])
        await until(lambda: one.unreachable == [2])
        await cluster.connect(one, two)
        await until(lambda: one.of(2).connected)
    assert one.of(2).dropped >= 3


async def test_a_message_to_nobody_is_reported(cluster: Cluster) -> None:
    one = await cluster.add(1)
    one.transport.send([heartbeat(8, 1), heartbeat(9, 1), heartbeat(8, 1)])
    await until(lambda: bool(one.unreachable))
    assert one.unreachable == [8, 9]


async def test_a_malformed_frame_ends_its_stream_and_nothing_else(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, liar = [await cluster.add(raft_id) for raft_id in (1, 2, 3)]
    for bad in (b"\xc1", FRAME_BYTES_MAX + 1):
        stream = await liar.host.open_stream(one.host.peer_id, protocol_ids.RAFT)
        hello = encode_hello()
        await stream.send_all(encode_frame(hello, max_bytes=4096))
        await stream.send_all(
            bad.to_bytes(4, "big") if isinstance(bad, int) else encode_frame(bad, max_bytes=4096)
        )
        await expect_end(stream)
    two.transport.send([heartbeat(1, 2)])
    await until(lambda: one.arrived == [heartbeat(1, 2)])
    warnings = [each for each in caplog.records if "misbehaved" in each.message]
    assert len(warnings) == 1
    assert liar.host.peer_id in warnings[0].message


async def expect_end(stream) -> None:
    """The other side ends the stream, whatever it says before."""
    with trio.fail_after(BUDGET_S):
        try:
            while await stream.receive_some():
                pass
        except PeerGone:
            pass
        await stream.aclose()

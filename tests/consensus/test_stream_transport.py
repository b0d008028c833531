"""Raft's transport where time, peers and links misbehave; on the simulated network."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import msgspec
import pytest
import trio

from ollamamax_p2p.consensus.core.messages import Entry, Message, MessageType
from ollamamax_p2p.consensus.core.raft_frames import (
    FRAME_BYTES_FULL,
    FRAME_BYTES_MAX,
    batch,
    decode_batch,
    decode_hello,
    encode_hello,
    encode_message,
)
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.stream_transport import (
    HELLO_TIMEOUT_S,
    REOPEN_PAUSE_S_MAX,
    open_stream_transport,
)
from ollamamax_p2p.errors import PeerGone
from ollamamax_p2p.host import ByteStream, open_simulated_network
from ollamamax_p2p.wire import FrameDecoder, encode_frame, protocol_ids

MiB = 1024 * 1024


@pytest.fixture
async def network():
    async with open_simulated_network(rng=random.Random(0)) as made:
        yield made


class Pair:
    """Member 1 with a transport, and host 2, whose other side each test plays."""

    def __init__(self, network) -> None:
        self.network = network
        self.here = network.add_host("here")
        self.there = network.add_host("there")
        self.ids = {self.here.peer_id: 1, self.there.peer_id: 2}
        self.arrived: list[list[Message]] = []
        self.unreachable: list[int] = []

    @asynccontextmanager
    async def transport(self, **settings) -> AsyncIterator:
        await self.here.connect(self.there.addresses)
        self.here.admit(self.there.peer_id)
        self.there.admit(self.here.peer_id)
        async with open_stream_transport(
            self.here,
            peer_of=lambda raft_id: {1: self.here.peer_id, 2: self.there.peer_id}.get(raft_id),
            id_of=self.ids.get,
            deliver=self.arrived.append,
            report_unreachable=self.unreachable.append,
            settings=ConsensusSettings(**settings),
        ) as transport:
            yield transport


@pytest.fixture
def pair(network) -> Pair:
    return Pair(network)


def heartbeat(commit: int = 1, *, to: int = 2, sender: int = 1) -> Message:
    return Message(type=MessageType.HEARTBEAT, to=to, from_=sender, term=1, commit=commit)


def app(index: int, size: int, *, to: int = 2, sender: int = 1) -> Message:
    entries = (Entry(term=1, index=index + 1, data=bytes(size)),)
    return Message(
        type=MessageType.APP,
        to=to,
        from_=sender,
        term=1,
        log_term=min(1, index),
        index=index,
        entries=entries,
    )


def framed(payload: bytes) -> bytes:
    return encode_frame(payload, max_bytes=FRAME_BYTES_MAX)


class Reader:
    """Plays a member that is read from: keeps each frame's messages."""

    def __init__(self, *, hello: bytes | None = encode_hello()) -> None:
        self.hello = hello
        self.streams: list[ByteStream] = []
        self.frames: list[list[Message]] = []
        self.hellos: list = []
        self.may_read = trio.Event()
        self.may_read.set()

    async def serve(self, stream: ByteStream) -> None:
        self.streams.append(stream)
        if self.hello is not None:
            await stream.send_all(framed(self.hello))
        decoder = FrameDecoder(max_bytes=FRAME_BYTES_MAX)
        first = True
        await self.may_read.wait()
        while data := await stream.receive_some():
            for payload in decoder.feed(data):
                if first:
                    self.hellos.append(decode_hello(payload))
                else:
                    self.frames.append(decode_batch(payload).messages)
                first = False
            await self.may_read.wait()

    @property
    def messages(self) -> list[Message]:
        return [each for frame in self.frames for each in frame]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110 - nothing tells when
            await trio.sleep(0.01)


async def test_what_waits_together_leaves_as_one_frame(autojump_clock, pair: Pair) -> None:
    reader = Reader()
    pair.there.set_handler(protocol_ids.RAFT, reader.serve)
    async with pair.transport() as transport:
        transport.send(heartbeat(commit) for commit in range(500))
        await until(lambda: len(reader.messages) == 500)
    assert len(reader.frames) == 1
    assert len(reader.streams) == 1


async def test_a_heartbeat_passes_the_entries_that_wait(autojump_clock, pair: Pair) -> None:
    reader = Reader()
    pair.there.set_handler(protocol_ids.RAFT, reader.serve)
    entries = [app(index, 100_000) for index in range(50)]
    async with pair.transport() as transport:
        transport.send([*entries, heartbeat(77)])
        await until(lambda: len(reader.messages) == 51)
    assert reader.messages == [heartbeat(77), *entries]
    sizes = [sum(len(encode_message(each)) for each in frame) for frame in reader.frames]
    assert max(sizes) < FRAME_BYTES_FULL + 110_000


async def test_a_peer_that_does_not_read_costs_a_bounded_queue_and_no_time(
    autojump_clock, pair: Pair
) -> None:
    reader = Reader()
    reader.may_read = trio.Event()
    pair.there.set_handler(protocol_ids.RAFT, reader.serve)
    async with pair.transport(send_queue_bytes=2 * MiB) as transport:
        transport.send(app(index, 100_000) for index in range(100))
        await until(lambda: pair.unreachable == [2])
        (statistics,) = transport.statistics()
        assert 1 * MiB < statistics.queued_bytes <= 2 * MiB
        assert statistics.dropped >= 79
        reader.may_read.set()
        await until(lambda: len(reader.messages) == 100 - statistics.dropped)


async def test_more_messages_than_fit_are_dropped_also_if_they_are_short(
    autojump_clock, pair: Pair
) -> None:
    pair.there.set_handler(protocol_ids.RAFT, Reader().serve)
    async with pair.transport(send_queue_messages=10) as transport:
        transport.send(heartbeat(commit) for commit in range(25))
        (statistics,) = transport.statistics()
        assert (statistics.queued, statistics.dropped) == (10, 15)


async def test_a_peer_that_reads_nothing_for_long_loses_its_stream_and_gets_another(
    autojump_clock,
    pair: Pair,
) -> None:
    reader = Reader()
    reader.may_read = trio.Event()
    pair.there.set_handler(protocol_ids.RAFT, reader.serve)
    async with pair.transport(send_stall_s=2) as transport:
        transport.send(app(index, 100_000) for index in range(20))
        await trio.sleep(2.1)
        (statistics,) = transport.statistics()
        assert (statistics.queued, statistics.queued_bytes) == (0, 0)
        assert pair.unreachable == [2]
        reader.may_read.set()
        await trio.sleep(1)
        transport.send([heartbeat(8)])
        await until(lambda: heartbeat(8) in reader.messages)
        assert len(reader.streams) == 2


async def test_a_frozen_peer_does_not_keep_the_others_waiting(
    autojump_clock, network, pair: Pair
) -> None:
    other = network.add_host("other")
    reader = Reader()
    other.set_handler(protocol_ids.RAFT, reader.serve)
    pair.there.set_handler(protocol_ids.RAFT, Reader().serve)
    pair.ids[other.peer_id] = 3
    peers = {2: pair.there.peer_id, 3: other.peer_id}
    for host in (pair.there, other):
        await pair.here.connect(host.addresses)
        pair.here.admit(host.peer_id)
        host.admit(pair.here.peer_id)
    network.freeze(pair.there)
    async with open_stream_transport(
        pair.here,
        peer_of=peers.get,
        id_of=pair.ids.get,
        deliver=pair.arrived.append,
        report_unreachable=pair.unreachable.append,
        settings=ConsensusSettings(),
    ) as transport:
        for commit in range(100):
            transport.send([heartbeat(commit), heartbeat(commit, to=3)])
            await trio.sleep(0.1)
        assert len(reader.messages) == 100


async def test_streams_that_end_at_once_are_opened_less_and_less_often(
    autojump_clock, pair: Pair
) -> None:
    opened: list[float] = []

    async def slam(stream: ByteStream) -> None:
        opened.append(trio.current_time())

    pair.there.set_handler(protocol_ids.RAFT, slam)
    async with pair.transport() as transport:
        for _ in range(300):
            transport.send([heartbeat()])
            await trio.sleep(0.1)
    assert 6 <= len(opened) <= 14
    assert opened[-1] - opened[-2] == pytest.approx(REOPEN_PAUSE_S_MAX, abs=0.2)


async def test_a_peer_without_hello_is_given_up_in_time(autojump_clock, pair: Pair) -> None:
    reader = Reader(hello=None)
    pair.there.set_handler(protocol_ids.RAFT, reader.serve)
    async with pair.transport() as transport:
        transport.send([heartbeat()])
        await trio.sleep(HELLO_TIMEOUT_S + 0.1)
        assert pair.unreachable == [2]
        assert transport.statistics()[0].queued == 0


async def test_a_half_open_stream_gives_way_to_the_next(autojump_clock, pair: Pair) -> None:
    async with pair.transport() as transport:
        first = await greeted(pair)
        second = await greeted(pair)
        await expect_end(first)
        await second.send_all(framed(batch([encode_message(heartbeat(to=1, sender=2))])))
        await until(lambda: pair.arrived == [[heartbeat(to=1, sender=2)]])
        assert transport.statistics()[0].received == 1


async def expect_end(stream: ByteStream) -> None:
    """The other side ends the stream, whatever it says before."""
    with trio.fail_after(60), suppress(PeerGone):
        while await stream.receive_some():
            pass


async def greeted(pair: Pair) -> ByteStream:
    """A stream of host 2's to the transport, past its hello."""
    stream = await pair.there.open_stream(pair.here.peer_id, protocol_ids.RAFT)
    await stream.send_all(framed(encode_hello()))
    await trio.sleep(0.1)
    return stream


async def test_a_local_message_is_the_callers_mistake(autojump_clock, pair: Pair) -> None:
    async with pair.transport() as transport:
        with pytest.raises(ValueError, match="HUP"):
            transport.send([Message(type=MessageType.HUP, to=2, from_=1)])


async def test_a_message_that_fits_no_frame_is_dropped(autojump_clock, pair: Pair) -> None:
    pair.there.set_handler(protocol_ids.RAFT, Reader().serve)
    async with pair.transport() as transport:
        transport.send([app(0, FRAME_BYTES_MAX)])
        await until(lambda: pair.unreachable == [2])
        assert transport.statistics()[0].dropped == 1


# -- versions ----------------------------------------------------------------------------------


async def test_an_older_speaker_and_this_one_understand_each_other(
    autojump_clock, pair: Pair
) -> None:
    """Version 1 at its barest: a hello of two numbers, no features, nothing else."""
    reader = Reader(hello=msgspec.msgpack.encode({"lowest": 1, "highest": 1}))
    pair.there.set_handler(protocol_ids.RAFT, reader.serve)
    async with pair.transport() as transport:
        transport.send([app(0, 3)])
        await until(lambda: reader.messages == [app(0, 3)])
        stream = await pair.there.open_stream(pair.here.peer_id, protocol_ids.RAFT)
        await stream.send_all(framed(msgspec.msgpack.encode({"lowest": 1, "highest": 1})))
        bare = {"type": 8, "to": 1, "from": 2, "term": 1, "commit": 5}
        await stream.send_all(framed(msgspec.msgpack.encode([bare])))
        await until(lambda: pair.arrived == [[heartbeat(5, to=1, sender=2)]])


async def test_a_newer_speaker_and_this_one_understand_each_other(
    autojump_clock, pair: Pair
) -> None:
    newer = {"lowest": 1, "highest": 3, "features": ["compression"], "build": {"of": "tomorrow"}}
    reader = Reader(hello=msgspec.msgpack.encode(newer))
    pair.there.set_handler(protocol_ids.RAFT, reader.serve)
    async with pair.transport() as transport:
        transport.send([heartbeat()])
        await until(lambda: reader.messages == [heartbeat()])
        assert (reader.hellos[0].lowest, reader.hellos[0].highest) == (1, 1)
        # What it says back on our stream is not understood, and harmless.
        await reader.streams[0].send_all(framed(b"\xc1 from tomorrow"))
        stream = await pair.there.open_stream(pair.here.peer_id, protocol_ids.RAFT)
        await stream.send_all(framed(msgspec.msgpack.encode(newer)))
        known = {"type": 8, "to": 1, "from": 2, "term": 1, "commit": 5, "priority": [7]}
        unknown = {"type": 31, "to": 1, "from": 2, "term": {"epoch": 1}}
        await stream.send_all(framed(msgspec.msgpack.encode([unknown, known])))
        await until(lambda: pair.arrived == [[heartbeat(5, to=1, sender=2)]])
        assert transport.statistics()[0].unknown == 1
        transport.send([heartbeat(2)])
        await until(lambda: len(reader.messages) == 2)
        assert len(reader.streams) == 1


async def test_versions_that_do_not_meet_are_named_and_nothing_is_sent(
    autojump_clock, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    far = msgspec.msgpack.encode({"lowest": 7, "highest": 9})
    reader = Reader(hello=far)
    pair.there.set_handler(protocol_ids.RAFT, reader.serve)
    async with pair.transport() as transport:
        transport.send([heartbeat()])
        stream = await pair.there.open_stream(pair.here.peer_id, protocol_ids.RAFT)
        await stream.send_all(framed(far))
        await until(lambda: pair.unreachable == [2])
        await until(lambda: any("versions 7 to 9" in each.message for each in caplog.records))
    assert reader.messages == []
    assert pair.arrived == []


# -- hostile members ---------------------------------------------------------------------------


async def test_a_hostile_members_streams_cost_the_others_nothing(
    autojump_clock, pair: Pair, rng
) -> None:
    """Frames of garbage, frames that never end and hellos that are none, while another talks."""
    good = encode_message(heartbeat(to=1, sender=2))
    async with pair.transport() as transport:
        for _ in range(200):
            stream = await pair.there.open_stream(pair.here.peer_id, protocol_ids.RAFT)
            try:
                if rng.random() < 0.7:
                    await stream.send_all(framed(encode_hello()))
                await stream.send_all(
                    rng.choice(
                        (
                            framed(rng.randbytes(rng.randrange(200))),
                            b"\xff\xff\xff\xff",
                            framed(batch([good]))[:-3],
                            framed(b"\xdd\xff\xff\xff\xff"),
                        )
                    )
                )
            except PeerGone:
                continue
        assert pair.arrived == []
        stream = await greeted(pair)
        await stream.send_all(framed(batch([good])))
        await until(lambda: len(pair.arrived) == 1)
        assert len(transport.statistics()) == 1


async def test_a_removed_member_leaves_nothing_behind(autojump_clock, network, pair: Pair) -> None:
    pair.there.set_handler(protocol_ids.RAFT, Reader().serve)
    peers = {2: pair.there.peer_id}
    await pair.here.connect(pair.there.addresses)
    pair.there.admit(pair.here.peer_id)
    other = network.add_host("other")
    async with open_stream_transport(
        pair.here,
        peer_of=peers.get,
        id_of=pair.ids.get,
        deliver=pair.arrived.append,
        report_unreachable=pair.unreachable.append,
        settings=ConsensusSettings(),
    ) as transport:
        transport.send([heartbeat()])
        assert [each.raft_id for each in transport.statistics()] == [2]
        del pair.ids[peers.pop(2)]
        peers[3], pair.ids[other.peer_id] = other.peer_id, 3
        transport.send([heartbeat(), heartbeat(to=3)])
        assert [each.raft_id for each in transport.statistics()] == [3]
        await until(lambda: sorted(pair.unreachable) == [2, 3])


async def test_leaving_the_block_ends_every_task(autojump_clock, pair: Pair) -> None:
    pair.there.set_handler(protocol_ids.RAFT, Reader().serve)
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(pair.transport())
        transport.send([heartbeat()])
        stream = await greeted(pair)
    await expect_end(stream)
    late = await pair.there.open_stream(pair.here.peer_id, protocol_ids.RAFT)
    assert await late.receive_some() == b""

"""What every PeerHost does. An implementation joins by a factory in `IMPLEMENTATIONS`."""

import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Protocol

import pytest
import trio
from msgspec import Meta

from ollamamax_p2p.errors import (
    MalformedMessage,
    NotAdmitted,
    PeerGone,
    PeerUnreachable,
)
from ollamamax_p2p.host import (
    ByteStream,
    HostSettings,
    MessageStream,
    PeerEvent,
    PeerHost,
    open_libp2p_host,
    open_simulated_network,
)
from ollamamax_p2p.identity import Address, PeerId
from ollamamax_p2p.testing.determinism import run_on_virtual_clock
from ollamamax_p2p.wire import Codec, Message

MiB = 1024 * 1024
ECHO = "/test/echo/1"
HOLD = "/test/hold/1"
NOBODY = "/test/nobody-answers-this/1"

BUDGET_S = 60
"""For one test; real seconds on real sockets, where a busy machine may take its time."""


class HostFactory(Protocol):
    """Hosts of one implementation, for the length of a test."""

    dead_transport: str
    """Where nobody listens."""

    async def open(self, *, swarm: str = "ours") -> PeerHost:
        """A new host with a key of its own; hosts of another swarm have another swarm key."""


class SimulatedHosts:
    """On one simulated network."""

    dead_transport = "/ip4/10.255.255.254/tcp/4011"

    def __init__(self, network) -> None:
        self._network = network
        self._count = 0

    async def open(self, *, swarm: str = "ours") -> PeerHost:
        self._count += 1
        return self._network.add_host(
            f"host {self._count}", swarm_key=hashlib.sha256(swarm.encode()).digest()
        )


@asynccontextmanager
async def simulated_hosts() -> AsyncIterator[HostFactory]:
    async with open_simulated_network(rng=random.Random(0)) as network:
        yield SimulatedHosts(network)


class Libp2pHosts:
    """Over TCP on loopback."""

    dead_transport = "/ip4/127.0.0.1/tcp/1"

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._count = 0

    async def open(self, *, swarm: str = "ours") -> PeerHost:
        self._count += 1
        host: PeerHost = await self._nursery.start(self._keep_open, self._count, swarm)
        return host

    async def _keep_open(
        self, number: int, swarm: str, *, task_status: trio.TaskStatus[PeerHost]
    ) -> None:
        async with open_libp2p_host(
            hashlib.sha256(f"host {number}".encode()).digest(),
            HostSettings(listen=("/ip4/127.0.0.1/tcp/0",)),
            swarm_key=hashlib.sha256(swarm.encode()).digest(),
        ) as host:
            task_status.started(host)
            await trio.sleep_forever()


@asynccontextmanager
async def libp2p_hosts() -> AsyncIterator[HostFactory]:
    async with trio.open_nursery() as nursery:
        yield Libp2pHosts(nursery)
        nursery.cancel_scope.cancel()


OpenFactory = Callable[[], AbstractAsyncContextManager[HostFactory]]

IMPLEMENTATIONS = [
    pytest.param(simulated_hosts, id="simulated", marks=pytest.mark.trio(run=run_on_virtual_clock)),
    pytest.param(libp2p_hosts, id="libp2p", marks=pytest.mark.network),
]


@pytest.fixture(params=IMPLEMENTATIONS)
async def hosts(request) -> AsyncIterator[HostFactory]:
    open_factory: OpenFactory = request.param
    async with open_factory() as factory:
        yield factory


@pytest.fixture
async def pair(hosts) -> tuple[PeerHost, PeerHost]:
    """Two connected hosts that have admitted one another and answer ECHO; the first dialled."""
    here, there = await hosts.open(), await hosts.open()
    await befriend(here, there)
    for host in (here, there):
        host.set_handler(ECHO, echo)
    return here, there


async def befriend(here: PeerHost, there: PeerHost) -> None:
    async with there.watch() as events:
        await here.connect(there.addresses)
        with trio.fail_after(BUDGET_S):
            async for event in events:
                if event.peer == here.peer_id:
                    break
    here.admit(there.peer_id)
    there.admit(here.peer_id)


async def echo(stream: ByteStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


class Held:
    """A handler that gives its stream to the test and keeps it open."""

    def __init__(self) -> None:
        self._put, self._get = trio.open_memory_channel[ByteStream](8)

    async def __call__(self, stream: ByteStream) -> None:
        await self._put.send(stream)
        await trio.sleep_forever()

    async def next(self) -> ByteStream:
        with trio.fail_after(BUDGET_S):
            return await self._get.receive()


async def read_to_end(stream: ByteStream) -> bytes:
    data = b""
    with trio.fail_after(BUDGET_S):
        while part := await stream.receive_some():
            data += part
    return data


async def read_exactly(stream: ByteStream, size: int) -> bytes:
    data = b""
    with trio.fail_after(BUDGET_S):
        while len(data) < size:
            part = await stream.receive_some()
            assert part, "the stream ended too early"
            data += part
    return data


async def next_event(events: AsyncIterator[PeerEvent]) -> PeerEvent:
    with trio.fail_after(BUDGET_S):
        return await anext(events)


async def until(condition: Callable[[], bool]) -> None:
    """Some news takes a moment to arrive."""
    with trio.fail_after(BUDGET_S):
        while not condition():  # noqa: ASYNC110 - a host tells no one of this
            await trio.sleep(0.02)


async def lost(action) -> None:
    """The action, tried again and again, raises PeerGone as soon as the news has arrived."""
    with trio.fail_after(BUDGET_S):
        while True:
            try:
                await action()
            except PeerGone:
                return
            await trio.sleep(0.02)


# -- connections -------------------------------------------------------------------------------


async def test_connect_gives_the_peer_that_was_named(hosts):
    here, there = await hosts.open(), await hosts.open()
    assert await here.connect(there.addresses) == there.peer_id


async def test_addresses_name_the_host_itself(hosts):
    here = await hosts.open()
    assert here.addresses
    assert {address.peer for address in here.addresses} == {here.peer_id}


async def test_both_sides_list_the_connection_and_who_dialled(hosts):
    here, there = await hosts.open(), await hosts.open()
    await here.connect(there.addresses)
    await until(lambda: bool(there.connections()))
    (outbound,), (inbound,) = here.connections(), there.connections()
    assert (outbound.peer, outbound.inbound) == (there.peer_id, False)
    assert (inbound.peer, inbound.inbound) == (here.peer_id, True)
    assert not outbound.admitted
    assert not inbound.admitted


async def test_connecting_again_makes_no_second_connection(hosts):
    here, there = await hosts.open(), await hosts.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(here.connect, there.addresses)
        nursery.start_soon(here.connect, there.addresses)
    assert await here.connect(there.addresses) == there.peer_id
    assert len(here.connections()) == 1


async def test_watchers_hear_of_a_peer_that_comes_and_goes_on_both_sides(hosts):
    here, there = await hosts.open(), await hosts.open()
    async with here.watch() as seen_here, there.watch() as seen_there:
        await here.connect(there.addresses)
        assert await next_event(seen_here) == PeerEvent(there.peer_id, "connected")
        assert await next_event(seen_there) == PeerEvent(here.peer_id, "connected")
        await here.disconnect(there.peer_id)
        assert await next_event(seen_here) == PeerEvent(there.peer_id, "disconnected")
        assert await next_event(seen_there) == PeerEvent(here.peer_id, "disconnected")
    assert here.connections() == there.connections() == ()


async def test_a_peer_can_be_connected_again_after_a_disconnect(pair):
    here, there = pair
    await here.disconnect(there.peer_id)
    await until(lambda: not there.connections())
    await befriend(here, there)
    stream = await here.open_stream(there.peer_id, ECHO)
    await stream.send_all(b"again")
    assert await read_exactly(stream, 5) == b"again"


async def test_disconnecting_a_peer_that_is_not_connected_does_nothing(hosts):
    here, there = await hosts.open(), await hosts.open()
    await here.disconnect(there.peer_id)


async def test_an_address_where_nobody_listens_is_unreachable(hosts):
    here, there = await hosts.open(), await hosts.open()
    with pytest.raises(PeerUnreachable) as caught:
        await here.connect([Address(hosts.dead_transport, there.peer_id)])
    assert there.peer_id in str(caught.value)
    assert here.connections() == ()


async def test_each_address_is_tried(hosts):
    here, there = await hosts.open(), await hosts.open()
    dead = Address(hosts.dead_transport, there.peer_id)
    assert await here.connect([dead, *there.addresses]) == there.peer_id


async def test_another_peer_at_the_address_is_not_taken_for_the_named_one(hosts):
    here, there, third = await hosts.open(), await hosts.open(), await hosts.open()
    wrong = [Address(address.transport, third.peer_id) for address in there.addresses]
    with pytest.raises(PeerUnreachable):
        await here.connect(wrong)
    assert here.connections() == ()


async def test_no_addresses_or_those_of_several_peers_are_refused(hosts):
    here, there, third = await hosts.open(), await hosts.open(), await hosts.open()
    with pytest.raises(ValueError, match="address"):
        await here.connect([])
    with pytest.raises(ValueError, match="address"):
        await here.connect([*there.addresses, *third.addresses])


async def test_a_host_of_another_swarm_cannot_finish_the_handshake(hosts):
    here, stranger = await hosts.open(), await hosts.open(swarm="theirs")
    with pytest.raises(PeerUnreachable):
        await stranger.connect(here.addresses)
    assert here.connections() == stranger.connections() == ()


# -- streams -----------------------------------------------------------------------------------


async def test_a_stream_knows_its_peer_and_protocol_on_both_sides(pair):
    here, there = pair
    held = Held()
    there.set_handler(HOLD, held)
    ours = await here.open_stream(there.peer_id, HOLD)
    await ours.send_all(b".")
    theirs = await held.next()
    assert (ours.peer, ours.protocol) == (there.peer_id, HOLD)
    assert (theirs.peer, theirs.protocol) == (here.peer_id, HOLD)


async def test_either_side_opens_streams_whoever_dialled(pair):
    for one, other in (pair, pair[::-1]):
        stream = await one.open_stream(other.peer_id, ECHO)
        await stream.send_all(b"hello")
        assert await read_exactly(stream, 5) == b"hello"
        await stream.aclose()


async def test_after_send_eof_the_other_way_goes_on(pair):
    here, there = pair

    async def count(stream: ByteStream) -> None:
        data = await read_to_end(stream)
        await stream.send_all(str(len(data)).encode())

    there.set_handler("/test/count/1", count)
    stream = await here.open_stream(there.peer_id, "/test/count/1")
    await stream.send_all(b"x" * 1000)
    await stream.send_eof()
    assert await read_to_end(stream) == b"1000"


async def test_what_a_handler_sent_last_arrives_although_it_returns_at_once(pair):
    here, there = pair

    async def farewell(stream: ByteStream) -> None:
        await stream.send_all(b"z" * 300_000)

    there.set_handler("/test/farewell/1", farewell)
    stream = await here.open_stream(there.peer_id, "/test/farewell/1")
    await stream.send_eof()
    assert await read_to_end(stream) == b"z" * 300_000


async def test_eight_mebibytes_arrive_as_they_were_sent(pair):
    here, there = pair
    data = random.Random(1).randbytes(8 * MiB)
    stream = await here.open_stream(there.peer_id, ECHO)

    async def send() -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        back = await read_to_end(stream)
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()


async def test_a_writer_waits_while_nobody_reads_and_goes_on_after(pair):
    here, there = pair
    held = Held()
    there.set_handler(HOLD, held)
    stream = await here.open_stream(there.peer_id, HOLD)
    data = random.Random(2).randbytes(24 * MiB)  # more than any window
    sent = trio.Event()

    async def send() -> None:
        await stream.send_all(data)
        sent.set()
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        theirs = await held.next()
        await trio.sleep(7)  # longer than the 5 s after which py-libp2p's yamux gives up
        assert not sent.is_set()
        digest = hashlib.sha256()
        with trio.fail_after(BUDGET_S):
            while part := await theirs.receive_some():
                digest.update(part)
        assert sent.is_set()
    assert digest.digest() == hashlib.sha256(data).digest()


async def test_a_stream_that_nobody_reads_does_not_hold_up_another(pair):
    here, there = pair
    there.set_handler(HOLD, Held())
    stuck = await here.open_stream(there.peer_id, HOLD)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stuck.send_all, bytes(24 * MiB))
        stream = await here.open_stream(there.peer_id, ECHO)
        for _ in range(5):
            await stream.send_all(b"quick")
            assert await read_exactly(stream, 5) == b"quick"
        nursery.cancel_scope.cancel()


async def test_a_cancelled_receive_loses_nothing(pair):
    here, there = pair
    stream = await here.open_stream(there.peer_id, ECHO)
    with trio.move_on_after(0.2) as scope:
        await stream.receive_some()
    assert scope.cancelled_caught
    await stream.send_all(b"kept")
    assert await read_exactly(stream, 4) == b"kept"


async def test_many_streams_at_once_keep_their_bytes_apart(pair):
    here, there = pair

    async def one(number: int) -> None:
        data = bytes([number]) * 50_000
        stream = await here.open_stream(there.peer_id, ECHO)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            assert await read_exactly(stream, len(data)) == data
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)


async def test_frames_of_a_mebibyte_pass_through_a_message_stream(pair):
    here, there = pair

    class Blob(Message, tag="blob"):
        data: Annotated[bytes, Meta(max_length=MiB)]

    codec: Codec[Blob] = Codec(Blob, max_bytes=MiB + 100)

    async def answer(stream: ByteStream) -> None:
        messages = MessageStream(stream, sends=codec, receives=codec)
        while message := await messages.receive():
            await messages.send(Blob(data=message.data[::-1]))

    there.set_handler("/test/blobs/1", answer)
    stream = await here.open_stream(there.peer_id, "/test/blobs/1")
    messages = MessageStream(stream, sends=codec, receives=codec)
    with trio.fail_after(BUDGET_S):
        for number in range(4):
            data = random.Random(number).randbytes(MiB)
            await messages.send(Blob(data=data))
            assert await messages.receive() == Blob(data=data[::-1])
        await messages.send_eof()
        assert await messages.receive() is None


# -- ends --------------------------------------------------------------------------------------


async def test_aclose_can_be_called_twice_and_after_it_nothing_works(pair):
    here, there = pair
    stream = await here.open_stream(there.peer_id, ECHO)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(PeerGone):
        await stream.send_all(b"late")
    with pytest.raises(PeerGone):
        await stream.receive_some()


async def test_what_was_sent_before_aclose_is_read_and_then_the_end(pair):
    here, there = pair
    held = Held()
    there.set_handler(HOLD, held)
    ours = await here.open_stream(there.peer_id, HOLD)
    await ours.send_all(b"all of it")
    await ours.aclose()
    assert await read_to_end(await held.next()) == b"all of it"


async def test_a_writer_learns_that_the_other_side_has_closed(pair):
    here, there = pair
    held = Held()
    there.set_handler(HOLD, held)
    ours = await here.open_stream(there.peer_id, HOLD)
    await ours.send_all(b".")
    theirs = await held.next()
    await read_exactly(theirs, 1)
    await theirs.aclose()
    await lost(lambda: ours.send_all(b"into the void" * 10_000))


async def test_a_reader_that_waits_is_told_when_its_own_side_closes_the_stream(pair):
    here, there = pair
    stream = await here.open_stream(there.peer_id, ECHO)
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(PeerGone):
                await stream.receive_some()

        nursery.start_soon(read)
        await trio.sleep(0.1)
        with trio.fail_after(BUDGET_S):
            await stream.aclose()


async def test_after_a_disconnect_streams_raise_peer_gone_on_both_sides(pair):
    here, there = pair
    held = Held()
    there.set_handler(HOLD, held)
    ours = await here.open_stream(there.peer_id, HOLD)
    await ours.send_all(b".")
    theirs = await held.next()
    await read_exactly(theirs, 1)

    async def read(stream: ByteStream) -> None:
        with pytest.raises(PeerGone), trio.fail_after(BUDGET_S):
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, ours)
        nursery.start_soon(read, theirs)
        await trio.sleep(0.1)
        await here.disconnect(there.peer_id)
    await lost(lambda: ours.send_all(b"x" * 10_000))
    await lost(lambda: theirs.send_all(b"x" * 10_000))
    await ours.aclose()
    await theirs.aclose()


async def test_a_stream_to_a_peer_that_is_not_connected_raises_peer_gone(hosts):
    here, there = await hosts.open(), await hosts.open()
    with pytest.raises(PeerGone):
        await here.open_stream(there.peer_id, ECHO)


async def test_an_error_in_a_handler_ends_only_its_stream(pair):
    here, there = pair

    async def fail(stream: ByteStream) -> None:
        await stream.receive_some()
        raise MalformedMessage(stream.peer, "this one is broken")

    there.set_handler("/test/fail/1", fail)
    good = await here.open_stream(there.peer_id, ECHO)
    bad = await here.open_stream(there.peer_id, "/test/fail/1")
    await bad.send_all(b".")
    with trio.fail_after(BUDGET_S):
        with contextlib.suppress(PeerGone):  # a reset says the same as an end
            assert await bad.receive_some() == b""
    await good.send_all(b"still here")
    assert await read_exactly(good, 10) == b"still here"
    assert there.is_admitted(here.peer_id)


# -- the door ----------------------------------------------------------------------------------


async def test_a_stranger_reaches_only_handlers_for_strangers(hosts):
    here, there = await hosts.open(), await hosts.open()
    there.set_handler(ECHO, echo)
    there.set_handler("/test/join/1", echo, for_strangers=True)
    await here.connect(there.addresses)
    here.admit(there.peer_id)  # that we trust it does not make it trust us
    with pytest.raises(NotAdmitted):
        await here.open_stream(there.peer_id, ECHO)
    stream = await here.open_stream(there.peer_id, "/test/join/1")
    await stream.send_all(b"let me in")
    assert await read_exactly(stream, 9) == b"let me in"


async def test_each_side_keeps_its_own_door(hosts):
    here, there = await hosts.open(), await hosts.open()
    for host in (here, there):
        host.set_handler(ECHO, echo)
    await here.connect(there.addresses)
    await until(lambda: bool(there.connections()))
    there.admit(here.peer_id)
    stream = await here.open_stream(there.peer_id, ECHO)
    await stream.send_all(b"one way")
    assert await read_exactly(stream, 7) == b"one way"
    with pytest.raises(NotAdmitted):
        await there.open_stream(here.peer_id, ECHO)


async def test_a_protocol_that_nobody_answers_is_no_door(pair):
    here, there = pair
    with pytest.raises(NotAdmitted):
        await here.open_stream(there.peer_id, NOBODY)


async def test_expel_closes_the_doors_and_leaves_open_streams(pair):
    here, there = pair
    stream = await here.open_stream(there.peer_id, ECHO)
    await stream.send_all(b"a")
    assert await read_exactly(stream, 1) == b"a"
    there.expel(here.peer_id)
    assert not there.is_admitted(here.peer_id)
    with pytest.raises(NotAdmitted):
        await here.open_stream(there.peer_id, ECHO)
    await stream.send_all(b"b")
    assert await read_exactly(stream, 1) == b"b"


async def test_admitting_twice_is_as_good_as_once(pair):
    here, there = pair
    there.admit(here.peer_id)
    assert [connection.admitted for connection in there.connections()] == [True]
    there.expel(here.peer_id)
    assert [connection.admitted for connection in there.connections()] == [False]


async def test_admission_ends_with_the_connection(pair):
    here, there = pair
    await here.disconnect(there.peer_id)
    await until(lambda: not there.connections())
    assert not here.is_admitted(there.peer_id)
    assert not there.is_admitted(here.peer_id)
    await here.connect(there.addresses)
    with pytest.raises(NotAdmitted):
        await here.open_stream(there.peer_id, ECHO)


async def test_nobody_is_admitted_without_a_connection(hosts):
    here, there = await hosts.open(), await hosts.open()
    unknown: PeerId = there.peer_id
    assert not here.is_admitted(unknown)
    here.expel(unknown)
    assert not here.is_admitted(unknown)

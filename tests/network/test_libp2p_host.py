"""What only the real network can do to a host: raw bytes, taken ports, floods, frozen readers.

The rest of what a host does is in tests/contracts/test_peer_host.py.
"""

import hashlib
import logging
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_DATA, YAMUX_HEADER_FORMAT

from ollamamax_p2p.errors import BadAddress, NotAdmitted, PeerGone, PeerUnreachable, PortInUse
from ollamamax_p2p.host import ByteStream, HostSettings, PeerEvent, open_libp2p_host
from ollamamax_p2p.host.libp2p_host import HANDSHAKES_PER_IP_MAX, STREAMS_PER_STRANGER_MAX
from ollamamax_p2p.identity import Address, parse_address
from tests.network.tcp_proxy import open_tcp_proxy

pytestmark = pytest.mark.network

SWARM_KEY = hashlib.sha256(b"swarm").digest()
TCP = "/ip4/127.0.0.1/tcp/0"
ECHO = "/test/echo/1"
BUDGET_S = 30
"""Real seconds, for a busy machine."""

IDENTIFY, PUSH, PING = "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0"
KADEMLIA, TRANSFER = "/omx/kad/1.0.0", "/omx/transfer/1"


@asynccontextmanager
async def host_of(name: str, *, swarm_key: bytes | None = SWARM_KEY, admit_all=False, **settings):
    """A host whose key follows from its name."""
    settings.setdefault("listen", (TCP,))
    async with open_libp2p_host(
        hashlib.sha256(name.encode()).digest(),
        HostSettings(**settings),
        swarm_key=swarm_key,
        admit_all=admit_all,
    ) as host:
        yield host


@pytest.fixture
async def alice() -> AsyncIterator:
    async with host_of("alice") as host:
        host.set_handler(ECHO, echo)
        yield host


@pytest.fixture
async def bob() -> AsyncIterator:
    async with host_of("bob") as host:
        host.set_handler(ECHO, echo)
        yield host


async def echo(stream: ByteStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(BUDGET_S):
        while not condition():  # noqa: ASYNC110 - a host tells no one of this
            await trio.sleep(0.02)


async def befriend(here, there) -> None:
    await here.connect(there.addresses)
    await until(lambda: bool(there.connections()))
    here.admit(there.peer_id)
    there.admit(here.peer_id)


async def answers(here, there) -> bool:
    """Whether a stream still works between two friends."""
    stream = await here.open_stream(there.peer_id, ECHO)
    await stream.send_all(b"ping")
    with trio.fail_after(BUDGET_S):
        data = await stream.receive_some()
    await stream.aclose()
    return data == b"ping"


def port_of(host) -> int:
    return int(host.addresses[0].transport.split("/")[4])


async def test_a_newer_connection_that_is_dead_gives_way_to_the_one_that_is_well():
    """Half-open: alice's second connection is gone, and bob was never told."""
    async with (
        open_tcp_proxy(random.Random(1)) as proxy,
        host_of("alice", dial_timeout_s=2.0) as alice,
        host_of("bob2", dial_timeout_s=2.0) as bob,
    ):
        alice.set_handler(ECHO, echo)
        await befriend(alice, bob)
        proxy.target = port_of(bob)
        async with host_of("alice") as again:  # the same key
            await again.connect(
                [parse_address(f"/ip4/127.0.0.1/tcp/{proxy.port}/p2p/{bob.peer_id}")]
            )
            connections = bob.libp2p.get_network().get_connections
            await until(lambda: len(connections(ID.from_base58(alice.peer_id))) == 2)
            proxy.half_open(dialler_knows=True)
        with pytest.raises(PeerGone, match="did not answer"):
            await answers(bob, alice)
        await until(lambda: len(connections(ID.from_base58(alice.peer_id))) == 1)
        assert await answers(bob, alice)


# -- the door ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol", [IDENTIFY, PUSH, PING, KADEMLIA, TRANSFER, "/libp2p/autonat/1"]
)
async def test_a_stranger_is_refused_everything_before_admission_and_after_expulsion(
    alice, bob, protocol
):
    for name in (KADEMLIA, TRANSFER, "/libp2p/autonat/1"):
        bob.set_handler(name, echo)
    await alice.connect(bob.addresses)
    await until(lambda: bool(bob.connections()))
    with pytest.raises(NotAdmitted):
        await alice.open_stream(bob.peer_id, protocol)
    bob.admit(alice.peer_id)
    await (await alice.open_stream(bob.peer_id, protocol)).aclose()
    bob.expel(alice.peer_id)
    with pytest.raises(NotAdmitted):
        await alice.open_stream(bob.peer_id, protocol)


async def test_a_stranger_that_lists_protocols_sees_only_those_for_strangers(alice, bob):
    bob.set_handler("/test/join/1", echo, for_strangers=True)
    await alice.connect(bob.addresses)
    connection = alice.libp2p.get_network().get_connections(ID.from_base58(bob.peer_id))[0]
    raw = await connection.new_stream()
    listed = await MultiselectClient().query_multistream_command(
        MultiselectCommunicator(raw), "ls", 5
    )
    assert listed == ["/test/join/1"]


async def test_py_libp2p_opens_no_stream_of_its_own_to_a_peer_that_we_have_not_admitted(alice, bob):
    await alice.connect(bob.addresses)
    await until(lambda: bool(bob.connections()))
    bob.admit(alice.peer_id)  # so that bob would answer
    with pytest.raises(Exception, match="not admitted"):
        await alice.libp2p.new_stream(ID.from_base58(bob.peer_id), [PING])
    alice.admit(bob.peer_id)
    await alice.libp2p.new_stream(ID.from_base58(bob.peer_id), [PING])


async def test_members_identify_each_other_once_both_have_admitted(alice, bob):
    await befriend(alice, bob)
    store = alice.libp2p.get_peerstore()

    bob_id = ID.from_base58(bob.peer_id)

    def known() -> bool:
        return store.has_peer(bob_id) and bool(store.supports_protocols(bob_id, [ECHO]))

    await until(known)


async def test_in_an_open_swarm_everybody_is_admitted():
    async with (
        host_of("open one", swarm_key=None, admit_all=True) as one,
        host_of("open two", swarm_key=None, admit_all=True) as two,
    ):
        two.set_handler(ECHO, echo)
        await one.connect(two.addresses)
        assert await answers(one, two)
        assert [connection.admitted for connection in one.connections()] == [True]


async def test_a_stranger_holds_a_few_streams_at_once_and_no_more(alice, bob):
    bob.set_handler("/test/join/1", echo, for_strangers=True)
    await alice.connect(bob.addresses)
    for _ in range(STREAMS_PER_STRANGER_MAX):
        await alice.open_stream(bob.peer_id, "/test/join/1")
    with pytest.raises((PeerGone, NotAdmitted)):
        await alice.open_stream(bob.peer_id, "/test/join/1")


# -- what anybody can send ---------------------------------------------------------------------

GARBAGE = {
    "nothing": b"",
    "a web browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "noise": random.Random(3).randbytes(100_000),
    "zeros": bytes(100_000),
    "an endless varint": b"\xff" * 1_000,
    "a greeting and no more": b"\x13/multistream/1.0.0\n",
    "a greeting, then noise": b"\x13/multistream/1.0.0\n\x07/noise\n" + bytes(500),
    "a protocol that is no text": b"\x13/multistream/1.0.0\n\x04\xff\xfe\xfd\n",
}


@pytest.mark.parametrize("swarm_key", [SWARM_KEY, None], ids=["private", "open"])
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
async def test_garbage_on_the_port_disturbs_nobody(swarm_key, data):
    async with (
        host_of("one", swarm_key=swarm_key) as one,
        host_of("two", swarm_key=swarm_key) as two,
    ):
        two.set_handler(ECHO, echo)
        await befriend(one, two)
        for reset in (False, True):
            raw = await trio.open_tcp_stream("127.0.0.1", port_of(two))
            await raw.send_all(data)
            if reset:  # close with a TCP reset, in the middle of the handshake
                linger = struct.pack("ii", 1, 0)
                raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            await raw.aclose()
        assert await answers(one, two)
        assert len(two.connections()) == 1


async def test_a_member_of_another_swarm_gets_no_further_than_the_first_bytes(bob):
    async with host_of("mallory", swarm_key=hashlib.sha256(b"wrong").digest()) as mallory:
        with pytest.raises(PeerUnreachable):
            await mallory.connect(bob.addresses)
    async with host_of("outsider", swarm_key=None) as outsider:
        with pytest.raises(PeerUnreachable):
            await outsider.connect(bob.addresses)
    assert bob.connections() == ()


async def test_connections_that_say_nothing_are_bounded_in_number_and_time(alice):
    async with host_of("patient", dial_timeout_s=1.0) as patient:
        silent = []
        for _ in range(HANDSHAKES_PER_IP_MAX + 5):
            silent.append(await trio.open_tcp_stream("127.0.0.1", port_of(patient)))
        with trio.fail_after(BUDGET_S):
            for raw in silent[::-1]:  # the surplus at once, the others after a second
                while await raw.receive_some():
                    pass  # what the host says first
        patient.set_handler(ECHO, echo)
        await befriend(alice, patient)
        assert await answers(alice, patient)


async def test_a_protocol_name_that_is_no_text_ends_only_its_stream(alice, bob):
    await befriend(alice, bob)
    connection = alice.libp2p.get_network().get_connections(ID.from_base58(bob.peer_id))[0]
    for data in (b"\x13/multistream/1.0.0\n\x04\xff\xfe\xfd\n", b"\xff" * 64, b"\x00"):
        raw = await connection.new_stream()
        await raw.write(data)
        await raw.reset()
    assert await answers(alice, bob)


async def test_a_peer_that_ignores_its_windows_is_cut_off(alice, bob):
    held = trio.Event()

    async def hold(stream: ByteStream) -> None:
        held.set()
        await trio.sleep_forever()

    bob.set_handler("/test/hold/1", hold)
    await befriend(alice, bob)
    stream = await alice.open_stream(bob.peer_id, "/test/hold/1")
    await held.wait()
    connection = alice.libp2p.get_network().get_connections(ID.from_base58(bob.peer_id))[0]
    yamux, stream_id = connection.muxed_conn, stream._muxed.stream_id
    frame = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream_id, 60_000) + bytes(60_000)

    async def overrun() -> None:
        for _ in range(3_000):  # 180 MB
            await yamux._write_frame(frame)

    with trio.fail_after(BUDGET_S), pytest.raises(ConnectionClosedError):
        await overrun()
    await until(lambda: not bob.connections())


async def begin_frame(here, there, *, length: int, sent: int) -> None:
    """Open a stream with a frame that has so many bytes, of which these are sent."""
    yamux = here.libp2p.get_network().get_connections(ID.from_base58(there.peer_id))[0].muxed_conn
    header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, FLAG_SYN, 4_001, length)
    await yamux._write_frame(header + bytes(sent))


@pytest.mark.parametrize("length", [65_537, 16 * 1024 * 1024])
async def test_a_stranger_that_announces_a_long_frame_is_cut_off_before_it_is_read(
    alice, bob, length
):
    await alice.connect(bob.addresses)
    await until(lambda: bool(bob.connections()))
    await begin_frame(alice, bob, length=length, sent=1)
    await until(lambda: not bob.connections())


async def test_a_stranger_may_leave_a_little_unread_over_all_its_streams(alice, bob):
    bob.set_handler("/test/join/1", hold_for_ever, for_strangers=True)
    await alice.connect(bob.addresses)
    for _ in range(2):
        stream = await alice.open_stream(bob.peer_id, "/test/join/1")
        await stream.send_all(bytes(30_000))
    network = bob.libp2p.get_network()
    yamux = network.get_connections(ID.from_base58(alice.peer_id))[0].muxed_conn
    await until(lambda: sum(map(len, yamux.stream_buffers.values())) >= 60_000)
    assert bob.connections()
    await stream.send_all(bytes(6_000))
    await until(lambda: not bob.connections())


async def test_a_member_that_announces_more_than_any_window_is_cut_off(alice, bob):
    await befriend(alice, bob)
    await begin_frame(alice, bob, length=256 * 1024, sent=256 * 1024)  # what a window allows
    assert await answers(alice, bob)
    await begin_frame(alice, bob, length=16 * 1024 * 1024, sent=1)  # what py-libp2p would read
    await until(lambda: not bob.connections())


async def hold_for_ever(stream: ByteStream) -> None:
    await trio.sleep_forever()


async def test_a_flood_of_streams_that_end_at_once_disturbs_nobody(alice, bob):
    await befriend(alice, bob)
    connection = alice.libp2p.get_network().get_connections(ID.from_base58(bob.peer_id))[0]
    yamux = connection.muxed_conn
    for number in range(1_001, 3_001, 2):
        header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, FLAG_SYN, number, 0)
        await yamux._write_frame(header)
    with trio.fail_after(BUDGET_S):
        while True:
            try:
                assert await answers(alice, bob)
                break
            except (PeerGone, NotAdmitted):  # over the limit until they have timed out or ended
                await alice.disconnect(bob.peer_id)
                await until(lambda: not bob.connections())
                await befriend(alice, bob)


# -- limits ------------------------------------------------------------------------------------


async def test_connections_end_at_the_maximum_and_places_become_free_again(alice):
    async with host_of("small", connections_max=3) as small:
        for round_number in range(3):  # nine come and go: more than there are places
            async with trio.open_nursery() as nursery:
                names = [f"guest {round_number} {number}" for number in range(3)]
                for name in names:
                    await nursery.start(_visit, name, small)
                await until(lambda: len(small.connections()) == 3)
                with pytest.raises(PeerUnreachable):
                    await _connect_and_stay(alice, small)
                nursery.cancel_scope.cancel()
            await until(lambda: not small.connections())
        await alice.connect(small.addresses)
        await until(lambda: len(small.connections()) == 1)


async def _visit(name: str, host, *, task_status: trio.TaskStatus[None]) -> None:
    async with host_of(name) as visitor:
        await visitor.connect(host.addresses)
        task_status.started()
        await trio.sleep_forever()


async def _connect_and_stay(here, there) -> None:
    """The limit is enforced when the handshake is over: the dialler may see a short connection."""
    await here.connect(there.addresses)
    await until(lambda: not here.connections())
    raise PeerUnreachable(there.peer_id, "the connection ended at once")


# -- addresses ---------------------------------------------------------------------------------


async def test_a_port_that_another_program_holds_is_named(alice):
    taken = alice.addresses[0].transport
    with pytest.raises(PortInUse) as caught:
        async with host_of("late", listen=(taken,)):
            pass
    assert str(port_of(alice)) in str(caught.value)


@pytest.mark.parametrize(
    "listen",
    [
        "localhost:4001",
        "/ip4/127.0.0.1/udp/4001/quic-v1",
        "/ip4/192.0.2.1/tcp/0",  # nobody's: kept for documentation
        "/dns4/localhost/tcp/0",
        "/ip4/127.0.0.1/tcp/0/wss",
        "/ip4/127.0.0.1/tcp/99999",
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_refused(listen):
    with pytest.raises(BadAddress):
        async with host_of("nowhere", listen=(listen,)):
            pass


async def test_a_wildcard_is_shown_per_interface_with_loopback_last():
    async with host_of("wild", listen=("/ip4/0.0.0.0/tcp/0",)) as host:
        transports = [address.transport for address in host.addresses]
        assert transports
        assert not any("0.0.0.0" in each for each in transports)
        assert transports[-1].startswith("/ip4/127.0.0.1/tcp/")


async def test_announced_addresses_replace_the_found_ones():
    async with host_of("announcer", announce=("/ip4/203.0.113.9/tcp/4011",)) as host:
        assert [each.transport for each in host.addresses] == ["/ip4/203.0.113.9/tcp/4011"]


@pytest.mark.parametrize("swarm_key", [SWARM_KEY, None], ids=["private", "open"])
async def test_tcp_and_websocket_listen_side_by_side(swarm_key):
    async with (
        host_of("both", swarm_key=swarm_key, listen=(TCP, f"{TCP}/ws")) as both,
        host_of("dialler", swarm_key=swarm_key) as dialler,
    ):
        both.set_handler(ECHO, echo)
        tcp, websocket = both.addresses
        assert websocket.transport.endswith("/ws")
        for address in (tcp, websocket):
            await dialler.connect([address])
            await until(lambda: bool(both.connections()))
            both.admit(dialler.peer_id)
            assert await answers(dialler, both)
            await dialler.disconnect(both.peer_id)
            await until(lambda: not both.connections())


async def test_the_connection_shows_the_address_of_the_other_side(alice, bob):
    await alice.connect(bob.addresses)
    (connection,) = alice.connections()
    assert connection.address == bob.addresses[0].transport


# -- ends --------------------------------------------------------------------------------------


async def test_a_peer_whose_process_dies_is_noticed_at_once(alice):
    async with alice.watch() as events, host_of("mortal") as mortal:
        await mortal.connect(alice.addresses)
        assert (await anext(events)).change == "connected"
        yamux = mortal.libp2p.get_network().get_connections()[0].muxed_conn
        tcp = yamux.secured_conn.conn.read_writer.read_write_closer._conn._conn.stream.stream
        linger = struct.pack("ii", 1, 0)
        tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with trio.fail_after(2):
            tcp.socket.close()  # a reset, as the kernel sends it for a killed process
            assert (await anext(events)).change == "disconnected"


async def test_leaving_takes_less_than_a_second_and_leaves_no_task(alice):
    before = set(_tasks())
    async with host_of("leaver", connections_max=16) as leaver, trio.open_nursery() as nursery:
        for number in range(6):
            await nursery.start(_visit, f"visitor {number}", leaver)
        start = trio.current_time()
        await leaver.go_offline()
        nursery.cancel_scope.cancel()
        elapsed = trio.current_time() - start
    assert elapsed < 1.0
    await until(lambda: set(_tasks()) <= before)


def _tasks() -> list[str]:
    """Every task of this run, system tasks too."""
    root = trio.lowlevel.current_root_task()
    waiting, found = [root], []
    while waiting:
        task = waiting.pop()
        found.append(f"{task.name} {id(task)}")
        waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return found


async def test_two_connections_to_one_peer_count_as_one(alice, bob):
    async with alice.watch() as events:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(alice.connect, bob.addresses)
            nursery.start_soon(bob.connect, alice.addresses)
        assert (await anext(events)).change == "connected"
        assert len(alice.connections()) == 1
        with trio.move_on_after(0.3) as nothing_more:
            await anext(events)
        assert nothing_more.cancelled_caught
        await alice.disconnect(bob.peer_id)
        assert (await anext(events)).change == "disconnected"
        await until(lambda: not bob.connections())


async def test_a_watcher_that_does_not_read_is_ended(alice):
    async with alice.watch() as events:
        for _ in range(1_030):
            alice._report(PeerEvent(alice.peer_id, "connected"))
        with pytest.raises(PeerGone, match="fell behind"):
            async for _ in events:
                pass


# -- relays ------------------------------------------------------------------------------------


def circuits(host) -> list[Address]:
    return [each for each in host.addresses if "/p2p-circuit" in each.transport]


@pytest.mark.parametrize("swarm_key", [SWARM_KEY, None], ids=["private", "open"])
async def test_members_meet_through_a_relay_and_then_directly(swarm_key):
    async with (
        host_of("relay", swarm_key=swarm_key, relay_for_others=True) as relay,
        host_of("hidden", swarm_key=swarm_key, listen=()) as hidden,
        host_of("seeker", swarm_key=swarm_key) as seeker,
    ):
        hidden.set_handler(ECHO, echo)
        await befriend(hidden, relay)
        await befriend(seeker, relay)
        await until(lambda: bool(circuits(hidden)))
        await seeker.connect(circuits(hidden))
        (through,) = [each for each in seeker.connections() if each.peer == hidden.peer_id]
        assert through.address.endswith("/p2p-circuit")
        await until(lambda: len(hidden.connections()) == 2)
        hidden.admit(seeker.peer_id)
        seeker.admit(hidden.peer_id)
        assert await answers(seeker, hidden)
        # The hidden one can dial out, so hole punching's first step is enough.
        await until(lambda: "/p2p-circuit" not in _address_of_peer(seeker, hidden))
        assert await answers(seeker, hidden)


def _address_of_peer(host, peer) -> str:
    return next(each.address for each in host.connections() if each.peer == peer.peer_id)


async def test_a_relay_carries_nothing_for_strangers(alice):
    async with (
        host_of("relay", relay_for_others=True) as relay,
        host_of("hidden", listen=()) as hidden,
    ):
        await befriend(hidden, relay)
        await until(lambda: bool(circuits(hidden)))
        await alice.connect(relay.addresses)
        alice.admit(relay.peer_id)  # but the relay does not admit alice
        with pytest.raises(PeerUnreachable):
            await alice.connect(circuits(hidden))


async def test_without_relays_a_circuit_is_not_dialled(alice, bob):
    async with host_of("straight", relay=False) as straight:
        relay, target = alice.addresses[0], bob.peer_id
        with pytest.raises(PeerUnreachable, match="relays are turned off"):
            await straight.connect([parse_address(f"{relay}/p2p-circuit/p2p/{target}")])


# -- secrets and noise -------------------------------------------------------------------------


async def test_nothing_is_printed_and_the_swarm_key_is_in_no_log(alice, bob, caplog, capfd):
    logging.getLogger("libp2p").setLevel(logging.DEBUG)
    with caplog.at_level(logging.DEBUG):
        await befriend(alice, bob)
        assert await answers(alice, bob)
        async with host_of("spy", swarm_key=hashlib.sha256(b"wrong").digest()) as spy:
            with pytest.raises(PeerUnreachable):
                await spy.connect(alice.addresses)
    seen = caplog.text + repr(alice) + repr(vars(alice))
    for secret in (SWARM_KEY.hex(), repr(SWARM_KEY), hashlib.sha256(b"alice").hexdigest()):
        assert secret not in seen
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "answer",
    [b"\x03\xff\xfe\n", b"", b"\xff" * 20, b"\x13/multistream/1.0.0\n\x02\xff\n"],
    ids=["no text", "nothing", "a huge length", "no protocol"],
)
async def test_whatever_a_peer_answers_to_a_new_stream_is_its_own_trouble(alice, bob, answer):
    async def nonsense(net_stream) -> None:
        if answer:
            await net_stream.write(answer)
            await trio.sleep_forever()  # so that all of it is read
        await net_stream.reset()

    await alice.connect(bob.addresses)
    alice.admit(bob.peer_id)
    bob.libp2p.get_network().set_stream_handler(nonsense)
    with trio.fail_after(BUDGET_S), pytest.raises((PeerGone, NotAdmitted)):
        await alice.open_stream(bob.peer_id, ECHO)

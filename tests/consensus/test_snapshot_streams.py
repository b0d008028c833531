"""A snapshot's way from one member to another, and what interrupts it; on the simulated network."""

import contextlib
import hashlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest
import trio

from ollamamax_p2p.consensus.core.messages import ConfState, SnapshotMetadata
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.snapshot_streams import (
    PART_BYTES_MAX,
    STALL_S,
    Ask,
    Go,
    SnapshotStreams,
    open_snapshot_streams,
)
from ollamamax_p2p.errors import (
    BlobNotFound,
    MalformedMessage,
    NoSources,
    PeerGone,
    StoreDamaged,
    StoreFull,
)
from ollamamax_p2p.host import ByteStream, LinkConditions, open_simulated_network
from ollamamax_p2p.wire import encode_frame, protocol_ids

pytestmark = pytest.mark.usefixtures("repeatable")  # threads take no virtual time

MiB = 1024 * 1024
METADATA = SnapshotMetadata(index=500, term=3, conf_state=ConfState(voters=(1, 2, 3)))
DATA = random.Random(1).randbytes(5 * MiB + 321)


@dataclass
class Disk:
    """What is left of a replica when its program ends."""

    snapshots: dict[int, bytes] = field(default_factory=dict)
    receiving: tuple[int, bytes, bytearray] | None = None
    installed: bytes | None = None
    room: int = 1 << 40
    received: int = 0
    """Bytes written, again and again counted."""


class KeptState:
    """The part of a StateMachine that deals with snapshots; opened on a Disk."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.corrupt_at: int | None = None
        self.said_sha256: bytes | None = None
        self.open_readers = 0
        self.broken = ""

    def open_snapshot(self, metadata: SnapshotMetadata) -> "Reader":
        if self.broken == "open":
            raise StoreDamaged("snapshot", "it cannot be read")
        if metadata.index not in self.disk.snapshots:
            raise BlobNotFound(f"snapshot {metadata.index}")
        self.open_readers += 1
        return Reader(self, metadata)

    def receive_snapshot(self, metadata: SnapshotMetadata, size: int, sha256: bytes) -> "Writer":
        wanted = (metadata.index, sha256)
        if self.disk.receiving is None or self.disk.receiving[:2] != wanted:
            self.disk.receiving = (*wanted, bytearray())
        return Writer(self.disk)

    def install_snapshot(self, metadata: SnapshotMetadata, size: int, sha256: bytes) -> None:
        _, _, data = self.disk.receiving
        self.disk.receiving = None
        if len(data) != size or hashlib.sha256(data).digest() != sha256:
            raise StoreDamaged("snapshot", "it is not what it should be")
        self.disk.installed = bytes(data)


class Reader:
    def __init__(self, state: KeptState, metadata: SnapshotMetadata) -> None:
        self._state = state
        self._data = bytearray(state.disk.snapshots[metadata.index])
        self.metadata = metadata
        self.size = len(self._data)
        self.sha256 = state.said_sha256 or hashlib.sha256(self._data).digest()

    def read(self, offset: int, count: int) -> bytes:
        if self._state.broken == "read":
            raise OSError(5, "Input/output error")
        data = bytearray(self._data[offset : offset + count])
        at = self._state.corrupt_at
        if at is not None and offset <= at < offset + count:
            data[at - offset] ^= 1
            self._state.corrupt_at = None
        return bytes(data)

    def close(self) -> None:
        self._state.open_readers -= 1


class Writer:
    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    @property
    def received(self) -> int:
        return len(self._disk.receiving[2])

    def write(self, data: bytes) -> None:
        if self.received + len(data) > self._disk.room:
            raise StoreFull("snapshots", len(data), self._disk.room - self.received)
        self._disk.receiving[2].extend(data)
        self._disk.received += len(data)

    def close(self) -> None:
        pass


class Swarm:
    """A sender that holds DATA, and followers."""

    def __init__(self, network) -> None:
        self.network = network
        self.members: set[str] = set()
        self.sender = network.add_host("sender")
        self.state = KeptState(Disk(snapshots={METADATA.index: DATA}))
        self.members.add(self.sender.peer_id)

    async def follower(self, name: str):
        host = self.network.add_host(name)
        self.members.add(host.peer_id)
        await self.link(host)
        return host

    async def link(self, host) -> None:
        await host.connect(self.sender.addresses)
        host.admit(self.sender.peer_id)
        self.sender.admit(host.peer_id)

    @asynccontextmanager
    async def streams(self, host, state: KeptState, **settings) -> AsyncIterator[SnapshotStreams]:
        async with open_snapshot_streams(
            host,
            state,
            is_member=self.members.__contains__,
            settings=ConsensusSettings(**settings),
        ) as streams:
            yield streams


@pytest.fixture
async def swarm():
    conditions = LinkConditions(bandwidth_bytes_s=100 * MiB)
    async with open_simulated_network(rng=random.Random(0), conditions=conditions) as network:
        yield Swarm(network)


async def test_a_snapshot_arrives_and_is_installed(autojump_clock, swarm: Swarm) -> None:
    host, disk = await swarm.follower("follower"), Disk()
    async with (
        swarm.streams(swarm.sender, swarm.state) as ours,
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        await theirs.fetch(swarm.sender.peer_id, METADATA)
        assert disk.installed == DATA
        assert ours.bytes_sent == theirs.bytes_received == len(DATA)
    assert swarm.state.open_readers == 0


async def test_an_empty_snapshot_is_one_too(autojump_clock, swarm: Swarm) -> None:
    host, disk = await swarm.follower("follower"), Disk()
    swarm.state.disk.snapshots[METADATA.index] = b""
    async with (
        swarm.streams(swarm.sender, swarm.state),
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        await theirs.fetch(swarm.sender.peer_id, METADATA)
    assert disk.installed == b""


@pytest.mark.parametrize("cut_at_s", [0.0005, 0.002, 0.03, 0.1, 0.15, 0.19])
async def test_a_cut_costs_no_more_than_what_was_under_way(
    autojump_clock, swarm: Swarm, cut_at_s: float
) -> None:
    """The follower's program ends and begins anew as well: only its disk is left."""
    host, disk = await swarm.follower("follower"), Disk()
    async with swarm.streams(swarm.sender, swarm.state, snapshot_rate=20 * MiB):
        async with swarm.streams(host, KeptState(disk)) as theirs, trio.open_nursery() as nursery:
            nursery.start_soon(expect_loss, theirs, swarm.sender.peer_id)
            await trio.sleep(cut_at_s)
            swarm.network.drop(host, swarm.sender)
        assert disk.installed is None
        kept = disk.received
        assert kept < len(DATA)
        await trio.sleep(1)
        await swarm.link(host)
        async with swarm.streams(host, KeptState(disk)) as theirs:
            await theirs.fetch(swarm.sender.peer_id, METADATA)
            assert theirs.bytes_received == len(DATA) - kept
    assert disk.installed == DATA
    assert disk.received == len(DATA)


async def expect_loss(streams: SnapshotStreams, peer) -> None:
    with pytest.raises(PeerGone):
        await streams.fetch(peer, METADATA)


async def test_a_corrupted_part_is_refused_and_all_of_it_begun_anew(
    autojump_clock, swarm: Swarm
) -> None:
    host, disk = await swarm.follower("follower"), Disk()
    swarm.state.corrupt_at = 3 * MiB  # once
    async with (
        swarm.streams(swarm.sender, swarm.state),
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        await theirs.fetch(swarm.sender.peer_id, METADATA)
    assert disk.installed == DATA
    assert disk.received == 2 * len(DATA)


async def test_a_sender_whose_bytes_never_match_is_named(autojump_clock, swarm: Swarm) -> None:
    host, disk = await swarm.follower("follower"), Disk()
    swarm.state.said_sha256 = hashlib.sha256(b"other").digest()
    async with (
        swarm.streams(swarm.sender, swarm.state),
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        with pytest.raises(MalformedMessage, match=str(swarm.sender.peer_id)):
            await theirs.fetch(swarm.sender.peer_id, METADATA)
    assert disk.installed is None
    assert disk.receiving is None


async def test_what_was_kept_and_is_wrong_is_fetched_again(autojump_clock, swarm: Swarm) -> None:
    host = await swarm.follower("follower")
    sha256 = hashlib.sha256(DATA).digest()
    disk = Disk(receiving=(METADATA.index, sha256, bytearray(2 * MiB)))
    async with (
        swarm.streams(swarm.sender, swarm.state),
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        await theirs.fetch(swarm.sender.peer_id, METADATA)
    assert disk.installed == DATA


async def test_a_snapshot_that_gave_way_to_a_newer_one_is_said_to_be_gone(
    autojump_clock, swarm: Swarm
) -> None:
    host = await swarm.follower("follower")
    swarm.state.disk.snapshots = {900: DATA}
    async with (
        swarm.streams(swarm.sender, swarm.state),
        swarm.streams(host, KeptState(Disk())) as theirs,
    ):
        with pytest.raises(NoSources, match="newer"):
            await theirs.fetch(swarm.sender.peer_id, METADATA)


async def test_a_full_disk_is_told_and_the_rest_comes_once_there_is_room(
    autojump_clock, swarm: Swarm
) -> None:
    host, disk = await swarm.follower("follower"), Disk(room=3 * MiB)
    async with (
        swarm.streams(swarm.sender, swarm.state),
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        with pytest.raises(StoreFull):
            await theirs.fetch(swarm.sender.peer_id, METADATA)
        disk.room = 1 << 40
        await theirs.fetch(swarm.sender.peer_id, METADATA)
    assert disk.installed == DATA
    assert disk.received == len(DATA)


@pytest.mark.parametrize(("rate", "seconds"), [(1 * MiB, 5.0), (64 * 1024, 80.0)])
async def test_the_rate_is_kept(autojump_clock, swarm: Swarm, rate: int, seconds: float) -> None:
    host, disk = await swarm.follower("follower"), Disk()
    async with (
        swarm.streams(swarm.sender, swarm.state, snapshot_rate=rate),
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        began = trio.current_time()
        await theirs.fetch(swarm.sender.peer_id, METADATA)
        assert trio.current_time() - began == pytest.approx(seconds, rel=0.1)
    assert disk.installed == DATA


async def test_so_many_get_one_at_once_and_the_others_after_them(
    autojump_clock, swarm: Swarm
) -> None:
    disks = [Disk() for _ in range(5)]
    hosts = [await swarm.follower(f"follower {number}") for number in range(5)]
    finished: list[float] = []
    async with (
        swarm.streams(swarm.sender, swarm.state, snapshots_outgoing_max=2, snapshot_rate=MiB),
        trio.open_nursery() as nursery,
    ):

        async def fetch(host, disk) -> None:
            async with swarm.streams(host, KeptState(disk)) as theirs:
                await theirs.fetch(swarm.sender.peer_id, METADATA)
            finished.append(trio.current_time() - began)

        began = trio.current_time()
        for host, disk in zip(hosts, disks, strict=True):
            nursery.start_soon(fetch, host, disk)
        while len(finished) < 5:
            assert swarm.state.open_readers <= 2
            await trio.sleep(0.1)
    assert all(disk.installed == DATA for disk in disks)
    assert finished[1] < 6
    assert 14 < finished[-1] < 20


async def test_who_is_no_member_gets_nothing_and_who_is_removed_no_more(
    autojump_clock, swarm: Swarm
) -> None:
    host, disk = await swarm.follower("follower"), Disk()
    async with (
        swarm.streams(swarm.sender, swarm.state, snapshot_rate=MiB) as ours,
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_loss, theirs, swarm.sender.peer_id)
            await trio.sleep(2)
            swarm.members.discard(host.peer_id)
            sent = ours.bytes_sent
        assert ours.bytes_sent <= sent + PART_BYTES_MAX
        with pytest.raises(PeerGone):
            await theirs.fetch(swarm.sender.peer_id, METADATA)
    assert disk.installed is None


async def test_a_silent_sender_is_given_up(autojump_clock, swarm: Swarm) -> None:
    host = await swarm.follower("follower")

    async def silent(stream: ByteStream) -> None:
        await trio.sleep_forever()

    swarm.sender.set_handler(protocol_ids.RAFT_SNAPSHOT, silent)
    async with swarm.streams(host, KeptState(Disk())) as theirs:
        with trio.fail_after(STALL_S + 1):
            await expect_loss(theirs, swarm.sender.peer_id)


@pytest.mark.parametrize(
    "lie",
    [
        b"",
        b"\xc1",
        b"\x82\xa2is\xa5found\xa4size\x05",
        b"\x83\xa2is\xa4part\xa6offset\x00\xa4data\xc4\x01x",
    ],
)
async def test_a_sender_that_breaks_the_protocol_is_named(
    autojump_clock, swarm: Swarm, lie: bytes
) -> None:
    host = await swarm.follower("follower")

    async def answer(stream: ByteStream) -> None:
        await stream.receive_some()
        await stream.send_all(len(lie).to_bytes(4, "big") + lie)
        await trio.sleep(1)

    swarm.sender.set_handler(protocol_ids.RAFT_SNAPSHOT, answer)
    async with swarm.streams(host, KeptState(Disk())) as theirs:
        with pytest.raises(MalformedMessage, match=str(swarm.sender.peer_id)):
            await theirs.fetch(swarm.sender.peer_id, METADATA)


async def test_a_follower_that_asks_for_nonsense_is_told_nothing(
    autojump_clock, swarm: Swarm, rng
) -> None:
    host = await swarm.follower("follower")
    async with swarm.streams(swarm.sender, swarm.state) as ours:
        for _ in range(100):
            stream = await host.open_stream(swarm.sender.peer_id, protocol_ids.RAFT_SNAPSHOT)
            junk = rng.randbytes(rng.randrange(1, 100))
            await stream.send_all(len(junk).to_bytes(4, "big") + junk)
            with trio.fail_after(5):
                try:
                    assert await stream.receive_some() == b""
                except PeerGone:
                    continue
        assert ours.bytes_sent == 0
    assert swarm.state.open_readers == 0


async def test_a_follower_that_announces_too_long_a_question_ends_its_stream_only(
    autojump_clock, swarm: Swarm
) -> None:
    host = await swarm.follower("follower")
    async with swarm.streams(swarm.sender, swarm.state):
        stream = await host.open_stream(swarm.sender.peer_id, protocol_ids.RAFT_SNAPSHOT)
        await stream.send_all(b"\xff\xff\xff\xff")
        with trio.fail_after(5), contextlib.suppress(PeerGone):
            assert await stream.receive_some() == b""
        await ask_and_go(host, swarm.sender.peer_id)  # and it may ask again
        await trio.sleep(1)
        assert swarm.state.open_readers == 1


async def test_a_stream_that_ends_before_the_one_it_replaced_does_no_harm(
    autojump_clock, swarm: Swarm
) -> None:
    """The first is still giving its file back: a slow disk is enough."""
    host = await swarm.follower("follower")
    async with swarm.streams(swarm.sender, swarm.state) as ours:
        stream = await ask_and_go(host, swarm.sender.peer_id)
        await trio.sleep(0.5)
        ours._serving.pop(host.peer_id)  # as if one that came later had ended already
        await stream.aclose()
        await trio.sleep(STALL_S + 1)
    assert swarm.state.open_readers == 0


async def test_a_sender_that_cannot_open_or_read_it_says_so(autojump_clock, swarm: Swarm) -> None:
    host = await swarm.follower("follower")
    async with (
        swarm.streams(swarm.sender, swarm.state),
        swarm.streams(host, KeptState(Disk())) as theirs,
    ):
        swarm.state.broken = "read"
        with pytest.raises(NoSources, match="cannot read on"):
            await theirs.fetch(swarm.sender.peer_id, METADATA)
        swarm.state.broken = "open"
        with pytest.raises(NoSources, match="cannot read it"):
            await theirs.fetch(swarm.sender.peer_id, METADATA)
    assert swarm.state.open_readers == 0


async def test_a_follower_that_reads_nothing_loses_its_place(autojump_clock, swarm: Swarm) -> None:
    host = await swarm.follower("follower")
    async with swarm.streams(swarm.sender, swarm.state):
        stream = await ask_and_go(host, swarm.sender.peer_id)
        await trio.sleep(1)
        assert swarm.state.open_readers == 1
        await trio.sleep(STALL_S)
        assert swarm.state.open_readers == 0
        await stream.aclose()


async def test_a_follower_that_comes_back_takes_its_own_place(autojump_clock, swarm: Swarm) -> None:
    host, disk = await swarm.follower("follower"), Disk()
    async with (
        swarm.streams(swarm.sender, swarm.state, snapshots_outgoing_max=1),
        swarm.streams(host, KeptState(disk)) as theirs,
    ):
        await ask_and_go(host, swarm.sender.peer_id)
        await trio.sleep(0.5)
        with trio.fail_after(2):
            await theirs.fetch(swarm.sender.peer_id, METADATA)
    assert disk.installed == DATA
    assert swarm.state.open_readers == 0


async def ask_and_go(host, sender) -> ByteStream:
    """A follower's stream on which everything was asked for, and nothing is read."""
    stream = await host.open_stream(sender, protocol_ids.RAFT_SNAPSHOT)
    for message in (Ask(metadata=METADATA), Go(offset=0)):
        payload = msgspec.msgpack.encode(message)
        await stream.send_all(encode_frame(payload, max_bytes=4096))
    return stream

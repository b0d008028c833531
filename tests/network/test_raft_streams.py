"""Raft's streams between real hosts on loopback: amounts that only a real network makes costly."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
import trio

from ollamamax_p2p.consensus.core.messages import (
    ConfState,
    Entry,
    Message,
    MessageType,
    SnapshotMetadata,
)
from ollamamax_p2p.consensus.core.raft_frames import FRAME_BYTES_MAX, encode_hello
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.snapshot_streams import open_snapshot_streams
from ollamamax_p2p.consensus.stream_transport import open_stream_transport
from ollamamax_p2p.errors import PeerGone
from ollamamax_p2p.host import HostSettings, open_libp2p_host
from ollamamax_p2p.wire import encode_frame, protocol_ids

pytestmark = pytest.mark.network

BUDGET_S = 60
MiB = 1024 * 1024


@asynccontextmanager
async def linked_hosts() -> AsyncIterator[tuple]:
    """Two hosts that are connected and admit each other."""
    async with open_host("one") as one, open_host("two") as two:
        await one.connect(two.addresses)
        await until(lambda: bool(two.connections()))
        one.admit(two.peer_id)
        two.admit(one.peer_id)
        yield one, two


def open_host(name: str):
    return open_libp2p_host(
        hashlib.sha256(name.encode()).digest(),
        HostSettings(listen=("/ip4/127.0.0.1/tcp/0",), relay=False),
        swarm_key=hashlib.sha256(b"swarm").digest(),
    )


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(BUDGET_S):
        while not condition():  # noqa: ASYNC110 - nothing tells when
            await trio.sleep(0.005)


def transport_of(host, ids: dict, arrived: list, unreachable: list):
    return open_stream_transport(
        host,
        peer_of={number: peer for peer, number in ids.items()}.get,
        id_of=ids.get,
        deliver=arrived.extend,
        report_unreachable=unreachable.append,
        settings=ConsensusSettings(),
    )


def app(index: int, entries: int) -> Message:
    return Message(
        type=MessageType.APP,
        to=2,
        from_=1,
        term=1,
        log_term=min(1, index),
        index=index,
        entries=tuple(Entry(term=1, index=index + 1 + i, data=bytes(256)) for i in range(entries)),
    )


async def test_ten_thousand_entries_arrive_whole_and_in_order() -> None:
    arrived: list[Message] = []
    unreachable: list[int] = []
    async with linked_hosts() as (one, two):
        ids = {one.peer_id: 1, two.peer_id: 2}
        async with (
            transport_of(one, ids, [], unreachable) as ours,
            transport_of(two, ids, arrived, unreachable),
        ):
            sent = [app(index, 50) for index in range(0, 10_000, 50)]
            for each in sent:
                ours.send([each])
            await until(lambda: len(arrived) == len(sent))
    assert arrived == sent
    assert unreachable == []


async def test_a_hostile_member_sends_garbage_and_the_transport_goes_on(rng: Random) -> None:
    arrived: list[Message] = []
    async with linked_hosts() as (one, two):
        ids = {one.peer_id: 1, two.peer_id: 2}
        async with transport_of(two, ids, arrived, []):
            hello = encode_frame(encode_hello(), max_bytes=FRAME_BYTES_MAX)
            for _ in range(30):
                with suppress(PeerGone):
                    stream = await one.open_stream(two.peer_id, protocol_ids.RAFT)
                    junk = rng.choice((b"\xff" * 8, rng.randbytes(300), b"\0\0\0\x05\xdd\xff\xff"))
                    await stream.send_all(hello + junk)
                    await stream.aclose()
            assert arrived == []
            async with transport_of(one, ids, [], []) as honest:
                honest.send([app(0, 1)])
                await until(lambda: arrived == [app(0, 1)])


class SnapshotInMemory:
    """Holds one snapshot, or receives one."""

    def __init__(self, data: bytes = b"") -> None:
        self.metadata = SnapshotMetadata(index=9, term=1, conf_state=ConfState(voters=(1, 2)))
        self.data = data
        self.size, self.sha256 = len(data), hashlib.sha256(data).digest()
        self.incoming = bytearray()

    def open_snapshot(self, metadata):
        return self

    def receive_snapshot(self, metadata, size, sha256):
        return self

    def install_snapshot(self, metadata, size, sha256) -> None:
        assert hashlib.sha256(self.incoming).digest() == sha256
        self.data = bytes(self.incoming)

    @property
    def received(self) -> int:
        return len(self.incoming)

    def read(self, offset: int, count: int) -> bytes:
        return self.data[offset : offset + count]

    def write(self, data: bytes) -> None:
        self.incoming += data

    def close(self) -> None:
        pass


async def test_a_snapshot_of_many_parts_is_installed_while_messages_go_on() -> None:
    held, wanted = SnapshotInMemory(Random(2).randbytes(16 * MiB)), SnapshotInMemory()
    arrived: list[Message] = []
    async with linked_hosts() as (one, two):
        ids = {one.peer_id: 1, two.peer_id: 2}
        settings = ConsensusSettings()

        def streams(host, state):
            return open_snapshot_streams(host, state, is_member=ids.__contains__, settings=settings)

        async with (
            transport_of(one, ids, [], []) as ours,
            transport_of(two, ids, arrived, []),
            streams(one, held),
            streams(two, wanted) as theirs,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(theirs.fetch, one.peer_id, held.metadata)
            beside = 0
            while not wanted.data:
                ours.send([app(0, 1)])
                await until(lambda so_far=beside: len(arrived) > so_far or bool(wanted.data))
                beside = len(arrived)
    assert wanted.data == held.data
    assert beside > 3

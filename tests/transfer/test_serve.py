"""Serving on the simulated network: turns, slow readers, fetchers that break the protocol."""

import logging

import pytest
import trio

from ollamamax_p2p.content.core.digest import digest_of, raw_hash
from ollamamax_p2p.errors import PeerGone
from ollamamax_p2p.host import LinkConditions, MessageStream
from ollamamax_p2p.transfer import TransferSettings
from ollamamax_p2p.transfer.core.messages import (
    Choke,
    ChunkPart,
    Have,
    NotHeld,
    Open,
    Unchoke,
    Want,
    fetcher_codec,
    source_codec,
)
from ollamamax_p2p.wire import protocol_ids
from tests.transfer.swarm import MiB, open_swarm, some_bytes

pytestmark = pytest.mark.usefixtures("repeatable")

DATA = some_bytes(6 * MiB)
DIGEST = digest_of(DATA)


async def speak(host, peer):
    stream = await host.open_stream(peer, protocol_ids.TRANSFER)
    return MessageStream(stream, sends=fetcher_codec, receives=source_codec)


async def test_waiting_fetchers_get_their_turn_and_all_get_about_the_same(autojump_clock, seed):
    settings = TransferSettings(upload_slots=2, upload_rotation_s=2.0)
    data = some_bytes(24 * MiB)
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[data], settings=settings, upload_bytes_s=2 * MiB)
        got = {}

        async def drain(host):
            """A fetcher that wants everything again and again."""
            stream = await speak(host, holder.id)
            got[host] = 0
            await stream.send(Open(blob=0, digest=raw_hash(digest_of(data))))
            while True:
                message = await stream.receive()
                if isinstance(message, Unchoke) or (
                    isinstance(message, ChunkPart) and message.offset + len(message.data) == MiB
                ):
                    await stream.send(Want(blob=0, chunk=got[host] // MiB % 24))
                if isinstance(message, ChunkPart):
                    got[host] += len(message.data)

        hosts = [await swarm.add_host() for _ in range(6)]
        with trio.move_on_after(120):
            async with trio.open_nursery() as nursery:
                for host in hosts:
                    nursery.start_soon(drain, host)
        assert min(got.values()) > 0.6 * max(got.values())
        assert sum(got.values()) > 0.8 * 120 * 2 * MiB


async def test_a_fetcher_that_does_not_read_holds_up_only_itself(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[DATA])
        lazy = await speak(await swarm.add_host(), holder.id)
        await lazy.send(Open(blob=0, digest=raw_hash(DIGEST)))
        assert isinstance(await lazy.receive(), Have)
        assert isinstance(await lazy.receive(), Unchoke)
        for chunk in range(6):
            await lazy.send(Want(blob=0, chunk=chunk))
        await trio.sleep(5)
        sent = holder.transfer.bytes_served
        assert sent <= 2 * MiB
        me = await swarm.add()
        began = trio.current_time()
        with trio.fail_after(30):
            await me.transfer.fetch(DIGEST, len(DATA))
        assert trio.current_time() - began < 5


async def test_what_is_not_held_is_said_so(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder = await swarm.add()
        stream = await speak(await swarm.add_host(), holder.id)
        await stream.send(Open(blob=3, digest=raw_hash(DIGEST)))
        assert await stream.receive() == NotHeld(blob=3)


async def test_a_blob_that_is_removed_while_it_is_served_is_said_to_be_lost(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[DATA])
        stream = await speak(await swarm.add_host(), holder.id)
        await stream.send(Open(blob=3, digest=raw_hash(DIGEST)))
        assert isinstance(await stream.receive(), Have)
        assert isinstance(await stream.receive(), Unchoke)
        await holder.store.remove_unused([DIGEST])
        await stream.send(Want(blob=3, chunk=0))
        assert await stream.receive() == NotHeld(blob=3)
        assert isinstance(await stream.receive(), Choke)


async def test_a_fetcher_that_breaks_the_protocol_is_named_and_cut_off(
    autojump_clock, seed, caplog
):
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[DATA])
        host = await swarm.add_host()
        stream = await speak(host, holder.id)
        await stream.send(Want(blob=9, chunk=0))
        with caplog.at_level(logging.WARNING), trio.fail_after(5), pytest.raises(PeerGone):
            await stream.receive()
        assert host.peer_id in caplog.text
        assert "blob 9" in caplog.text


async def test_garbage_on_the_stream_ends_it_and_nothing_else(autojump_clock, seed):
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[DATA])
        host = await swarm.add_host()
        for garbage in (b"\x00\x00\x00\x03abc", b"\xff\xff\xff\xff", b"\x00"):
            stream = await host.open_stream(holder.id, protocol_ids.TRANSFER)
            await stream.send_all(garbage)
            await stream.aclose()
        me = await swarm.add()
        with trio.fail_after(30):
            await me.transfer.fetch(DIGEST, len(DATA))


@pytest.mark.parametrize("latency_s", [0.0005, 0.05])
async def test_the_link_is_kept_full_near_and_far(autojump_clock, seed, latency_s):
    data = some_bytes(64 * MiB)
    rate = 25e6
    conditions = LinkConditions(latency_s=latency_s, window_bytes=16 * MiB)
    async with open_swarm(seed, conditions) as swarm:
        await swarm.add(holding=[data], upload_bytes_s=rate)
        me = await swarm.add()
        began = trio.current_time()
        with trio.fail_after(60):
            await me.transfer.fetch(digest_of(data), len(data))
        taken = trio.current_time() - began
        assert taken < 1.15 * len(data) / rate + 20 * latency_s


async def test_a_seed_uploads_little_more_than_one_copy_to_eight(autojump_clock, seed):
    data = some_bytes(48 * MiB)
    digest = digest_of(data)
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[data], upload_bytes_s=25e6, download_bytes_s=25e6)
        nodes = [await swarm.add(upload_bytes_s=25e6, download_bytes_s=25e6) for _ in range(8)]
        began = trio.current_time()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    nursery.start_soon(node.transfer.fetch, digest, len(data))
        assert holder.transfer.bytes_served < 2.0 * len(data)
        assert trio.current_time() - began < 2.2 * len(data) / 25e6
        for node in nodes:
            assert await node.store.has(digest)

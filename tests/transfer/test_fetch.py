"""Fetching blobs from peers on the simulated network."""

import pytest
import trio

from ollamamax_p2p.content import RamStore
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.errors import NoSources, StoreFull
from ollamamax_p2p.transfer import TransferSettings
from tests.transfer.swarm import MiB, open_swarm, some_bytes

pytestmark = pytest.mark.usefixtures("repeatable")

MBIT = 125_000.0


async def assert_holds(node, data):
    reader = await node.store.open(digest_of(data))
    assert await reader.read_at(0, len(data)) == data


async def test_a_blob_comes_whole_from_one_source(autojump_clock, seed):
    data = some_bytes(10 * MiB + 17)
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[data])
        me = await swarm.add()
        with trio.fail_after(60):
            tally = await me.transfer.fetch(digest_of(data), len(data))
        await assert_holds(me, data)
        assert tally.by_source == {("peer", holder.id): len(data)}
        assert tally.refetched == 0


@pytest.mark.parametrize("size", [0, 1])
async def test_a_blob_of_next_to_nothing_is_a_blob(autojump_clock, seed, size):
    data = some_bytes(size)
    async with open_swarm(seed) as swarm:
        await swarm.add(holding=[data])
        me = await swarm.add()
        with trio.fail_after(60):
            await me.transfer.fetch(digest_of(data), size)
        await assert_holds(me, data)


async def test_many_sources_share_the_work(autojump_clock, seed):
    data = some_bytes(24 * MiB)
    async with open_swarm(seed) as swarm:
        holders = [await swarm.add(holding=[data], upload_bytes_s=100 * MBIT) for _ in range(4)]
        me = await swarm.add()
        began = trio.current_time()
        with trio.fail_after(60):
            tally = await me.transfer.fetch(digest_of(data), len(data))
        shares = {share.name: share.bytes for share in tally.shares()}
        assert set(shares) == {holder.id for holder in holders}
        assert min(shares.values()) >= 4 * MiB
        one_alone_s = len(data) / (100 * MBIT)
        assert trio.current_time() - began < 0.4 * one_alone_s


async def test_a_second_fetch_of_the_same_blob_shares_the_first(autojump_clock, seed):
    data = some_bytes(6 * MiB)
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[data], upload_bytes_s=50 * MBIT)
        me = await swarm.add()
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(me.transfer.fetch, digest_of(data), len(data))
        assert holder.transfer.bytes_served == len(data)


async def test_a_cancelled_fetch_stops_at_once_and_the_next_one_goes_on(autojump_clock, seed):
    data = some_bytes(16 * MiB)
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[data], upload_bytes_s=8 * MiB)
        me = await swarm.add()
        cancelled_at = trio.current_time() + 1.5
        with trio.move_on_at(cancelled_at):
            await me.transfer.fetch(digest_of(data), len(data))
        assert trio.current_time() == cancelled_at
        assert not await me.store.has(digest_of(data))
        with trio.fail_after(60):
            tally = await me.transfer.fetch(digest_of(data), len(data))
        await assert_holds(me, data)
        in_flight = TransferSettings().requests_in_flight_bytes
        assert tally.fetched < len(data)
        assert holder.transfer.bytes_served <= len(data) + in_flight


async def test_what_one_node_leaves_unfinished_another_run_goes_on_with(autojump_clock, seed):
    data = some_bytes(16 * MiB)
    store = RamStore()
    async with open_swarm(seed) as swarm:
        await swarm.add(holding=[data], upload_bytes_s=8 * MiB)
        me = await swarm.add(store=store)
        with trio.move_on_after(1.5):
            await me.transfer.fetch(digest_of(data), len(data))
    async with open_swarm(seed) as swarm:
        await swarm.add(holding=[data])
        me = await swarm.add(store=store)
        with trio.fail_after(60):
            tally = await me.transfer.fetch(digest_of(data), len(data))
        assert tally.completed == len(data)
        assert tally.fetched < 10 * MiB


async def test_a_peer_that_goes_quiet_loses_its_chunks(autojump_clock, seed):
    data = some_bytes(12 * MiB)
    async with open_swarm(seed) as swarm:
        quiet = await swarm.add(holding=[data], upload_bytes_s=2 * MiB)
        fast = await swarm.add(holding=[data], upload_bytes_s=2 * MiB)
        me = await swarm.add()
        async with trio.open_nursery() as nursery:
            done = me.start_fetch(nursery, data)
            await trio.sleep(1)
            swarm.network.freeze(quiet.host)
            with trio.fail_after(60):
                await done.wait()
        assert fast.transfer.bytes_served > len(data) / 2


async def test_a_peer_that_vanishes_is_done_without(autojump_clock, seed):
    data = some_bytes(12 * MiB)
    async with open_swarm(seed) as swarm:
        gone = await swarm.add(holding=[data], upload_bytes_s=2 * MiB)
        await swarm.add(holding=[data], upload_bytes_s=2 * MiB)
        me = await swarm.add()
        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                await trio.sleep(1)
                swarm.network.kill(gone.host)

            nursery.start_soon(kill)
            with trio.fail_after(30):
                await me.transfer.fetch(digest_of(data), len(data))
        await assert_holds(me, data)


async def test_nobody_holds_it(autojump_clock, seed):
    data = some_bytes(MiB)
    async with open_swarm(seed) as swarm:
        await swarm.add()
        me = await swarm.add()
        began = trio.current_time()
        with trio.fail_after(120), pytest.raises(NoSources):
            await me.transfer.fetch(digest_of(data), len(data))
        assert trio.current_time() - began < 62


async def test_the_only_source_vanishes_and_what_is_here_is_kept(autojump_clock, seed):
    data = some_bytes(12 * MiB)
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[data], upload_bytes_s=4 * MiB)
        me = await swarm.add()

        async def kill() -> None:
            await trio.sleep(2)
            swarm.network.kill(holder.host)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            with trio.fail_after(200), pytest.raises(NoSources, match="kept"):
                await me.transfer.fetch(digest_of(data), len(data))
        async with await me.store.partial(digest_of(data), len(data)) as partial:
            missing = sum(end - start for start, end in partial.missing())
        assert 0 < missing < len(data)


async def test_two_with_different_halves_complete_each_other(autojump_clock, seed):
    """Chunks are served while the blob is incomplete, and offers are pushed as they come."""
    data = some_bytes(12 * MiB)
    digest = digest_of(data)
    async with open_swarm(seed) as swarm:
        holder = await swarm.add(holding=[data], upload_bytes_s=2 * MiB)
        nodes = [await swarm.add() for _ in range(2)]
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    nursery.start_soon(node.transfer.fetch, digest, len(data))
        assert holder.transfer.bytes_served < 1.3 * len(data)
        assert all(node.transfer.bytes_served > 0 for node in nodes)


async def test_a_full_store_ends_the_fetch_with_its_name(autojump_clock, seed):
    data = some_bytes(2 * MiB)
    async with open_swarm(seed) as swarm:
        await swarm.add(holding=[data])
        me = await swarm.add(store=RamStore(capacity_bytes=MiB))
        with trio.fail_after(60), pytest.raises(StoreFull):
            await me.transfer.fetch(digest_of(data), len(data))

"""The same transfer over py-libp2p on loopback and with stores on disk."""

import random
from contextlib import AsyncExitStack

import pytest
import trio

from ollamamax_p2p.content import ContentSettings, open_disk_store
from ollamamax_p2p.content.core.digest import digest_of
from ollamamax_p2p.host import HostSettings, open_libp2p_host
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.transfer import TransferSettings, open_transfer
from tests.transfer.swarm import Directory, MiB, some_bytes

pytestmark = pytest.mark.network


async def test_three_fetch_from_one_seed_and_from_one_another(tmp_path):
    data = some_bytes(24 * MiB)
    digest = digest_of(data)
    directory = Directory()
    settings = HostSettings(listen=("/ip4/127.0.0.1/tcp/0",), relay=False)
    with trio.fail_after(100):
        async with AsyncExitStack() as stack:
            nodes = []
            for number in range(4):
                host = await stack.enter_async_context(
                    open_libp2p_host(
                        bytes([number + 1]) * 32, settings, swarm_key=None, admit_all=True
                    )
                )
                folder = tmp_path / str(number)
                store = await stack.enter_async_context(
                    open_disk_store(
                        folder / "models", folder / "side", ContentSettings(reserve_bytes=0)
                    )
                )
                if number == 0:
                    await store.put(data)
                for other, _, _ in nodes:
                    await host.connect(other.addresses)

                transfer = await stack.enter_async_context(
                    open_transfer(
                        host,
                        store,
                        directory.of(host),
                        TransferSettings(),
                        origin=None,
                        connected_peers=lambda host=host: [c.peer for c in host.connections()],
                        rng=random.Random(number),
                        feed=EventFeed(),
                        wall_clock=lambda: 1_800_000_000.0,
                    )
                )
                nodes.append((host, store, transfer))
            async with trio.open_nursery() as nursery:
                for _, _, transfer in nodes[1:]:
                    nursery.start_soon(transfer.fetch, digest, len(data))
            for _, store, _ in nodes:
                async with await store.open(digest) as reader:
                    assert await reader.read_at(0, len(data)) == data
            assert nodes[0][2].bytes_served < 2 * len(data)
            assert sum(transfer.bytes_served for *_, transfer in nodes) < 3.3 * len(data)

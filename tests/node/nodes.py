"""Whole nodes over real sockets on loopback, in this process."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from ollamamax_p2p import Event, Node, load_config, open_node
from ollamamax_p2p.inference import Backend

MiB = 1024 * 1024
BUDGET_S = 30
"""Real seconds, for a busy machine."""


def node_at(
    folder: Path, *, backends: Sequence[Backend] = (), **flags: Any
) -> AbstractAsyncContextManager[Node]:
    """A node with its data and its store in a folder of its own, on a free port of loopback; it has
    no engines but those that are given.
    """
    return open_node(
        load_config(
            environment={},
            flags={
                "data_dir": str(folder / "data"),
                "content.models": str(folder / "models"),
                "content.reserve_bytes": 0,
                "host.listen": ["/ip4/127.0.0.1/tcp/0"],
                "discovery.mdns": False,
                "origin.enabled": False,
                "inference.embedded": False,
                "inference.ollama_url": "",
                **flags,
            },
        ),
        backends=backends,
    )


def model_file(path: Path, size: int = 100_000, seed: int = 1) -> Path:
    """A safetensors file of random bytes."""
    data = random.Random(seed).randbytes(size)
    header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what nobody tells."""
    with trio.fail_after(BUDGET_S):
        while not condition():  # noqa: ASYNC110 - that is what this is for
            await trio.sleep(0.02)


@asynccontextmanager
async def heard(node: Node) -> AsyncIterator[list[Event]]:
    """The node's events, as they come, until the block ends."""
    events: list[Event] = []

    async def listen(task_status: trio.TaskStatus[None]) -> None:
        async with node.events.subscribe() as subscription:
            task_status.started()
            async for event in subscription:
                events.append(event)

    async with trio.open_nursery() as nursery:
        await nursery.start(listen)
        yield events
        nursery.cancel_scope.cancel()


async def peer_ids(node: Node) -> set[str]:
    return {peer.peer_id for peer in await node.peers()}


async def until_peers(node: Node, *others: Node) -> None:
    """Wait until these are the node's peers."""
    wanted = {other.peer_id for other in others}
    with trio.fail_after(BUDGET_S):
        while await peer_ids(node) != wanted:  # noqa: ASYNC110 - as above
            await trio.sleep(0.02)


def tree_of(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its size."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }

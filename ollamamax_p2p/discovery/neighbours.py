"""What discovery needs of the node's connections; `host.Connections` is it."""

from collections.abc import Sequence
from typing import Protocol

import trio

from ollamamax_p2p.errors import NetworkTrouble, PeerMisbehaved
from ollamamax_p2p.identity import Address, PeerId

DIALS_AT_ONCE_MAX = 8
"""A dial costs both sides about 0.2 s of processor time (Noise, yamux, identify)."""


class Linked(Protocol):
    """What discovery reads of a connected member."""

    @property
    def peer(self) -> PeerId:
        """Who it is."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it says it can be dialled."""


class Neighbours(Protocol):
    """Members that this node is connected to, and how it gets to others."""

    def peers(self) -> Sequence[Linked]:
        """Members connected now; never a stranger."""

    async def reach(self, addresses: Sequence[Address]) -> PeerId:
        """Be connected to the one peer these name, as fellow members. Raises NetworkTrouble or
        PeerMisbehaved.
        """


def linked_peers(neighbours: Neighbours) -> list[PeerId]:
    """The ids of the members connected now."""
    return [linked.peer for linked in neighbours.peers()]


async def reach_all(neighbours: Neighbours, peers: Sequence[Sequence[Address]]) -> None:
    """Try to reach each peer, some at once. Those that cannot be reached are left out silently:
    what others say about addresses is often stale. Deadlines are the caller's.
    """
    slots = trio.CapacityLimiter(DIALS_AT_ONCE_MAX)

    async def try_one(addresses: Sequence[Address]) -> None:
        async with slots:
            try:
                await neighbours.reach(addresses)
            except (NetworkTrouble, PeerMisbehaved):
                return

    async with trio.open_nursery() as nursery:
        for addresses in peers:
            nursery.start_soon(try_one, addresses)

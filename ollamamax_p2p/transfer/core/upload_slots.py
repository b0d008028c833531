"""Who is served now: a fixed number of slots, shared in turn by the peers that want something.

A peer gets a free slot at once. When there is none it waits, and after `rotation_s` the peer that
has had its slot longest makes room for the one that has waited longest. So with s slots and n peers
each is served s/n of the time and waits n/s turns at most. A turn is long against a round trip, so
that few requests are lost by turning.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

Peer = TypeVar("Peer", bound=Hashable)


class UploadSlots(Generic[Peer]):
    """Grants and takes back slots. Both dictionaries are in order, longest first."""

    def __init__(self, *, slots: int, rotation_s: float) -> None:
        self._slots = slots
        self._rotation_s = rotation_s
        self._served_since: dict[Peer, float] = {}
        self._waiting: dict[Peer, None] = {}

    def is_served(self, peer: Peer) -> bool:
        """Whether it holds a slot."""
        return peer in self._served_since

    def wants(self, peer: Peer) -> None:
        """It would like to be served; `turn` grants it. Idempotent."""
        if peer not in self._served_since:
            self._waiting.setdefault(peer)

    def leaves(self, peer: Peer) -> None:
        """It wants nothing any more, or is gone."""
        self._served_since.pop(peer, None)
        self._waiting.pop(peer, None)

    def turn(self, *, now: float) -> tuple[list[Peer], list[Peer]]:
        """Give the slots out anew: (peers to choke, peers to unchoke). Call it when a peer comes or
        goes and once a second.
        """
        choked: list[Peer] = []
        free = self._slots - len(self._served_since)
        for peer, since in list(self._served_since.items()):
            if len(choked) >= len(self._waiting) - free or now - since < self._rotation_s:
                break
            choked.append(peer)
            del self._served_since[peer]
        unchoked = list(self._waiting)[: self._slots - len(self._served_since)]
        for peer in unchoked:
            del self._waiting[peer]
            self._served_since[peer] = now
        for peer in choked:
            self._waiting[peer] = None
        return choked, unchoked

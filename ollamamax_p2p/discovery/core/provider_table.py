"""Who told us that it holds what. Bounded, so that no peer can make it grow.

One record per (holder, blob), first-hand only: a peer speaks for itself. A peer that tells more
than its share loses its own oldest records; when the whole table is full, the peer with the most
records loses its oldest, so a flood pushes out the flooder and not the others.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.discovery.core.provider_messages import LIFETIME_S_MAX
from ollamamax_p2p.identity.core.addresses import Address
from ollamamax_p2p.identity.core.peer_id import PeerId

RECORDS_PER_PEER_MAX = 16_384
"""A store of two thousand models has about ten thousand blobs."""

RECORDS_MAX = 200_000
"""About 40 MB of dictionaries; two hundred peers with a thousand blobs each."""

SWEEP_PAUSE_S = 1.0
"""A full table looks for expired records at most this often: a look takes 20 ms, and a peer may
tell records that live for a moment.
"""


@dataclass(frozen=True, slots=True)
class Holding:
    """One peer that holds a blob."""

    peer: PeerId
    addresses: tuple[Address, ...]
    """As it told them; may be empty."""


class ProviderTable:
    """The records. Time is `now`, seconds on any clock that only goes forward."""

    def __init__(
        self, *, per_peer_max: int = RECORDS_PER_PEER_MAX, records_max: int = RECORDS_MAX
    ) -> None:
        self._per_peer_max = per_peer_max
        self._records_max = records_max
        self._expiry: dict[PeerId, dict[Digest, float]] = {}  # per peer: oldest told first
        self._holders: dict[Digest, dict[PeerId, None]] = {}
        self._addresses: dict[PeerId, tuple[Address, ...]] = {}
        self._count = 0
        self._sizes: dict[int, dict[PeerId, None]] = {}  # who has so many records
        self._largest = 0
        self._earliest = math.inf  # no record expires before
        self._sweep_at = -math.inf

    def __len__(self) -> int:
        return self._count

    def tell(
        self,
        peer: PeerId,
        held: Iterable[Digest],
        released: Iterable[Digest],
        *,
        addresses: tuple[Address, ...],
        lifetime_s: float,
        fresh: bool,
        now: float,
    ) -> None:
        """Note what a peer says of itself. Addresses that name another peer are left out."""
        if fresh:
            self.forget(peer)
        for digest in released:
            self._remove(peer, digest)
        expires = now + min(max(lifetime_s, 0.0), LIFETIME_S_MAX)
        for digest in held:
            self._put(peer, digest, expires, now)
        if peer in self._expiry:
            self._addresses[peer] = tuple(a for a in addresses if a.peer == peer)

    def holders(
        self, digest: Digest, *, connected: Collection[PeerId], now: float
    ) -> list[Holding]:
        """Those whose record is alive: connected ones first, then the freshest first."""
        found = []
        for peer in list(self._holders.get(digest, ())):
            expires = self._expiry[peer][digest]
            if expires <= now:
                self._remove(peer, digest)
            else:
                found.append((peer not in connected, -expires, peer))
        return [Holding(peer, self._addresses.get(peer, ())) for _, _, peer in sorted(found)]

    def forget(self, peer: PeerId) -> None:
        """Drop all that the peer told."""
        for digest in list(self._expiry.get(peer, ())):
            self._remove(peer, digest)

    def expire(self, now: float) -> None:
        """Drop what was not renewed."""
        if now < self._earliest:
            return
        for peer in list(self._expiry):
            dead = [d for d, expires in self._expiry[peer].items() if expires <= now]
            for digest in dead:
                self._remove(peer, digest)
        alive = (min(records.values()) for records in self._expiry.values())
        self._earliest = min(alive, default=math.inf)

    def _put(self, peer: PeerId, digest: Digest, expires: float, now: float) -> None:
        self._remove(peer, digest)  # a renewed record becomes the peer's newest
        if len(self._expiry.get(peer, ())) >= self._per_peer_max:
            self._remove_oldest_of(peer)
        if self._count >= self._records_max and now >= self._sweep_at:
            self._sweep_at = now + SWEEP_PAUSE_S
            self.expire(now)
        if self._count >= self._records_max:
            self._remove_oldest_of(next(iter(self._sizes[self._largest])))
        records = self._expiry.setdefault(peer, {})
        records[digest] = expires
        self._holders.setdefault(digest, {})[peer] = None
        self._count += 1
        self._earliest = min(self._earliest, expires)
        self._resized(peer, len(records) - 1, len(records))

    def _remove_oldest_of(self, peer: PeerId) -> None:
        self._remove(peer, next(iter(self._expiry[peer])))

    def _remove(self, peer: PeerId, digest: Digest) -> None:
        records = self._expiry.get(peer)
        if records is None or records.pop(digest, None) is None:
            return
        self._count -= 1
        self._resized(peer, len(records) + 1, len(records))
        if not records:
            del self._expiry[peer]
            self._addresses.pop(peer, None)
        del self._holders[digest][peer]
        if not self._holders[digest]:
            del self._holders[digest]

    def _resized(self, peer: PeerId, before: int, after: int) -> None:
        """Keep track of who has the most records: looking at every peer each time costs too much
        while somebody floods. Sizes change by one, so the largest does too.
        """
        if before:
            del self._sizes[before][peer]
            if not self._sizes[before]:
                del self._sizes[before]
        if after:
            self._sizes.setdefault(after, {})[peer] = None
        if after > self._largest or self._largest not in self._sizes:
            self._largest = after

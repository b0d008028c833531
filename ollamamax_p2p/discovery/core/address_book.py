"""Which peer to dial next.

Each known peer has addresses, the best source that named it, and how dialling went. The book offers
peers until the node has enough connections: bootstrap peers first, then those remembered, then what
mDNS, other members and Kademlia said; among equals those on this network first, then the one that
was reached last. A peer that failed waits twice as long as before, up to the longest pause.
Bootstrap peers are dialled however many connections there are, and never given up for long: an
operator counts on them.
"""

import ipaddress
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ollamamax_p2p.identity.core.addresses import Address
from ollamamax_p2p.identity.core.peer_id import PeerId

SOURCE_RANKS = {"bootstrap": 0, "remembered": 1, "mdns": 2, "told": 3, "dht": 4}
"""Whom an operator named; who was a member before; who is near; whom members know; the rest."""

ADDRESSES_MAX = 8
"""Of one peer; those that were heard of last are kept."""

PEERS_MAX = 1_024
"""Beyond it the worst peer is dropped; 32 connections are made from these."""

RETRY_S_MIN, RETRY_S_MAX = 2.0, 600.0
"""Between two dials of a peer that fails; jittered by half, so that peers that lost each other
together don't dial in step.
"""

BOOTSTRAP_RETRY_S_MAX = 60.0
"""As long as a lost peer is left alone elsewhere (HostSettings.reconnect_delay_s_max)."""

_BOOTSTRAP_RANK = SOURCE_RANKS["bootstrap"]
_WORST_RANK = len(SOURCE_RANKS)


@dataclass(slots=True)
class _Known:
    """One peer."""

    expiry: dict[Address, float] = field(default_factory=dict)  # heard of last comes last
    rank: int = _WORST_RANK
    draw: float = 0.0
    failures: int = 0
    retry_at: float = float("-inf")
    reached_at: float | None = None


class AddressBook:
    """Peers that may be dialled. Time is `now`, seconds on a clock that only goes forward."""

    def __init__(
        self, own: PeerId, *, target: int, rng: random.Random, peers_max: int = PEERS_MAX
    ) -> None:
        """target: how many connections are enough."""
        self._own = own
        self._target = target
        self._rng = rng
        self._peers_max = peers_max
        self._known: dict[PeerId, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, addresses: Iterable[Address], source: str, *, expires: float) -> None:
        """A source named these addresses, of any peers."""
        for address in addresses:
            if address.peer != self._own:
                self._add_one(address, SOURCE_RANKS.get(source, _WORST_RANK), expires)
        while len(self._known) > self._peers_max:
            del self._known[max(self._known, key=self._order)]

    def reached(self, peer: PeerId, *, now: float) -> None:
        """The peer is a connected member."""
        known = self._known.get(peer)
        if known is not None:
            known.failures, known.retry_at, known.reached_at = 0, float("-inf"), now

    def failed(self, peer: PeerId, *, hopeless: bool = False, now: float) -> None:
        """It could not be reached; hopeless: it answered, and is not of our swarm."""
        known = self._known.get(peer)
        if known is not None:
            known.failures += 1
            is_bootstrap = known.rank == _BOOTSTRAP_RANK
            longest_s = BOOTSTRAP_RETRY_S_MAX if is_bootstrap else RETRY_S_MAX
            doubled_s = RETRY_S_MIN * 2 ** min(known.failures - 1, 30)
            pause_s = longest_s if hopeless else min(doubled_s, longest_s)
            known.retry_at = now + pause_s * self._rng.uniform(0.5, 1.0)

    def to_dial(
        self, *, connected: Collection[PeerId], dialling: Collection[PeerId], room: int, now: float
    ) -> list[tuple[Address, ...]]:
        """Peers to dial now, best first, each with its addresses, best first; at most `room`."""
        self._expire(now)
        due = [
            peer
            for peer, known in self._known.items()
            if known.retry_at <= now and peer not in connected and peer not in dialling
        ]
        due.sort(key=self._order)
        named = sum(self._known[peer].rank == _BOOTSTRAP_RANK for peer in due)  # they come first
        wanted = max(named, self._target - len(connected) - len(dialling))
        return [self.addresses_of(peer) for peer in due[: max(0, min(wanted, room))]]

    def addresses_of(self, peer: PeerId) -> tuple[Address, ...]:
        """Those on this network first, then those heard of last."""
        known = self._known.get(peer)
        newest_first = reversed(known.expiry) if known is not None else ()
        return tuple(sorted(newest_first, key=lambda address: not is_local(address)))

    def peers(self) -> list[PeerId]:
        """All that are known, best first."""
        return sorted(self._known, key=self._order)

    def reached_peers(self) -> list[tuple[PeerId, float]]:
        """Those that were connected members at some time, the latest first, and when."""
        found = [(p, k.reached_at) for p, k in self._known.items() if k.reached_at is not None]
        return sorted(found, key=lambda each: -each[1])

    def _add_one(self, address: Address, rank: int, expires: float) -> None:
        known = self._known.setdefault(address.peer, _Known(draw=self._rng.random()))
        known.rank = min(known.rank, rank)
        expires = max(expires, known.expiry.pop(address, expires))
        if len(known.expiry) >= ADDRESSES_MAX:
            del known.expiry[next(iter(known.expiry))]
        known.expiry[address] = expires

    def _expire(self, now: float) -> None:
        for peer, known in list(self._known.items()):
            for address, expires in list(known.expiry.items()):
                if expires <= now:
                    del known.expiry[address]
            if not known.expiry:
                del self._known[peer]

    def _order(self, peer: PeerId) -> tuple[int, bool, float, float]:
        known = self._known[peer]
        far = not any(map(is_local, known.expiry))
        since = -known.reached_at if known.reached_at is not None else float("inf")
        return (known.rank, far, since, known.draw)


def is_local(address: Address) -> bool:
    """Whether it is on this machine or network, by its IP address; names count as far."""
    parts: Sequence[str] = address.transport.split("/")
    if "p2p-circuit" in parts or parts[1] not in ("ip4", "ip6"):
        return False
    return ipaddress.ip_address(parts[2]).is_private or ipaddress.ip_address(parts[2]).is_link_local

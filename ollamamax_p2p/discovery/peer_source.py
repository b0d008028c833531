"""PeerSource: where addresses of peers come from.

What a source finds are addresses and never trust: whoever answers there must still prove that it is
a member. Implementations: `static_peers`, `mdns`, `dht`; one contract suite
(`tests/contracts/test_peer_source.py`).
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from ollamamax_p2p.identity import Address


@dataclass(frozen=True, slots=True)
class Found:
    """One peer that a source knows addresses of."""

    addresses: tuple[Address, ...]
    """At least one, all of the same peer, at most 8."""
    source: str
    """The name of the source."""
    expires: float
    """On trio's clock: not to be tried after this unless found again."""


class PeerSource(Protocol):
    """Finds peers for as long as it is iterated."""

    @property
    def name(self) -> str:
        """static, mdns, dht…: how much it is preferred depends on it (`core.address_book`)."""

    def find_peers(self) -> AsyncIterator[Found]:
        """Peers as they are found; the same one may be found again. May end. Never raises for
        trouble outside: it logs it and goes on.
        """

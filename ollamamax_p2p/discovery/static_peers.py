"""Bootstrap and other fixed peers, as an operator wrote them down."""

from collections.abc import AsyncIterator, Sequence

from ollamamax_p2p.discovery.peer_source import Found
from ollamamax_p2p.errors import BadAddress, BadConfig, BadPeerId
from ollamamax_p2p.identity import Address, PeerId, parse_address


class StaticPeers:
    """A PeerSource that finds the configured peers at once and never forgets them.

    Addresses with DNS names (`/dns4/seed.example/tcp/4011/p2p/12D3KooW…`) are kept as names: they
    are resolved at each dial, so a peer may move.
    """

    name = "bootstrap"

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._by_peer: dict[PeerId, list[Address]] = {}
        for address in addresses:
            self._by_peer.setdefault(address.peer, []).append(address)

    async def find_peers(self) -> AsyncIterator[Found]:
        """Every configured peer, once."""
        for addresses in self._by_peer.values():
            yield Found(tuple(addresses[:8]), self.name, float("inf"))


def parse_bootstrap(texts: Sequence[str]) -> tuple[Address, ...]:
    """Check the setting. Raises BadConfig that names the address that cannot be used."""
    addresses = []
    for text in texts:
        try:
            addresses.append(parse_address(text))
        except (BadAddress, BadPeerId) as error:
            raise BadConfig("bootstrap", str(error)) from error
    return tuple(addresses)

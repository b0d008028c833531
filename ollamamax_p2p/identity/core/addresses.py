"""Addresses of peers as validated multiaddrs: `/ip4/192.0.2.7/tcp/4001/p2p/12D3KooW…`."""

from dataclasses import dataclass

import multiaddr

from ollamamax_p2p.errors import BadAddress
from ollamamax_p2p.identity.core.peer_id import PeerId, parse_peer_id

ADDRESS_CHARS_MAX = 512
"""A relayed address is about 250 characters; longer ones are refused before they are parsed."""

_HOSTS = {"ip4", "ip6", "dns", "dns4", "dns6"}
_CARRIERS = {"tcp", "ws", "wss", "p2p-circuit"}


@dataclass(frozen=True, slots=True, order=True)
class Address:
    """Where a peer can be dialled. Made by `parse_address` only."""

    transport: str
    """The multiaddr without its last /p2p part: `/ip4/192.0.2.7/tcp/4001`."""

    peer: PeerId
    """Who is expected to answer there."""

    def __str__(self) -> str:
        """The whole multiaddr."""
        return f"{self.transport}/p2p/{self.peer}"


def parse_address(text: str) -> Address:
    """Check an address that came from outside. Raises BadAddress or BadPeerId."""
    if len(text) > ADDRESS_CHARS_MAX:
        raise BadAddress(text, f"longer than {ADDRESS_CHARS_MAX} characters")
    transport, separator, peer = text.rpartition("/p2p/")
    if not separator:
        raise BadAddress(text, "it does not end in /p2p/<peer id>")
    return Address(parse_transport(transport), parse_peer_id(peer))


def parse_transport(text: str) -> str:
    """Check a multiaddr without /p2p, to listen on or to dial; gives its normal form. Raises
    BadAddress.
    """
    if len(text) > ADDRESS_CHARS_MAX:
        raise BadAddress(text, f"longer than {ADDRESS_CHARS_MAX} characters")
    try:
        parsed = multiaddr.Multiaddr(text)
        protocols = [protocol.name for protocol in parsed.protocols()]
    except Exception:  # noqa: BLE001 - multiaddr raises whatever its part parsers raise
        # Its own words repeat the text as it is, control characters and all.
        raise BadAddress(text, "not a multiaddr such as /ip4/192.0.2.7/tcp/4001") from None
    if not protocols or protocols[0] not in _HOSTS:
        raise BadAddress(text, "it must begin with /ip4, /ip6 or /dns")
    if not _CARRIERS & set(protocols):
        raise BadAddress(text, "only tcp, ws and wss are spoken, e.g. /ip4/192.0.2.7/tcp/4001")
    return str(parsed)

"""What an operator sets about finding peers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoverySettings:
    """Where peers and holders of blobs are looked for."""

    bootstrap: tuple[str, ...] = ()
    """Multiaddrs with /p2p/<peer id> that are dialled at the start and whenever they are lost."""

    mdns: bool = True
    """Find members of the same swarm on the local network by multicast DNS."""

    mdns_interfaces: tuple[str, ...] = ()
    """IP addresses of the interfaces to use for it; empty means all."""

    dht: bool = True
    """Take part in the swarm's own Kademlia (prefix /omx), to find peers and holders beyond the
    neighbours.
    """

    announce_interval_s: float = 600.0
    """How often held blobs are announced again."""

    announce_lifetime_s: float = 1_800.0
    """An announcement not renewed for this long is forgotten: three missed renewals."""

    remembered_peers_max: int = 256
    """Addresses kept across restarts, best first."""

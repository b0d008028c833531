"""What an operator sets about the network."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """How this node listens, dials and notices lost peers."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/4011",)
    """Multiaddrs to listen on; tcp, or tcp with /ws. Port 0 takes any free one."""

    announce: tuple[str, ...] = ()
    """Multiaddrs to tell others instead of the ones found; for a node behind a forwarded port."""

    relay: bool = True
    """Use circuit relays to reach and be reached, and upgrade by hole punching where that works."""

    relay_for_others: bool = False
    """Carry other members' connections; costs bandwidth, so only where asked."""

    heartbeat_interval_s: float = 2.0
    """How often a connected peer is asked for a sign of life."""

    heartbeat_timeout_s: float = 7.0
    """A peer silent for this long is dropped: with the interval, a frozen one is noticed within 10
    s.
    """

    connections_max: int = 256
    """More are refused; members beyond it wait. A thousand-node swarm needs no full mesh."""

    dial_timeout_s: float = 10.0
    """One dial, handshakes included. A LAN needs 0.25 s; a relay over a slow link a few."""

    reconnect_delay_s_min: float = 0.5
    """First pause before a lost peer is dialled again; doubles, with jitter, up to the maximum."""

    reconnect_delay_s_max: float = 60.0
    """Longest pause between two dials to the same lost peer."""

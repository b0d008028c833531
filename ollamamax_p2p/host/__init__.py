"""This node on the network; knows no blobs, tickets or models.

Start at `peer_host`: all that the rest of the library may see of the network. Names are resolved on
first use, because py-libp2p takes two seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.host.member_gate import ROSTER_MAX, Admission, ClosedGate, MemberGate
from ollamamax_p2p.host.message_stream import MessageStream
from ollamamax_p2p.host.peer_host import (
    ByteStream,
    Connection,
    PeerEvent,
    PeerHost,
    StreamHandler,
)
from ollamamax_p2p.host.settings import HostSettings

if TYPE_CHECKING:
    from ollamamax_p2p.host.connections import (
        Connections,
        PeerStatus,
        Redeemed,
        open_connections,
    )
    from ollamamax_p2p.host.libp2p_host import Libp2pHost, open_libp2p_host
    from ollamamax_p2p.host.requests import Requests, open_requests
    from ollamamax_p2p.host.simulated_links import LinkConditions
    from ollamamax_p2p.host.simulated_network import (
        Partition,
        SimulatedHost,
        SimulatedNetwork,
        open_simulated_network,
    )

__all__ = [
    "ROSTER_MAX",
    "Admission",
    "ByteStream",
    "ClosedGate",
    "Connection",
    "Connections",
    "HostSettings",
    "Libp2pHost",
    "LinkConditions",
    "MemberGate",
    "MessageStream",
    "Partition",
    "PeerEvent",
    "PeerHost",
    "PeerStatus",
    "Redeemed",
    "Requests",
    "SimulatedHost",
    "SimulatedNetwork",
    "StreamHandler",
    "open_connections",
    "open_libp2p_host",
    "open_requests",
    "open_simulated_network",
]

_HOME = {
    "Libp2pHost": "libp2p_host",
    "open_libp2p_host": "libp2p_host",
    "Connections": "connections",
    "PeerStatus": "connections",
    "Redeemed": "connections",
    "open_connections": "connections",
    "Requests": "requests",
    "open_requests": "requests",
    "LinkConditions": "simulated_links",
    "Partition": "simulated_network",
    "SimulatedHost": "simulated_network",
    "SimulatedNetwork": "simulated_network",
    "open_simulated_network": "simulated_network",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

"""Finding peers, and who holds which blob. What it finds are addresses and claims, never trust: who
is a member is decided by `host.Connections`, what is true about bytes by `transfer`.

Start at `finder` for peers and at `providers` for blobs; `open_discovery` is the whole. Names are
resolved on first use, because py-libp2p and zeroconf are slow to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.discovery.peer_source import Found, PeerSource
from ollamamax_p2p.discovery.providers import ProviderDirectory
from ollamamax_p2p.discovery.settings import DiscoverySettings

if TYPE_CHECKING:
    from ollamamax_p2p.discovery.dht import Dht, open_dht
    from ollamamax_p2p.discovery.discovery import Discovery, open_discovery
    from ollamamax_p2p.discovery.remembered_peers import (
        forget_remembered_peers,
        has_remembered_peers,
    )
    from ollamamax_p2p.discovery.swarm_providers import SwarmProviders, open_swarm_providers

__all__ = [
    "Dht",
    "Discovery",
    "DiscoverySettings",
    "Found",
    "PeerSource",
    "ProviderDirectory",
    "SwarmProviders",
    "forget_remembered_peers",
    "has_remembered_peers",
    "open_dht",
    "open_discovery",
    "open_swarm_providers",
]

_HOME = {
    "Dht": "dht",
    "open_dht": "dht",
    "Discovery": "discovery",
    "forget_remembered_peers": "remembered_peers",
    "has_remembered_peers": "remembered_peers",
    "open_discovery": "discovery",
    "SwarmProviders": "swarm_providers",
    "open_swarm_providers": "swarm_providers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

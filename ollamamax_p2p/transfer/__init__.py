"""Moving blobs between peers: fetch and serve them chunk by chunk, pull whole models, speak to
origins.

Finds nobody (`discovery` does) and stores nothing (`content` does). Start at `swarm_transfer`, then
`fetch`; `core` has what is decided; docs/protocols/swarm-transfer.md tells the conversation.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.transfer.origin import Origin
from ollamamax_p2p.transfer.progress import PullProgress, PullReport, PushReport, SourceShare
from ollamamax_p2p.transfer.settings import OriginSettings, TransferSettings

if TYPE_CHECKING:
    from ollamamax_p2p.transfer.registry_auth import signing_key
    from ollamamax_p2p.transfer.registry_origin import open_registry_origin
    from ollamamax_p2p.transfer.swarm_transfer import Transfer, open_transfer

__all__ = [
    "Origin",
    "OriginSettings",
    "PullProgress",
    "PullReport",
    "PushReport",
    "SourceShare",
    "Transfer",
    "TransferSettings",
    "open_registry_origin",
    "open_transfer",
    "signing_key",
]

_HOME = {
    "Transfer": "swarm_transfer",
    "open_registry_origin": "registry_origin",
    "open_transfer": "swarm_transfer",
    "signing_key": "registry_auth",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

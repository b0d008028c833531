"""The local HTTP and WebSocket API: translates, never decides. Leaves every answer to the node that
it serves. Start at `app` for the routes, at `served_node` for what they need of a node.
"""

from typing import TYPE_CHECKING, Any

from ollamamax_p2p.api.settings import ApiSettings

if TYPE_CHECKING:
    from ollamamax_p2p.api.client import LocalClient
    from ollamamax_p2p.api.doctor_checks import Finding, examine_machine
    from ollamamax_p2p.api.served_node import (
        Invitation,
        JoinReport,
        ModelDetails,
        ModelInfo,
        ModelLayer,
        NodeStatus,
        PeerInfo,
        ServedNode,
        StoreStatus,
    )
    from ollamamax_p2p.api.server import ApiServer, open_api
    from ollamamax_p2p.api.websocket_client import AnswerFrame, RequestClient

_HOMES = {
    "AnswerFrame": "websocket_client",
    "ApiServer": "server",
    "Finding": "doctor_checks",
    "Invitation": "served_node",
    "JoinReport": "served_node",
    "LocalClient": "client",
    "ModelDetails": "served_node",
    "ModelInfo": "served_node",
    "ModelLayer": "served_node",
    "NodeStatus": "served_node",
    "PeerInfo": "served_node",
    "RequestClient": "websocket_client",
    "ServedNode": "served_node",
    "StoreStatus": "served_node",
    "examine_machine": "doctor_checks",
    "open_api": "server",
}

__all__ = [
    "AnswerFrame",
    "ApiServer",
    "ApiSettings",
    "Finding",
    "Invitation",
    "JoinReport",
    "LocalClient",
    "ModelDetails",
    "ModelInfo",
    "ModelLayer",
    "NodeStatus",
    "PeerInfo",
    "RequestClient",
    "ServedNode",
    "StoreStatus",
    "examine_machine",
    "open_api",
]


def __getattr__(name: str) -> Any:
    """Load a name on first use: the client must not pay for the server, nor settings for trio."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

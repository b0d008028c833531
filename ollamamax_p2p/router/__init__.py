"""Which node and back end answers a request: queue, choose, send, stream back, fail over.

Runs no model itself (`inference` does) and speaks no HTTP. Start at `dispatch`; `core` has what is
decided, docs/protocols/request-forwarding.md what goes between nodes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.router.call import (
    Answer,
    Call,
    NodeLoad,
    QueuePlace,
    RunningModel,
    Server,
    SwarmModel,
)
from ollamamax_p2p.router.settings import RouterSettings

if TYPE_CHECKING:
    from ollamamax_p2p.router.desk import Show
    from ollamamax_p2p.router.dispatch import Router, Surroundings, open_router
    from ollamamax_p2p.router.machine import Machine

__all__ = [
    "Answer",
    "Call",
    "Machine",
    "NodeLoad",
    "QueuePlace",
    "Router",
    "RouterSettings",
    "RunningModel",
    "Server",
    "Show",
    "Surroundings",
    "SwarmModel",
    "open_router",
]

_HOME = {
    "Machine": "machine",
    "Router": "dispatch",
    "Show": "desk",
    "Surroundings": "dispatch",
    "open_router": "dispatch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

"""Which node and back end answers a request: queue, choose, send, stream back, fail over.

Runs no model itself (`inference` does) and speaks no HTTP. Start at `dispatch`; `core` has what is
decided.
"""

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

__all__ = [
    "Answer",
    "Call",
    "NodeLoad",
    "QueuePlace",
    "RouterSettings",
    "RunningModel",
    "Server",
    "SwarmModel",
]

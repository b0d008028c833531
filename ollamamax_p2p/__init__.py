"""ollamamax_p2p: any set of machines that run language models becomes one private swarm.

    import ollamamax_p2p as omx

    async with omx.open_node(omx.load_config()) as node:
        report = await node.pull("smollm2:135m")

Names are resolved on first use, because importing libp2p takes two seconds. Start at `open_node`;
`LocalClient` speaks to a node that already runs on this machine.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ollamamax_p2p.api import (
        AnswerFrame,
        Finding,
        Invitation,
        JoinReport,
        LocalClient,
        ModelDetails,
        ModelInfo,
        NodeStatus,
        PeerInfo,
        RequestClient,
        examine_machine,
    )
    from ollamamax_p2p.cluster import ClusterMember, ClusterStatus, Recovery, RecoveryPlan
    from ollamamax_p2p.config import NodeConfig, load_config
    from ollamamax_p2p.consensus import LogReport
    from ollamamax_p2p.content import ShowAnswer
    from ollamamax_p2p.errors import OmxError
    from ollamamax_p2p.inference import (
        ChatMessage,
        ChatRequest,
        Delta,
        EmbedRequest,
        GenerateRequest,
        Options,
    )
    from ollamamax_p2p.node import Node, check_ticket, forget_swarm, open_node
    from ollamamax_p2p.observability import Event
    from ollamamax_p2p.offline import check_raft_log, prepare_recovery
    from ollamamax_p2p.router import Call, NodeLoad, RunningModel
    from ollamamax_p2p.transfer import PullProgress, PullReport, PushReport, SourceShare

    __version__: str

_HOMES = {
    "AnswerFrame": "api",
    "Call": "router",
    "ChatMessage": "inference",
    "ChatRequest": "inference",
    "ClusterMember": "cluster",
    "ClusterStatus": "cluster",
    "Delta": "inference",
    "EmbedRequest": "inference",
    "Event": "observability",
    "Finding": "api",
    "GenerateRequest": "inference",
    "Invitation": "api",
    "JoinReport": "api",
    "LocalClient": "api",
    "LogReport": "consensus",
    "ModelDetails": "api",
    "ModelInfo": "api",
    "Node": "node",
    "NodeConfig": "config",
    "NodeLoad": "router",
    "NodeStatus": "api",
    "OmxError": "errors",
    "Options": "inference",
    "PeerInfo": "api",
    "PullProgress": "transfer",
    "PullReport": "transfer",
    "PushReport": "transfer",
    "Recovery": "cluster",
    "RecoveryPlan": "cluster",
    "RequestClient": "api",
    "RunningModel": "router",
    "ShowAnswer": "content",
    "SourceShare": "transfer",
    "check_raft_log": "offline",
    "check_ticket": "node",
    "examine_machine": "api",
    "forget_swarm": "node",
    "load_config": "config",
    "open_node": "node",
    "prepare_recovery": "offline",
}

__all__ = [
    "AnswerFrame",
    "Call",
    "ChatMessage",
    "ChatRequest",
    "ClusterMember",
    "ClusterStatus",
    "Delta",
    "EmbedRequest",
    "Event",
    "Finding",
    "GenerateRequest",
    "Invitation",
    "JoinReport",
    "LocalClient",
    "LogReport",
    "ModelDetails",
    "ModelInfo",
    "Node",
    "NodeConfig",
    "NodeLoad",
    "NodeStatus",
    "OmxError",
    "Options",
    "PeerInfo",
    "PullProgress",
    "PullReport",
    "PushReport",
    "Recovery",
    "RecoveryPlan",
    "RequestClient",
    "RunningModel",
    "ShowAnswer",
    "SourceShare",
    "__version__",
    "check_raft_log",
    "check_ticket",
    "examine_machine",
    "forget_swarm",
    "load_config",
    "open_node",
    "prepare_recovery",
]


def __getattr__(name: str) -> Any:
    """Find a public name where it lives."""
    if name == "__version__":
        return _installed_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    """What the package's metadata say; "0+unknown" where the code runs without being installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ollamamax-p2p")
    except PackageNotFoundError:
        return "0+unknown"

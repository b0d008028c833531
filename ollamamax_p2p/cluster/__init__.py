"""What the nodes of a cluster have agreed on, and who belongs to it.

`core/commands.py` has the commands by which it is changed and `core/rules.py` what each does;
`ClusterState` keeps the outcome in SQLite, driven by `consensus`. `core/autopilot.py` decides who
votes. `membership`
runs it on this node. Start there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.cluster.settings import ClusterSettings, ClusterStateSettings

if TYPE_CHECKING:
    from ollamamax_p2p.cluster.capabilities import has_battery, may_vote
    from ollamamax_p2p.cluster.cluster_state import (
        ClusterState,
        TicketsSummary,
        open_cluster_state,
    )
    from ollamamax_p2p.cluster.membership import (
        AboutThisNode,
        Cluster,
        found_place,
        has_place,
        open_cluster,
        printable_name,
        save_admission,
    )
    from ollamamax_p2p.cluster.shared_catalogue import SharedCatalogue

__all__ = [
    "AboutThisNode",
    "Cluster",
    "ClusterSettings",
    "ClusterState",
    "ClusterStateSettings",
    "SharedCatalogue",
    "TicketsSummary",
    "found_place",
    "has_battery",
    "has_place",
    "may_vote",
    "open_cluster",
    "open_cluster_state",
    "printable_name",
    "save_admission",
]

_HOME = {
    "has_battery": "capabilities",
    "may_vote": "capabilities",
    "ClusterState": "cluster_state",
    "TicketsSummary": "cluster_state",
    "open_cluster_state": "cluster_state",
    "AboutThisNode": "membership",
    "Cluster": "membership",
    "found_place": "membership",
    "has_place": "membership",
    "open_cluster": "membership",
    "printable_name": "membership",
    "save_admission": "membership",
    "SharedCatalogue": "shared_catalogue",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

"""What the nodes of a cluster have agreed on, and who belongs to it.

`core/commands.py` has the commands by which it is changed and `core/rules.py` what each does;
`ClusterState` keeps the outcome in SQLite, driven by `consensus`. `core/autopilot.py` decides who
votes. `membership` runs it on this node. Start there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.cluster.core.commands import RoleWish
from ollamamax_p2p.cluster.settings import ClusterSettings, ClusterStateSettings
from ollamamax_p2p.cluster.status import ClusterMember, ClusterStatus

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
        open_cluster,
        printable_name,
    )
    from ollamamax_p2p.cluster.place import (
        cluster_folder,
        forget_other_clusters,
        found_place,
        has_place,
        save_admission,
    )
    from ollamamax_p2p.cluster.recovery import Recovery, RecoveryPlan, open_recovery
    from ollamamax_p2p.cluster.shared_catalogue import (
        AgreedProviders,
        SharedCatalogue,
        open_shared_catalogue,
    )

__all__ = [
    "AboutThisNode",
    "AgreedProviders",
    "Cluster",
    "ClusterMember",
    "ClusterSettings",
    "ClusterState",
    "ClusterStateSettings",
    "ClusterStatus",
    "Recovery",
    "RecoveryPlan",
    "RoleWish",
    "SharedCatalogue",
    "TicketsSummary",
    "cluster_folder",
    "forget_other_clusters",
    "found_place",
    "has_battery",
    "has_place",
    "may_vote",
    "open_cluster",
    "open_cluster_state",
    "open_recovery",
    "open_shared_catalogue",
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
    "open_cluster": "membership",
    "printable_name": "membership",
    "cluster_folder": "place",
    "forget_other_clusters": "place",
    "found_place": "place",
    "has_place": "place",
    "save_admission": "place",
    "AgreedProviders": "shared_catalogue",
    "Recovery": "recovery",
    "RecoveryPlan": "recovery",
    "open_recovery": "recovery",
    "SharedCatalogue": "shared_catalogue",
    "open_shared_catalogue": "shared_catalogue",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

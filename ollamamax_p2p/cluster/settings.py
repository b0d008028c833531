"""ClusterSettings and ClusterStateSettings: one node's part in the cluster. What the cluster agrees
on itself is in `core.agreed_settings`.
"""

from dataclasses import dataclass

MiB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """What this node tells the cluster about itself."""

    region: str = ""
    """Where it stands, as one word: `office`, `eu-west.rack-7`. Voters are spread over regions."""

    voter: str = "auto"
    """Whether it may vote on what is agreed: `yes`, `no`, or `auto`: unless it runs on a battery,
    because a laptop that sleeps takes its vote with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStateSettings:
    """How this node keeps the agreed state on disk."""

    database_bytes_max: int = 1024 * MiB
    """The tables at their limits take 200 MB; beyond this something is wrong, and we say so."""

    snapshot_bytes_max: int = 1024 * MiB
    """One that is offered and longer is refused before it is received."""

    snapshots_kept: int = 2
    """The newest, and the one before it: a member may be reading it."""

    page_cache_bytes: int = 8 * MiB
    """Of RAM, for each of the two connections; an idle node has 110 MB in all."""

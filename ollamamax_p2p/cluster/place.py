"""A node's place in its cluster, as it is kept on disk: its Raft id and the first roster.

The cluster of each swarm has a folder of its own below the data folder, named by the swarm's id, so
that joining another swarm writes beside the present one and takes effect in one step: when the
record of the swarm (`identity.Membership`) is replaced.
"""

import logging
import shutil
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from ollamamax_p2p.cluster.core.messages import RaftId
from ollamamax_p2p.errors import StoreDamaged
from ollamamax_p2p.host import Admission
from ollamamax_p2p.identity import read_secret, write_secret

FOUNDER_RAFT_ID = 1

LEAVE_AND_JOIN = (
    "`omx cluster remove` this node at another member, `omx leave --force` here, then join with a "
    "new ticket"
)
"""What to do when a node's part in the agreement is lost: it must come back as somebody else."""

FIRST_REMOVE = "`omx cluster remove` this node at another member, then join again"

_log = logging.getLogger(__name__)


class Place(msgspec.Struct, frozen=True):
    """This node's place in a cluster."""

    version: Annotated[int, Meta(ge=1, le=1)]
    raft_id: RaftId
    founder: bool
    roster: tuple[tuple[str, RaftId], ...] = ()
    begun: bool = False
    """Something was agreed here. A log that is empty all the same was lost, and with it the votes
    that this node gave: it must not vote again under this Raft id."""


def cluster_folder(data_dir: Path, swarm_id: bytes) -> Path:
    """Where this node keeps its part in the cluster of a swarm."""
    return _clusters(data_dir) / swarm_id.hex()


def _clusters(data_dir: Path) -> Path:
    return data_dir / "cluster"


def place_path(folder: Path) -> Path:
    """Where a node's place in its cluster is kept."""
    return folder / "place"


def has_place(folder: Path) -> bool:
    """Whether this node has a place in the cluster of this folder."""
    return place_path(folder).exists()


def found_place(folder: Path) -> None:
    """Let the next `open_cluster` here found a cluster. Raises AccessRefused, StoreFull."""
    save_place(folder, Place(1, FOUNDER_RAFT_ID, founder=True))


def save_admission(folder: Path, admission: Admission) -> None:
    """Let the next `open_cluster` here take the place that was given to this node. If it had that
    very place before (it came for a new swarm key), it keeps its log; what another place left
    behind goes.

    Raises StoreDamaged if this node votes in that cluster, but not with what is here: a vote that
    is forgotten may be given twice.
    """
    before = load_place(folder) if has_place(folder) else None
    if before is not None and before.raft_id == admission.raft_id:
        return
    if admission.votes:
        problem = (
            f"that cluster counts on this node's vote, and its log is not here; {FIRST_REMOVE}"
        )
        raise StoreDamaged(str(folder), problem)
    forget_cluster(folder)
    roster = tuple((str(peer), number) for peer, number in admission.roster)
    save_place(folder, Place(1, admission.raft_id, founder=False, roster=roster))


def save_place(folder: Path, place: Place) -> None:
    """On disk when this returns. Raises AccessRefused, StoreFull."""
    write_secret(place_path(folder), msgspec.json.encode(place))


def load_place(folder: Path) -> Place:
    """Raises StoreDamaged, KeyExposed, AccessRefused."""
    path = place_path(folder)
    data = read_secret(path)
    if data is None:
        raise StoreDamaged(
            str(path),
            f"this node's place in its cluster is missing; {LEAVE_AND_JOIN}",
        )
    try:
        return msgspec.json.decode(data, type=Place)
    except ValueError as error:
        raise StoreDamaged(str(path), f"{error}; {LEAVE_AND_JOIN}") from error


def forget_cluster(folder: Path) -> None:
    """Remove all that is kept of a cluster, as far as that can be done; the place first."""
    try:
        place_path(folder).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("cannot remove what is left of a former cluster: %s", error)


def forget_other_clusters(data_dir: Path, swarm_id: bytes | None) -> None:
    """Remove what is left of clusters that this node was in before. swarm_id: of the present one;
    None: it is in none.
    """
    kept = "" if swarm_id is None else swarm_id.hex()
    try:
        folders = [each for each in _clusters(data_dir).iterdir() if each.name != kept]
    except OSError:
        return
    for folder in folders:
        forget_cluster(folder)

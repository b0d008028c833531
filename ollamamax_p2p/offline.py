"""What is done with a node's data folder while no node needs to run on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ollamamax_p2p.cluster import Recovery, cluster_folder, has_place, open_recovery
from ollamamax_p2p.config import NodeConfig
from ollamamax_p2p.consensus import LogReport, check_log
from ollamamax_p2p.errors import NotFound
from ollamamax_p2p.identity import Membership


def check_raft_log(config: NodeConfig, folder: Path | None = None) -> LogReport:
    """Read this node's Raft log, or the one in another folder, and change nothing; also while a
    node runs on it. Blocks.

    Raises NotFound if there is none, AccessRefused, KeyExposed, StoreDamaged if the system can't
    read it.
    """
    return check_log(_part_in_cluster(config) / "log" if folder is None else folder)


@contextmanager
def prepare_recovery(config: NodeConfig) -> Iterator[Recovery]:
    """Prepare to make this node the only voter of its cluster, see `cluster.recovery`; no node can
    start on the data folder until the block ends. Blocks.

    Raises DataDirInUse if one runs; NotFound, BadInput if there is nothing to recover; LocalTrouble
    of the log and the state.
    """
    from ollamamax_p2p.node import data_dir_of_our_own  # it imports libp2p, which takes 2 s

    folder = _part_in_cluster(config)
    with (
        data_dir_of_our_own(config.data_dir),
        open_recovery(folder, config.consensus) as recovery,
    ):
        yield recovery


def _part_in_cluster(config: NodeConfig) -> Path:
    membership = Membership.load(config.data_dir / "swarm")
    if membership is None:
        raise NotFound(f"{config.data_dir}: no node has been in a swarm with this data folder")
    folder = cluster_folder(config.data_dir, membership.swarm_id)
    if not has_place(folder):
        raise NotFound(f"{config.data_dir}: this node is a member of no cluster")
    return folder

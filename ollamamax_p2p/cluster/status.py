"""ClusterStatus: the cluster in one look, as `omx cluster status` shows it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the CLI draws these values, and runs no replica
    from ollamamax_p2p.cluster.core.messages import ReplicaLine
    from ollamamax_p2p.cluster.core.rows import Member
    from ollamamax_p2p.consensus import ReplicaStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterMember:
    """One member, as the node that was asked knows it."""

    peer_id: str
    name: str
    region: str
    role: str
    """leader, voter, learner; `joining` before it takes part, `leaving` while its vote is taken."""
    wish: str
    """What an operator said: auto, voter, learner."""
    may_vote: bool
    """False: autopilot never makes it a voter, unless it is told to."""
    raft_id: int
    lag: int | None = None
    """Entries that it lacks; None where the leader could not be asked."""
    state: str = ""
    """How the leader sends to it: probe, replicate, snapshot."""
    last_contact_s: float | None = None
    """Since the leader heard of it; None: never, or the leader could not be asked."""
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """What a node knows of its cluster."""

    peer_id: str
    """Of the node that was asked."""
    role: str
    """leader, follower, candidate, learner; `removed` once it is a member no more."""
    leader: str
    """Peer id; "" while nobody is known to lead."""
    term: int
    has_quorum: bool
    """Something can be agreed on, as far as this node can tell."""
    last_contact_s: float | None
    """Since a leader was heard; on the leader, since a majority was. None: never."""
    committed: int
    applied: int
    log_first: int
    log_last: int
    snapshot: int
    """The last index of the newest snapshot; 0: none."""
    state_index: int
    state_hash: str
    """Of the state as of that index, in hex: on all nodes the same for the same index."""
    changing: bool
    """The configuration is being changed."""
    trouble: str
    """What is wrong with this node's disk; "" if nothing is."""
    swarm_key_generation: int
    """0: the swarm is open and has none."""
    tickets: int
    """Invitations that can still be used."""
    settings: dict[str, int | bool]
    """What the cluster has agreed on about itself."""
    members: tuple[ClusterMember, ...]
    """In the order in which they joined."""


def described(
    member: "Member", replica: "ReplicaStatus", line: "ReplicaLine | None"
) -> ClusterMember:
    """A member as this node's replica sees it. line: what the leader told of it, if it did."""
    if member.raft_id == replica.leader:
        role = "leader"
    elif member.raft_id in replica.voters:
        role = "voter"
    elif member.raft_id in replica.voters_outgoing:
        role = "leaving"
    else:
        role = "learner" if member.raft_id in replica.learners else "joining"
    leads = member.raft_id == replica.leader
    return ClusterMember(
        peer_id=member.peer,
        name=member.name,
        region=member.region,
        role=role,
        wish=member.role,
        may_vote=member.may_vote,
        raft_id=member.raft_id,
        lag=0 if leads else line.lag if line else None,
        state="" if line is None else line.state,
        last_contact_s=0.0 if leads else line.last_contact_s if line else None,
        addresses=member.addresses,
    )


def disk_trouble(replica: "ReplicaStatus") -> str:
    """For people; "" if there is none."""
    if replica.disk_is_full:
        return "the disk is full: nothing new can be agreed on here until there is room"
    return "the disk does not finish its writes" if replica.disk_is_stalled else ""

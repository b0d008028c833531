"""ConsensusSettings: how fast and how much."""

from dataclasses import dataclass

KiB = 1024
MiB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsensusSettings:
    """Raft's timing and limits. Timing must be alike on all members."""

    tick_s: float = 0.05
    """One tick of Raft's clock. 50 ms: thirty ticks a second cost a Python node 1 % of a core."""

    heartbeat_ticks: int = 2
    """A leader's silence is at most this: 100 ms."""

    election_ticks: int = 10
    """A follower that hears nothing for this long, to twice as long, holds an election: 0.5 to 1 s.
    Ten times the round trip of a busy machine; a dead leader is replaced within 2 s."""

    max_message_bytes: int = 512 * KiB
    """Of entries in one message."""

    max_inflight_messages: int = 64
    """Appends to one follower that are not acknowledged yet."""

    max_inflight_bytes: int = 8 * MiB
    """The same in bytes."""

    max_uncommitted_bytes: int = 64 * MiB
    """Proposals beyond this are refused until some are committed."""

    max_command_bytes: int = 512 * KiB
    """One command; what is agreed is names and digests, never blobs."""

    proposals_waiting_max: int = 4096
    """At one replica; more are refused at once."""

    snapshot_entries: int = 20_000
    """Applied since the last snapshot: make the next."""

    snapshot_bytes: int = 64 * MiB
    """The same in bytes of log."""

    trailing_entries: int = 10_000
    """Kept behind a snapshot, so that a follower that was away for a moment needs no snapshot."""

    segment_bytes: int = 16 * MiB
    """One file of the log; space comes back in such steps."""

    send_queue_messages: int = 8192
    """Waiting for one member: all proposals that can wait at one replica, and as much again. More
    are dropped; Raft sends again what is needed."""

    send_queue_bytes: int = 16 * MiB
    """The same in bytes: twice what may be in flight to one follower."""

    send_stall_s: float = 5.0
    """A member that takes no frame for this long loses its stream and what waits for it: by then
    Raft has decided without it."""

    snapshots_outgoing_max: int = 3
    """Members that get a snapshot at once, one each; the others ask again. Three are all that a
    cluster of seven can need without having lost its majority."""

    snapshot_rate: int = 64 * MiB
    """Bytes per second to one member, so that a snapshot does not starve its neighbours."""

    disk_stall_s: float = 2.0
    """A leader whose disk has not finished a write for this long steps down."""

    quorum_timeout_s: float = 5.0
    """A proposal or linearizable read that waits fails when no leader has been heard for this long:
    two elections that both came to nothing."""

    request_timeout_s: float = 20.0
    """None waits longer than this, whatever the reason."""

    sessions_per_replica: int = 32
    """For exactly-once proposals: 32 times 64 commands on their way at once from one replica, more
    wait; 32 replicas that need all of them fill the table of sessions."""

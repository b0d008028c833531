"""RaftConfig: how one node takes part."""

import random
from dataclasses import dataclass

from ollamamax_p2p.consensus.core.logger import Logger, NoLogger
from ollamamax_p2p.consensus.core.messages import LOCAL_APPLY_THREAD, NO_LIMIT, NOBODY
from ollamamax_p2p.consensus.core.read_only import ReadOnlyOption
from ollamamax_p2p.consensus.core.stable_log import LogReader
from ollamamax_p2p.consensus.core.tracing import TraceSink


@dataclass(frozen=True, kw_only=True)
class RaftConfig:
    """The core's settings. Raises ValueError if they contradict each other."""

    id: int
    """This node's; never used by another node, also not before or after."""

    storage: LogReader
    """What is durable; whoever drives the node writes it."""

    rng: random.Random
    """Decides how long this node waits before it campaigns; seeded differently on each node."""

    election_tick: int = 10
    """Ticks without a leader's message before campaigning; the true number is drawn anew each time
    from [this, twice this). Ten heartbeats: one lost message must not cost the leader."""

    heartbeat_tick: int = 1
    """Ticks between a leader's heartbeats."""

    applied: int = 0
    """The last index the state machine holds durably; entries up to it are not given out again."""

    async_storage_writes: bool = False
    """Writing and applying are asked for by messages to LOCAL_APPEND_THREAD and LOCAL_APPLY_THREAD
    and acknowledged by their responses, so that several can be under way; `advance` is not used."""

    max_size_per_msg: int = 1 << 20
    """Bytes of entries in one append; at least one entry goes always."""

    max_committed_size_per_ready: int = 0
    """Bytes of committed entries that are being applied at once; 0: as max_size_per_msg."""

    max_uncommitted_entries_size: int = 0
    """Bytes of entries a leader holds uncommitted before it drops proposals; 0: no limit."""

    max_inflight_msgs: int = 256
    """Appends on their way to one follower."""

    max_inflight_bytes: int = 0
    """Bytes of entries on their way to one follower; 0: no limit."""

    check_quorum: bool = False
    """A leader steps down when it has not heard from a majority for an election timeout, and nobody
    votes within one of having heard from a leader."""

    pre_vote: bool = False
    """Ask whether an election could be won before raising the term."""

    read_only_option: ReadOnlyOption = ReadOnlyOption.SAFE

    disable_proposal_forwarding: bool = False
    """A follower drops proposals rather than send them to the leader."""

    disable_conf_change_validation: bool = False
    """Propose any change of the configuration; for those who serialise changes above."""

    step_down_on_removal: bool = False
    """A leader that is removed or made a learner becomes a follower once that is applied."""

    lead_before_own_vote: bool = False
    """Lead once the votes of others are enough, though this node's own is not durable yet. Unsafe
    if a crash can lose what is being written; etcd's raft does so, its transcripts expect it."""

    logger: Logger = NoLogger()  # noqa: RUF009 - it is frozen

    trace: TraceSink | None = None
    """Gets each event of the state trace."""

    def __post_init__(self) -> None:
        wrong = next((problem for holds, problem in self._rules() if not holds), None)
        if wrong:
            raise ValueError(wrong)

    def _rules(self) -> list[tuple[bool, str]]:
        lease_based = self.read_only_option is ReadOnlyOption.LEASE_BASED
        limit, bytes_limit = self.max_size_per_msg, self.max_inflight_bytes
        return [
            (self.id > NOBODY, "cannot use none as id"),
            (self.id < LOCAL_APPLY_THREAD, "cannot use local target as id"),
            (self.heartbeat_tick > 0, "heartbeat tick must be greater than 0"),
            (
                self.election_tick > self.heartbeat_tick,
                "election tick must be greater than heartbeat tick",
            ),
            (self.max_inflight_msgs > 0, "max inflight messages must be greater than 0"),
            (
                not bytes_limit or bytes_limit >= limit,
                "max inflight bytes must be >= max message size",
            ),
            (
                self.check_quorum or not lease_based,
                "CheckQuorum must be enabled when ReadOnlyOption is ReadOnlyLeaseBased",
            ),
        ]

    @property
    def max_applying_bytes(self) -> int:
        """Bytes of committed entries that are being applied at once; at least 1."""
        return max(self.max_committed_size_per_ready or self.max_size_per_msg, 1)

    @property
    def max_uncommitted_bytes(self) -> int:
        """Bytes a leader holds uncommitted."""
        return self.max_uncommitted_entries_size or NO_LIMIT

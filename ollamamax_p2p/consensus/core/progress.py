"""What a leader knows of one follower, and how much it may send before it hears back."""

from collections import deque
from collections.abc import Iterable
from enum import Enum


class StateType(Enum):
    """How entries are sent to a follower. The values are the names the field knows them by."""

    PROBE = "StateProbe"
    """Where its log agrees with ours is not known: one message at a time."""
    REPLICATE = "StateReplicate"
    """It follows: as many messages as its inflights allow, without waiting for answers."""
    SNAPSHOT = "StateSnapshot"
    """It needs what has been compacted away: nothing until the snapshot is there."""


class Inflights:
    """Messages that were sent and not acknowledged, bounded in number and bytes.

    The message that crosses the limit of bytes is let through: one message may be larger than that.
    """

    def __init__(self, max_count: int, max_bytes: int = 0) -> None:
        """max_bytes: 0 for no limit."""
        self.max_count = max_count
        self.max_bytes = max_bytes
        self._sent: deque[tuple[int, int]] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def is_full(self) -> bool:
        """Whether nothing more may be sent."""
        return len(self._sent) >= self.max_count or (
            self.max_bytes != 0 and self._bytes >= self.max_bytes
        )

    def add(self, index: int, size: int) -> None:
        """A message whose last entry is index was sent."""
        assert not self.is_full, "a message was sent although the window was full"
        self._sent.append((index, size))
        self._bytes += size

    def free_up_to(self, index: int) -> None:
        """The follower has everything up to and with index."""
        while self._sent and self._sent[0][0] <= index:
            self._bytes -= self._sent.popleft()[1]

    def reset(self) -> None:
        """Nothing is in flight any more."""
        self._sent.clear()
        self._bytes = 0


class Progress:
    """One follower, or the leader itself, as the leader sees it."""

    __slots__ = (
        "inflights",
        "is_learner",
        "match",
        "msg_app_flow_paused",
        "next",
        "pending_snapshot",
        "recent_active",
        "sent_commit",
        "state",
    )

    def __init__(
        self, *, match: int, next: int, inflights: Inflights, is_learner: bool = False
    ) -> None:
        self.match = match
        """The last entry that it is known to hold as we do."""
        self.next = next
        """The first entry that will be sent to it; match < next."""
        self.sent_commit = 0
        """The commit index that it was last told."""
        self.state = StateType.PROBE
        self.pending_snapshot = 0
        """In SNAPSHOT: the index of the snapshot that was sent."""
        self.recent_active = False
        """It has answered since the last check of the quorum."""
        self.msg_app_flow_paused = False
        """Wait for an answer, or for the next heartbeat's, before sending more entries."""
        self.inflights = inflights
        self.is_learner = is_learner

    def __str__(self) -> str:
        words = [f"{self.state.value} match={self.match} next={self.next}"]
        if self.is_learner:
            words.append("learner")
        if self.is_paused:
            words.append("paused")
        if self.pending_snapshot > 0:
            words.append(f"pendingSnap={self.pending_snapshot}")
        if not self.recent_active:
            words.append("inactive")
        if len(self.inflights):
            full = "[full]" if self.inflights.is_full else ""
            words.append(f"inflight={len(self.inflights)}{full}")
        return " ".join(words)

    def copied(self) -> "Progress":
        """A second one that can be changed alone; the window of messages stays shared."""
        other = Progress(
            match=self.match,
            next=self.next,
            inflights=self.inflights,
            is_learner=self.is_learner,
        )
        other.sent_commit = self.sent_commit
        other.state = self.state
        other.pending_snapshot = self.pending_snapshot
        other.recent_active = self.recent_active
        other.msg_app_flow_paused = self.msg_app_flow_paused
        return other

    @property
    def is_paused(self) -> bool:
        """Whether entries must not be sent now."""
        return self.state is StateType.SNAPSHOT or self.msg_app_flow_paused

    def become_probe(self) -> None:
        """Find out where the logs agree; after a snapshot that is at least the snapshot."""
        behind = self.match
        if self.state is StateType.SNAPSHOT:
            behind = max(behind, self.pending_snapshot)
        self._enter(StateType.PROBE)
        self._go_back_to(behind + 1)

    def become_replicate(self) -> None:
        """Send what follows match, without waiting."""
        self._enter(StateType.REPLICATE)
        self.next = self.match + 1

    def become_snapshot(self, index: int) -> None:
        """A snapshot of this index was sent."""
        self._enter(StateType.SNAPSHOT)
        self.pending_snapshot = index
        self.next = index + 1
        self.sent_commit = index

    def _enter(self, state: StateType) -> None:
        self.msg_app_flow_paused = False
        self.pending_snapshot = 0
        self.state = state
        self.inflights.reset()

    def sent_entries(self, count: int, size: int) -> None:
        """An append with this many entries of this many bytes was sent."""
        if self.state is StateType.REPLICATE:
            if count:
                self.next += count
                self.inflights.add(self.next - 1, size)
            self.msg_app_flow_paused = self.inflights.is_full
        elif count:
            self.msg_app_flow_paused = True

    def can_bump_commit(self, index: int) -> bool:
        """Whether telling it this commit index would let it commit more than it was told."""
        return index > self.sent_commit and self.sent_commit < self.next - 1

    def maybe_update(self, index: int) -> bool:
        """It says that it holds everything up to index; False if that is no news."""
        if index <= self.match:
            return False
        self.match = index
        self.next = max(self.next, index + 1)
        self.msg_app_flow_paused = False
        return True

    def maybe_decrease_to(self, rejected: int, match_hint: int) -> bool:
        """It refused an append behind `rejected` and hints where it may agree; False if that is an
        old answer.
        """
        if self.state is StateType.REPLICATE:
            if rejected <= self.match:
                return False
            self._go_back_to(self.match + 1)
            return True
        if self.next - 1 != rejected:
            return False
        self._go_back_to(max(min(rejected, match_hint + 1), self.match + 1))
        self.msg_app_flow_paused = False
        return True

    def _go_back_to(self, index: int) -> None:
        self.next = index
        # What it was told about entries it may not have does not count.
        self.sent_commit = min(self.sent_commit, index - 1)


ProgressMap = dict[int, Progress]


def describe_progress(progress: Iterable[tuple[int, Progress]]) -> str:
    """One line for each node, ascending, as the field prints it."""
    return "".join(f"{node}: {each}\n" for node, each in sorted(progress))

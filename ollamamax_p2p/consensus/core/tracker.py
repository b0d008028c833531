"""Tracker: who takes part, how far each is, and how they voted."""

from ollamamax_p2p.consensus.core.config_change import Changer, TrackerConfig
from ollamamax_p2p.consensus.core.progress import Inflights, Progress, ProgressMap
from ollamamax_p2p.consensus.core.quorum import JointConfig, VoteResult


class Tracker:
    """A leader's view of its followers, and a candidate's of its voters."""

    def __init__(self, *, max_inflight: int, max_inflight_bytes: int) -> None:
        self._max_inflight = max_inflight
        self._max_inflight_bytes = max_inflight_bytes
        self.config = TrackerConfig()
        self.progress: ProgressMap = {}
        self.ids: tuple[int, ...] = ()
        """Of all that take part, ascending: the order in which they are sent to."""
        self.votes: dict[int, bool] = {}

    def changer(self, last_index: int, *, anew: bool = False) -> Changer:
        """What changes this configuration, or if anew the empty one."""
        return Changer(
            TrackerConfig() if anew else self.config,
            {} if anew else self.progress,
            last_index=last_index,
            max_inflight=self._max_inflight,
            max_inflight_bytes=self._max_inflight_bytes,
        )

    def switch_to(self, config: TrackerConfig, progress: ProgressMap) -> None:
        """Take a configuration that a changer gave."""
        self.config, self.progress = config, progress
        self.ids = tuple(sorted(progress))

    @property
    def voters(self) -> JointConfig:
        """Those that decide."""
        return self.config.voters

    def voter_ids(self) -> list[int]:
        """Of either half, ascending."""
        return sorted(self.config.voters.ids())

    def is_singleton(self) -> bool:
        """Whether one voter decides alone."""
        return len(self.config.voters.incoming) == 1 and not self.config.voters.is_joint

    def reset_progress(self, *, last_index: int, own_id: int) -> None:
        """Forget what is known of everybody, for a new term."""
        for node, old in self.progress.items():
            self.progress[node] = Progress(
                match=last_index if node == own_id else 0,
                next=last_index + 1,
                inflights=Inflights(self._max_inflight, self._max_inflight_bytes),
                is_learner=old.is_learner,
            )

    def committed(self) -> int:
        """What majorities hold."""
        return self.config.voters.committed_index(self._match_of)

    def _match_of(self, node: int) -> int | None:
        progress = self.progress.get(node)
        return None if progress is None else progress.match

    def quorum_active(self) -> bool:
        """Whether a majority has answered since the last check."""
        active = {
            node: each.recent_active for node, each in self.progress.items() if not each.is_learner
        }
        return self.config.voters.vote_result(active) is VoteResult.WON

    def record_vote(self, node: int, granted: bool) -> None:
        """The first answer of a node counts."""
        self.votes.setdefault(node, granted)

    def tally(self) -> tuple[int, int, VoteResult]:
        """Votes granted and refused by voters, and what they decide."""
        counted = [
            self.votes[node]
            for node, each in self.progress.items()
            if not each.is_learner and node in self.votes
        ]
        granted = sum(counted)
        return granted, len(counted) - granted, self.config.voters.vote_result(self.votes)

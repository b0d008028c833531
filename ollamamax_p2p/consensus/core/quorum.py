"""Majorities, of one set of voters and of two at once.

A joint configuration needs the consent of both its halves; an empty half always consents, so that a
plain configuration is a joint one whose outgoing half is empty.
"""

from collections.abc import Callable, Mapping
from enum import Enum

ALL = 2**64 - 1
"""What nobody is asked for is committed without end."""

AckedIndex = Callable[[int], int | None]
"""A voter's last acknowledged index; None if nothing is known of it."""


class VoteResult(Enum):
    """Where a vote stands. The values are the names the field knows them by."""

    PENDING = "VotePending"
    LOST = "VoteLost"
    WON = "VoteWon"


class MajorityConfig(frozenset[int]):
    """A set of voters that decides by majority."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"({' '.join(map(str, sorted(self)))})"

    def committed_index(self, acked: AckedIndex) -> int:
        """The greatest index that a majority has acknowledged; without voters, ALL."""
        if not self:
            return ALL
        indexes = sorted((acked(voter) or 0 for voter in self), reverse=True)
        return indexes[len(indexes) // 2]

    def vote_result(self, votes: Mapping[int, bool]) -> VoteResult:
        """Whether the votes given so far decide; without voters it is won."""
        if not self:
            return VoteResult.WON
        granted = sum(votes.get(voter) is True for voter in self)
        refused = sum(votes.get(voter) is False for voter in self)
        needed = len(self) // 2 + 1
        if granted >= needed:
            return VoteResult.WON
        if len(self) - refused < needed:
            return VoteResult.LOST
        return VoteResult.PENDING

    def describe(self, acked: AckedIndex) -> str:
        """A chart of who has acknowledged how much, for people and transcripts."""
        if not self:
            return "<empty majority quorum>"
        count = len(self)
        by_index = sorted((acked(voter) or 0, voter) for voter in self)
        bars: dict[int, int] = {}
        for place, (index, voter) in enumerate(by_index):
            same_as_before = place > 0 and by_index[place - 1][0] == index
            bars[voter] = bars[by_index[place - 1][1]] if same_as_before else place
        lines = [" " * count + "    idx"]
        for voter in sorted(self):
            known = acked(voter)
            if known is None:
                bar = "?" + " " * count
            else:
                bar = "x" * bars[voter] + ">" + " " * (count - bars[voter])
            lines.append(f"{bar} {known or 0:5d}    (id={voter})")
        return "\n".join(lines) + "\n"


class JointConfig:
    """Two sets of voters, both of which must agree."""

    __slots__ = ("incoming", "outgoing")

    def __init__(
        self,
        incoming: MajorityConfig = MajorityConfig(),  # noqa: B008 - it is frozen
        outgoing: MajorityConfig = MajorityConfig(),  # noqa: B008 - it is frozen
    ) -> None:
        self.incoming = incoming
        self.outgoing = outgoing

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, JointConfig)
            and self.incoming == other.incoming
            and self.outgoing == other.outgoing
        )

    __hash__ = None  # type: ignore[assignment]  # compared, never a key

    def __str__(self) -> str:
        return f"{self.incoming}&&{self.outgoing}" if self.outgoing else str(self.incoming)

    @property
    def is_joint(self) -> bool:
        """Whether a second half must agree too."""
        return bool(self.outgoing)

    def ids(self) -> frozenset[int]:
        """The voters of either half."""
        return self.incoming | self.outgoing

    def committed_index(self, acked: AckedIndex) -> int:
        """What both halves have acknowledged."""
        return min(self.incoming.committed_index(acked), self.outgoing.committed_index(acked))

    def vote_result(self, votes: Mapping[int, bool]) -> VoteResult:
        """Won if both halves have won, lost if one has lost."""
        results = {self.incoming.vote_result(votes), self.outgoing.vote_result(votes)}
        if VoteResult.LOST in results:
            return VoteResult.LOST
        return VoteResult.PENDING if VoteResult.PENDING in results else VoteResult.WON

    def describe(self, acked: AckedIndex) -> str:
        """The chart of all voters together."""
        return MajorityConfig(self.ids()).describe(acked)

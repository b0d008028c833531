"""MemberGate: who is a member, where that is agreed and not a matter of holding a secret.

`cluster` implements it over the agreed state; `Connections` asks it for every peer that connects.
"""

from dataclasses import dataclass
from typing import Protocol

from ollamamax_p2p.errors import TicketUnknown
from ollamamax_p2p.identity import PeerId

ROSTER_MAX = 64
"""Members told to a newcomer, voters first: it must know the leader before it knows the state."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What a newcomer needs to take part in the agreement."""

    raft_id: int
    """Its own."""
    roster: tuple[tuple[PeerId, int], ...]
    """Members and their Raft ids, at most ROSTER_MAX; the rest it learns from the state."""
    votes: bool = False
    """It is a voter already, and must have kept its log."""


class MemberGate(Protocol):
    """The agreed member set, as far as this node knows it."""

    def is_member(self, peer: PeerId) -> bool:
        """Whether the peer may be let in now. Asked often; never waits."""

    async def redeem(self, secret: bytes, peer: PeerId, name: str) -> Admission:
        """Make the peer a member by a ticket's secret, once that is agreed. name: what it calls
        itself, as it came.

        Raises TicketUnknown, TicketExpired, TicketUsedUp, or NetworkTrouble if nothing can be
        agreed on now.
        """


class ClosedGate:
    """A gate that lets nobody in: where it cannot be known who is a member."""

    def is_member(self, peer: PeerId) -> bool:
        """See MemberGate."""
        return False

    async def redeem(self, secret: bytes, peer: PeerId, name: str) -> Admission:
        """See MemberGate."""
        raise TicketUnknown

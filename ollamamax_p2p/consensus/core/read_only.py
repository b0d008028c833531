"""Linearizable reads without writing: who asked, and who has confirmed the leader since.

A leader that hears from a majority after a read has arrived was the leader when it arrived, so what
it had committed then is what the read must see (Ongaro's thesis, 6.4). Each attempt gets a context
of its own, a number that never comes again: confirmations of an earlier attempt, late or repeated,
confirm nothing newer, also when a client uses one context twice.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from ollamamax_p2p.consensus.core.messages import Message


class ReadOnlyOption(Enum):
    """How a leader makes sure that it still leads when it is asked for a read index."""

    SAFE = "safe"
    """A round of heartbeats. Depends on no clock."""
    LEASE_BASED = "lease_based"
    """A majority's promise to elect nobody for a while, see `lease.py` for what it asks of clocks;
    a round of heartbeats where there is none. Needs check_quorum."""


@dataclass
class ReadIndexRound:
    """One attempt to confirm the leader, for one request."""

    context: bytes
    request: Message
    index: int
    """The commit index when the request arrived."""
    acknowledged: dict[int, bool] = field(default_factory=dict)


class ReadOnly:
    """The reads that wait for a majority, in the order they came."""

    def __init__(self) -> None:
        self._rounds: OrderedDict[bytes, ReadIndexRound] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return len(self._rounds)

    def add(self, index: int, request: Message, *, term: int, leader: int) -> bytes:
        """Begin a round for a request; gives the context that its heartbeats carry."""
        self._count += 1
        # The term makes it unlike any of another leader, or of ourselves when we led before.
        context = term.to_bytes(8, "big") + self._count.to_bytes(8, "big")
        self._rounds[context] = ReadIndexRound(context, request, index, {leader: True})
        return context

    def acknowledge(self, node: int, context: bytes) -> dict[int, bool]:
        """A node has answered the heartbeat of this round; who has so far. Empty if it is over."""
        found = self._rounds.get(context)
        if found is None:
            return {}
        found.acknowledged[node] = True
        return found.acknowledged

    def advance(self, context: bytes) -> list[ReadIndexRound]:
        """A round that waits is confirmed, and with it those before it: all of them end."""
        done = [self._rounds.popitem(last=False)[1]]
        while done[-1].context != context:
            done.append(self._rounds.popitem(last=False)[1])
        return done

    def last_context(self) -> bytes:
        """Of the newest round, for regular heartbeats, which may confirm all; b"" if none waits."""
        return next(reversed(self._rounds), b"")

"""How long a leader may take for granted that nobody else leads.

Followers that have heard from a leader give no vote for one election timeout of their own ticks. A
leader whose heartbeat a majority has answered is therefore alone until one election timeout after
it *sent* that heartbeat; the answer's arrival says nothing. Each heartbeat of a lease has a context
of its own, so that an answer tells which heartbeat it answers.

The bound on clocks: a tenth of the time is kept as margin, so a follower's ticks may come a tenth
faster than the leader's. A process that is paused counts no ticks, and a follower that restarts
forgets what it promised; where that may happen within one election timeout, use safe reads.
"""

from collections import OrderedDict

from ollamamax_p2p.consensus.core.quorum import JointConfig, VoteResult

_PREFIX = b"lease"
_ROUNDS_MAX = 16
"""Older heartbeats than this have no lease left to give."""


class Lease:
    """One leader's lease, in its own ticks; a new one for each term."""

    def __init__(self, *, node: int, term: int, ticks: int) -> None:
        """ticks: the election timeout."""
        self._node = node
        self._term = term
        self._ticks = ticks - max(1, ticks // 10)
        self._rounds: OrderedDict[bytes, tuple[int, dict[int, bool]]] = OrderedDict()
        self._confirmed: int | None = None
        self._count = 0
        self._over = False

    def begin(self, now: int) -> bytes:
        """The context for the heartbeats that are sent at this tick."""
        self._count += 1
        context = _PREFIX + self._term.to_bytes(8, "big") + self._count.to_bytes(8, "big")
        self._rounds[context] = (now, {self._node: True})
        if len(self._rounds) > _ROUNDS_MAX:
            self._rounds.popitem(last=False)
        return context

    def acknowledge(self, node: int, context: bytes, voters: JointConfig) -> None:
        """A node has answered the heartbeat with this context."""
        found = self._rounds.get(context)
        if found is None:
            return
        sent, answered = found
        answered[node] = True
        if voters.vote_result(answered) is VoteResult.WON:
            self._confirmed = max(sent, self._confirmed or 0)
            while next(iter(self._rounds)) != context:
                self._rounds.popitem(last=False)
            del self._rounds[context]

    def give_away(self) -> None:
        """Somebody was told to campaign at once, which no follower's promise holds up: there is no
        lease any more in this term.
        """
        self._over = True

    def holds(self, now: int) -> bool:
        """Whether nobody else can lead at this tick."""
        return (
            not self._over and self._confirmed is not None and now - self._confirmed < self._ticks
        )

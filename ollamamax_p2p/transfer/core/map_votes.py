"""Which chunk map to trust. Sans-IO.

Honest holders of a blob all have the same map, because the cut follows from the bytes. Two maps for
one blob mean that somebody lies, and only the whole blob can tell who. So one map is tried: the one
that was agreed on, if one was and anybody serves under it; else the one that most complete holders
vouch for, among those by which nothing was held back so far. If the blob comes out wrong, everybody
who vouched for the map is a liar, the map is rejected and the next is tried.

Partial holders only repeat what they were told: they serve under a map, but do not vouch for it,
and one who was lied to tells another map later. So they are not blamed for one wrong map that
nobody vouches for, but for the second; and how many maps one peer may tell is bounded.
"""

import random
from collections.abc import Collection

from ollamamax_p2p.content.core.digest import Digest
from ollamamax_p2p.errors import PeerMisbehaved

MAPS_PER_PEER_MAX = 4
"""Maps that one peer may tell in one fetch. An honest partial holder changes its own when the one
it was told proves wrong, or when nothing comes by it.
"""

REJECTED_MAX = 8
"""Maps that may cost a fetch the whole blob each; after so many no peer's map is believed."""

UNVOUCHED_MAX = 2
"""So many wrong maps that nobody vouches for may come of one peer before it counts as a liar."""


class MapVotes:
    """Who says what about one blob."""

    def __init__(self, rng: random.Random) -> None:
        """rng: breaks ties; a digest cannot, because a liar chooses its own."""
        self.here: Digest | None = None
        """The map by which bytes are here already: the first among equals, as it keeps them."""
        self.agreed: Digest | None = None
        """The one that the cluster has agreed on: somebody has had the whole blob by it. No number
        of holders outvotes it; but if it does not make the blob, it is a lie like others.
        """
        self._rng = rng
        self._claims: dict[str, tuple[Digest, bool]] = {}
        self._told: dict[str, dict[Digest, bool]] = {}
        self._vouchers: dict[Digest, dict[str, None]] = {}
        self._suppliers: dict[Digest, dict[str, None]] = {}
        self._misled: dict[str, int] = {}  # wrong maps without a voucher, by supplier
        self._dice: dict[Digest, float] = {}
        self._doubts: dict[Digest, int] = {}
        self._rejected: set[Digest] = set()
        self._aside: set[Digest] = set()

    def claims(self, peer: str, map_digest: Digest, *, complete: bool) -> bool:
        """A peer serves under this map; complete: and vouches for it. False if it has told too many
        maps to be listened to. Raises PeerMisbehaved if it has vouched for another one before.
        """
        told = self._told.setdefault(peer, {})
        if complete and any(vouched and other != map_digest for other, vouched in told.items()):
            raise PeerMisbehaved("", "it vouched for two chunk maps of one blob")
        if map_digest not in told and len(told) >= MAPS_PER_PEER_MAX:
            return False
        told[map_digest] = complete or told.get(map_digest, False)
        if map_digest not in self._dice:
            self._dice[map_digest] = self._rng.random()
        self._claims[peer] = (map_digest, complete)
        if complete:
            self._vouchers.setdefault(map_digest, {})[peer] = None
        return True

    def leaves(self, peer: str) -> None:
        """It serves no longer; what it vouched for it still answers for."""
        self._claims.pop(peer, None)

    def supplied(self, peer: str, map_digest: Digest) -> None:
        """A chunk of this peer was right by this map."""
        self._suppliers.setdefault(map_digest, {})[peer] = None

    def has_served(self, map_digest: Digest) -> bool:
        """Whether any peer has served a chunk by this map."""
        return map_digest in self._suppliers

    def is_rejected(self, map_digest: Digest) -> bool:
        """Whether a blob came out wrong by it."""
        return map_digest in self._rejected

    @property
    def exhausted(self) -> bool:
        """Whether so many maps were wrong that none is believed any more."""
        return len(self._rejected) >= REJECTED_MAX

    @property
    def disputed(self) -> bool:
        """Whether peers that serve now disagree."""
        return len({digest for digest, _ in self._claims.values()} - self._rejected) > 1

    def doubt(self, map_digest: Digest) -> None:
        """Those who serve under it have sent nothing for long."""
        self._doubts[map_digest] = self.doubts(map_digest) + 1

    def doubts(self, map_digest: Digest) -> int:
        """How often."""
        return self._doubts.get(map_digest, 0)

    def set_aside(self, map_digest: Digest) -> None:
        """An origin says otherwise: go on without it, until `restore`."""
        self._aside.add(map_digest)

    def restore(self) -> bool:
        """The origin was wrong: what was set aside may be tried again. Whether anything was."""
        restored, self._aside = bool(self._aside), set()
        return restored

    def best(self, among: Collection[Digest] | None = None) -> Digest | None:
        """The map to go by now; None if nobody serves under one that may still be right. among:
        those to choose from, if not all.
        """
        votes: dict[Digest, list[bool]] = {}
        for digest, complete in self._claims.values():
            if self._is_possible(digest) and (among is None or digest in among):
                votes.setdefault(digest, []).append(complete)
        return max(
            votes,
            key=lambda digest: (
                digest == self.agreed,
                -self.doubts(digest),
                sum(votes[digest]),
                len(votes[digest]),
                digest == self.here,
                self._dice[digest],
            ),
            default=None,
        )

    def _is_possible(self, map_digest: Digest) -> bool:
        excluded = map_digest in self._rejected or map_digest in self._aside
        return not (excluded or self.exhausted)

    def reject(self, map_digest: Digest) -> list[str]:
        """The map is wrong; gives those who lied: who vouched for it, or if nobody did, who has
        served by such a map before.
        """
        known = map_digest in self._rejected
        self._rejected.add(map_digest)
        vouchers = list(self._vouchers.get(map_digest, ()))
        if vouchers or known:
            return vouchers
        suppliers = list(self._suppliers.get(map_digest, ()))
        for peer in suppliers:
            self._misled[peer] = self._misled.get(peer, 0) + 1
        return [peer for peer in suppliers if self._misled[peer] >= UNVOUCHED_MAX]

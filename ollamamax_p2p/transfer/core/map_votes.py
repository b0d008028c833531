"""Which chunk map to trust. Sans-IO.

Honest holders of a blob all have the same map, because the cut follows from the bytes. Two maps for
one blob mean that somebody lies, and only the whole blob can tell who. So one map is tried: the one
that most complete holders vouch for. If the blob comes out wrong, everybody who vouched for the map
is a liar, the map is rejected and the next is tried. Partial holders only repeat what they were
told: they serve under a map, but do not vouch for it.
"""

from ollamamax_p2p.content.core.digest import Digest


class MapVotes:
    """Who says what about one blob."""

    def __init__(self) -> None:
        self._claims: dict[str, tuple[Digest, bool]] = {}
        self._vouchers: dict[Digest, dict[str, None]] = {}
        self._rejected: set[Digest] = set()

    def claims(self, peer: str, map_digest: Digest, *, complete: bool) -> None:
        """A peer serves under this map; complete: and vouches for it."""
        self._claims[peer] = (map_digest, complete)
        if complete:
            self._vouchers.setdefault(map_digest, {})[peer] = None

    def leaves(self, peer: str) -> None:
        """It serves no longer; what it vouched for it still answers for."""
        self._claims.pop(peer, None)

    def is_rejected(self, map_digest: Digest) -> bool:
        """Whether a blob came out wrong by it."""
        return map_digest in self._rejected

    @property
    def disputed(self) -> bool:
        """Whether peers that serve now disagree."""
        return len({digest for digest, _ in self._claims.values()} - self._rejected) > 1

    def best(self) -> Digest | None:
        """The map to go by now; None if nobody serves under one that may still be right."""
        votes: dict[Digest, list[bool]] = {}
        for digest, complete in self._claims.values():
            if digest not in self._rejected:
                votes.setdefault(digest, []).append(complete)
        return max(
            votes, key=lambda digest: (sum(votes[digest]), len(votes[digest]), digest), default=None
        )

    def reject(self, map_digest: Digest) -> list[str]:
        """The map is wrong; gives those who vouched for it."""
        self._rejected.add(map_digest)
        return list(self._vouchers.get(map_digest, ()))

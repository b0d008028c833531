"""Peers found lying; none of them is asked for anything as long as this node runs."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from ollamamax_p2p.errors import PeerMisbehaved
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.observability import Event, EventFeed

BANNED_MAX = 4_096
"""Remembered at once; a peer id costs nothing, so a crowd of them must not fill memory."""

_log = logging.getLogger(__name__)


class BanList:
    """Who is banned and why. A ban is logged and reported once, as `peer.banned`."""

    def __init__(self, feed: EventFeed, wall_clock: Callable[[], float]) -> None:
        self._feed = feed
        self._wall_clock = wall_clock
        self._reasons: dict[PeerId, str] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._reasons

    def reasons(self) -> dict[PeerId, str]:
        """Every banned peer and what it did."""
        return dict(self._reasons)

    def ban(self, peer: PeerId, error: PeerMisbehaved) -> None:
        """It lied; the error says how."""
        if peer in self._reasons:
            return
        self._reasons[peer] = error.problem
        if len(self._reasons) > BANNED_MAX:
            del self._reasons[next(iter(self._reasons))]  # the oldest
        _log.warning("banned peer %s: %s", peer, error.problem)
        at = datetime.fromtimestamp(self._wall_clock(), UTC).isoformat()
        facts = {"peer": peer, "error": type(error).__name__, "reason": error.problem}
        self._feed.report(Event(kind="peer.banned", at=at, facts=facts))

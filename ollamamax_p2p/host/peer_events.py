"""Peers as they come and go, told to any number of readers; what every PeerHost's `watch` gives."""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ollamamax_p2p.errors import PeerGone
from ollamamax_p2p.host.peer_host import PeerEvent
from ollamamax_p2p.identity import PeerId

WATCH_EVENTS_MAX = 1_024
"""As `PeerHost.watch` promises."""


class PeerEvents:
    """One host's events. Reporting never waits."""

    def __init__(self, peer_id: PeerId) -> None:
        """peer_id: the host's own, named to a reader that fell behind."""
        self._peer_id = peer_id
        self._watchers: list[_Watcher] = []

    def report(self, event: PeerEvent) -> None:
        """Give the event to every reader."""
        for watcher in self._watchers:
            watcher.offer(event)

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[PeerEvent]]:
        """See `PeerHost`."""
        watcher = _Watcher(self._peer_id)
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)


class _Watcher:
    """One reader."""

    def __init__(self, peer_id: PeerId) -> None:
        self._peer_id = peer_id
        self._waiting: deque[PeerEvent] = deque()
        self._readers = trio.lowlevel.ParkingLot()
        self._behind = False

    def offer(self, event: PeerEvent) -> None:
        """Keep it for the reader, unless that has fallen behind."""
        if len(self._waiting) >= WATCH_EVENTS_MAX:
            self._behind = True
        elif not self._behind:
            self._waiting.append(event)
        self._readers.unpark_all()

    def __aiter__(self) -> "_Watcher":
        return self

    async def __anext__(self) -> PeerEvent:
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self._behind:
                raise PeerGone(self._peer_id, "the reader of its events fell behind")
            await self._readers.park()
        return self._waiting.popleft()

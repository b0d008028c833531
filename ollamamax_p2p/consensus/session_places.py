"""SessionPlaces: where the commands that one replica proposes wait for a place in a session.

First come, first served: whoever proposes again at once stands behind those who wait, or he would
take every place that he has just given back. Places are handed out in the moment in which they come
free, to as many as there are; a queue that moved by one task at a time would be what limits the
replica. Sessions are opened one after the other, by one of those who wait.
"""

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from ollamamax_p2p.consensus.core.sessions import ClientSession, SessionPool


@dataclass(slots=True)
class Place:
    """One command's number in a session."""

    session: ClientSession
    sequence: int


@dataclass(slots=True, eq=False)
class _Waiter:
    news: trio.Event = field(default_factory=trio.Event)
    place: Place | None = None


class SessionPlaces:
    """One replica's. For the tasks of one trio run."""

    def __init__(self, *, sessions_max: int, open_session: Callable[[], Awaitable[int]]) -> None:
        """open_session: gives the id of one that is agreed on; what it raises, `take` does."""
        self._sessions = SessionPool(sessions_max=sessions_max)
        self._open_session = open_session
        self._waiting: deque[_Waiter] = deque()
        self._opening = False

    async def take(self) -> Place:
        """A place; give it back with `give_back`, whatever comes of the command."""
        if not self._waiting and (session := self._sessions.with_room()) is not None:
            return Place(session, session.begin())
        waiter = _Waiter()
        self._waiting.append(waiter)
        try:
            while waiter.place is None:
                if self._sessions.may_grow and not self._opening:
                    await self._grow()
                else:
                    await waiter.news.wait()
                    waiter.news = trio.Event()
        except BaseException:
            if waiter.place is not None:
                self.give_back(waiter.place)
            raise
        finally:
            if waiter.place is None:
                self._waiting.remove(waiter)
                self._hand_out()
        return waiter.place

    async def _grow(self) -> None:
        self._opening = True
        try:
            self._sessions.add(await self._open_session())
        finally:
            self._opening = False
        self._hand_out()

    def give_back(self, place: Place) -> None:
        """Its command was answered, or nobody waits for it any more."""
        place.session.finish(place.sequence)
        self._hand_out()

    def end(self, session: ClientSession) -> None:
        """The state machine does not know it any more."""
        self._sessions.end(session)
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and (session := self._sessions.with_room()) is not None:
            waiter = self._waiting.popleft()
            waiter.place = Place(session, session.begin())
            waiter.news.set()
        if self._waiting and self._sessions.may_grow and not self._opening:
            self._waiting[0].news.set()

"""Requests that wait: bounded, by priority, fair between users, none begun too late.

A lane is what waits for the same thing, a model: who waits for a busy one does not hold up the
others. Within a lane the highest priority goes first; a request rises by one for each `aging_s` it
has waited, so that the lowest is served too. Within a priority users take turns by start-time fair
queueing: each has a virtual time that advances by the cost of what was taken of theirs, and the
lowest is next; a user who comes new starts at the lane's own. So whoever sends a thousand requests
waits behind themselves only. Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.

There is one definition of the order, `_in_order`: what is taken is its first, and a place is a
place in it.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ollamamax_p2p.errors import DeadlineExceeded, QueueFull
from ollamamax_p2p.router.call import QueuePlace

PRIORITY_MAX = 2

ROOM = (0.5, 0.9, 1.0)
"""How full the queue may be for a request of each priority to enter: what may wait is refused
first, so that what may not finds room.
"""

RETRY_AFTER_S = 1.0
"""Told while nothing is measured."""

RETRY_AFTER_S_MAX = 120.0

RATE_FORGET = 0.2
"""What the newest interval between two takes counts for the ETA."""


@dataclass(slots=True, kw_only=True)
class _Waiting:
    id: int
    lane: str
    user: str
    priority: int
    cost: float
    since: float
    begin_by: float
    number: int
    """By arrival."""


@dataclass(slots=True)
class _Lane:
    waiting: dict[tuple[int, str], deque[_Waiting]] = field(default_factory=dict)
    """By priority and user, oldest first."""
    virtual: dict[str, float] = field(default_factory=dict)
    """Of each user; who is behind the lane's own is left out."""
    now: float = 0.0
    """The lane's own virtual time."""
    taken_at: float | None = None
    interval_s: float | None = None
    """Between two takes while others wait, on average."""


class RequestQueue:
    """Of one node."""

    def __init__(self, *, limit: int, limit_per_user: int, aging_s: float) -> None:
        self._limit = limit
        self._limit_per_user = limit_per_user
        self._aging_s = aging_s
        self._entries: dict[int, _Waiting] = {}
        self._lanes: dict[str, _Lane] = {}
        self._per_user: dict[str, int] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._entries

    def count(self, lane: str) -> int:
        """How many wait in a lane."""
        found = self._lanes.get(lane)
        return sum(len(line) for line in found.waiting.values()) if found is not None else 0

    def lanes(self) -> list[str]:
        """Those in which somebody waits."""
        return list(self._lanes)

    def put(
        self,
        request_id: int,
        *,
        lane: str,
        user: str,
        priority: int,
        cost: float,
        begin_by: float,
        interval_s: float | None,
        now: float,
    ) -> QueuePlace:
        """Let it wait. cost: the work it is, in any unit, more than 0; begin_by: on the clock of
        `now`; interval_s: a guess of the time between two takes, until it is measured.

        Raises QueueFull; DeadlineExceeded if by all that is known it cannot be begun in time.
        """
        priority = min(max(priority, 0), PRIORITY_MAX)
        room = int(self._limit * ROOM[priority])
        if len(self._entries) >= room:
            raise QueueFull(room, self._retry_after_s(lane))
        if self._per_user.get(user, 0) >= self._limit_per_user:
            raise QueueFull(self._limit_per_user, self._retry_after_s(lane))
        self._number += 1
        entry = _Waiting(
            id=request_id,
            lane=lane,
            user=user,
            priority=priority,
            cost=cost,
            since=now,
            begin_by=begin_by,
            number=self._number,
        )
        self._add(entry, interval_s)
        place = self.place(request_id, now=now)
        assert place is not None
        if now >= begin_by or (place.eta_s is not None and now + place.eta_s > begin_by):
            self.remove(request_id)
            raise DeadlineExceeded("waiting for a free engine", max(begin_by - now, 0.0))
        return place

    def peek(self, lane: str, *, now: float) -> int | None:
        """The next of a lane; None if nobody waits there."""
        found = self._lanes.get(lane)
        return next(self._in_order(found, now)).id if found is not None else None

    def take(self, lane: str, *, now: float) -> int | None:
        """The same, and it waits no more. Call `expire` before."""
        found = self._lanes.get(lane)
        if found is None:
            return None
        entry = next(self._in_order(found, now))
        found.now = max(found.now, found.virtual.get(entry.user, 0.0))
        found.virtual[entry.user] = found.now + entry.cost
        if found.taken_at is not None:
            interval_s, old_s = now - found.taken_at, found.interval_s
            found.interval_s = (
                interval_s if old_s is None else old_s + (interval_s - old_s) * RATE_FORGET
            )
        found.taken_at = now
        self._forget_old_debts(found)
        self.remove(entry.id)
        return entry.id

    def remove(self, request_id: int) -> bool:
        """It waits no more, whatever the reason; False if it did not wait."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return False
        lane = self._lanes[entry.lane]
        line = lane.waiting[entry.priority, entry.user]
        line.remove(entry)
        if not line:
            del lane.waiting[entry.priority, entry.user]
        if not lane.waiting:
            del self._lanes[entry.lane]
        self._per_user[entry.user] -= 1
        if not self._per_user[entry.user]:
            del self._per_user[entry.user]
        return True

    def expire(self, *, now: float) -> list[int]:
        """Those that were not begun in time; they wait no more."""
        late = [entry.id for entry in self._entries.values() if now >= entry.begin_by]
        for request_id in late:
            self.remove(request_id)
        return late

    def first_deadline(self) -> float | None:
        """When `expire` has something to do; None if nobody waits."""
        return min((entry.begin_by for entry in self._entries.values()), default=None)

    def place(self, request_id: int, *, now: float) -> QueuePlace | None:
        """Where it stands; None if it does not wait."""
        entry = self._entries.get(request_id)
        if entry is None:
            return None
        lane = self._lanes[entry.lane]
        order = self._in_order(lane, now)
        position = next(at for at, each in enumerate(order, 1) if each.id == request_id)
        return _place(lane, position)

    def places(self, *, now: float) -> dict[int, QueuePlace]:
        """The same for all that wait."""
        return {
            entry.id: _place(lane, position)
            for lane in self._lanes.values()
            for position, entry in enumerate(self._in_order(lane, now), 1)
        }

    def _add(self, entry: _Waiting, interval_s: float | None) -> None:
        self._entries[entry.id] = entry
        lane = self._lanes.setdefault(entry.lane, _Lane(interval_s=interval_s))
        lane.waiting.setdefault((entry.priority, entry.user), deque()).append(entry)
        self._per_user[entry.user] = self._per_user.get(entry.user, 0) + 1

    def _in_order(self, lane: _Lane, now: float) -> Iterator[_Waiting]:
        """As they would be taken if all were taken now.

        Each line (a priority and user) is in the heap once, by what its first entry has; a user's
        virtual time only grows, so that an entry with an old one is put back with the new.
        """
        virtual: dict[str, float] = {}
        # Lines are copied: the caller may stop midway, and take nothing.
        lines = {key: iter(list(line)) for key, line in lane.waiting.items()}

        def keyed(entry: _Waiting) -> tuple[int, float, int]:
            rank = int((now - entry.since) / self._aging_s) + entry.priority
            at = virtual.get(entry.user, max(lane.virtual.get(entry.user, 0.0), lane.now))
            return (-min(rank, PRIORITY_MAX), at, entry.number)

        heap = [(*keyed(entry), entry) for entry in map(next, lines.values())]
        heapq.heapify(heap)
        while heap:
            *key, entry = heap[0]
            current = keyed(entry)
            if tuple(key) != current:
                heapq.heapreplace(heap, (*current, entry))
                continue
            virtual[entry.user] = current[1] + entry.cost
            following = next(lines[entry.priority, entry.user], None)
            if following is None:
                heapq.heappop(heap)
            else:
                heapq.heapreplace(heap, (*keyed(following), following))
            yield entry

    def _forget_old_debts(self, lane: _Lane) -> None:
        """A user whose virtual time the lane has passed is as good as new. And if many came with a
        single request each, the oldest debts are let go, so that they cannot grow.
        """
        lane.virtual = {user: at for user, at in lane.virtual.items() if at > lane.now}
        while len(lane.virtual) > 4 * self._limit:
            del lane.virtual[next(iter(lane.virtual))]

    def _retry_after_s(self, lane: str) -> float:
        found = self._lanes.get(lane)
        if found is None or found.interval_s is None:
            return RETRY_AFTER_S
        # When half of them are gone there is room, even for many who were told the same.
        return min(max(found.interval_s * self.count(lane) / 2, RETRY_AFTER_S), RETRY_AFTER_S_MAX)


def _place(lane: _Lane, position: int) -> QueuePlace:
    eta_s = None if lane.interval_s is None else lane.interval_s * position
    return QueuePlace(position=position, eta_s=eta_s)

"""What happened, for people and programs: a feed per node, bounded subscriptions."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

SUBSCRIPTION_EVENTS_MAX = 1_000
"""A subscriber that lags by more loses the oldest and is told how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. `kind` names it, `facts` are plain values that JSON can carry."""

    kind: str
    """dotted, noun first: `peer.connected`, `peer.banned`, `pull.progress`, `events.lost`."""
    at: str
    """When, ISO 8601 in UTC."""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Subscription:
    """One reader's events, oldest first."""

    def __init__(self) -> None:
        self._waiting: list[Event] = []
        self._lost = 0
        self._arrived = trio.Event()

    def offer(self, event: Event) -> None:
        """Keep it, dropping the oldest when full."""
        if len(self._waiting) >= SUBSCRIPTION_EVENTS_MAX:
            del self._waiting[0]
            self._lost += 1
        self._waiting.append(event)
        self._arrived.set()

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> Event:
        while not self._waiting:
            self._arrived = trio.Event()
            await self._arrived.wait()
        if self._lost:
            lost, self._lost = self._lost, 0
            return Event(kind="events.lost", at=self._waiting[0].at, facts={"count": lost})
        return self._waiting.pop(0)


class EventFeed:
    """Where services report and readers subscribe. Reporting never waits."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []

    def report(self, event: Event) -> None:
        """Give the event to every subscriber."""
        for subscription in self._subscriptions:
            subscription.offer(event)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[Subscription]:
        """Events from now on, until the block ends."""
        subscription = Subscription()
        self._subscriptions.append(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.remove(subscription)

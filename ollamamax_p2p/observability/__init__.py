"""What others can see of a node: events now, metrics and traces later. Start at `event_feed`."""

from ollamamax_p2p.observability.event_feed import Event, EventFeed, Subscription

__all__ = ["Event", "EventFeed", "Subscription"]

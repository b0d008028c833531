"""WebSocket feed of what the node is doing: one JSON text per event.

The subscription is bounded: a client that reads too slowly loses the oldest events and is told how
many by an `events.lost`. What a client sends is ignored.
"""

import msgspec
import trio
from starlette.websockets import WebSocket

from ollamamax_p2p.observability import EventFeed


async def stream_events(websocket: WebSocket, feed: EventFeed) -> None:
    """Send events from now on, until the client goes."""
    async with trio.open_nursery() as nursery, feed.subscribe() as events:
        # Subscribed before the handshake ends: what happens after it is never missed.
        await websocket.accept()
        nursery.start_soon(_cancel_when_gone, websocket, nursery.cancel_scope)
        async for event in events:
            await websocket.send_text(msgspec.json.encode(event).decode())


async def _cancel_when_gone(websocket: WebSocket, scope: trio.CancelScope) -> None:
    while (await websocket.receive())["type"] != "websocket.disconnect":
        pass
    scope.cancel()

"""Take the API's connections: so many at once and no more, whatever the machine is short of.

The HTTP server's own loop takes everybody and ends on the first error of the system, "too many open
files" among them, and the node with it. Any local program could do that: a connection needs no
token. So the loop is ours, and the server gets one connection at a time.
"""

import logging
import socket
from collections.abc import Awaitable, Callable

import trio

DESCRIPTORS_SHARE = 1 / 3
"""Of the file descriptors that the system lets this process have: refused connections cost programs
a retry, not the node its files and its peers.
"""

SHORTAGE_PAUSE_S = 1.0
"""When the system gives us no descriptor: others of the node's come free meanwhile."""

_log = logging.getLogger(__name__)

_GONE = (BlockingIOError, InterruptedError, ConnectionAbortedError)
# The client had left again before it was its turn.


async def take_connections(
    listener: socket.socket,
    serve: Callable[[socket.socket], Awaitable[None]],
    nursery: trio.Nursery,
    *,
    connections_max: int,
) -> None:
    """Serve each connection in a task of the nursery, until cancelled.

    listener: listening; made non-blocking here. serve: owns the socket it is given; what it raises
    is logged and ends that connection only. connections_max: who comes beyond is hung up on; fewer
    where the system gives this process fewer file descriptors.
    """
    connections_max = min(connections_max, _descriptors_allow())
    listener.setblocking(False)
    places = trio.CapacityLimiter(connections_max)
    short = False
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            connection, _ = listener.accept()
        except _GONE:
            continue
        except OSError as error:
            if not short:
                _log.warning("the API takes no connections for now: %s", error.strerror or error)
            short = True
            await trio.sleep(SHORTAGE_PAUSE_S)
            continue
        short = False
        place = object()
        try:
            places.acquire_on_behalf_of_nowait(place)
        except trio.WouldBlock:
            connection.close()
            continue
        nursery.start_soon(_serve, connection, serve, places, place)


def _descriptors_allow() -> int:
    try:
        from resource import RLIMIT_NOFILE, getrlimit
    except ImportError:  # not a Unix
        return 2**31
    return max(32, int(getrlimit(RLIMIT_NOFILE)[0] * DESCRIPTORS_SHARE))


async def _serve(
    connection: socket.socket,
    serve: Callable[[socket.socket], Awaitable[None]],
    places: trio.CapacityLimiter,
    place: object,
) -> None:
    try:
        await serve(connection)
    except Exception:  # noqa: BLE001 - the server's own faults; the app's are answered inside
        _log.exception("an API connection failed")
    finally:
        places.release_on_behalf_of(place)

"""One client's HTTP/1.1 connection: its requests, one after the other, each answered by the app.

Framing is h11's. The server that was here before (anycorn) took as much CPU for a small request as
all the rest of a node (benchmarks/results.md): three tasks, two channels, and a write for each
piece. So here a connection is one task; the app runs in it, and reads and writes the socket itself.
WebSocket stays with anycorn: a connection that asks for it is handed over and does not come back.

A client that has gone is told to the app by `http.disconnect`; what is sent to it after that goes
nowhere and is no error. A write may be cancelled, which ends the connection.
"""

import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import formatdate
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

import h11
import trio
from starlette.types import ASGIApp, Message

HEADER_BYTES_MAX = 16 * 1024

KEEP_ALIVE_S = 5.0
"""Until the whole head of the next request is there."""

READ_BYTES = 64 * 1024

AHEAD_BYTES_MAX = 64 * 1024
"""Of further requests that come before the one at hand is answered; then reading stops."""

DRAIN_S = 1.0
DRAIN_BYTES_MAX = 256 * 1024
"""Of a body that the app did not read, so that its client sees the answer and not a reset; Go's
number."""

HandOver = Callable[[socket.socket, bytes], Awaitable[None]]
"""Takes a connection that is to speak WebSocket, and what was read of it."""

_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_WITHOUT_BODY = (204, 304)
_GONE: Message = {"type": "http.disconnect"}

_log = logging.getLogger(__name__)


class Connections:
    """What all connections of a server share: whether it is being stopped."""

    def __init__(self) -> None:
        self.stopping = False
        self._idle: set[trio.CancelScope] = set()

    def stop(self) -> None:
        """End those that wait for a request; the others end with the answer at hand."""
        self.stopping = True
        for scope in self._idle:
            scope.cancel()

    @contextmanager
    def idle(self) -> Iterator[None]:
        """For as long as a connection waits for a request."""
        scope = trio.CancelScope(deadline=trio.current_time() + KEEP_ALIVE_S)
        self._idle.add(scope)
        try:
            with scope:
                yield
        finally:
            self._idle.discard(scope)


async def serve_connection(
    connection: socket.socket, app: ASGIApp, among: Connections, hand_over: HandOver
) -> None:
    """Answer requests until either side has enough, then close. connection: non-blocking, ours."""
    try:
        http = _Http(connection)
        while not among.stopping:
            head = None
            with among.idle():
                head = await http.next_head()
            if head is None:
                break
            if _asks_for_websocket(head):
                await hand_over(connection, _as_read(head) + http.framing.trailing_data[0])
                break
            await _answer(http, head, app)
            if not await http.begin_anew():
                break
    except OSError:  # it had gone before it was looked at
        pass
    finally:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)  # what was written still arrives
        connection.close()


class _Http:
    """The connection as HTTP."""

    def __init__(self, connection: socket.socket) -> None:
        """Raises OSError if it is none any more."""
        self.client, self.server = connection.getpeername()[:2], connection.getsockname()[:2]
        self.framing = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADER_BYTES_MAX)
        self.gone = False
        """Nothing can be read or written any more."""
        self._ahead = 0
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))

    async def next_head(self) -> h11.Request | None:
        """The next request; None if there is none, or what came was refused."""
        try:
            while (event := self.framing.next_event()) is h11.NEED_DATA:
                if not await self.read():
                    return None
        except h11.RemoteProtocolError as error:
            await self.refuse(error.error_status_hint)
            return None
        return event if isinstance(event, h11.Request) else None

    async def read(self) -> int:
        """More for the framing: how many bytes; 0 if the client has gone."""
        try:
            data = await self._stream.receive_some(READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            self.gone = True
            return 0
        self.framing.receive_data(bytes(data))
        return len(data)

    async def until_gone(self) -> None:
        """Returns when the client has gone; what it sends meanwhile is its next requests."""
        while not self.gone:
            if self._ahead > AHEAD_BYTES_MAX:
                await trio.sleep_forever()
            self._ahead += await self.read()

    async def write(self, data: bytes) -> None:
        """Returns when the system has taken it."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.gone = True
        except trio.Cancelled:
            self.gone = True  # nobody knows how much of it is out
            raise

    def framed(self, event: h11.Event) -> bytes:
        """As bytes; b"" once the client has broken the protocol."""
        try:
            return self.framing.send(event) or b""
        except h11.LocalProtocolError:
            if self.framing.their_state is not h11.ERROR:
                raise
            self.gone = True
            return b""

    async def refuse(self, status: int) -> None:
        """An error that is found before the app is asked, or because of it; ends the connection."""
        headers = [(b"content-length", b"0"), (b"connection", b"close"), _date()]
        if self.framing.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            data = self.framed(h11.Response(status_code=status, headers=headers))
            await self.write(data + self.framed(h11.EndOfMessage()))

    async def begin_anew(self) -> bool:
        """Whether another request can follow on this connection."""
        if self.framing.our_state is h11.DONE and self.framing.their_state is h11.SEND_BODY:
            await self._drain()
        if self.gone or (self.framing.our_state, self.framing.their_state) != (h11.DONE, h11.DONE):
            return False
        self.framing.start_next_cycle()
        self._ahead = 0
        return True

    async def _drain(self) -> None:
        read = 0
        with trio.move_on_after(DRAIN_S), suppress(h11.RemoteProtocolError):
            while read < DRAIN_BYTES_MAX and self.framing.their_state is h11.SEND_BODY:
                event = self.framing.next_event()
                if isinstance(event, h11.Data):
                    read += len(event.data)
                elif event is h11.NEED_DATA and not await self.read():
                    return


async def _answer(http: _Http, head: h11.Request, app: ASGIApp) -> None:
    raw_path, _, query = head.target.partition(b"?")
    try:
        path = _decoded(raw_path)
    except ValueError:
        await http.refuse(400)
        return
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.1"},
        "http_version": head.http_version.decode(),
        "method": head.method.decode("ascii").upper(),
        "scheme": "http",
        "path": path,
        "raw_path": raw_path,
        "query_string": query,
        "root_path": "",
        "headers": list(head.headers),
        "client": http.client,
        "server": http.server,
        "state": {},
        "extensions": {},
    }
    exchange = _Exchange(http, scope["method"])
    try:
        await app(scope, exchange.receive, exchange.send)
    except Exception:  # noqa: BLE001 - the app's own fault ends one connection, not the node
        _log.exception("a request failed unexpectedly")
    await http.refuse(500)  # if it has not begun to answer


class _Exchange:
    """ASGI's two ways for one request."""

    def __init__(self, http: _Http, method: str) -> None:
        self._http = http
        self._method = method
        self._whole = False
        """The request was read to its end."""
        self._start: Message | None = None
        """The head of the answer, held back: it goes with the first of the body."""
        self._without_body = False
        self._answered = False

    async def receive(self) -> Message:
        """See ASGI."""
        http, parts = self._http, list[bytes]()
        if self._answered:
            return _GONE
        if self._whole:
            await http.until_gone()
        if http.gone:
            return _GONE
        if http.framing.they_are_waiting_for_100_continue:
            await http.write(http.framed(h11.InformationalResponse(status_code=100, headers=[])))
        try:
            while True:
                event = http.framing.next_event()
                if isinstance(event, h11.Data):
                    parts.append(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    self._whole = True
                    break
                elif parts:
                    break
                elif event is not h11.NEED_DATA or not await http.read():
                    return _GONE
        except h11.RemoteProtocolError:
            http.gone = True
            return _GONE
        return {"type": "http.request", "body": b"".join(parts), "more_body": not self._whole}

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        assert message["type"] == "http.response.body", message["type"]
        http = self._http
        if http.gone or self._answered:
            return
        data = b""
        if self._start is not None:
            data, self._start = self._head(self._start), None
        body = message.get("body", b"")
        if body and not self._without_body:
            data += http.framed(h11.Data(data=body))
        if not message.get("more_body", False):
            data += http.framed(h11.EndOfMessage())
            self._answered = True
        if data:
            await http.write(data)

    def _head(self, start: Message) -> bytes:
        status = start["status"]
        self._without_body = self._method == "HEAD" or status in _WITHOUT_BODY
        headers = [*start.get("headers", ()), _date()]
        return self._http.framed(h11.Response(status_code=status, headers=headers))


def _decoded(path: bytes) -> str:
    """Raises ValueError: a bad escape, or no UTF-8."""
    if b"%" not in path:
        return path.decode("ascii")
    if _BAD_ESCAPE.search(path):
        raise ValueError
    return unquote_to_bytes(path).decode()


def _asks_for_websocket(head: h11.Request) -> bool:
    found = {name: value.lower() for name, value in head.headers}
    return (
        found.get(b"upgrade", b"").strip() == b"websocket"
        and head.method == b"GET"
        and b"upgrade" in [each.strip() for each in found.get(b"connection", b"").split(b",")]
    )


def _as_read(head: h11.Request) -> bytes:
    lines = [b"%s %s HTTP/%s" % (head.method, head.target, head.http_version)]
    lines += [b"%s: %s" % (name, value) for name, value in head.headers.raw_items()]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _date() -> tuple[bytes, bytes]:
    return _date_at(int(datetime.now(UTC).timestamp()))


@lru_cache(maxsize=1)
def _date_at(unix_s: int) -> tuple[bytes, bytes]:
    return b"date", formatdate(unix_s, usegmt=True).encode()

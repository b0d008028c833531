"""HTTP to engines: the only module here that knows the HTTP library (h11, on trio's streams).

One client is one server, at a URL or a Unix socket. No redirect is followed, nothing is
decompressed, no proxy is used: an engine is on this machine or beside it. What an answer may make
us hold is bounded by its caller; a server that falls silent is given up.

A request is one write, and its connection is used again: httpcore2, which was here before, took
twice the CPU for it (benchmarks/results.md), a third of what a node took for a small answer.
"""

import os
import select
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11
import msgspec
import trio

from ollamamax_p2p.errors import BackendFailed, BackendUnavailable, BadConfig
from ollamamax_p2p.inference.core.lines import LineSplitter, LineTooLong

LINE_BYTES_MAX = 8 * 1024 * 1024
"""Of one streamed line, as in Ollama's own client."""

BODY_BYTES_MAX = 256 * 1024 * 1024
"""Of an answer that is read as a whole: 4,096 vectors of 4,096 numbers as text."""

HEAD_BYTES_MAX = 64 * 1024
READ_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 5.0

DRAIN_S = 0.05
"""For the end of an answer whose last line was seen, so that its connection is used again: opening
another costs more than all else of a small request."""

DRAIN_PARTS_MAX = 4
IDLE_CONNECTIONS_MAX = 128
"""As many as answers that one node commonly has under way."""

IDLE_S = 2.0
"""A connection is kept for the next request. uvicorn and llama.cpp close theirs after 5 s, and a
request that meets that fails."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that was read as a whole."""

    status: int
    body: bytes
    server: str = ""
    """What it calls itself."""

    def json(self) -> Any:
        """Raises ValueError (msgspec's)."""
        return decode_json(self.body)


@dataclass(frozen=True, slots=True)
class StreamedReply:
    """The head of an answer, and its lines as they come, without their ends."""

    status: int
    lines: AsyncGenerator[bytes, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    """Where a client asks."""

    backend: str
    """Its name in errors."""
    host: str
    port: int
    target: bytes
    """The path that all requests share."""
    headers: tuple[tuple[bytes, bytes], ...]
    tls: ssl.SSLContext | None
    socket_path: str | None

    @property
    def place(self) -> str:
        """As a person knows it."""
        return self.headers[0][1].decode()


class HttpClient:
    """Made by `open_http_client`."""

    def __init__(self, server: _Server, stall_timeout_s: float) -> None:
        self._server = server
        self.stall_timeout_s = stall_timeout_s
        self._idle: list[tuple[float, _Connection]] = []
        """Since when, the longest first."""
        self._closed = False

    async def ask(self, method: str, path: str, body: object = None, *, timeout_s: float) -> Reply:
        """Ask and read the whole answer. Raises BackendUnavailable, BackendFailed."""
        with trio.move_on_after(timeout_s):
            connection, head = await self._sent(method, path, body)
            try:
                whole = bytearray()
                while (part := await connection.part()) is not None:
                    whole += part
                    if len(whole) > BODY_BYTES_MAX:
                        raise BackendFailed(self._server.backend, "its answer is too long")
            finally:
                self._release(connection)
            return Reply(head.status_code, bytes(whole), _called(head))
        raise BackendUnavailable(self._server.backend, f"no answer within {timeout_s:g} s")

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, body: object, *, begin_timeout_s: float
    ) -> AsyncIterator[StreamedReply]:
        """Ask and read lines as they come; leaving the block ends the connection if there are more.

        begin_timeout_s: until the head of the answer, which llama.cpp and Ollama send with the
        first token; from then on the stall timeout counts.
        Raises BackendUnavailable, BackendFailed; the lines raise the same.
        """
        found = None
        with trio.move_on_after(begin_timeout_s):
            found = await self._sent(method, path, body)
        if found is None:
            raise BackendUnavailable(
                self._server.backend, f"no answer within {begin_timeout_s:g} s"
            )
        connection, head = found
        try:
            lines = self._lines(connection)
            try:
                yield StreamedReply(head.status_code, lines)
            finally:
                await lines.aclose()
            await connection.drain()
        finally:
            self._release(connection)

    def close(self) -> None:
        """End every connection that is not in use; the others end with what uses them."""
        self._closed = True
        while self._idle:
            self._idle.pop()[1].close()

    async def _sent(
        self, method: str, path: str, body: object
    ) -> tuple["_Connection", h11.Response]:
        content = b"" if body is None else msgspec.json.encode(body)
        headers = list(self._server.headers)
        if body is not None:
            headers.append((b"Content-Type", b"application/json"))
            headers.append((b"Content-Length", str(len(content)).encode()))
        target = self._server.target + path.encode()
        connection = self._kept() or await _connected(self._server)
        try:
            head = await connection.ask(
                h11.Request(method=method, target=target, headers=headers), content
            )
            encodings = [v for name, v in head.headers if name == b"content-encoding"]
            if any(value.lower() != b"identity" for value in encodings):
                raise BackendFailed(
                    self._server.backend, "its answer is compressed, which was not asked"
                )
        except BaseException:
            connection.close()
            raise
        return connection, head

    def _kept(self) -> "_Connection | None":
        """One that was used before and still stands; the latest, so that the others get old."""
        while self._idle:
            since, connection = self._idle.pop()
            if trio.current_time() - since < IDLE_S and connection.stands():
                return connection
            connection.close()
        return None

    def _release(self, connection: "_Connection") -> None:
        # A Unix socket costs nothing to open.
        if self._closed or self._server.socket_path or not connection.begin_anew():
            connection.close()
            return
        now = trio.current_time()
        self._idle.append((now, connection))
        while len(self._idle) > IDLE_CONNECTIONS_MAX or now - self._idle[0][0] >= IDLE_S:
            self._idle.pop(0)[1].close()

    async def _lines(self, connection: "_Connection") -> AsyncGenerator[bytes, None]:
        splitter = LineSplitter(max_bytes=LINE_BYTES_MAX)
        while True:
            part, came = None, False
            with trio.CancelScope(deadline=trio.current_time() + self.stall_timeout_s):
                part, came = await connection.part(), True
            if not came:
                raise BackendUnavailable(
                    self._server.backend, f"it fell silent for {self.stall_timeout_s:g} s"
                )
            try:
                lines = splitter.end() if part is None else splitter.feed(part)
            except LineTooLong:
                raise BackendFailed(self._server.backend, "it sent a line without an end") from None
            for line in lines:
                yield line
            if part is None:
                return


class _Connection:
    """One connection; carries one request at a time."""

    def __init__(self, server: _Server, plain: trio.SocketStream, stream: trio.abc.Stream) -> None:
        """stream: what is spoken over; `plain` itself, or TLS on it."""
        self._backend = server.backend
        self._plain, self._stream = plain, stream
        self._framing = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)

    async def ask(self, request: h11.Request, body: bytes) -> h11.Response:
        """Send a request; returns the head of its answer."""
        framing = self._framing
        data = framing.send(request) or b""
        if body:
            data += framing.send(h11.Data(data=body)) or b""
        data += framing.send(h11.EndOfMessage()) or b""
        # A server may refuse a long body before it has read it: its answer tells why.
        with suppress(trio.BrokenResourceError):
            await self._stream.send_all(data)
        while not isinstance(event := await self._next(), h11.Response):
            if not isinstance(event, h11.InformationalResponse):
                raise BackendUnavailable(
                    self._backend, "the connection ended before the answer did"
                )
        return event

    async def part(self) -> bytes | None:
        """Of the answer's body, whatever is there; None: it is whole."""
        framing, found = self._framing, list[bytes]()
        if framing.their_state is h11.DONE:
            return None
        event = await self._next()
        while isinstance(event, h11.Data):
            found.append(event.data)
            if (event := self._at_hand()) is h11.NEED_DATA:
                break
        return b"".join(found) if found else None

    async def drain(self) -> None:
        """Read the end of an answer, if it is there or comes at once."""
        with suppress(BackendUnavailable, BackendFailed), trio.move_on_after(DRAIN_S):
            for _ in range(DRAIN_PARTS_MAX):
                if await self.part() is None:
                    return

    def begin_anew(self) -> bool:
        """Whether another request can follow."""
        framing = self._framing
        if (framing.our_state, framing.their_state) != (h11.DONE, h11.DONE):
            return False
        framing.start_next_cycle()
        return not framing.trailing_data[0]

    def stands(self) -> bool:
        """Whether the server has neither ended it nor said anything unasked."""
        poll = select.poll()
        poll.register(self._plain.socket.fileno(), select.POLLIN)
        return not poll.poll(0)

    def close(self) -> None:
        """At once; nothing waits to be sent."""
        self._plain.socket.close()

    async def _next(self) -> Any:
        """The next event; reads until there is one."""
        while (event := self._at_hand()) is h11.NEED_DATA:
            try:
                data = await self._stream.receive_some(READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                problem = f"the connection broke ({_reason(error)})"
                raise BackendUnavailable(self._backend, problem) from None
            if not data and self._framing.their_state is h11.SEND_RESPONSE:
                raise BackendUnavailable(
                    self._backend, "the connection ended before the answer did"
                )
            self._framing.receive_data(bytes(data))
        return event

    def _at_hand(self) -> Any:
        """The next event of what was read."""
        try:
            return self._framing.next_event()
        except h11.RemoteProtocolError as error:
            if "closed" in str(error):
                problem = "the connection ended before the answer did"
                raise BackendUnavailable(self._backend, problem) from None
            problem = f"what it answers is no HTTP ({_reason(error)})"
            raise BackendFailed(self._backend, problem) from None


async def _connected(server: _Server) -> _Connection:
    plain: trio.SocketStream | None = None
    stream: trio.abc.Stream
    try:
        with trio.fail_after(CONNECT_TIMEOUT_S):
            if server.socket_path is not None:
                plain = stream = await trio.open_unix_socket(server.socket_path)
            else:
                plain = stream = await trio.open_tcp_stream(server.host, server.port)
            if server.tls is not None:
                stream = trio.SSLStream(
                    plain, server.tls, server_hostname=server.host, https_compatible=True
                )
                await stream.do_handshake()
        return _Connection(server, plain, stream)
    except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
        if plain is not None:
            plain.socket.close()
        problem = f"cannot connect to {server.place} ({_reason(error)}); is it running?"
        raise BackendUnavailable(server.backend, problem) from None
    except trio.Cancelled:
        if plain is not None:
            plain.socket.close()
        raise


@asynccontextmanager
async def open_http_client(
    backend: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    socket_path: str | None = None,
    stall_timeout_s: float,
) -> AsyncIterator[HttpClient]:
    """A client of one server for as long as the block is open.

    backend: its name in errors. url: http or https, with the path that all requests share.
    headers: sent with each request; may hold a secret. socket_path: a Unix socket instead of TCP.
    Raises BadConfig.
    """
    scheme, host, port, path = _parsed(backend, url)
    # Reading the system's certificates takes 0.1 s, too long for the event loop.
    context = await trio.to_thread.run_sync(_tls) if scheme == "https" else None
    shown = f"[{host}]" if ":" in host else host
    sent = {
        "Host": shown if port is None else f"{shown}:{port}",
        "Accept-Encoding": "identity",
        "User-Agent": "ollamamax-p2p",
        **(headers or {}),
    }
    server = _Server(
        backend=backend,
        host=host,
        port=port or (80 if context is None else 443),
        target=path.encode(),
        headers=tuple((name.encode(), value.encode()) for name, value in sent.items()),
        tls=context,
        socket_path=socket_path,
    )
    client = HttpClient(server, stall_timeout_s)
    try:
        yield client
    finally:
        client.close()


def decode_json(data: bytes) -> Any:
    """Any JSON. Raises ValueError: not JSON, or nested too deeply."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def host_and_port(url: str) -> str:
    """For names and errors: without user, password and path."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2]


def _tls() -> ssl.SSLContext:
    import httpcore2  # knows where each system has its certificates, and takes a while to import

    context = httpcore2.default_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _parsed(backend: str, url: str) -> tuple[str, str, int | None, str]:
    """Scheme, host, port and path."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise BadConfig(f"inference: {backend}", "give a URL as http://host:port")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadConfig(f"inference: {backend}", "give its URL without user, query and fragment")
    return parts.scheme, parts.hostname, port, parts.path.rstrip("/")


def _called(head: h11.Response) -> str:
    values = (value for name, value in head.headers if name == b"server")
    return next(values, b"").decode("latin-1")


def _reason(error: BaseException) -> str:
    """What the system or the library said, in few words."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno:
            return os.strerror(inner.errno).lower()
        if isinstance(inner, BaseExceptionGroup):
            inner = inner.exceptions[0]
            continue
        inner = inner.__cause__ or inner.__context__
    return " ".join(str(error).split())[:200] or type(error).__name__

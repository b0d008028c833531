"""HTTP to engines: the only module here that knows the HTTP library (httpcore2, as in `transfer`).

One client is one server, at a URL or a Unix socket. No redirect is followed, nothing is
decompressed, no proxy is used: an engine is on this machine or beside it. What an answer may make
us hold is bounded by its caller; a server that falls silent is given up.
"""

import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import msgspec
import trio

from ollamamax_p2p.errors import BackendFailed, BackendUnavailable, BadConfig
from ollamamax_p2p.inference.core.lines import LineSplitter, LineTooLong

LINE_BYTES_MAX = 8 * 1024 * 1024
"""Of one streamed line, as in Ollama's own client."""

BODY_BYTES_MAX = 256 * 1024 * 1024
"""Of an answer that is read as a whole: 4,096 vectors of 4,096 numbers as text."""

CONNECT_TIMEOUT_S = 5.0
CLOSE_GRACE_S = 1.0
DRAIN_S = 0.05
DRAIN_PARTS_MAX = 4
IDLE_CONNECTIONS_MAX = 16
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


class HttpClient:
    """Made by `open_http_client`."""

    def __init__(
        self,
        backend: str,
        base: httpcore2.URL,
        headers: Mapping[str, str],
        pool: httpcore2.AsyncConnectionPool,
        stall_timeout_s: float,
    ) -> None:
        self._backend, self._base, self._pool = backend, base, pool
        self.stall_timeout_s = stall_timeout_s
        host = base.host.decode()
        self._headers = {
            "Host": host if base.port is None else f"{host}:{base.port}",
            "Accept-Encoding": "identity",
            "User-Agent": "ollamamax-p2p",
            **headers,
        }

    async def ask(self, method: str, path: str, body: object = None, *, timeout_s: float) -> Reply:
        """Ask and read the whole answer. Raises BackendUnavailable, BackendFailed."""
        with self._translated():
            try:
                with trio.fail_after(timeout_s):
                    async with self._sent(method, path, body) as response:
                        whole = bytearray()
                        async for part in response.aiter_stream():
                            whole += part
                            if len(whole) > BODY_BYTES_MAX:
                                raise BackendFailed(self._backend, "its answer is too long")
                        return Reply(response.status, bytes(whole), _server(response))
            except trio.TooSlowError:
                raise BackendUnavailable(
                    self._backend, f"no answer within {timeout_s:g} s"
                ) from None

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, body: object, *, begin_timeout_s: float
    ) -> AsyncIterator[StreamedReply]:
        """Ask and read lines as they come; leaving the block ends the connection if there are more.

        begin_timeout_s: until the head of the answer, which llama.cpp and Ollama send with the
        first token; from then on the stall timeout counts.
        Raises BackendUnavailable, BackendFailed; the lines raise the same.
        """
        # Not `async with` around the yield: what the caller raises there is not ours to translate.
        sending = self._sent(method, path, body)
        with self._translated():
            try:
                with trio.fail_after(begin_timeout_s):
                    response = await sending.__aenter__()
            except trio.TooSlowError:
                raise BackendUnavailable(
                    self._backend, f"no answer within {begin_timeout_s:g} s"
                ) from None
        parts = response.aiter_stream().__aiter__()
        lines = self._lines(parts)
        try:
            yield StreamedReply(response.status, lines)
            await lines.aclose()
            await self._drain(parts)
        finally:
            await lines.aclose()
            with self._translated():
                await sending.__aexit__(None, None, None)

    async def _drain(self, parts: AsyncIterator[bytes]) -> None:
        """Read the end of an answer whose last line was seen, so that its connection is used again:
        opening another costs more than all else of a request.
        """
        with suppress(Exception), trio.move_on_after(DRAIN_S):
            for _ in range(DRAIN_PARTS_MAX):
                if await anext(parts, None) is None:
                    return

    async def aclose(self) -> None:
        """End every connection."""
        with _closing():
            await self._pool.aclose()

    @asynccontextmanager
    async def _sent(
        self, method: str, path: str, body: object
    ) -> AsyncIterator[httpcore2.Response]:
        content = b"" if body is None else msgspec.json.encode(body)
        headers = dict(self._headers)
        if body is not None:
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        request = httpcore2.Request(
            method,
            httpcore2.URL(
                scheme=self._base.scheme,
                host=self._base.host,
                port=self._base.port,
                target=self._base.target + path.encode(),
            ),
            headers=[(name.encode(), value.encode()) for name, value in headers.items()],
            content=content,
            extensions={"timeout": {"connect": CONNECT_TIMEOUT_S}},
        )
        response = await self._pool.handle_async_request(request)
        try:
            encodings = [v for name, v in response.headers if name.lower() == b"content-encoding"]
            if any(value.lower() != b"identity" for value in encodings):
                raise BackendFailed(self._backend, "its answer is compressed, which was not asked")
            yield response
        finally:
            with _closing():
                await response.aclose()

    async def _lines(self, parts: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        splitter = LineSplitter(max_bytes=LINE_BYTES_MAX)
        while True:
            with self._translated():
                try:
                    with trio.fail_after(self.stall_timeout_s):
                        part = await anext(parts, None)
                except trio.TooSlowError:
                    raise BackendUnavailable(
                        self._backend, f"it fell silent for {self.stall_timeout_s:g} s"
                    ) from None
                lines = splitter.end() if part is None else splitter.feed(part)
            for line in lines:
                yield line
            if part is None:
                return

    @contextmanager
    def _translated(self) -> Any:
        try:
            yield
        except LineTooLong:
            raise BackendFailed(self._backend, "it sent a line without an end") from None
        except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
            raise BackendUnavailable(
                self._backend, f"cannot connect to {self._place} ({_reason(error)}); is it running?"
            ) from None
        except (httpcore2.RemoteProtocolError, httpcore2.LocalProtocolError) as error:
            if "disconnected" in str(error) or "closed" in str(error):
                raise BackendUnavailable(
                    self._backend, "the connection ended before the answer did"
                ) from None
            raise BackendFailed(
                self._backend, f"what it answers is no HTTP ({_reason(error)})"
            ) from None
        except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
            raise BackendUnavailable(
                self._backend, f"the connection broke ({_reason(error)})"
            ) from None

    @property
    def _place(self) -> str:
        return self._headers["Host"] if self._base.port else self._base.host.decode()


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
    base = _parsed(backend, url)
    # Reading the system's certificates takes 0.1 s, too long for the event loop.
    context = (
        await trio.to_thread.run_sync(httpcore2.default_ssl_context)
        if base.scheme == b"https"
        else None
    )
    pool = httpcore2.AsyncConnectionPool(
        ssl_context=context,
        uds=socket_path,
        # The callers bound what runs at once; a bound here would only hide waiting.
        max_connections=None,
        # A Unix socket costs nothing to open.
        max_keepalive_connections=0 if socket_path else IDLE_CONNECTIONS_MAX,
        keepalive_expiry=IDLE_S,
        # Without it each small request waits for the server's delayed acknowledgement.
        socket_options=None if socket_path else [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
    )
    client = HttpClient(backend, base, headers or {}, pool, stall_timeout_s)
    try:
        yield client
    finally:
        await client.aclose()


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


def _parsed(backend: str, url: str) -> httpcore2.URL:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise BadConfig(f"inference: {backend}", "give a URL as http://host:port")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise BadConfig(f"inference: {backend}", "give its URL without user, query and fragment")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return httpcore2.URL(
        scheme=parts.scheme.encode(),
        host=host.encode(),
        port=port,
        target=parts.path.rstrip("/").encode(),
    )


def _server(response: httpcore2.Response) -> str:
    values = (value for name, value in response.headers if name.lower() == b"server")
    return next(values, b"").decode("latin-1")


def _closing() -> trio.CancelScope:
    """Clean-up goes on when the task is cancelled, but not for long."""
    return trio.CancelScope(deadline=trio.current_time() + CLOSE_GRACE_S, shield=True)


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

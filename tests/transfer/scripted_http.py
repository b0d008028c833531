"""HTTP servers that behave exactly as badly as a test wants, on a loopback port of their own."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio


@dataclass(frozen=True)
class Asked:
    """One request that arrived."""

    method: str
    target: str
    headers: dict[str, str]
    """Names in lower case."""


Answer = Callable[[Asked, trio.abc.Stream], Awaitable[None]]


@dataclass
class ScriptedServer:
    """A running server and what it was asked."""

    port: int
    asked: list[Asked] = field(default_factory=list)
    hung_up: trio.Event = field(default_factory=trio.Event)
    """Set when a client's connection has ended."""

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def targets(self) -> list[str]:
        return [asked.target for asked in self.asked]


async def respond(
    stream: trio.abc.Stream,
    status: int = 200,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    with_length: bool = True,
) -> None:
    length = {"Content-Length": str(len(body))} if with_length else {}
    lines = [f"{name}: {value}" for name, value in {**length, **(headers or {})}.items()]
    head = "\r\n".join([f"HTTP/1.1 {status} Whatever", *lines, "", ""])
    await stream.send_all(head.encode() + body)


async def respond_range(stream: trio.abc.Stream, asked: Asked, blob: bytes) -> None:
    """What a good server does with a Range."""
    first, last = map(int, asked.headers["range"].removeprefix("bytes=").split("-"))
    content_range = {"Content-Range": f"bytes {first}-{last}/{len(blob)}"}
    await respond(stream, 206, blob[first : last + 1], content_range)


@asynccontextmanager
async def scripted_server(
    answer: Answer, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ScriptedServer]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = ScriptedServer(listeners[0].socket.getsockname()[1])
    async with trio.open_nursery() as nursery:
        serve = partial(_serve, server, answer, tls)
        nursery.start_soon(partial(trio.serve_listeners, serve, listeners))
        yield server
        nursery.cancel_scope.cancel()


async def _serve(
    server: ScriptedServer,
    answer: Answer,
    tls: ssl.SSLContext | None,
    transport: trio.SocketStream,
) -> None:
    stream: trio.abc.Stream = transport
    if tls is not None:
        stream = trio.SSLStream(transport, tls, server_side=True, https_compatible=True)
    try:
        async with stream:
            while (asked := await _read_head(stream)) is not None:
                server.asked.append(asked)
                await answer(asked, stream)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        server.hung_up.set()


async def _read_head(stream: trio.abc.Stream) -> Asked | None:
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some()
        if not data:
            return None
        head += data
        if head[0] == 0x16:  # A TLS greeting: what a server that speaks plain http says to it.
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            return None
    first, *lines = head.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.partition(":") for line in lines)
    return Asked(method, target, {name.lower(): value.strip() for name, _, value in pairs})

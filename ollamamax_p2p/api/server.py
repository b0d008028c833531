"""Serve the API on trio, and tell programs of the same user where it is."""

import errno
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio.abc
import trio
from anycorn import Config
from anycorn.tcp_server import tcp_server_handler
from anycorn.typing import ConnectionState
from anycorn.utils import wrap_app
from anycorn.worker_context import WorkerContext
from starlette.applications import Starlette

from ollamamax_p2p.api.accepting import take_connections
from ollamamax_p2p.api.app import make_app
from ollamamax_p2p.api.http_connection import HEADER_BYTES_MAX, Connections, serve_connection
from ollamamax_p2p.api.node_file import NodeFile, new_token, remove_files, write_files
from ollamamax_p2p.api.served_inference import ServedInference
from ollamamax_p2p.api.served_node import ServedNode
from ollamamax_p2p.api.settings import ApiSettings
from ollamamax_p2p.api.shared_pulls import open_shared_pulls
from ollamamax_p2p.api.websocket_requests import FRAME_BYTES_MAX
from ollamamax_p2p.errors import AccessRefused, BadConfig, PortInUse

_log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0
"""How long answers may take to finish when the node stops; streams are ended before."""


@dataclass(frozen=True, slots=True)
class ApiServer:
    """A listening API."""

    address: str
    """host:port, the port as the system gave it."""
    token: str = field(repr=False)
    ollama_address: str = ""
    """Where Ollama's API is served besides; "" if nowhere."""


@asynccontextmanager
async def open_api(
    node: ServedNode,
    settings: ApiSettings,
    *,
    data_dir: Path,
    peer_id: str,
    inference: ServedInference | None = None,
) -> AsyncIterator[ApiServer]:
    """Serve a node for as long as the block is open. Raises PortInUse, AccessRefused, BadConfig.

    data_dir: where the token and node.json are written; both are removed at the end.
    inference: who answers under /api and /v1; None: nobody.
    """
    with ExitStack() as listeners:
        listener = listeners.enter_context(_listener(settings.listen))
        second = listeners.enter_context(_second_listener(settings))
        address, token = _shown(listener), new_token()
        async with trio.open_nursery() as nursery:
            accepting = [trio.CancelScope(), trio.CancelScope()]
            sockets, among = WorkerContext(None), Connections()
            async with open_shared_pulls(node) as pulls:
                make = partial(
                    make_app, node, pulls, token=token, inference=inference, settings=settings
                )
                serve = partial(
                    _serve,
                    among=among,
                    sockets=sockets,
                    nursery=nursery,
                    most=settings.connections_max,
                )
                nursery.start_soon(partial(serve, listener, make(), accepting=accepting[0]))
                if second is not None:
                    app = make(serves_ours=False)
                    nursery.start_soon(partial(serve, second, app, accepting=accepting[1]))
                found = NodeFile(pid=os.getpid(), api=address, peer_id=peer_id)
                await trio.to_thread.run_sync(write_files, data_dir, found, token)
                try:
                    yield ApiServer(address, token, _shown(second) if second else "")
                finally:
                    remove_files(data_dir)  # two unlinks; in a thread, cancelling would skip them
            for scope in accepting:
                scope.cancel()
            among.stop()
            await sockets.terminated.set()
            nursery.cancel_scope.deadline = trio.current_time() + STOP_GRACE_S


async def _serve(
    listener: socket.socket,
    app: Starlette,
    *,
    among: Connections,
    sockets: WorkerContext,
    nursery: trio.Nursery,
    accepting: trio.CancelScope,
    most: int,
) -> None:
    """Take connections until `accepting` is cancelled, `most` at once; those that are open go on in
    the nursery.

    among: of those that speak HTTP. sockets: the same of those that speak WebSocket.
    """
    config = _websocket_config()
    asgi: Any = app  # two libraries' types of one protocol
    wrapped = wrap_app(asgi, config.wsgi_max_body_size, "asgi")
    websocket = tcp_server_handler(wrapped, config, sockets, ConnectionState({}))

    async def hand_over(connection: socket.socket, read: bytes) -> None:
        stream = await anyio.abc.SocketStream.from_socket(connection)
        await websocket(_BegunStream(stream, read))

    connections = _Connections()

    async def serve(connection: socket.socket) -> None:
        connection.setblocking(False)
        with suppress(OSError):  # the client has gone already
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connections.one(connection):
            await serve_connection(connection, app, among, hand_over)

    with accepting:
        await take_connections(listener, serve, nursery, connections_max=most)
    try:
        await connections.wait_until_none()
    finally:
        connections.cut()


class _BegunStream:
    """A stream of which a part was read already: read again first."""

    def __init__(self, stream: anyio.abc.SocketStream, read: bytes) -> None:
        self._stream, self._read = stream, read

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        """As of the stream."""
        if self._read:
            data, self._read = self._read[:max_bytes], self._read[max_bytes:]
            return data
        return await self._stream.receive(max_bytes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Connections:
    """Those that are open, so that they can be cut. anycorn shields its writes to WebSockets from
    being cancelled, and one to a client that reads nothing would never end.
    """

    def __init__(self) -> None:
        self._open: set[socket.socket] = set()
        self._ended = trio.Event()

    @contextmanager
    def one(self, connection: socket.socket) -> Iterator[None]:
        """Open for as long as the block."""
        self._open.add(connection)
        try:
            yield
        finally:
            self._open.remove(connection)
            self._ended.set()

    async def wait_until_none(self) -> None:
        """Returns when all have ended."""
        while self._open:
            self._ended = trio.Event()
            await self._ended.wait()

    def cut(self) -> None:
        """Whoever writes to one, or reads, gets an error."""
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _listener(listen: str) -> socket.socket:
    """A bound socket. Bound here and not by the server, so that its error can be named."""
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    listener: socket.socket | None = None
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
    except OSError as error:
        if listener is not None:
            listener.close()
        raise _named(error, listen) from error
    return listener


@contextmanager
def _second_listener(settings: ApiSettings) -> Iterator[socket.socket | None]:
    """None if none is wanted or none can be had: another program there, Ollama first of all, is no
    reason not to run.
    """
    listen = settings.ollama_listen
    try:
        # What is served there has Ollama's paths already; two free ports are two.
        is_there = listen == settings.listen and not listen.endswith(":0")
        listener = _listener(listen) if listen and not is_there else None
    except (PortInUse, AccessRefused, BadConfig) as error:
        _log.warning("Ollama's API is not served on %s: %s", listen, error)
        listener = None
    with listener or nullcontext():
        yield listener


def _named(error: OSError, listen: str) -> PortInUse | AccessRefused | BadConfig:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(listen, "--api")
    if error.errno == errno.EACCES:
        return AccessRefused(listen, "listen on")
    return BadConfig("api.listen", f"cannot listen on {listen} ({error.strerror or error})")


def _websocket_config() -> Config:
    config = Config()
    config.errorlog = logging.getLogger("ollamamax_p2p.api")
    config.include_server_header = False
    config.h11_max_incomplete_size = HEADER_BYTES_MAX
    config.websocket_max_message_size = FRAME_BYTES_MAX
    config.websocket_permessage_deflate = False  # costs CPU, saves nothing on loopback
    return config


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

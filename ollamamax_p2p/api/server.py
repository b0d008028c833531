"""Serve the API on trio, and tell programs of the same user where it is."""

import errno
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio
from anycorn import Config, serve

from ollamamax_p2p.api.app import make_app
from ollamamax_p2p.api.node_file import NodeFile, new_token, remove_files, write_files
from ollamamax_p2p.api.served_node import ServedNode
from ollamamax_p2p.api.settings import ApiSettings
from ollamamax_p2p.api.shared_pulls import open_shared_pulls
from ollamamax_p2p.errors import AccessRefused, BadConfig, PortInUse

STOP_GRACE_S = 1.0
"""How long answers may take to finish when the node stops; streams are ended before."""

HEADER_BYTES_MAX = 16 * 1024
EVENT_CLIENT_BYTES_MAX = 4 * 1024
"""What a WebSocket client may send at once; there is nothing to say."""


@dataclass(frozen=True, slots=True)
class ApiServer:
    """A listening API."""

    address: str
    """host:port, the port as the system gave it."""
    token: str = field(repr=False)


@asynccontextmanager
async def open_api(
    node: ServedNode, settings: ApiSettings, *, data_dir: Path, peer_id: str
) -> AsyncIterator[ApiServer]:
    """Serve a node for as long as the block is open. Raises PortInUse, AccessRefused, BadConfig.

    data_dir: where the token and node.json are written; both are removed at the end.
    """
    listener = _listener(settings.listen)
    address = _shown(listener)
    token, stopping = new_token(), trio.Event()
    async with trio.open_nursery() as nursery:
        async with open_shared_pulls(node) as pulls:
            app = make_app(node, pulls, token=token)
            start = partial(serve, shutdown_trigger=stopping.wait, mode="asgi")
            await nursery.start(start, app, _server_config(listener))
            found = NodeFile(pid=os.getpid(), api=address, peer_id=peer_id)
            await trio.to_thread.run_sync(write_files, data_dir, found, token)
            try:
                yield ApiServer(address, token)
            finally:
                remove_files(data_dir)  # two unlinks; in a thread a cancellation would skip them
        stopping.set()


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


def _named(error: OSError, listen: str) -> PortInUse | AccessRefused | BadConfig:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(listen, "--api")
    if error.errno == errno.EACCES:
        return AccessRefused(listen, "listen on")
    return BadConfig("api.listen", f"cannot listen on {listen} ({error.strerror or error})")


def _server_config(listener: socket.socket) -> Config:
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]  # the server owns it from here on
    config.errorlog = logging.getLogger("ollamamax_p2p.api")
    config.graceful_timeout = STOP_GRACE_S
    config.include_server_header = False
    config.h11_max_incomplete_size = HEADER_BYTES_MAX
    config.websocket_max_message_size = EVENT_CLIENT_BYTES_MAX
    config.websocket_permessage_deflate = False  # costs CPU, saves nothing on loopback
    return config


def _shown(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

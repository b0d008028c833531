"""Connections that need no token cost the node nothing it cannot spare."""

import errno
import os
import socket
from functools import partial

import pytest
import trio

from ollamamax_p2p.api.accepting import take_connections
from tests.api.ram_node import RamNode
from tests.api.store_node import serving

pytestmark = pytest.mark.network

CONNECTIONS_MAX = 8


def listening(kind: type[socket.socket] = socket.socket) -> socket.socket:
    listener = kind(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def start_taking(nursery: trio.Nursery, listener: socket.socket, serve) -> None:
    nursery.start_soon(
        partial(take_connections, listener, serve, nursery, connections_max=CONNECTIONS_MAX)
    )


async def greet(connection: socket.socket) -> None:
    """Say hello, and stay until the client goes."""
    async with trio.SocketStream(trio.socket.from_stdlib_socket(connection)) as stream:
        await stream.send_all(b"hello")
        await stream.receive_some(1)


async def greeting(stream: trio.SocketStream) -> bytes:
    """What the server says; nothing if it closes."""
    with trio.fail_after(30):
        try:
            return await stream.receive_some(16)
        except trio.BrokenResourceError:
            return b""


async def test_connections_beyond_the_bound_are_refused_until_one_ends(nursery):
    with listening() as listener:
        where = listener.getsockname()
        async with trio.open_nursery() as serving:
            serving.start_soon(
                lambda: take_connections(listener, greet, serving, connections_max=2)
            )
            held = [await trio.open_tcp_stream(*where) for _ in range(2)]
            assert [await greeting(each) for each in held] == [b"hello", b"hello"]
            assert await greeting(await trio.open_tcp_stream(*where)) == b""
            await held[0].aclose()
            with trio.fail_after(30):
                while await greeting(await trio.open_tcp_stream(*where)) != b"hello":
                    await trio.lowlevel.checkpoint()  # the server has yet to hear of the end
            serving.cancel_scope.cancel()


class ShortOfFiles(socket.socket):
    """A listening socket of a process that has no descriptor left, three times."""

    refusals = 3

    def accept(self):
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


async def test_a_shortage_of_descriptors_is_said_once_and_outlived(autojump_clock, caplog):
    with listening(ShortOfFiles) as listener:
        where = listener.getsockname()
        async with trio.open_nursery() as serving:
            start_taking(serving, listener, greet)
            client = socket.create_connection(where)
            await trio.sleep(3.5)
            with client:
                assert client.recv(16) == b"hello"
            serving.cancel_scope.cancel()
    assert caplog.text.count("Too many open files") == 1


async def test_a_connection_that_fails_ends_alone(nursery, caplog):
    async def fail(connection: socket.socket) -> None:
        with connection:
            raise RuntimeError("a bug of the server")

    with listening() as listener:
        async with trio.open_nursery() as serving:
            start_taking(serving, listener, fail)
            for _ in range(3):
                assert await greeting(await trio.open_tcp_stream(*listener.getsockname())) == b""
            serving.cancel_scope.cancel()
    assert caplog.text.count("an API connection failed") == 3


async def test_the_node_answers_beside_idle_connections_up_to_the_bound(tmp_path):
    async with serving(RamNode(), tmp_path, connections_max=24) as served:
        host, _, port = served.server.address.rpartition(":")
        idle = [await trio.open_tcp_stream(host, int(port)) for _ in range(16)]
        assert (await served.raw("GET", "/omx/v1/status"))[0] == 200
        for stream in idle:
            await stream.aclose()

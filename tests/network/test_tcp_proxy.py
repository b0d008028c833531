"""The proxy that the chaos tests trust to be a bad network."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.network.tcp_proxy import TcpProxy, open_tcp_proxy

pytestmark = pytest.mark.network

BUDGET_S = 30


@asynccontextmanager
async def before_an_echo() -> AsyncIterator[tuple[TcpProxy, list[bytes]]]:
    """A proxy before a server that sends back what it gets, and what that was."""
    heard: list[bytes] = []

    async def echo(stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                heard.append(data)
                await stream.send_all(data)
        except trio.BrokenResourceError:
            heard.append(b"<reset>")
        else:
            heard.append(b"<end>")

    with trio.fail_after(BUDGET_S):
        async with trio.open_nursery() as nursery, open_tcp_proxy(random.Random(1)) as proxy:
            listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
            nursery.start_soon(trio.serve_listeners, echo, [listener])
            proxy.target = listener.socket.getsockname()[1]
            yield proxy, heard
            nursery.cancel_scope.cancel()


async def dial(proxy: TcpProxy) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", proxy.port)


async def said_back(stream: trio.SocketStream, data: bytes) -> bytes:
    await stream.send_all(data)
    found = b""
    while len(found) < len(data):
        part = await stream.receive_some()
        assert part, found
        found += part
    return found


async def until(heard: list[bytes], what: bytes) -> None:
    while what not in heard:  # noqa: ASYNC110 - a list tells nobody
        await trio.sleep(0.005)


async def test_it_carries_everything_also_in_small_parts_with_delays() -> None:
    async with before_an_echo() as (proxy, _):
        proxy.forward.part_bytes, proxy.forward.latency_s, proxy.backward.jitter_s = 7, 0.01, 0.01
        data = random.Random(2).randbytes(500)
        assert await said_back(await dial(proxy), data) == data
        assert proxy.carried == 1000


async def test_a_held_direction_loses_nothing_and_the_other_goes_on() -> None:
    async with before_an_echo() as (proxy, heard):
        stream = await dial(proxy)
        assert await said_back(stream, b"one") == b"one"
        proxy.backward.hold()
        await stream.send_all(b"two")
        await until(heard, b"two")  # forward it went
        with trio.move_on_after(0.05) as waiting:
            await stream.receive_some()
        assert waiting.cancelled_caught
        proxy.backward.release()
        assert await stream.receive_some() == b"two"


async def test_a_cut_is_told_to_both_ends_and_one_may_dial_again() -> None:
    async with before_an_echo() as (proxy, heard):
        stream = await dial(proxy)
        await said_back(stream, b"one")
        proxy.cut()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await until(heard, b"<reset>")
        assert await said_back(await dial(proxy), b"two") == b"two"


async def test_who_refuses_resets_every_dialler() -> None:
    async with before_an_echo() as (proxy, _):
        proxy.refuses = True
        with pytest.raises((trio.BrokenResourceError, OSError)):
            await said_back(await dial(proxy), b"one")
        proxy.heal()
        assert await said_back(await dial(proxy), b"one") == b"one"


@pytest.mark.parametrize("dialler_knows", [True, False])
async def test_only_one_end_of_a_half_open_connection_knows(dialler_knows: bool) -> None:
    async with before_an_echo() as (proxy, heard):
        stream = await dial(proxy)
        await said_back(stream, b"one")
        proxy.half_open(dialler_knows=dialler_knows)
        if dialler_knows:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            assert heard == [b"one"]
        else:
            await until(heard, b"<reset>")
            await stream.send_all(b"into the void")
            with trio.move_on_after(0.05) as waiting:
                await stream.receive_some()
            assert waiting.cancelled_caught


async def test_an_end_is_passed_on_later_if_asked() -> None:
    async with before_an_echo() as (proxy, heard):
        stream = await dial(proxy)
        await said_back(stream, b"one")
        proxy.forward.close_delay_s = 3600
        await stream.send_eof()
        with trio.move_on_after(0.05):
            await until(heard, b"<end>")
        assert b"<end>" not in heard
        await stream.aclose()

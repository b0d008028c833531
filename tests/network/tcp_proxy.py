"""A TCP proxy that makes a network bad: what Shopify's toxiproxy does, as tasks in the test.

One TcpProxy stands in front of one address. Each direction has Toxics of its own: `forward` is from
whoever dialled to the target, `backward` the other way. A held direction delivers nothing and loses
nothing, as TCP does through a network that drops every packet for a while: what was sent meanwhile
arrives when it is let go. Both directions held is a partition, one of them a one-way partition.
"""

import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

PART_BYTES = 64 * 1024
PARTS_ON_THEIR_WAY = 64
"""Of one direction of one connection; then the sender waits, as with a full TCP window."""

_RESET = struct.pack("ii", 1, 0)
# SO_LINGER with no time: closing sends RST in the place of FIN.


@dataclass
class Toxics:
    """What befalls the bytes of one direction. Change the fields at any time."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    """Up to so much more, drawn for each part; parts never overtake each other."""
    part_bytes: int = PART_BYTES
    """Deliver in parts of at most so many bytes."""
    close_delay_s: float = 0.0
    """The end of a connection is passed on this much later."""
    _held: trio.Event | None = field(default=None, init=False)

    def hold(self) -> None:
        """Deliver nothing from now on."""
        if self._held is None:
            self._held = trio.Event()

    def release(self) -> None:
        """Deliver what was held, and go on."""
        if self._held is not None:
            self._held.set()
            self._held = None

    def heal(self) -> None:
        """Be an ordinary network again."""
        self.latency_s = self.jitter_s = self.close_delay_s = 0.0
        self.part_bytes = PART_BYTES
        self.release()

    async def wait_open(self) -> None:
        """Returns once nothing is held."""
        while self._held is not None:
            await self._held.wait()


class TcpProxy:
    """See the head; made by `open_tcp_proxy`."""

    def __init__(self, rng: random.Random, port: int) -> None:
        self.port = port
        self.target: int | None = None
        """A port on loopback; None: whoever dials is reset."""
        self.forward = Toxics()
        self.backward = Toxics()
        self.refuses = False
        """Whether new connections are reset, as if nobody listened."""
        self.carried = 0
        """Bytes passed on, both ways."""
        self.rng = rng
        self._pairs: dict[_Pair, None] = {}

    def hold(self) -> None:
        """Neither direction delivers; connections stay."""
        self.forward.hold()
        self.backward.hold()

    def cut(self) -> None:
        """Reset every connection, at both ends."""
        for pair in list(self._pairs):
            pair.reset()

    def half_open(self, *, dialler_knows: bool) -> None:
        """Every connection ends at one end, and the other is never told: it may send into the void
        until it gives up by itself.
        """
        for pair in list(self._pairs):
            pair.abandon(dialler_knows=dialler_knows)

    def heal(self) -> None:
        """Be an ordinary network again. Half-open connections stay what they are."""
        self.refuses = False
        self.forward.heal()
        self.backward.heal()

    async def _accept(self, dialler: trio.SocketStream) -> None:
        if self.refuses or self.target is None:
            _reset(dialler)
            return
        try:
            await self.forward.wait_open()  # a SYN is a packet too
            target = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            _reset(dialler)
            return
        pair = _Pair(self, dialler, target)
        self._pairs[pair] = None
        try:
            await pair.run()
        finally:
            del self._pairs[pair]


@asynccontextmanager
async def open_tcp_proxy(rng: random.Random) -> AsyncIterator[TcpProxy]:
    """Listen on a port of loopback for as long as the block is open."""
    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        proxy = TcpProxy(rng, listener.socket.getsockname()[1])
        nursery.start_soon(trio.serve_listeners, proxy._accept, [listener])
        yield proxy
        nursery.cancel_scope.cancel()


class _Pair:
    """One connection, which is two: from who dialled to us, and from us to the target."""

    def __init__(
        self, proxy: TcpProxy, dialler: trio.SocketStream, target: trio.SocketStream
    ) -> None:
        self.dialler = dialler
        self.target = target
        self._proxy = proxy
        self._scope = trio.CancelScope()
        self._alone: trio.SocketStream | None = None

    async def run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    there, back = self._proxy.forward, self._proxy.backward
                    nursery.start_soon(self._carry, self.dialler, self.target, there)
                    nursery.start_soon(self._carry, self.target, self.dialler, back)
            if self._alone is not None:
                await _swallow(self._alone)
        finally:
            self.dialler.socket.close()
            self.target.socket.close()

    def reset(self) -> None:
        """Both ends are told at once that it is over."""
        _reset(self.dialler)
        _reset(self.target)
        self._scope.cancel()

    def abandon(self, *, dialler_knows: bool) -> None:
        """Only one end is told."""
        told, self._alone = (
            (self.dialler, self.target) if dialler_knows else (self.target, self.dialler)
        )
        _reset(told)
        self._scope.cancel()

    async def _carry(
        self, source: trio.SocketStream, sink: trio.SocketStream, toxics: Toxics
    ) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](PARTS_ON_THEIR_WAY)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, source, send, toxics)
                nursery.start_soon(self._write, sink, receive, toxics)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            self.reset()

    async def _read(
        self, source: trio.SocketStream, send: trio.MemorySendChannel, toxics: Toxics
    ) -> None:
        async with send:
            while data := await source.receive_some(toxics.part_bytes):
                extra = self._proxy.rng.uniform(0, toxics.jitter_s)
                await send.send((trio.current_time() + toxics.latency_s + extra, data))

    async def _write(
        self, sink: trio.SocketStream, receive: trio.MemoryReceiveChannel, toxics: Toxics
    ) -> None:
        async for due, data in receive:
            await trio.sleep_until(due)
            await toxics.wait_open()
            self._proxy.carried += len(data)
            await sink.send_all(data)
        await trio.sleep(toxics.close_delay_s)
        await toxics.wait_open()
        await sink.send_eof()


async def _swallow(stream: trio.SocketStream) -> None:
    """Be the void that one end of a half-open connection speaks into."""
    try:
        while await stream.receive_some():
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # closed by its end, or by a reset of ours


def _reset(stream: trio.SocketStream) -> None:
    if stream.socket.fileno() >= 0:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        stream.socket.close()

"""A ByteStream over a py-libp2p stream.

The library's own reads and writes are not enough (docs/py-libp2p.md, "Streams"): a write raises
after five seconds without window, a read that is cancelled can lose what it had taken, and the end
of a connection looks like the end of the stream. So we wait ourselves, until something can be
written or read without waiting, and let the library do that.
"""

import contextlib
from collections.abc import Callable
from typing import cast

import trio
import trio.lowlevel
from libp2p.io.exceptions import IOException
from libp2p.network.stream.exceptions import StreamError
from libp2p.network.stream.net_stream import NetStream
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import YamuxStream

from ollamamax_p2p.errors import PeerGone
from ollamamax_p2p.host.libp2p_muxer import BoundedYamux, had_ended, take_last_unread
from ollamamax_p2p.identity import PeerId

WINDOW_PAUSE_S_MIN = 0.001
WINDOW_PAUSE_S_MAX = 0.05
"""How often a sender without window looks again; py-libp2p has nothing to wait for. At the longest
pause a choked stream costs 20 looks a second.
"""

LINGER_S = 2.0
"""After `aclose`, for the other side to end its direction too, before it is told by a reset."""

_FAILURES = (StreamError, MuxedStreamError, IOException)


class Libp2pStream:
    """See `ByteStream`."""

    def __init__(
        self,
        net_stream: NetStream,
        peer: PeerId,
        protocol: str,
        *,
        linger: Callable[["Libp2pStream"], None],
    ) -> None:
        """linger: called by `aclose` to have `until_other_side_ended` run in the background."""
        self.peer = peer
        self.protocol = protocol
        self._net = net_stream
        self._muxed = cast("YamuxStream", net_stream.muxed_stream)
        self._conn = cast("BoundedYamux", net_stream.muxed_conn)
        self._linger = linger
        self._closed_here = False
        self._said_eof = False
        self._sending = self._receiving = False

    async def send_all(self, data: bytes) -> None:
        """See `ByteStream`."""
        if self._sending:
            raise trio.BusyResourceError(f"{self.protocol}: two tasks send at once")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            rest = memoryview(data)
            self._check_sending()
            while rest:
                await self._wait_for_window()
                rest = rest[await self._conn.send_data(self._muxed, rest) :]
        except _FAILURES as error:
            raise PeerGone(self.peer, self._why(error)) from error
        finally:
            self._sending = False

    async def _wait_for_window(self) -> None:
        """Until the other side takes something."""
        pause = WINDOW_PAUSE_S_MIN
        while True:
            self._check_sending()
            if self._muxed.send_window > 0:
                return
            await trio.sleep(pause)
            pause = min(2 * pause, WINDOW_PAUSE_S_MAX)

    def _check_sending(self) -> None:
        if self._closed_here or self._said_eof:
            raise PeerGone(self.peer, "the stream was closed here")
        if self._conn.is_ending:
            raise PeerGone(self.peer)
        if self._muxed.closed or self._muxed.send_closed:
            raise PeerGone(self.peer, "the other side has closed the stream")

    async def receive_some(self) -> bytes:
        """See `ByteStream`."""
        if self._receiving:
            raise trio.BusyResourceError(f"{self.protocol}: two tasks receive at once")
        self._receiving = True
        try:
            # A checkpoint either way, and one only: it is a turn of the scheduler.
            if self._has_news:
                await trio.lowlevel.checkpoint()
            else:
                await self._arrival()
            while (data := await self._take()) is None:
                await self._arrival()
            return data
        except _FAILURES as error:
            raise PeerGone(self.peer, self._why(error)) from error
        finally:
            self._receiving = False

    async def _take(self) -> bytes | None:
        """What has arrived, b"" at the end, None if there is nothing yet."""
        if self._closed_here:
            raise PeerGone(self.peer, "the stream was closed here")
        if self._conn.is_ending:
            return self._take_last()
        if self._unread:
            return await self._conn.take_unread(self._muxed)
        if self._muxed.recv_closed:
            return b""
        if self._muxed.closed or self._muxed.stream_id not in self._conn.streams:
            raise PeerGone(self.peer, "the other side has reset the stream")
        return None

    def _take_last(self) -> bytes:
        """What had arrived when the connection ended, and then its end."""
        if buffer := self._conn.stream_buffers.get(self._muxed.stream_id):
            data = bytes(buffer)
            buffer.clear()
            return data
        if data := take_last_unread(self._muxed):
            return data
        if had_ended(self._muxed):
            return b""
        raise PeerGone(self.peer)

    async def _arrival(self) -> None:
        """Wait until something about the stream has changed."""
        stream_id, events = self._muxed.stream_id, self._conn.stream_events
        event = events.get(stream_id)
        if event is None:
            await trio.lowlevel.checkpoint()
            return
        await event.wait()
        if events.get(stream_id) is event:
            events[stream_id] = trio.Event()

    async def send_eof(self) -> None:
        """See `ByteStream`."""
        if not self._said_eof:
            self._check_sending()
        self._said_eof = True
        try:
            await self._net.close_write()
        except _FAILURES as error:
            raise PeerGone(self.peer, self._why(error)) from error

    async def aclose(self) -> None:
        """See `ByteStream`. What was sent before still arrives."""
        if self._closed_here:
            return
        self._closed_here = True
        event = self._conn.stream_events.get(self._muxed.stream_id)
        with trio.CancelScope(shield=True), contextlib.suppress(*_FAILURES):
            await self._net.close()
        if event is not None:
            event.set()
        if not self._other_side_ended:
            self._linger(self)

    async def until_other_side_ended(self) -> None:
        """Give it a moment to end its direction too; reset the stream if it sends on instead."""
        with trio.move_on_after(LINGER_S):
            while not self._other_side_ended and not self._unread:
                await self._arrival()
        if not self._other_side_ended or self._unread:
            await self._net.reset()

    @property
    def _has_news(self) -> bool:
        """Whether `_take` has something to say."""
        ended = self._closed_here or self._other_side_ended
        return ended or self._unread or self._muxed.stream_id not in self._conn.streams

    @property
    def _unread(self) -> bool:
        return bool(self._conn.stream_buffers.get(self._muxed.stream_id))

    @property
    def _other_side_ended(self) -> bool:
        return self._muxed.recv_closed or self._muxed.closed or self._conn.is_ending

    def _why(self, error: Exception) -> str:
        if self._conn.is_ending:
            return "the connection ended"
        return f"the stream failed ({type(error).__name__})"

"""Yamux as py-libp2p has it, with the bounds and the write order that we rely on.

Three things differ from the library's `Yamux` (docs/py-libp2p.md, "Yamux"):

- One task writes; everybody else queues whole frames. So a send that is cancelled leaves either a
  whole frame or none, never half an encrypted record that makes the connection unreadable, and
  control frames (window updates, resets, pings) never wait behind a peer that does not read.
- What a peer may make us keep is bounded: the library only warns when a peer overruns its window,
  and reads a frame of 16 MiB on a stream whose window is 256 KiB.
- What had arrived when the other side closed the connection can still be read; closing takes no
  fixed 0.1 s.
"""

import contextlib
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    GO_AWAY_NORMAL,
    HEADER_SIZE,
    TYPE_GO_AWAY,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

KiB = 1024
MiB = 1024 * 1024

QUEUED_DATA_FRAMES_MAX = 8
"""Of 64 KiB each: enough that the writer never starves, little to lose when a connection ends."""

QUEUED_FRAMES_MAX = 4_096
"""Control frames waiting for a peer that reads nothing; more than that and it is a flood."""

UNREAD_BYTES_MAX = 64 * MiB
"""Of one connection, over all its streams. A stream's window ends at 16 MiB, and the transfer
protocol keeps few streams open; whoever exceeds this ignores its windows.
"""

STRANGER_UNREAD_BYTES_MAX = 64 * KiB
"""Of a peer that is not admitted: it has a ticket or a credential to show, a few KiB. A hundred
strangers at once then cost 8 MiB.
"""

FLUSH_TIMEOUT_S = 0.2
"""For frames queued when a connection is closed from here, e.g. the reason of a refusal."""


class BoundedYamux(Yamux):
    """One connection's streams."""

    def __init__(
        self,
        secured_conn: ISecureConn,
        peer_id: ID,
        is_initiator: bool | None = None,
        on_close: Callable[[], Awaitable[Any]] | None = None,
        *,
        is_admitted: Callable[[ID], bool] = lambda peer_id: False,
    ) -> None:
        """is_admitted: asked for each frame with data, how much the peer may make us keep."""
        super().__init__(secured_conn, peer_id, is_initiator, on_close)
        self._is_admitted = is_admitted
        self._queue, self._to_write = trio.open_memory_channel[bytes](QUEUED_FRAMES_MAX)
        self._queued = 0
        self._queued_data = 0
        self._room = trio.lowlevel.ParkingLot()
        self._drained = trio.Event()

    # -- writing

    async def _write_frame(self, data: bytes) -> None:
        """Queue a frame; only one with data waits for room."""
        is_data = len(data) > HEADER_SIZE
        while is_data and self._queued_data >= QUEUED_DATA_FRAMES_MAX and not self.is_ending:
            await self._room.park()
        if self.is_ending:
            raise ConnectionClosedError("the connection is closed", transport="yamux")
        try:
            self._queue.send_nowait(data)
        except trio.WouldBlock:
            self._give_up()
            raise ConnectionClosedError("the peer reads nothing", transport="yamux") from None
        self._queued += 1
        self._queued_data += is_data
        await trio.lowlevel.checkpoint()

    async def _write_queued(self) -> None:
        try:
            async for frame in self._to_write:
                await self.secured_conn.write(frame)
                self._queued -= 1
                self._queued_data -= len(frame) > HEADER_SIZE
                self._room.unpark_all()
                if not self._queued:
                    self._drained.set()
        except Exception:  # noqa: BLE001 - sockets, ciphers and WebSocket each raise their own
            self._give_up()
        finally:
            self.event_shutting_down.set()
            self._room.unpark_all()

    def _give_up(self) -> None:
        """Make the reading task find the connection closed; it cleans up."""
        self.event_shutting_down.set()
        self._room.unpark_all()
        if self._nursery is not None:
            self._nursery.start_soon(self._close_socket)

    async def _close_socket(self) -> None:
        # 0.5 s: a WebSocket says goodbye first.
        scope = trio.CancelScope(shield=True, deadline=trio.current_time() + 0.5)
        with scope, contextlib.suppress(Exception):  # it is being thrown away
            await self.secured_conn.close()

    # -- life

    @property
    def is_ending(self) -> bool:
        """Whether nothing more can be sent."""
        return self.event_shutting_down.is_set()

    async def _handle_incoming_with_ready_signal(
        self, task_status: Any = trio.TASK_STATUS_IGNORED
    ) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._write_queued)
        await super()._handle_incoming_with_ready_signal(task_status)

    async def _cleanup_on_error(self) -> None:
        """The other side is gone: keep what can still be read."""
        for stream_id, stream in self.streams.items():
            if not hasattr(stream, "ended"):
                keep_unread(stream, bytes(self.stream_buffers.get(stream_id, b"")))
        self._room.unpark_all()
        await super()._cleanup_on_error()

    async def close(self, error_code: int = GO_AWAY_NORMAL) -> None:
        """End the connection from this side; its streams are dead at once."""
        if not self.is_ending:
            await self._say_goodbye(error_code)
        self.event_shutting_down.set()
        self._room.unpark_all()
        self.new_stream_send_channel.close()
        for stream_id, stream in list(self.streams.items()):
            stream.closed = stream.send_closed = stream.recv_closed = True
            if stream_id in self.stream_events:
                self.stream_events[stream_id].set()
        self.streams.clear()
        self.stream_buffers.clear()
        self.stream_events.clear()
        await self._close_socket()
        self.event_closed.set()
        if self.on_close is not None:
            await self.on_close()

    async def _say_goodbye(self, error_code: int) -> None:
        header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_GO_AWAY, 0, 0, error_code)
        with trio.move_on_after(FLUSH_TIMEOUT_S):
            try:
                self._drained = trio.Event()
                await self._write_frame(header)
                await self._drained.wait()
            except ConnectionClosedError:
                pass

    # -- reading

    async def _read_data_body(self, length: int) -> bytes:
        unread = sum(map(len, self.stream_buffers.values()))
        admitted = self._is_admitted(self.peer_id)
        room = (UNREAD_BYTES_MAX if admitted else STRANGER_UNREAD_BYTES_MAX) - unread
        if length > min(room, self._widest_window()):
            # The one error that makes the reading loop close the connection; any other is logged
            # there, and the loop goes on in the middle of the frame.
            raise trio.TooSlowError
        return await super()._read_data_body(length)

    def _widest_window(self) -> int:
        """The most that one frame may have: the library does not say here of which stream it is.

        A new stream's window at least: frames may be under way for streams that we have ended.
        """
        windows = (stream.recv_window for stream in self.streams.values())
        return max(DEFAULT_WINDOW_SIZE, *windows) if self.streams else DEFAULT_WINDOW_SIZE


def keep_unread(stream: YamuxStream, data: bytes) -> None:
    """Put what had arrived where `take_unread` finds it after the connection's end."""
    stream.unread = data  # type: ignore[attr-defined]  # a note on the library's object
    stream.ended = stream.recv_closed  # type: ignore[attr-defined]  # as above


def take_unread(stream: YamuxStream) -> bytes:
    """What had arrived when the connection ended; once."""
    data: bytes = stream.__dict__.pop("unread", b"")
    return data


def had_ended(stream: YamuxStream) -> bool:
    """Whether the other side had ended the stream before the connection did."""
    return bool(stream.__dict__.get("ended", False))


class BoundedMuxer(MuxerMultistream):
    """Negotiates yamux and makes `BoundedYamux` of it; the library would make its own class."""

    is_admitted: Callable[[ID], bool] = staticmethod(lambda peer_id: False)
    """The host's, once there is one."""

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """See MuxerMultistream."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        yamux = BoundedYamux(
            conn, peer_id, is_initiator=conn.is_initiator, is_admitted=self.is_admitted
        )
        return self._annotate_connection(yamux, conn, protocol)

"""Yamux as py-libp2p has it, with the bounds and the write order that we rely on.

What differs from the library's `Yamux` (docs/py-libp2p.md, "Yamux"):

- One task writes; everybody else queues whole frames. So a send that is cancelled leaves either a
  whole frame or none, never half an encrypted record that makes the connection unreadable, and
  control frames (window updates, resets, pings) never wait behind a peer that does not read.
- What a peer may make us keep is bounded: the library only warns when a peer overruns its window,
  and reads a frame of 16 MiB on a stream whose window is 256 KiB.
- What had arrived when the other side closed the connection can still be read; closing takes no
  fixed 0.1 s.
- A small message costs less than half: the socket is read ahead, frames that wait leave together,
  a window is opened again when half of it is used up instead of after every read, and data that
  comes or goes takes none of the library's locks, each of which is a turn of the scheduler.
"""

import contextlib
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import IMuxedConn, ISecureConn
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.peer.id import ID
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import (
    DEFAULT_WINDOW_SIZE,
    GO_AWAY_NORMAL,
    HEADER_SIZE,
    TYPE_DATA,
    TYPE_GO_AWAY,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

KiB = 1024
MiB = 1024 * 1024

FRAME_DATA_BYTES_MAX = MAX_PLAINTEXT_LENGTH - HEADER_SIZE
"""Of a frame: the library's own 64 KiB take two of Noise's messages, the second with 17 bytes."""

READ_AHEAD_BYTES = 64 * KiB
"""From the socket at once, for each connection: one of Noise's messages at their longest. The
library asks the socket twice for each, however short it is.
"""

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
        if len(data) > HEADER_SIZE:
            await self._wait_for_room()
        self._put(data)
        await trio.lowlevel.checkpoint()

    async def send_data(self, stream: YamuxStream, data: memoryview) -> int:
        """Queue as much as fits a frame and the stream's window, in which there must be room; gives
        how many bytes that was. Cancelled while it waits it has taken none.
        """
        await self._wait_for_room()
        count: int = min(len(data), stream.send_window, FRAME_DATA_BYTES_MAX)
        if count > 0:
            header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.stream_id, count)
            self._put(b"".join((header, data[:count])))
            stream.send_window -= count
        return max(count, 0)

    async def _wait_for_room(self) -> None:
        while self._queued_data >= QUEUED_DATA_FRAMES_MAX and not self.is_ending:
            await self._room.park()

    def _put(self, frame: bytes) -> None:
        if self.is_ending:
            raise ConnectionClosedError("the connection is closed", transport="yamux")
        try:
            self._queue.send_nowait(frame)
        except trio.WouldBlock:
            self._give_up()
            raise ConnectionClosedError("the peer reads nothing", transport="yamux") from None
        self._queued += 1
        self._queued_data += len(frame) > HEADER_SIZE

    async def _write_queued(self) -> None:
        kept: bytes | None = None
        try:
            while True:
                frames = [await self._to_write.receive() if kept is None else kept]
                kept = self._take_queued(frames)
                await self.secured_conn.write(b"".join(frames) if len(frames) > 1 else frames[0])
                self._queued -= len(frames)
                self._queued_data -= sum(len(frame) > HEADER_SIZE for frame in frames)
                self._room.unpark_all()
                if not self._queued:
                    self._drained.set()
        except Exception:  # noqa: BLE001 - sockets, ciphers and WebSocket each raise their own
            self._give_up()
        finally:
            self.event_shutting_down.set()
            self._room.unpark_all()

    def _take_queued(self, frames: list[bytes]) -> bytes | None:
        """Add what waits and fits one of Noise's messages; gives a frame that was taken and did not
        fit.
        """
        size = len(frames[0])
        with contextlib.suppress(trio.WouldBlock):
            while size < MAX_PLAINTEXT_LENGTH:
                frame = self._to_write.receive_nowait()
                size += len(frame)
                if size > MAX_PLAINTEXT_LENGTH:
                    return frame
                frames.append(frame)
        return None

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

    async def take_unread(self, stream: YamuxStream) -> bytes:
        """All that has arrived of a stream, at once; opens its window again if half is used up."""
        buffer = self.stream_buffers[stream.stream_id]
        data = bytes(buffer)
        buffer.clear()
        used_up = stream.target_recv_window - stream.recv_window
        # Neither waits for the peer: frames are queued, not written. So no data is lost with it.
        if stream.closed:
            with trio.CancelScope(shield=True):
                await self._finalize_stream(stream, fully_closed=True)
        elif used_up >= stream.target_recv_window // 2:
            with trio.CancelScope(shield=True):
                await stream._auto_tune_and_send_window_update()
        return data

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


class _ReadAhead:
    """What is below Noise, read as much at once as there is."""

    def __init__(self, conn: Any) -> None:
        self._conn = conn
        self._data = b""
        self._at = 0

    async def read(self, n: int | None = None) -> bytes:
        if self._at == len(self._data):
            self._data, self._at = await self._conn.read(READ_AHEAD_BYTES), 0
        end = len(self._data) if n is None else self._at + n
        part = self._data[self._at : end]
        self._at += len(part)
        return part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)


class _NoLock:
    """In the place of a lock that nobody contends for."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_error: object) -> None:
        pass


def make_quick(conn: ISecureConn) -> None:
    """Have a connection whose handshake is done read ahead. From here on one task reads and one
    writes, so the locks around its socket only cost turns of the scheduler.
    """
    if not isinstance(conn, SecureSession):
        return
    packets = conn.conn.read_writer  # type: ignore[attr-defined]  # Noise's
    below = packets.read_write_closer
    packets.read_write_closer = _ReadAhead(below)
    socket = getattr(getattr(below, "_conn", below), "stream", None)  # _conn: with a swarm key
    if isinstance(socket, TrioTCPStream):
        vars(socket).update(read_lock=_NoLock(), write_lock=_NoLock())


def keep_unread(stream: YamuxStream, data: bytes) -> None:
    """Put what had arrived where `take_last_unread` finds it after the connection's end."""
    stream.unread = data  # type: ignore[attr-defined]  # a note on the library's object
    stream.ended = stream.recv_closed  # type: ignore[attr-defined]  # as above


def take_last_unread(stream: YamuxStream) -> bytes:
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
        make_quick(conn)
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        yamux = BoundedYamux(
            conn, peer_id, is_initiator=conn.is_initiator, is_admitted=self.is_admitted
        )
        return self._annotate_connection(yamux, conn, protocol)

"""RequestClient: the other end of `/api/ws`; docs/protocols/websocket.md.

One connection, many requests, each with its own flow control: an answer that is not read stops its
own engine after a few deltas, and nobody else's. Leaving a request's block early cancels it.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import trio
from trio_websocket import (
    ConnectionClosed,
    HandshakeError,
    WebSocketConnection,
    connect_websocket_url,
)

from ollamamax_p2p.api.told_errors import error_of_status
from ollamamax_p2p.errors import BadInput, LocalTrouble, OmxError

CREDITS = 64
"""Deltas that a request may send before we have taken any; given back by halves."""

WAITING_MAX = CREDITS + 16
"""Frames of one request that wait to be read: its deltas, and the few that cost no credit."""

FRAME_BYTES_MAX = 16 * 1024 * 1024
"""What the node takes at once (`websocket_requests.FRAME_BYTES_MAX`)."""

ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""Of one frame of the node: the vectors of a thousand texts."""

CONNECT_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 1.0
"""For a cancel and the closing handshake; a node that is frozen does not hold its client."""

Kind = Literal["chat", "generate", "embed", "pull", "events"]


class AnswerFrame(msgspec.Struct, frozen=True, kw_only=True):
    """What the node says of one request. Which fields mean something depends on `type`."""

    type: str
    """queue, start, moved, delta; the last is done."""
    id: str = ""
    line: dict[str, Any] = {}
    """Of delta and done: the object that Ollama's HTTP API would stream."""
    node: str = ""
    """Of start and moved: who answers from here on."""
    backend: str = ""
    queued_ms: int = 0
    position: int = 0
    """Of queue: 1 is the next."""
    eta_s: float | None = None
    status: int = 0
    """Of error, which is raised and never given: HTTP's."""
    error: str = ""


@asynccontextmanager
async def open_request_client(address: str) -> AsyncIterator["RequestClient"]:
    """Be connected to the node at host:port for as long as the block is open.

    Raises OSError if nobody listens there, trio.TooSlowError if nobody answers,
    trio_websocket.HandshakeError if it is no node.
    """
    trouble: BaseException | None = None  # raised at the end: within, it would come in a group
    try:
        async with trio.open_nursery() as nursery:
            try:
                socket = await _connected(nursery, address)
            except (OSError, trio.TooSlowError) as error:
                trouble = error
            else:
                client = RequestClient(socket, address)
                nursery.start_soon(client._receive)
                try:
                    yield client
                finally:
                    with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
                        scope.shield = True
                        await socket.aclose()
            nursery.cancel_scope.cancel()
    except* HandshakeError as refusal:  # comes from the reader, in the nursery
        trouble = refusal.exceptions[0]
    if trouble is not None:
        raise trouble


async def _connected(nursery: trio.Nursery, address: str) -> WebSocketConnection:
    with trio.fail_after(CONNECT_TIMEOUT_S):
        return await connect_websocket_url(
            nursery,
            f"ws://{address}/api/ws",
            max_message_size=ANSWER_BYTES_MAX,
            message_queue_size=16,
            receive_buffer_size=64 * 1024,
        )


class RequestClient:
    """Made by `LocalClient.connect`; its methods may be called from any task."""

    def __init__(self, socket: WebSocketConnection, where: str) -> None:
        self._socket = socket
        self._where = where
        self._asked: dict[str, _Asked] = {}
        self._count = 0
        self._gone: OmxError | None = None

    @asynccontextmanager
    async def ask(self, kind: Kind, body: Mapping[str, Any]) -> AsyncIterator["Frames"]:
        """Send a request; iterate over what is answered, up to the frame `done`.

        body: that of Ollama's endpoint of the same name, and `omx` with what HTTP has in headers.
        Raises what the node says was wrong, from the iterator; BadInput for a body too long.
        """
        self._count += 1
        asked = _Asked(str(self._count))
        raw = msgspec.json.encode({**body, "type": kind, "id": asked.id, "credits": CREDITS})
        if len(raw) > FRAME_BYTES_MAX:
            raise BadInput(
                f"a request of {len(raw):,} bytes, pictures included; the limit is "
                f"{FRAME_BYTES_MAX:,}"
            )
        self._asked[asked.id] = asked
        try:
            await self._send(raw)
            yield Frames(self, asked)
        finally:
            del self._asked[asked.id]
            if not asked.is_over:
                with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
                    scope.shield = True
                    await self._say_cancel(asked.id)

    async def _say_cancel(self, request_id: str) -> None:
        try:
            await self._send(msgspec.json.encode({"type": "cancel", "id": request_id}))
        except OmxError:
            return  # the connection has ended, and with it everything that was asked on it

    async def _send(self, raw: bytes) -> None:
        if self._gone is not None:
            raise self._gone
        try:
            await self._socket.send_message(raw.decode())
        except ConnectionClosed:
            raise self._broken_off() from None

    def _broken_off(self) -> OmxError:
        return LocalTrouble(
            f"the node at {self._where} ended, or closed the connection, in the middle of an "
            "answer; ask again"
        )

    async def _receive(self) -> None:
        try:
            while True:
                self._take(await self._socket.get_message())
        except ConnectionClosed:
            self._gone = self._broken_off()
        except OmxError as error:
            self._gone = error
        for asked in self._asked.values():
            asked.sender.close()

    def _take(self, raw: str | bytes) -> None:
        try:
            frame = msgspec.json.decode(raw, type=AnswerFrame)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise LocalTrouble(
                f"the node at {self._where} answers in a way this omx does not know ({error}); "
                "restart it with this version"
            ) from None
        asked = self._asked.get(frame.id)
        if asked is None:
            return  # of a request that was left, and has not heard of it yet
        try:
            asked.sender.send_nowait(frame)
        except trio.WouldBlock:
            if frame.type != "queue":  # a newer place comes; nothing else may be left out
                raise LocalTrouble(
                    f"the node at {self._where} sends more than it may; restart it"
                ) from None


@dataclass
class _Asked:
    """One request under way."""

    id: str
    is_over: bool = False
    taken: int = 0
    """Deltas whose credits are not given back yet."""
    sender: trio.MemorySendChannel[AnswerFrame] = field(init=False)
    frames: trio.MemoryReceiveChannel[AnswerFrame] = field(init=False)

    def __post_init__(self) -> None:
        self.sender, self.frames = trio.open_memory_channel(WAITING_MAX)


class Frames:
    """What is answered to one request, in order."""

    def __init__(self, client: RequestClient, asked: _Asked) -> None:
        self._client = client
        self._asked = asked

    def __aiter__(self) -> "Frames":
        return self

    async def __anext__(self) -> AnswerFrame:
        asked = self._asked
        if asked.is_over:
            raise StopAsyncIteration
        try:
            frame = await asked.frames.receive()
        except trio.EndOfChannel:
            asked.is_over = True
            raise self._client._gone or self._client._broken_off() from None
        if frame.type in ("done", "error"):
            asked.is_over = True
        if frame.type == "error":
            raise error_of_status(frame.status, frame.error)
        if frame.type == "delta":
            await self._give_back()
        return frame

    async def _give_back(self) -> None:
        self._asked.taken += 1
        if self._asked.taken >= CREDITS // 2:
            said = {"type": "credit", "id": self._asked.id, "credits": self._asked.taken}
            self._asked.taken = 0
            await self._client._send(msgspec.json.encode(said))

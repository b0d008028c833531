"""Framed, typed messages on one byte stream."""

from typing import Generic, TypeVar

import trio

from ollamamax_p2p.errors import FrameTooLarge, MalformedMessage, PeerGone
from ollamamax_p2p.host.peer_host import ByteStream
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.wire import Codec, FrameDecoder, encode_frame

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class MessageStream(Generic[Sent, Received]):
    """One protocol's messages, each way its own union. Any task may send; one at a time may
    receive.
    """

    def __init__(
        self, stream: ByteStream, *, sends: Codec[Sent], receives: Codec[Received]
    ) -> None:
        """sends, receives: the codecs of the two directions; their max_bytes bound the frames."""
        self._stream = stream
        self._sends = sends
        self._receives = receives
        self._decoder = FrameDecoder(max_bytes=receives.max_bytes)
        self._frames: list[bytes] = []
        self._sending = trio.Lock()

    @property
    def peer(self) -> PeerId:
        """Who is at the other end."""
        return self._stream.peer

    async def send(self, *messages: Sent) -> None:
        """In one write. Waits while the other side does not read. Raises PeerGone."""
        sends = self._sends
        frame = b"".join(
            encode_frame(sends.encode(message), max_bytes=sends.max_bytes) for message in messages
        )
        async with self._sending:
            # A frame cut in two would garble every later one, so a cancelled send ends the stream.
            whole = False
            try:
                await self._stream.send_all(frame)
                whole = True
            finally:
                if not whole:
                    with trio.CancelScope(shield=True):
                        await self._stream.aclose()

    async def receive(self) -> Received | None:
        """The next message; None once the other side has ended in good order.

        Raises PeerGone, or MalformedMessage and FrameTooLarge that name the peer.
        """
        try:
            while not self._frames:
                data = await self._stream.receive_some()
                if not data:
                    if self._decoder.midway:
                        raise PeerGone(self.peer, "the stream ended in the middle of a message")
                    return None
                self._frames = list(self._decoder.feed(data))[::-1]
            return self._receives.decode(self._frames.pop())
        except (MalformedMessage, FrameTooLarge) as error:
            raise type(error)(self.peer, error.problem) from None

    async def send_eof(self) -> None:
        """Say that nothing more will be sent. Raises PeerGone."""
        async with self._sending:
            await self._stream.send_eof()

    async def aclose(self) -> None:
        """End both ways at once; never raises."""
        await self._stream.aclose()

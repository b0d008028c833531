"""Frames on a byte stream: four bytes of length, big-endian, then that many bytes.

Sans-IO. The length is checked against the limit before anything is kept, so a peer can make us hold
at most one frame of `max_bytes` and what a single read brought.
"""

from collections.abc import Iterator

from ollamamax_p2p.errors import FrameTooLarge

HEADER_BYTES = 4


def encode_frame(payload: bytes, *, max_bytes: int) -> bytes:
    """The payload with its length before it. Raises ValueError if it is longer than max_bytes."""
    if len(payload) > max_bytes:
        raise ValueError(f"a frame of {len(payload)} bytes is over the limit of {max_bytes}")
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


class FrameDecoder:
    """Turns whatever arrives into whole frames."""

    def __init__(self, *, max_bytes: int) -> None:
        """max_bytes: the longest payload that is accepted."""
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what arrived; give each frame that is now whole, in order.

        Iterate to the end before feeding again. Raises FrameTooLarge as soon as a length says so.
        """
        self._buffer += data
        start = 0
        try:
            while True:
                end = self._frame_end(start)
                if end is None:
                    return
                yield bytes(memoryview(self._buffer)[start + HEADER_BYTES : end])
                start = end
        finally:
            del self._buffer[:start]

    def _frame_end(self, start: int) -> int | None:
        """Where the frame at start ends, or None while it is not whole."""
        if len(self._buffer) - start < HEADER_BYTES:
            return None
        length = int.from_bytes(self._buffer[start : start + HEADER_BYTES], "big")
        if length > self._max_bytes:
            raise FrameTooLarge(
                "", f"it sent a frame of {length} bytes, the limit is {self._max_bytes}"
            )
        end = start + HEADER_BYTES + length
        return end if len(self._buffer) >= end else None

    @property
    def midway(self) -> bool:
        """True while part of a frame is waiting for the rest: an end of stream now is a loss."""
        return bool(self._buffer)

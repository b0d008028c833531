"""Lines of a stream, and the events of a server-sent event stream in them; sans-IO."""


class LineTooLong(Exception):
    """A line does not end within its bound."""


class LineSplitter:
    """Turns whatever arrives into lines, without `\\n` or `\\r\\n`."""

    def __init__(self, *, max_bytes: int) -> None:
        """max_bytes: the longest line that is accepted."""
        self._max_bytes = max_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, in order. Raises LineTooLong."""
        *whole, rest = data.split(b"\n")
        if whole and self._rest:
            whole[0] = bytes(self._rest) + whole[0]
            self._rest.clear()
        self._rest += rest
        if len(self._rest) > self._max_bytes or any(len(line) > self._max_bytes for line in whole):
            raise LineTooLong
        return [line.removesuffix(b"\r") for line in whole]

    def end(self) -> list[bytes]:
        """What is left when the stream ended."""
        rest = bytes(self._rest)
        self._rest.clear()
        return [rest] if rest else []


def event_data(line: bytes) -> bytes | None:
    """The data that a line of an event stream carries; None for every other line.

    An event of several data lines is none of ours: each of the servers here writes its JSON on one.
    """
    if not line.startswith(b"data:"):
        return None
    return line[5:].removeprefix(b" ")

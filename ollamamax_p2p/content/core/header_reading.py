"""Read a header from the start of a large file, bounded by what the file really holds."""

from collections.abc import Callable
from typing import TypeAlias

from ollamamax_p2p.errors import BadModelFile

ReadAt: TypeAlias = Callable[[int, int], bytes]
"""(offset, length) -> exactly those bytes; asked for within the file's size only."""

_WINDOW_BYTES = 1024 * 1024
"""Read ahead by so much: a header is walked in steps of a few bytes."""


class Cursor:
    """A position in a file that never passes its end."""

    def __init__(self, read_at: ReadAt, size: int, where: str, limit: int) -> None:
        """where: for errors; limit: how long the header may be."""
        self.at = 0
        self.where = where
        self._read_at, self._size, self._limit = read_at, size, limit
        self._window, self._window_start = b"", 0

    def take(self, count: int) -> bytes:
        """The next bytes. Raises BadModelFile if the file has fewer."""
        self._check(count)
        begin = self.at - self._window_start
        if begin + count > len(self._window):
            length = min(max(count, _WINDOW_BYTES), self._size - self.at)
            self._window, self._window_start = self._read_at(self.at, length), self.at
            begin = 0
        self.at += count
        return self._window[begin : begin + count]

    def skip(self, count: int) -> None:
        """Pass over bytes without reading them."""
        self._check(count)
        self.at += count
        # A window behind us is of no use, and a position before it would be worse than none.
        if self.at > self._window_start + len(self._window):
            self._window, self._window_start = b"", self.at

    def expect(self, count: int, each: int, what: str) -> int:
        """A count that the file gives, if so many things of at least `each` bytes can follow."""
        if count * each > self._size - self.at:
            raise self.bad(f"{count} {what} do not fit into the {self._size - self.at} bytes left")
        return count

    def bad(self, problem: str) -> BadModelFile:
        """An error that says where."""
        return BadModelFile(f"{self.where}, byte {self.at}", problem)

    def _check(self, count: int) -> None:
        if count > self._size - self.at:
            raise self.bad(f"the file ends: {count} bytes wanted, {self._size - self.at} left")
        if self.at + count > self._limit:
            raise self.bad(f"the header is longer than {self._limit} bytes")

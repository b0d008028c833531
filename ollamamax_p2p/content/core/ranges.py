"""Which bytes of something are there: a set of half-open ranges [start, end)."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """Disjoint, in order, never touching: ranges that meet become one.

    Kept as two sorted lists, so that adding to a blob of many thousand parts stays quick.
    """

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        """Put a range in; nothing happens if it is empty."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def remove(self, start: int, end: int) -> None:
        """Take a range out, splitting what it cuts through."""
        if start >= end:
            return
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last:
            return
        left, right = (self._starts[first], start), (end, self._ends[last - 1])
        kept = [piece for piece in (left, right) if piece[0] < piece[1]]
        self._starts[first:last] = [piece[0] for piece in kept]
        self._ends[first:last] = [piece[1] for piece in kept]

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte of the range is in; an empty one is."""
        if start >= end:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and self._ends[at] >= end

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """What of [0, size) is not in."""
        starts, ends = [0, *self._ends], [*self._starts, size]
        return [(a, min(b, size)) for a, b in zip(starts, ends, strict=True) if a < min(b, size)]

    @property
    def total(self) -> int:
        """How many bytes are in."""
        return sum(self._ends) - sum(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it changes, so it must not be a key

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

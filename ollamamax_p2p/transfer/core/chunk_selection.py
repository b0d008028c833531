"""Which of the chunks that nobody has been asked for comes next: the rarest, at random among
equals.

The chunks are kept in buckets by how many partial holders have them. Complete holders have them
all, so they change no order and are not counted: what only they have is in bucket 0, and goes
first.
"""

import random
from collections.abc import Callable, Iterable, Iterator

PROBES = 8
"""Random tries in a bucket before it is searched from end to end. With many chunks in a bucket one
of the first hits; with few the search is short.
"""


class _Bucket:
    """A set that can be drawn from in constant time, in an order that the seed decides."""

    def __init__(self) -> None:
        self.chunks: list[int] = []
        self._places: dict[int, int] = {}

    def add(self, chunk: int) -> None:
        self._places[chunk] = len(self.chunks)
        self.chunks.append(chunk)

    def remove(self, chunk: int) -> None:
        place = self._places.pop(chunk)
        last = self.chunks.pop()
        if last != chunk:
            self.chunks[place] = last
            self._places[last] = place

    def draw(self, fits: Callable[[int], bool], rng: random.Random) -> int | None:
        """One of the chunks that fit, or None."""
        for _ in range(min(PROBES, len(self.chunks))):
            chunk = self.chunks[rng.randrange(len(self.chunks))]
            if fits(chunk):
                return chunk
        start = rng.randrange(len(self.chunks))
        for at in range(len(self.chunks)):
            chunk = self.chunks[(start + at) % len(self.chunks)]
            if fits(chunk):
                return chunk
        return None


class UnaskedChunks:
    """The wanted chunks that no source is asked for now, and how rare each chunk is."""

    def __init__(self, chunks: Iterable[int], *, rng: random.Random) -> None:
        """chunks: those wanted; rng: breaks ties."""
        self._rng = rng
        self._holders: dict[int, int] = {}
        self._buckets: dict[int, _Bucket] = {}
        self._unasked: set[int] = set()
        for chunk in chunks:
            self.add(chunk)

    def __len__(self) -> int:
        return len(self._unasked)

    def __iter__(self) -> Iterator[int]:
        return iter(self._unasked)

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._unasked

    def holders(self, chunk: int) -> int:
        """How many partial holders have it."""
        return self._holders.get(chunk, 0)

    def add(self, chunk: int) -> None:
        """It is to be asked for (again)."""
        self._unasked.add(chunk)
        self._bucket(self.holders(chunk)).add(chunk)

    def remove(self, chunk: int) -> None:
        """It has been asked for."""
        self._unasked.remove(chunk)
        self._take_out(chunk)

    def seen(self, chunk: int, change: int) -> None:
        """One partial holder more (+1) or fewer (-1) has it."""
        if chunk in self._unasked:
            self._take_out(chunk)
        self._holders[chunk] = self.holders(chunk) + change
        if chunk in self._unasked:
            self._bucket(self.holders(chunk)).add(chunk)

    def rarest(self, fits: Callable[[int], bool]) -> int | None:
        """One of the rarest that fit."""
        for count in sorted(self._buckets):
            chunk = self._buckets[count].draw(fits, self._rng)
            if chunk is not None:
                return chunk
        return None

    def any(self, fits: Callable[[int], bool]) -> int | None:
        """Any that fits, however rare: for the first few, so that there is soon something to give
        (a rare chunk comes from a busy source, and slowly).
        """
        counts = sorted(self._buckets)
        self._rng.shuffle(counts)
        for count in counts:
            chunk = self._buckets[count].draw(fits, self._rng)
            if chunk is not None:
                return chunk
        return None

    def _bucket(self, count: int) -> _Bucket:
        return self._buckets.setdefault(count, _Bucket())

    def _take_out(self, chunk: int) -> None:
        count = self.holders(chunk)
        self._buckets[count].remove(chunk)
        if not self._buckets[count].chunks:
            del self._buckets[count]

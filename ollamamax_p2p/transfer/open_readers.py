"""OpenReaders: a few open blobs, shared by everybody who reads from them.

A peer may open dozens of streams with a blob each. A file of its own for every one would let a
single member use up the descriptors of the whole node.
"""

from collections import OrderedDict
from dataclasses import dataclass

import trio

from ollamamax_p2p.content import BlobReader, BlobStore
from ollamamax_p2p.content.core.digest import Digest

READERS_MAX = 16
"""Open at once; more than a store reads at once (`ContentSettings.disk_threads`)."""

IDLE_S = 10.0
"""A blob that nobody has read for so long is closed: if it was removed, its room is only then free.
"""


@dataclass(slots=True, eq=False)
class _Open:
    reader: BlobReader
    users: int = 0
    used_at: float = 0.0


class OpenReaders:
    """The last blobs that were read. Close it when nobody reads any more."""

    def __init__(self, store: BlobStore, *, readers_max: int = READERS_MAX) -> None:
        self._store = store
        self._max = readers_max
        self._open: OrderedDict[Digest, _Open] = OrderedDict()
        self._opening = trio.Lock()
        # Each reading holds one blob, so there is always an idle one to close for another.
        self._places = trio.Semaphore(readers_max)

    async def read_at(self, digest: Digest, offset: int, length: int) -> bytes:
        """Exactly that range of a whole blob. Raises BlobNotFound, LocalTrouble; what went wrong
        once is opened anew the next time.
        """
        async with self._places:
            opened = await self._taken(digest)
            try:
                return await opened.reader.read_at(offset, length)
            except Exception:
                if self._open.get(digest) is opened:
                    del self._open[digest]
                raise
            finally:
                opened.users -= 1
                opened.used_at = trio.current_time()
                if self._open.get(digest) is not opened and not opened.users:
                    await _close(opened)

    async def close_idle(self, now: float) -> None:
        """Close what nobody has read for a while."""
        await self._close(
            [digest for digest, opened in self._open.items() if now - opened.used_at >= IDLE_S]
        )

    async def aclose(self) -> None:
        """Close everything that nobody reads at this moment."""
        await self._close(list(self._open))

    async def _taken(self, digest: Digest) -> _Open:
        async with self._opening:
            if digest not in self._open:
                await self._make_place()
                reader = await self._store.open(digest)
                self._open[digest] = _Open(reader, used_at=trio.current_time())
            self._open.move_to_end(digest)
            self._open[digest].users += 1
            return self._open[digest]

    async def _make_place(self) -> None:
        idle = [digest for digest, opened in self._open.items() if not opened.users]
        await self._close(idle[: max(0, len(self._open) - self._max + 1)])

    async def _close(self, digests: list[Digest]) -> None:
        unused = [digest for digest in digests if not self._open[digest].users]
        for opened in [self._open.pop(digest) for digest in unused]:
            await _close(opened)


async def _close(opened: _Open) -> None:
    with trio.CancelScope(shield=True):  # a file, which waits for nobody
        await opened.reader.__aexit__(None, None, None)

"""Work that several callers may want at once is done once, and they share what comes of it."""

import logging
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from ollamamax_p2p.errors import OmxError

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Work(Generic[Result]):
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    waiting: int = 0
    result: Result | None = None
    error: Exception | None = None
    finished: bool = False


class SharedWork(Generic[Key, Result]):
    """Runs one task per key in its owner's nursery, for as long as anybody waits for it.

    Whatever goes wrong in a task is its callers' to see and never reaches the nursery: much of what
    is worked on comes from strangers, and must not end all the rest.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._running: dict[Key, _Work[Result]] = {}

    async def run(self, key: Key, do: Callable[[], Awaitable[Result]]) -> Result:
        """What `do` gives, or the exception that it raises; joins the work if it runs already.

        A cancelled caller leaves at once. When the last one has left, the work is cancelled; the
        next caller waits for its end and begins anew.
        """
        while True:
            work = self._running.get(key)
            if work is None:
                work = self._running[key] = _Work()
                self._nursery.start_soon(self._do, key, work, do)
            if work.scope.cancel_called:
                await work.ended.wait()
                continue
            work.waiting += 1
            try:
                await work.ended.wait()
            finally:
                work.waiting -= 1
                if not work.waiting:
                    work.scope.cancel()
            if work.error is not None:
                raise work.error
            if work.finished:
                return work.result  # type: ignore[return-value] # finished says that it is there
            await trio.sleep_forever()  # its owner is closing, and will cancel this caller too

    async def _do(self, key: Key, work: _Work[Result], do: Callable[[], Awaitable[Result]]) -> None:
        try:
            with work.scope:
                work.result = await do()
                work.finished = True
        except Exception as error:  # noqa: BLE001 - see the class
            if not isinstance(error, OmxError):
                _log.error("an unexpected error in the work on %s", key, exc_info=error)
            work.error = error
        finally:
            del self._running[key]
            work.ended.set()

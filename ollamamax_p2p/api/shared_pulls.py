"""Pulls that several clients may watch: one pull per model, however many ask for it.

A pull belongs to its watchers. When the last one leaves (Ctrl-C in `omx pull`) it is cancelled, and
what was fetched stays for the next time. A second client that asks for the same model joins the
running pull and sees where it is.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from ollamamax_p2p.api.bodies import PullBody
from ollamamax_p2p.api.served_node import ServedNode
from ollamamax_p2p.content.core.model_name import parse_model_name
from ollamamax_p2p.errors import LocalTrouble
from ollamamax_p2p.transfer import PullProgress, PullReport, PushReport

WAITING_MAX = 256
"""States kept for one slow watcher. Those of one blob replace each other, so this is reached only
by a client that has stopped reading; it loses the oldest.
"""

Outcome = PullReport | PushReport | BaseException


class Watcher:
    """One client's view of a pull, or of other work: states as they come, then the outcome."""

    def __init__(self) -> None:
        self._waiting: list[PullProgress] = []
        self._outcome: Outcome | None = None
        self.is_over = False
        """Whether nothing more will come."""
        self._news = trio.Event()

    def offer(self, progress: PullProgress) -> None:
        """Keep a state. Only the newest of a blob matters, unless one carries a note."""
        if self._waiting and _replaces(self._waiting[-1], progress):
            self._waiting[-1] = progress
        else:
            self._waiting = [*self._waiting[-(WAITING_MAX - 1) :], progress]
        self._news.set()

    def finish(self, outcome: Outcome | None) -> None:
        """The work is over; None where there is nothing to say of how it went."""
        self._outcome, self.is_over = outcome, True
        self._news.set()

    async def next(self) -> tuple[list[PullProgress], Outcome | None]:
        """Wait for news: the states since the last time, and the outcome once there is one."""
        await self._news.wait()
        self._news = trio.Event()
        states, self._waiting = self._waiting, []
        if self.is_over:
            self._news.set()
        return states, self._outcome


@dataclass(eq=False)
class _Pull:
    """A running pull."""

    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    watchers: list[Watcher] = field(default_factory=list)
    last: PullProgress | None = None

    def tell(self, progress: PullProgress) -> None:
        self.last = progress
        for watcher in self.watchers:
            watcher.offer(progress)


class SharedPulls:
    """The pulls that clients of this node's API have asked for. Made by `open_shared_pulls`."""

    def __init__(self, node: ServedNode, nursery: trio.Nursery) -> None:
        self._node = node
        self._nursery = nursery
        self._running: dict[str, _Pull] = {}

    @asynccontextmanager
    async def watch(self, body: PullBody) -> AsyncIterator[Watcher]:
        """Begin a pull or join the one that runs; the block's end gives it up. Raises BadName."""
        key = parse_model_name(body.model).key
        while key in self._running and self._running[key].scope.cancel_called:
            await self._running[key].ended.wait()  # its files are open until then
        pull = self._running.get(key) or self._begin(key, body)
        watcher = Watcher()
        if pull.last:
            watcher.offer(pull.last)
        pull.watchers.append(watcher)
        try:
            yield watcher
        finally:
            pull.watchers.remove(watcher)
            if not pull.watchers:
                pull.scope.cancel()

    def _begin(self, key: str, body: PullBody) -> _Pull:
        pull = self._running[key] = _Pull()
        self._nursery.start_soon(self._run, key, pull, body)
        return pull

    async def _run(self, key: str, pull: _Pull, body: PullBody) -> None:
        outcome: Outcome = LocalTrouble("the node is stopping; run the same command to resume")
        try:
            with pull.scope:
                outcome = await self._node.pull(
                    body.model,
                    from_origin=body.from_origin,
                    insecure=body.insecure,
                    on_progress=pull.tell,
                )
        except Exception as error:  # noqa: BLE001 - one pull's failure is told to its watchers
            outcome = error
        finally:
            del self._running[key]
            pull.ended.set()
            for watcher in pull.watchers:
                watcher.finish(outcome)


@asynccontextmanager
async def open_shared_pulls(node: ServedNode) -> AsyncIterator[SharedPulls]:
    """Keep pulls for as long as the block is open; its end cancels those that still run."""
    async with trio.open_nursery() as nursery:
        yield SharedPulls(node, nursery)
        nursery.cancel_scope.cancel()


def _replaces(old: PullProgress, new: PullProgress) -> bool:
    return not old.note and (old.status, old.digest) == (new.status, new.digest)

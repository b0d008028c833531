"""Gossip: carries what `core.load_table` has to say to peers and hears what they say.

One stream per peer and direction, opened with the first message and kept. Messages to a peer that
does not read are dropped: the next round says it anew.
"""

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from ollamamax_p2p.errors import NetworkTrouble, OmxError, PeerGone, PeerMisbehaved
from ollamamax_p2p.host import ByteStream, MessageStream, PeerHost
from ollamamax_p2p.identity import PeerId
from ollamamax_p2p.router.core.load_table import GOSSIP, GossipMessage, LoadTable
from ollamamax_p2p.wire import protocol_ids

WAITING_MAX = 32
"""Messages to one peer. Pages of its digest and models, 1.5 MB at the most."""

HEARD_PER_S_MAX = 50.0
"""Messages of one peer that are listened to, of 48 KiB at most; an honest one sends a few."""

STREAMS_PER_PEER = 2
"""One, and one more while a lost one is being noticed."""

_log = logging.getLogger(__name__)


@asynccontextmanager
async def open_gossip(
    host: PeerHost,
    table: LoadTable,
    *,
    interval_s: float,
    linked: Callable[[], Sequence[PeerId]],
    look: Callable[[], Awaitable[None]],
    rng: random.Random,
) -> AsyncIterator["Gossip"]:
    """Tell and hear for as long as the block is open.

    linked: the members connected now; look: called before each round, tells the table what is so
    here.
    """
    async with trio.open_nursery() as nursery:
        gossip = Gossip(host, table, nursery)
        host.set_handler(protocol_ids.LOAD, gossip._hear)
        nursery.start_soon(gossip._run, interval_s, linked, look, rng)
        yield gossip
        nursery.cancel_scope.cancel()


class Gossip:
    """Made by `open_gossip`."""

    def __init__(self, host: PeerHost, table: LoadTable, nursery: trio.Nursery) -> None:
        self._host = host
        self._table = table
        self._nursery = nursery
        self._lines: dict[PeerId, trio.MemorySendChannel[GossipMessage]] = {}
        self._hearing: dict[PeerId, int] = {}
        self._met: set[PeerId] = set()

    async def _run(
        self,
        interval_s: float,
        linked: Callable[[], Sequence[PeerId]],
        look: Callable[[], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        while True:
            await look()
            now = trio.current_time()
            peers = list(linked())
            for peer in peers:
                if peer not in self._met:
                    self._say_all(peer, self._table.greet(now=now))
            self._met = set(peers)
            by_id = {str(peer): peer for peer in peers}
            for to, message in self._table.round(list(by_id), now=now, rng=rng):
                self._say_all(by_id[to], [message])
            # Not all nodes at once, though all were started by one script.
            await trio.sleep(interval_s * rng.uniform(0.8, 1.2))

    # -- saying

    def _say_all(self, peer: PeerId, messages: Sequence[GossipMessage]) -> None:
        for message in messages:
            try:
                self._line_to(peer).send_nowait(message)
            except (trio.WouldBlock, trio.BrokenResourceError):
                return

    def _line_to(self, peer: PeerId) -> trio.MemorySendChannel[GossipMessage]:
        line = self._lines.get(peer)
        if line is None:
            line, letters = trio.open_memory_channel[GossipMessage](WAITING_MAX)
            self._lines[peer] = line
            self._nursery.start_soon(self._keep_line, peer, line, letters)
        return line

    async def _keep_line(
        self,
        peer: PeerId,
        line: trio.MemorySendChannel[GossipMessage],
        letters: trio.MemoryReceiveChannel[GossipMessage],
    ) -> None:
        try:
            stream = await self._host.open_stream(peer, protocol_ids.LOAD)
            async with _closing(stream), letters:
                talk = MessageStream(stream, sends=GOSSIP, receives=GOSSIP)
                async for message in letters:
                    await talk.send(message)
        except NetworkTrouble as error:
            _log.info("no gossip to peer %s: %s", peer, error)
        finally:
            letters.close()
            if self._lines.get(peer) is line:
                del self._lines[peer]

    # -- hearing

    async def _hear(self, stream: ByteStream) -> None:
        peer = stream.peer
        if self._hearing.get(peer, 0) >= STREAMS_PER_PEER:
            _log.warning("peer %s opened too many %s streams", peer, protocol_ids.LOAD)
            return
        self._hearing[peer] = self._hearing.get(peer, 0) + 1
        try:
            talk = MessageStream(stream, sends=GOSSIP, receives=GOSSIP)
            while (message := await talk.receive()) is not None:
                answers = self._table.hear(str(peer), message, now=trio.current_time())
                self._say_all(peer, answers)
                await trio.sleep(1 / HEARD_PER_S_MAX)
        except PeerGone:
            pass
        except PeerMisbehaved as error:
            _log.warning("%s", error)
        except OmxError as error:
            _log.info("no more gossip of peer %s: %s", peer, error)
        finally:
            self._hearing[peer] -= 1
            if not self._hearing[peer]:
                del self._hearing[peer]


@asynccontextmanager
async def _closing(stream: ByteStream) -> AsyncIterator[None]:
    try:
        yield
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await stream.aclose()

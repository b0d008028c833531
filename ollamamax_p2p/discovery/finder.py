"""Runs every peer source, and dials what they find until the node has enough connections."""

import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from ollamamax_p2p.discovery.core.address_book import ADDRESSES_MAX, AddressBook
from ollamamax_p2p.discovery.neighbours import DIALS_AT_ONCE_MAX, Neighbours, linked_peers
from ollamamax_p2p.discovery.peer_source import PeerSource
from ollamamax_p2p.discovery.remembered_peers import (
    RememberedPeer,
    load_remembered,
    save_remembered,
)
from ollamamax_p2p.discovery.settings import DiscoverySettings
from ollamamax_p2p.errors import NetworkTrouble, NotAdmitted, PeerMisbehaved
from ollamamax_p2p.identity import Address, PeerId

TARGET_CONNECTIONS = 32
"""Dialled up to this many, inbound ones counted: a download uses no more sources, and each costs a
heartbeat every two seconds. Peers may connect beyond it.
"""

TURN_S = 1.0
"""How often is looked for lost connections and for peers whose pause is over."""

SAVE_INTERVAL_S = 5.0
"""Remembered peers are written as soon as a new one is reached (whoever is killed a moment after
joining must find its way back), but not more often than this.
"""

SETTLE_S_MIN, SETTLE_S_MAX = 2.0, 6.0
"""How long `settled` waits: for sources to bring their first finds (mDNS answers within a second),
and at most for peers that do not answer.
"""

TOLD_S = 1_800.0
"""How long what a member said of others is good for."""

_log = logging.getLogger(__name__)


class Finder:
    """The address book and what keeps it true."""

    def __init__(
        self,
        own: PeerId,
        neighbours: Neighbours,
        settings: DiscoverySettings,
        *,
        rng: random.Random,
        wall_clock: Callable[[], float],
    ) -> None:
        self._neighbours = neighbours
        self._settings = settings
        self._wall_clock = wall_clock
        self._book = AddressBook(own, target=TARGET_CONNECTIONS, rng=rng)
        self._dialling: set[PeerId] = set()
        self._learnt = trio.Event()
        self._met = trio.Event()
        self._opened_at = trio.current_time()

    async def settled(self) -> None:
        """Wait until a member is linked, or everybody known has been tried in vain. At once in a
        node that has run for some seconds; at most SETTLE_S_MAX.
        """
        while not linked_peers(self._neighbours):
            age_s = trio.current_time() - self._opened_at
            trying = self._dialling or age_s < SETTLE_S_MIN
            if not trying or age_s >= SETTLE_S_MAX:
                return
            await trio.sleep(SETTLE_S_MIN / 20)

    def learn(self, addresses: Sequence[Address]) -> None:
        """A member told these."""
        self._book.add(addresses, "told", expires=trio.current_time() + TOLD_S)
        self._learnt.set()

    def known_peers(self) -> tuple[PeerId, ...]:
        """Every peer that an address is known of, connected or not, best first."""
        return tuple(self._book.peers())

    async def follow(self, source: PeerSource) -> None:
        """Take what a source finds, for as long as it finds."""
        async for found in source.find_peers():
            self._book.add(found.addresses, found.source, expires=found.expires)
            self._learnt.set()

    async def keep_dialling(self) -> None:
        """Reach the best peers while there are too few connections."""
        async with trio.open_nursery() as nursery:
            while True:
                self._learnt = trio.Event()
                now = trio.current_time()
                linked = linked_peers(self._neighbours)
                for peer in linked:
                    self._book.reached(peer, now=now)
                if linked:
                    self._met.set()
                room = DIALS_AT_ONCE_MAX - len(self._dialling)
                for addresses in self._book.to_dial(
                    connected=linked, dialling=self._dialling, room=room, now=now
                ):
                    self._dialling.add(addresses[0].peer)
                    nursery.start_soon(self._dial, addresses)
                with trio.move_on_after(TURN_S):
                    await self._learnt.wait()

    async def _dial(self, addresses: tuple[Address, ...]) -> None:
        peer = addresses[0].peer
        try:
            await self._neighbours.reach(addresses)
            self._book.reached(peer, now=trio.current_time())
            self._met.set()
        except (NetworkTrouble, PeerMisbehaved) as error:
            _log.info("%s", error)
            hopeless = isinstance(error, NotAdmitted | PeerMisbehaved)
            self._book.failed(peer, hopeless=hopeless, now=trio.current_time())
        finally:
            self._dialling.discard(peer)
            self._learnt.set()

    # -- across restarts ---------------------------------------------------------------------

    async def recall(self, data_dir: Path, swarm: str) -> None:
        """Take the peers remembered from the last run."""
        load = partial(
            load_remembered,
            data_dir,
            swarm,
            peers_max=self._settings.remembered_peers_max,
            now=self._wall_clock(),
        )
        remembered = await trio.to_thread.run_sync(load)
        for addresses in remembered:
            self._book.add(addresses, "remembered", expires=math.inf)

    async def keep_remembering(self, data_dir: Path, swarm: str) -> None:
        """Write down who was reached, now and then and at the end."""
        saved: list[RememberedPeer] = []
        try:
            while True:
                self._met = trio.Event()
                await self._met.wait()
                saved = await self._save(data_dir, swarm, saved)
                await trio.sleep(SAVE_INTERVAL_S)
        finally:
            with trio.move_on_after(1, shield=True):  # an fsync on a slow disk; not worth more
                await self._save(data_dir, swarm, saved)

    async def _save(
        self, data_dir: Path, swarm: str, saved: list[RememberedPeer]
    ) -> list[RememberedPeer]:
        peers = self._to_remember()
        if not peers or [each.addresses for each in peers] == [each.addresses for each in saved]:
            return saved
        try:
            await trio.to_thread.run_sync(
                save_remembered, data_dir, swarm, peers, abandon_on_cancel=True
            )
        except OSError as error:
            _log.warning("could not remember peers in %s: %s", data_dir, error)
        return peers

    def _to_remember(self) -> list[RememberedPeer]:
        ago = trio.current_time() - self._wall_clock()
        return [
            RememberedPeer(
                [str(each) for each in self._book.addresses_of(peer)[:ADDRESSES_MAX]],
                round(reached_at - ago, 3),
            )
            for peer, reached_at in self._book.reached_peers()[
                : self._settings.remembered_peers_max
            ]
        ]


@asynccontextmanager
async def open_finder(
    own: PeerId,
    neighbours: Neighbours,
    sources: Sequence[PeerSource],
    settings: DiscoverySettings,
    *,
    data_dir: Path | None,
    swarm: str,
    rng: random.Random,
    wall_clock: Callable[[], float],
) -> AsyncIterator[Finder]:
    """Find and dial peers for as long as the block is open.

    data_dir: where peers are remembered; None remembers none, for simulations.
    swarm: which swarm they are of; those remembered of another are not used.
    """
    finder = Finder(own, neighbours, settings, rng=rng, wall_clock=wall_clock)
    async with trio.open_nursery() as nursery:
        if data_dir is not None:
            await finder.recall(data_dir, swarm)
            nursery.start_soon(finder.keep_remembering, data_dir, swarm)
        for source in sources:
            nursery.start_soon(finder.follow, source)
        nursery.start_soon(finder.keep_dialling)
        yield finder
        nursery.cancel_scope.cancel()

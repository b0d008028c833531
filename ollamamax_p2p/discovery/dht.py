"""Peers and holders of blobs through the swarm's own Kademlia (`/omx/kad/1.0.0`).

The lookups and the routing table are py-libp2p's KadDHT; when anything happens is decided here. Its
own service is not run: that would announce every blob at once (the other side refuses more than ten
announcements in ten seconds from one peer), and an error in it would end the node. What it does in
the background is done here instead, one step at a time, and a step that fails is logged and tried
again later.

Kademlia cannot withdraw: a peer that took our announcement keeps it until it expires. `withdraw`
stops renewing and forgets our own copy; who asks us for the blob meanwhile is told `not_held`.
"""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p.abc import IHost
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.kad_dht.provider_store import ProviderStore
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from ollamamax_p2p.content.core.digest import Digest, digest_of_hash, raw_hash
from ollamamax_p2p.discovery.core.provider_messages import HOLDERS_MAX
from ollamamax_p2p.discovery.core.provider_table import ProviderTable
from ollamamax_p2p.discovery.kademlia_host import KademliaHost, addresses_from, peer_of
from ollamamax_p2p.discovery.neighbours import Neighbours, linked_peers, reach_all
from ollamamax_p2p.discovery.peer_source import Found
from ollamamax_p2p.errors import BadPeerId
from ollamamax_p2p.host import PeerHost
from ollamamax_p2p.identity import Address, PeerId

ANNOUNCE_PACE_S = 1.1
"""Between two announcements: py-libp2p takes ten in ten seconds from one peer, then resets."""

ANNOUNCE_AGAIN_S = 1_800.0
"""At the earliest; 300 blobs then cost half a percent of a core. A node of 10,000 takes three hours
for a round at the pace above.
"""

RECORD_LIFETIME_S = 6 * 3_600.0
"""How long an announcement of another is kept: two rounds of a node of 10,000 blobs."""

REFRESH_S = 600.0
"""Between two refreshes of the routing table, as the specification has it."""

TURN_S = 1.0
"""How often newly connected members are put into the routing table."""

SEEN_AGAIN_S = 60.0
"""How often the table is told that those connected are still there; it gives them up after an hour.
"""

FIND_DEADLINE_S = 4.0
"""A lookup took 50 ms among thirty nodes; a hop that hangs must not hold up a download."""

REACH_DEADLINE_S = 5.0
"""For dialling the holders that were named."""

STEP_DEADLINE_S = 60.0
"""For one announcement or refresh; a dial inside may take ten seconds, and there are a few."""

_SHA2_256 = b"\x12\x20"  # multihash: sha2-256, 32 bytes

_NEVER_YET = float("-inf")

_log = logging.getLogger(__name__)


class KademliaRecords(ProviderStore):
    """Announcements of others, kept in our bounded table instead of the library's dictionary."""

    def __init__(self, host: Any, peer_routing: Any) -> None:
        super().__init__(host, peer_routing)
        self.table = ProviderTable()

    def add_provider(self, key: bytes, provider: PeerInfo) -> None:
        """Keep one, if it is about a sha256 and from an Ed25519 peer; called for a sender's own
        record only.
        """
        digest = _digest_of_key(key)
        try:
            peer = peer_of(provider.peer_id)
        except BadPeerId:
            return
        if digest is not None:
            self.table.tell(
                peer,
                [digest],
                [],
                addresses=addresses_from(peer, provider.addrs),
                lifetime_s=RECORD_LIFETIME_S,
                fresh=False,
                now=trio.current_time(),
            )

    def get_providers(self, key: bytes) -> list[PeerInfo]:
        """Those alive."""
        digest = _digest_of_key(key)
        if digest is None:
            return []
        holdings = self.table.holders(digest, connected=(), now=trio.current_time())
        return [
            PeerInfo(ID.from_base58(h.peer), [Multiaddr(a.transport) for a in h.addresses])
            for h in holdings[:HOLDERS_MAX]
        ]

    def cleanup_expired(self) -> None:
        """Drop the dead ones."""
        self.table.expire(trio.current_time())


class Dht:
    """This node in Kademlia: a ProviderDirectory, and a PeerSource too."""

    name = "dht"

    def __init__(self, host: PeerHost, neighbours: Neighbours, libp2p: IHost) -> None:
        self._peer_id = host.peer_id
        self._neighbours = neighbours
        self._facade = KademliaHost(host, neighbours, libp2p)
        # The library types its host as IHost; the facade has the few methods that it calls.
        facade: Any = self._facade
        self._kad = KadDHT(facade, DHTMode.SERVER)
        self._records = KademliaRecords(facade, self._kad.peer_routing)
        self._kad.provider_store = self._records
        self._due: dict[Digest, float] = {}  # when each is announced next
        self._refreshed = trio.Event()

    async def announce(self, digests: Sequence[Digest]) -> None:
        """This node holds these now; told at the pace that the others allow."""
        for digest in digests:
            self._due.setdefault(digest, _NEVER_YET)

    async def withdraw(self, digests: Sequence[Digest]) -> None:
        """Stop announcing these; the copies of others expire."""
        self._forget(digests)

    def _forget(self, digests: Sequence[Digest]) -> None:
        for digest in digests:
            self._due.pop(digest, None)
        self._records.table.tell(
            self._peer_id, [], digests, addresses=(), lifetime_s=0, fresh=False, now=0.0
        )

    async def find(self, digest: Digest) -> Sequence[PeerId]:
        """Members that are said to hold the blob, and could be reached."""
        named = await self._look_up(digest)
        with trio.move_on_after(REACH_DEADLINE_S):
            await reach_all(self._neighbours, list(named.values()))
        connected = set(linked_peers(self._neighbours))
        return [peer for peer in named if peer in connected]

    async def _look_up(self, digest: Digest) -> dict[PeerId, tuple[Address, ...]]:
        """Where those that are said to hold the blob can be dialled."""
        # A store of its own for each lookup: the library answers from its store, without asking
        # anybody, once it has found a holder, and would give others what it only heard.
        heard = ProviderStore(self._facade, self._kad.peer_routing)  # type: ignore[arg-type]  # as in __init__
        key = _key_of(digest)
        with trio.move_on_after(FIND_DEADLINE_S):
            try:
                await heard.find_providers(key, HOLDERS_MAX)
            except* Exception as errors:  # noqa: BLE001 - the library's own failure ends nothing
                _log.warning("Kademlia lookup failed: %r", errors.exceptions)
        found: dict[PeerId, tuple[Address, ...]] = {}
        for info in [*self._records.get_providers(key), *heard.get_providers(key)]:
            self._collect(info, found)
        return dict(list(found.items())[:HOLDERS_MAX])

    async def find_peers(self) -> AsyncIterator[Found]:
        """Peers in the routing table, after each refresh."""
        while True:
            for info in self._kad.routing_table.get_peer_infos():
                found: dict[PeerId, tuple[Address, ...]] = {}
                self._collect(info, found)
                for addresses in found.values():
                    yield Found(addresses, self.name, trio.current_time() + 2 * REFRESH_S)
            await self._refreshed.wait()

    @property
    def waiting(self) -> int:
        """How many blobs have not been announced once yet."""
        return sum(due == _NEVER_YET for due in self._due.values())

    @property
    def table_size(self) -> int:
        """How many peers are in the routing table."""
        return self._kad.get_routing_table_size()

    def _collect(self, info: PeerInfo, found: dict[PeerId, tuple[Address, ...]]) -> None:
        try:
            peer = peer_of(info.peer_id)
        except BadPeerId:
            return
        addresses = addresses_from(peer, info.addrs)
        if addresses and peer != self._peer_id:
            found.setdefault(peer, addresses)

    # -- in the background -------------------------------------------------------------------

    async def keep_table(self) -> None:
        """Put members into the routing table as they connect, and refresh it."""
        refresh_at = seen_at = float("-inf")
        present: set[PeerId] = set()
        while True:
            before = self._kad.get_routing_table_size()
            if trio.current_time() >= seen_at + SEEN_AGAIN_S:
                present, seen_at = set(), trio.current_time()
            linked = set(linked_peers(self._neighbours))
            for peer in linked - present:
                await _step("adding a peer", self._kad.add_peer(ID.from_base58(peer)))
            present = linked
            first = not before and self._kad.get_routing_table_size()
            if first or (before and trio.current_time() >= refresh_at):
                refresh_at = trio.current_time() + REFRESH_S
                await _step("refreshing", self._kad.peer_routing.refresh_routing_table())
                self._records.cleanup_expired()
                self._refreshed.set()
                self._refreshed = trio.Event()
            await trio.sleep(TURN_S)

    async def keep_announcing(self) -> None:
        """Announce what is due, one at a time."""
        while True:
            now = trio.current_time()
            digest = min(self._due, key=self._due.__getitem__, default=None)
            if digest is not None and self._due[digest] <= now and linked_peers(self._neighbours):
                await _step("announcing", self._records.provide(_key_of(digest)))
                if digest in self._due:
                    self._due[digest] = now + ANNOUNCE_AGAIN_S
                else:  # withdrawn meanwhile
                    self._forget([digest])
            await trio.sleep(ANNOUNCE_PACE_S)


async def _step(doing: str, work: Any) -> None:
    """One thing that the library does for us; its failure is logged and ends nothing."""
    with trio.move_on_after(STEP_DEADLINE_S):
        try:
            await work
        except* Exception as errors:  # noqa: BLE001 - as above
            _log.warning("Kademlia: %s failed: %r", doing, errors.exceptions)


def _key_of(digest: Digest) -> bytes:
    return _SHA2_256 + raw_hash(digest)


def _digest_of_key(key: bytes) -> Digest | None:
    if len(key) != 34 or not key.startswith(_SHA2_256):
        return None
    return digest_of_hash(key[2:])


@asynccontextmanager
async def open_dht(host: PeerHost, neighbours: Neighbours, libp2p: IHost) -> AsyncIterator[Dht]:
    """Take part in the swarm's Kademlia for as long as the block is open."""
    dht = Dht(host, neighbours, libp2p)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dht.keep_table)
        nursery.start_soon(dht.keep_announcing)
        yield dht
        nursery.cancel_scope.cancel()

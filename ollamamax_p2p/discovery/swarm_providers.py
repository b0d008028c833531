"""Who holds which blob, as the connected peers tell each other (`/omx/providers/1`).

Every node tells each connected member what it holds, so that for neighbours the answer is already
here; when they are too few, some neighbours are asked whom they know (one step further), and the
peers they name are dialled. What lies beyond that is Kademlia's work (`dht`, `merged_providers`).
"""

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from ollamamax_p2p.content.core.digest import Digest, digest_of_hash, raw_hash
from ollamamax_p2p.discovery.core.announcements import Announcements, Page
from ollamamax_p2p.discovery.core.provider_messages import (
    ADDRESSES_MAX,
    HOLDERS_MAX,
    Answer,
    Ask,
    AskPeers,
    Holder,
    Holders,
    Noted,
    Request,
    Tell,
    addresses_of_one_peer,
    answer_codec,
    digests_of,
    hashes_of,
    request_codec,
)
from ollamamax_p2p.discovery.core.provider_table import ProviderTable
from ollamamax_p2p.discovery.neighbours import Neighbours, linked_peers, reach_all
from ollamamax_p2p.discovery.peer_source import Found
from ollamamax_p2p.discovery.settings import DiscoverySettings
from ollamamax_p2p.errors import OmxError
from ollamamax_p2p.host import PeerHost, Requests, open_requests
from ollamamax_p2p.identity import Address, PeerId
from ollamamax_p2p.wire import protocol_ids

ENOUGH_HOLDERS = 4
"""With so many connected holders nobody else is asked: they fill a link."""

ASKED_MAX = 8
"""Neighbours asked about one blob."""

ASK_DEADLINE_S = 3.0
"""For asking when no holder is connected yet."""

ASK_MORE_DEADLINE_S = 0.5
"""For asking when one is: a download could have begun already."""

REACH_DEADLINE_S = 5.0
"""For dialling the holders that were named."""

TELL_DEADLINE_S = 5.0
"""A peer that does not note a page in this time is tried again later."""

TELLS_AT_ONCE_MAX = 16
"""Peers told at the same time: a renewal need not be a burst to all of them."""

RETRY_S_MIN, RETRY_S_MAX = 0.5, 30.0
"""Between attempts to tell a peer; doubles. Short at first, because a newcomer may have admitted us
a moment later than we admitted it.
"""

EXCHANGE_S = 20.0
"""At most so long between asking one neighbour whom it is connected to: a round trip."""

TOLD_S = 1_800.0
"""How long what it says is good for."""

TURN_S = 1.0
"""How often is looked for members that are new or behind, apart from being woken by a change."""


@dataclass(frozen=True, slots=True)
class _Failures:
    """How often in a row a peer could not be told, and when it is tried again."""

    count: int
    retry_at: float


_NEVER = _Failures(0, float("-inf"))


class SwarmProviders:
    """A ProviderDirectory over the connected members. A PeerSource too: whom they know."""

    name = "told"

    def __init__(
        self,
        host: PeerHost,
        neighbours: Neighbours,
        settings: DiscoverySettings,
        rng: random.Random,
    ) -> None:
        self._host = host
        self._neighbours = neighbours
        self._settings = settings
        self._rng = rng
        self._requests: Requests[Request, Answer]
        self._announcements = Announcements()
        self._table = ProviderTable()
        self._changed = trio.Event()
        self._being_told: set[PeerId] = set()
        self._failures: dict[PeerId, _Failures] = {}
        self._slots = trio.CapacityLimiter(TELLS_AT_ONCE_MAX)

    def attach(self, requests: Requests[Request, Answer]) -> None:
        """Ask through these; they need `answer`, so they are made after this."""
        self._requests = requests

    # -- ProviderDirectory -------------------------------------------------------------------

    async def announce(self, digests: Sequence[Digest]) -> None:
        """This node holds these now; the peers are told behind."""
        self._announcements.hold(digests)
        self._changed.set()

    async def withdraw(self, digests: Sequence[Digest]) -> None:
        """This node holds these no longer; the peers are told behind."""
        self._announcements.release(digests)
        self._changed.set()

    async def find(self, digest: Digest) -> Sequence[PeerId]:
        """Connected members that hold all or part of the blob, as far as neighbours know."""
        holders = self._connected_holders(digest)
        if len(holders) >= ENOUGH_HOLDERS:
            return holders[:HOLDERS_MAX]
        named = await self._holders_elsewhere(
            digest, ASK_MORE_DEADLINE_S if holders else ASK_DEADLINE_S
        )
        with trio.move_on_after(REACH_DEADLINE_S):
            await reach_all(self._neighbours, list(named.values()))
        # First-hand first: a peer that was only named by another comes last.
        holders = self._connected_holders(digest)
        connected = set(linked_peers(self._neighbours))
        heard = [peer for peer in named if peer in connected and peer not in holders]
        return (holders + heard)[:HOLDERS_MAX]

    # -- finding -----------------------------------------------------------------------------

    def _connected_holders(self, digest: Digest) -> list[PeerId]:
        connected = set(linked_peers(self._neighbours))
        holdings = self._table.holders(digest, connected=connected, now=trio.current_time())
        return [holding.peer for holding in holdings if holding.peer in connected]

    async def _holders_elsewhere(
        self, digest: Digest, deadline_s: float
    ) -> dict[PeerId, tuple[Address, ...]]:
        """Peers that aren't known here as connected holders, with addresses: what they told us
        when they were connected, then what some neighbours say.
        """
        connected = set(linked_peers(self._neighbours))
        first_hand = self._table.holders(digest, connected=connected, now=trio.current_time())
        found = {h.peer: h.addresses for h in first_hand if h.addresses and h.peer not in connected}
        question = Ask(digest=raw_hash(digest))
        neighbours = sorted(connected)
        asked = self._rng.sample(neighbours, min(ASKED_MAX, len(neighbours)))
        with trio.move_on_after(deadline_s):
            async with trio.open_nursery() as nursery:
                for peer in asked:
                    nursery.start_soon(self._collect, peer, question, found)
        return dict(list(found.items())[:HOLDERS_MAX])

    async def _collect(
        self, peer: PeerId, question: Ask | AskPeers, found: dict[PeerId, tuple[Address, ...]]
    ) -> None:
        try:
            answer = await self._requests.ask(peer, question)
        except OmxError:
            return  # The others' answers do.
        for holder in answer.holders if isinstance(answer, Holders) else ():
            addresses = addresses_of_one_peer(holder.addresses)
            if addresses and addresses[0].peer != self._host.peer_id:
                found.setdefault(addresses[0].peer, addresses)

    # -- answering ---------------------------------------------------------------------------

    async def answer(self, peer: PeerId, request: Request) -> Answer:
        """Answer a member; the host lets nobody else in."""
        if isinstance(request, Tell):
            self._note(peer, request)
            return Noted()
        if isinstance(request, AskPeers):
            return Holders(holders=self._some_neighbours(besides=peer))
        return Holders(holders=self._known_holders(digest_of_hash(request.digest), besides=peer))

    def _note(self, peer: PeerId, tell: Tell) -> None:
        addresses = tuple(a for a in addresses_of_one_peer(tell.addresses) if a.peer == peer)
        self._table.tell(
            peer,
            digests_of(tell.held),
            digests_of(tell.released),
            addresses=addresses,
            lifetime_s=tell.lifetime_s,
            fresh=tell.fresh,
            now=trio.current_time(),
        )

    def _known_holders(self, digest: Digest, *, besides: PeerId) -> list[Holder]:
        """First-hand knowledge only, so that a rumour travels one step and then ends."""
        connected = set(linked_peers(self._neighbours))
        holdings = self._table.holders(digest, connected=connected, now=trio.current_time())
        texts = [_texts(h.addresses) for h in holdings if h.peer != besides and h.addresses]
        if self._announcements.holds(digest) and self._host.addresses:
            texts.insert(0, _texts(self._host.addresses))
        return [Holder(addresses=each) for each in texts[:HOLDERS_MAX]]

    def _some_neighbours(self, *, besides: PeerId) -> list[Holder]:
        others = [
            linked.addresses
            for linked in self._neighbours.peers()
            if linked.peer != besides and linked.addresses
        ]
        chosen = self._rng.sample(others, min(HOLDERS_MAX, len(others)))
        return [Holder(addresses=_texts(addresses)) for addresses in chosen]

    # -- a PeerSource too --------------------------------------------------------------------

    async def find_peers(self) -> AsyncIterator[Found]:
        """Members that a neighbour, drawn at random, is connected to; now and then."""
        while True:
            await trio.sleep(EXCHANGE_S * self._rng.uniform(0.5, 1.0))
            neighbours = linked_peers(self._neighbours)
            if not neighbours:
                continue
            found: dict[PeerId, tuple[Address, ...]] = {}
            with trio.move_on_after(ASK_DEADLINE_S):
                await self._collect(self._rng.choice(neighbours), AskPeers(), found)
            for addresses in found.values():
                yield Found(addresses, self.name, trio.current_time() + TOLD_S)

    # -- telling -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the members told, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._forget_the_gone)
            await self._keep_telling(nursery)

    async def _keep_telling(self, nursery: trio.Nursery) -> None:
        renewal = trio.current_time() + self._renewal_delay()
        while True:
            self._changed = trio.Event()
            if trio.current_time() >= renewal:
                renewal = trio.current_time() + self._renewal_delay()
                self._announcements.renew()
                self._table.expire(trio.current_time())
            for peer in self._due():
                self._being_told.add(peer)
                nursery.start_soon(self._bring_up_to_date, peer)
            with trio.move_on_after(TURN_S):
                await self._changed.wait()

    def _due(self) -> list[PeerId]:
        now = trio.current_time()
        return [
            peer
            for peer in linked_peers(self._neighbours)
            if peer not in self._being_told
            and self._announcements.is_behind(peer)
            and self._failures.get(peer, _NEVER).retry_at <= now
        ]

    def _renewal_delay(self) -> float:
        # Jitter, so that nodes that started together do not renew together for ever.
        return self._settings.announce_interval_s * self._rng.uniform(0.9, 1.1)

    async def _bring_up_to_date(self, peer: PeerId) -> None:
        try:
            async with self._slots:
                while page := self._announcements.next_page(peer):
                    with trio.fail_after(TELL_DEADLINE_S):
                        await self._requests.ask(peer, self._as_tell(page))
                    self._announcements.told(peer, page)
            self._failures.pop(peer, None)
        except (OmxError, trio.TooSlowError):
            count = self._failures.get(peer, _NEVER).count + 1
            delay_s = min(RETRY_S_MIN * 2 ** min(count - 1, 16), RETRY_S_MAX)
            self._failures[peer] = _Failures(count, trio.current_time() + delay_s)
        finally:
            self._being_told.discard(peer)

    def _as_tell(self, page: Page) -> Tell:
        return Tell(
            fresh=page.fresh,
            held=hashes_of(page.held),
            released=hashes_of(page.released),
            addresses=_texts(self._host.addresses),
            lifetime_s=self._settings.announce_lifetime_s,
        )

    async def _forget_the_gone(self) -> None:
        """Records of peers that left stay until they expire (they may come back, and others may
        reach them); only what they have been told is forgotten.
        """
        async with self._host.watch() as events:
            async for event in events:
                if event.change == "disconnected":
                    self._announcements.forget(event.peer)
                    self._failures.pop(event.peer, None)
                self._changed.set()


def _texts(addresses: Sequence[Address]) -> list[str]:
    return [str(address) for address in addresses[:ADDRESSES_MAX]]


@asynccontextmanager
async def open_swarm_providers(
    host: PeerHost, neighbours: Neighbours, settings: DiscoverySettings, *, rng: random.Random
) -> AsyncIterator[SwarmProviders]:
    """Answer members, and keep them told, for as long as the block is open."""
    providers = SwarmProviders(host, neighbours, settings, rng)
    async with open_requests(
        host,
        protocol_ids.PROVIDERS,
        requests=request_codec,
        answers=answer_codec,
        answer=providers.answer,
    ) as requests:
        providers.attach(requests)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(providers.run)
            yield providers
            nursery.cancel_scope.cancel()

"""Connections: which peers are members, and keeping in touch with them.

The host makes connections; this decides what they are worth. Whoever connects is a stranger for
whom only the join protocol answers, and not for long. On a join stream the dialler says hello (or
redeems a ticket) and the answerer asks the member gate about the peer id, which the transport has
proved; the dialler does the same; then both admit each other and the stream goes on as the
heartbeat. A peer with at least one such stream is **linked**; when its last one ends or it falls
silent it is lost, disconnected, and dialled again if somebody asked to `keep` it.

Two peers may dial each other at once and hold two join streams: either is as good, and one may end.

docs/protocols/join.md tells the conversation, join_messages has the messages.
"""

import itertools
import logging
import random
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from ollamamax_p2p.errors import (
    BadAddress,
    BadInput,
    BadPeerId,
    BadTicket,
    LocalTrouble,
    MalformedMessage,
    NetworkTrouble,
    NotAdmitted,
    PeerGone,
    PeerMisbehaved,
    PeerNotFound,
    PeerUnreachable,
    TicketUnknown,
    code,
)
from ollamamax_p2p.host.join_messages import (
    AGENT_CHARS_MAX,
    BUSY,
    FULL,
    NO_QUORUM,
    NOT_A_MEMBER,
    OTHER_SWARM,
    OWN_ADDRESSES_MAX,
    TOLD_ADDRESSES_MAX,
    TROUBLE,
    FromAnswerer,
    FromDialler,
    Goodbye,
    Granted,
    Hello,
    Ping,
    Pong,
    Redeem,
    Refused,
    Welcome,
    answerer_codec,
    dialler_codec,
    error_of,
    refusal_of,
)
from ollamamax_p2p.host.member_gate import Admission, MemberGate
from ollamamax_p2p.host.message_stream import MessageStream
from ollamamax_p2p.host.peer_host import ByteStream, Connection, PeerHost
from ollamamax_p2p.host.settings import HostSettings
from ollamamax_p2p.identity import (
    Address,
    Membership,
    PeerId,
    Ticket,
    iso_time,
    parse_address,
    parse_peer_id,
)
from ollamamax_p2p.observability import Event, EventFeed
from ollamamax_p2p.wire import protocol_ids

PROOF_DEADLINE_S = 10.0
"""How long a stranger may stay, and how long a join conversation may take before the heartbeats."""

STRANGERS_MAX = 128
"""Connected and not proven; one more costs the oldest. A hundred nodes may join at once."""

REFUSED_TICKETS_PER_PEER = 5
REFUSED_TICKETS_MAX = 60
REFUSED_TICKETS_WINDOW_S = 60.0
"""Within this time one peer, or all together, may show so many bad tickets before further bad ones
are neither logged nor explained. A good one is honoured all the same: nobody guesses 128 bits, and
a flood of bad ones must lock nobody out.
"""

REDEEMED_AT_ONCE_MAX = 16
"""Tickets about which the gate is asked at the same time; the rest wait their turn."""

REDEEM_AGAIN_S = 1.0
"""An issuer that hangs up is asked once more after this."""

STREAMS_PER_PEER = 4
"""Join streams of one peer: two after a simultaneous dial, two more while old ones die."""

REFUSALS_TOLD_AFTER = 4
"""The first may come of a member that has not heard of this one yet; after so many, some seconds
have passed."""

KEPT_PEERS_MAX = 256
BOOK_PEERS_MAX = 1_024
"""Peers whose addresses are remembered, the least recently told forgotten first: about 1 MB."""

_LAST_WORDS_S = 1.0
# For a Refused or Goodbye to be sent and read before the connection is ended.

_DISCONNECT_S = 10.0
# py-libp2p closes streams one by one, and a write to a frozen peer takes 5 s to fail.

_PINGS_REMEMBERED = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """A linked peer."""

    peer: PeerId
    address: str
    """As the host sees it; "" if unknown."""
    inbound: bool
    rtt_s: float | None
    """Of the last heartbeat; None before the first came back."""
    connected_since: float
    """On trio's clock."""
    agent: str
    """What it says it runs, made printable; nothing may depend on it."""
    addresses: tuple[Address, ...]
    """Where it says it can be dialled."""


@dataclass(frozen=True, slots=True)
class Redeemed:
    """What a ticket gave."""

    issuer: PeerId
    peers: tuple[Address, ...]
    """Members to reach once the admission is saved, the issuer first."""
    admission: Admission


@asynccontextmanager
async def open_connections(
    host: PeerHost,
    membership: Membership | None,
    settings: HostSettings,
    *,
    rng: random.Random,
    feed: EventFeed | None,
    agent: str,
    wall_clock: Callable[[], float],
    on_addresses: Callable[[Sequence[Address]], None] | None = None,
    gate: MemberGate | None = None,
) -> AsyncIterator["Connections"]:
    """Answer the join protocol and watch over links for as long as the block is open.

    membership: None while this node is in no swarm yet; `redeem` or `enter`, then `adopt`.
    agent: what we tell peers that we run; cut at 128 characters.
    wall_clock: Unix seconds, for tickets and events.
    on_addresses: called with members' addresses that a member told; may repeat itself.
    gate: who is a member, and who honours tickets; None lets in whoever knows the swarm.

    The end of the block says goodbye and leaves the connections to the host.
    """
    async with trio.open_nursery() as nursery:
        connections = Connections(
            host,
            membership,
            settings,
            nursery=nursery,
            rng=rng,
            feed=feed,
            agent=agent,
            wall_clock=wall_clock,
            on_addresses=on_addresses,
            gate=gate,
        )
        host.set_handler(protocol_ids.JOIN, connections._answer, for_strangers=True)
        watching = trio.Event()
        nursery.start_soon(connections._follow_host, watching)
        await watching.wait()
        try:
            yield connections
        finally:
            connections._closed = True
            await connections._say_goodbye(leaving=False)
            nursery.cancel_scope.cancel()


Answer = TypeVar("Answer", Welcome, Granted)
AnyTalk = MessageStream[FromDialler, FromAnswerer] | MessageStream[FromAnswerer, FromDialler]


@dataclass(slots=True, eq=False)
class _Pulse:
    """Of one join stream."""

    heard_at: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


@dataclass(slots=True, eq=False)
class _Link:
    """A proven peer and its join streams."""

    peer: PeerId
    agent: str
    address: str
    inbound: bool
    since: float
    rtt_s: float | None = None
    talks: dict[AnyTalk, _Pulse] = field(default_factory=dict)
    asked: dict[int, float] = field(default_factory=dict)
    """When each Ping that is not answered was sent."""
    over: trio.Event = field(default_factory=trio.Event)


@dataclass(slots=True, eq=False)
class _Stranger:
    """A connected peer that has proved nothing yet."""

    deadline: float
    waiting: trio.CancelScope = field(default_factory=trio.CancelScope)
    talks: int = 0


@dataclass(slots=True, eq=False)
class _Kept:
    """A peer that is dialled again whenever it is lost."""

    peer: PeerId
    addresses: tuple[Address, ...]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    refusals: int = 0
    """In a row."""


class Connections:
    """The links of this node. Made by `open_connections`."""

    def __init__(
        self,
        host: PeerHost,
        membership: Membership | None,
        settings: HostSettings,
        *,
        nursery: trio.Nursery,
        rng: random.Random,
        feed: EventFeed | None,
        agent: str,
        wall_clock: Callable[[], float],
        on_addresses: Callable[[Sequence[Address]], None] | None,
        gate: MemberGate | None = None,
    ) -> None:
        self._host = host
        self._membership = membership
        self._settings = settings
        self._nursery = nursery
        self._rng = rng
        self._feed = feed
        self._agent = agent[:AGENT_CHARS_MAX]
        self._wall_clock = wall_clock
        self._on_addresses = on_addresses
        self._gate = gate
        self._links: dict[PeerId, _Link] = {}
        self._strangers: OrderedDict[PeerId, _Stranger] = OrderedDict()
        self._kept: dict[PeerId, _Kept] = {}
        self._book = _AddressBook(host.peer_id)
        self._refusals = _Refusals()
        self._dialling: weakref.WeakValueDictionary[PeerId, trio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._parting: dict[PeerId, list[trio.Event]] = {}
        self._redeeming = trio.CapacityLimiter(REDEEMED_AT_ONCE_MAX)
        self._nonce = 0
        self._closed = False

    # -- what others ask of it

    def peers(self) -> tuple[PeerStatus, ...]:
        """The linked peers: admitted, and heard of within the heartbeat timeout."""
        return tuple(self._status(link) for link in self._links.values())

    def known_addresses(self) -> tuple[Address, ...]:
        """Where members said they can be dialled, the linked ones first."""
        linked = [address for peer in self._links for address in self._book.of(peer)]
        return tuple(dict.fromkeys([*linked, *self._book.all()]))

    async def reach(self, addresses: Sequence[Address]) -> PeerId:
        """Be linked with the one peer that these addresses name; at once if we are already.

        Raises PeerUnreachable, PeerGone, NotAdmitted, or PeerMisbehaved; ValueError for addresses
        of no peer or of several.
        """
        peer = _one_peer(addresses)
        async with self._alone_with(peer):
            if peer not in self._links:
                await self._connect(addresses)
                await self._prove(peer)
        return peer

    async def reach_peer(self, peer: PeerId) -> None:
        """Be linked with a peer whose addresses are known. Raises PeerNotFound, else as `reach`."""
        if peer in self._links:
            return
        addresses = self._addresses_of(peer)
        if not addresses:
            raise PeerNotFound(peer)
        await self.reach(addresses)

    def keep(self, addresses: Iterable[Address]) -> None:
        """Link with the peers of these addresses, and again whenever they are lost, until
        `forget`.

        Returns at once. Beyond 256 peers further ones are not kept, which is logged.
        """
        for peer, theirs in _by_peer(addresses).items():
            kept = self._kept.get(peer)
            if kept is not None:
                kept.addresses = _merged(theirs, kept.addresses)
            elif len(self._kept) >= KEPT_PEERS_MAX:
                _log.warning("not keeping peer %s: %d are kept already", peer, KEPT_PEERS_MAX)
            elif peer != self._host.peer_id:
                self._kept[peer] = kept = _Kept(peer, _merged(theirs))
                self._nursery.start_soon(self._keep_linked, kept)

    def forget(self, peer: PeerId) -> None:
        """Dial the peer no more when it is lost, and forget its addresses. A link stays."""
        kept = self._kept.pop(peer, None)
        if kept is not None:
            kept.scope.cancel()
        self._book.forget(peer)

    async def redeem(self, ticket: Ticket, *, name: str = "") -> Redeemed:
        """Become a member by a ticket. Save the admission and `Membership.join`, then `adopt` that
        and `reach` the peers; the same ticket works again for this node if that fails.

        Raises TicketExpired, TicketUsedUp, TicketUnknown, or a NetworkTrouble when no issuer can be
        asked.
        """
        trouble: NetworkTrouble = PeerUnreachable("the issuer", "the ticket has no address")
        for peer, addresses in _by_peer(ticket.addresses).items():
            for pause_s in (REDEEM_AGAIN_S, 0.0):
                try:
                    return await self._redeem_with(peer, addresses, ticket, name)
                except PeerGone as error:
                    # Who has just left, or was expelled, is still being hung up on there.
                    trouble = error
                    await trio.sleep(pause_s)
                except NetworkTrouble as error:
                    trouble = error
                    break
        raise trouble

    async def enter(self, addresses: Sequence[Address]) -> bytes:
        """The id of the open swarm that the peer at these addresses is in; then
        `Membership.join_open`, `adopt` and `reach`. Raises as `reach`: NotAdmitted if it is
        private.
        """
        peer = _one_peer(addresses)
        async with self._alone_with(peer):
            await self._connect(addresses)
            async with self._dialled_talk(peer) as talk:
                hello = Hello(swarm_id=b"", agent=self._agent, addresses=[])
                welcome = await self._ask(talk, hello, Welcome)
                self._learn(peer, welcome.addresses, welcome.peers)
                return welcome.swarm_id

    def adopt(self, membership: Membership) -> None:
        """Be a member from now on; links made before stay."""
        self._membership = membership
        for connection in self._host.connections():
            self._came(connection.peer)

    async def leave(self) -> None:
        """Tell every linked peer to forget us, and end the links; for `Membership.leave`."""
        for kept in list(self._kept):
            self.forget(kept)
        await self._say_goodbye(leaving=True)
        for link in list(self._links.values()):
            self._end(link, "this node leaves the swarm")
        self._membership = None

    # -- strangers

    async def _follow_host(self, watching: trio.Event) -> None:
        """Know of every connection, whoever made it."""
        while True:
            async with self._host.watch() as events:
                watching.set()
                self._compare_with_host()
                try:
                    async for event in events:
                        if event.change == "connected":
                            self._came(event.peer)
                        else:
                            self._went(event.peer)
                    return
                except PeerGone:  # we fell behind: look at what is true now, and go on
                    continue

    def _compare_with_host(self) -> None:
        connected = {connection.peer for connection in self._host.connections()}
        for peer in connected:
            self._came(peer)
        for peer in {*self._links, *self._strangers} - connected:
            self._went(peer)

    def _came(self, peer: PeerId) -> None:
        """A peer is connected. Its dialler must prove itself, whoever asked for the dial."""
        connection = self._connection(peer)
        if connection is None or peer in self._links:
            return
        if self._membership is not None and self._membership.is_open:
            # Others than our nodes may speak to an open swarm (identify, ping, Kademlia), and they
            # know nothing of the join protocol.
            self._host.admit(peer)
        elif peer not in self._strangers:
            self._suspect(peer)
        if not connection.inbound and self._membership is not None:
            self._nursery.start_soon(self._prove_in_background, peer)

    def _suspect(self, peer: PeerId) -> None:
        if len(self._strangers) >= STRANGERS_MAX:
            oldest, stranger = self._strangers.popitem(last=False)
            stranger.waiting.cancel()
            self._part(oldest)
        stranger = _Stranger(trio.current_time() + PROOF_DEADLINE_S)
        self._strangers[peer] = stranger
        self._nursery.start_soon(self._await_proof, peer, stranger)

    async def _await_proof(self, peer: PeerId, stranger: _Stranger) -> None:
        """Drop a stranger whose time is over."""
        with stranger.waiting:
            while trio.current_time() < stranger.deadline:  # noqa: ASYNC110 - it may be moved
                await trio.sleep_until(stranger.deadline)
            _log.info("dropping %s: it did not prove that it is a member", peer)
            self._strangers.pop(peer, None)
            self._part(peer)

    def _went(self, peer: PeerId) -> None:
        """A peer was disconnected; perhaps it is back already."""
        if self._connection(peer) is not None:
            return
        self._no_stranger(peer)
        link = self._links.get(peer)
        if link is not None:
            self._end(link, "the connection ended")

    def _no_stranger(self, peer: PeerId) -> None:
        stranger = self._strangers.pop(peer, None)
        if stranger is not None:
            stranger.waiting.cancel()

    # -- dialling

    @asynccontextmanager
    async def _alone_with(self, peer: PeerId) -> AsyncIterator[None]:
        """One dial to a peer at a time; the next finds it done."""
        lock = self._dialling.get(peer)
        if lock is None:
            lock = self._dialling[peer] = trio.Lock()
        async with lock:
            yield

    async def _connect(self, addresses: Sequence[Address]) -> None:
        with trio.move_on_after(self._settings.dial_timeout_s):
            # A connection that is being ended looks alive, and would fail us in a moment.
            while parting := self._parting.get(addresses[0].peer):
                await parting[0].wait()
            await self._host.connect(addresses)
            return
        raise PeerUnreachable(
            str(addresses[0]), f"no answer within {self._settings.dial_timeout_s:g} s"
        )

    async def _prove_in_background(self, peer: PeerId) -> None:
        """For a connection that something else made, such as Kademlia."""
        try:
            async with self._alone_with(peer):
                if peer not in self._links and self._connection(peer) is not None:
                    await self._prove(peer)
        except (NetworkTrouble, PeerMisbehaved) as error:
            _log.info("%s", error)

    async def _prove(self, peer: PeerId) -> None:
        """Have the peer take us for a member, see that it is one, and be linked with it."""
        membership = self._membership
        if membership is None:
            raise NotAdmitted(peer, "this node is in no swarm")
        if not self._lets_in(peer):
            # Before it is told which swarm we are in, and where.
            self._part(peer)
            raise PeerUnreachable(peer, "who answers there is no member of this swarm")
        linked = False
        talk = await self._open_talk(peer)
        try:
            welcome = await self._ask(talk, self._hello(membership), Welcome)
            # Asked once more: meanwhile it may have been removed.
            if welcome.swarm_id != membership.swarm_id or not self._lets_in(peer):
                await talk.send(Refused(reason=NOT_A_MEMBER))
                raise PeerUnreachable(peer, "who answers there is no member of this swarm")
            self._host.admit(peer)
            link = self._linked(peer, welcome.agent)
            pulse = link.talks[talk] = _Pulse(trio.current_time())
            self._nursery.start_soon(self._hold, link, talk, pulse)
            linked = True
            # Only now may the answerer open streams: it waits for this Ping before it counts us in.
            await self._ping(link, talk)
            self._learn(peer, welcome.addresses, welcome.peers)
        finally:
            if not linked:
                self._give_up(talk)

    async def _redeem_with(
        self, peer: PeerId, addresses: Sequence[Address], ticket: Ticket, name: str
    ) -> Redeemed:
        async with self._alone_with(peer):
            await self._connect(addresses)
            async with self._dialled_talk(peer) as talk:
                request = Redeem(swarm_id=ticket.swarm_id, secret=ticket.secret, name=name)
                granted = await self._ask(talk, request, Granted)
                told = _parsed(granted.peers, besides=self._host.peer_id)
                every = tuple(dict.fromkeys([*addresses, *told]))
                return Redeemed(peer, every, _admission(peer, granted))

    @asynccontextmanager
    async def _dialled_talk(
        self, peer: PeerId
    ) -> AsyncIterator[MessageStream[FromDialler, FromAnswerer]]:
        """A conversation that makes no link; if it fails the connection is ended."""
        talk = await self._open_talk(peer)
        try:
            yield talk
        except BaseException:
            self._give_up(talk)
            raise
        await talk.aclose()

    async def _open_talk(self, peer: PeerId) -> MessageStream[FromDialler, FromAnswerer]:
        with trio.move_on_after(PROOF_DEADLINE_S):
            stream = await self._host.open_stream(peer, protocol_ids.JOIN)
            return MessageStream(stream, sends=dialler_codec, receives=answerer_codec)
        raise PeerUnreachable(peer, f"no answer within {PROOF_DEADLINE_S:g} s")

    async def _ask(
        self,
        talk: MessageStream[FromDialler, FromAnswerer],
        question: Hello | Redeem,
        wanted: type[Answer],
    ) -> Answer:
        """The first exchange. Raises what the peer's refusal means, PeerUnreachable or PeerGone."""
        with trio.move_on_after(PROOF_DEADLINE_S):
            await talk.send(question)
            answer = await talk.receive()
            if isinstance(answer, wanted):
                return answer
            if isinstance(answer, Refused):
                error = error_of(answer, talk.peer)
                if isinstance(error, BadTicket) and not isinstance(question, Redeem):
                    raise MalformedMessage(talk.peer, "it refuses a ticket that nobody showed")
                raise error
            if answer is None:
                raise PeerGone(talk.peer, "it ended the join conversation")
            raise MalformedMessage(talk.peer, f"it answered with {type(answer).__name__}")
        raise PeerUnreachable(talk.peer, f"no answer within {PROOF_DEADLINE_S:g} s")

    def _hello(self, membership: Membership) -> Hello:
        return Hello(
            swarm_id=membership.swarm_id, agent=self._agent, addresses=self._own_addresses()
        )

    def _give_up(self, talk: AnyTalk) -> None:
        """End a conversation that led to nothing, and the connection unless another one holds."""
        if not self._closed:
            self._nursery.start_soon(talk.aclose)
            self._part(talk.peer)

    # -- answering

    async def _answer(self, stream: ByteStream) -> None:
        """The handler: the conversation runs in our nursery, its task here only waits."""
        if self._closed:
            return
        over = trio.Event()
        self._nursery.start_soon(self._answer_and_tell, stream, over)
        await over.wait()

    async def _answer_and_tell(self, stream: ByteStream, over: trio.Event) -> None:
        talk = MessageStream(stream, sends=answerer_codec, receives=dialler_codec)
        self._came(talk.peer)
        stranger = self._strangers.get(talk.peer)
        if stranger is not None:
            stranger.talks += 1
        try:
            if self._may_talk(talk.peer, stranger):
                await self._answer_talk(talk)
        except PeerGone as error:
            _log.debug("%s", error)
        except PeerMisbehaved as error:
            _log.warning("%s", error)
            self._give_up(talk)
        finally:
            if stranger is not None:
                stranger.talks -= 1
            over.set()

    def _may_talk(self, peer: PeerId, stranger: _Stranger | None) -> bool:
        link = self._links.get(peer)
        if link is not None:
            return len(link.talks) < STREAMS_PER_PEER
        return stranger is None or stranger.talks <= STREAMS_PER_PEER

    async def _answer_talk(self, talk: MessageStream[FromAnswerer, FromDialler]) -> None:
        with trio.move_on_after(PROOF_DEADLINE_S) as patience:
            first = await talk.receive()
        if patience.cancelled_caught or first is None:
            return
        match first:
            case Hello():
                await self._answer_hello(talk, first)
            case Redeem():
                await self._answer_redeem(talk, first)
            case _:
                raise MalformedMessage(talk.peer, f"it began with {type(first).__name__}")

    async def _answer_hello(
        self, talk: MessageStream[FromAnswerer, FromDialler], hello: Hello
    ) -> None:
        peer, membership = talk.peer, self._membership
        reason = self._reason_to_refuse(peer, hello)
        if reason or membership is None:
            await self._refuse(talk, Refused(reason=reason or NOT_A_MEMBER))
            return
        # Before the Welcome, because the peer may open streams as soon as it has that.
        self._host.admit(peer)
        await talk.send(
            Welcome(
                swarm_id=membership.swarm_id,
                agent=self._agent,
                addresses=self._own_addresses(),
                peers=self._addresses_to_tell(peer),
            )
        )
        with trio.move_on_after(PROOF_DEADLINE_S) as patience:
            ready = await talk.receive()
        if patience.cancelled_caught or ready is None:
            return
        if not isinstance(ready, Ping):
            _log.warning("peer %s does not take us for a member", peer)
            self._give_up(talk)
            return
        await talk.send(Pong(nonce=ready.nonce))
        if not self._lets_in(peer):  # it was removed meanwhile
            self._give_up(talk)
            return
        self._learn(peer, hello.addresses, [])
        link = self._linked(peer, hello.agent)
        pulse = link.talks[talk] = _Pulse(trio.current_time())
        await self._hold(link, talk, pulse)

    def _reason_to_refuse(self, peer: PeerId, hello: Hello) -> str:
        """Empty if the peer is welcome."""
        membership = self._membership
        if membership is None:
            return NOT_A_MEMBER
        if hello.swarm_id and hello.swarm_id != membership.swarm_id:
            return OTHER_SWARM
        if not membership.is_open and not hello.swarm_id:
            return NOT_A_MEMBER
        if not self._lets_in(peer):
            return NOT_A_MEMBER
        if peer not in self._links and len(self._links) >= self._settings.connections_max:
            return FULL
        return ""

    def _lets_in(self, peer: PeerId) -> bool:
        if self._gate is None or (self._membership is not None and self._membership.is_open):
            return True
        return self._gate.is_member(peer)

    def expel(self, peer: PeerId) -> None:
        """Let the peer in no more, and end its link now: the gate says no to it from here on. In an
        open swarm it stays, as anybody may.
        """
        self.forget(peer)
        if self._membership is not None and self._membership.is_open:
            return
        self._host.expel(peer)
        link = self._links.get(peer)
        if link is not None:
            self._end(link, "it is a member no more")
        self._part(peer)

    async def _answer_redeem(
        self, talk: MessageStream[FromAnswerer, FromDialler], request: Redeem
    ) -> None:
        answer = await self._redemption(talk.peer, request)
        if isinstance(answer, Refused):
            await self._refuse(talk, answer)
            return
        stranger = self._strangers.get(talk.peer)
        if stranger is not None:
            # It saves what it got before it comes back with Hello.
            stranger.deadline = trio.current_time() + PROOF_DEADLINE_S
        await talk.send(answer)
        await self._let_it_read(talk)

    async def _redemption(self, peer: PeerId, request: Redeem) -> Granted | Refused:
        membership = self._membership
        try:
            if self._gate is None or membership is None or request.swarm_id != membership.swarm_id:
                raise TicketUnknown
            async with self._redeeming:
                admission = await self._gate.redeem(request.secret, peer, request.name)
        except BadTicket as error:
            now = trio.current_time()
            if not self._refusals.room_for(peer, now=now):
                return Refused(reason=BUSY)
            self._refusals.add(peer, now=now)
            _log.warning("refused a ticket of peer %s: %s", peer, error)
            self._report("peer.refused", peer, reason=code(error))
            return refusal_of(error)
        except LocalTrouble as error:
            _log.error("cannot admit peer %s: %s", peer, error)
            return Refused(reason=TROUBLE)
        except NetworkTrouble as error:
            _log.warning("cannot admit peer %s now: %s", peer, error)
            return Refused(reason=NO_QUORUM)
        except BadInput as error:  # there are as many members as there may be
            _log.error("cannot admit peer %s: %s", peer, error)
            return Refused(reason=TROUBLE)
        return Granted(
            swarm_id=membership.swarm_id,
            peers=self._addresses_to_tell(peer),
            raft_id=admission.raft_id,
            roster=tuple(admission.roster),
            votes=admission.votes,
        )

    async def _refuse(
        self, talk: MessageStream[FromAnswerer, FromDialler], refused: Refused
    ) -> None:
        """Say no, and end the connection once that has been read."""
        if refused.reason in (NOT_A_MEMBER, OTHER_SWARM):
            _log.warning("refused peer %s: %s", talk.peer, refused.reason)
            self._report("peer.refused", talk.peer, reason=refused.reason)
        with trio.move_on_after(_LAST_WORDS_S):
            await talk.send(refused)
        await self._let_it_read(talk)
        self._give_up(talk)

    async def _let_it_read(self, talk: MessageStream[FromAnswerer, FromDialler]) -> None:
        """Wait until the peer has ended the conversation; whatever it still says is ignored."""
        with trio.move_on_after(_LAST_WORDS_S):
            await talk.receive()

    # -- linked

    def _linked(self, peer: PeerId, agent: str) -> _Link:
        """The peer's link; made now if this is its first stream."""
        link = self._links.get(peer)
        if link is not None:
            return link
        connection = self._connection(peer)
        link = self._links[peer] = _Link(
            peer,
            _printable(agent),
            connection.address if connection else "",
            connection.inbound if connection else False,
            trio.current_time(),
        )
        self._no_stranger(peer)
        _log.info("linked with peer %s at %s", peer, link.address)
        self._report("peer.connected", peer, address=link.address, inbound=link.inbound)
        return link

    async def _hold(self, link: _Link, talk: AnyTalk, pulse: _Pulse) -> None:
        """Read one join stream until it ends, with heartbeats of its own.

        Each has its own, because each may run on a connection of its own. If one end of a
        connection is gone (its machine has moved to another network) and has dialled anew, the new
        connection is well, and whatever streams stayed on the old one are lost without a sign.
        """
        problem = "the connection ended"
        try:
            with pulse.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._beat, link, talk)
                    nursery.start_soon(self._notice_silence, link, pulse)
                    try:
                        problem = await self._listen(link, talk, pulse)
                    except PeerGone as error:
                        problem = str(error)
                    except PeerMisbehaved as error:
                        _log.warning("%s", error)
                        self._end(link, str(error))
                    nursery.cancel_scope.cancel()
        finally:
            del link.talks[talk]
            if not link.talks:
                self._end(link, problem)
            with _shielded(_LAST_WORDS_S):
                await talk.aclose()

    async def _listen(self, link: _Link, talk: AnyTalk, pulse: _Pulse) -> str:
        """Heartbeats until the peer ends the stream in good order; says why it did."""
        while (message := await talk.receive()) is not None:
            pulse.heard_at = trio.current_time()
            match message:
                case Ping():
                    await talk.send(Pong(nonce=message.nonce))
                case Pong():
                    sent_at = link.asked.pop(message.nonce, None)
                    if sent_at is not None:
                        link.rtt_s = pulse.heard_at - sent_at
                case Goodbye():
                    if message.leaving:
                        self.forget(link.peer)
                    # What other streams it has will say the same or be reset.
                    self._end(link, "it left the swarm" if message.leaving else "it stopped")
                    return "it stopped"
                case _:
                    raise MalformedMessage(talk.peer, f"{type(message).__name__} after its proof")
        return "it ended the stream"

    async def _beat(self, link: _Link, talk: AnyTalk) -> None:
        while True:
            await trio.sleep(self._settings.heartbeat_interval_s)
            with suppress(PeerGone):  # whoever reads the stream notices too, and acts
                await self._ping(link, talk)

    async def _notice_silence(self, link: _Link, pulse: _Pulse) -> None:
        timeout_s = self._settings.heartbeat_timeout_s
        while trio.current_time() < pulse.heard_at + timeout_s:  # noqa: ASYNC110 - it is moved
            await trio.sleep_until(pulse.heard_at + timeout_s)
        # With all its connections: which of them this stream is on, nobody here knows.
        self._end(link, f"silent for {timeout_s:g} s")

    async def _ping(self, link: _Link, talk: AnyTalk) -> None:
        self._nonce += 1
        # Unanswered ones pile up only while the peer is silent, which ends the link; but a peer
        # may answer none of them and go on talking.
        if len(link.asked) >= _PINGS_REMEMBERED:
            del link.asked[next(iter(link.asked))]
        link.asked[self._nonce] = trio.current_time()
        await talk.send(Ping(nonce=self._nonce))

    def _end(self, link: _Link, problem: str) -> None:
        """The link is over: report it once, end its streams and the connection."""
        if self._links.get(link.peer) is not link:
            return
        del self._links[link.peer]
        for pulse in link.talks.values():
            pulse.scope.cancel()
        link.over.set()
        _log.info("lost peer %s: %s", link.peer, problem)
        self._report("peer.lost", link.peer, problem=problem)
        self._part(link.peer)

    def _part(self, peer: PeerId) -> None:
        """Disconnect in the background; who dials the peer meanwhile waits for it."""
        over = trio.Event()
        self._parting.setdefault(peer, []).append(over)
        self._nursery.start_soon(self._disconnect, peer, over)

    async def _disconnect(self, peer: PeerId, over: trio.Event) -> None:
        try:
            if peer not in self._links:
                with trio.move_on_after(_DISCONNECT_S):
                    await self._host.disconnect(peer)
        finally:
            self._parting[peer].remove(over)
            if not self._parting[peer]:
                del self._parting[peer]
            over.set()

    async def _say_goodbye(self, *, leaving: bool) -> None:
        """Also waits until it was heard, which a connection that is ended at once would prevent."""
        with _shielded(_LAST_WORDS_S):
            async with trio.open_nursery() as nursery:
                for link in list(self._links.values()):
                    nursery.start_soon(_dismiss, link, Goodbye(leaving=leaving))

    # -- again

    async def _keep_linked(self, kept: _Kept) -> None:
        failures = 0
        with kept.scope:
            while True:
                link = self._links.get(kept.peer)
                if link is None:
                    if await self._reached(kept):
                        continue
                    failures += 1
                else:
                    await link.over.wait()
                    lived_s = trio.current_time() - link.since
                    # A link that breaks as soon as it is made counts as one more failure.
                    failures = 1 if lived_s > self._settings.reconnect_delay_s_max else failures + 1
                await trio.sleep(backoff_s(failures, self._settings, self._rng))

    async def _reached(self, kept: _Kept) -> bool:
        try:
            await self.reach(_merged(kept.addresses, self._book.of(kept.peer)))
            kept.refusals = 0
        except NotAdmitted as error:
            kept.refusals += 1
            if kept.refusals == REFUSALS_TOLD_AFTER:
                _log.warning(
                    "%s; if this node has been removed from its swarm: `omx leave`, and a new "
                    "ticket brings it back",
                    error,
                )
            return False
        except (NetworkTrouble, PeerMisbehaved) as error:
            _log.info("%s", error)
            return False
        return True

    # -- addresses

    def _addresses_of(self, peer: PeerId) -> tuple[Address, ...]:
        kept = self._kept.get(peer)
        return _merged(self._book.of(peer), kept.addresses if kept else ())

    def _own_addresses(self) -> list[str]:
        return [str(address) for address in self._host.addresses[:OWN_ADDRESSES_MAX]]

    def _addresses_to_tell(self, peer: PeerId) -> list[str]:
        """Of linked peers, because those were alive a moment ago; two of each, drawn at random."""
        others = [other for other in self._links if other != peer]
        chosen = self._rng.sample(others, min(len(others), TOLD_ADDRESSES_MAX // 2))
        return [str(address) for other in chosen for address in self._book.of(other)[:2]]

    def _learn(self, peer: PeerId, own: Sequence[str], others: Sequence[str]) -> None:
        mine = self._host.peer_id
        theirs = tuple(address for address in _parsed(own, besides=mine) if address.peer == peer)
        told = tuple(address for address in _parsed(others, besides=mine) if address.peer != peer)
        self._book.replace(peer, theirs)
        self._book.add(told)
        if self._on_addresses is not None and (theirs or told):
            self._on_addresses((*theirs, *told))

    # -- small things

    def _connection(self, peer: PeerId) -> Connection | None:
        return next((each for each in self._host.connections() if each.peer == peer), None)

    def _status(self, link: _Link) -> PeerStatus:
        return PeerStatus(
            peer=link.peer,
            address=link.address,
            inbound=link.inbound,
            rtt_s=link.rtt_s,
            connected_since=link.since,
            agent=link.agent,
            addresses=self._book.of(link.peer),
        )

    def _report(self, kind: str, peer: PeerId, **facts: object) -> None:
        if self._feed is not None:
            at = iso_time(int(self._wall_clock()))
            self._feed.report(Event(kind=kind, at=at, facts={"peer": peer, **facts}))


class _AddressBook:
    """Where members said they can be dialled; bounded, the least recently told forgotten first."""

    def __init__(self, own: PeerId) -> None:
        self._own = own
        self._peers: OrderedDict[PeerId, tuple[Address, ...]] = OrderedDict()

    def of(self, peer: PeerId) -> tuple[Address, ...]:
        return self._peers.get(peer, ())

    def all(self) -> Iterator[Address]:
        return itertools.chain.from_iterable(reversed(self._peers.values()))

    def replace(self, peer: PeerId, addresses: tuple[Address, ...]) -> None:
        """What a peer says of itself; nothing said changes nothing."""
        if addresses and peer != self._own:
            self._peers[peer] = _merged(addresses)
            self._peers.move_to_end(peer)
            if len(self._peers) > BOOK_PEERS_MAX:
                self._peers.popitem(last=False)

    def add(self, addresses: Iterable[Address]) -> None:
        """What others say of it comes after what it says itself."""
        for peer, theirs in _by_peer(addresses).items():
            self.replace(peer, _merged(self.of(peer), theirs))

    def forget(self, peer: PeerId) -> None:
        self._peers.pop(peer, None)


class _Refusals:
    """Bad tickets of late."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, PeerId]] = deque(maxlen=REFUSED_TICKETS_MAX)

    def room_for(self, peer: PeerId, *, now: float) -> bool:
        while self._recent and self._recent[0][0] <= now - REFUSED_TICKETS_WINDOW_S:
            self._recent.popleft()
        theirs = sum(other == peer for _, other in self._recent)
        return theirs < REFUSED_TICKETS_PER_PEER and len(self._recent) < REFUSED_TICKETS_MAX

    def add(self, peer: PeerId, *, now: float) -> None:
        self._recent.append((now, peer))


def backoff_s(failures: int, settings: HostSettings, rng: random.Random) -> float:
    """The pause before the next dial, after this many failures in a row, from 1: doubled each time
    up to the maximum, then between half and all of it, so that peers that lost each other together
    don't come back together.
    """
    doublings = min(failures - 1, 30)
    longest = min(settings.reconnect_delay_s_min * 2.0**doublings, settings.reconnect_delay_s_max)
    return longest * rng.uniform(0.5, 1.0)


def _admission(issuer: PeerId, granted: Granted) -> Admission:
    try:
        roster = tuple((parse_peer_id(text), number) for text, number in granted.roster)
    except BadPeerId:
        raise MalformedMessage(issuer, "its roster names what is no peer id") from None
    return Admission(granted.raft_id, roster, granted.votes)


async def _dismiss(link: _Link, goodbye: Goodbye) -> None:
    for talk in list(link.talks):
        with suppress(PeerGone):
            await talk.send(goodbye)
    await link.over.wait()


def _shielded(seconds: float) -> trio.CancelScope:
    """For what must be done although we are cancelled, but not for ever."""
    return trio.CancelScope(deadline=trio.current_time() + seconds, shield=True)


def _one_peer(addresses: Sequence[Address]) -> PeerId:
    peers = {address.peer for address in addresses}
    if len(peers) != 1:
        raise ValueError(f"expected addresses of one peer, not of {len(peers)}")
    return peers.pop()


def _by_peer(addresses: Iterable[Address]) -> dict[PeerId, tuple[Address, ...]]:
    grouped: dict[PeerId, tuple[Address, ...]] = {}
    for address in addresses:
        grouped[address.peer] = (*grouped.get(address.peer, ()), address)
    return grouped


def _merged(*several: Iterable[Address]) -> tuple[Address, ...]:
    """In order, each once, at most 16."""
    return tuple(dict.fromkeys(itertools.chain(*several)))[:OWN_ADDRESSES_MAX]


def _parsed(texts: Sequence[str], *, besides: PeerId) -> tuple[Address, ...]:
    """The addresses that we understand: a newer peer may know other transports."""
    found: list[Address] = []
    for text in texts:
        with suppress(BadAddress, BadPeerId):
            found.append(parse_address(text))
    return tuple(address for address in found if address.peer != besides)


def _printable(text: str) -> str:
    """A peer's text without what could steer a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)

"""A network in one process, under trio's virtual clock: the same seed gives the same run.

Every host is a `PeerHost`. What crosses the network is charged time, not copied: a send is cut into
segments, and a segment waits its turn at the sender's upload, at the link and at the receiver's
download (each shares its rate fairly between the streams that want it), and travels for the link's
latency. A stream takes no more than its window until the reader has read, so back-pressure is real.

What happens to a host or a link:

    kill       the process is gone: its connections end on both sides, and nobody answers there
    freeze     SIGSTOP: connections stay, nothing is read or answered until `thaw`
    partition  nothing crosses until `heal`, and then what was under way arrives, as with TCP
    drop       one connection is reset

All of it happens in one task's order of events (`Timeline`), so that only the order in which trio
runs ready tasks could differ between two runs; `ollamamax_p2p.testing.determinism` settles that.
"""

import hashlib
import logging
import math
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import trio

from ollamamax_p2p.errors import NotAdmitted, OmxError, PeerGone, PeerUnreachable
from ollamamax_p2p.host.peer_events import PeerEvents
from ollamamax_p2p.host.peer_host import Connection, PeerEvent, StreamHandler
from ollamamax_p2p.host.simulated_links import (
    LOCAL_NETWORK,
    FairQueue,
    Link,
    LinkConditions,
    Pipe,
    Segment,
    Timeline,
    pipes,
)
from ollamamax_p2p.identity import Address, PeerId, parse_address, peer_id_of

_log = logging.getLogger(__name__)


class SimulatedStream:
    """One side of a stream; see `ByteStream`."""

    def __init__(self, end: "_End", protocol: str, outgoing: Pipe, incoming: Pipe) -> None:
        self.peer = end.peer
        self.protocol = protocol
        self._end = end
        self._outgoing = outgoing
        self._incoming = incoming
        self._said_eof = False
        self._problem = ""  # why nothing works any more; empty while it does
        self._sending = trio.Lock()
        end.streams[self] = None
        incoming.reader = self

    async def send_all(self, data: bytes) -> None:
        """See `ByteStream`."""
        await self._end.host.runs()
        self._require(not self._sending.locked(), "two tasks send at once")
        async with self._sending:
            rest = memoryview(bytes(data))  # a copy only of what the caller could still change
            while rest:
                self._check_sending()
                taken = self._outgoing.take(rest)
                rest = rest[taken:]
                if rest:
                    await self._outgoing.writers.park()
                    await self._end.host.runs()
            self._check_sending()

    async def receive_some(self) -> bytes:
        """See `ByteStream`."""
        await self._end.host.runs()
        self._require(not self._incoming.readers, "two tasks receive at once")
        while True:
            self._check_whole()
            if self._incoming.arrived:
                return self._incoming.read()
            if self._incoming.ended:
                return b""
            await self._incoming.readers.park()
            await self._end.host.runs()

    async def send_eof(self) -> None:
        """See `ByteStream`."""
        await self._end.host.runs()
        self._check_whole()
        if not self._said_eof:
            self._said_eof = True
            self._outgoing.push_mark(self._outgoing.end)

    async def aclose(self) -> None:
        """See `ByteStream`. What was sent before still arrives."""
        self.close_now()
        await trio.lowlevel.checkpoint()

    def close_now(self) -> None:
        """`aclose` without the checkpoint."""
        if not self._problem:
            self._outgoing.push_mark(self._outgoing.end_both)
            self._fail("the stream was closed here")

    def reset(self) -> None:
        """End it at once; what is under way is lost, and the other side gets PeerGone."""
        if not self._problem:
            other = self._outgoing.reader
            if other is not None:
                self._end.tell(partial(other.lose, "the stream was reset"))
            self.lose("the stream was reset")

    def lose(self, problem: str) -> None:
        """Both ways are dead; whoever waits here gets PeerGone."""
        self._outgoing.dead = True
        self._fail(problem)

    def _fail(self, problem: str) -> None:
        if not self._problem:
            self._problem = problem
            self._incoming.dead = True
            self._incoming.arrived.clear()
            self._end.streams.pop(self, None)
            self._incoming.readers.unpark_all()
            self._outgoing.writers.unpark_all()

    @property
    def whole(self) -> bool:
        """Whether this side has neither closed nor lost it."""
        return not self._problem

    def _check_whole(self) -> None:
        if self._problem:
            raise PeerGone(self.peer, self._problem)

    def _check_sending(self) -> None:
        self._check_whole()
        if self._said_eof:
            raise PeerGone(self.peer, "this side has said that it sends nothing more")
        if self._outgoing.refused:
            raise PeerGone(self.peer, "the other side has closed the stream")

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise trio.BusyResourceError(f"{self.protocol} with {self.peer}: {problem}")


class SimulatedHost:
    """One host on a simulated network; see `PeerHost`. Made by `SimulatedNetwork.add_host`."""

    def __init__(
        self,
        network: "SimulatedNetwork",
        name: str,
        *,
        peer_id: PeerId,
        transport: str,
        swarm_key: bytes | None,
    ) -> None:
        self.name = name
        self.peer_id = peer_id
        self.addresses: tuple[Address, ...] = (parse_address(f"{transport}/p2p/{peer_id}"),)
        self.swarm_key = swarm_key
        self.alive = True
        self.frozen = False
        self.bytes_sent = 0
        """Of all streams, since it was added."""
        self.bytes_received = 0
        self.upload = FairQueue(network.timeline, math.inf, self._depart)
        self.download = FairQueue(network.timeline, math.inf, self._arrive)
        self._network = network
        self._ends: dict[PeerId, list[_End]] = {}
        self._admitted: set[PeerId] = set()
        self._handlers: dict[str, tuple[StreamHandler, bool]] = {}
        self._events = PeerEvents(self.peer_id)
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._thaw = trio.lowlevel.ParkingLot()
        self._undelivered: list[Callable[[], None]] = []

    # -- what PeerHost promises

    async def connect(self, addresses: Sequence[Address]) -> PeerId:
        """See `PeerHost`."""
        peers = {address.peer for address in addresses}
        if len(peers) != 1:
            raise ValueError(f"connect takes addresses of one peer, not of {len(peers)}")
        (peer,) = peers
        await self.runs()
        if not self.alive:
            raise PeerUnreachable(peer, "this host is down")
        if peer == self.peer_id:
            raise PeerUnreachable(peer, "that is this node itself")
        async with self._dialling.setdefault(peer, trio.Lock()):
            if peer not in self._ends:
                await self._dial_each(addresses)
        return peer

    async def _dial_each(self, addresses: Sequence[Address]) -> None:
        problem = ""
        for address in addresses:
            problem = await self._network.dial(self, address)
            if not problem:
                return
        raise PeerUnreachable(addresses[-1].peer, problem)

    async def disconnect(self, peer: PeerId) -> None:
        """See `PeerHost`."""
        await self.runs()
        for end in list(self._ends.get(peer, ())):
            end.reset("this side ended the connection")

    def connections(self) -> tuple[Connection, ...]:
        """See `PeerHost`."""
        return tuple(
            Connection(peer, ends[-1].address, ends[-1].inbound, self.is_admitted(peer))
            for peer, ends in self._ends.items()
        )

    async def open_stream(self, peer: PeerId, protocol: str) -> SimulatedStream:
        """See `PeerHost`."""
        await self.runs()
        ends = self._ends.get(peer)
        if not ends:
            raise PeerGone(peer, "it is not connected")
        return await self._network.open_stream(ends[-1], protocol)

    def set_handler(
        self, protocol: str, handler: StreamHandler, *, for_strangers: bool = False
    ) -> None:
        """See `PeerHost`."""
        self._handlers[protocol] = (handler, for_strangers)

    def admit(self, peer: PeerId) -> None:
        """See `PeerHost`. A peer that is not connected (any more) is not admitted."""
        if peer in self._ends:
            self._admitted.add(peer)

    def expel(self, peer: PeerId) -> None:
        """See `PeerHost`."""
        self._admitted.discard(peer)

    def is_admitted(self, peer: PeerId) -> bool:
        """See `PeerHost`."""
        return peer in self._admitted

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[PeerEvent]]:
        """See `PeerHost`."""
        return self._events.watch()

    # -- what the network does with it

    def __repr__(self) -> str:
        return f"<simulated host {self.name}>"

    async def runs(self) -> None:
        """A checkpoint that lasts while the host is frozen: every call a program makes begins so,
        and every one that waited ends so.
        """
        await trio.lowlevel.checkpoint()
        while self.frozen:
            await self._thaw.park()

    def deliver(self, action: Callable[[], None]) -> None:
        """Something arrived that the program, not its kernel, must act on: when it runs."""
        if self.frozen:
            self._undelivered.append(action)
        elif self.alive:
            action()

    def set_frozen(self, frozen: bool) -> None:
        """Stop or continue the program."""
        self.frozen = frozen
        if not frozen:
            self._thaw.unpark_all()
            waiting, self._undelivered = self._undelivered, []
            for action in waiting:
                action()

    def go_down(self) -> None:
        """Everything it had on the network ends."""
        self._undelivered.clear()
        self.set_frozen(False)
        for end in [end for ends in self._ends.values() for end in ends]:
            end.reset("this host went down")
        self.alive = False

    def door(self, peer: PeerId, protocol: str) -> StreamHandler | None:
        """The handler that answers this peer, if any does."""
        handler, for_strangers = self._handlers.get(protocol, (None, False))
        return handler if for_strangers or self.is_admitted(peer) else None

    def add_end(self, end: "_End") -> None:
        """A connection is made."""
        self._ends.setdefault(end.peer, []).append(end)
        if len(self._ends[end.peer]) == 1:
            self._report(PeerEvent(end.peer, "connected"))

    def remove_end(self, end: "_End") -> None:
        """A connection has ended."""
        self._ends[end.peer].remove(end)
        if not self._ends[end.peer]:
            del self._ends[end.peer]
            self._admitted.discard(end.peer)
            self._report(PeerEvent(end.peer, "disconnected"))

    def ends_with(self, peer: PeerId) -> tuple["_End", ...]:
        """This side of every connection with the peer."""
        return tuple(self._ends.get(peer, ()))

    def _report(self, event: PeerEvent) -> None:
        self._network.note(f"{self.name} {event.change} {self._network.name_of(event.peer)}")
        self._events.report(event)

    def _depart(self, segment: Segment) -> None:
        self.bytes_sent += segment.size
        segment.pipe.link.queue.push(segment)

    def _arrive(self, segment: Segment) -> None:
        self.bytes_received += segment.size
        segment.arrive()


class SimulatedNetwork:
    """Hosts and what is between them. Made by `open_simulated_network`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        rng: random.Random,
        conditions: LinkConditions,
        trace: Callable[[str], None] | None,
    ) -> None:
        self.timeline = Timeline()
        self.rng = rng
        self.conditions = conditions
        self._nursery = nursery
        self._trace = trace
        self._hosts: dict[PeerId, SimulatedHost] = {}
        self._by_transport: dict[str, SimulatedHost] = {}
        self._links: dict[tuple[SimulatedHost, SimulatedHost], Link] = {}
        self._partitions: list[Partition] = []
        self._dials = 0

    # -- building it

    def add_host(
        self,
        name_or_key: str | bytes,
        *,
        swarm_key: bytes | None = None,
        upload_bytes_s: float = math.inf,
        download_bytes_s: float = math.inf,
    ) -> SimulatedHost:
        """A new host that can be dialled at once.

        name_or_key: a name, from which its key is made, the same in every run; or the 32 bytes of
        an Ed25519 private key.
        swarm_key: hosts whose keys differ cannot finish a handshake; None is the open swarm.
        """
        name = name_or_key if isinstance(name_or_key, str) else name_or_key.hex()[:8]
        peer_id = peer_id_of(_public_key(name_or_key))
        if peer_id in self._hosts:
            raise ValueError(f"there is a host {name} already")
        number = len(self._hosts) + 1
        host = SimulatedHost(
            self,
            name,
            peer_id=peer_id,
            transport=f"/ip4/10.{number >> 16}.{number >> 8 & 255}.{number & 255}/tcp/4011",
            swarm_key=swarm_key,
        )
        self._hosts[peer_id] = self._by_transport[host.addresses[0].transport] = host
        self.set_rates(host, upload_bytes_s=upload_bytes_s, download_bytes_s=download_bytes_s)
        return host

    def host_of(self, peer: PeerId) -> SimulatedHost:
        """The host with that id. Raises KeyError."""
        return self._hosts[peer]

    def set_rates(
        self,
        host: SimulatedHost,
        *,
        upload_bytes_s: float | None = None,
        download_bytes_s: float | None = None,
    ) -> None:
        """Change a host's own link from the next segment on; None leaves a rate as it is."""
        if upload_bytes_s is not None:
            host.upload.rate = upload_bytes_s
        if download_bytes_s is not None:
            host.download.rate = download_bytes_s

    def set_link(
        self, one: SimulatedHost, other: SimulatedHost, conditions: LinkConditions
    ) -> None:
        """Conditions of the way between two hosts, both directions, from the next segment and the
        next stream on.
        """
        for link in (self.link(one, other), self.link(other, one)):
            link.set_conditions(conditions)

    # -- what goes wrong

    def kill(self, host: SimulatedHost) -> None:
        """The host vanishes: connections end on both sides, dials are refused until `revive`.

        What runs on it keeps its handlers and its tasks; stopping those is their owner's part.
        """
        self.note(f"kill {host.name}")
        host.go_down()

    def revive(self, host: SimulatedHost) -> None:
        """A killed host can dial and be dialled again; it begins without connections."""
        self.note(f"revive {host.name}")
        host.alive = True

    def freeze(self, host: SimulatedHost) -> None:
        """The host's program stops as by SIGSTOP; its connections stay."""
        self.note(f"freeze {host.name}")
        host.set_frozen(True)

    def thaw(self, host: SimulatedHost) -> None:
        """A frozen host goes on, with all that arrived meanwhile."""
        self.note(f"thaw {host.name}")
        host.set_frozen(False)

    def partition(
        self, group_a: Iterable[SimulatedHost], group_b: Iterable[SimulatedHost] | None = None
    ) -> "Partition":
        """Let nothing cross between the groups; without a second one, between the first and all
        others, those added later too. Partitions add up.
        """
        side_a = frozenset(host.peer_id for host in group_a)
        side_b = None if group_b is None else frozenset(host.peer_id for host in group_b)
        self._partitions.append(Partition(side_a, side_b))
        self.note(f"partition of {len(side_a)}")
        return self._partitions[-1]

    def heal(self, partition: "Partition | None" = None) -> None:
        """End one partition, or all; what was under way goes on. One that is healed already stays
        so.
        """
        self.note("heal")
        self._partitions = [
            other for other in self._partitions if partition is not None and other is not partition
        ]
        for link in self._links.values():
            link.go_on()

    def drop(self, one: SimulatedHost, other: SimulatedHost) -> None:
        """Reset the connections between two hosts; both sides see it at once."""
        self.note(f"drop {one.name} {other.name}")
        for end in (*one.ends_with(other.peer_id), *other.ends_with(one.peer_id)):
            end.lose("the connection was reset")

    # -- what hosts and links ask of it

    def is_cut(self, source: SimulatedHost, target: SimulatedHost) -> bool:
        """Whether a partition lies between them."""
        return any(cut.separates(source.peer_id, target.peer_id) for cut in self._partitions)

    def name_of(self, peer: PeerId) -> str:
        """For the trace: the host's name."""
        return self._hosts[peer].name

    def note(self, text: str) -> None:
        """Write a line of the trace."""
        if self._trace is not None:
            self._trace(f"{self.timeline.now():.9f} {text}")

    async def dial(self, source: SimulatedHost, address: Address) -> str:
        """Connect; gives "" or what went wrong."""
        problem = f"no answer within {self.conditions.dial_timeout_s:g} s"
        with trio.move_on_after(self.conditions.dial_timeout_s):
            problem = await self._handshake(source, address)
        self.note(f"{source.name} dials {address.transport}: {problem or 'connected'}")
        return problem

    async def _handshake(self, source: SimulatedHost, address: Address) -> str:
        """Two round trips, as Noise over TCP has them, and who is who in between."""
        target = self._by_transport.get(address.transport)
        if target is None or not target.alive:
            await trio.sleep(2 * self.conditions.latency_s)
            return "connection refused"
        there, back = self.link(source, target), self.link(target, source)
        await there.cross()
        await back.cross()
        await there.cross()
        if target.peer_id != address.peer:
            await back.cross()
            return f"another peer answered there: {target.peer_id}"
        if source.swarm_key != target.swarm_key:
            await back.cross()
            return "the handshake failed: it is not of our swarm"
        return await self._establish(source, target, back)

    async def _establish(self, source: SimulatedHost, target: SimulatedHost, back: Link) -> str:
        """The answering side has its connection first; the dialling one when it hears of it."""
        self._dials += 1
        outbound = _End(self, source, target, target.addresses[0].transport, inbound=False)
        from_port = f"{source.addresses[0].transport.rpartition('/')[0]}/{40_000 + self._dials}"
        inbound = _End(self, target, source, from_port, inbound=True)
        outbound.other, inbound.other = inbound, outbound
        inbound.begin()
        heard = False
        try:
            await back.cross()
            heard = inbound.alive and source.alive
        finally:
            if not heard:
                outbound.tell(partial(inbound.lose, "the dialling side gave up"))
        if not heard:
            return "it ended the connection at once"
        outbound.begin()
        self._limit_life(outbound)
        return ""

    def _limit_life(self, end: "_End") -> None:
        mean_s = self.link(end.host, end.remote).conditions.connection_life_s_mean
        if math.isfinite(mean_s):
            life_s = self.rng.expovariate(1 / mean_s)
            self.timeline.at(self.timeline.now() + life_s, end.reset, "the connection was reset")

    async def open_stream(self, end: "_End", protocol: str) -> SimulatedStream:
        """Ask the other side for the protocol. Raises PeerGone, NotAdmitted."""
        there, back = self.link(end.host, end.remote), self.link(end.remote, end.host)
        stream = SimulatedStream(end, protocol, *pipes(there, back))
        answer = _Answer()
        there.carry(partial(end.remote.deliver, partial(self._answer, stream, end, answer)))
        end.opening[answer] = None
        try:
            with trio.move_on_after(there.conditions.dial_timeout_s):
                await answer.given.wait()
        finally:
            end.opening.pop(answer, None)
            if answer.accepted is not True:
                stream.reset()
        await end.host.runs()
        if answer.accepted is False:
            raise NotAdmitted(end.peer, f"it does not answer {protocol} for us")
        if answer.accepted is None:
            raise PeerGone(end.peer, "it did not answer" if end.alive else "the connection ended")
        return stream

    def _answer(self, asking: SimulatedStream, end: "_End", answer: "_Answer") -> None:
        """On the side that is asked."""
        other = end.other
        if not other.alive or not asking.whole:
            return
        handler = other.host.door(other.peer, asking.protocol)
        self.note(
            f"{end.host.name} opens {asking.protocol} to {other.host.name}:"
            f" {'yes' if handler else 'no'}"
        )
        if handler is not None:
            answering = SimulatedStream(other, asking.protocol, asking._incoming, asking._outgoing)
            self._nursery.start_soon(self._serve, answering, handler)
        other.tell(partial(answer.give, handler is not None))

    async def _serve(self, stream: SimulatedStream, handler: StreamHandler) -> None:
        """One stream's task: its peer's errors are logged and end it, our own travel up."""
        try:
            await handler(stream)
        except* OmxError as group:
            error = _first(group)
            # A peer that goes is nobody's fault.
            level = logging.INFO if isinstance(error, PeerGone) else logging.WARNING
            _log.log(level, "%s with %s ended: %s", stream.protocol, stream.peer, error)
            stream.reset()
        finally:
            stream.close_now()

    def link(self, source: SimulatedHost, target: SimulatedHost) -> Link:
        """The way from one to the other."""
        try:
            return self._links[source, target]
        except KeyError:
            link = self._links[source, target] = Link(
                source,
                target,
                self.conditions,
                timeline=self.timeline,
                rng=self.rng,
                is_cut=partial(self.is_cut, source, target),
            )
            return link


@asynccontextmanager
async def open_simulated_network(
    *,
    rng: random.Random,
    conditions: LinkConditions = LOCAL_NETWORK,
    trace: Callable[[str], None] | None = None,
) -> AsyncIterator[SimulatedNetwork]:
    """A network for as long as the block is open; its end ends every handler.

    rng: all dice of the network; seed it to have the same run again.
    conditions: of every link that `set_link` does not change.
    trace: is given a line with the virtual time for everything that happens to a connection.
    """
    async with trio.open_nursery() as nursery:
        network = SimulatedNetwork(nursery, rng=rng, conditions=conditions, trace=trace)
        nursery.start_soon(network.timeline.run)
        yield network
        nursery.cancel_scope.cancel()


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """What `SimulatedNetwork.partition` made and `heal` takes."""

    side_a: frozenset[PeerId]
    side_b: frozenset[PeerId] | None
    """None: everybody who is not in side_a."""

    def separates(self, one: PeerId, other: PeerId) -> bool:
        """Whether the two are on different sides."""
        return self._from_a_to_b(one, other) or self._from_a_to_b(other, one)

    def _from_a_to_b(self, one: PeerId, other: PeerId) -> bool:
        if one not in self.side_a:
            return False
        return other not in self.side_a if self.side_b is None else other in self.side_b


# -- connections -------------------------------------------------------------------------------


class _End:
    """One side of a connection. The two sides may disagree for a while: a reset travels too."""

    other: "_End"

    def __init__(
        self,
        network: SimulatedNetwork,
        host: SimulatedHost,
        remote: SimulatedHost,
        address: str,
        *,
        inbound: bool,
    ) -> None:
        self.host = host
        self.remote = remote
        self.peer = remote.peer_id
        self.address = address
        self.inbound = inbound
        self.alive = False
        self.streams: dict[SimulatedStream, None] = {}  # in order, unlike a set
        self.opening: dict[_Answer, None] = {}
        self._link = network.link(host, remote)

    def begin(self) -> None:
        """The handshake is done on this side."""
        self.alive = True
        self.host.add_end(self)

    def tell(self, action: Callable[[], None]) -> None:
        """Have the other side's program do something, when this arrives there."""
        self._link.carry(partial(self.remote.deliver, action))

    def reset(self, problem: str) -> None:
        """End it here now, and there when the news arrives."""
        if self.alive:
            self.tell(partial(self.other.lose, "the other side ended the connection"))
            self.lose(problem)

    def lose(self, problem: str) -> None:
        """It has ended on this side."""
        if not self.alive:
            return
        self.alive = False
        for stream in list(self.streams):
            stream.lose(problem)
        for answer in self.opening:
            answer.given.set()
        self.host.remove_end(self)


class _Answer:
    """Whether the other side takes a stream; None while it has not said."""

    def __init__(self) -> None:
        self.accepted: bool | None = None
        self.given = trio.Event()

    def give(self, accepted: bool) -> None:
        """The answer has arrived."""
        self.accepted = accepted
        self.given.set()


def _public_key(name_or_key: str | bytes) -> bytes:
    # Imported here: it takes 30 ms, and whoever imports the package may never add a host.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    seed = (
        hashlib.sha256(name_or_key.encode()).digest()
        if isinstance(name_or_key, str)
        else name_or_key
    )
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def _first(group: BaseException) -> BaseException:
    """The first of the errors in a group of groups."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group

"""PeerHost over py-libp2p: TCP and WebSocket, Noise, yamux, an optional pre-shared swarm key.

Start at `open_libp2p_host`. Three layers keep strangers out, from the outside in:

1. the swarm key: without it no handshake succeeds (a private swarm);
2. the door (`_door`): a peer that is not admitted can negotiate only the protocols registered
   `for_strangers`; identify, ping and everything else that py-libp2p answers is behind it too;
3. outward, py-libp2p's own services open no stream to a peer before we have admitted it.

py-libp2p is told as little as possible to do by itself: it dials nobody on its own, prunes nothing,
identifies nobody before admission. What it does wrong and what we do about that is in
docs/py-libp2p.md, with the version; each place here that exists for such a reason says so.
"""

import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import lru_cache, partial
from typing import Any, cast

import trio
from libp2p import new_host
from libp2p.abc import IHost, INetConn, INetStream, INotifee
from libp2p.connection_types import ConnectionType
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.exceptions import StreamFailure
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection import swarm_connection
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectError, ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.rcmgr import Direction, ResourceManager
from libp2p.rcmgr.manager import ResourceLimits
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.websocket.transport import WebsocketTransport
from multiaddr import Multiaddr

from ollamamax_p2p.errors import (
    BadInput,
    BadPeerId,
    NotAdmitted,
    OmxError,
    PeerGone,
    PeerMisbehaved,
    PeerUnreachable,
    PortInUse,
)
from ollamamax_p2p.host.libp2p_muxer import BoundedMuxer, BoundedYamux
from ollamamax_p2p.host.libp2p_streams import Libp2pStream
from ollamamax_p2p.host.libp2p_swarm_key import check_swarm_keys
from ollamamax_p2p.host.listen_addresses import check_listen, per_interface
from ollamamax_p2p.host.peer_events import PeerEvents
from ollamamax_p2p.host.peer_host import Connection, PeerEvent, StreamHandler
from ollamamax_p2p.host.reachability import Reachability, open_reachability
from ollamamax_p2p.host.settings import HostSettings
from ollamamax_p2p.identity import Address, PeerId, parse_address, parse_peer_id, parse_transport

CONNECTIONS_PER_PEER_MAX = 4
"""Both sides may dial at once, and a relayed connection is followed by a direct one."""

STREAMS_PER_PEER_MAX = 128
"""Inbound and open at once; our protocols keep fewer than ten and open a few short ones."""

STREAMS_PER_STRANGER_MAX = 8
"""Before admission there is the join protocol to speak, and nothing else."""

HANDSHAKES_MAX = 128
"""Inbound connections that have not proved anything yet; each is bounded in time as well."""

HANDSHAKES_PER_IP_MAX = 32
"""One machine that opens connections and says nothing leaves room for others. Behind one NAT, 32
nodes can join at the same moment.
"""

DIAL_STAGGER_S = 0.25
"""The next address of a peer is tried beside one that has not answered for so long (RFC 8305)."""

DIAL_ADDRESSES_MAX = 16
"""Of one peer at one time; nobody has more good ones."""

CLOSE_TIMEOUT_S = 0.9
"""For everything that leaving the block does."""

PEER_IDS_CACHED_MAX = 1_024
"""Each frame with data asks whether its peer is admitted; to write its id costs 0.1 ms."""

IDENTIFY_PAUSES_S = (0.0, 0.5, 2.0, 10.0)
"""We may admit a peer a moment before it admits us, and until then it answers no identify."""

_log = logging.getLogger(__name__)


@asynccontextmanager
async def open_libp2p_host(
    key_seed: bytes,
    settings: HostSettings,
    *,
    swarm_key: bytes | None,
    admit_all: bool = False,
) -> "AsyncIterator[Libp2pHost]":
    """Be on the network for as long as the block is open; leaving it takes less than a second.

    key_seed: the 32 bytes of the node's Ed25519 key.
    swarm_key: the 32 bytes that all nodes of a private swarm share; None speaks to any libp2p.
    admit_all: whether every peer is admitted as it connects (an open swarm).
    Raises BadAddress or BadPeerId (settings.listen, settings.announce) and PortInUse.
    """
    _quiet_libp2p()
    check_swarm_keys()
    listen = [Multiaddr(text) for text in await check_listen(settings.listen)]
    announce = [parse_transport(text) for text in settings.announce]
    libp2p = _new_libp2p(key_seed, settings, swarm_key)
    async with trio.open_nursery() as nursery:
        host = Libp2pHost(libp2p, settings, nursery=nursery, announce=announce, admit_all=admit_all)
        closing = trio.Event()
        await nursery.start(_run, host, listen, closing)
        try:
            yield host
        finally:
            closing.set()
            nursery.cancel_scope.cancel()


async def _run(
    host: "Libp2pHost",
    listen: Sequence[Multiaddr],
    closing: trio.Event,
    *,
    task_status: trio.TaskStatus[None],
) -> None:
    """Run py-libp2p until closing is set.

    Shielded, because when it is cancelled it leaves sockets open: connections that it had dialled,
    and the ports it listens on.
    """
    with trio.CancelScope(shield=True) as scope:
        async with host.libp2p.run(listen):
            _check_listening(host.libp2p, listen)
            async with _relays(host):
                task_status.started()
                await closing.wait()
                scope.deadline = trio.current_time() + CLOSE_TIMEOUT_S
                await host.go_offline()


@asynccontextmanager
async def _relays(host: "Libp2pHost") -> AsyncIterator[None]:
    """Reach and be reached through relays, if the settings say so."""
    settings = host.settings
    if not (settings.relay or settings.relay_for_others):
        yield
        return
    async with open_reachability(
        host.libp2p, host.is_member, relay_for_others=settings.relay_for_others
    ) as reachability:
        host.reachability = reachability
        yield


class Libp2pHost:
    """See `PeerHost`; made by `open_libp2p_host`.

    `libp2p` is py-libp2p's own host, for discovery only: what it opens by itself goes through the
    same door.
    """

    def __init__(
        self,
        libp2p: Any,
        settings: HostSettings,
        *,
        nursery: trio.Nursery,
        announce: Sequence[str],
        admit_all: bool,
    ) -> None:
        """libp2p: a BasicHost that does not run yet; its hooks are set here."""
        self.libp2p: IHost = libp2p
        self.peer_id = parse_peer_id(libp2p.get_id().to_base58())
        self._basic = libp2p
        self._swarm = libp2p.get_network()
        self.settings = settings
        self._nursery = nursery
        self._announce = announce
        self._admit_all = admit_all
        self._connected: set[PeerId] = set()
        self._admitted: set[PeerId] = set()
        self._stranger_protocols = Multiselect()
        self._open_inbound: Counter[PeerId] = Counter()
        self._handshakes: Counter[str] = Counter()
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._events = PeerEvents(self.peer_id)
        self.reachability: Reachability | None = None
        self._take_over()

    def __repr__(self) -> str:
        return f"<libp2p host {self.peer_id}>"

    # -- where we are

    @property
    def addresses(self) -> tuple[Address, ...]:
        """See `PeerHost`."""
        if self._announce:
            return tuple(parse_address(f"{text}/p2p/{self.peer_id}") for text in self._announce)
        found = per_interface(str(each) for each in self._basic.get_transport_addrs())
        listening = [parse_address(f"{text}/p2p/{self.peer_id}") for text in found]
        relayed = self.reachability.addresses if self.reachability else ()
        return tuple(dict.fromkeys([*listening, *self._observed(), *relayed]))

    @property
    def listening(self) -> tuple[str, ...]:
        """The transport addresses in `HostSettings.listen`, with the ports that were taken."""
        found = (str(each).partition("/p2p/")[0] for each in self._basic.get_transport_addrs())
        return tuple(dict.fromkeys(found))

    def _observed(self) -> Iterator[Address]:
        """Where several members say that they see us: what a NAT made of a listening address."""
        for each in self._basic._observed_addr_manager.addrs():
            with suppress(BadInput):
                yield parse_address(f"{str(each).partition('/p2p/')[0]}/p2p/{self.peer_id}")

    # -- connections

    async def connect(self, addresses: Sequence[Address]) -> PeerId:
        """See `PeerHost`."""
        peers = {address.peer for address in addresses}
        if len(peers) != 1:
            raise ValueError(f"connect takes addresses of one peer, not of {len(peers)}")
        (peer,) = peers
        await trio.lowlevel.checkpoint()
        if peer == self.peer_id:
            raise PeerUnreachable(peer, "that is this node itself")
        lock = self._dialling.setdefault(peer, trio.Lock())
        try:
            async with lock:
                if peer not in self._connected:
                    await self._dial_first(sorted(addresses, key=_detour)[:DIAL_ADDRESSES_MAX])
        finally:
            if not lock.locked():
                self._dialling.pop(peer, None)
        return peer

    async def _dial_first(self, addresses: Sequence[Address]) -> None:
        """Dial them, each a little after the one before, until one answers."""
        problems: list[str] = []
        async with trio.open_nursery() as nursery:
            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(self._dial, address, problems, failed, nursery.cancel_scope)
                with trio.move_on_after(DIAL_STAGGER_S):
                    await failed.wait()
        peer = addresses[0].peer
        if peer not in self._connected:
            raise PeerUnreachable(
                peer, problems[-1] if problems else "the connection ended at once"
            )

    async def _dial(
        self,
        address: Address,
        problems: list[str],
        failed: trio.Event,
        others: trio.CancelScope,
    ) -> None:
        try:
            with trio.fail_after(self.settings.dial_timeout_s):
                await self._dial_one(address)
            others.cancel()
        except trio.TooSlowError:
            seconds = self.settings.dial_timeout_s
            problems.append(f"{address.transport} did not answer within {seconds:g} s")
        except (BaseLibp2pError, OSError, ValueError) as error:
            problems.append(f"{address.transport}: {_reason(error)}")
        failed.set()

    async def _dial_one(self, address: Address) -> None:
        if "/p2p-circuit" in address.transport:
            if self.reachability is None:
                raise OSError("relays are turned off here (relay = false)")
            await self.reachability.dial(address)
            return
        # dial_addr, not dial_peer: that one remembers a failed peer for a minute and skips loopback
        # addresses beside public ones.
        await self._swarm.dial_addr(Multiaddr(str(address)), ID.from_base58(address.peer))

    async def disconnect(self, peer: PeerId) -> None:
        """See `PeerHost`."""
        await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            for connection in self._swarm.get_connections(ID.from_base58(peer)):
                nursery.start_soon(connection.close)

    async def go_offline(self) -> None:
        """Stop listening and end every connection, all at once: py-libp2p takes 0.2 s for each."""
        with trio.move_on_after(CLOSE_TIMEOUT_S / 2):
            async with trio.open_nursery() as nursery:
                for listener in list(self._swarm.listeners.values()):
                    nursery.start_soon(listener.close)
                for connection in self._swarm.get_connections():
                    nursery.start_soon(connection.close)

    def connections(self) -> tuple[Connection, ...]:
        """See `PeerHost`."""
        return tuple(
            Connection(
                peer,
                _address_of(best),
                best.direction == Direction.INBOUND,
                self.is_admitted(peer),
            )
            for peer in self._connected
            if (best := self._best_connection(peer)) is not None
        )

    def _best_connection(self, peer: PeerId) -> Any:
        """A direct one rather than a relayed one, and the newest of those."""
        found = self._swarm.get_connections(ID.from_base58(peer))
        usable = [each for each in found if not each.is_closed]
        return max(usable, key=_preference, default=None)

    # -- streams

    async def open_stream(self, peer: PeerId, protocol: str) -> Libp2pStream:
        """See `PeerHost`."""
        await trio.lowlevel.checkpoint()
        connection = self._best_connection(peer)
        if connection is None:
            raise PeerGone(peer, "it is not connected")
        try:
            with trio.fail_after(self.settings.dial_timeout_s):
                net_stream = await connection.new_stream()
                await self._ask_for(net_stream, protocol)
        except trio.TooSlowError:
            # The peer may have another one that is well, and ours would stay the newest for ever.
            self._nursery.start_soon(connection.close)
            raise PeerGone(peer, f"it did not answer to {protocol}") from None
        except ProtocolNotSupportedError:
            raise NotAdmitted(peer, f"it does not speak {protocol} with this node") from None
        except (BaseLibp2pError, OSError, ValueError) as error:
            # ValueError: py-libp2p decodes what the peer answers as UTF-8, whatever it is.
            raise PeerGone(peer, _reason(error)) from error
        return self._stream(net_stream, peer, protocol)

    async def _ask_for(self, net_stream: NetStream, protocol: str) -> None:
        """Negotiate; a stream that does not come about is reset."""
        agreed = False
        try:
            client, communicator = MultiselectClient(), MultiselectCommunicator(net_stream)
            await client.handshake(communicator)
            await client.try_select(communicator, TProtocol(protocol))
            agreed = True
        finally:
            if not agreed:
                with trio.CancelScope(shield=True):
                    await net_stream.reset()
        net_stream.set_protocol(TProtocol(protocol))

    def _stream(self, net_stream: INetStream, peer: PeerId, protocol: str) -> Libp2pStream:
        return Libp2pStream(cast("NetStream", net_stream), peer, protocol, linger=self._linger)

    def _linger(self, stream: Libp2pStream) -> None:
        self._nursery.start_soon(stream.until_other_side_ended)

    def set_handler(
        self, protocol: str, handler: StreamHandler, *, for_strangers: bool = False
    ) -> None:
        """See `PeerHost`."""
        answer = partial(self._answer, protocol, handler)
        self._basic.set_stream_handler(protocol, answer)
        if for_strangers:
            self._stranger_protocols.add_handler(TProtocol(protocol), answer)
        else:
            self._stranger_protocols.remove_handler(TProtocol(protocol))

    async def _answer(self, protocol: str, handler: StreamHandler, net_stream: INetStream) -> None:
        """Run a handler in our nursery, so that its bugs reach us and not py-libp2p."""
        done = trio.Event()
        stream = self._stream(net_stream, _peer_of(net_stream.muxed_conn.peer_id), protocol)
        self._nursery.start_soon(self._run_handler, handler, stream, done)
        await done.wait()

    async def _run_handler(
        self, handler: StreamHandler, stream: Libp2pStream, done: trio.Event
    ) -> None:
        try:
            await handler(stream)
        except* OmxError as group:
            for error in _leaves(group):
                level = logging.WARNING if isinstance(error, PeerMisbehaved) else logging.DEBUG
                _log.log(level, "%s with %s: %s", stream.protocol, stream.peer, error)
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()
            done.set()

    # -- admission

    def admit(self, peer: PeerId) -> None:
        """See `PeerHost`. A peer that is not connected (any more) is not admitted."""
        if peer in self._connected and peer not in self._admitted:
            self._admitted.add(peer)
            self._nursery.start_soon(self._identify, peer)

    def expel(self, peer: PeerId) -> None:
        """See `PeerHost`."""
        self._admitted.discard(peer)

    def is_admitted(self, peer: PeerId) -> bool:
        """See `PeerHost`."""
        return self._admit_all or peer in self._admitted

    def is_member(self, libp2p_id: ID) -> bool:
        """`is_admitted` for py-libp2p's ids, of peers that are connected."""
        try:
            peer = _peer_of(libp2p_id)
        except BadPeerId:
            return False
        return peer in self._connected and self.is_admitted(peer)

    async def _door(self, net_stream: NetStream) -> None:
        """Every stream that a peer opens comes through here."""
        # Whatever is raised here would end py-libp2p's service and with it the program: a protocol
        # name that is not UTF-8 is enough (docs/py-libp2p.md).
        peer: PeerId | None = None
        try:
            peer = _peer_of(net_stream.muxed_conn.peer_id)
            self._open_inbound[peer] += 1
            await self._let_in(peer, net_stream)
        except Exception as error:  # noqa: BLE001 - see above; ours are raised in our own nursery
            _log.debug("a stream from %s failed: %s", peer, _reason(error))
            await net_stream.reset()
        finally:
            if peer is not None:
                self._open_inbound[peer] -= 1
                if not self._open_inbound[peer]:
                    del self._open_inbound[peer]

    async def _let_in(self, peer: PeerId, net_stream: NetStream) -> None:
        admitted = self.is_admitted(peer)
        limit = STREAMS_PER_PEER_MAX if admitted else STREAMS_PER_STRANGER_MAX
        if self._open_inbound[peer] > limit:
            await net_stream.reset()
            return
        protocols = self._basic.multiselect if admitted else self._stranger_protocols
        try:
            protocol, handler = await protocols.negotiate(
                MultiselectCommunicator(net_stream), int(self.settings.dial_timeout_s) or 1
            )
        except MultiselectError:
            protocol = handler = None
        if protocol is None or handler is None:
            await net_stream.reset()
            return
        net_stream.set_protocol(protocol)
        await handler(net_stream)

    async def _identify(self, peer: PeerId) -> None:
        """Learn a member's protocols and addresses, and what address it sees us at."""
        libp2p_id = ID.from_base58(peer)
        for pause in IDENTIFY_PAUSES_S:
            await trio.sleep(pause)
            if not self.is_admitted(peer) or peer not in self._connected:
                return
            try:
                await self._basic._identify_peer(libp2p_id, reason="admitted")
            except Exception as error:  # noqa: BLE001 - it parses what a peer sent
                _log.debug("identify of %s failed: %s", peer, _reason(error))
            if libp2p_id in self._basic._identified_peers:
                return

    # -- what happens

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[PeerEvent]]:
        """See `PeerHost`."""
        return self._events.watch()

    def _report(self, event: PeerEvent) -> None:
        self._events.report(event)

    def note_connected(self, libp2p_id: ID) -> None:
        """A connection was made; strangers' keys that are not Ed25519 have no place here."""
        try:
            peer = _peer_of(libp2p_id)
        except BadPeerId:
            return
        if peer in self._connected or not self._swarm.get_connections(libp2p_id):
            return
        self._connected.add(peer)
        self._report(PeerEvent(peer, "connected"))
        if self._admit_all:
            self._nursery.start_soon(self._identify, peer)

    def _note_ended(self, libp2p_id: ID) -> None:
        try:
            peer = _peer_of(libp2p_id)
        except BadPeerId:
            return
        if peer in self._connected and not self._swarm.get_connections(libp2p_id):
            self._connected.discard(peer)
            self._admitted.discard(peer)
            self._report(PeerEvent(peer, "disconnected"))

    # -- py-libp2p's own ways, replaced

    def _take_over(self) -> None:
        """Set the hooks by which py-libp2p does what we say."""
        swarm, basic = self._swarm, self._basic
        swarm.set_stream_handler(self._door)
        swarm.upgrader.muxer_multistream.is_admitted = self.is_member
        swarm.register_notifee(_Notifee(self))
        swarm.retry_config = RetryConfig(max_retries=0)  # connections.py retries
        swarm._handle_inbound_connection = self._accept
        swarm.auto_connector.maybe_connect = trio.lowlevel.checkpoint  # else it dials whom it knows
        basic._schedule_identify = lambda peer_id, *, reason: None  # `admit` does

        original_remove = swarm.remove_conn

        def remove_conn(connection: Any) -> None:
            # The notifee hears of it 0.1 s later, when the peer may be back already.
            original_remove(connection)
            self._note_ended(connection.muxed_conn.peer_id)

        swarm.remove_conn = remove_conn

        original_stream = basic.new_stream

        async def new_stream(peer_id: ID, protocol_ids: Sequence[Any]) -> INetStream:
            if not self.is_admitted(_peer_of(peer_id)):
                raise StreamFailure(f"peer {peer_id} is not admitted")
            stream: INetStream = await original_stream(peer_id, protocol_ids)
            return stream

        basic.new_stream = new_stream

    async def _accept(self, raw_stream: Any, listener: Multiaddr) -> None:
        """Take an inbound connection and stay until it ends.

        py-libp2p's own would stay until the host closes, keep its place among the connections for
        so long, and so refuse everybody after `max_connections` peers have come and gone.
        """
        remote = raw_stream.get_remote_address()
        with self._handshake(remote[0] if remote else "") as welcome:
            if not welcome:
                await raw_stream.close()
                return
            try:
                muxed = await self._swarm.upgrade_inbound_raw_conn(
                    RawConnection(raw_stream, False), listener
                )
            except Exception as error:  # noqa: BLE001 - garbage makes it raise anything
                _log.debug("a connection from %s failed: %s", remote, _reason(error))
                return
        await muxed.event_closed.wait()

    @contextmanager
    def _handshake(self, ip: str) -> Iterator[bool]:
        """A place among the handshakes, if there is one."""
        welcome = (
            self._handshakes.total() < HANDSHAKES_MAX
            and self._handshakes[ip] < HANDSHAKES_PER_IP_MAX
        )
        self._handshakes[ip] += 1
        try:
            yield welcome
        finally:
            self._handshakes[ip] -= 1
            if not self._handshakes[ip]:
                del self._handshakes[ip]


class _Notifee(INotifee):
    """Tells the host of new connections."""

    def __init__(self, host: Libp2pHost) -> None:
        self._host = host

    async def connected(self, network: Any, conn: INetConn) -> None:
        self._host.note_connected(conn.muxed_conn.peer_id)

    async def disconnected(self, network: Any, conn: INetConn) -> None:
        pass

    async def opened_stream(self, network: Any, stream: INetStream) -> None:
        pass

    async def closed_stream(self, network: Any, stream: INetStream) -> None:
        pass

    async def listen(self, network: Any, multiaddr: Multiaddr) -> None:
        pass

    async def listen_close(self, network: Any, multiaddr: Multiaddr) -> None:
        pass


def _new_libp2p(key_seed: bytes, settings: HostSettings, swarm_key: bytes | None) -> Any:
    key_pair = create_new_key_pair(key_seed)
    noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    libp2p = new_host(
        key_pair=key_pair,
        psk=None if swarm_key is None else swarm_key.hex(),
        # By default it would also offer TLS, secio, no encryption at all, and mplex.
        sec_opt={NOISE: noise},
        muxer_opt={TProtocol(YAMUX): BoundedYamux},
        transports=[TCP()],
        # Not told where we shall listen: two addresses with one port (0 and 0, too) would get a
        # demultiplexer that knows TCP by its first three bytes, which a swarm key makes random.
        resource_manager=_resource_manager(settings),
        connection_config=_connection_config(settings),
        negotiate_timeout=int(settings.dial_timeout_s) or 1,
    )
    swarm: Any = libp2p.get_network()
    swarm.upgrader.muxer_multistream = BoundedMuxer({TProtocol(YAMUX): BoundedYamux})
    swarm.transport_manager.add_transport(WebsocketTransport(swarm.upgrader))
    return libp2p


def _connection_config(settings: HostSettings) -> ConnectionConfig:
    return ConnectionConfig(
        max_connections=settings.connections_max,
        # Zero: it would dial peers from its peerstore, members or not.
        min_connections=0,
        low_watermark=0,
        high_watermark=settings.connections_max,
        max_connections_per_peer=CONNECTIONS_PER_PEER_MAX,
        dial_timeout=settings.dial_timeout_s,
        inbound_upgrade_timeout=settings.dial_timeout_s,
        outbound_upgrade_timeout=settings.dial_timeout_s,
        inbound_stream_protocol_negotiation_timeout=settings.dial_timeout_s,
        outbound_stream_protocol_negotiation_timeout=settings.dial_timeout_s,
    )


def _resource_manager(settings: HostSettings) -> ResourceManager:
    """Counts connections and streams. Its circuit breaker stays off: five connections too many
    would make it refuse everybody for a minute.
    """
    return ResourceManager(
        limits=ResourceLimits(
            # Twice: an inbound connection counts twice while it is being made.
            max_connections=2 * settings.connections_max,
            max_streams=settings.connections_max * STREAMS_PER_PEER_MAX,
        ),
        enable_metrics=False,
        enable_connection_tracking=False,  # limits of its own, at 128 inbound; ours are above
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_rate_limiting=False,
    )


def _check_listening(libp2p: Any, listen: Sequence[Multiaddr]) -> None:
    """py-libp2p swallows an address that it cannot listen on. Raises PortInUse."""
    for address in listen:
        if str(address) not in libp2p.get_network().listeners:
            raise PortInUse(str(address), "--listen")


def _quiet_libp2p() -> None:
    """Keep py-libp2p from printing: it warns of every peer that comes and goes.

    OMX_LOG=libp2p shows it all (through the handlers that the program has set up).
    """
    logger = logging.getLogger("libp2p")
    logger.propagate = True
    logger.setLevel(logging.DEBUG if os.environ.get("OMX_LOG") == "libp2p" else logging.CRITICAL)
    logging.getLogger("multiaddr").setLevel(logging.WARNING)  # ten lines for each address it reads
    logging.getLogger("libp2p.network.auto_connector").setLevel(logging.NOTSET)  # INFO by itself
    # This module logs to the root logger, which makes Python install a handler on stderr.
    vars(swarm_connection)["logging"] = logging.getLogger("libp2p.network.connection")


@lru_cache(maxsize=PEER_IDS_CACHED_MAX)
def _peer_of(libp2p_id: ID) -> PeerId:
    return parse_peer_id(libp2p_id.to_base58())


def _address_of(connection: Any) -> str:
    """A relayed connection knows its circuit; with a swarm key, others know only their socket."""
    if _is_relayed(connection):
        return str(connection.get_transport_addresses()[0])
    remote = connection.muxed_conn.get_remote_address()
    if remote is None:
        return ""
    ip, port = remote
    return f"/ip{'6' if ':' in ip else '4'}/{ip}/tcp/{port}"


def _detour(address: Address) -> int:
    """TCP first; WebSocket carries a third of its rate, a relay somebody else's."""
    return ("/ws" in address.transport) + 2 * ("/p2p-circuit" in address.transport)


def _preference(connection: Any) -> tuple[bool, float]:
    return not _is_relayed(connection), connection._created_at


def _is_relayed(connection: Any) -> bool:
    return bool(connection.get_connection_type() == ConnectionType.RELAYED)


def _leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _reason(error: BaseException) -> str:
    """The innermost cause that says something, in a few words."""
    said = ""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror.lower()
        if isinstance(seen, BaseExceptionGroup):
            return _reason(seen.exceptions[0])
        said = str(seen) or said
        seen = seen.__cause__ or seen.__context__
    return " ".join(said.split())[:200] or type(error).__name__

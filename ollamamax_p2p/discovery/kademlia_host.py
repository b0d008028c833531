"""The host that py-libp2p's Kademlia is given: ours, seen through the interface it expects.

KadDHT 0.8.1 speaks `/ipfs/kad/1.0.0` whatever prefix it is given, trusts the peerstore without
bound, and reads messages of four megabytes. So it never meets the real host. This stand-in speaks
`/omx/kad/1.0.0` through `PeerHost` (so the members' door is its door), dials through the node's
connections (so a peer that Kademlia finds must prove that it is a member like any other), remembers
a bounded number of addresses, and lets pass only the messages that finding peers and holders needs.
docs/adr/0005-kademlia-behind-our-own-host.md tells why.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from libp2p.abc import IHost
from libp2p.kad_dht.common import PROTOCOL_ID as LIBRARY_PROTOCOL
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from ollamamax_p2p.discovery.core.provider_messages import ADDRESSES_MAX
from ollamamax_p2p.discovery.neighbours import Neighbours, linked_peers
from ollamamax_p2p.errors import BadInput, MalformedMessage, OmxError, PeerNotFound
from ollamamax_p2p.host import ByteStream, PeerHost
from ollamamax_p2p.identity import Address, PeerId, parse_address, parse_peer_id
from ollamamax_p2p.wire import protocol_ids

KADEMLIA = protocol_ids.DHT_PREFIX + "/kad/1.0.0"

MESSAGE_BYTES_MAX = 256 * 1024
"""Twenty peers with eight relayed addresses and a signed record each are 50 KB."""

PEERS_MAX = 4_096
"""Peers whose addresses are remembered from what others say: a routing table holds far fewer."""

_SPOKEN = {
    Message.MessageType.FIND_NODE,
    Message.MessageType.ADD_PROVIDER,
    Message.MessageType.GET_PROVIDERS,
    Message.MessageType.PING,
}
"""PUT_VALUE and GET_VALUE are not: nothing of ours needs them, and they let peers fill memory."""

_log = logging.getLogger(__name__)


def peer_of(libp2p_id: ID) -> PeerId:
    """Our name of a py-libp2p peer id. Raises BadPeerId for keys that are not Ed25519."""
    return parse_peer_id(libp2p_id.to_base58())


def addresses_from(peer: PeerId, multiaddrs: Iterable[Multiaddr]) -> tuple[Address, ...]:
    """The usable ones, with or without their /p2p part."""
    found: dict[Address, None] = {}
    for each in list(multiaddrs)[: 4 * ADDRESSES_MAX]:
        text = str(each)
        try:
            address = parse_address(text if "/p2p/" in text else f"{text}/p2p/{peer}")
        except BadInput:
            continue
        if address.peer == peer and len(found) < ADDRESSES_MAX:
            found[address] = None
    return tuple(found)


class KademliaStream:
    """A ByteStream as Kademlia reads and writes it; incoming messages are checked before it sees
    a byte of them.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.muxed_conn = SimpleNamespace(peer_id=ID.from_base58(stream.peer))
        self._stream = stream
        self._raw = bytearray()  # received, not checked
        self._checked = bytearray()  # whole messages that may be read
        self.refused = False

    async def read(self, n: int = -1) -> bytes:
        """Up to n bytes of the next checked message; b"" at the end."""
        while not self._checked:
            if not await self._check_next():
                return b""
        taken = bytes(self._checked[: n if n >= 0 else None])
        del self._checked[: len(taken)]
        return taken

    async def write(self, data: bytes) -> None:
        """Send everything."""
        await self._stream.send_all(data)

    async def close(self) -> None:
        """End it."""
        await self._stream.aclose()

    reset = close

    async def _check_next(self) -> bool:
        """Move one whole message from raw to checked; False at a clean end."""
        while (end := _end_of_message(self._stream.peer, self._raw)) is None:
            data = await self._stream.receive_some()
            if not data:
                return False
            self._raw += data
        header_bytes, total_bytes = end
        message = Message()
        try:
            message.ParseFromString(bytes(self._raw[header_bytes:total_bytes]))
        except Exception as error:
            raise MalformedMessage(self._stream.peer, "not a Kademlia message") from error
        if message.type not in _SPOKEN:
            raise MalformedMessage(
                self._stream.peer, f"Kademlia message type {message.type} is not spoken here"
            )
        self._checked += self._raw[:total_bytes]
        del self._raw[:total_bytes]
        return True


def _end_of_message(peer: str, raw: bytearray) -> tuple[int, int] | None:
    """Where the length prefix and the message end; None if not all of it is there yet."""
    for size in range(1, 5):  # four bytes of varint hold 2^28, far more than is allowed
        if len(raw) < size:
            return None
        if raw[size - 1] < 0x80:
            length = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(raw[:size]))
            if length > MESSAGE_BYTES_MAX:
                raise MalformedMessage(peer, f"a Kademlia message of {length} bytes")
            return (size, size + length) if len(raw) >= size + length else None
    raise MalformedMessage(peer, "a Kademlia message of 256 MiB or more")


class KademliaPeerstore:
    """Addresses of peers: what connected members say of themselves, and a bounded number of those
    that others told.
    """

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours
        self._told: dict[ID, list[Multiaddr]] = {}  # the longest known first
        self._own_record: Any = None

    def addrs(self, peer_id: ID) -> list[Multiaddr]:
        """What is known; may be empty."""
        peer = peer_id.to_base58()
        for linked in self._neighbours.peers():
            if linked.peer == peer and linked.addresses:
                return [Multiaddr(each.transport) for each in linked.addresses[:ADDRESSES_MAX]]
        return list(self._told.get(peer_id, ()))

    def add_addrs(self, peer_id: ID, addrs: Sequence[Multiaddr], ttl: int) -> None:
        """Remember what a peer said about another."""
        del ttl  # The routing table drops peers that cannot be reached; that is the only lifetime.
        self._told.pop(peer_id, None)
        if len(self._told) >= PEERS_MAX:
            del self._told[next(iter(self._told))]
        self._told[peer_id] = list(addrs)[:ADDRESSES_MAX]

    def peer_ids(self) -> list[ID]:
        """Members that are connected. Not those only told of: they enter by the routing table."""
        return [ID.from_base58(peer) for peer in linked_peers(self._neighbours)]

    def get_protocols(self, peer_id: ID) -> list[str]:
        """None, which the library takes for not known yet: members that take no part in Kademlia
        leave the routing table when they first refuse a stream.
        """
        del peer_id
        return []

    def get_peer_record(self, peer_id: ID) -> None:
        """None: signed records of others are checked when they arrive and not kept."""

    def consume_peer_record(self, envelope: Any, ttl: int) -> bool:
        """The signature was checked by the caller; the addresses come with the message too."""
        del envelope, ttl
        return True

    def get_local_record(self) -> Any:
        """Our own signed record, once made."""
        return self._own_record

    def set_local_record(self, envelope: Any) -> None:
        """Keep our own signed record."""
        self._own_record = envelope


class KademliaHost:
    """What KadDHT uses of an IHost, and nothing else."""

    def __init__(self, host: PeerHost, neighbours: Neighbours, libp2p: IHost) -> None:
        self._host = host
        self._neighbours = neighbours
        self._libp2p = libp2p
        self._peerstore = KademliaPeerstore(neighbours)

    def get_id(self) -> ID:
        """Who we are."""
        return self._libp2p.get_id()

    def get_private_key(self) -> Any:
        """For signing our own peer record."""
        return self._libp2p.get_private_key()

    def get_addrs(self) -> list[Multiaddr]:
        """Where we can be dialled."""
        return [Multiaddr(address.transport) for address in self._host.addresses[:ADDRESSES_MAX]]

    def get_peerstore(self) -> KademliaPeerstore:
        """The bounded one."""
        return self._peerstore

    def get_connected_peers(self) -> list[ID]:
        """Members only."""
        return self._peerstore.peer_ids()

    def set_stream_handler(self, protocol: str, handler: Callable[[Any], Awaitable[None]]) -> None:
        """Answer members under our own protocol id."""
        assert protocol == LIBRARY_PROTOCOL

        async def answer(stream: ByteStream) -> None:
            try:
                await handler(KademliaStream(stream))
            except OmxError:
                raise  # the host logs it with the peer's name
            except Exception:  # noqa: BLE001 - the library's own failure must not end the node
                _log.warning("Kademlia failed to answer %s", stream.peer, exc_info=True)

        self._host.set_handler(KADEMLIA, answer)

    async def new_stream(self, peer_id: ID, protocols: Sequence[str]) -> Any:
        """A stream to a member, dialled if need be. Raises OmxError."""
        if LIBRARY_PROTOCOL not in protocols:
            return await self._libp2p.new_stream(peer_id, list(protocols))  # type: ignore[arg-type]  # ping; TProtocol is a NewType of str
        peer = peer_of(peer_id)
        if peer not in linked_peers(self._neighbours):
            addresses = addresses_from(peer, self._peerstore.addrs(peer_id))
            if not addresses:
                raise PeerNotFound(peer)
            await self._neighbours.reach(addresses)
        return KademliaStream(await self._host.open_stream(peer, KADEMLIA))

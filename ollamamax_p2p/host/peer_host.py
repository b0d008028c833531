"""PeerHost: all that the rest of the library may see of the network.

Two implementations pass one contract suite (`tests/contracts/test_peer_host.py`): `libp2p_host`
over py-libp2p, and `simulated_network` in one process under trio's virtual clock.

A host connects by address, opens streams by protocol and answers streams by handler. Before a
connected peer is **admitted** only handlers registered with `for_strangers=True` answer it, in both
directions of trust: who is admitted is decided above (`membership`), the host only keeps the door.
Nothing here knows tickets, blobs or heartbeats.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from ollamamax_p2p.identity import Address, PeerId


class ByteStream(Protocol):
    """One bidirectional stream of bytes with one authenticated peer.

    One task may send while another receives; two may not do the same at once.
    """

    @property
    def peer(self) -> PeerId:
        """Who is at the other end, as the handshake proved it."""

    @property
    def protocol(self) -> str:
        """The protocol it was opened for."""

    async def send_all(self, data: bytes) -> None:
        """Send everything; waits while the other side does not read. Raises PeerGone."""

    async def receive_some(self) -> bytes:
        """Whatever has arrived, at least a byte; b"" once the other side has ended. Raises
        PeerGone.
        """

    async def send_eof(self) -> None:
        """Say that nothing more will be sent; receiving goes on. Raises PeerGone."""

    async def aclose(self) -> None:
        """End the stream both ways at once; never raises, also when it has ended already."""


@dataclass(frozen=True, slots=True)
class PeerEvent:
    """A peer's first connection was made, or its last one ended."""

    peer: PeerId
    change: Literal["connected", "disconnected"]


@dataclass(frozen=True, slots=True)
class Connection:
    """What the host knows of a connected peer."""

    peer: PeerId
    address: str
    """Its transport address as seen from here; "" if unknown."""
    inbound: bool
    """True if it dialled us."""
    admitted: bool


StreamHandler = Callable[[ByteStream], Awaitable[None]]
"""Called in a task of its own for each stream a peer opens; the stream is closed when it returns.

OmxErrors that it raises are logged with the peer's name and end the stream only.
"""


class PeerHost(Protocol):
    """This node on the network."""

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where we can be dialled, as known now. Wildcard listeners are shown per interface."""

    async def connect(self, addresses: Sequence[Address]) -> PeerId:
        """Be connected to the one peer that all these addresses name; at once if we are already.

        Raises PeerUnreachable (with the last reason) or ValueError if the list is empty or names
        several peers.
        """

    async def disconnect(self, peer: PeerId) -> None:
        """End every connection to the peer, if any; its streams raise PeerGone on both sides."""

    def connections(self) -> tuple[Connection, ...]:
        """The peers connected now."""

    async def open_stream(self, peer: PeerId, protocol: str) -> ByteStream:
        """A new stream to a connected peer. Raises PeerGone, or NotAdmitted if it has no such door
        for us.
        """

    def set_handler(
        self, protocol: str, handler: StreamHandler, *, for_strangers: bool = False
    ) -> None:
        """Answer streams of this protocol; those of peers not admitted only with for_strangers."""

    def admit(self, peer: PeerId) -> None:
        """Open every door to the peer, until it disconnects or is expelled. Idempotent."""

    def expel(self, peer: PeerId) -> None:
        """Close the doors to the peer again; open streams stay (disconnect ends them)."""

    def is_admitted(self, peer: PeerId) -> bool:
        """Whether the peer's streams reach every handler."""

    def watch(self) -> AbstractAsyncContextManager[AsyncIterator[PeerEvent]]:
        """Peers as they come and go, from entering the block on. Bounded: a reader that lags by
        1,024 events is ended by PeerGone("…fell behind").
        """

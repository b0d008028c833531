"""Being reached from outside: circuit relays and hole punching.

All of it is py-libp2p's (circuit relay v2 and DCUtR), and all of it among members only: the
protocols are behind the host's door, and we ask nobody whom we have not admitted. So a relay must
be a fellow member, and whoever joins must reach one member directly. AutoNAT is not used: py-libp2p
0.8.1 answers "reachable" to everybody who asks (docs/py-libp2p.md, "Relays and reachability").

A circuit is an ordinary connection inside a stream of the relay's: the swarm key and Noise protect
it from end to end, and the relay sees neither protocol nor data.
"""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from libp2p.abc import IHost
from libp2p.connection_types import ConnectionType
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.relay.circuit_v2.config import RelayConfig, RelayRole
from libp2p.relay.circuit_v2.dcutr import DCUtRProtocol
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID as HOP
from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
from libp2p.relay.circuit_v2.resources import RelayLimits
from libp2p.relay.circuit_v2.transport import CircuitV2Transport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from ollamamax_p2p.errors import BadInput
from ollamamax_p2p.host.libp2p_swarm_key import CheckedPskConn
from ollamamax_p2p.identity import Address, parse_address

RELAYS_MAX = 2
"""Held at once: one that goes away leaves one."""

RESERVE_INTERVAL_S = 5.0
"""Between two looks for relays: a member that offers it is used this soon."""

RESERVATION_S = 1_800.0
"""Ours is renewed this often; relays keep one for an hour."""

CIRCUIT_LIMITS = RelayLimits(
    duration=0,  # no end: py-libp2p looks at it only when data passes
    data=1 << 60,  # no limit: it carries members' models if it must. Its own 0 is no limit in one
    # place and nothing at all in another.
    max_circuit_conns=16,
    max_reservations=128,
)
"""What a node that relays for others grants. Sixteen circuits to one member at a time."""

_log = logging.getLogger(__name__)


class Reachability:
    """Relays that this node uses, or is. Made by `open_reachability`."""

    def __init__(
        self, libp2p: IHost, protocol: CircuitV2Protocol, may_use: Callable[[ID], bool]
    ) -> None:
        """libp2p: the running host; protocol: its circuit service, already running."""
        self._libp2p: Any = libp2p
        # STOP only: as a CLIENT it would make a reservation for itself before each dial.
        self._transport = CircuitV2Transport(libp2p, protocol, RelayConfig(roles=RelayRole.STOP))
        self._may_use = may_use
        self._reserved: dict[ID, float] = {}

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where others can reach us through the relays that keep a place for us."""
        me = self._libp2p.get_id().to_base58()
        found = [
            address
            for relay in self._reserved
            for text in self._transports_of(relay)
            if (address := _circuit(text, relay, me)) is not None
        ]
        return tuple(found[: 2 * RELAYS_MAX])

    async def dial(self, address: Address) -> None:
        """Connect through a relay that we are connected with. Raises OSError or libp2p's errors."""
        circuit = Multiaddr(str(address))
        relay, target = self._transport.parse_circuit_ma(circuit)
        relay_id = ID.from_base58(str(relay.get_peer_id()))
        if not self._may_use(relay_id):
            raise OSError(f"the relay {relay_id} is not a member that is connected here")
        raw = await self._transport.dial_peer_info(
            PeerInfo(target, [circuit]), relay_info=PeerInfo(relay_id, [relay])
        )
        # The transport's own dial forgets the swarm key, which the other side expects, and with one
        # it forgets that the connection is a relayed one.
        psk = self._libp2p.get_network().psk
        whole = raw if psk is None else CheckedPskConn(raw, psk)
        connection = await self._libp2p.upgrade_outbound_connection(whole, target)
        connection.set_transport_info([Multiaddr(address.transport)], ConnectionType.RELAYED)

    async def keep_relays(self) -> None:
        """Keep a place with a few members that relay for others, for as long as this runs."""
        while True:
            now = trio.current_time()
            self._reserved = {
                relay: since for relay, since in self._reserved.items() if self._may_use(relay)
            }
            for peer in self._libp2p.get_connected_peers():
                due = now - self._reserved.get(peer, -RESERVATION_S) >= RESERVATION_S
                room = peer in self._reserved or len(self._reserved) < RELAYS_MAX
                if due and room and self._may_use(peer) and self._offers(peer, HOP):
                    await self._reserve(peer)
            await trio.sleep(RESERVE_INTERVAL_S)

    async def _reserve(self, relay: ID) -> None:
        try:
            with trio.fail_after(10):  # one round trip; it waits for as long as the relay does
                stream = await self._libp2p.new_stream(relay, [HOP])
                kept = await self._transport._make_reservation(stream, relay)
                await stream.close()
        except (BaseLibp2pError, OSError, trio.TooSlowError) as error:
            _log.debug("no reservation with relay %s: %s", relay, error)
            kept = False
        if kept:
            self._reserved[relay] = trio.current_time()
        else:
            self._reserved.pop(relay, None)

    def _offers(self, peer: ID, protocol: str) -> bool:
        try:
            return bool(self._libp2p.get_peerstore().supports_protocols(peer, [protocol]))
        except Exception:  # noqa: BLE001 - PeerStoreError, whatever it is made of
            return False

    def _transports_of(self, relay: ID) -> Sequence[str]:
        try:
            return [str(each) for each in self._libp2p.get_peerstore().addrs(relay)]
        except Exception:  # noqa: BLE001 - as above
            return ()


@asynccontextmanager
async def open_reachability(
    libp2p: IHost, may_use: Callable[[ID], bool], *, relay_for_others: bool
) -> AsyncIterator[Reachability]:
    """Answer and make circuits for as long as the block is open.

    may_use: whether a peer is a member; relay_for_others: also carry theirs.
    """
    protocol = CircuitV2Protocol(libp2p, CIRCUIT_LIMITS, allow_hop=relay_for_others)
    async with background_trio_service(protocol), background_trio_service(DCUtRProtocol(libp2p)):
        await protocol.event_started.wait()
        reachability = Reachability(libp2p, protocol, may_use)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reachability.keep_relays)
            yield reachability
            nursery.cancel_scope.cancel()


def _circuit(text: str, relay: ID, me: str) -> Address | None:
    transport = text.partition("/p2p/")[0]
    whole = f"{transport}/p2p/{relay.to_base58()}/p2p-circuit/p2p/{me}"
    if "p2p-circuit" in transport:
        return None
    try:
        return parse_address(whole)
    except BadInput:
        return None

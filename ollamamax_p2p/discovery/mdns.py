"""Peers on this network, by multicast DNS (RFC 6762, libp2p's mDNS specification).

Works inside a private swarm: the service's name carries the swarm's fingerprint, so members find
each other and a stranger sees that some swarm is there, under a pseudonym, and where.

The `zeroconf` library runs an event loop in a thread of its own. `_Responder` is the only contact:
calls into it go through worker threads, finds come out through one bounded queue.
"""

import logging
import random
import string
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import trio
import zeroconf

from ollamamax_p2p.discovery.core.mdns_records import (
    addresses_in,
    fingerprint_in,
    service_type,
    txt_of,
)
from ollamamax_p2p.discovery.peer_source import Found
from ollamamax_p2p.discovery.settings import DiscoverySettings
from ollamamax_p2p.identity import Address, PeerId

FOUND_S = 600.0
"""How long a find is good for; a record's own life is 75 minutes, but peers move sooner."""

PEERS_MAX = 512
"""Finds kept; a flood of made-up peers pushes out the oldest."""

OTHER_SWARMS_MAX = 64
"""Other swarms remembered, to be shown to people."""

ADDRESS_CHECK_S = 5.0
"""How often is looked whether our own addresses have changed."""

CLOSE_S = 1.0
"""Good-byes take 0.4 s; a network that hangs must not hold up the node's end."""

_FALLBACK_PORT = 4011  # SRV records must name one; only the TXT record is read

_TXT, _INTERNET = 16, 1  # RFC 1035, 3.2.2 and 3.2.4

_ALL_TYPES = "_services._dns-sd._udp.local."  # RFC 6763, section 9

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Mdns:
    """A PeerSource: peers heard of on this network."""

    name = "mdns"

    def __init__(self) -> None:
        self._heard: dict[PeerId, Found] = {}
        self._news: dict[PeerId, None] = {}  # not yielded yet, oldest first
        self._others: dict[str, None] = {}
        self._arrived = trio.Event()
        self.trouble = ""
        """Why it does not work; empty while it does."""

    async def find_peers(self) -> AsyncIterator[Found]:
        """Peers as they are heard of, and again when their addresses change. One reader."""
        while True:
            while self._news:
                peer = next(iter(self._news))
                del self._news[peer]
                yield self._heard[peer]
            self._arrived = trio.Event()
            await self._arrived.wait()

    def peers(self) -> tuple[Found, ...]:
        """All heard of and not expired."""
        now = trio.current_time()
        return tuple(found for found in self._heard.values() if found.expires > now)

    def other_swarms(self) -> tuple[str, ...]:
        """Fingerprints of other private swarms that were heard of on this network."""
        return tuple(self._others)

    def hear_of_swarm(self, fingerprint: str | None) -> None:
        """Note that a swarm is there; None is no swarm."""
        if fingerprint is not None and len(self._others) < OTHER_SWARMS_MAX:
            self._others[fingerprint] = None

    def hear(self, addresses: tuple[Address, ...]) -> None:
        """Note what one record said."""
        peer = addresses[0].peer
        self._heard.pop(peer, None)
        if len(self._heard) >= PEERS_MAX:
            oldest = next(iter(self._heard))
            del self._heard[oldest]
            self._news.pop(oldest, None)
        self._heard[peer] = Found(addresses, self.name, trio.current_time() + FOUND_S)
        self._news[peer] = None
        self._arrived.set()


class _Responder:
    """Contact with the zeroconf library. Its methods block, for worker threads, save for `take`."""

    def __init__(self, interfaces: Sequence[str], service: str, name: str) -> None:
        self._zeroconf = zeroconf.Zeroconf(
            interfaces=list(interfaces) or zeroconf.InterfaceChoice.All,
            ip_version=zeroconf.IPVersion.V4Only,
        )
        self._service = service
        self._full_name = f"{name}.{service}"
        self._host_name = f"{name}.local."
        self._registered: zeroconf.ServiceInfo | None = None
        # Filled in zeroconf's thread, emptied in trio's: appends and pops are atomic.
        self._heard: deque[bytes] = deque(maxlen=PEERS_MAX)
        self._types: deque[str] = deque(maxlen=OTHER_SWARMS_MAX)
        self._wake: Callable[[], None] = lambda: None

    def browse(self, wake: Callable[[], None]) -> None:
        """Begin to listen; `wake` is called, in a thread of zeroconf's, when `take` has news."""
        self._wake = wake
        zeroconf.ServiceBrowser(self._zeroconf, self._service, handlers=[self._on_change])
        zeroconf.ServiceBrowser(self._zeroconf, _ALL_TYPES, handlers=[self._on_type])

    def announce(self, addresses: Sequence[Address]) -> None:
        """Tell the network our addresses, or that they have changed."""
        info = zeroconf.ServiceInfo(
            self._service,
            self._full_name,
            port=_FALLBACK_PORT,
            properties=txt_of(addresses),
            server=self._host_name,
        )
        if self._registered is None:
            self._zeroconf.register_service(info, strict=False)  # strict: types of 15 letters only
        else:
            self._zeroconf.update_service(info)
        self._registered = info

    def take(self) -> tuple[list[bytes], list[str]]:
        """TXT records and types of service heard since the last call. Does not block."""
        return _emptied(self._heard), _emptied(self._types)

    def close(self) -> None:
        """Say good-bye and end zeroconf's threads."""
        self._zeroconf.close()

    def _on_change(
        self,
        zeroconf: zeroconf.Zeroconf,
        service_type: str,
        name: str,
        state_change: zeroconf.ServiceStateChange,
    ) -> None:
        del state_change  # a good-bye needs no answer: finds expire, and dials tell
        if name == self._full_name:
            return
        txt = _newest_txt(zeroconf, name)
        if txt:
            self._heard.append(txt)
            self._wake()

    def _on_type(
        self,
        zeroconf: zeroconf.Zeroconf,
        service_type: str,
        name: str,
        state_change: zeroconf.ServiceStateChange,
    ) -> None:
        del zeroconf, service_type, state_change
        if name != self._service:
            self._types.append(name)
            self._wake()


def _emptied(queue: deque[T]) -> list[T]:
    taken = []
    while queue:
        taken.append(queue.popleft())
    return taken


def _newest_txt(zc: zeroconf.Zeroconf, name: str) -> bytes:
    """The TXT record of a name: it comes in one packet with the name, or later as a change of it.

    For a second an old one and its successor are both in the cache: the old one has then been given
    one more second to live (RFC 6762, section 10.2), and counts as made at the same time.
    """
    records = zc.cache.get_all_by_details(name, _TXT, _INTERNET)
    newest = max(records, key=lambda record: (record.created, record.ttl), default=None)
    return bytes(getattr(newest, "text", b""))


@asynccontextmanager
async def open_mdns(
    own_addresses: Callable[[], Sequence[Address]],
    own_id: PeerId,
    fingerprint: str | None,
    settings: DiscoverySettings,
    *,
    rng: random.Random,
    unavailable: Callable[[str], None],
) -> AsyncIterator[Mdns]:
    """Announce and listen for as long as the block is open.

    own_addresses: where this node can be dialled, asked again every few seconds.
    fingerprint: the swarm's; None for an open swarm.
    unavailable: told once, with the reason, if this machine has no multicast; the block then goes
    on and finds nobody.
    """
    mdns = Mdns()
    name = "".join(rng.choices(string.ascii_lowercase + string.digits, k=40))
    try:
        responder = await trio.to_thread.run_sync(
            _Responder, settings.mdns_interfaces, service_type(fingerprint), name
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: no interface has an address
        _log.warning(
            "multicast DNS does not work, peers on this network are not found (%s); "
            "join with a ticket, or name peers with --bootstrap",
            error,
        )
        mdns.trouble = f"no multicast on this machine ({error})"
        unavailable(mdns.trouble)
        yield mdns
        return
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep_listening, responder, mdns, own_id)
            nursery.start_soon(_keep_announcing, responder, own_addresses)
            yield mdns
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(CLOSE_S, shield=True):
            await trio.to_thread.run_sync(responder.close, abandon_on_cancel=True)


async def _keep_listening(responder: _Responder, mdns: Mdns, own_id: PeerId) -> None:
    token = trio.lowlevel.current_trio_token()
    news = _Bell()

    def wake() -> None:  # runs in zeroconf's thread
        try:
            token.run_sync_soon(news.ring, idempotent=True)
        except trio.RunFinishedError:
            return  # the program ends while a packet arrives

    await trio.to_thread.run_sync(responder.browse, wake)
    while True:
        await news.wait()
        txts, types = responder.take()
        for service in types:
            mdns.hear_of_swarm(fingerprint_in(service))
        for txt in txts:
            addresses = addresses_in(txt)
            if addresses and addresses[0].peer != own_id:
                mdns.hear(addresses)


async def _keep_announcing(
    responder: _Responder, own_addresses: Callable[[], Sequence[Address]]
) -> None:
    told: tuple[Address, ...] = ()
    while True:
        now = tuple(own_addresses())
        if now and now != told:
            try:
                await trio.to_thread.run_sync(responder.announce, now, abandon_on_cancel=True)
                told = now
            except (OSError, zeroconf.Error) as error:
                _log.warning("could not announce this node by multicast DNS: %s", error)
        await trio.sleep(ADDRESS_CHECK_S)


class _Bell:
    """An event that can be rung again."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = trio.Event()

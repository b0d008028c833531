"""Discovery as one thing: what a node opens to find peers and holders of blobs."""

import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollamamax_p2p.discovery.finder import Finder, open_finder
from ollamamax_p2p.discovery.merged_providers import MergedProviders
from ollamamax_p2p.discovery.neighbours import Neighbours
from ollamamax_p2p.discovery.peer_source import PeerSource
from ollamamax_p2p.discovery.providers import ProviderDirectory
from ollamamax_p2p.discovery.settings import DiscoverySettings
from ollamamax_p2p.discovery.static_peers import StaticPeers, parse_bootstrap
from ollamamax_p2p.discovery.swarm_providers import open_swarm_providers
from ollamamax_p2p.host import PeerHost
from ollamamax_p2p.identity import Address, PeerId, iso_time
from ollamamax_p2p.observability import Event, EventFeed

if TYPE_CHECKING:
    from ollamamax_p2p.discovery.mdns import Mdns


class Discovery:
    """Made by `open_discovery`."""

    def __init__(self, providers: ProviderDirectory, finder: Finder, mdns: "Mdns | None") -> None:
        self.providers = providers
        self._finder = finder
        self._mdns = mdns

    def known_peers(self) -> tuple[PeerId, ...]:
        """Every peer that an address is known of, connected or not, best first."""
        return self._finder.known_peers()

    async def settled(self) -> None:
        """Wait, some seconds at most, until a member is linked or everybody known has been tried:
        what is asked of the swarm right after the start should not find it empty.
        """
        await self._finder.settled()

    def learn(self, addresses: Sequence[Address]) -> None:
        """A member told these addresses: `open_connections(on_addresses=…)`."""
        self._finder.learn(addresses)

    @property
    def mdns_state(self) -> str:
        """`on`, `off`, or why it does not work."""
        if self._mdns is None:
            return "off"
        return self._mdns.trouble or "on"

    def other_swarms(self) -> tuple[str, ...]:
        """Fingerprints of other swarms heard of on this network."""
        return self._mdns.other_swarms() if self._mdns is not None else ()


@asynccontextmanager
async def open_discovery(
    host: PeerHost,
    neighbours: Neighbours,
    membership_fingerprint: str,
    settings: DiscoverySettings,
    *,
    data_dir: Path | None,
    libp2p: Any = None,
    rng: random.Random,
    feed: EventFeed | None,
    wall_clock: Callable[[], float],
    open_swarm: bool = False,
) -> AsyncIterator[Discovery]:
    """Find peers and holders for as long as the block is open. Raises BadConfig for a bootstrap
    address that cannot be used.

    neighbours: the node's `Connections`.
    membership_fingerprint: `Membership.mdns_fingerprint()`; also names the swarm whose peers are
    remembered.
    data_dir: where peers are remembered; None for simulations.
    libp2p: the host's own libp2p host, which Kademlia needs; None runs without Kademlia.
    open_swarm: be found under the name that every libp2p node looks for.
    """
    sources: list[PeerSource] = [StaticPeers(parse_bootstrap(settings.bootstrap))]

    def report(kind: str, problem: str) -> None:
        if feed is not None:
            at = iso_time(int(wall_clock()))
            feed.report(Event(kind=kind, at=at, facts={"problem": problem}))

    async with AsyncExitStack() as stack:
        near = await stack.enter_async_context(
            open_swarm_providers(host, neighbours, settings, rng=rng)
        )
        sources.append(near)
        providers: ProviderDirectory = near
        if settings.dht and libp2p is not None:
            from ollamamax_p2p.discovery.dht import open_dht  # two seconds to import

            dht = await stack.enter_async_context(open_dht(host, neighbours, libp2p))
            providers = MergedProviders(providers, dht)
            sources.append(dht)
        mdns = None
        if settings.mdns:
            from ollamamax_p2p.discovery.mdns import open_mdns  # half a second

            mdns = await stack.enter_async_context(
                open_mdns(
                    lambda: host.addresses,
                    host.peer_id,
                    None if open_swarm else membership_fingerprint,
                    settings,
                    rng=rng,
                    unavailable=lambda problem: report("mdns.unavailable", problem),
                )
            )
            sources.append(mdns)
        finder = await stack.enter_async_context(
            open_finder(
                host.peer_id,
                neighbours,
                sources,
                settings,
                data_dir=data_dir,
                swarm=membership_fingerprint,
                rng=rng,
                wall_clock=wall_clock,
            )
        )
        yield Discovery(providers, finder, mdns)

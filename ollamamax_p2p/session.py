"""Session: all that a node runs while it is in one swarm, opened in layer order.

Host, cluster, links, discovery, transfer, router. `node.Node` ends one session and opens the next
when it joins or leaves, or when the swarm's key is changed: another key means another host.
"""

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from ollamamax_p2p.cluster import (
    AboutThisNode,
    AgreedProviders,
    Cluster,
    SharedCatalogue,
    cluster_folder,
    has_battery,
    has_place,
    may_vote,
    open_cluster,
    open_shared_catalogue,
    printable_name,
)
from ollamamax_p2p.config import NodeConfig
from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.discovery import Discovery, open_discovery
from ollamamax_p2p.errors import StoreFull
from ollamamax_p2p.host import ClosedGate, Connections, Libp2pHost, PeerHost, open_connections
from ollamamax_p2p.identity import Address, Membership, PeerId
from ollamamax_p2p.inference import Backend
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.router import Machine, Router, Show, Surroundings, open_router
from ollamamax_p2p.transfer import Origin, Transfer, open_transfer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """What a node runs while it is in one swarm."""

    membership: Membership
    host: PeerHost
    cluster: Cluster | None
    """None in an open swarm that this node has entered by an address: it is no member there. Also
    where the disk has no room for it, for the time of one command."""
    connections: Connections
    discovery: Discovery
    transfer: Transfer
    catalogue: SharedCatalogue | None
    router: Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What a node runs models with; it outlives the session."""

    backends: Sequence[Backend]
    show: Show
    """What a model of this node is made of."""
    pull: Callable[[str], Awaitable[None]]
    """Fetch a model to this node."""
    draining: bool = False
    on_draining: Callable[[bool], None]
    """Told when that changes."""


@asynccontextmanager
async def open_session(
    config: NodeConfig,
    membership: Membership,
    host: Libp2pHost,
    store: BlobStore,
    *,
    origin: Origin | None,
    feed: EventFeed,
    rng: random.Random,
    agent: str,
    wall_clock: Callable[[], float],
    on_swarm_key: Callable[[bytes], None],
    engines: Engines,
    announce: bool,
) -> AsyncIterator[Session]:
    """Everything above the host, opened in layer order, announcing what the store holds.

    agent: what peers are told that we run.
    on_swarm_key: called when the cluster has agreed on another key, and it is time to use it.
    announce: have the cluster know this node's name and addresses. Without it, for one command, the
    session also does without the cluster where the disk is too full for that.
    Raises LocalTrouble: what `open_cluster` raises.
    """
    learned: list[Callable[[Sequence[Address]], None]] = []
    # Links come before discovery, which dials through them, and tell it what they learn.

    def on_addresses(addresses: Sequence[Address]) -> None:
        for learn in learned:
            learn(addresses)

    async with (
        _cluster(
            config, membership, host, rng, feed, wall_clock, may_be_without=not announce
        ) as cluster,
        open_connections(
            host,
            membership,
            config.host,
            rng=rng,
            feed=feed,
            agent=agent,
            wall_clock=wall_clock,
            on_addresses=on_addresses,
            gate=cluster or (None if membership.is_open else ClosedGate()),
        ) as connections,
        _following(cluster, connections, on_swarm_key, announce),
        open_discovery(
            host,
            connections,
            membership.mdns_fingerprint(),
            config.discovery,
            data_dir=config.data_dir,
            libp2p=host.libp2p,
            rng=rng,
            feed=feed,
            wall_clock=wall_clock,
            open_swarm=membership.is_open,
        ) as discovery,
        _catalogue(cluster) as catalogue,
        open_transfer(
            host,
            store,
            AgreedProviders(discovery.providers, catalogue, connections)
            if catalogue
            else discovery.providers,
            config.transfer,
            origin=origin,
            connected_peers=lambda: [status.peer for status in connections.peers()],
            rng=rng,
            feed=feed,
            wall_clock=wall_clock,
            origin_settings=config.origin,
            agreed_names=catalogue,
            agreed_maps=catalogue,
        ) as transfer,
        open_router(
            host,
            engines.backends,
            config.router,
            _around(config, membership, cluster, connections, engines, wall_clock),
            rng=rng,
        ) as router,
    ):
        learned.append(discovery.learn)
        yield Session(
            membership, host, cluster, connections, discovery, transfer, catalogue, router
        )


def _around(
    config: NodeConfig,
    membership: Membership,
    cluster: Cluster | None,
    connections: Connections,
    engines: Engines,
    wall_clock: Callable[[], float],
) -> Surroundings:
    def linked() -> list[PeerId]:
        return [status.peer for status in connections.peers()]

    def is_member(peer: str) -> bool:
        # Nobody's questions go to a stranger's machine, and no stranger uses this one's.
        return not membership.is_open or (
            cluster is not None and (peer == cluster.peer_id or cluster.is_member(PeerId(peer)))
        )

    return Surroundings(
        name=printable_name(config.name),
        region=config.cluster.region,
        epoch=int(wall_clock() * 1000),
        linked=linked,
        connect=connections.reach_peer,
        is_member=is_member,
        show=engines.show,
        pull=engines.pull,
        memory=Machine().memory,
        draining=engines.draining,
        on_draining=engines.on_draining,
    )


@asynccontextmanager
async def _cluster(
    config: NodeConfig,
    membership: Membership,
    host: PeerHost,
    rng: random.Random,
    feed: EventFeed,
    wall_clock: Callable[[], float],
    *,
    may_be_without: bool,
) -> AsyncIterator[Cluster | None]:
    folder = cluster_folder(config.data_dir, membership.swarm_id)
    if membership.is_open and not has_place(folder):
        yield None
        return
    about = AboutThisNode(
        peer=host.peer_id,
        name=printable_name(config.name),
        region=config.cluster.region,
        may_vote=may_vote(config.cluster.voter, battery=has_battery()),
    )
    async with AsyncExitStack() as stack:
        opening = open_cluster(
            folder,
            host,
            about,
            membership.swarm_id,
            membership.swarm_key,
            config.consensus,
            rng=rng,
            feed=feed,
            wall_clock=wall_clock,
        )
        try:
            cluster = await stack.enter_async_context(opening)
        except StoreFull as error:
            if not may_be_without:
                raise
            _log.info("without the cluster: %s", error)
            cluster = None
        yield cluster


@asynccontextmanager
async def _catalogue(cluster: Cluster | None) -> AsyncIterator[SharedCatalogue | None]:
    if cluster is None:
        yield None
        return
    async with open_shared_catalogue(cluster) as catalogue:
        yield catalogue


@asynccontextmanager
async def _following(
    cluster: Cluster | None,
    connections: Connections,
    on_swarm_key: Callable[[bytes], None],
    announce: bool,
) -> AsyncIterator[None]:
    if cluster is None:
        yield
        return
    async with cluster.following(connections, on_swarm_key, announce=announce):
        yield

"""open_node(): one running node. Builds the services bottom-up and owns the one top nursery.

A node outlives the swarm it is in: key, store and API stay while `join` and `leave` end one
session (`session.Session`: host, cluster, links, discovery, transfer) and open the next, because
another swarm means another pre-shared key for the host.
"""

import contextlib
import errno
import fcntl
import functools
import logging
import os
import random
import secrets
import shutil
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec
import trio

from ollamamax_p2p.api import (
    Invitation,
    JoinReport,
    ModelDetails,
    ModelInfo,
    ModelLayer,
    NodeStatus,
    PeerInfo,
    StoreStatus,
    open_api,
)
from ollamamax_p2p.cluster import (
    Cluster,
    ClusterStatus,
    RoleWish,
    cluster_folder,
    forget_other_clusters,
    found_place,
    printable_name,
    save_admission,
)
from ollamamax_p2p.config import NodeConfig
from ollamamax_p2p.content import (
    BlobStore,
    CreationRequest,
    ListedModel,
    ModelListing,
    ShowAnswer,
    create_from_request,
    create_model,
    describe_for_show,
    describe_model,
    import_model,
    open_disk_store,
)
from ollamamax_p2p.content.core.digest import parse_digest
from ollamamax_p2p.content.core.manifest import Manifest
from ollamamax_p2p.content.core.model_name import ModelName, parse_model_name
from ollamamax_p2p.discovery import (
    forget_remembered_peers,
    has_remembered_peers,
)
from ollamamax_p2p.errors import (
    AccessRefused,
    BadConfig,
    BadInput,
    DataDirInUse,
    DeadlineExceeded,
    ModelNotFound,
    NetworkTrouble,
    NoSources,
    NotAdmitted,
    NotFound,
    OmxError,
    OriginTrouble,
    PeerUnreachable,
    PortInUse,
    StoreDamaged,
    StoreFull,
    SwarmChanging,
    first_named,
    looks_like_ticket,
)
from ollamamax_p2p.host import Connections, Libp2pHost, open_connections, open_libp2p_host
from ollamamax_p2p.identity import (
    Address,
    Membership,
    NodeKey,
    Ticket,
    format_ticket,
    load_or_create_key,
    parse_address,
    parse_ticket,
    remove_secret,
)
from ollamamax_p2p.inference import Backend, open_backends
from ollamamax_p2p.inference.core.requests import ChatMessage, Delta, Options
from ollamamax_p2p.observability import EventFeed
from ollamamax_p2p.router import Call
from ollamamax_p2p.session import Engines, Session, open_session
from ollamamax_p2p.swarm_inference import SwarmInference
from ollamamax_p2p.transfer import Origin, PullProgress, PullReport, PushReport

_log = logging.getLogger(__name__)

T = TypeVar("T")
OnProgress = Callable[[PullProgress], None]

_RENEWED_S = 60.0
# A join or leave ends one session and opens another: two dials and a Kademlia start at most.

ROOM_BESIDE_LOG_BYTES = 1024 * 1024
"""For what else is written when a node begins in a cluster: its place, the state, the record."""

RESIGN_S = 25.0
"""For the others to do without this node: its vote is handed on first."""

AGREE_S = 6.0
"""For the cluster to agree on what a new model's name means: two elections fit."""


def wall_clock() -> float:
    """Unix seconds. The one place where the library reads the wall clock itself."""
    return datetime.now(UTC).timestamp()


def installed_version() -> str:
    """This library's version; `0+unknown` where the code runs without being installed."""
    try:
        return version("ollamamax-p2p")
    except PackageNotFoundError:
        return "0+unknown"


@asynccontextmanager
async def open_node(
    config: NodeConfig | None = None,
    *,
    serve_api: bool = False,
    brief: bool = False,
    backends: Sequence[Backend] = (),
) -> AsyncIterator["Node"]:
    """Run a node for as long as the block is open.

    config: the defaults if None; `load_config` reads file and environment.
    serve_api: also listen on `config.api.listen`, as `omx up` does.
    brief: for one command: the cluster is not told of this node's present name and addresses, and
    no engine is started.
    backends: engines of your own, beside those that the config names.
    Raises LocalTrouble (DataDirInUse, PortInUse, KeyExposed, StoreFull…), BadConfig. What the block
    itself raises comes out as it is; only several errors at once come as a group.
    """
    only: BaseException | None = None
    try:
        async with _opened_node(config or NodeConfig(), serve_api, brief, backends) as node:
            yield node
    except BaseExceptionGroup as group:
        only = _only_one(group)
        if only is None:
            raise
    if only is not None:
        raise only  # outside the handler, or the group would become its context


def _only_one(error: BaseException) -> BaseException | None:
    """The exception that a group holds, at any depth, if it is one only."""
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error


@asynccontextmanager
async def _opened_node(
    config: NodeConfig, serve_api: bool, brief: bool, own_backends: Sequence[Backend]
) -> AsyncIterator["Node"]:
    with data_dir_of_our_own(config.data_dir):
        await trio.to_thread.run_sync(_check_models_folder, config.content.models)
        key = await trio.to_thread.run_sync(load_or_create_key, config.data_dir / "node-key")
        membership = await trio.to_thread.run_sync(_membership_of, config)
        feed = EventFeed()
        async with (
            open_disk_store(
                config.content.models, config.data_dir / "store", config.content
            ) as store,
            _open_origin(config, key) as origin,
            _open_backends(config, store, brief=brief) as backends,
            trio.open_nursery() as nursery,
        ):
            engines = (*own_backends, *backends)
            node = Node(config, key, membership, store, origin, engines, feed, brief=brief)
            node._nursery = nursery
            await nursery.start(node._run_sessions)
            async with _maybe_api(node, config, serve_api):
                yield node
            nursery.cancel_scope.cancel()


def forget_swarm(config: NodeConfig) -> bool:
    """Leave without telling anybody, for a node that cannot be started: remove the record of its
    swarm and its part in the cluster. False if it was in none. Raises DataDirInUse, AccessRefused.
    """
    with data_dir_of_our_own(config.data_dir):
        path = _membership_path(config)
        was_in_one = path.exists()
        remove_secret(path)
        forget_other_clusters(config.data_dir, None)
        forget_remembered_peers(config.data_dir)
    return was_in_one


def check_ticket(ticket_or_addresses: Sequence[str]) -> None:
    """Raise what `Node.join` would raise of these before it asks anybody: BadTicket, BadAddress,
    BadPeerId, BadConfig.
    """
    _way_in(ticket_or_addresses)


def _way_in(given: Sequence[str]) -> Ticket | list[Address]:
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise BadConfig("join", "give a ticket or at least one address")
    if len(texts) == 1 and not texts[0].startswith("/"):
        return parse_ticket(texts[0])
    if any(map(looks_like_ticket, texts)):
        raise BadConfig("join", "give one ticket, or addresses, not both")
    return [parse_address(text) for text in texts]


class Node:
    """A running node. Made by `open_node`; every method may be called from any task."""

    def __init__(
        self,
        config: NodeConfig,
        key: NodeKey,
        membership: Membership,
        store: BlobStore,
        origin: Origin | None,
        backends: Sequence[Backend],
        feed: EventFeed,
        *,
        brief: bool,
    ) -> None:
        self.config = config
        self._brief = brief
        self.peer_id = key.peer_id
        self.events = feed
        self.api_address = ""
        self.ollama_address = ""
        self.inference = SwarmInference(lambda: self._now.router)
        """All engines of the swarm, to be asked."""
        self._backends = backends
        self._key = key
        self._nursery: trio.Nursery
        self._membership = membership
        self._store = store
        self._listing = ModelListing(store)
        self._origin = origin
        self._rng = random.Random(secrets.randbits(128))
        self._session: Session | None = None
        self._listening: tuple[str, ...] = ()
        self._draining = False
        self._pulling: set[trio.CancelScope] = set()
        """Of those who wait for a pull of this session, and would wait for ever without it."""
        # One at a time: a second join must see that the first has succeeded.
        self._moving = trio.Lock()
        self._moves, self._asked_moves = trio.open_memory_channel["_Move[Any]"](0)
        self._opened_at = trio.current_time()
        self._stop = trio.Event()

    # -- what it is and sees -------------------------------------------------------------------

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where others can dial this node, as known now."""
        return self._now.host.addresses

    @property
    def bytes_uploaded(self) -> int:
        """Of chunks, to all peers, since this node joined its swarm."""
        return self._now.transfer.bytes_served

    async def status(self) -> NodeStatus:
        """One look at the node."""
        session = self._now
        # First: what is awaited below may outlive the session.
        cluster = await session.cluster.status() if session.cluster else None
        return NodeStatus(
            peer_id=self.peer_id,
            name=self.config.name,
            version=installed_version(),
            swarm_id=session.membership.swarm_id.hex(),
            open_swarm=session.membership.is_open,
            addresses=tuple(map(str, session.host.addresses)),
            api_address=self.api_address,
            ollama_address=self.ollama_address,
            data_dir=str(self.config.data_dir),
            uptime_s=trio.current_time() - self._opened_at,
            now=_iso_now(),
            peer_count=len(session.connections.peers()),
            store=StoreStatus(
                path=str(self.config.content.models),
                writable=self._store.writable,
                free_bytes=await self._store.free_bytes(),
                model_count=len(await self._store.models()),
                partial_count=len(await self._store.partials()),
            ),
            pulls=session.transfer.pulls(),
            mdns=session.discovery.mdns_state,
            other_swarms=tuple(session.discovery.other_swarms()),
            cluster=cluster,
        )

    async def peers(self) -> tuple[PeerInfo, ...]:
        """The members connected now."""
        lies = self._now.transfer.bans.reasons()
        return tuple(
            PeerInfo(
                peer_id=status.peer,
                address=status.address,
                inbound=status.inbound,
                member=True,
                name=status.agent.partition(" ")[2],
                round_trip_ms=None if status.rtt_s is None else status.rtt_s * 1000,
                banned=lies.get(status.peer, ""),
            )
            for status in self._now.connections.peers()
        )

    # -- models --------------------------------------------------------------------------------

    async def models(self) -> tuple[ModelInfo, ...]:
        """What the store holds, newest first."""
        return tuple(
            ModelInfo(
                name=str(model.name),
                digest=model.manifest_digest,
                size=model.size,
                modified_at=model.modified_at,
            )
            for model in await self._store.models()
        )

    async def show(self, name: str) -> ModelDetails:
        """What a model is made of. Raises BadName, ModelNotFound."""
        parsed = parse_model_name(name)
        manifest = await self._store.manifest(parsed)
        described = await describe_model(self._store, parsed)
        layers = tuple(
            ModelLayer(media_type=layer.media_type, digest=layer.digest, size=layer.size)
            for layer in (manifest.config, *manifest.layers)
        )
        return ModelDetails(layers=layers, **described)

    async def copy(self, source: str, destination: str) -> ModelInfo:
        """Give a model a second name. Raises BadName, ModelNotFound, StoreReadOnly."""
        to = parse_model_name(destination)
        transfer = self._now.transfer
        await transfer.put_manifest(to, await self._store.manifest(parse_model_name(source)))
        return await self._made_here(to)

    async def remove(self, name: str) -> None:
        """Remove a name, and the blobs that no other needs. Raises BadName, ModelNotFound."""
        parsed = parse_model_name(name)
        await self._now.transfer.withdraw(parsed, await self._store.remove_manifest(parsed))

    async def pull(
        self,
        name: str,
        *,
        from_origin: bool = False,
        insecure: bool = False,
        on_progress: OnProgress | None = None,
    ) -> PullReport:
        """Fetch a model: from the members that have it, and from its origin where none has.

        Cancelling keeps what is there; the next pull of it resumes.
        from_origin: ask the origin, not the members, what the name means now.
        insecure: this origin may be spoken to by plain http.
        Raises BadName, ModelNotFound, StoreFull, StoreReadOnly, NoSources, OriginTrouble.
        """
        parsed = parse_model_name(name)
        session = self._now
        scope = trio.CancelScope()
        self._pulling.add(scope)
        try:
            with scope:
                await session.discovery.settled()
                return await session.transfer.pull(
                    parsed, from_origin=from_origin, insecure=insecure, on_progress=on_progress
                )
        except OriginTrouble as error:
            if not session.connections.peers():
                error.args = (f"{error}; and no member of the swarm is connected",)
            raise
        finally:
            self._pulling.discard(scope)
        raise NoSources(
            f"model {parsed}",
            "this node has changed its swarm; what is here is kept, the same pull resumes it",
        )

    async def import_model(self, path: Path | str, name: str) -> ModelInfo:
        """Make a local GGUF or safetensors file a model; the file is neither moved nor changed."""
        parsed = parse_model_name(name)
        await import_model(self._store, Path(path), parsed)
        return await self._made_here(parsed)

    async def create_model(self, name: str, modelfile: str, base_dir: Path | str) -> ModelInfo:
        """Make a model from a Modelfile's text; relative paths in it count from base_dir."""
        parsed = parse_model_name(name)
        await create_model(self._store, parsed, modelfile, Path(base_dir))
        return await self._made_here(parsed)

    async def create_from_request(
        self, name: str, request: CreationRequest, *, on_progress: OnProgress | None = None
    ) -> ModelInfo:
        """Make a model of another, which is pulled if it is not here, or of uploaded blobs. Raises
        BadInput, ModelNotFound, StoreFull, StoreReadOnly, and what `pull` raises.
        """
        tell = on_progress or _nobody
        parsed = parse_model_name(name)

        async def resolved(source: ModelName) -> Manifest:
            try:
                return await self._store.manifest(source)
            except ModelNotFound:
                await self.pull(source.full(), on_progress=_without_success(tell))
            return await self._store.manifest(source)

        await create_from_request(
            self._store,
            parsed,
            request,
            resolve_model=resolved,
            tell=lambda status: tell(PullProgress(status=status)),
        )
        return await self._made_here(parsed)

    async def push(
        self, name: str, *, insecure: bool = False, on_progress: OnProgress | None = None
    ) -> PushReport:
        """Give a model of this node to the registry that its name names.

        insecure: this registry may be spoken to by plain http.
        Raises BadName, ModelNotFound, OriginTrouble, BadConfig where no registry may be asked.
        """
        tell = on_progress or _nobody
        tell(PullProgress(status="retrieving manifest"))
        parsed = parse_model_name(name)
        manifest = await self._store.manifest(parsed)
        if self._origin is None:
            raise BadConfig("origin.enabled", "it is off, so this node speaks to no registry")
        return await self._origin.push(
            parsed, manifest, self._store, insecure=insecure, on_progress=tell
        )

    async def listed_models(self) -> tuple[ListedModel, ...]:
        """What the store holds and what each is, newest first."""
        return await self._listing.models()

    async def show_model(
        self,
        name: str,
        *,
        verbose: bool = False,
        system: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> ShowAnswer:
        """All that a model says about itself. Raises BadName, ModelNotFound."""
        parsed = parse_model_name(name)
        try:
            return await describe_for_show(
                self._store, parsed, verbose=verbose, system=system, options=options
            )
        except ModelNotFound:
            # What is asked for is said in its own way there, changes of this request apart.
            found = await self._now.router.show(name, verbose=verbose)
            return msgspec.json.decode(found, type=ShowAnswer)

    async def _show_as_json(self, name: str, verbose: bool) -> bytes:
        """For another node that asks on somebody's behalf."""
        shown = await describe_for_show(self._store, parse_model_name(name), verbose=verbose)
        return msgspec.json.encode(shown)

    async def _pull_on_demand(self, name: str) -> None:
        await self.pull(name)

    def _note_draining(self, draining: bool) -> None:
        self._draining = draining  # for the next session

    async def has_blob(self, digest: str) -> bool:
        """Whether the store has a blob. Raises BadDigest."""
        return await self._store.has(parse_digest(digest))

    async def put_blob(
        self, digest: str, parts: AsyncIterable[bytes], *, size: int | None = None
    ) -> None:
        """Store a blob as it arrives; it is there whole, or not at all. Raises BadDigest,
        DigestMismatch, StoreFull, StoreReadOnly.
        """
        await self._store.receive(parse_digest(digest), parts, size=size)

    # -- asking --------------------------------------------------------------------------------

    def chat(
        self,
        model: str,
        messages: Sequence[ChatMessage] | str,
        *,
        options: Options | None = None,
        call: Call | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of an answer, from whichever node of the swarm is best placed to give it.

        messages: a conversation, or one question. `inference` has the rest: other kinds of request,
        who answers, what is in memory where. Close it (`contextlib.aclosing`) if you leave before
        its end: only that stops the engine.
        Raises BadName, ModelNotFound, NotSupported, BadRequest, QueueFull, NoCandidate,
        BackendUnavailable, BackendFailed, CannotResume.
        """
        return self.inference.chat(model, messages, options=options, call=call)

    async def _made_here(self, name: ModelName) -> ModelInfo:
        """Tell the swarm of a model that was made on this node, and have agreed that this is what
        its name means from now on.
        """
        await self._now.transfer.announce(name)
        note = await self._agree_on(name)
        model = next(each for each in await self.models() if each.name == str(name))
        return replace(model, note=note)

    async def _agree_on(self, name: ModelName) -> str:
        """Why it could not be agreed on; "" if it was."""
        catalogue = self._now.catalogue
        if catalogue is None:
            return ""
        manifest = await self._store.manifest(name)
        try:
            with trio.fail_after(AGREE_S):
                await catalogue.define(name, manifest.digest)
        except trio.TooSlowError:
            problem = f"no answer within {AGREE_S:g} s"
        except (NetworkTrouble, BadInput) as error:
            problem = str(error)
        else:
            return ""
        return (
            f"this node has it, but the cluster has not agreed on it ({problem}); where the name "
            "meant something before, the others keep that until this is done again"
        )

    # -- the swarm -----------------------------------------------------------------------------

    async def invite(self, *, uses: int = 1, expires_s: float = 86_400.0) -> Invitation:
        """Issue a ticket for this node's swarm, which the cluster honours from then on.

        uses: 1 to 256 peers; expires_s: one second to 366 days. Raises BadConfig if one is out of
        its range, NetworkTrouble if the cluster can agree on nothing now.
        """
        addresses = self.addresses[:16]
        if not addresses:
            raise BadConfig(
                "host.listen", "this node listens nowhere, so nobody could use a ticket"
            )
        ticket = self._membership.new_ticket(
            addresses, uses=uses, lifetime_s=int(expires_s), now=wall_clock()
        )
        await self._cluster.issue_ticket(ticket.secret, uses=uses, expires_at=ticket.expires_at)
        return Invitation(
            ticket=format_ticket(ticket), uses=uses, expires_at=_iso(ticket.expires_at)
        )

    async def withdraw_tickets(self) -> int:
        """Let nobody join by a ticket that was issued before; gives how many were still good.
        Raises NetworkTrouble if that cannot be agreed on now.
        """
        return await self._cluster.withdraw_tickets()

    async def join(self, ticket_or_addresses: Sequence[str]) -> JoinReport:
        """Become a member by a ticket, or connect to the peer at the given multiaddrs.

        Raises BadTicket and its kinds, BadAddress, PeerUnreachable, NotAdmitted; BadConfig if this
        node is in another swarm that has other members.
        """
        way = _way_in(ticket_or_addresses)
        async with self._moving:
            await self._check_room()
            if isinstance(way, Ticket):
                return await self._join_by_ticket(way)
            return await self._join_by_addresses(way)

    async def leave(self) -> str:
        """Be a member no more, and forget the swarm and its keys; models stay. The node is alone
        then. Gives "left", "not in a swarm", or what the others still have to do.
        """
        async with self._moving:
            if await self._is_alone():
                return "not in a swarm"
            await self._check_room()
            problem = await self._resign()
            await self._now.connections.leave()
            await self._move(self._start_alone)
            if not problem:
                return "left"
            return (
                f"left, but the cluster does not know it ({problem}): there, "
                f"`omx cluster remove {self.peer_id}`"
            )

    async def _resign(self) -> str:
        """Why the cluster does not let go of this node; "" if it does."""
        cluster = self._now.cluster
        if cluster is None or not cluster.has_others() or cluster.was_removed:
            return ""
        try:
            with trio.fail_after(RESIGN_S):
                await cluster.leave()
        except trio.TooSlowError:
            return f"no agreement within {RESIGN_S:g} s"
        except (NetworkTrouble, NotFound, BadInput) as error:
            return str(error)
        return ""

    # -- the cluster ---------------------------------------------------------------------------

    async def cluster_status(self) -> ClusterStatus:
        """The cluster in one look. Raises BadConfig where this node is a member of none."""
        return await self._cluster.status()

    async def set_role(self, peer: str, role: RoleWish) -> None:
        """Make a member a voter or a learner whatever autopilot thinks; `auto` leaves it to that.

        peer: its id, its name, or a beginning of either that fits one member only. Raises BadInput,
        PeerNotFound, NetworkTrouble.
        """
        await self._cluster.set_role(self._cluster.find(peer), role)

    async def expel(self, peer: str) -> None:
        """Remove a member: it loses access at once, on every node. Raises as `set_role`."""
        cluster = self._cluster
        found = cluster.find(peer)
        if found == self.peer_id:
            raise BadInput("that is this node itself; `omx leave` ends its membership")
        await cluster.remove(found)

    async def transfer_leader(self, peer: str) -> None:
        """Let another voter lead. Raises as `set_role`, and NotLeader."""
        await self._cluster.transfer_leader(self._cluster.find(peer))

    async def snapshot(self) -> int:
        """Make a snapshot of the agreed state here and drop the log behind it; gives the last index
        in it. Raises StoreFull.
        """
        return await self._cluster.snapshot()

    async def rotate_swarm_key(self, *, force: bool = False) -> tuple[str, ...]:
        """Give the swarm a new pre-shared key; tickets issued before are withdrawn. Every member
        that can be reached takes it over within seconds; gives the names of those that cannot,
        which need a new ticket to come back. Raises BadInput if there are any, unless forced; or if
        the swarm is open.
        """
        return await self._cluster.rotate_swarm_key(force=force)

    async def set_clock(self) -> int:
        """Have the cluster take this node's clock for the time; gives it, Unix seconds. All tickets
        are withdrawn. Raises NetworkTrouble.
        """
        return await self._cluster.set_clock()

    async def set_cluster_setting(self, key: str, value: str) -> None:
        """Change a setting that the whole cluster shares. Raises BadInput, NetworkTrouble."""
        await self._cluster.set_setting(key, value)

    @property
    def _cluster(self) -> Cluster:
        cluster = self._now.cluster
        if cluster is None:
            raise BadConfig(
                "cluster",
                "this node has entered an open swarm by an address and is no member of its "
                "cluster; a member's ticket makes it one (`omx invite` there)",
            )
        return cluster

    def request_stop(self) -> None:
        """Ask the node's owner to close it; `wait_for_stop` then returns."""
        self._stop.set()

    async def wait_for_stop(self) -> None:
        """Returns once somebody has asked the node to stop."""
        await self._stop.wait()

    # -- joining and leaving -------------------------------------------------------------------

    async def _join_by_ticket(self, ticket: Ticket) -> JoinReport:
        if self._needs_admission(ticket):
            peers = await self._move(lambda: self._redeem(ticket))
        elif ticket.swarm_id != self._membership.swarm_id:
            await self._check_may_move()
            peers = await self._move(lambda: self._redeem(ticket))
        else:
            try:
                return await self._met(ticket.addresses)
            except NotAdmitted:
                # It was removed and has not heard of it: nobody speaks to it any more.
                peers = await self._move(lambda: self._redeem(ticket))
        return await self._met(peers)

    def _needs_admission(self, ticket: Ticket) -> bool:
        """A ticket of the swarm that this node is in, but not, or no more, as a member; or one that
        has another key by now.
        """
        if ticket.swarm_id != self._membership.swarm_id:
            return False
        cluster = self._now.cluster
        return (
            cluster is None or cluster.was_removed or ticket.swarm_key != self._membership.swarm_key
        )

    async def _join_by_addresses(self, addresses: Sequence[Address]) -> JoinReport:
        """By the first peer of these that can be reached."""
        trouble = PeerUnreachable("anybody", "no address was given")
        for peer in dict.fromkeys(address.peer for address in addresses):
            theirs = [address for address in addresses if address.peer == peer]
            try:
                await self._reach_or_enter(theirs)
                return await self._met([*theirs, *addresses])
            except PeerUnreachable as error:
                trouble = error
        # One with another swarm's key hangs up without a word, as a broken one does.
        hint = "if it is there, its swarm is private: join with a ticket (`omx invite` there)"
        raise PeerUnreachable(trouble.peer, f"{trouble.problem}; {hint}") from trouble

    async def _reach_or_enter(self, addresses: Sequence[Address]) -> None:
        try:
            await self._now.connections.reach(addresses)
        except OmxError:
            # Not of our swarm. If it is an open one, and ours is nobody's but ours, move there.
            if not await self._is_alone():
                raise
            await self._move(lambda: self._enter_open(addresses))

    async def _met(self, peers: Sequence[Address]) -> JoinReport:
        """Be connected to the first of these peers, and stay in touch with all."""
        session = self._now
        first = [address for address in peers if address.peer == peers[0].peer]
        reached = await session.connections.reach(first)
        session.connections.keep(first)
        session.discovery.learn(peers)
        return JoinReport(swarm_id=session.membership.swarm_id.hex(), peers=(reached,))

    async def _check_room(self) -> None:
        """Another swarm means another log. Raises StoreFull before anything has begun."""
        needed = self.config.consensus.segment_bytes + ROOM_BESIDE_LOG_BYTES
        usage = await trio.to_thread.run_sync(shutil.disk_usage, self.config.data_dir)
        if usage.free < needed:
            raise StoreFull(str(self.config.data_dir), needed, usage.free)

    async def _check_may_move(self) -> None:
        if not await self._is_alone():
            raise BadConfig(
                "join", "this node is in a swarm with other members; leave it first (`omx leave`)"
            )
        pulls = self._now.transfer.pulls()
        if pulls:
            raise BadConfig("join", f"a pull is running ({pulls[0]}); let it end first")

    async def _is_alone(self) -> bool:
        """Whether nobody else was ever seen in this swarm."""
        session = self._now
        # Those are hoped for, and known to nobody as members until one is met.
        hoped_for = {parse_address(text).peer for text in self.config.discovery.bootstrap}
        return not (
            session.connections.peers()
            or session.connections.known_addresses()
            or set(session.discovery.known_peers()) - hoped_for
            or (session.cluster is not None and session.cluster.has_others())
            or await trio.to_thread.run_sync(
                has_remembered_peers, self.config.data_dir, session.membership.mdns_fingerprint()
            )
        )

    async def _redeem(self, ticket: Ticket) -> tuple[Address, ...]:
        async with self._provisional(ticket.swarm_key) as connections:
            redeemed = await connections.redeem(ticket, name=printable_name(self.config.name))
        # The place first: it counts only once the record says that this is our swarm.
        folder = cluster_folder(self.config.data_dir, ticket.swarm_id)
        await trio.to_thread.run_sync(save_admission, folder, redeemed.admission)
        await self._replace_membership(lambda: Membership.join(None, ticket))
        return redeemed.peers

    async def _enter_open(self, addresses: Sequence[Address]) -> None:
        async with self._provisional(None) as connections:
            swarm_id = await connections.enter(addresses)
        await self._replace_membership(lambda: Membership.join_open(None, swarm_id))

    async def _start_alone(self) -> None:
        await self._replace_membership(lambda: _founded(self.config))
        try:
            await trio.to_thread.run_sync(forget_remembered_peers, self.config.data_dir)
        except OSError as error:  # it says of which swarm they are, and is of no use in another
            _log.warning("cannot remove the remembered peers: %s", error)

    async def _replace_membership(self, make: Callable[[], Membership]) -> None:
        """In one step: a full disk must not leave this node in no swarm at all."""
        self._membership = await trio.to_thread.run_sync(
            lambda: self._membership.replaced_by(make())
        )

    @asynccontextmanager
    async def _provisional(self, swarm_key: bytes | None) -> AsyncIterator[Connections]:
        """A host in a swarm whose member this node is not yet."""
        async with (
            open_libp2p_host(self._key.seed, self.config.host, swarm_key=swarm_key) as host,
            open_connections(
                host,
                None,
                self.config.host,
                rng=self._rng,
                feed=self.events,
                agent=_agent(self.config),
                wall_clock=wall_clock,
            ) as connections,
        ):
            yield connections

    def _take_over_swarm_key(self, key: bytes) -> None:
        """The cluster has agreed on it, and it is time."""
        self._nursery.start_soon(self._open_anew_with, key)

    async def _open_anew_with(self, key: bytes) -> None:
        async def replace_key() -> None:
            self._membership = await trio.to_thread.run_sync(self._membership.with_swarm_key, key)

        async with self._moving:
            swarm_id = self._membership.swarm_id
            try:
                if swarm_id == self._now.membership.swarm_id:
                    await self._move(replace_key)
            except OmxError as error:
                _log.error("cannot take over the new swarm key: %s", error)

    # -- sessions ------------------------------------------------------------------------------

    @property
    def _now(self) -> Session:
        if self._session is None:
            raise SwarmChanging
        return self._session

    async def _move(self, between: Callable[[], Awaitable[T]]) -> T:
        """Close the session, run `between`, open the next; gives or raises what `between` did."""
        move: _Move[T] = _Move(between)
        with trio.move_on_after(_RENEWED_S):
            await self._moves.send(move)
            await move.over.wait()
            return move.outcome()
        raise DeadlineExceeded("changing the swarm", _RENEWED_S)

    async def _run_sessions(self, task_status: trio.TaskStatus[None]) -> None:
        finished: _Move[Any] | None = None
        while True:
            async with self._open_session() as self._session:
                if finished is None:
                    task_status.started()
                else:
                    finished.over.set()
                finished = await self._asked_moves.receive()
                self._session = None
                self.inference.session_ends()
                for scope in self._pulling:
                    scope.cancel()
            await finished.run()

    @asynccontextmanager
    async def _open_session(self) -> AsyncIterator[Session]:
        membership = self._membership
        async with (
            self._open_host(membership) as host,
            open_session(
                self.config,
                membership,
                host,
                self._store,
                origin=self._origin,
                feed=self.events,
                rng=self._rng,
                agent=_agent(self.config),
                wall_clock=wall_clock,
                on_swarm_key=self._take_over_swarm_key,
                engines=Engines(
                    backends=self._backends,
                    show=self._show_as_json,
                    pull=self._pull_on_demand,
                    draining=self._draining,
                    on_draining=self._note_draining,
                ),
                announce=not self._brief,
            ) as session,
        ):
            await trio.to_thread.run_sync(
                forget_other_clusters, self.config.data_dir, membership.swarm_id
            )
            yield session

    @asynccontextmanager
    async def _open_host(self, membership: Membership) -> AsyncIterator[Libp2pHost]:
        """On the ports that it had before, because the others know those; on others if somebody
        else has taken one meanwhile.
        """
        async with AsyncExitStack() as stack:
            open_with = functools.partial(
                open_libp2p_host,
                self._key.seed,
                swarm_key=membership.swarm_key,
                admit_all=membership.is_open,
            )
            configured = self.config.host
            listening = replace(configured, listen=self._listening or configured.listen)
            try:
                host = await stack.enter_async_context(open_with(listening))
            except PortInUse:
                if listening == configured:
                    raise
                host = await stack.enter_async_context(open_with(configured))
            self._listening = host.listening
            yield host


class _Move(Generic[T]):
    """Something to do between two sessions, and how it went."""

    def __init__(self, between: Callable[[], Awaitable[T]]) -> None:
        self._between = between
        self._result: T | None = None
        self._error: OmxError | None = None
        self.over = trio.Event()
        """Set once the next session is open."""

    async def run(self) -> None:
        """Do it; what goes wrong is the asker's to see, the next session opens all the same."""
        try:
            self._result = await self._between()
        except Exception as error:
            # What comes through a host's nursery comes in a group.
            self._error = first_named(error)
            if self._error is None:
                raise

    def outcome(self) -> T:
        """What it gave, or raises what it raised."""
        if self._error is not None:
            raise self._error
        return cast("T", self._result)


@asynccontextmanager
async def _maybe_api(node: Node, config: NodeConfig, serve_api: bool) -> AsyncIterator[None]:
    if not serve_api:
        yield
        return
    async with open_api(
        node,
        config.api,
        data_dir=config.data_dir,
        peer_id=node.peer_id,
        inference=node.inference,
    ) as server:
        node.api_address = server.address
        node.ollama_address = server.ollama_address
        yield


@asynccontextmanager
async def _open_backends(
    config: NodeConfig, store: BlobStore, *, brief: bool
) -> AsyncIterator[Sequence[Backend]]:
    if brief:  # for one command, which asks no engine of its own
        yield ()
        return
    own = [address for address in (config.api.listen, config.api.ollama_listen) if address]
    async with open_backends(config.inference, store, own_addresses=own) as backends:
        yield backends


@asynccontextmanager
async def _open_origin(config: NodeConfig, key: NodeKey) -> AsyncIterator[Origin | None]:
    if not config.origin.enabled:
        yield None
        return
    from ollamamax_p2p.transfer import open_registry_origin, signing_key

    async with open_registry_origin(
        config.origin,
        node_key=signing_key(key.seed),
        rng=random.Random(secrets.randbits(128)),
        user_agent=f"ollamamax_p2p/{installed_version()}",
    ) as origin:
        yield origin


def _nobody(_: PullProgress) -> None:
    pass


def _without_success(tell: OnProgress) -> OnProgress:
    """For a pull that is only a part of something: its end is not the end."""

    def told(progress: PullProgress) -> None:
        if progress.status != "success":
            tell(progress)

    return told


def _agent(config: NodeConfig) -> str:
    return f"ollamamax_p2p/{installed_version()} {config.name}"


def _founded(config: NodeConfig) -> Membership:
    """A swarm of this node's own, in memory yet; its place in the cluster is on disk already, and
    counts once the swarm is.
    """
    membership = Membership.create(None, open_swarm=config.open_swarm)
    found_place(cluster_folder(config.data_dir, membership.swarm_id))
    return membership


def _membership_path(config: NodeConfig) -> Path:
    return config.data_dir / "swarm"


def _membership_of(config: NodeConfig) -> Membership:
    """The swarm this node is in; a new one with itself as the only member the first time."""
    membership = Membership.load(_membership_path(config))
    if membership is None:
        return _founded(config).kept_at(_membership_path(config))
    if config.open_swarm and not membership.is_open:
        raise BadConfig(
            "open_swarm", "this node is in a private swarm; leave it first, `omx leave`"
        )
    return membership


def _check_models_folder(path: Path) -> None:
    """Whether the store is a folder, or can become one; what only cannot be written is served."""
    missing = path
    try:
        while not path.exists() and path != path.parent:
            missing, path = path, path.parent
        if not path.is_dir():
            problem = "there is a file where a folder should be; give another --models"
            raise StoreDamaged(str(path), problem)
        if missing != path and os.access(path, os.W_OK | os.X_OK):
            # Tried, because some file systems (/proc) take no folder whatever their mode says.
            missing.mkdir()
            missing.rmdir()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST):
            problem = f"this folder cannot be made ({error.strerror}); give another --models"
            raise StoreDamaged(str(missing), problem) from error


@contextlib.contextmanager
def data_dir_of_our_own(path: Path) -> Iterator[None]:
    """The folder, made if it is missing, locked against a second node."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AccessRefused(str(path), "write") from error
        problem = f"this cannot be a data folder ({error.strerror}); give another --data-dir"
        raise StoreDamaged(str(path), problem) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode(errors="replace").strip()
            raise DataDirInUse(str(path), int(holder) if holder.isdigit() else None) from None
        with contextlib.suppress(OSError):  # for people only; a full disk must not end us here
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def _iso_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")

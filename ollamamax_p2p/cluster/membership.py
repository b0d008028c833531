"""Cluster: this node's part in what its swarm agrees on, and its door.

A cluster begins with one node, which founds it; every other is admitted by a ticket that some
member redeems with a committed command. From then on who is a member is what the log says: the gate
of every node follows it, and a removed node is disconnected as soon as that is applied.

Each node runs a replica. While it leads it also works for all: it adds new members as learners,
makes voters of them (`core/autopilot.py`) and ends leases that have run out.

A newcomer knows nothing of the state yet, but must let the others in and know the leader's Raft id:
it is given a roster with its admission, kept on disk, and used until the state says more.
"""

import hashlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import trio
from msgspec import Meta

from ollamamax_p2p.cluster.cluster_state import ClusterState, open_cluster_state
from ollamamax_p2p.cluster.core.autopilot import (
    LeaderView,
    ReplicaHealth,
    next_change,
    observe,
)
from ollamamax_p2p.cluster.core.commands import (
    PEER_ADDRESSES_MAX,
    AnyCommand,
    Done,
    ExpireLeases,
    FoundCluster,
    IssueTicket,
    RedeemTicket,
    Refused,
    RemoveMember,
    Result,
    RoleWish,
    UpdateMember,
    decode_result,
    encode_command,
)
from ollamamax_p2p.cluster.core.rows import Member
from ollamamax_p2p.consensus import (
    ConsensusSettings,
    LogStorage,
    Replica,
    ReplicaStatus,
    bootstrap_log,
    open_file_log,
    open_replica,
    open_snapshot_streams,
    open_stream_transport,
)
from ollamamax_p2p.consensus.core.messages import Message as RaftMessage
from ollamamax_p2p.consensus.core.messages import SnapshotMetadata
from ollamamax_p2p.errors import (
    BadInput,
    DeadlineExceeded,
    NetworkTrouble,
    NotLeader,
    OmxError,
    PeerNotFound,
    StoreDamaged,
)
from ollamamax_p2p.host import (
    ROSTER_MAX,
    Admission,
    Connections,
    PeerHost,
    Requests,
    open_requests,
)
from ollamamax_p2p.identity import (
    Address,
    PeerId,
    parse_address,
    parse_peer_id,
    read_secret,
    write_secret,
)
from ollamamax_p2p.observability import Event, EventFeed
from ollamamax_p2p.wire import Codec, Message, protocol_ids

_log = logging.getLogger(__name__)

FOUNDER_RAFT_ID = 1

DEMOTED_S = 20.0
"""For a vote to be taken away: an election and a change of configuration, several times over."""

LOOK_S = 0.5
"""How often a leader looks after its followers: a dead voter counts in tens of seconds, a new
member should not wait."""

ANNOUNCE_S = 30.0
"""How often a node compares what the cluster knows of it with what is true."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AboutThisNode:
    """What the others are told of this node."""

    peer: PeerId
    name: str
    """At most 64 printable characters; `printable_name` makes them."""
    region: str
    may_vote: bool


class _Place(msgspec.Struct, frozen=True):
    """This node's place in the cluster, as it is written to disk."""

    version: Annotated[int, Meta(ge=1, le=1)]
    raft_id: Annotated[int, Meta(ge=1, le=2**62)]
    founder: bool
    roster: tuple[tuple[str, Annotated[int, Meta(ge=1, le=2**62)]], ...] = ()


class TransferLeader(Message, tag="transfer_leader", frozen=True):
    """To the leader: let this member lead."""

    raft_id: Annotated[int, Meta(ge=1, le=2**62)]


class Transferred(Message, tag="transferred", frozen=True):
    """Somebody else leads now."""


_requests: Codec[TransferLeader] = Codec(TransferLeader, max_bytes=1024)
_answers: Codec[Transferred] = Codec(Transferred, max_bytes=1024)


def place_path(folder: Path) -> Path:
    """Where a node's place in its cluster is kept."""
    return folder / "place"


def has_place(folder: Path) -> bool:
    """Whether this node has a place in the cluster of this folder."""
    return place_path(folder).exists()


def found_place(folder: Path) -> None:
    """Let the next `open_cluster` here found a cluster. Raises AccessRefused, StoreFull."""
    _save_place(folder, _Place(1, FOUNDER_RAFT_ID, founder=True))


def save_admission(folder: Path, admission: Admission) -> None:
    """Let the next `open_cluster` here take the place that was given to this node."""
    roster = tuple((str(peer), number) for peer, number in admission.roster)
    _save_place(folder, _Place(1, admission.raft_id, founder=False, roster=roster))


def _save_place(folder: Path, place: _Place) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_secret(place_path(folder), msgspec.json.encode(place))


def _load_place(folder: Path) -> _Place:
    path = place_path(folder)
    data = read_secret(path)
    if data is None:
        raise StoreDamaged(
            str(path),
            "this node's place in its cluster is missing; `omx leave`, then join with a new ticket",
        )
    try:
        return msgspec.json.decode(data, type=_Place)
    except ValueError as error:
        raise StoreDamaged(
            str(path), f"{error}; `omx leave`, then join with a new ticket"
        ) from error


def printable_name(name: str) -> str:
    """A node's name as the cluster takes it."""
    return "".join(each if each.isprintable() else "?" for each in name)[:64] or "node"


@asynccontextmanager
async def open_cluster(
    folder: Path,
    host: PeerHost,
    about: AboutThisNode,
    swarm_id: bytes,
    swarm_key: bytes | None,
    settings: ConsensusSettings,
    *,
    rng: random.Random,
    feed: EventFeed,
    wall_clock: Callable[[], float],
) -> AsyncIterator["Cluster"]:
    """Take part in the cluster for as long as the block is open; call `follow` once there are
    connections.

    folder: this node's own, with a place that `found_place` or `save_admission` wrote.
    Raises LocalTrouble: StoreDamaged, LogDamaged, LogSyncFailed, StoreFull, AccessRefused.
    """
    place = await trio.to_thread.run_sync(_load_place, folder)
    state = await trio.to_thread.run_sync(open_cluster_state, folder / "state")
    try:
        log = await trio.to_thread.run_sync(open_file_log, folder / "log", settings)
        try:
            if place.founder and not log.last_index():
                await trio.to_thread.run_sync(bootstrap_log, log, (FOUNDER_RAFT_ID,))
            async with _opened(
                host, about, place, state, log, settings, rng, feed, wall_clock
            ) as cluster:
                if place.founder:
                    await cluster._found(swarm_id, swarm_key)
                yield cluster
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(log.close)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(state.close)


@asynccontextmanager
async def _opened(
    host: PeerHost,
    about: AboutThisNode,
    place: _Place,
    state: ClusterState,
    log: LogStorage,
    settings: ConsensusSettings,
    rng: random.Random,
    feed: EventFeed,
    wall_clock: Callable[[], float],
) -> AsyncIterator["Cluster"]:
    cluster = Cluster(host, about, place, state, feed, wall_clock)
    replicas: list[Replica] = []
    # The transport comes before the replica that it delivers to.

    def deliver(messages: list[RaftMessage]) -> None:
        for replica in replicas:
            replica.deliver(messages)

    def unreachable(raft_id: int) -> None:
        for replica in replicas:
            replica.report_unreachable(raft_id)

    calls = trio.CapacityLimiter(1)
    async with (
        open_stream_transport(
            host,
            peer_of=cluster.peer_of,
            id_of=cluster.raft_id_of,
            deliver=deliver,
            report_unreachable=unreachable,
            settings=settings,
        ) as transport,
        open_snapshot_streams(
            host, state, is_member=cluster.is_member, settings=settings, calls=calls
        ) as snapshots,
    ):

        async def fetch(raft_id: int, metadata: SnapshotMetadata) -> None:
            peer = cluster.peer_of(raft_id)
            if peer is None:
                raise PeerNotFound(f"replica {raft_id}")
            await snapshots.fetch(peer, metadata)

        async with (
            open_replica(
                place.raft_id,
                log,
                state,
                transport,
                settings=settings,
                rng=rng,
                fetch_snapshot=fetch,
                calls=calls,
                session_ended=_session_ended,
                name_of=cluster.name_of,
            ) as replica,
            open_requests(
                host,
                protocol_ids.CLUSTER,
                requests=_requests,
                answers=_answers,
                answer=cluster._answer,
            ) as requests,
            trio.open_nursery() as nursery,
        ):
            replicas.append(replica)
            cluster._start(replica, requests, nursery)
            yield cluster
            nursery.cancel_scope.cancel()


class Cluster:
    """The agreed state, this node's way to change it, and its door (a `host.MemberGate`). Made by
    `open_cluster`.
    """

    def __init__(
        self,
        host: PeerHost,
        about: AboutThisNode,
        place: _Place,
        state: ClusterState,
        feed: EventFeed,
        wall_clock: Callable[[], float],
    ) -> None:
        self.state = state
        """What is agreed, as far as it has been applied here; read it at any time."""
        self.raft_id = place.raft_id
        self._host = host
        self._about = about
        self._feed = feed
        self._wall_clock = wall_clock
        self._roster = {parse_peer_id(text): number for text, number in place.roster}
        self._roster[about.peer] = place.raft_id
        self._applied = trio.Event()
        self._told_leader = 0

    def _start(
        self,
        replica: Replica,
        requests: Requests[TransferLeader, Transferred],
        nursery: trio.Nursery,
    ) -> None:
        self._replica = replica
        self._requests = requests
        self._nursery = nursery
        token = trio.lowlevel.current_trio_token()

        def wake() -> None:
            # Called in the thread that applied; a run that is over needs no waking.
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(self._wake)

        self.state.on_applied(wake)
        nursery.start_soon(self._lead)

    def _wake(self) -> None:
        applied, self._applied = self._applied, trio.Event()
        applied.set()

    # -- the door

    def is_member(self, peer: PeerId) -> bool:
        """Whether the peer is a member, as far as is known here."""
        return self.raft_id_of(peer) is not None

    def raft_id_of(self, peer: PeerId) -> int | None:
        """A member's Raft id."""
        if self.state.members():
            return self.state.raft_id_of(peer)
        return self._roster.get(peer)

    def peer_of(self, raft_id: int) -> PeerId | None:
        """Whose Raft id this is."""
        if self.state.members():
            return self.state.peer_of(raft_id)
        return next((peer for peer, each in self._roster.items() if each == raft_id), None)

    def has_others(self) -> bool:
        """Whether anybody else is, or may be, a member."""
        return len(self.state.members() or self._roster) > 1

    def name_of(self, raft_id: int) -> str:
        """A member's peer id, for errors."""
        return self.peer_of(raft_id) or f"replica {raft_id}"

    async def redeem(self, secret: bytes, peer: PeerId) -> Admission:
        """Make the peer a member by a ticket, once the cluster has agreed. Raises BadTicket, or
        NetworkTrouble if it cannot agree now.
        """
        done = await self.change(
            RedeemTicket(
                secret_hash=_hash(secret),
                peer=peer,
                now=self._now(),
                # It tells its own name once it is in.
                name="node",
            )
        )
        return Admission(done.number, self._roster_for(peer))

    def _roster_for(self, newcomer: PeerId) -> tuple[tuple[PeerId, int], ...]:
        voters = set(self._replica.status().voters)
        known = {peer: member.raft_id for peer, member in self.state.members().items()}
        known.pop(newcomer, None)
        ordered = sorted(known.items(), key=lambda line: (line[1] not in voters, line[1]))
        return tuple(ordered[:ROSTER_MAX])

    # -- changing what is agreed

    async def change(self, command: AnyCommand) -> Done:
        """Have a command agreed on and applied here. Raises what it was refused for, QuorumLost or
        ProposalDropped.
        """
        result = await self.ask(command)
        if isinstance(result, Refused):
            raise result.error()
        return result

    async def ask(self, command: AnyCommand) -> Result:
        """The same, with the refusal as a value. Raises QuorumLost, ProposalDropped."""
        return decode_result(await self._replica.propose(encode_command(command)))

    async def issue_ticket(self, secret: bytes, *, uses: int, expires_at: int) -> None:
        """Let the cluster honour a ticket with this secret; it keeps the hash only."""
        await self.change(
            IssueTicket(
                secret_hash=_hash(secret),
                uses=uses,
                expires_at=expires_at,
                issued_at=self._now(),
            )
        )

    async def set_role(self, peer: PeerId, role: RoleWish) -> None:
        """Make a member a voter or a learner, whatever autopilot thinks; `auto` leaves it to that.
        The leader carries it out within a moment, if enough voters live. Raises PeerNotFound.
        """
        self._check_member(peer)
        await self.change(UpdateMember(peer=peer, role=role))

    async def remove(self, peer: PeerId) -> None:
        """Expel a member: it loses access at once. Raises PeerNotFound, QuorumLost, BadInput if it
        is the last voter.
        """
        member = self._check_member(peer)
        status = self._replica.status()
        if member.raft_id in status.voters:
            if set(status.voters) | set(status.learners) == {member.raft_id}:
                raise BadInput(f"{peer} is the only member; nobody would be left")
            await self.change(UpdateMember(peer=peer, role="learner"))
            await self._until_no_voter(member.raft_id)
        await self.change(RemoveMember(peer=peer))

    async def _until_no_voter(self, raft_id: int) -> None:
        with trio.move_on_after(DEMOTED_S):
            while True:
                conf = self.state.conf_state
                if raft_id not in {*conf.voters, *conf.voters_outgoing}:
                    return
                await self._applied.wait()
        raise DeadlineExceeded("taking its vote from that member", DEMOTED_S)

    async def leave(self) -> None:
        """Be a member no more; the others agree on it before this returns. Raises as `remove`."""
        await self.remove(self._about.peer)

    async def transfer_leader(self, peer: PeerId) -> None:
        """Let another voter lead. Raises PeerNotFound, NotLeader, BadInput, NetworkTrouble."""
        member = self._check_member(peer)
        status = self._replica.status()
        if member.raft_id not in status.voters:
            raise BadInput(f"{peer} has no vote; promote it first (`omx cluster promote`)")
        if self._replica.leads:
            await self._replica.transfer_leader(member.raft_id)
            return
        leader = self.peer_of(status.leader) if status.leader else None
        if leader is None:
            raise NotLeader("")
        await self._requests.ask(leader, TransferLeader(raft_id=member.raft_id))

    async def _answer(self, peer: PeerId, request: TransferLeader) -> Transferred:
        if request.raft_id not in self._replica.status().voters:
            raise BadInput(f"replica {request.raft_id} has no vote")
        await self._replica.transfer_leader(request.raft_id)
        return Transferred()

    async def snapshot(self) -> SnapshotMetadata | None:
        """Make a snapshot of the state here, and drop the log behind it. None: nothing has changed
        since the last.
        """
        return await self._replica.make_snapshot()

    def _check_member(self, peer: PeerId) -> Member:
        member = self.state.member(peer)
        if member is None:
            raise PeerNotFound(peer)
        return member

    # -- looking

    @property
    def leader(self) -> PeerId | None:
        """Who leads, if anybody is known to."""
        return self.peer_of(self._replica.leader) if self._replica.leader else None

    @property
    def leads(self) -> bool:
        """Whether this node does."""
        return self._replica.leads

    def status(self) -> ReplicaStatus:
        """This node's replica at a glance."""
        return self._replica.status()

    async def read(self) -> None:
        """Returns once `state` shows everything that anybody was told is done before this call.
        Raises QuorumLost.
        """
        await self._replica.read()

    # -- tasks

    async def _found(self, swarm_id: bytes, swarm_key: bytes | None) -> None:
        """Be the first member; does nothing at later starts."""
        if self.state.members():
            return
        about = self._about
        command = FoundCluster(
            swarm_id=swarm_id,
            swarm_key=swarm_key,
            peer=about.peer,
            name=about.name,
            region=about.region,
            may_vote=about.may_vote,
        )
        try:
            await self.change(command)
        except BadInput:
            # Proposed by an earlier start of this node, and applied only now.
            if not self.state.members():
                raise

    def follow(self, connections: Connections) -> None:
        """Stay connected to the members, and to nobody who no longer is one, for as long as the
        cluster is open.
        """
        self._nursery.start_soon(self._follow_members, connections)
        self._nursery.start_soon(self._announce)

    async def _follow_members(self, connections: Connections) -> None:
        before: frozenset[PeerId] = frozenset()
        told: dict[PeerId, tuple[str, ...]] = {}
        while True:
            applied = self._applied
            now = self.state.member_ids()
            for peer in before - now:
                _log.info("%s is a member no more", peer)
                self._report("cluster.removed", peer)
                connections.expel(peer)
            for peer in now - before:
                self._report("cluster.member", peer)
            for peer, member in self.state.members().items():
                if peer != self._about.peer and told.get(peer) != member.addresses:
                    told[peer] = member.addresses
                    connections.keep(_parsed(member.addresses, peer))
            before = now
            await applied.wait()

    async def _announce(self) -> None:
        """Have the cluster know this node as it is."""
        while True:
            with suppress(NetworkTrouble, BadInput):
                await self._announce_once()
            with trio.move_on_after(ANNOUNCE_S):
                await self._until_unknown()

    async def _until_unknown(self) -> None:
        while self._is_known():
            await self._applied.wait()
        await trio.sleep(1)  # not more often than that, whatever others say of us

    def _is_known(self) -> bool:
        member = self.state.member(self._about.peer)
        about = self._about
        return member is None or (
            (member.name, member.region, member.may_vote)
            == (about.name, about.region, about.may_vote)
            and member.addresses == self._own_addresses()
        )

    async def _announce_once(self) -> None:
        if self._is_known():
            return
        about = self._about
        await self.change(
            UpdateMember(
                peer=about.peer,
                name=about.name,
                region=about.region,
                may_vote=about.may_vote,
                addresses=self._own_addresses(),
            )
        )

    def _own_addresses(self) -> tuple[str, ...]:
        return tuple(map(str, self._host.addresses[:PEER_ADDRESSES_MAX]))

    async def _lead(self) -> None:
        """What the leader does for all."""
        led_since: float | None = None
        health: dict[int, ReplicaHealth] = {}
        while True:
            await trio.sleep(LOOK_S)
            self._tell_leader()
            if not self._replica.leads:
                led_since, health = None, {}
                continue
            now = trio.current_time()
            led_since = now if led_since is None else led_since
            health = self._looked_at(health, now)
            try:
                await self._work_for_all(led_since, health, now)
            except (NetworkTrouble, BadInput) as error:
                _log.info("autopilot: %s", error)

    def _tell_leader(self) -> None:
        leader = self._replica.leader
        if leader != self._told_leader:
            self._told_leader = leader
            peer = self.peer_of(leader) if leader else None
            self._report("cluster.leader", peer or "")

    def _looked_at(self, before: dict[int, ReplicaHealth], now: float) -> dict[int, ReplicaHealth]:
        settings = self.state.settings()
        return {
            each.raft_id: observe(
                before.get(each.raft_id),
                answered=each.last_contact_s is not None and each.last_contact_s < 2 * LOOK_S,
                behind=each.lag,
                settings=settings,
                now=now,
            )
            for each in self._replica.status().members
        }

    async def _work_for_all(
        self, led_since: float, health: dict[int, ReplicaHealth], now: float
    ) -> None:
        state = self.state
        view = LeaderView(
            leader=self.raft_id,
            leading_since=led_since,
            conf_state=state.conf_state,
            members={member.raft_id: member for member in state.members().values()},
            health=health,
        )
        wanted = next_change(view, state.settings(), now)
        if isinstance(wanted, RemoveMember):
            await self.change(wanted)
        elif wanted is not None:
            _log.info("autopilot: changing the replicas: %s", wanted.changes)
            await self._replica.change_members(wanted)
        if state.leases_due(self._now()):
            await self.change(ExpireLeases(now=self._now()))

    def _now(self) -> int:
        return int(self._wall_clock())

    def _report(self, kind: str, peer: str) -> None:
        at = datetime.fromtimestamp(self._wall_clock(), UTC).isoformat(timespec="seconds")
        self._feed.report(Event(kind=kind, at=at, facts={"peer": peer}))


def _session_ended(result: bytes) -> bool:
    # The message is short and common to all: compared before it is decoded for nothing.
    if b"session_ended" not in result:
        return False
    decoded = decode_result(result)
    return isinstance(decoded, Refused) and decoded.reason == "session_ended"


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _parsed(texts: Sequence[str], peer: PeerId) -> list[Address]:
    """A member's addresses that we understand and that are its own."""
    found: list[Address] = []
    for text in texts:
        with suppress(OmxError):
            found.append(parse_address(text))
    return [address for address in found if address.peer == peer]

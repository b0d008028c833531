"""Cluster: this node's part in what its swarm agrees on, and its door.

A cluster begins with one node, which founds it; every other is admitted by a ticket that some
member redeems with a committed command. From then on who is a member is what the log says: the gate
of every node follows it, and a removed node is disconnected as soon as that is applied.

Each node runs a replica. While it leads it also works for all: it adds new members as learners,
makes voters of them (`core/autopilot.py`) and ends leases that have run out.

A newcomer knows nothing of the state yet, but must let the others in and know the leader's Raft id:
it is given a roster with its admission, kept on disk, and used until the state says more.
"""

import functools
import hashlib
import logging
import random
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import trio

from ollamamax_p2p.cluster.cluster_state import ClusterState, open_cluster_state
from ollamamax_p2p.cluster.core.agreed_settings import SETTINGS, Setting
from ollamamax_p2p.cluster.core.autopilot import (
    LeaderView,
    ReplicaHealth,
    next_change,
    observe,
)
from ollamamax_p2p.cluster.core.commands import (
    PEER_ADDRESSES_MAX,
    VOTES,
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
    RotateSwarmKey,
    SetClock,
    SetSetting,
    SettingValue,
    UpdateMember,
    WithdrawTickets,
    decode_result,
    encode_command,
)
from ollamamax_p2p.cluster.core.messages import (
    REPLICA_LINES_MAX,
    AnyAnswer,
    AnyRequest,
    LookAtReplicas,
    ReplicaLine,
    Replicas,
    TransferLeader,
    Transferred,
    answers_codec,
    requests_codec,
)
from ollamamax_p2p.cluster.core.rows import Member
from ollamamax_p2p.cluster.place import (
    FOUNDER_RAFT_ID,
    LEAVE_AND_JOIN,
    Place,
    load_place,
    save_place,
)
from ollamamax_p2p.cluster.status import ClusterStatus, described, disk_trouble
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
    NotAdmitted,
    NotFound,
    NotLeader,
    OmxError,
    PeerNotFound,
    QuorumLost,
    StoreDamaged,
    TicketExpired,
    TicketUnknown,
    TicketUsedUp,
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
    iso_time,
    parse_address,
    parse_peer_id,
)
from ollamamax_p2p.observability import Event, EventFeed
from ollamamax_p2p.wire import protocol_ids

_log = logging.getLogger(__name__)

DEMOTED_S = 20.0
"""For a vote to be taken away: an election and a change of configuration, several times over."""

LOOK_S = 0.5
"""How often a leader looks after its followers: a dead voter counts in tens of seconds, a new
member should not wait."""

ASK_LEADER_S = 2.0
"""For the leader to tell how far the others are; a status does not wait for a dead one."""

COME_BACK = "`omx leave`, then join with a new ticket if it is to come back"

KNOCKED_AT_MAX = 3
"""Members that a leaving node asks whether it still is one."""

KEY_CHANGE_S = 6.0
"""Between the agreement on a new swarm key and its use: the time in which every member that can be
reached learns of it. Who was silent for half of that when the key was changed counts as away."""

MEMBERS_KEPT_MAX = 255
"""Members that a node stays connected to, voters first: as many connections as `HostSettings` takes
by default, less one for a newcomer."""

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
    """Take part in the cluster for as long as the block is open; open `following` once there are
    connections.

    folder: this node's own, with a place that `found_place` or `save_admission` wrote.
    Raises LocalTrouble: StoreDamaged, LogDamaged, LogSyncFailed, StoreFull, AccessRefused.
    """
    place = await trio.to_thread.run_sync(load_place, folder)
    state = await trio.to_thread.run_sync(open_cluster_state, folder / "state")
    try:
        log = await trio.to_thread.run_sync(open_file_log, folder / "log", settings)
        try:
            if not log.last_index():
                if place.begun:
                    raise StoreDamaged(
                        str(folder / "log"),
                        "this node's part of the log is gone, and with it what it voted for; "
                        + LEAVE_AND_JOIN,
                    )
                if place.founder:
                    await trio.to_thread.run_sync(bootstrap_log, log, (FOUNDER_RAFT_ID,))
            remember = functools.partial(
                save_place, folder, msgspec.structs.replace(place, begun=True)
            )
            async with _opened(
                host, about, place, state, log, swarm_key, settings, rng, feed, wall_clock
            ) as cluster:
                if not place.begun:
                    cluster._nursery.start_soon(cluster._remember_begin, remember)
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
    place: Place,
    state: ClusterState,
    log: LogStorage,
    swarm_key: bytes | None,
    settings: ConsensusSettings,
    rng: random.Random,
    feed: EventFeed,
    wall_clock: Callable[[], float],
) -> AsyncIterator["Cluster"]:
    cluster = Cluster(host, about, place, state, swarm_key, feed, wall_clock)
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
                requests=requests_codec,
                answers=answers_codec,
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
        place: Place,
        state: ClusterState,
        swarm_key: bytes | None,
        feed: EventFeed,
        wall_clock: Callable[[], float],
    ) -> None:
        self.state = state
        """What is agreed, as far as it has been applied here; read it at any time."""
        self.raft_id = place.raft_id
        self._host = host
        self._about = about
        self._swarm_key = swarm_key
        self._feed = feed
        self._wall_clock = wall_clock
        self._roster = {parse_peer_id(text): number for text, number in place.roster}
        self._roster[about.peer] = place.raft_id
        self._applied = trio.Event()
        self._told_leader = 0
        self._leaving = False
        self._connections: Connections | None = None

    def _start(
        self,
        replica: Replica,
        requests: Requests[AnyRequest, AnyAnswer],
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
        nursery.start_soon(self._begin_alone)
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

    async def redeem(self, secret: bytes, peer: PeerId, name: str) -> Admission:
        """Make the peer a member by a ticket, once the cluster has agreed. Raises BadTicket, or
        NetworkTrouble if it cannot agree now.
        """
        await self._check_ticket(_hash(secret), peer)
        done = await self.change(
            RedeemTicket(
                secret_hash=_hash(secret),
                peer=peer,
                now=self._now(),
                name=printable_name(name),
            )
        )
        return Admission(done.number, self._roster_for(peer), votes=done.text == VOTES)

    async def _check_ticket(self, secret_hash: bytes, peer: PeerId) -> None:
        """Refuse without a word to the log what it would refuse: who has no ticket must not be able
        to make it grow. A read costs no write, and many share one.
        """
        state = self.state
        ticket = state.ticket(secret_hash)
        now = max(state.clock(), self._now())
        if ticket is not None and not ticket.is_dead(now):
            return
        await self.read()
        ticket, now = state.ticket(secret_hash), max(state.clock(), self._now())
        if ticket is None:
            raise TicketUnknown
        if state.member(peer) is not None or not ticket.is_dead(now):
            return
        if now >= ticket.expires_at:
            raise TicketExpired(iso_time(ticket.expires_at))
        raise TicketUsedUp(ticket.uses)

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
        """The same, with the refusal as a value. Raises QuorumLost, ProposalDropped; BadInput if
        this node is a member no more.
        """
        self._check_not_removed()
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

    async def withdraw_tickets(self) -> int:
        """Forget every ticket; gives how many could still be used. Raises NetworkTrouble."""
        return (await self.change(WithdrawTickets())).number

    async def set_setting(self, key: str, value: str) -> None:
        """Change one of the settings that all share. Raises BadInput, NetworkTrouble."""
        known = SETTINGS.get(key)
        if known is None:
            raise BadInput(
                f"{key}: no such setting of the cluster; there are {', '.join(SETTINGS)}"
            )
        given = _setting_value(value, known)
        problem = known.problem(given)
        if problem:
            raise BadInput(f"{key}: {problem}, not {value!r}")
        await self.change(SetSetting(key=key, value=given))

    async def set_clock(self) -> int:
        """Have the cluster take this node's clock for the time, which one that was wrong may have
        driven ahead; gives it, Unix seconds. All tickets are withdrawn; leases keep what time they
        had left. Raises NetworkTrouble.
        """
        return (await self.change(SetClock(now=self._now()))).number

    async def rotate_swarm_key(self, *, force: bool) -> tuple[str, ...]:
        """Have a new pre-shared key agreed on; gives the names of members that will not learn of it
        in time. Raises BadInput if there are some, unless forced, or if the swarm is open.
        """
        if not self.state.swarm_keys():
            raise BadInput("this swarm is open: it has no key")
        away = await self._away()
        if away and not force:
            raise BadInput(
                f"{len(away)} of the members cannot be reached now and would need a new ticket to "
                f"come back: {', '.join(away[:5])}; wait for them, or --force"
            )
        generation = self.state.swarm_key_generation()
        await self.change(WithdrawTickets())
        await self.change(RotateSwarmKey(generation=generation, key=secrets.token_bytes(32)))
        return away

    async def _away(self) -> tuple[str, ...]:
        """Names of members that the leader has not heard of lately."""
        status = await self.status()
        if not status.has_quorum:
            raise QuorumLost("too few voters answer")
        return tuple(
            f"{each.name} ({each.peer_id})"
            for each in status.members
            if each.last_contact_s is None or each.last_contact_s > KEY_CHANGE_S / 2
        )

    def find(self, text: str) -> PeerId:
        """The member that is meant: by its peer id, its name, or a beginning of either. Raises
        BadInput if several fit, NotFound if none does.
        """
        members = self.state.members()
        exact = [peer for peer, each in members.items() if text in (peer, each.name)]
        begun = [
            peer
            for peer, each in members.items()
            if (text and peer.startswith(text)) or each.name.startswith(text)
        ]
        found = exact or begun
        if len(found) > 1:
            raise BadInput(f"{text!r} fits {len(found)} members; give more of the peer id")
        if not found:
            raise NotFound(f"no member is called {text!r}; see `omx cluster members`")
        return found[0]

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
            try:
                await self._until_no_voter(member.raft_id)
            except DeadlineExceeded:
                await self.change(UpdateMember(peer=peer, role=member.role))
                raise
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
        self._leaving = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_refused, nursery.cancel_scope)
                await self.remove(self._about.peer)
                nursery.cancel_scope.cancel()
        except BaseException:
            self._leaving = False
            raise

    async def _until_refused(self, scope: trio.CancelScope) -> None:
        """Who applies our removal hangs up at once, often before it has told us. Then we learn of
        it when we knock.
        """
        while True:
            await trio.sleep(LOOK_S)
            voters = [PeerId(member.peer) for member in self._voters_first()]
            for peer in [each for each in voters if each != self._about.peer][:KNOCKED_AT_MAX]:
                try:
                    if self._connections is not None:
                        await self._connections.reach_peer(peer)
                except NotAdmitted:
                    scope.cancel()
                    return
                except OmxError as error:
                    _log.debug("%s", error)

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

    async def _answer(self, peer: PeerId, request: AnyRequest) -> AnyAnswer:
        if not self.is_member(peer):  # in an open swarm others than members are connected too
            raise BadInput("only members of the cluster may ask that")
        if isinstance(request, LookAtReplicas):
            return Replicas(lines=self._replica_lines())
        if request.raft_id not in self._replica.status().voters:
            raise BadInput(f"replica {request.raft_id} has no vote")
        await self._replica.transfer_leader(request.raft_id)
        return Transferred()

    def _replica_lines(self) -> tuple[ReplicaLine, ...]:
        if not self._replica.leads:
            raise BadInput("another node leads")
        return tuple(
            ReplicaLine(each.raft_id, each.lag, each.state, each.last_contact_s)
            for each in self._replica.status().members[:REPLICA_LINES_MAX]
        )

    async def snapshot(self) -> int:
        """Make a snapshot of the state here, and drop the log behind it; gives the last index in
        the newest one. Raises StoreFull.
        """
        await self._replica.make_snapshot()
        return self._replica.status().snapshot_index

    def _check_member(self, peer: PeerId) -> Member:
        member = self.state.member(peer)
        if member is None:
            raise PeerNotFound(peer)
        return member

    # -- looking

    @property
    def peer_id(self) -> PeerId:
        """This node's own."""
        return self._about.peer

    @property
    def leader(self) -> PeerId | None:
        """Who leads, if anybody is known to."""
        return self.peer_of(self._replica.leader) if self._replica.leader else None

    @property
    def leads(self) -> bool:
        """Whether this node does."""
        return self._replica.leads

    @property
    def has_quorum(self) -> bool:
        """Whether something can be agreed on now, as far as is known here."""
        return self._replica.status().has_quorum

    @property
    def was_removed(self) -> bool:
        """Whether this node is a member no more; it sees and agrees on nothing from then on."""
        members = self.state.member_ids()
        return bool(members) and self._about.peer not in members

    async def status(self) -> ClusterStatus:
        """The cluster in one look; asks the leader how far the others are."""
        replica, state = self._replica.status(), self.state
        state_index, state_hash = state.hash_at()
        lines = {line.raft_id: line for line in await self._lines_of_leader()}
        return ClusterStatus(
            peer_id=self._about.peer,
            role=self._role(replica),
            leader=self.leader or "",
            term=replica.term,
            has_quorum=replica.has_quorum,
            last_contact_s=replica.last_contact_s,
            committed=replica.committed,
            applied=replica.applied,
            log_first=replica.first_index,
            log_last=replica.last_index,
            snapshot=replica.snapshot_index,
            state_index=state_index,
            state_hash=state_hash.hex(),
            changing=replica.has_pending_change,
            trouble=disk_trouble(replica),
            swarm_key_generation=state.swarm_key_generation() if state.swarm_keys() else 0,
            tickets=state.tickets().alive,
            settings=asdict(state.settings()),
            members=tuple(
                described(member, replica, lines.get(member.raft_id))
                for member in sorted(state.members().values(), key=lambda each: each.raft_id)
            ),
        )

    def _role(self, replica: ReplicaStatus) -> str:
        if self.was_removed:
            return "removed"
        return "learner" if replica.is_learner else replica.role.replace("_", "-")

    async def _lines_of_leader(self) -> tuple[ReplicaLine, ...]:
        """Empty if it cannot be asked."""
        leader = self.leader
        if self._replica.leads:
            return self._replica_lines()
        if leader is None:
            return ()
        with trio.move_on_after(ASK_LEADER_S), suppress(OmxError):
            answer = await self._requests.ask(leader, LookAtReplicas())
            return answer.lines if isinstance(answer, Replicas) else ()
        return ()

    async def read(self) -> None:
        """Returns once `state` shows everything that anybody was told is done before this call.
        Raises QuorumLost; BadInput if this node is a member no more.
        """
        self._check_not_removed()
        await self._replica.read()

    def _check_not_removed(self) -> None:
        if self.was_removed:
            raise BadInput(f"this node has been removed from its cluster; {COME_BACK}")

    # -- tasks

    async def _begin_alone(self) -> None:
        """A node that is the only voter need not wait for others before it leads."""
        while not self._replica.leader:
            status = self._replica.status()
            if status.voters == (self.raft_id,) and status.applied == status.committed:
                self._replica.campaign()
                return
            await self._replica.wait_changed()

    async def _remember_begin(self, remember: Callable[[], None]) -> None:
        """From here on an empty log is a lost one."""
        while not self._replica.applied_index:
            await self._replica.wait_changed()
        await trio.to_thread.run_sync(remember)

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

    @asynccontextmanager
    async def following(
        self,
        connections: Connections,
        on_swarm_key: Callable[[bytes], None] = lambda key: None,
        *,
        announce: bool = True,
    ) -> AsyncIterator[None]:
        """Stay connected to the members, and to nobody who no longer is one, for as long as the
        block is open.

        on_swarm_key: called once with the key that the cluster has agreed on, if that is another
        than the one with which `open_cluster` was called, when it is time to use it.
        announce: have the cluster know this node's name, region and addresses.
        """
        self._connections = connections
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_members, connections)
            nursery.start_soon(self._follow_swarm_key, on_swarm_key)
            if announce:
                nursery.start_soon(self._announce)
            yield
            nursery.cancel_scope.cancel()

    async def _follow_swarm_key(self, on_swarm_key: Callable[[bytes], None]) -> None:
        if self._swarm_key is None:
            return
        while True:
            applied = self._applied
            agreed = self.state.swarm_keys()
            if agreed and agreed[0] != self._swarm_key:
                _log.warning("the cluster has a new swarm key; using it in %g s", KEY_CHANGE_S)
                await trio.sleep(KEY_CHANGE_S)
                on_swarm_key(agreed[0])
                return
            await applied.wait()

    async def _follow_members(self, connections: Connections) -> None:
        before: frozenset[PeerId] = frozenset()
        told: dict[PeerId, tuple[str, ...]] = {}
        while True:
            applied = self._applied
            now = self.state.member_ids()
            for peer in before - now:
                told.pop(peer, None)
                self._see_off(peer, connections)
            for peer in now - before:
                self._report("cluster.member", peer)
            for member in self._voters_first():
                peer = PeerId(member.peer)
                if peer == self._about.peer or told.get(peer) == member.addresses:
                    continue
                if peer in told or len(told) < MEMBERS_KEPT_MAX:
                    told[peer] = member.addresses
                    connections.keep(_parsed(member.addresses, peer))
            before = now
            await applied.wait()

    def _voters_first(self) -> list[Member]:
        conf = self.state.conf_state
        voters = {*conf.voters, *conf.voters_outgoing}
        return sorted(
            self.state.members().values(),
            key=lambda member: (member.raft_id not in voters, member.raft_id),
        )

    def _see_off(self, peer: PeerId, connections: Connections) -> None:
        self._report("cluster.removed", peer)
        if peer == self._about.peer and self._leaving:
            return
        if peer == self._about.peer:
            for other in self.state.members():
                connections.forget(other)  # they would only refuse us, again and again
            _log.error("this node has been removed from its cluster; %s", COME_BACK)
            return
        _log.warning("%s is a member no more", peer)
        connections.expel(peer)

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


def _setting_value(text: str, setting: Setting) -> SettingValue:
    """As a person writes it; what is neither becomes -1, which no setting takes."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if setting.choices is None and text.lower() in words:
        return words[text.lower()]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1


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

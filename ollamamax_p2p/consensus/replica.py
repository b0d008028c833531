"""Replica: Raft running on this node. The loop around `core.drive`, which decides everything.

One task, the loop, owns the Drive. Whatever happens (messages, ticks, requests, finished work) is
put into the Drive where it happens, in the one thread of trio, and wakes the loop; no queue stands
in between, so none can grow. The loop then takes all the work there is, in one go: what came while
it did the last round is one batch. In this order:

    persist   The writer takes everything that has queued up, writes it in one step with one fsync
              in a thread, and tells the Drive. While it writes, the next batch gathers: that is
              group commit, and needs no timer.
    send      What depends on no write leaves at once, a leader's appends among it, so that its
              followers' disks work while its own does. Votes and acknowledgements leave when what
              they speak of is durable, not before.
    apply     The applier gives what is agreed on, and durable here, to the state machine: many
              commands in one transaction, in a thread. Then whoever proposed them is answered.

Beside them: the ticker; the keeper, which makes snapshots and lets go of the log behind them; and
while a snapshot comes in, the task that fetches it (the order is told in `core.drive`).

What ends the block: LogSyncFailed and StoreDamaged, of the log and of the state machine, travel up
out of it. Then the process must end, because nobody knows what is on the disk until it is read
again. A full disk does not: this node stops leading, refuses proposals, still answers stale reads,
and goes on by itself when there is room.
"""

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import trio

from ollamamax_p2p.consensus.core.command import Command
from ollamamax_p2p.consensus.core.config_change import conf_change_entry
from ollamamax_p2p.consensus.core.drive import (
    Apply,
    Drive,
    Outcome,
    ReadKind,
    Work,
    Write,
    command_of,
    merged_writes,
    proposal_of,
)
from ollamamax_p2p.consensus.core.log_errors import Compacted
from ollamamax_p2p.consensus.core.logger import Logger
from ollamamax_p2p.consensus.core.messages import (
    NOBODY,
    ConfChange,
    ConfChangeType,
    ConfChangeV2,
    Entry,
    HardState,
    Message,
    SnapshotMetadata,
    payload_size,
)
from ollamamax_p2p.consensus.core.sessions import SESSION_ENDED, ClientSession
from ollamamax_p2p.consensus.core.tracing import TraceSink
from ollamamax_p2p.consensus.log_storage import LogStorage
from ollamamax_p2p.consensus.session_places import SessionPlaces
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.state_machine import StateMachine
from ollamamax_p2p.consensus.storage_work import (
    WaitingCommit,
    carry_out_applies,
    carry_out_write,
    let_go,
    make_snapshot,
    open_drive,
    snapshot_index,
    snapshot_lacks_member,
)
from ollamamax_p2p.consensus.transport import Transport
from ollamamax_p2p.errors import (
    DeadlineExceeded,
    HistoryGone,
    NetworkTrouble,
    NotFound,
    OutcomeUnknown,
    PeerMisbehaved,
    QuorumLost,
    StoreFull,
)

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

FetchSnapshot = Callable[[int, SnapshotMetadata], Awaitable[None]]
"""Fetch a snapshot from the member with this Raft id, and install it in the state machine, whole or
not at all. Raises NetworkTrouble, PeerMisbehaved or StoreFull if that can't be done now.
`SnapshotStreams.fetch` is one, but for the name of the peer."""

_WATCH_PAGE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberStatus:
    """What a leader knows of another member."""

    raft_id: int
    is_voter: bool
    match: int
    """The last entry that it is known to have written."""
    lag: int
    """Entries that it lacks."""
    state: str
    """probe, replicate, or snapshot while it is sent one."""
    is_active: bool
    """It has answered within the last election timeout or two."""
    last_contact_s: float | None
    """None: not since this replica began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One look at a replica."""

    raft_id: int
    role: str
    """leader, follower, candidate, pre_candidate."""
    is_learner: bool
    term: int
    leader: int
    """0: nobody is known to lead."""
    committed: int
    applied: int
    first_index: int
    last_index: int
    snapshot_index: int
    log_bytes: int
    """Of entries applied since the last snapshot."""
    voters: tuple[int, ...]
    voters_outgoing: tuple[int, ...]
    """Not empty while a joint configuration is in force."""
    learners: tuple[int, ...]
    has_pending_change: bool
    members: tuple[MemberStatus, ...]
    """The others; empty unless this one leads."""
    has_quorum: bool
    """A leader has been heard, or has its majority, within two election timeouts."""
    last_contact_s: float | None
    """Since a leader was heard; on the leader, since a majority was. None: never."""
    disk_is_full: bool
    disk_is_stalled: bool
    requests_waiting: int
    messages_refused: int
    disk_stalls: int


def bootstrap_log(log: LogStorage, voters: Iterable[int]) -> None:
    """Let a new cluster begin with these voters. Each of them does so with the same ones, once in
    its life, before its first `open_replica`; whoever is added later does not. ValueError if the
    log is not empty.
    """
    if log.last_index():
        raise ValueError("this log has entries already; a cluster begins only once")
    entries = []
    for index, voter in enumerate(sorted(voters), start=1):
        kind, data = conf_change_entry(ConfChange(ConfChangeType.ADD_NODE, voter))
        entries.append(Entry(1, index, kind, data))
    log.append(entries, HardState(term=1, commit=len(entries)))


@asynccontextmanager
async def open_replica(
    raft_id: int,
    log: LogStorage,
    state_machine: StateMachine,
    transport: Transport | None,
    *,
    settings: ConsensusSettings,
    rng: random.Random,
    fetch_snapshot: FetchSnapshot,
    calls: trio.CapacityLimiter | None = None,
    blocking: bool = True,
    session_ended: Callable[[bytes], bool] = SESSION_ENDED.__eq__,
    name_of: Callable[[int], str] = "node {}".format,
    logger: Logger | None = None,
    trace: TraceSink | None = None,
) -> AsyncIterator["Replica"]:
    """Run this node's replica for as long as the block is open; log and state machine stay the
    caller's, who closes them.

    log: begun with `bootstrap_log`, or empty on a node that is added to a cluster.
    transport: None if it is opened later, with `replica.deliver`; then see `use_transport`.
    calls: the limiter, of one token, under which whoever else does calls the state machine.
    blocking: False calls log and state machine in the loop: for those in RAM, and where a virtual
    clock would not wait for a thread.
    session_ended: tells from a result that the state machine does not know the command's session.
    trace: gets the events of the core, see docs/protocols/raft-trace.md.
    Raises LogDamaged if log and state machine do not belong together; LocalTrouble of both.
    """
    drive = open_drive(
        raft_id,
        log,
        state_machine,
        settings=settings,
        rng=rng,
        logger=logger,
        trace=trace,
        name_of=name_of,
    )
    replica = Replica(drive, log, state_machine, settings, session_ended)
    replica._transport = transport
    replica._fetch_snapshot = fetch_snapshot
    replica._calls = calls or trio.CapacityLimiter(1)
    replica._blocking = blocking
    try:
        async with trio.open_nursery() as nursery:
            replica._nursery = nursery
            for task in (replica._loop, replica._write, replica._apply, replica._keep):
                nursery.start_soon(task)
            nursery.start_soon(replica._tick)
            yield replica
            nursery.cancel_scope.cancel()
    finally:
        replica._end()


class Replica:
    """This node's part in the agreement. Made by `open_replica`; for the tasks of one trio run."""

    _transport: Transport | None
    _fetch_snapshot: FetchSnapshot
    _calls: trio.CapacityLimiter
    _nursery: trio.Nursery
    _blocking: bool

    def __init__(
        self,
        drive: Drive,
        log: LogStorage,
        state_machine: StateMachine,
        settings: ConsensusSettings,
        session_ended: Callable[[bytes], bool],
    ) -> None:
        self._drive = drive
        self._log = log
        self._state_machine = state_machine
        self._settings = settings
        self._session_ended = session_ended
        self._disk = trio.CapacityLimiter(1)
        self._written = log.initial_state()[0]
        self._waiting_commit = WaitingCommit()
        self._snapshot_index = snapshot_index(log)
        self._bytes_since_snapshot = 0
        self._work_came = trio.Event()
        self._to_write: list[Message] = []
        self._write_came = trio.Event()
        self._to_apply: list[Apply] = []
        self._apply_came = trio.Event()
        self._much_applied = trio.Event()
        self._changed = trio.Event()
        self._seen = (NOBODY, 0)
        self._answers: dict[int, _Answer] = {}
        self._places = SessionPlaces(
            sessions_max=settings.sessions_per_replica, open_session=self._open_session
        )
        self._ended = False

    # -- what the transport says

    def use_transport(self, transport: Transport) -> None:
        """Send by it from now on; until the first, everything is lost, which Raft survives."""
        self._transport = transport

    def deliver(self, messages: Iterable[Message]) -> None:
        """Messages of other members, whose senders the transport has checked. Never waits."""
        for message in messages:
            self._drive.step(message)
        self._wake()

    def report_unreachable(self, raft_id: int) -> None:
        """Something sent to this member was lost."""
        self._drive.report_unreachable(raft_id)
        self._wake()

    # -- changing

    async def propose(self, data: bytes) -> bytes:
        """Have a command applied, exactly once, by every replica; gives the state machine's result.

        Any replica may be asked; also when the leader changes meanwhile the command is applied
        once. Cancel it to give up: it may be applied all the same, once.
        Raises ProposalDropped if it was not taken; QuorumLost if no leader is found in time, and
        OutcomeUnknown, after either of which it may still be applied, once. Proposed *anew* after
        those it may be applied a second time. ValueError if data is empty.
        """
        if not data:
            raise ValueError("an empty command would open a session")
        while True:
            session, outcome = await self._answer_once(data)
            if not self._session_ended(outcome.result):
                return outcome.result
            self._places.end(session)
            if outcome.attempts > 1:
                # Its first copy may have been applied before the session ended.
                raise OutcomeUnknown("its session ended while it was proposed again")

    async def _answer_once(self, data: bytes) -> tuple[ClientSession, Outcome]:
        place = await self._places.take()
        try:
            request = self._drive.propose(data, session=place.session.id, sequence=place.sequence)
            return place.session, await self._answer(request)
        finally:
            self._places.give_back(place)

    async def _open_session(self) -> int:
        outcome = await self._answer(self._drive.propose(b""))
        return int.from_bytes(outcome.result, "big")

    async def propose_unguarded(self, data: bytes) -> bytes:
        """Have a command applied at most once, without a session: one that is lost is not proposed
        again. Raises ProposalDropped, QuorumLost and OutcomeUnknown like `propose`, but more often.
        """
        return (await self._answer(self._drive.propose(data))).result

    async def change_members(self, change: ConfChangeV2, data: bytes = b"") -> bytes:
        """Change the configuration, and apply a command with it; gives the command's result once
        both are in force here.

        Raises NotLeader; ProposalDropped also if the change does not fit or another is under way;
        QuorumLost, OutcomeUnknown; ValueError if it is too long.
        """
        return (await self._answer(self._drive.propose_conf_change(change, data))).result

    def campaign(self) -> None:
        """Hold an election now, without waiting for a leader's silence; for the only voter."""
        self._drive.campaign()
        self._wake()

    async def transfer_leader(self, raft_id: int) -> None:
        """Let this voter lead; returns when somebody else does. Raises NotLeader; DeadlineExceeded
        if it has not happened within two election timeouts.
        """
        self._drive.transfer_leader(raft_id)
        self._wake()
        seconds = 2 * self._settings.election_ticks * self._settings.tick_s
        with trio.move_on_after(seconds):
            while self._drive.leader in (NOBODY, self.raft_id):
                await self._changed.wait()
            return
        raise DeadlineExceeded(f"the transfer of leadership to {raft_id}", seconds)

    # -- reading

    async def read(self) -> int:
        """Returns once the state that is applied here holds everything that was answered to anybody
        before this was called: read it then. Gives the index it is at, or beyond.

        Raises QuorumLost if no leader is found in time, DeadlineExceeded, ProposalDropped if too
        many wait.
        """
        return (await self._answer(self._drive.read(ReadKind.SAFE))).index

    async def read_lease(self) -> int:
        """As `read`, on a leader often without asking anybody: right as long as the clocks of two
        voters drift apart by less than a tenth and none restarts within an election timeout. A
        follower asks its leader, as `read` does.
        """
        request = self._drive.read(ReadKind.LEASE, now=trio.current_time())
        return (await self._answer(request)).index

    async def read_stale(self, max_age_s: float) -> int:
        """Returns at once, mostly, if the state applied here is new enough: it holds everything
        that was agreed on max_age_s plus two election timeouts ago, which is how long a leader may
        not know that it is none. Works without a quorum for as long as that is so.

        Raises QuorumLost if no leader was heard within max_age_s, DeadlineExceeded if what it told
        is not applied within that time.
        """
        age = self.last_contact_s()
        if age is None or age > max_age_s:
            when = "never" if age is None else f"{age:.1f} s ago"
            raise QuorumLost(f"a leader was last heard {when}")
        with trio.move_on_after(max_age_s):
            return await self.wait_applied(self._drive.committed_index)
        raise DeadlineExceeded("applying what the leader told", max_age_s)

    async def wait_applied(self, index: int) -> int:
        """Returns once this entry is applied here; gives what is."""
        while self._drive.applied_index < index:
            await self._changed.wait()
        return self._drive.applied_index

    async def watch(self, from_index: int) -> AsyncIterator[Command]:
        """The commands from this index on, as they are applied here, without end; those without
        data, and conf_state, are left out.

        Nothing is kept for who watches: they are read from the log. Raises HistoryGone when the log
        has let go of the next one, before the start or because the watcher was too slow.
        """
        index = max(1, from_index)
        while True:
            applied = await self.wait_applied(index)
            try:
                page = self._log.entries(index, applied + 1, _WATCH_PAGE_BYTES)
            except Compacted:
                raise HistoryGone(index, self._log.first_index()) from None
            for entry in page:
                proposal = proposal_of(entry)
                if proposal is not None and proposal.data:
                    yield command_of(entry, proposal)
            index = page[-1].index + 1

    # -- looking

    @property
    def raft_id(self) -> int:
        """This member's."""
        return self._drive.raft_id

    @property
    def leader(self) -> int:
        """Who leads; 0: nobody is known to."""
        return self._drive.leader

    @property
    def leads(self) -> bool:
        """Whether this replica does."""
        return self._drive.leads

    @property
    def applied_index(self) -> int:
        """The last entry that is applied here."""
        return self._drive.applied_index

    def last_contact_s(self) -> float | None:
        """At most this long ago a leader was heard, or, on the leader, a majority; None: never."""
        if not self._drive.has_heard_leader:
            return None
        return (self._drive.ticks_since_leader + 1) * self._settings.tick_s

    async def wait_changed(self) -> None:
        """Returns when something more is applied, or the leader or term has changed."""
        await self._changed.wait()

    def status(self) -> ReplicaStatus:
        """One look."""
        drive = self._drive
        raft = drive.raw_node.raft
        conf_state = raft.tracker.config.conf_state()
        contact = self.last_contact_s()
        patience_s = 2 * self._settings.election_ticks * self._settings.tick_s
        return ReplicaStatus(
            raft_id=drive.raft_id,
            role=raft.role.name.lower(),
            is_learner=drive.raft_id in conf_state.learners,
            term=drive.term,
            leader=drive.leader,
            committed=drive.committed_index,
            applied=drive.applied_index,
            first_index=self._log.first_index(),
            last_index=raft.log.last_index(),
            snapshot_index=self._snapshot_index,
            log_bytes=self._bytes_since_snapshot,
            voters=conf_state.voters,
            voters_outgoing=conf_state.voters_outgoing,
            learners=conf_state.learners,
            has_pending_change=bool(conf_state.voters_outgoing)
            or raft.pending_conf_index > drive.applied_index,
            members=self._members(raft.log.last_index()),
            has_quorum=drive.leader != NOBODY and contact is not None and contact <= patience_s,
            last_contact_s=contact,
            disk_is_full=drive.disk_is_full,
            disk_is_stalled=drive.disk_is_stalled,
            requests_waiting=drive.requests_waiting,
            messages_refused=drive.messages_refused,
            disk_stalls=drive.disk_stalls,
        )

    def _members(self, last: int) -> tuple[MemberStatus, ...]:
        found = []
        for node, each in self._drive.raw_node.status().progress.items():
            ticks = self._drive.ticks_since(node)
            member = MemberStatus(
                raft_id=node,
                is_voter=not each.is_learner,
                match=each.match,
                lag=max(0, last - each.match),
                state=each.state.name.lower(),
                is_active=each.recent_active,
                last_contact_s=None if ticks is None else ticks * self._settings.tick_s,
            )
            found.append(member)
        return tuple(member for member in found if member.raft_id != self.raft_id)

    async def make_snapshot(self) -> SnapshotMetadata | None:
        """Make one now, and let go of the log behind it; None if a snapshot is just coming in.
        Raises StoreFull.
        """
        metadata = await self._call(self._calls, make_snapshot, self._log, self._state_machine)
        if metadata is not None and metadata.index > self._snapshot_index:
            await self._call(self._disk, self._let_go, metadata)
            self._snapshot_index, self._bytes_since_snapshot = metadata.index, 0
        return metadata

    # -- waiting for answers

    async def _answer(self, request: int) -> Outcome:
        if self._ended:
            raise QuorumLost("this replica has ended")
        answer = self._answers[request] = _Answer()
        self._wake()
        try:
            await answer.came.wait()
        finally:
            self._answers.pop(request, None)
            if answer.outcome is None:
                self._drive.abandon(request)
        if answer.outcome is None:
            raise QuorumLost("this replica has ended; the command may still take effect")
        if answer.outcome.error is not None:
            raise answer.outcome.error
        return answer.outcome

    def _end(self) -> None:
        self._ended = True
        for answer in self._answers.values():
            answer.came.set()
        self._changed.set()

    # -- the tasks

    def _wake(self) -> None:
        self._work_came.set()

    async def _tick(self) -> None:
        due = trio.current_time()
        while True:
            # Ticks that were missed are not made up for: a process that was stopped must not take
            # everybody else for dead before it has read what they sent. Leases go by `now`.
            due = max(due + self._settings.tick_s, trio.current_time())
            await trio.sleep_until(due)
            self._drive.tick(trio.current_time())
            self._wake()
            if self._waiting_commit.state is not None:
                self._write_came.set()

    async def _loop(self) -> None:
        while True:
            await self._work_came.wait()
            self._work_came = trio.Event()
            self._hand_out(self._drive.take_work())
            for outcome in self._drive.take_outcomes():
                answer = self._answers.get(outcome.request)
                if answer is not None:
                    answer.outcome = outcome
                    answer.came.set()
            seen = (self._drive.leader, self._drive.term)
            if seen != self._seen:
                self._seen = seen
                self._tell_changed()

    def _hand_out(self, work: Work) -> None:
        if work.appends:
            self._to_write += work.appends
            self._write_came.set()
        if work.sends and self._transport is not None:
            self._transport.send(work.sends)
        if work.applies:
            self._to_apply += work.applies
            self._apply_came.set()
        for message in work.fetches:
            self._nursery.start_soon(self._fetch, message)

    def _tell_changed(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def _write(self) -> None:
        while True:
            await self._write_came.wait()
            self._write_came = trio.Event()
            batch, self._to_write = self._to_write, []
            if not batch:
                await self._write_commit_index()
            try:
                for write in merged_writes(batch, self._written):
                    if not self._waiting_commit.may_wait(write):
                        await self._call(self._disk, carry_out_write, self._log, write)
                    self._written = write.hard_state or self._written
                    for message in write.messages:
                        self._drive.appended(message)
                    if write.snapshot is not None:
                        self._tell_changed()
                    self._wake()
            except StoreFull as error:
                if not self._drive.append_is_full:  # once, not at every try
                    _log.error("nothing can be written to the Raft log: %s", error)
                self._to_write = []  # all that is not reported comes again, in order
                self._drive.append_failed()
                self._wake()

    async def _write_commit_index(self) -> None:
        """From time to time, where nothing else is written: less is to be done after a restart."""
        state, self._waiting_commit.state = self._waiting_commit.state, None
        if state is not None:
            write = Write([], hard_state=state)
            with suppress(StoreFull):  # it will be told again by the leader, or by the log itself
                await self._call(self._disk, carry_out_write, self._log, write)

    async def _apply(self) -> None:
        while True:
            await self._apply_came.wait()
            self._apply_came = trio.Event()
            batch, self._to_apply = self._to_apply, []
            try:
                results = await self._call(
                    self._calls, carry_out_applies, self._state_machine, batch
                )
            except StoreFull as error:
                if not self._drive.apply_is_full:
                    _log.error("nothing can be applied: %s", error)
                self._to_apply = []
                self._drive.apply_failed()
            else:
                for apply, its_results in zip(batch, results, strict=True):
                    self._drive.applied(apply, its_results)
                    self._bytes_since_snapshot += payload_size(apply.message.entries)
                self._tell_changed()
                self._much_applied.set()
            self._wake()

    async def _fetch(self, message: Message) -> None:
        assert message.snapshot is not None
        metadata = message.snapshot.metadata
        try:
            if self._state_machine.applied_index < metadata.index:
                await self._fetch_snapshot(message.from_, metadata)
        except (NetworkTrouble, NotFound, PeerMisbehaved, StoreFull) as error:
            _log.warning("no snapshot from member %d: %s", message.from_, error)
        except ValueError:
            # The state machine has come further meanwhile, and takes no step back.
            if self._state_machine.applied_index < metadata.index:
                raise
        if self._state_machine.applied_index >= metadata.index:
            self._drive.snapshot_fetched(message)
            self._snapshot_index = max(self._snapshot_index, metadata.index)
        else:
            self._drive.snapshot_failed(message)
        self._tell_changed()
        self._wake()

    async def _keep(self) -> None:
        """Make snapshots as the log grows."""
        while True:
            await self._much_applied.wait()
            self._much_applied = trio.Event()
            entries = self._drive.applied_index - self._snapshot_index
            many = entries >= self._settings.snapshot_entries
            much = self._bytes_since_snapshot >= self._settings.snapshot_bytes
            if many or much or self._snapshot_lacks_member():
                try:
                    await self.make_snapshot()
                except StoreFull as error:
                    _log.error("no snapshot can be made: %s", error)

    def _let_go(self, metadata: SnapshotMetadata) -> None:
        let_go(self._log, metadata, trailing_entries=self._settings.trailing_entries)

    def _snapshot_lacks_member(self) -> bool:
        now = self._drive.raw_node.raft.tracker.config.conf_state()
        return snapshot_lacks_member(self._log, now)

    async def _call(
        self, limiter: trio.CapacityLimiter, job: Callable[..., Result], *arguments: object
    ) -> Result:
        if self._blocking:
            return await trio.to_thread.run_sync(job, *arguments, limiter=limiter)
        async with limiter:
            return job(*arguments)


class _Answer:
    """Where one request's outcome is put."""

    __slots__ = ("came", "outcome")

    def __init__(self) -> None:
        self.came = trio.Event()
        self.outcome: Outcome | None = None

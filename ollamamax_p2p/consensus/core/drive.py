"""Drive: a RawNode, and everybody who waits for it. What a replica's loop decides, without loop.

Whoever runs it feeds it what happened (`tick`, `step`, `propose`, `read`, and what came of its
work) and does, again and again, what `take_work` says:

1. *sends* leave at once. They wait for no disk: what depends on a write is in its responses.
2. *appends* are written in order, many with one fsync (`merged_writes`); each is then reported with
   `appended`, and only that lets out the messages that depend on it.
3. *applies* are given to the state machine in order, whenever; each is reported with `applied`.
4. *fetches*: the bytes of a snapshot are to be fetched, see below.

and hands out what `take_outcomes` gives: what became of proposals and reads. Nothing here may be
called from two threads.

**Proposals** wait here until a leader is known and go to it in batches, as messages if it is
another node. One with a session is proposed again when it may have been lost (a new leader, no
answer for long): the session makes the second copy harmless. One without is not; if it can't have
been taken it ends with ProposalDropped, else with OutcomeUnknown. Whoever waits is told after
`quorum_timeout_s` without a leader that there is no quorum; nobody waits longer than
`request_timeout_s`.

**Reads** that wait share one ReadIndex round. Those that come while it is under way wait for the
next, because its answer may be older than they are. Each attempt has a context of its own, so that
a late answer to an earlier one answers nobody. A lease read takes the last round's confirmation for
granted for a while: see `_lease_s`.

**A snapshot** from the leader is not stepped when it comes. First its bytes are fetched and
installed in the state machine, whole or not at all (`fetches`), then `snapshot_fetched` steps the
message, and only then the core begins anew behind it and has the log do the same. So the state
machine may be *ahead* of the core: after a crash in between, or because the core has come there by
entries meanwhile. That is harmless, since what is ahead is committed, if whoever applies skips what
the state machine has already (results None), never lets it go back, and calls `snapshot_to_adopt`
when it opens the log. The other way round a half installed snapshot would be possible. A leader
offers its snapshot again while the follower does not answer, so a failed fetch is just forgotten.

**A disk** that does not finish a write in `disk_stall_s` costs this node the leadership, and a full
one too (`append_failed`, `apply_failed`). What was not written is handed out again every few ticks.
Meanwhile it refuses proposals and its election clock stands: it could not win, and would disturb.
"""

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from msgspec.structs import replace

from ollamamax_p2p.consensus.core.command import Command
from ollamamax_p2p.consensus.core.config_change import decode_conf_change
from ollamamax_p2p.consensus.core.logger import Logger, NoLogger
from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    LOCAL_APPLY_THREAD,
    NOBODY,
    ConfChangeV2,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
    StateRole,
)
from ollamamax_p2p.consensus.core.progress import StateType
from ollamamax_p2p.consensus.core.raw_node import RaftConfig, RawNode, hard_state_of
from ollamamax_p2p.consensus.core.sessions import Proposal, decode_proposal, encode_proposal
from ollamamax_p2p.consensus.core.stable_log import LogReader
from ollamamax_p2p.consensus.core.step_errors import StepRefused
from ollamamax_p2p.consensus.core.tracing import TraceSink
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import (
    DeadlineExceeded,
    LogDamaged,
    NotLeader,
    OmxError,
    OutcomeUnknown,
    ProposalDropped,
    QuorumLost,
)

_TYPES_FOR_LEADER = frozenset({MessageType.PROP, MessageType.READ_INDEX})
_TYPES_ANSWERED_WHEN_DURABLE = frozenset({MessageType.APP, MessageType.VOTE, MessageType.PRE_VOTE})
_TYPES_FROM_LEADER = frozenset({MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP})
_LOCAL_IDS = (LOCAL_APPEND_THREAD, LOCAL_APPLY_THREAD, NOBODY)

_PROPOSAL_OVERHEAD_BYTES = 64
"""Of a proposal around its command, generously."""


class ReadKind(Enum):
    """What a linearizable read rests on."""

    SAFE = "safe"
    """A majority confirms the leader after the read has come. Depends on no clock."""
    LEASE = "lease"
    """A majority has confirmed it a moment ago. Stale if clocks drift by more than a tenth, or a
    voter restarted within the last election timeout."""


@dataclass(slots=True, eq=False)
class Apply:
    """One STORAGE_APPLY, decoded."""

    message: Message
    commands: list[Command]
    """One for each entry; one whose data is nobody's proposal has no data."""
    requests: list[int]
    """Of each: who waits for it here, 0 if nobody does."""


@dataclass(slots=True)
class Work:
    """What is to be done now; see the head."""

    sends: list[Message] = field(default_factory=list)
    appends: list[Message] = field(default_factory=list)
    applies: list[Apply] = field(default_factory=list)
    fetches: list[Message] = field(default_factory=list)
    """SNAP messages; one at a time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request."""

    request: int
    index: int = 0
    """Of the entry; of a read: what is applied is at least as new as this."""
    result: bytes = b""
    error: OmxError | None = None
    attempts: int = 0
    """How often it was handed on. More than once: a copy may be in the log twice."""


@dataclass(slots=True)
class Write:
    """What goes to the log in one step: a snapshot to begin anew behind, or entries."""

    messages: list[Message]
    """The STORAGE_APPENDs that are done by it."""
    snapshot: Snapshot | None = None
    entries: list[Entry] = field(default_factory=list)
    hard_state: HardState | None = None
    sync: bool = False
    """False if it only moves the commit index, on which nothing depends: also not what its messages
    let out, which speaks of entries and votes that an earlier write has made durable."""

    @property
    def can_wait(self) -> bool:
        """Whether it may be left for the next write that cannot."""
        return not self.sync and self.snapshot is None


@dataclass(slots=True, eq=False)
class _Waiting:
    """One proposal that has no outcome yet."""

    data: bytes
    repeatable: bool
    born: int
    """In ticks."""
    attempts: int = 0
    tick: int = 0
    """Of the last attempt."""
    term: int = 0
    """In which it was last handed to the core; 0: not yet."""
    index: int = 0
    """Of a change of configuration on its leader."""
    forwarded: bool = False


@dataclass(slots=True)
class _Round:
    """One ReadIndex attempt."""

    context: bytes
    requests: list[int]
    tick: int
    started: float
    term: int
    led: bool


_TERM_STEP_MAX = 2**32
"""A peer may be ahead by no more: an election every half second would take 68 years. Without this
one message moves the term to the end of all terms, on every disk, and nobody is ever elected again.
"""

_LATE_ROUNDS_MAX = 64
"""Of ReadIndex attempts that were given up and may still be answered: half a minute of them."""


def merged_writes(appends: Iterable[Message], written: HardState) -> list[Write]:
    """STORAGE_APPENDs, in order, as few writes: one, or one more behind each snapshot.

    An entry that a later one replaces is not written. written: the last hard state that was.
    """
    writes: list[Write] = []
    for message in appends:
        state = hard_state_of(message)
        if not writes or message.snapshot is not None:
            writes.append(Write([], message.snapshot))
        write = writes[-1]
        write.messages.append(message)
        if message.entries:
            first = message.entries[0].index
            if write.entries and first <= write.entries[-1].index:
                del write.entries[max(0, first - write.entries[0].index) :]
            write.entries.extend(message.entries)
            write.sync = True
        if state is not None:
            write.sync |= (state.term, state.vote) != (written.term, written.vote)
            write.hard_state = written = state
    return writes


def proposal_of(entry: Entry) -> Proposal | None:
    """What a normal entry, or the context of a change, holds; None: nothing that anybody reads."""
    data = entry.data
    try:
        if entry.type is not EntryType.NORMAL:
            data = decode_conf_change(entry).context
        return decode_proposal(data) if data else None
    except ValueError:
        return None


def command_of(
    entry: Entry, proposal: Proposal | None, conf_state: ConfState | None = None
) -> Command:
    """An entry as the state machine sees it."""
    if proposal is None:
        return Command(entry.index, entry.term, b"", conf_state=conf_state)
    opens = not proposal.data and not proposal.session
    return Command(
        entry.index,
        entry.term,
        proposal.data,
        proposal.session,
        proposal.sequence,
        opens and entry.type is EntryType.NORMAL,
        conf_state,
    )


def snapshot_to_adopt(
    log: LogReader, applied: int, newest: SnapshotMetadata | None
) -> SnapshotMetadata | None:
    """The snapshot that the log must be begun anew behind before it is used, if there is one.

    A crash may come after a snapshot is installed in the state machine and before the log knows.
    newest: the state machine's newest snapshot. Raises LogDamaged if the log ends before what is
    applied and no snapshot explains it.
    """
    if newest is not None and newest.index == applied:
        holds = log.first_index() - 1 <= applied <= log.last_index()
        if not holds or log.term(applied) != newest.term:
            return newest
    if applied > log.last_index():
        raise LogDamaged(
            "the Raft log",
            f"it ends at {log.last_index()}, but {applied} commands have been applied from it; "
            "see docs/runbooks/damaged-wal.md",
        )
    if applied < log.first_index() - 1:
        raise LogDamaged(
            "the Raft log",
            f"it begins behind {log.first_index() - 1}, but only {applied} commands have been "
            "applied; see docs/runbooks/damaged-wal.md",
        )
    return None


def _has_member(snapshot: Snapshot, node: int) -> bool:
    """Whether a node may take it: one that is no member in it would forget that it is one."""
    state = snapshot.metadata.conf_state
    return node in (*state.voters, *state.learners, *state.voters_outgoing)


Job = TypeVar("Job")


class _InOrder(Generic[Job]):
    """Jobs that are given out in order and finished in order, or fail together."""

    def __init__(self) -> None:
        self._unfinished: deque[tuple[int, Job]] = deque()
        self._held: list[Job] = []
        """Not with whoever does them."""
        self.is_full = False
        self.may_try_again = False

    def __len__(self) -> int:
        return len(self._unfinished)

    def add(self, job: Job, tick: int) -> None:
        self._unfinished.append((tick, job))
        self._held.append(job)

    def take(self) -> list[Job]:
        """What is to be done now; while there is no room, only when it is time to try again."""
        if self.is_full and not self.may_try_again:
            return []
        taken, self._held = self._held, []
        return taken

    def finish(self, job: Job) -> None:
        _, oldest = self._unfinished.popleft()
        assert oldest is job, "what is done in order is reported in order"
        self.is_full = False

    def fail(self) -> None:
        """None of those that were taken and are not finished is done."""
        self._held = [job for _, job in self._unfinished]
        self.is_full, self.may_try_again = True, False

    def age(self, tick: int) -> int:
        """Ticks since the oldest unfinished was added; 0 if none is."""
        return tick - self._unfinished[0][0] if self._unfinished else 0


class _LogFrom:
    """A log as the core finds it at the start: with the configuration the state machine has
    reached, and nothing that it has applied uncommitted.
    """

    def __init__(self, log: LogReader, applied: int, conf_state: ConfState) -> None:
        self._log, self._applied, self._conf_state = log, applied, conf_state
        self.entries = log.entries
        self.term = log.term
        self.first_index = log.first_index
        self.last_index = log.last_index
        self.snapshot = log.snapshot

    def initial_state(self) -> tuple[HardState, ConfState]:
        """The commit index need not be durable when an entry is applied, so it may lie behind."""
        state, conf_state = self._log.initial_state()
        if not self._applied:
            return state, conf_state
        commit = max(state.commit, self._applied)
        term = state.term or self._log.term(self._applied)
        return HardState(term, state.vote, commit), self._conf_state


class Drive:
    """See the head."""

    def __init__(
        self,
        raft_id: int,
        log: LogReader,
        *,
        applied: int,
        conf_state: ConfState,
        settings: ConsensusSettings,
        rng: random.Random,
        logger: Logger | None = None,
        trace: TraceSink | None = None,
        name_of: Callable[[int], str] = "node {}".format,
    ) -> None:
        """applied, conf_state: the state machine's. name_of: how people call a node."""
        self._settings = settings
        self.raw_node = RawNode(
            RaftConfig(
                id=raft_id,
                storage=_LogFrom(log, applied, conf_state),
                rng=rng,
                election_tick=settings.election_ticks,
                heartbeat_tick=settings.heartbeat_ticks,
                applied=applied,
                async_storage_writes=True,
                max_size_per_msg=settings.max_message_bytes,
                # Several applies at once in the queue, so that the state machine never waits.
                max_committed_size_per_ready=settings.max_inflight_bytes,
                max_uncommitted_entries_size=settings.max_uncommitted_bytes,
                max_inflight_msgs=settings.max_inflight_messages,
                max_inflight_bytes=settings.max_inflight_bytes,
                check_quorum=True,
                pre_vote=True,
                step_down_on_removal=True,
                logger=logger or NoLogger(),
                trace=trace,
            )
        )
        """For observers and tests; whoever steps it behind our back breaks it."""
        self._raft = self.raw_node.raft
        self._name_of = name_of
        self.raft_id = raft_id
        self._nonce = rng.randbytes(8)
        self._last_request = 0
        self._ticks = 0
        self._now = 0.0
        self._waiting: dict[int, _Waiting] = {}
        self._unsent: dict[int, None] = {}
        self._changes: dict[int, int] = {}
        """Changes of configuration that were proposed here, by index."""
        self._drop_reason = "no leader is known"
        self._term_applied = 0
        self._reads: dict[int, int] = {}
        """All reads without an outcome, with the tick at which they came."""
        self._reads_waiting: list[int] = []
        self._reads_confirmed: list[tuple[int, int]] = []
        self._round: _Round | None = None
        self._late_rounds: dict[bytes, _Round] = {}
        self._attempts = 0
        self._lease = (0, 0.0)
        """The term and the time at which the last confirmed round began."""
        self._lease_void_term = 0
        self._appends: _InOrder[Message] = _InOrder()
        self._applies: _InOrder[Apply] = _InOrder()
        self._new_sends: list[Message] = []
        self._outcomes: list[Outcome] = []
        self._fetching: Message | None = None
        self._new_fetches: list[Message] = []
        self._heard: dict[int, int] = {}
        self._leader_heard = 0
        self._knows_leader = False
        self._snapshot_since: dict[int, int] = {}
        self._seconds_to_ticks = 1 / settings.tick_s
        self._quorum_ticks = self._in_ticks(settings.quorum_timeout_s)
        self._request_ticks = self._in_ticks(settings.request_timeout_s)
        self._retry_ticks = 2 * settings.election_ticks
        self._stall_ticks = self._in_ticks(settings.disk_stall_s)
        self.messages_refused = 0
        """From peers: malformed, or from nobody who may say it."""
        self.proposals_dropped = 0
        """Forwarded by peers and not taken."""
        self.disk_stalls = 0
        """Leaderships that were given up because of a stalled or full disk."""

    def _in_ticks(self, seconds: float) -> int:
        return max(1, round(seconds * self._seconds_to_ticks))

    # -- how it stands

    @property
    def leader(self) -> int:
        """Who leads as far as is known; 0: nobody."""
        return self._raft.leader

    @property
    def leads(self) -> bool:
        """Whether this node does."""
        return self._raft.role is StateRole.LEADER

    @property
    def term(self) -> int:
        """The current one."""
        return self._raft.term

    @property
    def applied_index(self) -> int:
        """The last index reported with `applied`, or of a snapshot taken."""
        return self._raft.log.applied

    @property
    def committed_index(self) -> int:
        """The last index known to be agreed on."""
        return self._raft.log.committed

    @property
    def append_is_full(self) -> bool:
        """The log's disk has no room: what is to be written is kept, and tried again."""
        return self._appends.is_full

    @property
    def apply_is_full(self) -> bool:
        """The state machine's has none."""
        return self._applies.is_full

    @property
    def disk_is_full(self) -> bool:
        """Of log or state machine."""
        return self.append_is_full or self.apply_is_full

    @property
    def disk_is_stalled(self) -> bool:
        """Whether the oldest write has not finished for `disk_stall_s`."""
        return self._appends.age(self._ticks) >= self._stall_ticks

    @property
    def requests_waiting(self) -> int:
        """Proposals and reads without an outcome."""
        return len(self._waiting) + len(self._reads)

    def ticks_since(self, node: int) -> int | None:
        """How long ago a node was last heard; None: never."""
        heard = self._heard.get(node)
        return None if heard is None else self._ticks - heard

    @property
    def ticks_since_leader(self) -> int:
        """How long ago a leader was last heard; of a leader, how long ago the majority of voters
        was last heard that makes it one.
        """
        if not self.leads:
            return self._ticks - self._leader_heard
        voters = self._raft.tracker.config.voters
        return max(self._ticks_since_majority(half) for half in (voters.incoming, voters.outgoing))

    @property
    def has_heard_leader(self) -> bool:
        """Whether any was heard since the start, so that `ticks_since_leader` means something."""
        return self.leads or self._knows_leader

    def _ticks_since_majority(self, voters: Collection[int]) -> int:
        if not voters:
            return 0
        ages = sorted(
            0 if node == self.raft_id else self._ticks - self._heard.get(node, 0) for node in voters
        )
        return ages[len(voters) // 2]

    # -- what happened

    def tick(self, now: float = 0.0) -> None:
        """One tick has passed. now: seconds of a clock that never goes back, for lease reads."""
        self._ticks += 1
        self._now = max(self._now, now)
        stalled = self.disk_is_stalled
        if (stalled or self.disk_is_full) and self.leads:
            self.disk_stalls += 1
            self.raw_node.step_down_for_stalled_disk()
        if not stalled and not self.disk_is_full:
            self.raw_node.tick()
        if self._ticks % self._settings.heartbeat_ticks == 0:
            self._appends.may_try_again = self._applies.may_try_again = True
        self._retry_read_round()
        self._offer_snapshots_again()
        if self._ticks % max(1, self._settings.election_ticks // 2) == 0:
            self._retry_lost_proposals()
        self._end_overdue()

    def step(self, message: Message) -> None:
        """A message from another node, its sender checked by the transport. Never raises: what no
        correct node sends is counted and dropped.
        """
        if (
            message.from_ in _LOCAL_IDS
            or message.from_ == self.raft_id
            or message.to != self.raft_id
            or not self._is_bounded(message)
        ):
            self.messages_refused += 1
        elif message.type is MessageType.SNAP and self._needs_bytes(message):
            if self._fetching is None:
                self._fetching = message
                self._new_fetches.append(message)
        elif message.type in _TYPES_FOR_LEADER and not self.leads:
            # Forwarded once more it would come in another's name, which the next one refuses; its
            # sender asks again, and then whoever leads.
            self.proposals_dropped += 1
        elif message.type in _TYPES_ANSWERED_WHEN_DURABLE and self._is_behind_with_writes():
            pass  # it is sent again; here it, or the answer to it, would only fill the memory
        else:
            self._step(message)

    def _is_bounded(self, message: Message) -> bool:
        limit = self._settings.max_command_bytes + _PROPOSAL_OVERHEAD_BYTES
        if message.term > self.term + _TERM_STEP_MAX:
            return False
        return message.type is not MessageType.PROP or all(
            len(entry.data) <= limit for entry in message.entries
        )

    def _needs_bytes(self, message: Message) -> bool:
        snapshot = message.snapshot
        return (
            snapshot is not None
            and snapshot.metadata.index > self.committed_index
            and message.term >= self.term
            and _has_member(snapshot, self.raft_id)  # else the core refuses it
        )

    def _is_behind_with_writes(self) -> bool:
        return len(self._appends) > 2 * self._settings.max_inflight_messages

    def _step(self, message: Message) -> None:
        try:
            self.raw_node.step(message)
        except StepRefused:
            self.messages_refused += 1
            return
        except ProposalDropped:
            self.proposals_dropped += 1
        sender = message.from_
        if sender in self._raft.tracker.progress:
            self._heard[sender] = self._ticks
        if message.type in _TYPES_FROM_LEADER and sender == self.leader:
            self._leader_heard, self._knows_leader = self._ticks, True
        elif message.type is MessageType.TRANSFER_LEADER:
            self._lease_void_term = self.term

    def report_unreachable(self, node: int) -> None:
        """Something sent to a node was lost."""
        self.raw_node.report_unreachable(node)

    def transfer_leader(self, node: int) -> None:
        """Let a voter lead. Raises NotLeader."""
        self._must_lead()
        # Its election asks nobody whether a leader lives, so there is no lease in this term.
        self._lease_void_term = self.term
        self.raw_node.transfer_leader(node)

    def campaign(self) -> None:
        """Hold an election now; for a cluster of one that begins, and for tests."""
        self.raw_node.campaign()

    def _must_lead(self) -> None:
        if not self.leads:
            raise NotLeader(self._name_of(self.leader) if self.leader else "")

    # -- proposals

    def propose(self, data: bytes, *, session: int = 0, sequence: int = 0) -> int:
        """Have a command agreed on, here or by the leader; its outcome comes with this number.

        data: b"" opens a session, whose id is the outcome's index.
        Raises ProposalDropped if too many wait, it is too long, or the disk is full.
        """
        if len(self._waiting) >= self._settings.proposals_waiting_max:
            raise ProposalDropped(f"{len(self._waiting)} others wait already")
        if len(data) > self._settings.max_command_bytes:
            raise ProposalDropped(
                f"{len(data)} bytes, where {self._settings.max_command_bytes} are the most"
            )
        if self.disk_is_full:
            raise ProposalDropped("this node's disk is full")
        request = self._new_request()
        tag = self._nonce + request.to_bytes(8, "big")
        encoded = encode_proposal(Proposal(session, sequence, tag, data))
        # To open a session twice costs a place in the table, and nothing else.
        repeatable = bool(session) or not data
        self._waiting[request] = _Waiting(encoded, repeatable, self._ticks)
        self._unsent[request] = None
        return request

    def propose_many(self, commands: Iterable[tuple[bytes, int, int]]) -> list[int]:
        """Several at once: data, session, sequence of each. Raises ProposalDropped, as `propose`;
        those before it stay proposed.
        """
        return [self.propose(data, session=one, sequence=two) for data, one, two in commands]

    def propose_conf_change(self, change: ConfChangeV2, data: bytes = b"") -> int:
        """Have the configuration changed, and a command applied with it, both or none.

        Raises NotLeader; ProposalDropped, as `propose`; ValueError if it is too long.
        """
        self._must_lead()
        if len(self._changes) >= self._settings.proposals_waiting_max:
            raise ProposalDropped(f"{len(self._changes)} other changes wait already")
        if self.disk_is_full:
            raise ProposalDropped("this node's disk is full")
        index = self._raft.log.last_index() + 1
        if data:
            context = encode_proposal(Proposal(0, 0, b"", data))
            change = replace(change, context=context)
        self.raw_node.propose_conf_change(change)
        request = self._new_request()
        self._waiting[request] = _Waiting(
            b"", False, self._ticks, attempts=1, tick=self._ticks, term=self.term, index=index
        )
        self._changes[index] = request
        return request

    def _new_request(self) -> int:
        self._last_request += 1
        return self._last_request

    def abandon(self, request: int) -> None:
        """Nobody waits for it any more. A proposal may be applied all the same."""
        waiting = self._forget(request)
        if waiting is None:
            self._reads.pop(request, None)

    def _forget(self, request: int) -> _Waiting | None:
        waiting = self._waiting.pop(request, None)
        self._unsent.pop(request, None)
        if waiting is not None and waiting.index:
            self._changes.pop(waiting.index, None)
        return waiting

    def _finish(self, request: int, index: int, result: bytes) -> None:
        waiting = self._forget(request)
        if waiting is not None:
            outcome = Outcome(request, index, result, attempts=waiting.attempts)
            self._outcomes.append(outcome)

    def _fail(self, request: int, error: OmxError) -> None:
        self._forget(request)
        self._reads.pop(request, None)
        self._outcomes.append(Outcome(request, error=error))

    def _propose_unsent(self) -> None:
        while self._unsent and self.leader != NOBODY:
            batch: list[int] = []
            size = 0
            for request in self._unsent:
                size += len(self._waiting[request].data)
                if batch and size > self._settings.max_message_bytes:
                    break
                batch.append(request)
            if not self._propose_batch(batch):
                return

    def _propose_batch(self, batch: Sequence[int]) -> bool:
        try:
            self.raw_node.propose_batch([self._waiting[request].data for request in batch])
        except ProposalDropped as error:
            self._drop_reason = str(error)
            return False
        term, forwarded = self.term, not self.leads
        for request in batch:
            waiting = self._waiting[request]
            waiting.attempts += 1
            waiting.tick, waiting.term = self._ticks, term
            waiting.forwarded = waiting.forwarded or forwarded
            del self._unsent[request]
        return True

    def _retry_lost_proposals(self) -> None:
        """Propose again, of those that may be proposed twice, what may have been lost."""
        for request, waiting in self._waiting.items():
            if not waiting.repeatable or not waiting.attempts:
                continue
            if self.leads and waiting.term == self.term and not waiting.forwarded:
                continue  # it is in this log, and nothing but an election takes it away
            # Doubled twice: what is only slow must not be made slower, and what is lost again and
            # again (a leader that comes and goes) must find its moment before the time is over.
            patience = self._retry_ticks << min(waiting.attempts - 1, 2)
            if waiting.term != self.term or self._ticks - waiting.tick >= patience:
                self._unsent[request] = None

    def _end_overdue(self) -> None:
        no_quorum = self.ticks_since_leader >= self._quorum_ticks
        for request, waiting in list(self._waiting.items()):
            age = self._ticks - waiting.born
            if age < self._quorum_ticks:
                break  # they are in the order they came
            if no_quorum or not waiting.attempts or age >= self._request_ticks:
                self._fail(request, self._overdue(waiting, no_quorum=no_quorum))
        for request, born in list(self._reads.items()):
            age = self._ticks - born
            if age < self._quorum_ticks:
                break
            if no_quorum:
                self._fail(request, QuorumLost(self._quorum_problem()))
            elif age >= self._request_ticks:
                self._fail(request, DeadlineExceeded("a read", self._settings.request_timeout_s))

    def _overdue(self, waiting: _Waiting, *, no_quorum: bool) -> OmxError:
        if no_quorum:
            maybe = "; the command may still take effect" if waiting.attempts else ""
            return QuorumLost(self._quorum_problem() + maybe)
        if not waiting.attempts:
            return ProposalDropped(self._drop_reason)
        return OutcomeUnknown(f"no answer within {self._settings.request_timeout_s:g} s")

    def _quorum_problem(self) -> str:
        seconds = self.ticks_since_leader * self._settings.tick_s
        return f"no leader has been heard for {seconds:.1f} s"

    # -- reads

    def read(self, kind: ReadKind = ReadKind.SAFE, *, now: float = 0.0) -> int:
        """Ask when the state that is applied here is new enough for a linearizable read; the
        outcome says so. Raises ProposalDropped if too many wait.
        """
        if len(self._reads) >= self._settings.proposals_waiting_max:
            raise ProposalDropped(f"{len(self._reads)} other reads wait already")
        self._now = max(self._now, now)
        request = self._new_request()
        self._reads[request] = self._ticks
        if kind is ReadKind.LEASE and self.has_lease(self._now):
            self._reads_confirmed.append((self.committed_index, request))
            self._finish_reads()
        else:
            self._reads_waiting.append(request)
        return request

    @property
    def _lease_s(self) -> float:
        """How long after a round of heartbeats was sent nobody else can lead.

        Each voter that answered gives no vote for an election timeout of its own ticks from then
        on. Two ticks less, because ticks are counted whole on both sides, and a tenth less for
        clocks that do not run alike.
        """
        return (self._settings.election_ticks - 2) * self._settings.tick_s * 0.9

    def has_lease(self, now: float) -> bool:
        """Whether nobody else can lead now."""
        term, since = self._lease
        return (
            self.leads
            and term == self.term
            and self._lease_void_term != self.term
            and now - since < self._lease_s
        )

    def _begin_read_round(self) -> None:
        """Only with a leader: the core drops what it cannot ask anybody."""
        if self._round is not None or self.leader == NOBODY:
            return
        requests = [request for request in self._reads_waiting if request in self._reads]
        self._reads_waiting = []
        if requests:
            self._ask_read_index(requests)

    def _ask_read_index(self, requests: list[int]) -> None:
        self._attempts += 1
        context = self._nonce + self._attempts.to_bytes(8, "big")
        self._round = _Round(context, requests, self._ticks, self._now, self.term, self.leads)
        self.raw_node.read_index(context)

    def _retry_read_round(self) -> None:
        under_way = self._round
        if under_way is not None and (
            self._ticks - under_way.tick >= self._settings.election_ticks
            or under_way.term != self.term
        ):
            self._round = None
            self._reads_waiting = under_way.requests + self._reads_waiting
            # Its answer is still one: it was asked for after these reads were. Where a round trip
            # takes longer than our patience (a busy machine), no other would ever come in time.
            self._late_rounds[under_way.context] = under_way
            if len(self._late_rounds) > _LATE_ROUNDS_MAX:
                del self._late_rounds[next(iter(self._late_rounds))]

    def _take_read_answer(self, context: bytes, index: int) -> None:
        under_way = self._round
        if under_way is not None and under_way.context == context:
            self._round = None
        else:
            under_way = self._late_rounds.pop(context, None)
        if under_way is None:
            return
        if under_way.led:
            self._lease = max(self._lease, (under_way.term, under_way.started))
        self._reads_confirmed += [(index, request) for request in under_way.requests]
        self._finish_reads()

    def _finish_reads(self) -> None:
        applied = self.applied_index
        later = []
        for index, request in self._reads_confirmed:
            if index > applied:
                later.append((index, request))
            elif self._reads.pop(request, None) is not None:
                self._outcomes.append(Outcome(request, applied))
        self._reads_confirmed = later

    # -- work and what came of it

    def take_work(self) -> Work:
        """What is to be done now; it is not given again, but for what failed on a full disk."""
        self._propose_unsent()
        self._begin_read_round()
        work = Work()
        while self.raw_node.has_ready():
            ready = self.raw_node.ready()
            for state in ready.read_states:
                self._take_read_answer(state.request_ctx, state.index)
            for message in ready.messages:
                self._sort_out(message, work)
        work.appends, work.applies = self._appends.take(), self._applies.take()
        work.sends += self._new_sends
        work.fetches = self._new_fetches
        self._new_sends, self._new_fetches = [], []
        return work

    def _sort_out(self, message: Message, work: Work) -> None:
        if message.to == LOCAL_APPEND_THREAD:
            self._appends.add(message, self._ticks)
        elif message.to == LOCAL_APPLY_THREAD:
            self._applies.add(self._decoded(message), self._ticks)
        elif message.snapshot is not None and not _has_member(message.snapshot, message.to):
            # It was made before this member was added. The next one is just being made: at its next
            # heartbeat it is offered that.
            self.raw_node.report_snapshot(message.to, ok=False)
        else:
            work.sends.append(message)

    def appended(self, message: Message) -> None:
        """A STORAGE_APPEND is durable; in the order they were given."""
        self._appends.finish(message)
        self._respond(message)
        if message.snapshot is not None:
            self._finish_reads()

    def append_failed(self) -> None:
        """There is no room for the appends that are not reported yet; none of them is written."""
        self._appends.fail()
        self._give_up_leading()

    def applied(self, apply: Apply, results: Sequence[bytes | None]) -> None:
        """The state machine has taken an Apply; in order. None for a command that it had already,
        from a snapshot.
        """
        self._applies.finish(apply)
        for command, request, result in zip(apply.commands, apply.requests, results, strict=True):
            if request and result is not None:
                self._finish(request, command.index, result)
        last = apply.commands[-1]
        if last.term > self._term_applied:
            self._term_applied = last.term
            self._end_those_of_older_terms()
        self._respond(apply.message)
        self._finish_reads()

    def apply_failed(self) -> None:
        """There is no room for the applies that are not reported yet; none of them is done."""
        self._applies.fail()
        self._give_up_leading()

    def _give_up_leading(self) -> None:
        if self.leads:
            self.disk_stalls += 1
            self.raw_node.step_down_for_stalled_disk()

    def _respond(self, message: Message) -> None:
        for response in message.responses:
            if response.to == self.raft_id:
                # Refused is what says that a node acknowledged itself which was removed meanwhile.
                with suppress(StepRefused):
                    self.raw_node.step(response)
            else:
                self._new_sends.append(response)

    def _end_those_of_older_terms(self) -> None:
        """An entry of a newer term is applied, so what only an older leader took never will be."""
        for request, waiting in list(self._waiting.items()):
            if waiting.repeatable or not 0 < waiting.term < self._term_applied:
                continue
            if waiting.forwarded:
                # It may be on its way to the new leader, or be in its log further on.
                reason = "the leader has changed since it was sent there"
                self._fail(request, OutcomeUnknown(reason))
            else:
                self._fail(request, ProposalDropped("another leader took over before"))

    def _decoded(self, message: Message) -> Apply:
        commands, requests = [], []
        for entry in message.entries:
            if entry.type is EntryType.NORMAL:
                command, request = self._command(entry)
            else:
                command, request = self._changed(entry)
            if entry.index in self._changes:
                request = self._checked_change(entry)
            commands.append(command)
            requests.append(request)
        return Apply(message, commands, requests)

    def _command(self, entry: Entry) -> tuple[Command, int]:
        proposal = proposal_of(entry)
        if proposal is None:
            return command_of(entry, proposal), 0
        ours = proposal.request[:8] == self._nonce
        request = int.from_bytes(proposal.request[8:], "big") if ours else 0
        return command_of(entry, proposal), request

    def _changed(self, entry: Entry) -> tuple[Command, int]:
        """In its turn: from here on the new configuration decides."""
        try:
            conf_state = self.raw_node.apply_conf_change(decode_conf_change(entry))
        except ValueError as error:  # it does not decode, or ConfChangeRefused
            self._drop_change(entry.index, str(error))
            return command_of(entry, None), 0
        members = self._raft.tracker.progress
        self._heard = {node: tick for node, tick in self._heard.items() if node in members}
        return command_of(entry, proposal_of(entry), conf_state), 0

    def _checked_change(self, entry: Entry) -> int:
        """Who waits for the change that was proposed at this index, if this entry is it."""
        request = self._changes[entry.index]
        if entry.term != self._waiting[request].term:
            self._drop_change(entry.index, "another leader took over before")
        elif entry.type is EntryType.NORMAL:
            self._drop_change(entry.index, "another change is under way, or it does not fit")
        else:
            return request
        return 0

    def _drop_change(self, index: int, reason: str) -> None:
        request = self._changes.get(index)
        if request is not None:
            self._fail(request, ProposalDropped(reason))

    def take_outcomes(self) -> list[Outcome]:
        """Of requests that have one since the last call; none for those abandoned."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    # -- snapshots

    def snapshot_fetched(self, message: Message) -> None:
        """The state machine is at this SNAP's snapshot, durably, or ahead of it."""
        self._fetching = None
        self._step(message)

    def snapshot_failed(self, message: Message) -> None:
        """It could not be fetched; the leader offers it, or a newer one, again."""
        assert self._fetching is message
        self._fetching = None

    def _offer_snapshots_again(self) -> None:
        """A follower that was sent to a snapshot and has not answered may have lost it, or the
        snapshot may be gone: let it have the newest.
        """
        if not self.leads:
            self._snapshot_since.clear()
            return
        progress = self._raft.tracker.progress
        pending = {node for node, each in progress.items() if each.state is StateType.SNAPSHOT}
        for node in self._snapshot_since.keys() - pending:
            del self._snapshot_since[node]
        for node in sorted(pending):
            if (
                self._ticks - self._snapshot_since.setdefault(node, self._ticks)
                >= self._retry_ticks
            ):
                del self._snapshot_since[node]
                self.raw_node.report_snapshot(node, ok=False)

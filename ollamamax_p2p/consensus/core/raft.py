"""Raft: how a few machines keep one log, though some of them stop, and messages are lost.

What it gives. All nodes see the same entries in the same order; once an entry is committed it is
never lost or changed while a majority of the disks survives. It does not defend against members
that lie: any member can propose anything. A member that talks nonsense is refused by an error.

Terms. Time is cut into terms, numbered up. Each has at most one leader, because each node gives at
most one vote per term and a leader needs a majority. Messages carry their sender's term: a node
that sees a higher one adopts it and becomes a follower; one that sees a lower one ignores the
message. Term and vote are durable before any message that depends on them leaves.

Elections. Followers wait for the leader. One that has heard nothing for its election timeout (drawn
anew each time, so that two rarely wake together) raises the term and asks for votes. A vote goes
only to a candidate whose log is at least as new as the voter's: the higher last term wins, then the
longer log. So a leader always holds everything that was committed.

Log matching. An append names the entry before the ones it brings. The follower takes it only if it
holds that very entry, index and term; therefore two logs that agree in one entry agree in all
before it. If it does not, it answers with a hint where the two may agree, and the leader goes back
to there. While that point is looked for (PROBE) one message at a time is sent; afterwards
(REPLICATE) many are on their way at once, bounded in number and bytes; if the leader has compacted
away what is needed (SNAPSHOT) it sends a snapshot instead. `progress.py` keeps this per follower.

The commit rule. An entry is committed once a majority holds it *and it is of the leader's own
term*; earlier ones are committed with it. Counting majorities for an old term's entry alone is not
safe: a later leader may still replace it. That is why a new leader begins with an empty entry.

Pre-vote and check-quorum. A node that was cut off would come back with a high term and depose a
healthy leader. With pre_vote it first asks whether it could win, without raising its term; with
check_quorum nobody answers yes who has heard from a leader lately, and a leader that hears from no
majority for an election timeout steps down by itself.

Reads. A read must see everything that was acknowledged before it began. The leader notes its commit
index, makes sure by a round of heartbeats that it still leads (or by a lease, `lease.py`), and then
the read waits until that index is applied (`read_only.py`). A leader that has not committed in its
own term yet does not know how far its predecessor committed, so the reads wait for that.

Changes of the configuration are entries too. They count from the moment they are *applied*, unlike
in the thesis, where they count once they are appended; at most one is in the log unapplied.
`config_change.py` has the rules for one voter at a time and for joint configurations.

Storage. The core reads durable entries and never writes. `raw_node.py` hands out what is to be
written; acknowledgements that depend on it, the node's votes and appends for itself included, wait
in `messages_after_append` until it is. A leader's appends do not wait: followers write in parallel
with it, and it counts itself only when its own disk has answered. An answer of the disk that comes
from an earlier term says nothing about what stands in the log now, and is ignored.

This class is one state machine: `step` takes a message, `tick` a passage of time; both change its
fields and leave messages to be sent. The tables at the end say what each role does with a message.
Names, texts and order are those of etcd's raft, so that its transcripts can be compared with ours.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from ollamamax_p2p.consensus.core.config_change import (
    ConfChangeRefused,
    TrackerConfig,
    as_v2,
    decode_conf_change,
    describe_conf_change,
    joint_transition,
    leaves_joint,
    restore,
)
from ollamamax_p2p.consensus.core.lease import Lease
from ollamamax_p2p.consensus.core.log import EntryId, RaftLog
from ollamamax_p2p.consensus.core.log_errors import SnapshotTemporarilyUnavailable
from ollamamax_p2p.consensus.core.message_checks import names_nodes, refuse_malformed
from ollamamax_p2p.consensus.core.messages import (
    NOBODY,
    ConfChangeV2,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    ReadState,
    Snapshot,
    SoftState,
    StateRole,
    payload_size,
    total_size,
)
from ollamamax_p2p.consensus.core.names import MESSAGE_NAMES, ROLE_NAMES
from ollamamax_p2p.consensus.core.progress import Progress, ProgressMap, StateType
from ollamamax_p2p.consensus.core.quorum import VoteResult
from ollamamax_p2p.consensus.core.raft_config import RaftConfig
from ollamamax_p2p.consensus.core.read_only import ReadOnly, ReadOnlyOption
from ollamamax_p2p.consensus.core.step_errors import MalformedStep, StepRefused
from ollamamax_p2p.consensus.core.tracing import (
    TraceEvent,
    TraceState,
    message_event,
    trace_changes,
    trace_message,
)
from ollamamax_p2p.consensus.core.tracker import Tracker
from ollamamax_p2p.errors import ProposalDropped

__all__ = ["READS_WAITING_MAX", "Raft", "RaftConfig", "StepRefused"]

READS_WAITING_MAX = 4096
"""Reads that wait for a confirmation or for the first commit; a peer must not make them grow
without end. Further ones are dropped, and asked again by whoever wants them."""

_AFTER_APPEND = frozenset({MessageType.APP_RESP, MessageType.VOTE_RESP, MessageType.PRE_VOTE_RESP})
_WITHOUT_TERM = frozenset({MessageType.PROP, MessageType.READ_INDEX})
"""Forwarded for somebody: the term is for the leader to see to."""

_FROM_LEADER = frozenset({MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP})

_VOTE_REQUESTS = frozenset({MessageType.VOTE, MessageType.PRE_VOTE})

_CAMPAIGN_TRANSFER = b"CampaignTransfer"
"""Context of a vote request that the old leader asked for: a lease does not stand against it."""


class Campaign(Enum):
    """Why votes are asked for."""

    PRE_ELECTION = 1
    ELECTION = 2
    TRANSFER = 3


class Raft:
    """One node. Knows no clock, disk or network."""

    def __init__(self, config: RaftConfig) -> None:
        self.config = config
        self.id = config.id
        self._journal = config.logger
        self.log = RaftLog(
            config.storage, config.logger, max_applying_bytes=config.max_applying_bytes
        )
        self.tracker = Tracker(
            max_inflight=config.max_inflight_msgs, max_inflight_bytes=config.max_inflight_bytes
        )
        self.term = 0
        self.vote = NOBODY
        self.role = StateRole.FOLLOWER
        self.leader = NOBODY
        self.lead_transferee = NOBODY
        """To whom leadership is being handed; no proposals are taken meanwhile."""
        self.is_learner = False
        self.messages: list[Message] = []
        """May be sent at once."""
        self.messages_after_append: list[Message] = []
        """May be sent once all that is unstable now is durable; some are for this node itself."""
        self.read_states: list[ReadState] = []
        self.election_elapsed = 0
        self.heartbeat_elapsed = 0
        self.randomized_election_timeout = 0
        self.pending_conf_index = 0
        """No change of the configuration is proposed before this is applied."""
        self.uncommitted_size = 0
        self._ticks = 0
        self._read_only = ReadOnly()
        self._reads_before_first_commit: list[Message] = []
        self._lease = self._new_lease()
        self._steps = _FOLLOWER_STEPS
        self._begin()

    def _begin(self) -> None:
        hard_state, conf_state = self.config.storage.initial_state()
        self._trace("InitState")
        last_term, last_index = self.log.last_entry_id()
        config, progress = restore(self.tracker.changer(last_index, anew=True), conf_state)
        self._switch_to(config, progress)
        if hard_state != HardState():
            self._load(hard_state)
        if self.config.applied > 0:
            self._load_applied(self.config.applied)
        self.become_follower(self.term, NOBODY)
        peers = ",".join(f"{node:x}" for node in self.tracker.voter_ids())
        self._journal.info(
            f"newRaft {self.id:x} [peers: [{peers}], term: {self.term}, "
            f"commit: {self.log.committed}, applied: {self.log.applied}, "
            f"lastindex: {last_index}, lastterm: {last_term}]"
        )

    def _load(self, state: HardState) -> None:
        low, high = self.log.committed, self.log.last_index()
        if not low <= state.commit <= high:
            raise ValueError(
                f"{self.id:x} state.commit {state.commit} is out of range [{low}, {high}]"
            )
        self.log.committed = state.commit
        self.term, self.vote = state.term, state.vote

    def _load_applied(self, applied: int) -> None:
        low, high = self.log.applied, self.log.last_index()
        if not low <= applied <= high:
            raise ValueError(
                f"{self.id:x} applied {applied} is out of range [{low}, {high}]: the state machine "
                "and the log do not belong together"
            )
        # A commit index is not synced for its own sake, so the state machine may remember more;
        # what it was given was committed.
        self.log.commit_to(applied)
        self.log.applied_to(applied, 0)

    def soft_state(self) -> SoftState:
        """Who leads, and what this node does."""
        return SoftState(self.leader, self.role)

    def hard_state(self) -> HardState:
        """What must be durable."""
        return HardState(self.term, self.vote, self.log.committed)

    # -- time

    def tick(self) -> None:
        """A tick has passed."""
        self._ticks += 1
        self.election_elapsed += 1
        if self.role is StateRole.LEADER:
            self._tick_leader()
        elif self.promotable() and self.election_elapsed >= self.randomized_election_timeout:
            self.election_elapsed = 0
            self.step(Message(type=MessageType.HUP, from_=self.id))

    def _tick_leader(self) -> None:
        self.heartbeat_elapsed += 1
        if self.election_elapsed >= self.config.election_tick:
            self.election_elapsed = 0
            if self.config.check_quorum:
                self.step(Message(type=MessageType.CHECK_QUORUM, from_=self.id))
            if self.role is StateRole.LEADER:
                # The transferee had an election timeout's time; proposals are taken again.
                self.lead_transferee = NOBODY
        if self.role is not StateRole.LEADER:
            return
        if self.heartbeat_elapsed >= self.config.heartbeat_tick:
            self.heartbeat_elapsed = 0
            self.step(Message(type=MessageType.BEAT, from_=self.id))

    # -- messages in

    def step(self, message: Message) -> None:
        """Take a message.

        Raises ProposalDropped if it is a proposal that was not taken, MalformedStep if no correct
        node could have sent it.
        """
        refuse_malformed(message, own_id=self.id)
        self._refuse_impossible(message)
        if self.config.trace:
            self._trace_message("Receive", message)
        if message.term > self.term:
            if not self._meet_higher_term(message):
                return
        elif 0 < message.term < self.term:
            self._meet_lower_term(message)
            return
        handle = self._steps.get(message.type)
        if handle is not None:
            handle(self, message)

    def _refuse_impossible(self, message: Message) -> None:
        """What contradicts this node's own log."""
        kind = message.type
        if kind is MessageType.HEARTBEAT:
            if message.term >= self.term and message.commit > self.log.last_index():
                raise MalformedStep(
                    message.from_,
                    f"a heartbeat that commits index {message.commit}, which is more than was ever "
                    f"acknowledged to it ({self.log.last_index()})",
                )
        elif kind is MessageType.APP_RESP:
            mine = self.role is StateRole.LEADER and message.term == self.term
            if mine and not message.reject and message.index > self.log.last_index():
                raise MalformedStep(
                    message.from_,
                    f"an acknowledgement of index {message.index}, which is more than there is "
                    f"({self.log.last_index()})",
                )

    def _meet_higher_term(self, message: Message) -> bool:
        """Adopt the term, unless the message does not stand for it; False: ignore the message."""
        kind = message.type
        if kind in _VOTE_REQUESTS and self._ignores_votes(message):
            return False
        if kind is MessageType.PRE_VOTE:
            return True  # It names a term that nobody has reached yet.
        if kind is MessageType.PRE_VOTE_RESP and not message.reject:
            return True  # Granted for the term that we asked about.
        self._journal.info(
            f"{self.id:x} [term: {self.term}] received a {MESSAGE_NAMES[kind]} message with higher "
            f"term from {message.from_:x} [term: {message.term}]"
        )
        self.become_follower(message.term, message.from_ if kind in _FROM_LEADER else NOBODY)
        return True

    def _ignores_votes(self, message: Message) -> bool:
        """Whether a leader was heard of so lately that nobody should be elected."""
        remaining = self.config.election_tick - self.election_elapsed
        in_lease = self.config.check_quorum and self.leader != NOBODY and remaining > 0
        if not in_lease or message.context == _CAMPAIGN_TRANSFER:
            return False
        self._journal.info(
            f"{self._log_and_vote()} ignored {_candidate(message)} at term {self.term}: "
            f"lease is not expired (remaining ticks: {remaining})"
        )
        return True

    def _log_and_vote(self) -> str:
        term, index = self.log.last_entry_id()
        return f"{self.id:x} [logterm: {term}, index: {index}, vote: {self.vote:x}]"

    def _meet_lower_term(self, message: Message) -> None:
        kind = message.type
        guarded = self.config.check_quorum or self.config.pre_vote
        if guarded and kind in (MessageType.HEARTBEAT, MessageType.APP):
            # A leader that is behind. Where vote requests are ignored, only this answer tells it
            # of our term, which frees a node that came back with a higher one.
            self._send(MessageType.APP_RESP, message.from_)
        elif kind is MessageType.PRE_VOTE:
            # Answered, so that nodes from before pre-vote was switched on cannot lock each other.
            self._journal.info(
                f"{self._log_and_vote()} rejected {_candidate(message)} at term {self.term}"
            )
            self._send(MessageType.PRE_VOTE_RESP, message.from_, term=self.term, reject=True)
        elif kind is MessageType.STORAGE_APPEND_RESP:
            self._meet_old_storage_answer(message)
        else:
            self._journal.info(
                f"{self.id:x} [term: {self.term}] ignored a {MESSAGE_NAMES[kind]} message with "
                f"lower term from {message.from_:x} [term: {message.term}]"
            )

    def _meet_old_storage_answer(self, message: Message) -> None:
        if message.index:
            # Other entries may be on their way to the same indexes, to be replaced by these same
            # ones again (A-B-A): only an answer of the present term says what the disk holds.
            self._journal.info(
                f"{self.id:x} [term: {self.term}] ignored entry appends from a "
                f"{MESSAGE_NAMES[message.type]} message with lower term [term: {message.term}]"
            )
        if message.snapshot is not None:
            # A snapshot holds committed entries, which no term can change.
            self._applied_snapshot(message.snapshot)

    # -- messages out

    def _send(
        self,
        kind: MessageType,
        to: int,
        *,
        term: int = 0,
        log_term: int = 0,
        index: int = 0,
        entries: tuple[Entry, ...] = (),
        commit: int = 0,
        reject: bool = False,
        reject_hint: int = 0,
        context: bytes = b"",
        snapshot: Snapshot | None = None,
        from_: int = NOBODY,
    ) -> None:
        """term: only for requests for votes and their answers; others carry this node's."""
        if not term and kind not in _WITHOUT_TERM:
            term = self.term
        message = Message(
            type=kind,
            to=to,
            from_=from_ or self.id,
            term=term,
            log_term=log_term,
            index=index,
            entries=entries,
            commit=commit,
            reject=reject,
            reject_hint=reject_hint,
            context=context,
            snapshot=snapshot,
        )
        if kind in _AFTER_APPEND:
            self.messages_after_append.append(message)
        else:
            assert to != self.id, f"message should not be self-addressed when sending {kind!r}"
            self.messages.append(message)
        if self.config.trace:
            self._trace_message("Send", message)

    def _send_append(self, to: int, *, send_if_empty: bool = True) -> bool:
        """Send what a follower lacks, as much as fits one message; whether something was sent.

        Empty ones tell it the commit index, or probe.
        """
        progress = self.tracker.progress[to]
        if progress.is_paused:
            return False
        previous = progress.next - 1
        try:
            previous_term = self.log.term(previous)
            entries: list[Entry] = []
            if progress.state is not StateType.REPLICATE or not progress.inflights.is_full:
                # With a full window only an empty one goes, so that a lost window is noticed.
                entries = self.log.entries(progress.next, self.config.max_size_per_msg)
        except LookupError:
            return self._send_snapshot(to, progress)
        if not entries and not send_if_empty:
            return False
        committed = self.log.committed
        self._send(
            MessageType.APP,
            to,
            log_term=previous_term,
            index=previous,
            entries=tuple(entries),
            commit=committed,
        )
        progress.sent_entries(len(entries), payload_size(entries))
        progress.sent_commit = committed
        return True

    def _send_snapshot(self, to: int, progress: Progress) -> bool:
        if not progress.recent_active:
            self._journal.debug(
                f"ignore sending snapshot to {to:x} since it is not recently active"
            )
            return False
        try:
            snapshot = self.log.snapshot()
        except SnapshotTemporarilyUnavailable:
            self._journal.debug(
                f"{self.id:x} failed to send snapshot to {to:x} because snapshot is temporarily "
                "unavailable"
            )
            return False
        index, term = snapshot.metadata.index, snapshot.metadata.term
        assert index, "need non-empty snapshot"
        self._journal.debug(
            f"{self.id:x} [firstindex: {self.log.first_index()}, commit: {self.log.committed}] "
            f"sent snapshot[index: {index}, term: {term}] to {to:x} [{progress}]"
        )
        progress.become_snapshot(index)
        self._journal.debug(
            f"{self.id:x} paused sending replication messages to {to:x} [{progress}]"
        )
        self._send(MessageType.SNAP, to, snapshot=snapshot)
        return True

    def _others(self) -> list[int]:
        return [node for node in self.tracker.ids if node != self.id]

    def _broadcast_append(self) -> None:
        for node in self.tracker.ids:
            if node != self.id:
                self._send_append(node)

    def _broadcast_heartbeat(self, context: bytes) -> None:
        for node in self._others():
            progress = self.tracker.progress[node]
            # Never more than it is known to hold: it may hold something else behind that.
            commit = min(progress.match, self.log.committed)
            self._send(MessageType.HEARTBEAT, node, commit=commit, context=context)
            # Also when that is less than an append before it told: appends may be lost, so the next
            # acknowledgement is answered with the commit index once more.
            progress.sent_commit = commit

    def _send_timeout_now(self, to: int) -> None:
        self._lease.give_away()
        self._send(MessageType.TIMEOUT_NOW, to)

    # -- roles

    def _reset(self, term: int) -> None:
        if self.term != term:
            self.term = term
            self.vote = NOBODY
        self.leader = NOBODY
        self.election_elapsed = self.heartbeat_elapsed = 0
        self._draw_election_timeout()
        self.lead_transferee = NOBODY
        self.tracker.votes = {}
        self.tracker.reset_progress(last_index=self.log.last_index(), own_id=self.id)
        self.pending_conf_index = 0
        self.uncommitted_size = 0
        self._read_only = ReadOnly()
        self._lease = self._new_lease()

    def _new_lease(self) -> Lease:
        return Lease(node=self.id, term=self.term, ticks=self.config.election_tick)

    def _draw_election_timeout(self) -> None:
        least = self.config.election_tick
        self.randomized_election_timeout = least + self.config.rng.randrange(least)

    def become_follower(self, term: int, leader: int) -> None:
        """Follow a leader, or wait for one (NOBODY)."""
        self._steps = _FOLLOWER_STEPS
        self._reset(term)
        self.leader = leader
        self.role = StateRole.FOLLOWER
        self._reads_before_first_commit = []
        self._journal.info(f"{self.id:x} became follower at term {self.term}")
        self._trace("BecomeFollower")

    def become_candidate(self) -> None:
        """Raise the term and vote for oneself."""
        assert self.role is not StateRole.LEADER, "invalid transition [leader -> candidate]"
        self._steps = _CANDIDATE_STEPS
        self._reset(self.term + 1)
        self.vote = self.id
        self.role = StateRole.CANDIDATE
        self._journal.info(f"{self.id:x} became candidate at term {self.term}")
        self._trace("BecomeCandidate")

    def become_pre_candidate(self) -> None:
        """Ask around without raising the term; the vote of this term stays given."""
        assert self.role is not StateRole.LEADER, "invalid transition [leader -> pre-candidate]"
        self._steps = _CANDIDATE_STEPS
        self.tracker.votes = {}
        self.leader = NOBODY
        self.role = StateRole.PRE_CANDIDATE
        self._journal.info(f"{self.id:x} became pre-candidate at term {self.term}")

    def become_leader(self) -> None:
        """Lead, beginning with an empty entry of the new term."""
        assert self.role is not StateRole.FOLLOWER, "invalid transition [follower -> leader]"
        self._steps = _LEADER_STEPS
        self._reset(self.term)
        self.leader = self.id
        self.role = StateRole.LEADER
        own = self.tracker.progress[self.id]
        own.become_replicate()
        own.recent_active = True
        # There may be an unapplied change among the old entries; to wait for all of them is
        # simpler than to look.
        self.pending_conf_index = self.log.last_index()
        self._trace("BecomeLeader")
        taken = self._append([(EntryType.NORMAL, b"")])
        assert taken, "empty entry was dropped"
        self._journal.info(f"{self.id:x} became leader at term {self.term}")

    def promotable(self) -> bool:
        """Whether it may campaign: a voter that is not installing a snapshot."""
        own = self.tracker.progress.get(self.id)
        return (
            own is not None
            and not own.is_learner
            and not self.log.has_next_or_in_progress_snapshot()
        )

    def step_down_for_stalled_disk(self) -> None:
        """The driver's disk does not answer: let somebody else lead, and tell the one that is
        furthest to campaign at once. Does nothing on others than the leader.

        The message goes before anything that waits for the disk.
        """
        if self.role is not StateRole.LEADER:
            return
        self._journal.warning(f"{self.id:x} stepped down to follower since its disk has stalled")
        voters = self.tracker.config.voters.ids() - {self.id}
        progress = self.tracker.progress
        heir = max(
            (node for node in sorted(voters) if progress[node].recent_active),
            key=lambda node: progress[node].match,
            default=NOBODY,
        )
        if heir != NOBODY:
            self._send_timeout_now(heir)
        self.become_follower(self.term, NOBODY)

    # -- campaigning

    def _on_hup(self, _message: Message) -> None:
        self._hup(Campaign.PRE_ELECTION if self.config.pre_vote else Campaign.ELECTION)

    def _hup(self, why: Campaign) -> None:
        if self.role is StateRole.LEADER:
            self._journal.debug(f"{self.id:x} ignoring MsgHup because already leader")
        elif not self.promotable():
            self._journal.warning(f"{self.id:x} is unpromotable and can not campaign")
        elif self._has_unapplied_conf_changes():
            self._journal.warning(
                f"{self.id:x} cannot campaign at term {self.term} since there are still pending "
                "configuration changes to apply"
            )
        else:
            self._journal.info(f"{self.id:x} is starting a new election at term {self.term}")
            self._campaign(why)

    def _has_unapplied_conf_changes(self) -> bool:
        """Whether it would ask the wrong voters."""
        low, high = self.log.applied + 1, self.log.committed + 1
        while low < high:
            page = self.log.slice(low, high, self.log.max_applying_bytes)
            if any(entry.type is not EntryType.NORMAL for entry in page):
                return True
            low += len(page)
        return False

    def _campaign(self, why: Campaign) -> None:
        if why is Campaign.PRE_ELECTION:
            self.become_pre_candidate()
            request, answer, term = MessageType.PRE_VOTE, MessageType.PRE_VOTE_RESP, self.term + 1
        else:
            self.become_candidate()
            request, answer, term = MessageType.VOTE, MessageType.VOTE_RESP, self.term
        last_term, last_index = self.log.last_entry_id()
        context = _CAMPAIGN_TRANSFER if why is Campaign.TRANSFER else b""
        for node in self.tracker.voter_ids():
            if node == self.id:
                # Our own vote counts once it is durable.
                self._send(answer, node, term=term)
                continue
            self._journal.info(
                f"{self.id:x} [logterm: {last_term}, index: {last_index}] sent "
                f"{MESSAGE_NAMES[request]} request to {node:x} at term {self.term}"
            )
            self._send(
                request, node, term=term, log_term=last_term, index=last_index, context=context
            )

    def _on_vote_request(self, message: Message) -> None:
        # Learners vote too: one that was made a voter may not have heard of it yet, and its vote
        # may be the one that is missing. A candidate only asks those it takes for voters.
        pre_vote = message.type is MessageType.PRE_VOTE
        answer = MessageType.PRE_VOTE_RESP if pre_vote else MessageType.VOTE_RESP
        can_vote = (
            self.vote == message.from_
            or (self.vote == NOBODY and self.leader == NOBODY)
            or (pre_vote and message.term > self.term)
        )
        granted = can_vote and self.log.is_up_to_date((message.log_term, message.index))
        did = "cast" if granted else "rejected"
        wanted = _candidate(message, joiner="for" if granted else "from")
        self._journal.info(f"{self._log_and_vote()} {did} {wanted} at term {self.term}")
        if not granted:
            self._send(answer, message.from_, term=self.term, reject=True)
            return
        # With the term that was asked about, which for a pre-vote is not ours.
        self._send(answer, message.from_, term=message.term)
        if not pre_vote:
            self.election_elapsed = 0
            self.vote = message.from_

    def _on_vote_answer(self, message: Message) -> None:
        pre = self.role is StateRole.PRE_CANDIDATE
        if message.type is not (MessageType.PRE_VOTE_RESP if pre else MessageType.VOTE_RESP):
            return  # Of an earlier phase of this candidacy.
        name = MESSAGE_NAMES[message.type]
        rejection = " rejection" if message.reject else ""
        self._journal.info(
            f"{self.id:x} received {name}{rejection} from {message.from_:x} at term {self.term}"
        )
        self.tracker.record_vote(message.from_, not message.reject)
        granted, refused, result = self.tracker.tally()
        self._journal.info(
            f"{self.id:x} has received {granted} {name} votes and {refused} vote rejections"
        )
        if result is VoteResult.LOST:
            self.become_follower(self.term, NOBODY)
        elif result is VoteResult.WON and pre:
            self._campaign(Campaign.ELECTION)
        elif result is VoteResult.WON and (
            self.id in self.tracker.votes or self.config.lead_before_own_vote
        ):
            # Not before our own vote is durable, also if those of others are enough: after a crash
            # we would not know that we led this term, could win it again, and give the indexes that
            # we gave to entries before to others.
            self.become_leader()
            self._broadcast_append()

    # -- proposing

    def _drop_proposal_without_leader(self, _message: Message) -> None:
        self._journal.info(f"{self.id:x} no leader at term {self.term}; dropping proposal")
        raise ProposalDropped("no leader is known")

    def _forward_proposal(self, message: Message) -> None:
        if self.leader == NOBODY:
            self._drop_proposal_without_leader(message)
        if self.config.disable_proposal_forwarding:
            self._journal.info(
                f"{self.id:x} not forwarding to leader {self.leader:x} at term {self.term}; "
                "dropping proposal"
            )
            raise ProposalDropped("this node does not lead")
        self._forward(message)

    def _forward(self, message: Message) -> None:
        self._send(
            message.type,
            self.leader,
            from_=message.from_,
            entries=message.entries,
            context=message.context,
        )

    def _on_proposal(self, message: Message) -> None:
        if self.id not in self.tracker.progress:
            raise ProposalDropped("this node was removed while it led")
        if self.lead_transferee != NOBODY:
            self._journal.debug(
                f"{self.id:x} [term {self.term}] transfer leadership to {self.lead_transferee:x} "
                "is in progress; dropping proposal"
            )
            raise ProposalDropped("leadership is being handed to another node")
        proposed: list[tuple[EntryType, bytes]] = []
        for place, entry in enumerate(message.entries):
            kind, data = entry.type, entry.data
            if kind is not EntryType.NORMAL and not self._takes_conf_change(entry, place):
                kind, data = EntryType.NORMAL, b""
            proposed.append((kind, data))
        if not self._append(proposed):
            raise ProposalDropped("too much is uncommitted already")
        self._broadcast_append()

    def _takes_conf_change(self, entry: Entry, place: int) -> bool:
        """Whether this change, which is to be so many entries behind the log's end, may be
        proposed. If not, an empty entry takes its place, so that the proposer sees it pass.
        """
        change = decode_conf_change(entry)
        problem = self._problem_with(as_v2(change))
        if problem and not self.config.disable_conf_change_validation:
            self._journal.info(
                f"{self.id:x} ignoring conf change {describe_conf_change(change)} at config "
                f"{self.tracker.config}: {problem}"
            )
            return False
        self.pending_conf_index = self.log.last_index() + place + 1
        if self.config.trace and (prop := trace_changes(as_v2(change))):
            self._trace("ChangeConf", prop=prop)
        return True

    def _problem_with(self, change: ConfChangeV2) -> str:
        applied, pending = self.log.applied, self.pending_conf_index
        if pending > applied:
            return f"possible unapplied conf change at index {pending} (applied to {applied})"
        is_joint = self.tracker.config.voters.is_joint
        if is_joint and change.changes:
            return "must transition out of joint config first"
        if not is_joint and not change.changes:
            return "not in joint state; refusing empty conf change"
        return ""

    def _append(self, proposed: Sequence[tuple[EntryType, bytes]]) -> bool:
        """Append to our own log; False if too much is uncommitted."""
        size = sum([len(data) for _, data in proposed])
        if not self._has_room_for(size):
            self._journal.warning(
                f"{self.id:x} appending new entries to log would exceed uncommitted entry size "
                "limit; dropping proposal"
            )
            return False
        self.uncommitted_size += size
        term, following = self.term, self.log.last_index() + 1
        entries = [
            Entry(term, index, kind, data) for index, (kind, data) in enumerate(proposed, following)
        ]
        if self.config.trace:
            for entry in entries:
                if entry.type is EntryType.NORMAL:
                    self._trace("Replicate")
        last = self.log.append(entries)
        # We acknowledge our own entries as a follower does: once they are durable.
        self._send(MessageType.APP_RESP, self.id, index=last)
        return True

    def _has_room_for(self, size: int) -> bool:
        """An empty proposal always passes: a new leader's first entry, the leaving of a joint
        configuration. So does the first one, however large.
        """
        fits = self.uncommitted_size + size <= self.config.max_uncommitted_bytes
        return fits or not self.uncommitted_size or not size

    # -- leading

    def _on_beat(self, _message: Message) -> None:
        context = self._read_only.last_context()
        if not context and self.config.read_only_option is ReadOnlyOption.LEASE_BASED:
            context = self._lease.begin(self._ticks)
        self._broadcast_heartbeat(context)

    def _on_check_quorum(self, _message: Message) -> None:
        if not self.tracker.quorum_active():
            self._journal.warning(
                f"{self.id:x} stepped down to follower since quorum is not active"
            )
            self.become_follower(self.term, NOBODY)
        for node in self._others():
            self.tracker.progress[node].recent_active = False

    def _progress_of(self, message: Message) -> Progress | None:
        progress = self.tracker.progress.get(message.from_)
        if progress is None:
            self._journal.debug(f"{self.id:x} no progress available for {message.from_:x}")
        return progress

    def _on_unexpected(self, message: Message) -> None:
        self._progress_of(message)

    def _on_append_answer(self, message: Message) -> None:
        progress = self._progress_of(message)
        if progress is None:
            return
        progress.recent_active = True
        if message.reject:
            self._on_append_rejected(message, progress)
        elif progress.maybe_update(message.index) or (
            # One that is probed and has everything answers with what we knew already.
            progress.match == message.index and progress.state is StateType.PROBE
        ):
            self._on_append_acknowledged(message, progress)

    def _on_append_rejected(self, message: Message, progress: Progress) -> None:
        self._journal.debug(
            f"{self.id:x} received MsgAppResp(rejected, hint: (index {message.reject_hint}, term "
            f"{message.log_term})) from {message.from_:x} for index {message.index}"
        )
        hint = message.reject_hint
        if message.log_term > 0:
            # Terms never fall along a log, so where ours are higher than its hint's the logs
            # cannot agree. Leaping over those costs one probe per term instead of one per entry.
            _, hint = self.log.find_conflict_by_term(hint, message.log_term)
        if progress.maybe_decrease_to(message.index, hint):
            self._journal.debug(
                f"{self.id:x} decreased progress of {message.from_:x} to [{progress}]"
            )
            if progress.state is StateType.REPLICATE:
                progress.become_probe()
            self._send_append(message.from_)

    def _on_append_acknowledged(self, message: Message, progress: Progress) -> None:
        node = message.from_
        if progress.state is StateType.PROBE:
            progress.become_replicate()
        elif progress.state is StateType.REPLICATE:
            progress.inflights.free_up_to(message.index)
        elif progress.match + 1 >= self.log.first_index():
            # Whatever snapshot it got, and from whom: the log can go on from there.
            self._journal.debug(
                f"{self.id:x} recovered from needing snapshot, resumed sending replication "
                f"messages to {node:x} [{progress}]"
            )
            progress.become_probe()
            progress.become_replicate()
        if self._maybe_commit():
            self._release_reads()
            self._broadcast_append()
        elif node != self.id and progress.can_bump_commit(self.log.committed):
            self._send_append(node)
        if node != self.id:
            # The window has room again; fill it.
            while self._send_append(node, send_if_empty=False):
                pass
        if node == self.lead_transferee and progress.match == self.log.last_index():
            self._journal.info(
                f"{self.id:x} sent MsgTimeoutNow to {node:x} after received MsgAppResp"
            )
            self._send_timeout_now(node)

    def _maybe_commit(self) -> bool:
        """Commit what a majority holds, if that is of this term."""
        news = self.log.maybe_commit((self.term, self.tracker.committed()))
        self._trace("Commit")
        return news

    def _on_heartbeat_answer(self, message: Message) -> None:
        progress = self._progress_of(message)
        if progress is None:
            return
        progress.recent_active = True
        progress.msg_app_flow_paused = False
        # Also to a full window, though empty: if all of it was lost, this is what gets it going.
        # Also to one that has everything but is probed: its answer makes it replicate again.
        if progress.match < self.log.last_index() or progress.state is StateType.PROBE:
            self._send_append(message.from_)
        if message.context:
            self._on_confirmation(message)

    def _on_confirmation(self, message: Message) -> None:
        voters = self.tracker.config.voters
        self._lease.acknowledge(message.from_, message.context, voters)
        confirmed_by = self._read_only.acknowledge(message.from_, message.context)
        if not confirmed_by or voters.vote_result(confirmed_by) is not VoteResult.WON:
            return
        for each in self._read_only.advance(message.context):
            self._answer_read(each.request, each.index)

    def _on_snapshot_status(self, message: Message) -> None:
        progress = self._progress_of(message)
        if progress is None or progress.state is not StateType.SNAPSHOT:
            return
        if message.reject:
            progress.pending_snapshot = 0  # Before become_probe, which starts behind it.
        progress.become_probe()
        outcome = "failed" if message.reject else "succeeded"
        self._journal.debug(
            f"{self.id:x} snapshot {outcome}, resumed sending replication messages to "
            f"{message.from_:x} [{progress}]"
        )
        # Wait: for its answer after a success, for the next heartbeat's after a failure.
        progress.msg_app_flow_paused = True

    def _on_unreachable(self, message: Message) -> None:
        progress = self._progress_of(message)
        if progress is None:
            return
        if progress.state is StateType.REPLICATE:
            progress.become_probe()  # What was sent is probably lost.
        self._journal.debug(
            f"{self.id:x} failed to send message to {message.from_:x} because it is unreachable "
            f"[{progress}]"
        )

    def _on_transfer(self, message: Message) -> None:
        progress = self._progress_of(message)
        if progress is None:
            return
        to, before = message.from_, self.lead_transferee
        me = f"{self.id:x} [term {self.term}]"
        if progress.is_learner:
            self._journal.debug(f"{self.id:x} is learner. Ignored transferring leadership")
            return
        if before == to:
            self._journal.info(
                f"{me} transfer leadership to {to:x} is in progress, ignores request to same node "
                f"{to:x}"
            )
            return
        if before != NOBODY:
            self.lead_transferee = NOBODY
            self._journal.info(f"{me} abort previous transferring leadership to {before:x}")
        if to == self.id:
            self._journal.debug(
                f"{self.id:x} is already leader. Ignored transferring leadership to self"
            )
            return
        self._journal.info(f"{me} starts to transfer leadership to {to:x}")
        self._transfer_to(to, progress)

    def _transfer_to(self, to: int, progress: Progress) -> None:
        self.election_elapsed = 0  # It has one election timeout; then proposals are taken again.
        self.lead_transferee = to
        if progress.match == self.log.last_index():
            self._send_timeout_now(to)
            self._journal.info(
                f"{self.id:x} sends MsgTimeoutNow to {to:x} immediately as {to:x} already has "
                "up-to-date log"
            )
        else:
            self._send_append(to)

    # -- reading

    def _on_read_index(self, message: Message) -> None:
        if self.tracker.is_singleton():
            self._answer_read(message, self.log.committed)
        elif len(self._reads_before_first_commit) + len(self._read_only) >= READS_WAITING_MAX:
            self._journal.warning(f"{self.id:x} dropped a read, {READS_WAITING_MAX} are waiting")
        elif not self._has_committed_in_this_term():
            self._reads_before_first_commit.append(message)
        else:
            self._confirm_for_read(message)

    def _has_committed_in_this_term(self) -> bool:
        return self.log.term_or_zero(self.log.committed) == self.term

    def _confirm_for_read(self, message: Message) -> None:
        lease_based = self.config.read_only_option is ReadOnlyOption.LEASE_BASED
        if lease_based and self._lease.holds(self._ticks):
            self._answer_read(message, self.log.committed)
            return
        context = self._read_only.add(self.log.committed, message, term=self.term, leader=self.id)
        self._broadcast_heartbeat(context)

    def _release_reads(self) -> None:
        """Something was committed in this term."""
        waiting, self._reads_before_first_commit = self._reads_before_first_commit, []
        for message in waiting:
            self._confirm_for_read(message)

    def _answer_read(self, request: Message, index: int) -> None:
        if request.from_ in (NOBODY, self.id):
            self.read_states.append(ReadState(index, request.entries[0].data))
        else:
            self._send(
                MessageType.READ_INDEX_RESP, request.from_, index=index, entries=request.entries
            )

    def _forward_read(self, message: Message) -> None:
        if self.leader == NOBODY:
            self._journal.info(
                f"{self.id:x} no leader at term {self.term}; dropping index reading msg"
            )
        else:
            self._forward(message)

    def _on_read_answer(self, message: Message) -> None:
        if message.from_ == self.leader:
            self.read_states.append(ReadState(message.index, message.entries[0].data))

    # -- following

    def _on_leader_message(self, message: Message) -> None:
        """An append, heartbeat or snapshot of this term: its sender is the leader."""
        if self.role is not StateRole.FOLLOWER:
            self.become_follower(message.term, message.from_)
        self.election_elapsed = 0
        self.leader = message.from_
        if message.type is MessageType.APP:
            self._on_append(message)
        elif message.type is MessageType.HEARTBEAT:
            self.log.commit_to(message.commit)
            self._send(MessageType.HEARTBEAT_RESP, message.from_, context=message.context)
        else:
            assert message.snapshot is not None
            self._on_snapshot(message.from_, message.snapshot)

    def _on_append(self, message: Message) -> None:
        if message.index < self.log.committed:
            self._send(MessageType.APP_RESP, message.from_, index=self.log.committed)
            return
        previous: EntryId = message.log_term, message.index
        last = self.log.maybe_append(previous, message.entries, message.commit)
        if last is not None:
            self._send(MessageType.APP_RESP, message.from_, index=last)
            return
        self._journal.debug(
            f"{self.id:x} [logterm: {self.log.term_or_zero(message.index)}, index: "
            f"{message.index}] rejected MsgApp [logterm: {message.log_term}, index: "
            f"{message.index}] from {message.from_:x}"
        )
        # The last entry of ours that the leader can have too: its log has no higher term up to
        # the entry that it named.
        start = min(message.index, self.log.last_index())
        hint_term, hint = self.log.find_conflict_by_term(start, message.log_term)
        self._send(
            MessageType.APP_RESP,
            message.from_,
            index=message.index,
            reject=True,
            reject_hint=hint,
            log_term=hint_term,
        )

    def _on_snapshot(self, leader: int, snapshot: Snapshot) -> None:
        index, term = snapshot.metadata.index, snapshot.metadata.term
        restored = self._restore(leader, snapshot)
        did = "restored" if restored else "ignored"
        self._journal.info(
            f"{self.id:x} [commit: {self.log.committed}] {did} snapshot "
            f"[index: {index}, term: {term}]"
        )
        last = self.log.last_index() if restored else self.log.committed
        self._send(MessageType.APP_RESP, leader, index=last)

    def _restore(self, leader: int, snapshot: Snapshot) -> bool:
        """Begin anew behind a snapshot, if it is news and concerns us."""
        metadata = snapshot.metadata
        if metadata.index <= self.log.committed:
            return False
        state = metadata.conf_state
        if self.id not in (*state.voters, *state.learners, *state.voters_outgoing):
            self._journal.warning(
                f"{self.id:x} attempted to restore snapshot but it is not in the ConfState "
                f"{_describe_conf_state(state)}; should never happen"
            )
            return False
        if self.log.matches((metadata.term, metadata.index)):
            last_term, last_index = self.log.last_entry_id()
            self._journal.info(
                f"{self.id:x} [commit: {self.log.committed}, lastindex: {last_index}, lastterm: "
                f"{last_term}] fast-forwarded commit to snapshot [index: {metadata.index}, term: "
                f"{metadata.term}]"
            )
            self.log.commit_to(metadata.index)
            return False
        config, progress = self._restored_configuration(leader, snapshot)
        self.log.restore(snapshot)
        self._switch_to(config, progress)
        last_term, last_index = self.log.last_entry_id()
        self._journal.info(
            f"{self.id:x} [commit: {self.log.committed}, lastindex: {last_index}, lastterm: "
            f"{last_term}] restored snapshot [index: {metadata.index}, term: {metadata.term}]"
        )
        return True

    def _restored_configuration(
        self, leader: int, snapshot: Snapshot
    ) -> tuple[TrackerConfig, ProgressMap]:
        """Of a snapshot that a peer sent. Raises MalformedStep if it is none."""
        state = snapshot.metadata.conf_state
        changer = self.tracker.changer(snapshot.metadata.index, anew=True)
        try:
            config, progress = restore(changer, state)
        except ConfChangeRefused as error:
            raise MalformedStep(leader, f"a snapshot of no configuration: {error}") from None
        if config.conf_state() != _ascending(state):
            raise MalformedStep(leader, "a snapshot whose configuration contradicts itself")
        return config, progress

    def _on_timeout_now(self, message: Message) -> None:
        self._journal.info(
            f"{self.id:x} [term {self.term}] received MsgTimeoutNow from {message.from_:x} and "
            "starts an election to get leadership."
        )
        # No pre-vote: the leader asked for it, and would answer no.
        self._hup(Campaign.TRANSFER)

    def _ignore_timeout_now(self, message: Message) -> None:
        self._journal.debug(
            f"{self.id:x} [term {self.term} state {ROLE_NAMES[self.role]}] ignored MsgTimeoutNow "
            f"from {message.from_:x}"
        )

    def _forward_transfer(self, message: Message) -> None:
        if self.leader == NOBODY:
            self._journal.info(
                f"{self.id:x} no leader at term {self.term}; dropping leader transfer msg"
            )
        else:
            self._forward(message)

    def _on_forget_leader(self, _message: Message) -> None:
        if self.config.read_only_option is ReadOnlyOption.LEASE_BASED:
            # It has promised the leader to elect nobody.
            self._journal.error("ignoring MsgForgetLeader due to ReadOnlyLeaseBased")
        elif self.leader != NOBODY:
            self._journal.info(f"{self.id:x} forgetting leader {self.leader:x} at term {self.term}")
            self.leader = NOBODY

    # -- storage has answered

    def _on_storage_append_answer(self, message: Message) -> None:
        if message.index:
            self.log.stable_to((message.log_term, message.index))
        if message.snapshot is not None:
            self._applied_snapshot(message.snapshot)

    def _on_storage_apply_answer(self, message: Message) -> None:
        entries = message.entries
        self._applied_to(entries[-1].index, total_size(entries))
        self.uncommitted_size = max(self.uncommitted_size - payload_size(entries), 0)

    def _applied_snapshot(self, snapshot: Snapshot) -> None:
        self.log.stable_snapshot_to(snapshot.metadata.index)
        self._applied_to(snapshot.metadata.index, 0)

    def _applied_to(self, index: int, size: int) -> None:
        applied = max(index, self.log.applied)
        self.log.applied_to(applied, size)
        leads = self.role is StateRole.LEADER
        if leads and self.tracker.config.auto_leave and applied >= self.pending_conf_index:
            self._leave_joint()

    def _leave_joint(self) -> None:
        """Propose to leave the joint configuration. Dropped while leadership is being handed over:
        then the next leader proposes it, or we do with the next entry that is applied.
        """
        # Named before the proposal, which may change it in a cluster of one.
        config = str(self.tracker.config)
        leave = Entry(0, 0, EntryType.CONF_CHANGE_V2)
        try:
            self.step(Message(type=MessageType.PROP, from_=self.id, entries=(leave,)))
        except ProposalDropped:
            self._journal.debug(
                "not initiating automatic transition out of joint configuration "
                f"{config}: raft proposal dropped"
            )
        else:
            self._journal.info(
                f"initiating automatic transition out of joint configuration {config}"
            )

    # -- configuration

    def apply_conf_change(self, change: ConfChangeV2) -> ConfState:
        """A change was applied: from now on it counts. Raises ConfChangeRefused if it does not fit,
        and then nothing has changed.
        """
        if not names_nodes(change):
            raise ConfChangeRefused("a node that cannot be")
        changer = self.tracker.changer(self.log.last_index())
        joint, auto_leave = joint_transition(change)
        if leaves_joint(change):
            config, progress = changer.leave_joint()
        elif joint:
            config, progress = changer.enter_joint(change.changes, auto_leave=auto_leave)
        else:
            config, progress = changer.simple(change.changes)
        return self._switch_to(config, progress)

    def _switch_to(self, config: TrackerConfig, progress: ProgressMap) -> ConfState:
        if self.config.trace:
            new = [str(node) for node in sorted(config.voters.incoming)]
            self._trace("ApplyConfChange", prop={"cc": {"newconf": new} if new else {}})
        self.tracker.switch_to(config, progress)
        self._journal.info(f"{self.id:x} switched to configuration {config}")
        own = progress.get(self.id)
        self.is_learner = own is not None and own.is_learner
        if self.role is StateRole.LEADER:
            if own is not None and not self.is_learner:
                self._lead_in_new_configuration()
            elif self.config.step_down_on_removal:
                self.become_follower(self.term, NOBODY)
        return config.conf_state()

    def _lead_in_new_configuration(self) -> None:
        if self._maybe_commit():
            # Fewer voters may hold more of the log.
            self._broadcast_append()
        else:
            for node in self._others():
                self._send_append(node, send_if_empty=False)
        if self.lead_transferee not in self.tracker.config.voters.ids():
            self.lead_transferee = NOBODY

    # -- tracing

    def _trace(
        self, name: str, *, message: Message | None = None, prop: dict[str, object] | None = None
    ) -> None:
        if self.config.trace is None:
            return
        voters = self.tracker.config.voters
        self.config.trace(
            TraceEvent(
                name=name,
                nid=str(self.id),
                state=TraceState(self.term, str(self.vote), self.log.committed),
                role=ROLE_NAMES[self.role],
                log=self.log.last_index(),
                conf=(
                    tuple(map(str, sorted(voters.incoming))),
                    tuple(map(str, sorted(voters.outgoing))),
                ),
                msg=trace_message(message) if message else None,
                prop=prop or {},
            )
        )

    def trace_ready(self) -> None:
        """A Ready was taken."""
        self._trace("Ready")

    def _trace_message(self, did: str, message: Message) -> None:
        event = message_event(did, message)
        if event is None:
            return
        prop: dict[str, object] = {}
        own = self.tracker.progress.get(message.from_)
        if did == "Send" and message.type is MessageType.APP and own is not None:
            prop = {"match": own.match, "next": own.next}
        self._trace(event, message=message, prop=prop)


def _candidate(message: Message, *, joiner: str = "from") -> str:
    return (
        f"{MESSAGE_NAMES[message.type]} {joiner} {message.from_:x} "
        f"[logterm: {message.log_term}, index: {message.index}]"
    )


def _ascending(state: ConfState) -> ConfState:
    return ConfState(
        voters=tuple(sorted(state.voters)),
        learners=tuple(sorted(state.learners)),
        voters_outgoing=tuple(sorted(state.voters_outgoing)),
        learners_next=tuple(sorted(state.learners_next)),
        auto_leave=state.auto_leave,
    )


def _describe_conf_state(state: ConfState) -> str:
    named = {
        "voters": state.voters,
        "learners": state.learners,
        "voters_outgoing": state.voters_outgoing,
        "learners_next": state.learners_next,
    }
    words = [f"{name}:{node}" for name, nodes in named.items() for node in nodes]
    return " ".join([*words, f"auto_leave:{str(state.auto_leave).lower()}"])


_Steps = Mapping[MessageType, Callable[[Raft, Message], None]]

_IN_EVERY_ROLE: _Steps = {
    MessageType.HUP: Raft._on_hup,
    MessageType.VOTE: Raft._on_vote_request,
    MessageType.PRE_VOTE: Raft._on_vote_request,
    MessageType.STORAGE_APPEND_RESP: Raft._on_storage_append_answer,
    MessageType.STORAGE_APPLY_RESP: Raft._on_storage_apply_answer,
}

_FOLLOWER_STEPS: _Steps = {
    **_IN_EVERY_ROLE,
    MessageType.APP: Raft._on_leader_message,
    MessageType.HEARTBEAT: Raft._on_leader_message,
    MessageType.SNAP: Raft._on_leader_message,
    MessageType.PROP: Raft._forward_proposal,
    MessageType.READ_INDEX: Raft._forward_read,
    MessageType.READ_INDEX_RESP: Raft._on_read_answer,
    MessageType.TRANSFER_LEADER: Raft._forward_transfer,
    MessageType.TIMEOUT_NOW: Raft._on_timeout_now,
    MessageType.FORGET_LEADER: Raft._on_forget_leader,
}

_CANDIDATE_STEPS: _Steps = {
    **_IN_EVERY_ROLE,
    MessageType.APP: Raft._on_leader_message,
    MessageType.HEARTBEAT: Raft._on_leader_message,
    MessageType.SNAP: Raft._on_leader_message,
    MessageType.VOTE_RESP: Raft._on_vote_answer,
    MessageType.PRE_VOTE_RESP: Raft._on_vote_answer,
    MessageType.PROP: Raft._drop_proposal_without_leader,
    MessageType.TIMEOUT_NOW: Raft._ignore_timeout_now,
}

_LEADER_STEPS: _Steps = {
    **_IN_EVERY_ROLE,
    MessageType.BEAT: Raft._on_beat,
    MessageType.CHECK_QUORUM: Raft._on_check_quorum,
    MessageType.PROP: Raft._on_proposal,
    MessageType.READ_INDEX: Raft._on_read_index,
    MessageType.APP_RESP: Raft._on_append_answer,
    MessageType.HEARTBEAT_RESP: Raft._on_heartbeat_answer,
    MessageType.SNAP_STATUS: Raft._on_snapshot_status,
    MessageType.UNREACHABLE: Raft._on_unreachable,
    MessageType.TRANSFER_LEADER: Raft._on_transfer,
    MessageType.VOTE_RESP: Raft._on_unexpected,
    MessageType.PRE_VOTE_RESP: Raft._on_unexpected,
    MessageType.READ_INDEX_RESP: Raft._on_unexpected,
    MessageType.TIMEOUT_NOW: Raft._on_unexpected,
}

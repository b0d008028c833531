"""RawNode: what a program drives.

    while True:
        feed: tick(), step(message), propose(data), read_index(context) ...
        if node.has_ready():
            ready = node.ready()
            write ready.snapshot, ready.entries, ready.hard_state; sync if ready.must_sync
            send ready.messages
            apply ready.committed_entries, calling apply_conf_change for those that are changes
            node.advance()

With async_storage_writes, `ready.messages` has a STORAGE_APPEND and a STORAGE_APPLY instead, to
LOCAL_APPEND_THREAD and LOCAL_APPLY_THREAD. Each of the two does its work in order, and then
delivers the message's `responses`: those to this node by `step`, the others over the network.
Nothing else is done with `ready`, and `advance` is not called.

Not safe for threads: one task owns it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ollamamax_p2p.consensus.core.config_change import TrackerConfig, as_v2, conf_change_entry
from ollamamax_p2p.consensus.core.message_checks import (
    ANSWER_TYPES,
    LOCAL_SENDERS,
    LOCAL_TYPES,
)
from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    LOCAL_APPLY_THREAD,
    ConfChange,
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
    total_size,
)
from ollamamax_p2p.consensus.core.progress import Progress
from ollamamax_p2p.consensus.core.raft import Raft
from ollamamax_p2p.consensus.core.raft_config import RaftConfig
from ollamamax_p2p.consensus.core.step_errors import (
    LocalMessageRefused,
    MalformedStep,
    UnknownPeerRefused,
)

__all__ = ["BasicStatus", "RaftConfig", "RawNode", "Ready", "Status", "hard_state_of"]


@dataclass(frozen=True, slots=True)
class Ready:
    """What is to be done now. Of what is None or empty there is nothing to do."""

    soft_state: SoftState | None
    """If it has changed; for observers."""

    hard_state: HardState | None
    """If it has changed; to be written with the entries."""

    read_states: list[ReadState]
    """Reads that may be served once their index is applied."""

    entries: list[Entry]
    """To be appended to the log, before messages are sent. They may replace some there."""

    snapshot: Snapshot | None
    """To be installed, before the entries."""

    committed_entries: list[Entry]
    """To be applied to the state machine, in order."""

    messages: list[Message]
    """To be sent, after the writing."""

    must_sync: bool
    """Whether the writing must be durable before the messages go."""


@dataclass(frozen=True, slots=True)
class BasicStatus:
    """A node at a glance."""

    id: int
    hard_state: HardState
    soft_state: SoftState
    applied: int
    lead_transferee: int


@dataclass(frozen=True, slots=True)
class Status(BasicStatus):
    """A node and, if it leads, its followers."""

    config: TrackerConfig
    progress: Mapping[int, Progress] = field(default_factory=dict)
    """Ascending by id; empty if it does not lead. The node's own objects: read them at once."""


class RawNode:
    """One node of Raft."""

    def __init__(self, config: RaftConfig) -> None:
        """Raises ValueError if the storage holds what cannot be."""
        self.raft = Raft(config)
        """For observers and tests."""
        self._async = config.async_storage_writes
        self._soft_state = self.raft.soft_state()
        self._hard_state = self.raft.hard_state()
        self._steps_on_advance: list[Message] = []
        self._awaits_advance = False

    # -- what happened

    def tick(self) -> None:
        """One tick has passed."""
        self.raft.tick()

    def step(self, message: Message) -> None:
        """A message has come, from a peer or from this node's own storage.

        Raises StepRefused (its subclasses) for what is not taken, ProposalDropped for a
        forwarded proposal that is not. Check from_ before, or use `step_from`.
        """
        local_sender = message.from_ in LOCAL_SENDERS
        if message.type in LOCAL_TYPES and not local_sender:
            raise LocalMessageRefused
        if (
            message.type in ANSWER_TYPES
            and not local_sender
            and message.from_ not in self.raft.tracker.progress
        ):
            raise UnknownPeerRefused
        self.raft.step(message)

    def step_from(self, peer: int, message: Message) -> None:
        """As `step`, for what came over the network from this peer: nobody may speak for others,
        nor for this node's storage.
        """
        if message.from_ != peer or peer == self.raft.id or peer in LOCAL_SENDERS:
            raise MalformedStep(peer, f"a message in the name of node {message.from_:x}")
        self.step(message)

    def propose(self, data: bytes) -> None:
        """Ask for an entry with this data. Raises ProposalDropped; not to raise promises nothing,
        only that it was sent on.
        """
        self.propose_batch((data,))

    def propose_batch(self, batch: Iterable[bytes]) -> None:
        """Ask for several entries at once, all or none, which costs less than one by one."""
        entries = tuple([Entry(0, 0, EntryType.NORMAL, data) for data in batch])
        self.raft.step(Message(type=MessageType.PROP, from_=self.raft.id, entries=entries))

    def propose_conf_change(self, change: ConfChange | ConfChangeV2) -> None:
        """Ask for a change of the configuration. One that cannot be now becomes an empty entry.
        Raises ProposalDropped, and ValueError if it is too long.
        """
        kind, data = conf_change_entry(change)
        entry = Entry(0, 0, kind, data)
        self.raft.step(Message(type=MessageType.PROP, from_=self.raft.id, entries=(entry,)))

    def apply_conf_change(self, change: ConfChange | ConfChangeV2) -> ConfState:
        """A committed change was applied; call it for each, also on followers.

        Raises ConfChangeRefused if it does not fit: every node refuses it alike, and nothing has
        changed.
        """
        return self.raft.apply_conf_change(as_v2(change))

    def campaign(self) -> None:
        """Try to become leader now."""
        self.raft.step(Message(type=MessageType.HUP))

    def report_unreachable(self, node: int) -> None:
        """The last message to a node did not reach it."""
        self.raft.step(Message(type=MessageType.UNREACHABLE, from_=node))

    def report_snapshot(self, node: int, *, ok: bool) -> None:
        """How the sending of a snapshot to a node ended. Must be called, or it gets nothing more
        until it answers.
        """
        self.raft.step(Message(type=MessageType.SNAP_STATUS, from_=node, reject=not ok))

    def transfer_leader(self, to: int) -> None:
        """Hand leadership to a node; given up after an election timeout.

        On a follower it is sent on in the name of the node that is to lead, which a transport that
        checks senders takes only if that is this node; ask the leader otherwise.
        """
        self.raft.step(Message(type=MessageType.TRANSFER_LEADER, from_=to))

    def forget_leader(self) -> None:
        """Take part in elections at once, though the leader may live. On followers only, and
        not with lease-based reads.
        """
        self.raft.step(Message(type=MessageType.FORGET_LEADER))

    def step_down_for_stalled_disk(self) -> None:
        """This node leads and its disk does not answer: see Raft."""
        self.raft.step_down_for_stalled_disk()

    def read_index(self, context: bytes) -> None:
        """Ask from which index on a read sees everything; a ReadState with this context tells it.
        May be lost: ask again after a while.
        """
        entry = Entry(0, 0, EntryType.NORMAL, context)
        self.raft.step(Message(type=MessageType.READ_INDEX, entries=(entry,)))

    # -- what to do

    def has_ready(self) -> bool:
        """Whether `ready` has something."""
        raft = self.raft
        return bool(
            raft.messages
            or raft.messages_after_append
            or raft.log.has_next_unstable_entries()
            or raft.log.has_next_committed_entries(allow_unstable=not self._async)
            or raft.read_states
            or raft.log.has_next_unstable_snapshot()
            or raft.hard_state() != self._hard_state
            or raft.soft_state() != self._soft_state
        )

    def ready(self) -> Ready:
        """What is to be done, all of it; without async_storage_writes call `advance` when it is
        done, and `ready` not before.
        """
        assert not self._awaits_advance, "two accepted Ready structs without call to Advance"
        raft = self.raft
        hard_state, soft_state = raft.hard_state(), raft.soft_state()
        entries = raft.log.next_unstable_entries()
        ready = Ready(
            soft_state=None if soft_state == self._soft_state else soft_state,
            hard_state=None if hard_state == self._hard_state else hard_state,
            read_states=raft.read_states,
            entries=entries,
            snapshot=raft.log.unstable.next_snapshot(),
            committed_entries=raft.log.next_committed_entries(allow_unstable=not self._async),
            messages=raft.messages,
            must_sync=bool(entries)
            or hard_state.vote != self._hard_state.vote
            or hard_state.term != self._hard_state.term,
        )
        if self._async:
            self._ask_storage(ready)
        else:
            self._keep_for_advance(ready)
        self._accept(ready)
        self._soft_state, self._hard_state = soft_state, hard_state
        return ready

    def advance(self) -> None:
        """The last Ready has been carried out. Not with async_storage_writes."""
        assert not self._async, "Advance must not be called when using AsyncStorageWrites"
        self._awaits_advance = False
        steps, self._steps_on_advance = self._steps_on_advance, []
        for message in steps:
            self.raft.step(message)

    def _accept(self, ready: Ready) -> None:
        raft = self.raft
        raft.read_states, raft.messages, raft.messages_after_append = [], [], []
        raft.log.accept_unstable()
        applied = ready.committed_entries
        if applied:
            raft.log.accept_applying(
                applied[-1].index, total_size(applied), allow_unstable=not self._async
            )
        raft.trace_ready()

    def _ask_storage(self, ready: Ready) -> None:
        waiting = self.raft.messages_after_append
        if ready.entries or ready.hard_state or ready.snapshot or waiting:
            state = ready.hard_state or HardState()
            answer = self._append_answer(ready)
            append = Message(
                type=MessageType.STORAGE_APPEND,
                to=LOCAL_APPEND_THREAD,
                from_=self.raft.id,
                entries=tuple(ready.entries),
                term=state.term,
                vote=state.vote,
                commit=state.commit,
                snapshot=ready.snapshot,
                # Our own acknowledgements first: the entries are still in memory for them.
                responses=(*waiting, answer) if answer else tuple(waiting),
            )
            ready.messages.append(append)
        if ready.committed_entries:
            entries = tuple(ready.committed_entries)
            apply = Message(
                type=MessageType.STORAGE_APPLY,
                to=LOCAL_APPLY_THREAD,
                from_=self.raft.id,
                entries=entries,
                responses=(self._apply_answer(entries),),
            )
            ready.messages.append(apply)

    def _keep_for_advance(self, ready: Ready) -> None:
        own = self.raft.id
        for message in self.raft.messages_after_append:
            kept = self._steps_on_advance if message.to == own else ready.messages
            kept.append(message)
        answer = self._append_answer(ready)
        if answer:
            self._steps_on_advance.append(answer)
        if ready.committed_entries:
            self._steps_on_advance.append(self._apply_answer(tuple(ready.committed_entries)))
        self._awaits_advance = True

    def _append_answer(self, ready: Ready) -> Message | None:
        """What storage says when it is done. It names the last entry also if this Ready brings
        none: an earlier answer may have been ignored for its term, and this one stands for it.
        """
        log = self.raft.log
        unstable = log.has_next_or_in_progress_unstable_entries()
        if not unstable and ready.snapshot is None:
            return None
        log_term, index = log.last_entry_id() if unstable else (0, 0)
        return Message(
            type=MessageType.STORAGE_APPEND_RESP,
            to=self.raft.id,
            from_=LOCAL_APPEND_THREAD,
            term=self.raft.term,
            log_term=log_term,
            index=index,
            snapshot=ready.snapshot,
        )

    def _apply_answer(self, entries: tuple[Entry, ...]) -> Message:
        return Message(
            type=MessageType.STORAGE_APPLY_RESP,
            to=self.raft.id,
            from_=LOCAL_APPLY_THREAD,
            entries=entries,
        )

    # -- how it stands

    def basic_status(self) -> BasicStatus:
        """Costs nothing."""
        raft = self.raft
        return BasicStatus(
            raft.id, raft.hard_state(), raft.soft_state(), raft.log.applied, raft.lead_transferee
        )

    def status(self) -> Status:
        """With everybody's progress, if this node leads."""
        raft = self.raft
        progress = raft.tracker.progress if raft.role is StateRole.LEADER else {}
        return Status(
            raft.id,
            raft.hard_state(),
            raft.soft_state(),
            raft.log.applied,
            raft.lead_transferee,
            raft.tracker.config,
            {node: progress[node] for node in sorted(progress)},
        )


def hard_state_of(append: Message) -> HardState | None:
    """The hard state that a STORAGE_APPEND wants durable; None if it has none."""
    state = HardState(append.term, append.vote, append.commit)
    return None if state == HardState() else state

"""What must hold in a Raft cluster after every step, whatever goes wrong.

     1  election safety: one leader in a term, and one life of it; a majority voted for it
     2  a leader only appends
     3  log matching: an entry with one index and term has one content and one predecessor
     4  leader completeness: a leader holds all that older leaders committed
     5  state machine safety: equal index, equal command, equal result, equal state; without gaps
     6  what a leader commits is of its term, and durable on a majority of the voters in force
     7  what is committed never changes
     8  compacted <= snapshot <= applied <= committed <= last
     9  term, vote, commit index and applied index never go back; a restart finds what was synced
    10  nothing that depends on a write is sent before it is durable; nothing is applied before
    11  one unapplied change of the configuration at most
    12  what was acknowledged is read by all who ask later; nothing is read that nobody wrote; a
        command is carried out once
    13  a lease has one holder, and no fenced write of an older one is taken
    14  when the faults stop, all members agree and take new commands soon
    15  no queue grows without end

Each is checked where it can break, on the node that has just done something, from what it has done:
so a step costs little however long the logs are. That is enough because the entries of all logs are
in one table (3), committed ones in another (7), and the durable state of each node is followed
write by write (9, 10), from the disk's own word on what is synced, not from the log's.

14 is `simulated_cluster`'s, because it takes running on; 12 is checked twice: here, against the one
order in which the commands were applied, and by a search that knows nothing of it
(`linearizability`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from ollamamax_p2p.consensus import ConsensusSettings, LogStorage, storage_work
from ollamamax_p2p.consensus.core.command import Command
from ollamamax_p2p.consensus.core.drive import Drive, Write
from ollamamax_p2p.consensus.core.messages import (
    NO_LIMIT,
    NOBODY,
    EntryType,
    Message,
    MessageType,
    StateRole,
)
from ollamamax_p2p.consensus.core.quorum import JointConfig
from ollamamax_p2p.consensus.core.raft import Raft
from ollamamax_p2p.consensus.core.sessions import SEQUENCE_FORGOTTEN, SESSION_ENDED
from ollamamax_p2p.testing.invariants import InvariantBroken
from ollamamax_p2p.testing.key_value import (
    Acquire,
    Append,
    CompareAndSet,
    Delete,
    Get,
    KeyValue,
    Put,
    Release,
    Request,
    Result,
)

NAMES = {
    1: "election safety",
    2: "leader append-only",
    3: "log matching",
    4: "leader completeness",
    5: "state machine safety",
    6: "committed on a quorum",
    7: "committed is immutable",
    8: "order of indexes",
    9: "monotony and durability",
    10: "persist before send and apply",
    11: "one change of the configuration",
    12: "clients' consistency",
    13: "leases",
    14: "liveness",
    15: "bounded queues",
}


class RaftInvariantBroken(InvariantBroken):
    """One of the above."""

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"invariant {number}, {NAMES[number]}: {problem}")
        self.number = number


class Seen(NamedTuple):
    """A node as it was after its last step."""

    term: int
    vote: int
    role: StateRole
    committed: int
    applied: int
    last: int


_NEW = Seen(0, NOBODY, StateRole.FOLLOWER, 0, 0, 0)


@dataclass(slots=True)
class _Durable:
    """What a log must hold if the power goes now."""

    term: int = 0
    vote: int = NOBODY
    base: int = 0
    """Of the last snapshot that was installed: everything up to it is there."""
    last: int = 0
    terms: dict[int, int] = field(default_factory=dict)
    """Of entries behind the base, by index."""

    def copied(self) -> "_Durable":
        return _Durable(self.term, self.vote, self.base, self.last, dict(self.terms))

    def take(self, write: Write) -> None:
        if write.snapshot is not None:
            self.base = self.last = write.snapshot.metadata.index
            self.terms.clear()
        if write.entries:
            first, last = write.entries[0].index, write.entries[-1].index
            for index in range(last + 1, self.last + 1):
                del self.terms[index]
            for entry in write.entries:
                if entry.index > self.base:
                    self.terms[entry.index] = entry.term
            self.last = last if first > self.base or last > self.base else self.base
        if write.hard_state is not None:
            self.term, self.vote = write.hard_state.term, write.hard_state.vote

    def holds(self, index: int, term: int) -> bool:
        return index <= self.base or self.terms.get(index) == term

    def differs_from(self, log: LogStorage) -> str:
        """In what a log that was opened again is not this; "" if it is."""
        state, _ = log.initial_state()
        if (state.term, state.vote) != (self.term, self.vote):
            return (
                f"term {state.term}, vote {state.vote} where {self.term}, {self.vote} was written"
            )
        low, last = log.first_index(), log.last_index()
        if last != self.last:
            return f"it ends at {last}, not at {self.last}"
        for index in range(max(low, self.base + 1), last + 1):
            if log.term(index) != self.terms[index]:
                return f"entry {index} is of term {log.term(index)}, not {self.terms[index]}"
        return ""


@dataclass(slots=True)
class _View:
    """What is remembered of one node."""

    life: int = 0
    seen: Seen = _NEW
    last_term: int = 0
    voters: JointConfig = field(default_factory=JointConfig)
    changes: list[int] = field(default_factory=list)
    """Indexes of changes of the configuration in its log, ascending."""
    durable: _Durable = field(default_factory=_Durable)
    pending: list[Write] = field(default_factory=list)
    """Written, but maybe not durable yet."""
    state_applied: int = 0


class RaftInvariants:
    """Told of everything that the nodes of one cluster do. Raises RaftInvariantBroken."""

    def __init__(
        self,
        settings: ConsensusSettings,
        after_power_cut: Callable[[int], LogStorage],
        leader_has: Callable[[int, int, int], int],
    ) -> None:
        """after_power_cut: a node's log as it would be if the power went now and its disk lost all
        that it may lose. leader_has: of a node, a term and an index, the term of that entry, if it
        leads that term and has it; else 0.
        """
        self._settings = settings
        self._leader_has = leader_has
        self._after_power_cut = after_power_cut
        self._views: dict[int, _View] = {}
        self._leaders: dict[int, tuple[int, int]] = {}
        self._votes: dict[tuple[int, int], int] = {}
        """Whom a node has told that it votes for it, in a term."""
        self._entries: dict[tuple[int, int], tuple[int, EntryType, bytes]] = {}
        self._committed: dict[int, int] = {}
        """Terms, by index."""
        self._committed_by_term: dict[int, int] = {}
        """The last index that the leader of a term has committed."""
        self._state_hashes: dict[int, bytes] = {}
        self.agreed = AgreedHistory()

    @property
    def last_committed(self) -> int:
        """The greatest index that any leader has committed."""
        return max(self._committed, default=0)

    @property
    def elections(self) -> int:
        """How many terms had a leader."""
        return len(self._leaders)

    # -- a node begins

    def begun(self, node: int, life: int, drive: Drive, log: LogStorage, state: KeyValue) -> None:
        """It goes on from what is in its log."""
        view = self._views.setdefault(node, _View())
        low, high = log.first_index(), log.last_index() + 1
        view.changes = []
        previous = log.term(low - 1)
        terms = {}
        for entry in log.entries(low, high, NO_LIMIT) if low < high else ():
            self._record(node, entry.index, entry.term, previous, entry.type, entry.data)
            previous = terms[entry.index] = entry.term
            if entry.type is not EntryType.NORMAL:
                view.changes.append(entry.index)
        hard_state = log.initial_state()[0]
        # The log syncs what it finds before anybody may rely on it.
        view.durable = _Durable(hard_state.term, hard_state.vote, low - 1, high - 1, terms)
        view.pending = []
        if state.applied_index < view.state_applied:
            raise RaftInvariantBroken(9, f"node {node} has forgotten what it applied")
        view.state_applied = state.applied_index
        view.life = life
        raft = drive.raw_node.raft
        if (raft.term, raft.vote) < (hard_state.term, hard_state.vote):
            raise RaftInvariantBroken(
                9, f"node {node} begins with vote {raft.vote} in term {raft.term}, not {hard_state}"
            )
        view.voters = raft.tracker.config.voters
        view.seen = Seen(raft.term, raft.vote, raft.role, 0, 0, 0)
        self.after(node, drive, log, state)

    def opened_again(self, node: int, log: LogStorage) -> None:
        """It holds what was durable, and of what was written since then whole writes, in order."""
        view = self._views[node]
        possible = view.durable
        problem = possible.differs_from(log)
        for write in view.pending:
            if not problem:
                return
            possible = possible.copied()
            possible.take(write)
            problem = possible.differs_from(log)
        if problem:
            raise RaftInvariantBroken(9, f"node {node}'s log after a restart: {problem}")

    # -- a node works

    def handed_out(self, node: int, raft: Raft, append: Message) -> None:
        """A STORAGE_APPEND is to be written."""
        if not append.entries:
            return
        view = self._views[node]
        first, term = append.entries[0].index, append.entries[0].term
        # What a full disk has refused is handed out again, though it may be replaced by now.
        is_current = raft.log.term_or_zero(first) == term
        previous = raft.log.term_or_zero(first - 1) if is_current else 0
        view.changes = [index for index in view.changes if index < first]
        for entry in append.entries:
            self._record(node, entry.index, entry.term, previous, entry.type, entry.data)
            previous = entry.term
            if entry.type is not EntryType.NORMAL:
                view.changes.append(entry.index)

    def _record(
        self, node: int, index: int, term: int, previous: int, kind: EntryType, data: bytes
    ) -> None:
        known = self._entries.setdefault((index, term), (previous, kind, data))
        if known[1:] != (kind, data):
            raise RaftInvariantBroken(3, f"entry {index} of term {term} on node {node} is another")
        if previous and known[0] and known[0] != previous:
            raise RaftInvariantBroken(
                3,
                f"on node {node} entry {index} of term {term} follows one of term {previous}, "
                f"elsewhere one of term {known[0]}",
            )

    def will_write(self, node: int, write: Write) -> None:
        """From now on a crash may find it."""
        pending = self._views[node].pending
        if write.snapshot is not None and write.entries:
            # Two steps of the log.
            pending.append(Write([], write.snapshot, [], write.hard_state, True))
            pending.append(Write([], None, write.entries, None, True))
        else:
            pending.append(write)

    def did_not_write(self, node: int, write: Write, log: LogStorage) -> None:
        """It was taken back, because there was no room; a snapshot before the entries was not."""
        pending = self._views[node].pending
        pending.pop()
        if write.snapshot is not None and write.entries:
            if log.first_index() - 1 != write.snapshot.metadata.index:
                pending.pop()
            else:
                self.all_synced(node)

    def all_synced(self, node: int) -> None:
        """The disk has nothing that a crash could take."""
        view = self._views[node]
        for write in view.pending:
            view.durable.take(write)
        view.pending.clear()

    def _settled(self, node: int) -> _Durable:
        """What is durable, where the disk's word alone does not tell: it has something unsynced,
        but perhaps only what the log does not need.
        """
        view = self._views[node]
        if view.pending:
            log = self._after_power_cut(node)
            possible, durable_writes = view.durable.copied(), 0
            for number, write in enumerate(view.pending, start=1):
                possible.take(write)
                if not possible.differs_from(log):
                    view.durable, durable_writes = possible.copied(), number
            del view.pending[:durable_writes]
        return view.durable

    def _holds(self, node: int, index: int, term: int) -> bool:
        """Whether an entry is durable."""
        if self._views[node].durable.holds(index, term):
            return True
        return self._settled(node).holds(index, term)

    def _has_voted(self, node: int, term: int, vote: int) -> bool:
        """Whether a vote is durable, or has been overtaken by a higher term."""

        def is_there(durable: _Durable) -> bool:
            return durable.term > term or (durable.term, durable.vote) == (term, vote)

        return is_there(self._views[node].durable) or is_there(self._settled(node))

    def sent(self, node: int, raft: Raft, message: Message) -> None:
        """A message leaves."""
        kind = message.type
        if message.reject or message.to == node:
            return
        if kind is MessageType.APP_RESP:
            durable = self._views[node].durable
            # Of an older term: what it names may have been replaced since.
            term = raft.log.term_or_zero(message.index) or durable.terms.get(message.index, -1)
            if message.term == raft.term and not self._holds(node, message.index, term):
                raise RaftInvariantBroken(
                    10, f"node {node} acknowledges entry {message.index}, which is not durable"
                )
            theirs = self._leader_has(message.to, message.term, message.index)
            if message.term == raft.term and theirs and term not in (theirs, -1):
                raise RaftInvariantBroken(
                    3,
                    f"node {node} acknowledges entry {message.index} of term {term}, and its "
                    f"leader {message.to} has one of term {theirs}",
                )
        elif kind is MessageType.VOTE_RESP:
            if not self._has_voted(node, message.term, message.to):
                raise RaftInvariantBroken(
                    10, f"node {node} votes in term {message.term}, which is not durable"
                )
            given = self._votes.setdefault((node, message.term), message.to)
            if given != message.to:
                raise RaftInvariantBroken(
                    1, f"node {node} votes for {given} and {message.to} in term {message.term}"
                )

    def applied(
        self, node: int, commands: Iterable[Command], results: Iterable[bytes | None]
    ) -> None:
        """Some of a batch of commands were given to the state machine."""
        view = self._views[node]
        for command, result in zip(commands, results, strict=True):
            if result is None:
                continue
            if command.index != view.state_applied + 1:
                raise RaftInvariantBroken(
                    5, f"node {node} applies {command.index} after {view.state_applied}"
                )
            view.state_applied = command.index
            if not self._holds(node, command.index, command.term):
                raise RaftInvariantBroken(
                    10, f"node {node} applies {command.index}, which is not durable there"
                )
            if self._committed.get(command.index) != command.term:
                raise RaftInvariantBroken(
                    5, f"node {node} applies {command.index} of term {command.term}, not committed"
                )
            self.agreed.applied(node, command, result)

    def state_is(self, node: int, state: KeyValue) -> None:
        """A batch is applied."""
        self._check_state(node, self._views[node], state)

    def installed(self, node: int, state: KeyValue) -> None:
        """A snapshot has taken the state's place."""
        view = self._views[node]
        if state.applied_index < view.state_applied:
            raise RaftInvariantBroken(9, f"a snapshot takes node {node} back")
        view.state_applied = state.applied_index
        self._check_state(node, view, state)

    def _check_state(self, node: int, view: _View, state: KeyValue) -> None:
        if state.applied_index != view.state_applied:
            raise RaftInvariantBroken(
                5, f"node {node}'s state is at {state.applied_index}, not at {view.state_applied}"
            )
        found = state.state_hash()
        if self._state_hashes.setdefault(state.applied_index, found) != found:
            raise RaftInvariantBroken(5, f"node {node}'s state at {state.applied_index} is another")

    # -- after each step

    def after(self, node: int, drive: Drive, log: LogStorage, state: KeyValue) -> Seen:
        """Something has happened on a node."""
        raft = drive.raw_node.raft
        raft_log = raft.log
        now = Seen(
            raft.term,
            raft.vote,
            raft.role,
            raft_log.committed,
            raft_log.applied,
            raft_log.last_index(),
        )
        view = self._views[node]
        was = view.seen
        if now == was and view.voters is raft.tracker.config.voters:
            return now
        self._check_monotony(node, was, now)
        first = raft_log.first_index()
        stored = log.first_index() - 1
        if not first - 1 <= now.committed <= now.last or not now.applied <= now.committed:
            raise RaftInvariantBroken(8, f"node {node}: first {first}, {now}")
        if not stored <= max(storage_work.snapshot_index(log), 0) <= state.applied_index:
            raise RaftInvariantBroken(
                8,
                f"node {node}: compacted {stored}, snapshot {storage_work.snapshot_index(log)}, "
                f"applied {state.applied_index}",
            )
        if state.applied_index < now.applied:
            raise RaftInvariantBroken(
                8, f"node {node}: {now.applied} applied, the state is at {state.applied_index}"
            )
        leads = now.role is StateRole.LEADER
        if leads and (was.role is not StateRole.LEADER or was.term != now.term):
            self._check_elected(node, view, raft)
        elif leads:
            self._check_append_only(node, view, raft, now)
        if now.committed > was.committed:
            self._check_commit(node, view, raft, now)
        if leads:
            self._check_leading(node, view, raft)
        view.seen = now
        view.last_term = raft_log.term_or_zero(now.last)
        view.voters = raft.tracker.config.voters
        self._check_bounds(node, drive)
        return now

    def _check_monotony(self, node: int, was: Seen, now: Seen) -> None:
        if (
            now.term < was.term
            or now.committed < was.committed
            or now.applied < was.applied
            or (now.term == was.term and was.vote != NOBODY and now.vote != was.vote)
        ):
            raise RaftInvariantBroken(9, f"node {node} goes back from {was} to {now}")

    def _check_elected(self, node: int, view: _View, raft: Raft) -> None:
        term, log = raft.term, raft.log
        led = self._leaders.setdefault(term, (node, view.life))
        if led[0] != node:
            raise RaftInvariantBroken(1, f"nodes {led[0]} and {node} lead term {term}")
        if led[1] != view.life:
            raise RaftInvariantBroken(
                1, f"node {node} leads term {term} again after a restart, with another log"
            )
        if not self._has_voted(node, term, node):
            raise RaftInvariantBroken(
                10, f"node {node} leads term {term}, and its vote for itself is not durable"
            )
        voted = {voter for (voter, of), to in self._votes.items() if of == term and to == node}
        voted.add(node)
        configurations = (view.voters, raft.tracker.config.voters)
        if not any(node in each.ids() and _majorities(each, voted) for each in configurations):
            raise RaftInvariantBroken(
                1, f"node {node} leads term {term} by the votes of {sorted(voted)}"
            )
        older = [last for of, last in self._committed_by_term.items() if of < term]
        committed = max(older, default=0)
        if committed >= log.first_index() - 1 and log.term_or_zero(committed) != (
            self._committed.get(committed, 0)
        ):
            raise RaftInvariantBroken(
                4, f"node {node} leads term {term} without entry {committed}, which is committed"
            )

    def _check_append_only(self, node: int, view: _View, raft: Raft, now: Seen) -> None:
        was = view.seen
        if now.last < was.last or raft.log.term_or_zero(was.last) not in (view.last_term, 0):
            raise RaftInvariantBroken(2, f"node {node} leads, and its log loses entry {was.last}")

    def _check_commit(self, node: int, view: _View, raft: Raft, now: Seen) -> None:
        log = raft.log
        for index in range(max(view.seen.committed + 1, log.first_index()), now.committed + 1):
            term = log.term(index)
            if self._committed.setdefault(index, term) != term:
                raise RaftInvariantBroken(
                    7,
                    f"node {node} commits entry {index} of term {term}, of term "
                    f"{self._committed[index]} it was committed before",
                )
        if now.role is not StateRole.LEADER:
            return
        term = log.term(now.committed)
        if term != now.term:
            raise RaftInvariantBroken(
                6, f"node {node} leads term {now.term} and commits an entry of term {term}"
            )
        self._committed_by_term[now.term] = now.committed
        holding = {other for other in self._views if self._holds(other, now.committed, term)}
        # A step may commit a change of the configuration and apply it: either may have counted.
        if not any(
            _majorities(each, holding) for each in (view.voters, raft.tracker.config.voters)
        ):
            raise RaftInvariantBroken(
                6,
                f"node {node} commits entry {now.committed}, durable on {sorted(holding)} only, "
                f"in {raft.tracker.config}",
            )

    def _check_leading(self, node: int, view: _View, raft: Raft) -> None:
        unapplied = [index for index in view.changes if index > raft.log.applied]
        if len(unapplied) > 1:
            raise RaftInvariantBroken(
                11, f"node {node} leads with changes of the configuration at {unapplied} unapplied"
            )
        most = self._settings.max_inflight_messages
        for other, progress in raft.tracker.progress.items():
            if len(progress.inflights) > most:
                raise RaftInvariantBroken(15, f"node {node} sends {other} more than {most} appends")
        limit = self._settings.max_uncommitted_bytes + self._settings.max_message_bytes
        if raft.uncommitted_size > limit + self._settings.max_command_bytes:
            raise RaftInvariantBroken(15, f"node {node}: {raft.uncommitted_size} uncommitted bytes")

    def _check_bounds(self, node: int, drive: Drive) -> None:
        if drive.requests_waiting > 3 * self._settings.proposals_waiting_max:
            raise RaftInvariantBroken(15, f"node {node}: {drive.requests_waiting} requests wait")


def _majorities(voters: JointConfig, nodes: Iterable[int]) -> bool:
    """Whether they are a majority of each half. Counted here, not by the code that is checked."""
    members = set(nodes)
    return all(
        2 * len(members & half) > len(half) for half in (voters.incoming, voters.outgoing) if half
    )


# -- what clients see --------------------------------------------------------------------------

_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_results = msgspec.msgpack.Encoder()
_told = msgspec.msgpack.Decoder(Result)


class AgreedHistory:
    """The commands in the order in which they were applied, and what they should have given: a
    second key-value store, which knows each command's place.
    """

    def __init__(self) -> None:
        self.last = 0
        self._applied: list[tuple[Command, bytes]] = []
        self._values: dict[str, bytes] = {}
        self._holders: dict[str, tuple[str, int]] = {}
        """Of each lease that is held: by whom, and the token."""
        self._fences: dict[str, int] = {}
        self._done: dict[tuple[int, int], tuple[int, bytes]] = {}
        """By session and sequence: where it was carried out, and what it gave."""
        self._sessions: set[int] = set()
        self._written_at: dict[tuple[str, bytes | None], int] = {}
        """Where a key got this value; clients never write one twice."""
        self._floors: dict[str, int] = {}
        """Of each key: the newest place that anybody was told of."""

    def applied(self, node: int, command: Command, result: bytes) -> None:
        """A node has applied a command."""
        index = command.index
        if index <= self.last:
            first, its_result = self._applied[index - 1]
            if first != command or its_result != result:
                raise RaftInvariantBroken(5, f"node {node} applies another command at {index}")
            return
        if index != self.last + 1:
            raise RaftInvariantBroken(5, f"node {node} is first to apply {index}, {self.last} was")
        self.last = index
        self._applied.append((command, result))
        expected = self._expected(command)
        if result not in (expected, SEQUENCE_FORGOTTEN):
            raise RaftInvariantBroken(
                12, f"the command at {index} gives {result!r}, it should give {expected!r}"
            )

    def _expected(self, command: Command) -> bytes:
        if command.opens_session:
            self._sessions.add(command.index)
            return command.index.to_bytes(8, "big")
        if not command.data:
            return b""
        if command.session not in self._sessions:
            return SESSION_ENDED
        key = (command.session, command.sequence)
        if key not in self._done:
            request = _requests.decode(command.data)
            result = _results.encode(self._carried_out(request, command.index))
            self._done[key] = (command.index, result)
        return self._done[key][1]

    def _carried_out(self, request: Request, index: int) -> Result:
        match request:
            case Get(key):
                return Result(True, self._values.get(key))
            case Put(key, value, lease, token):
                if lease:
                    _, newest = self._holders.get(lease, ("", 0))
                    if newest != token:
                        return Result(False, token=newest)
                    if token < self._fences.get(lease, 0):
                        raise RaftInvariantBroken(13, f"{index}: an old holder of {lease} writes")
                    self._fences[lease] = token
                self._set(key, value, index)
                return Result(True, value)
            case CompareAndSet(key, expected, value):
                found = self._values.get(key)
                if found != expected:
                    return Result(False, found)
                self._set(key, value, index)
                return Result(True, value)
            case Append(key, value):
                self._set(key, self._values.get(key, b"") + value, index)
                return Result(True, self._values[key])
            case Acquire(lease, name):
                if lease in self._holders:
                    holder, newest = self._holders[lease]
                    return Result(False, holder.encode(), newest)
                self._holders[lease] = (name, index)
                return Result(True, name.encode(), index)
            case Release(lease, token):
                free = self._holders.get(lease, ("", 0))[1] == token
                if free:
                    self._holders.pop(lease, None)
                return Result(free)
            case Delete():
                raise ValueError("the places of values are known only if nothing is deleted")

    def _set(self, key: str, value: bytes, index: int) -> None:
        self._values[key] = value
        self._written_at[key, value] = index

    # -- what clients were told

    def floor(self, key: str) -> int:
        """What an operation that begins now must see: the place of the newest value of this key
        that anybody was told of.
        """
        return self._floors.get(key, 0)

    def answered(self, session: int, sequence: int, key: str, result: bytes, floor: int) -> None:
        """A client was told what its command gave. floor: from when it began."""
        done = self._done.get((session, sequence))
        if done is None or done[1] != result:
            raise RaftInvariantBroken(
                12,
                f"command {sequence} of session {session} was answered with {result!r}, not "
                f"with what it gave: {done}",
            )
        if done[0] <= floor:
            raise RaftInvariantBroken(
                12,
                f"command {sequence} of session {session} took effect at {done[0]}, before it "
                f"began, when {floor} was known",
            )
        value = _told.decode(result).value
        self._raise_floor(key, self._written_at.get((key, value), 0))

    def read(self, key: str, value: bytes | None, floor: int) -> None:
        """A client was told this value. floor: from when it asked."""
        place = 0 if value is None else self._written_at.get((key, value), -1)
        if place < 0:
            raise RaftInvariantBroken(12, f"{key} reads {value!r}, which nobody wrote")
        if place < floor:
            raise RaftInvariantBroken(
                12, f"{key} reads {value!r}, of index {place}, when {floor} was known before"
            )
        self._raise_floor(key, place)

    def _raise_floor(self, key: str, place: int) -> None:
        self._floors[key] = max(self._floors.get(key, 0), place)

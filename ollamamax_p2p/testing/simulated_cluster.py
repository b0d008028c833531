"""SimulatedCluster: whole Raft replicas in one process, driven step by step, without trio.

    cluster = SimulatedCluster(draw_plan(17))
    cluster.run()                 # raises RaftInvariantBroken, or what the product raised

Each node is the product's own: Drive, FileLog (on a SimulatedDisk) and a KeyValue, with the calls
of `consensus.storage_work` between them, in the order of `consensus.replica`: persist, then send,
then apply. Writes, applies and snapshots take time, so a crash finds them half done. Network,
disks, clocks and clients are simulated here; what happens to them is a `Plan`.

A step is one event: a message comes, a clock ticks, a write is done, a client asks, a fault begins.
After each, the node that it happened on is checked (`raft_invariants`), and a line that says what
happened goes into the trace, whose digest is equal for equal plans. At the end the faults stop, and
all members must agree and take a new command soon.
"""

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from ollamamax_p2p.consensus import FileLog, bootstrap_log, open_file_log, storage_work
from ollamamax_p2p.consensus.core.drive import (
    Apply,
    Drive,
    Outcome,
    ReadKind,
    Write,
    merged_writes,
)
from ollamamax_p2p.consensus.core.messages import (
    ConfChangeSingle,
    ConfChangeTransition,
    ConfChangeType,
    ConfChangeV2,
    HardState,
    Message,
    MessageType,
    SnapshotMetadata,
    payload_size,
)
from ollamamax_p2p.consensus.core.sessions import (
    SEQUENCE_FORGOTTEN,
    SESSION_ENDED,
    ClientSession,
)
from ollamamax_p2p.errors import (
    BlobNotFound,
    LogSyncFailed,
    NotLeader,
    ProposalDropped,
    StoreFull,
)
from ollamamax_p2p.testing.key_value import (
    Acquire,
    Append,
    CompareAndSet,
    Get,
    KeyValue,
    Put,
    Release,
    Request,
    Result,
    decode_result,
    encode_request,
)
from ollamamax_p2p.testing.linearizability import Operation
from ollamamax_p2p.testing.raft_invariants import RaftInvariantBroken, RaftInvariants
from ollamamax_p2p.testing.raft_plan import CLIENTS, KEYS, LEADER, STALE, Action, Do, Plan
from ollamamax_p2p.testing.simulated_disk import Crashed, Loss, SimulatedDisk

NODES_MAX = 12
"""Over a run; new ones get new ids."""

ATTEMPTS_MAX = 5
"""Of a client at one operation."""

CALM_TIMEOUTS = 60
"""Election timeouts in which members must agree once the faults have stopped: a few elections, a
snapshot, and the longest wait of the log before it tries a full disk again."""

ANSWER_TIMEOUTS = 20
"""In which a new command must be answered then."""


class SimulatedReplica:
    """One node. What survives its stops is `disk` and `state`."""

    def __init__(self, raft_id: int, clock_rate: float) -> None:
        self.raft_id = raft_id
        self.clock_rate = clock_rate
        self._clock_base = (0.0, 0.0)
        self.disk = SimulatedDisk()
        self.state = KeyValue()
        self.life = 0
        """Events of an earlier one are void."""
        self.is_paused = False
        self.held: list[_Event] = []
        """What came while it was paused."""
        self.slow = (0.0, 1.0)
        """Until when, and how many times slower its disk is."""
        self.full_until = 0.0
        self.store_full_until = 0.0
        self.away_s = 0.0
        """How long it stays away if its disk dies."""
        self.drive: Drive | None = None
        self._forget()

    def _forget(self) -> None:
        """All that the process had."""
        self.log: FileLog | None = None
        self.written = HardState()
        self.waiting_commit = storage_work.WaitingCommit()
        self.to_write: list[Message] = []
        self.writes: deque[Write] = deque()
        self.to_let_go: SnapshotMetadata | None = None
        self.letting_go: SnapshotMetadata | None = None
        """What is under way is that, and no write."""
        self.is_writing = False
        self.is_written = False
        """The write that is under way has been done, and not been reported."""
        self.to_apply: list[Apply] = []
        self.applying: list[Apply] = []
        self.is_making_snapshot = False
        self.snapshot_index = 0
        self.bytes_since_snapshot = 0
        self.asked: dict[int, _Attempt] = {}

    @property
    def is_up(self) -> bool:
        """Whether its process runs."""
        return self.drive is not None

    def local_time(self, now: float) -> float:
        """Its clock."""
        since, base = self._clock_base
        return base + (now - since) * self.clock_rate

    def set_clock_rate(self, now: float, rate: float) -> None:
        """From now on."""
        self._clock_base = (now, self.local_time(now))
        self.clock_rate = rate

    def begin(self, log: FileLog, drive: Drive) -> None:
        """Its process runs."""
        self.log, self.drive = log, drive
        self.written = log.initial_state()[0]
        self.snapshot_index = storage_work.snapshot_index(log)

    def end(self) -> None:
        """Its process does not run."""
        self.drive = None
        self.life += 1
        self.is_paused = False
        self.held = []
        self._forget()


@dataclass(slots=True, eq=False)
class _Operation:
    """What a client does, until it has an answer or gives up."""

    client: "_Client"
    kind: str
    key: str
    request: Request | None
    """None: a read that is not in the log."""
    call: float
    floor: int
    """See AgreedHistory."""
    sequence: int = 0
    """0: it has no place in a session yet."""
    attempts: int = 0
    is_maybe_taken: bool = False
    is_over: bool = False


@dataclass(slots=True, eq=False)
class _Attempt:
    """An operation at one node."""

    operation: _Operation
    number: int
    request: int = 0
    """The Drive's."""
    is_opening: bool = False
    """Asks for a session."""

    @property
    def is_void(self) -> bool:
        """Nobody waits for it any more."""
        return self.operation.is_over or self.operation.attempts != self.number


class _Client:
    """One at a time; asks again elsewhere when it gets no answer."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.session: ClientSession | None = None
        self.operation: _Operation | None = None
        self.seen: dict[str, bytes | None] = {}
        """What it knows of each key: a cas expects that."""
        self.tokens: dict[str, int] = {}
        """Of leases that it got."""
        self.written = 0
        """A number of its own for each value, so that none is written twice."""


_Event = tuple[float, int, int, int, int, object]
"""When, a number that keeps the order, what, on which node, in which life of it, with what."""

_TICK, _MESSAGE, _WRITTEN, _APPLIED, _SNAPSHOT_MADE, _FETCHED = range(6)
_RESTART, _RESUME, _TIMEOUT, _RETRY, _UNREACHABLE = range(6, 11)
_EVENT_NAMES = (
    "tick",
    "message",
    "written",
    "applied",
    "snapshot",
    "fetched",
    "restart",
    "resume",
    "timeout",
    "retry",
    "unreachable",
)
_ANY_LIFE = -1
_OUTSIDE = frozenset({_RESTART, _RESUME, _TIMEOUT, _RETRY})
"""Not done by a node's process, so not held while it is paused."""


class SimulatedCluster:
    """See the head."""

    def __init__(self, plan: Plan, *, trace: Callable[[str], None] | None = None) -> None:
        self.plan = plan
        self.now = 0.0
        self.step = 0
        self.invariants = RaftInvariants(plan.settings, self._after_power_cut, self._leader_has)
        self.history: list[Operation] = []
        """What clients asked for and were told; see `linearizability`."""
        self.events: dict[str, int] = {}
        """How often what happened."""
        self._conditions = plan
        """From the calm on, others."""
        self._trace = trace
        self._digest = hashlib.blake2b(digest_size=16)
        self._dice = random.Random(f"raft run {plan.seed}")
        self._heap: list[_Event] = []
        self._count = 0
        self._nodes: dict[int, SimulatedReplica] = {}
        self._retired: set[int] = set()
        """Whose removal was proposed; their ids are used no more."""
        self._clients = [_Client(number) for number in range(CLIENTS)]
        self._cut_until: dict[tuple[int, int], float] = {}
        self._clogged_until: dict[tuple[int, int], float] = {}
        self._last_arrival: dict[tuple[int, int], float] = {}
        self._has_answered = False
        """A client was told of a write in this step."""
        self._moments: list[str] = []
        """What, of MOMENTS, the node of this step has come to."""
        self._trap: Action | None = None
        """A crash that waits for its moment."""
        self._handlers: tuple[Callable[[SimulatedReplica, object], None], ...] = (
            self._tick,
            self._deliver,
            self._done_writing,
            self._done_applying,
            self._done_snapshot,
            self._fetch,
            self._restart,
            self._resume,
            self._time_out,
            self._retry,
            self._report_unreachable,
        )
        for raft_id in range(1, plan.voters + 1):
            node = self._new_node()
            log = open_file_log(Path("unused"), plan.settings, node.disk)
            bootstrap_log(log, range(1, plan.voters + 1))
            self._open(node, log)
            assert node.raft_id == raft_id

    @property
    def _is_calm(self) -> bool:
        return self._conditions is not self.plan

    @property
    def digest(self) -> str:
        """Of everything that has happened so far."""
        return self._digest.hexdigest()

    def run(self) -> None:
        """All of the plan, then calm. Raises RaftInvariantBroken, or what the product raised.

        Whether `history` is linearizable is for whoever runs it to ask.
        """
        actions = deque(self.plan.actions)
        for step in range(self.plan.steps):
            self.step = step
            action = actions.popleft() if actions and actions[0].step <= step else None
            if action is None or self._is_idle(action):
                self._next_event()
            else:
                self._act(action)
        self._check_calm()
        for client in self._clients:
            if client.operation is not None:
                client.operation.is_maybe_taken = True
                self._end_operation(client.operation, None)

    # -- events

    def _push(self, at: float, what: int, node: SimulatedReplica, payload: object = None) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, what, node.raft_id, node.life, payload))

    def _next_event(self) -> None:
        while True:
            event = heapq.heappop(self._heap)
            at, _, what, raft_id, life, payload = event
            node = self._nodes[raft_id]
            if life not in (node.life, _ANY_LIFE) or (what == _MESSAGE and not node.is_up):
                continue
            self.now = max(self.now, at)
            if node.is_paused and what not in _OUTSIDE:
                node.held.append(event)
                continue
            if isinstance(payload, _Attempt) and payload.is_void:
                continue
            led = node.drive is not None and node.drive.leads
            self._handlers[what](node, payload)
            self._note(_EVENT_NAMES[what], node, payload)
            if self._has_answered:
                self._has_answered = False
                self._probe_after_answer()
            if not led and node.drive is not None and node.drive.leads:
                self._moments.append("elected")
                self._probe(node, writes=True)
            self._spring_trap(node, _EVENT_NAMES[what])
            return

    def _note(self, what: str, node: SimulatedReplica | None, payload: object = None) -> None:
        self.events[what] = self.events.get(what, 0) + 1
        line = f"{self.step} {self.now:.6f} {what}"
        if node is not None:
            line += f" {node.raft_id}"
            if node.drive is not None:
                raft = node.drive.raw_node.raft
                log = raft.log
                line += (
                    f" {raft.role.name} {raft.term}.{raft.vote} {log.applied}/{log.committed}/"
                    f"{log.last_index()}"
                )
        if isinstance(payload, Message):
            line += (
                f" {payload.type.name} from {payload.from_} {payload.term} {payload.log_term}."
                f"{payload.index}+{len(payload.entries)} {payload.commit} {payload.reject}"
            )
        elif isinstance(payload, Action):
            line += f" {payload}"
        self._digest.update(line.encode())
        if self._trace is not None:
            self._trace(line)

    def _after_power_cut(self, raft_id: int) -> FileLog:
        disk = self._nodes[raft_id].disk.copy()
        disk.crash(random.Random(0), Loss.EVERYTHING)
        return open_file_log(Path("unused"), self.plan.settings, disk)

    def _leader_has(self, raft_id: int, term: int, index: int) -> int:
        drive = self._nodes[raft_id].drive
        if drive is None or not drive.leads or drive.term != term:
            return 0
        return drive.raw_node.raft.log.term_or_zero(index)

    # -- a node's process

    def _new_node(self) -> SimulatedReplica:
        raft_id = len(self._nodes) + 1
        drift = self._conditions.drift
        node = SimulatedReplica(raft_id, drift[raft_id % len(drift)] if drift else 1.0)
        self._nodes[raft_id] = node
        return node

    def _open(self, node: SimulatedReplica, log: FileLog) -> None:
        drive = storage_work.open_drive(
            node.raft_id,
            log,
            node.state,
            settings=self.plan.settings,
            rng=random.Random(f"{self.plan.seed} {node.raft_id} {node.life}"),
        )
        node.begin(log, drive)
        self.invariants.begun(node.raft_id, node.life, drive, log, node.state)
        self._push(self.now + self._dice.random() * self._tick_s(node), _TICK, node)

    def _tick_s(self, node: SimulatedReplica) -> float:
        return self.plan.settings.tick_s / node.clock_rate

    def _tick(self, node: SimulatedReplica, _payload: object) -> None:
        assert node.drive is not None
        node.drive.tick(node.local_time(self.now))
        self._push(self.now + self._tick_s(node), _TICK, node)
        self._pump(node)

    def _pump(self, node: SimulatedReplica) -> None:
        """As the loop of `replica`: all the work there is."""
        drive = node.drive
        if drive is None or node.log is None:
            return
        work = drive.take_work()
        raft = drive.raw_node.raft
        for append in work.appends:
            self.invariants.handed_out(node.raft_id, raft, append)
        node.to_write += work.appends
        self._write(node)
        if node.drive is None:
            return  # its disk has died
        for message in work.sends:
            self._send(node, message)
        node.to_apply += work.applies
        self._apply(node)
        for message in work.fetches:
            self._push(self.now + self._network_s() * 2, _FETCHED, node, message)
        for outcome in drive.take_outcomes():
            self._take_outcome(node, outcome)
        self.invariants.after(node.raft_id, drive, node.log, node.state)

    # -- writing

    def _disk_s(self, node: SimulatedReplica) -> float:
        until, factor = node.slow
        seconds = self._dice.uniform(0.2, 1.8) * self._conditions.disk_s
        return seconds * factor if self.now < until else seconds

    def _write(self, node: SimulatedReplica) -> None:
        """Begin what the log is to do next, if it does nothing."""
        if node.is_writing or not (node.to_write or node.writes or node.to_let_go):
            return
        node.is_writing = True
        node.letting_go, node.to_let_go = node.to_let_go, None
        if node.letting_go is None and not node.writes:
            batch, node.to_write = node.to_write, []
            node.writes.extend(merged_writes(batch, node.written))
        self._push(self.now + self._disk_s(node), _WRITTEN, node)
        # Done at once and reported later, or done when it is reported: what may be seen of a write
        # that is under way lies between the two.
        if node.letting_go is None and self._dice.random() < 0.3:
            node.is_written = self._carry_out(node)

    def _carry_out(self, node: SimulatedReplica) -> bool:
        """The write that is next; False if there is no room. Its node ends if a sync fails."""
        assert node.log is not None
        write = node.writes[0]
        if node.waiting_commit.may_wait(write):
            return True
        self._fill_disk(node)
        self.invariants.will_write(node.raft_id, write)
        try:
            storage_work.carry_out_write(node.log, write)
        except StoreFull:
            self.invariants.did_not_write(node.raft_id, write, node.log)
            return False
        except LogSyncFailed:
            self._crash(node, self.plan.election_s * node.away_s, power=True)
            return False
        if not node.disk.has_unsynced:
            self.invariants.all_synced(node.raft_id)
        return True

    def _fill_disk(self, node: SimulatedReplica) -> None:
        is_full = self.now < node.full_until
        node.disk.fail_write_at = node.disk.writes + 1 if is_full else None

    def _done_writing(self, node: SimulatedReplica, _payload: object) -> None:
        drive, log = node.drive, node.log
        assert drive is not None
        assert log is not None
        node.is_writing = False
        if node.letting_go is not None:
            self._let_go(node, node.letting_go)
        elif node.is_written or self._carry_out(node):
            node.is_written = False
            write = node.writes.popleft()
            node.written = write.hard_state or node.written
            for message in write.messages:
                drive.appended(message)
        elif node.drive is not None:
            node.to_write = []
            node.writes.clear()
            drive.append_failed()
            self._moments.append("refused")
        self._pump(node)

    def _let_go(self, node: SimulatedReplica, metadata: SnapshotMetadata) -> None:
        assert node.log is not None
        self._fill_disk(node)
        trailing = self.plan.settings.trailing_entries
        try:
            storage_work.let_go(node.log, metadata, trailing_entries=trailing)
        except StoreFull:
            return
        except LogSyncFailed:
            self._crash(node, self.plan.election_s * node.away_s, power=True)
            return
        self.invariants.all_synced(node.raft_id)
        node.snapshot_index, node.bytes_since_snapshot = metadata.index, 0

    # -- applying

    def _apply(self, node: SimulatedReplica) -> None:
        if node.applying or node.is_making_snapshot or not node.to_apply:
            return
        node.applying, node.to_apply = node.to_apply, []
        self._push(self.now + self._disk_s(node) / 2, _APPLIED, node)

    def _commit_applies(self, node: SimulatedReplica) -> list[list[bytes | None]]:
        """The state machine's transaction, which is there as a whole or not at all."""
        batch = node.applying
        results = storage_work.carry_out_applies(node.state, batch)
        for apply, its_results in zip(batch, results, strict=True):
            self.invariants.applied(node.raft_id, apply.commands, its_results)
        self.invariants.state_is(node.raft_id, node.state)
        return results

    def _done_applying(self, node: SimulatedReplica, _payload: object) -> None:
        drive = node.drive
        assert drive is not None
        batch = node.applying
        if self.now < node.store_full_until:
            node.applying, node.to_apply = [], []
            drive.apply_failed()
        else:
            results = self._commit_applies(node)
            node.applying = []
            for apply, its_results in zip(batch, results, strict=True):
                drive.applied(apply, its_results)
                node.bytes_since_snapshot += payload_size(apply.message.entries)
            self._keep(node)
        self._pump(node)

    def _keep(self, node: SimulatedReplica) -> None:
        """As the keeper of `replica`: a snapshot when the log has grown."""
        assert node.drive is not None
        assert node.log is not None
        settings = self.plan.settings
        grown = node.drive.applied_index - node.snapshot_index
        now = node.drive.raw_node.raft.tracker.config.conf_state()
        if (
            grown >= settings.snapshot_entries
            or node.bytes_since_snapshot >= settings.snapshot_bytes
            or storage_work.snapshot_lacks_member(node.log, now)
        ):
            self._begin_snapshot(node)

    def _begin_snapshot(self, node: SimulatedReplica) -> None:
        if not node.is_making_snapshot and not node.applying:
            node.is_making_snapshot = True
            self._push(self.now + self._disk_s(node) * 2, _SNAPSHOT_MADE, node)

    def _done_snapshot(self, node: SimulatedReplica, _payload: object) -> None:
        assert node.log is not None
        node.is_making_snapshot = False
        if self.now >= node.store_full_until:
            metadata = storage_work.make_snapshot(node.log, node.state)
            if metadata is not None and metadata.index > node.snapshot_index:
                node.to_let_go = metadata
        self._pump(node)

    def _fetch(self, node: SimulatedReplica, payload: object) -> None:
        """As `replica` does: the bytes of a snapshot come, whole or not."""
        drive = node.drive
        assert drive is not None
        assert isinstance(payload, Message)
        assert payload.snapshot is not None
        metadata = payload.snapshot.metadata
        if node.state.applied_index < metadata.index:
            self._fetch_bytes(node, payload.from_, metadata)
        if node.state.applied_index >= metadata.index:
            drive.snapshot_fetched(payload)
            node.snapshot_index = max(node.snapshot_index, metadata.index)
        else:
            drive.snapshot_failed(payload)
        self._pump(node)

    def _fetch_bytes(self, node: SimulatedReplica, from_: int, metadata: SnapshotMetadata) -> None:
        source = self._nodes[from_]
        if not source.is_up or self._is_cut((from_, node.raft_id)):
            return
        if self.now < node.store_full_until:
            return
        try:
            reader = source.state.open_snapshot(metadata)
        except BlobNotFound:
            return
        writer = node.state.receive_snapshot(metadata, reader.size, reader.sha256)
        rest = reader.size - writer.received
        if not self._is_calm and self._dice.random() < 0.3:
            rest = self._dice.randint(0, rest)  # the connection ends; the next one goes on there
        writer.write(reader.read(writer.received, rest))
        if writer.received == reader.size:
            node.state.install_snapshot(metadata, reader.size, reader.sha256)
            self.invariants.installed(node.raft_id, node.state)

    # -- the network

    def _network_s(self) -> float:
        conditions = self._conditions
        if conditions.delay_tail and self._dice.random() < conditions.delay_tail:
            return self._dice.random() * self.plan.election_s
        return self._dice.uniform(0.2, 1.8) * conditions.delay_s

    def _is_cut(self, link: tuple[int, int]) -> bool:
        return self.now < self._cut_until.get(link, 0.0)

    def _send(self, node: SimulatedReplica, message: Message) -> None:
        assert node.drive is not None
        self.invariants.sent(node.raft_id, node.drive.raw_node.raft, message)
        if message.type is MessageType.VOTE_RESP and not message.reject:
            self._moments.append("voted")
        other = self._nodes.get(message.to)
        if other is None:
            return
        link = (node.raft_id, message.to)
        conditions = self._conditions
        if self._is_cut(link) or (conditions.loss and self._dice.random() < conditions.loss):
            if self._dice.random() < conditions.told_of_loss:
                self._push(self.now + self._network_s(), _UNREACHABLE, node, message.to)
            return
        arrival = max(self.now + self._network_s(), self._clogged_until.get(link, 0.0))
        if not conditions.reorders:
            arrival = max(arrival, self._last_arrival.get(link, 0.0))
            self._last_arrival[link] = arrival
        self._arrive(arrival, other, message)
        if conditions.replay and self._dice.random() < conditions.replay:
            later = self._dice.random() * conditions.replay_spread * self.plan.election_s
            self._arrive(arrival + later, other, message)

    def _arrive(self, at: float, node: SimulatedReplica, message: Message) -> None:
        # A message outlives the process it is sent to: its life is looked up when it comes.
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, _MESSAGE, node.raft_id, _ANY_LIFE, message))

    def _deliver(self, node: SimulatedReplica, payload: object) -> None:
        assert isinstance(payload, Message)
        if node.drive is not None:
            node.drive.step(payload)
            self._pump(node)

    def _report_unreachable(self, node: SimulatedReplica, payload: object) -> None:
        assert node.drive is not None
        assert isinstance(payload, int)
        node.drive.report_unreachable(payload)
        self._pump(node)

    # -- clients

    def _ask(self, action: Action) -> None:
        client = self._clients[action.other]
        node = self._find(action.node)
        kind, key = action.what.rsplit(maxsplit=1)
        request = _request(client, kind, key)
        floor = self.invariants.agreed.floor(key)
        operation = _Operation(client, kind, key, request, self.now, floor)
        client.operation = operation
        self._attempt(node, operation)

    def _attempt(self, node: SimulatedReplica, operation: _Operation) -> None:
        operation.attempts += 1
        attempt = _Attempt(operation, operation.attempts)
        patience = self._dice.uniform(0.5, 5) * self.plan.election_s
        if node.drive is None or node.is_paused:
            # Refused at once, or taken by a kernel whose process is frozen: no answer comes.
            self._push(self.now + (patience if node.is_paused else 0), _TIMEOUT, node, attempt)
            return
        session = operation.client.session
        try:
            if operation.request is None:
                kind = ReadKind.LEASE if operation.kind == "lease read" else ReadKind.SAFE
                attempt.request = node.drive.read(kind, now=node.local_time(self.now))
            elif session is None:
                attempt.is_opening = True
                attempt.request = node.drive.propose(b"")
            else:
                operation.sequence = operation.sequence or session.begin()
                data = encode_request(operation.request)
                attempt.request = node.drive.propose(
                    data, session=session.id, sequence=operation.sequence
                )
        except ProposalDropped:
            self._push(self.now + patience / 4, _RETRY, node, attempt)
            return
        node.asked[attempt.request] = attempt
        # On the client's clock, so that it comes although the node ends.
        self._count += 1
        due = self.now + patience
        heapq.heappush(self._heap, (due, self._count, _TIMEOUT, node.raft_id, _ANY_LIFE, attempt))
        self._pump(node)

    def _time_out(self, node: SimulatedReplica, payload: object) -> None:
        """No answer: the client turns to another node."""
        assert isinstance(payload, _Attempt)
        if node.asked.get(payload.request) is payload and node.drive is not None:
            del node.asked[payload.request]
            node.drive.abandon(payload.request)
        if payload.request:
            payload.operation.is_maybe_taken |= not payload.is_opening
        self._retry(node, payload)

    def _retry(self, _node: SimulatedReplica, payload: object) -> None:
        assert isinstance(payload, _Attempt)
        operation = payload.operation
        if operation.attempts >= ATTEMPTS_MAX:
            self._end_operation(operation, None)
        else:
            # In calm it turns to members only; before, also to those that were removed.
            members = self._members() if self._is_calm else []
            self._attempt(self._dice.choice(members or list(self._nodes.values())), operation)

    def _take_outcome(self, node: SimulatedReplica, outcome: Outcome) -> None:
        attempt = node.asked.pop(outcome.request, None)
        if attempt is None or attempt.is_void:
            return
        operation, client = attempt.operation, attempt.operation.client
        if outcome.error is not None:
            certain = isinstance(outcome.error, ProposalDropped | NotLeader)
            operation.is_maybe_taken |= not certain and not attempt.is_opening
            self._push_soon(node, attempt)
        elif operation.request is None:
            value = node.state.get(operation.key)
            self.invariants.agreed.read(operation.key, value, operation.floor)
            self._end_operation(operation, Result(True, value))
        elif attempt.is_opening:
            client.session = ClientSession(int.from_bytes(outcome.result, "big"))
            self._push_soon(node, attempt)
        elif outcome.result in (SESSION_ENDED, SEQUENCE_FORGOTTEN):
            client.session = None
            operation.is_maybe_taken = True
            self._end_operation(operation, None)
        else:
            assert client.session is not None
            self.invariants.agreed.answered(
                client.session.id,
                operation.sequence,
                operation.key,
                outcome.result,
                operation.floor,
            )
            self._has_answered = True
            self._end_operation(operation, decode_result(outcome.result))

    def _push_soon(self, node: SimulatedReplica, attempt: _Attempt) -> None:
        self._count += 1
        due = self.now + self._dice.random() * self.plan.election_s / 2
        heapq.heappush(self._heap, (due, self._count, _RETRY, node.raft_id, _ANY_LIFE, attempt))

    def _end_operation(self, operation: _Operation, answer: Result | None) -> None:
        client = operation.client
        operation.is_over = True
        client.operation = None
        if operation.sequence and client.session is not None:
            client.session.finish(operation.sequence)
        if answer is None and not operation.is_maybe_taken:
            return  # it has certainly not happened
        what = operation.request
        key = operation.key
        if isinstance(what, Acquire) and answer is not None and answer.ok:
            client.tokens[what.lease] = answer.token
        if answer is not None and not isinstance(what, Acquire | Release):
            client.seen[key] = answer.value
        self._remember(operation, answer)

    def _remember(self, operation: _Operation, answer: Result | None) -> None:
        key, call = operation.key, operation.request or Get(operation.key)
        match call:
            case Get() if answer is None:
                return
            case Acquire(lease) | Release(lease):
                key = lease
            case Put(lease=lease) if lease:
                # Of the value it is an ordinary write, if it was one at all.
                if answer is not None and not answer.ok:
                    return
                call = Put(key, call.value)
        returned_at = inf if answer is None else self.now
        client = operation.client.number
        self.history.append(Operation(call, answer, operation.call, returned_at, key, client))

    # -- what the plan does

    def _leader(self) -> SimulatedReplica | None:
        leading = [
            node
            for node in self._nodes.values()
            if node.drive is not None and node.drive.leads and not node.is_paused
        ]
        return max(leading, key=_term, default=None)

    def _find(self, number: int) -> SimulatedReplica:
        leader = self._leader()
        if leader is not None and number == STALE:
            others = [
                node
                for node in self._nodes.values()
                if node.drive is not None and node.drive.leads and node is not leader
            ]
            return others[0] if others else leader
        if leader is not None and number == LEADER:
            return leader
        return self._nodes[number % len(self._nodes) + 1]

    def _is_idle(self, action: Action) -> bool:
        """Whether it asks a client that still waits for an answer."""
        return action.do is Do.ASK and self._clients[action.other].operation is not None

    def _act(self, action: Action) -> None:
        node = self._find(action.node)
        span = action.span * self.plan.election_s
        match action.do:
            case Do.ASK:
                self._ask(action)
            case Do.POWER_CUT | Do.KILL if action.what:
                self._trap = action
            case Do.POWER_CUT | Do.KILL:
                self._crash(node, span, power=action.do is Do.POWER_CUT)
            case Do.STOP:
                self._stop(node, span)
            case Do.BLACKOUT:
                for each in self._nodes.values():
                    self._crash(each, span * self._dice.random(), power=True)
            case Do.PAUSE:
                if node.is_up and not node.is_paused:
                    node.is_paused = True
                    self._push(self.now + span, _RESUME, node)
            case Do.CUT_BOTH | Do.CUT_IN | Do.CUT_OUT:
                self._cut(action, span)
            case Do.CLOG:
                other = self._nodes[action.other % len(self._nodes) + 1]
                for link in ((node.raft_id, other.raft_id), (other.raft_id, node.raft_id)):
                    self._clogged_until[link] = self.now + span
            case Do.SLOW_DISK:
                node.slow = (self.now + span, action.amount)
            case Do.FULL_DISK:
                node.full_until = self.now + span
            case Do.FULL_STORE:
                node.store_full_until = self.now + span
            case Do.DYING_DISK:
                node.disk.fail_sync_at = node.disk.syncs + 1
                node.away_s = span
            case Do.TRANSFER:
                self._transfer(action)
            case Do.SNAPSHOT:
                if node.is_up and not node.is_paused:
                    self._begin_snapshot(node)
            case _:
                self._change(action)
        self._note("act", node, action)

    def _cut(self, action: Action, span: float) -> None:
        group = {number % len(self._nodes) + 1 for number in action.group}
        others = self._nodes.keys() - group
        for one in group:
            for two in sorted(others):
                if action.do is not Do.CUT_OUT:
                    self._cut_until[two, one] = self.now + span
                if action.do is not Do.CUT_IN:
                    self._cut_until[one, two] = self.now + span

    def _transfer(self, action: Action) -> None:
        leader = self._leader()
        if leader is None or leader.drive is None:
            return
        voters = sorted(leader.drive.raw_node.raft.tracker.config.voters.ids())
        leader.drive.transfer_leader(voters[action.other % len(voters)])
        self._pump(leader)

    def _spring_trap(self, node: SimulatedReplica, event: str) -> None:
        moments, self._moments = [*self._moments, event], []
        trap = self._trap
        if trap is not None and trap.what in moments and not self._is_calm:
            self._trap = None
            span = trap.span * self.plan.election_s
            self._crash(node, span, power=trap.do is Do.POWER_CUT)

    def _probe(self, node: SimulatedReplica, *, writes: bool = False) -> None:
        """Clients read each key here, now; and write it, so that others may find what they read to
        be old.
        """
        if self._is_calm or not self.plan.probes:
            return
        lease = self.plan.lease_reads and self._dice.random() < 0.7
        kinds = ["lease read" if lease else "read", *(["put"] if writes else [])]
        wanted = [f"{kind} {key}" for kind in kinds for key in range(KEYS)]
        for client in self._clients:
            if client.operation is None and wanted and not node.is_paused:
                action = Action(self.step, Do.ASK, node.raft_id - 1, client.number)
                self._ask(replace(action, what=wanted.pop()))

    def _probe_after_answer(self) -> None:
        # Not where the leases are broken: that takes all clients.
        if not self.plan.lease_reads and self._dice.random() < 0.3:
            self._probe(self._dice.choice(list(self._nodes.values())))
        leader = self._leader()
        for node in self._nodes.values():
            if node is not leader and node.drive is not None and node.drive.leads:
                self._probe(node)

    # -- stopping and coming back

    def _crash(self, node: SimulatedReplica, away_s: float, *, power: bool) -> None:
        """Wherever it is, also in the middle of a write and of a transaction."""
        if node.drive is None:
            return
        if node.applying and self._dice.random() < 0.5:
            self._commit_applies(node)
        if node.is_writing and not node.is_written and self._dice.random() < 0.7:
            self._write_partly(node)
        if power:
            node.disk.crash(self._dice, self._dice.choice(_LOSSES))
        node.disk.crash_at = None
        node.end()
        self._push(self.now + away_s, _RESTART, node)

    def _write_partly(self, node: SimulatedReplica) -> None:
        disk, log = node.disk, node.log
        assert log is not None
        disk.crash_at = disk.steps + self._dice.randint(1, 8)
        self._fill_disk(node)
        try:
            if node.letting_go is not None:
                trailing = self.plan.settings.trailing_entries
                storage_work.let_go(log, node.letting_go, trailing_entries=trailing)
            elif node.writes and not node.waiting_commit.may_wait(node.writes[0]):
                self.invariants.will_write(node.raft_id, node.writes[0])
                storage_work.carry_out_write(log, node.writes[0])
        except (Crashed, StoreFull, LogSyncFailed):
            pass  # whichever of it happened, it ends here

    def _stop(self, node: SimulatedReplica, away_s: float) -> None:
        """In good order; what was not written is lost with it."""
        if node.log is None:
            return
        self._fill_disk(node)
        node.log.close()
        if not node.disk.has_unsynced:
            self.invariants.all_synced(node.raft_id)
        node.end()
        self._push(self.now + away_s, _RESTART, node)

    def _restart(self, node: SimulatedReplica, _payload: object) -> None:
        self._fill_disk(node)
        if not self._is_calm and self._dice.random() < 0.1:
            node.disk.crash_at = node.disk.steps + self._dice.randint(1, 6)
        try:
            log = open_file_log(Path("unused"), self.plan.settings, node.disk)
            node.disk.crash_at = None
            self.invariants.opened_again(node.raft_id, log)
            self._open(node, log)
        except (Crashed, LogSyncFailed):
            node.disk.crash(self._dice, self._dice.choice(_LOSSES))
        except StoreFull:
            pass
        else:
            return
        node.drive = None
        self._push(self.now + self.plan.election_s / 2, _RESTART, node)

    def _resume(self, node: SimulatedReplica, _payload: object) -> None:
        """It finds at once what came while it was frozen; ticks that were missed are one."""
        node.is_paused = False
        held, node.held = node.held, []
        if node.drive is not None and node.drive.leads:
            self._probe(node)
        ticked = False
        for at, number, what, raft_id, life, payload in held:
            if what == _TICK:
                if ticked:
                    continue
                ticked = True
            heapq.heappush(self._heap, (max(at, self.now), number, what, raft_id, life, payload))

    # -- changes of the configuration

    def _change(self, action: Action) -> None:
        leader = self._leader()
        if leader is None or leader.drive is None:
            return
        change = self._chosen_change(action, leader.drive)
        if change is None:
            return
        try:
            leader.drive.propose_conf_change(change)
        except (ProposalDropped, NotLeader):
            return
        self._pump(leader)

    def _chosen_change(self, action: Action, drive: Drive) -> ConfChangeV2 | None:
        config = drive.raw_node.raft.tracker.config
        voters, learners = sorted(config.voters.incoming), sorted(config.learners)
        members = drive.raw_node.raft.tracker.progress
        voter = voters[action.other % len(voters)]
        match action.do:
            case Do.ADD_LEARNER:
                return self._adds(ConfChangeType.ADD_LEARNER_NODE, members)
            case Do.PROMOTE if learners and len(voters) < 7:
                learner = learners[action.other % len(learners)]
                return _change_of((ConfChangeType.ADD_NODE, learner))
            case Do.DEMOTE if len(voters) > 3:
                return _change_of((ConfChangeType.ADD_LEARNER_NODE, voter))
            case Do.REMOVE if len(voters) > 3 or learners:
                leaves = learners[0] if len(voters) <= 3 else voter
                self._retired.add(leaves)
                return _change_of((ConfChangeType.REMOVE_NODE, leaves))
            case Do.REPLACE:
                added = self._adds(ConfChangeType.ADD_NODE, members)
                if added is None:
                    return None
                self._retired.add(voter)
                leaving = ConfChangeSingle(ConfChangeType.REMOVE_NODE, voter)
                return ConfChangeV2(changes=(*added.changes, leaving))
            case Do.RESHAPE if learners or len(voters) > 3:
                return self._reshapes(action, voters, learners)
            case Do.LEAVE_JOINT if config.voters.is_joint and not config.auto_leave:
                return ConfChangeV2()
        return None

    def _adds(self, kind: ConfChangeType, members: Iterable[int]) -> ConfChangeV2 | None:
        """A node that is new, or was started for a change that came to nothing."""
        for raft_id in self._nodes:
            if raft_id > self.plan.voters and raft_id not in {*members, *self._retired}:
                return _change_of((kind, raft_id))
        if len(self._nodes) >= NODES_MAX:
            return None
        node = self._new_node()
        self._open(node, open_file_log(Path("unused"), self.plan.settings, node.disk))
        return _change_of((kind, node.raft_id))

    def _reshapes(
        self, action: Action, voters: list[int], learners: list[int]
    ) -> ConfChangeV2 | None:
        """Two members at once, so that both halves of a joint configuration matter."""
        transition = (
            ConfChangeTransition.AUTO,
            ConfChangeTransition.JOINT_IMPLICIT,
            ConfChangeTransition.JOINT_EXPLICIT,
        )[action.other % 3]
        changes: list[tuple[ConfChangeType, int]] = []
        if learners:
            changes.append((ConfChangeType.ADD_NODE, learners[action.other % len(learners)]))
        voter = voters[action.other % len(voters)]
        if len(voters) + len(changes) > 3:
            if action.amount > 3:
                changes.append((ConfChangeType.ADD_LEARNER_NODE, voter))
            else:
                self._retired.add(voter)
                changes.append((ConfChangeType.REMOVE_NODE, voter))
        return _change_of(*changes, transition=transition)

    # -- calm

    def _check_calm(self) -> None:
        """The faults stop: soon one leads, all members agree, and a new command is answered."""
        self._conditions = replace(
            self.plan, loss=0.0, replay=0.0, delay_s=0.002, delay_tail=0.0, disk_s=0.001
        )
        self._cut_until.clear()
        self._clogged_until.clear()
        for node in self._nodes.values():
            node.slow, node.full_until, node.store_full_until = (0.0, 1.0), 0.0, 0.0
            node.disk.fail_sync_at = None
            node.set_clock_rate(self.now, 1.0)
            if node.is_paused:
                self._resume(node, None)
        self._note("calm", None)
        if not self._run_until(self._is_agreed, CALM_TIMEOUTS):
            raise RaftInvariantBroken(14, f"no agreement in calm: {self._describe()}")
        client = _Client(CLIENTS)
        operation = _Operation(client, "put", "calm", Put("calm", b"calm"), self.now, 0)
        self._attempt(self._members()[-1], operation)
        if not self._run_until(lambda: operation.is_over, ANSWER_TIMEOUTS):
            raise RaftInvariantBroken(14, f"a write in calm is not answered: {self._describe()}")
        if self.invariants.agreed.floor("calm") == 0:
            raise RaftInvariantBroken(14, f"a write in calm fails: {self._describe()}")
        if not self._run_until(self._is_agreed, CALM_TIMEOUTS):
            raise RaftInvariantBroken(14, f"no agreement after a write: {self._describe()}")

    def _run_until(self, done: Callable[[], bool], timeouts: float) -> bool:
        deadline = self.now + timeouts * self.plan.election_s
        next_look = self.now
        while self.now < deadline:
            self.step += 1
            self._next_event()
            if self.now >= next_look:
                if done():
                    return True
                self._leave_joint()
                next_look = self.now + self.plan.election_s / 2
        return False

    def _leave_joint(self) -> None:
        """What whoever entered it explicitly would do."""
        leader = self._leader()
        if leader is None or leader.drive is None:
            return
        config = leader.drive.raw_node.raft.tracker.config
        if config.voters.is_joint and not config.auto_leave:
            self._change(Action(self.step, Do.LEAVE_JOINT))

    def _members(self) -> list[SimulatedReplica]:
        leader = self._leader()
        if leader is None or leader.drive is None:
            return []
        members = leader.drive.raw_node.raft.tracker.progress
        return [self._nodes[raft_id] for raft_id in sorted(members)]

    def _is_agreed(self) -> bool:
        leader = self._leader()
        if leader is None or leader.drive is None:
            return False
        config = leader.drive.raw_node.raft.tracker.config
        if config.voters.is_joint:
            return False
        term, last = leader.drive.term, leader.drive.raw_node.raft.log.last_index()
        for node in self._members():
            drive = node.drive
            if drive is None or drive.term != term or drive.leader != leader.raft_id:
                return False
            log = drive.raw_node.raft.log
            if not log.applied == log.committed == log.last_index() == last:
                return False
            # Equal states at equal indexes is checked whenever something is applied.
            if node.state.applied_index != last:
                return False
        return last >= self.invariants.last_committed

    def _describe(self) -> str:
        found = []
        for node in self._nodes.values():
            if node.drive is None:
                found.append(f"{node.raft_id} down")
                continue
            raft = node.drive.raw_node.raft
            log = raft.log
            found.append(
                f"{node.raft_id} {raft.role.name} term {raft.term} of {raft.leader} in "
                f"{raft.tracker.config}, {log.applied}/{log.committed}/{log.last_index()}"
            )
        return "; ".join(found)


_LOSSES = (Loss.ANY, Loss.ANY, Loss.TORN, Loss.REORDERED, Loss.EVERYTHING, Loss.NOTHING)


def _term(node: SimulatedReplica) -> int:
    return node.drive.term if node.drive is not None else 0


def _change_of(
    *changes: tuple[ConfChangeType, int],
    transition: ConfChangeTransition = ConfChangeTransition.AUTO,
) -> ConfChangeV2:
    singles = tuple(ConfChangeSingle(kind, raft_id) for kind, raft_id in changes)
    return ConfChangeV2(transition=transition, changes=singles)


def _request(client: _Client, kind: str, key: str) -> Request | None:
    """What a client proposes; None: it reads without the log."""
    client.written += 1
    value = f"{client.number}.{client.written};".encode()
    lease = f"lease {key}"
    match kind:
        case "put":
            return Put(key, value)
        case "cas":
            return CompareAndSet(key, client.seen.get(key), value)
        case "append":
            return Append(key, value)
        case "get":
            return Get(key)
        case "acquire":
            return Acquire(lease, f"client {client.number}.{client.written}")
        case "fenced":
            return Put(key, value, lease, client.tokens.get(lease, 0) or 1)
        case "free":
            return Release(lease, client.tokens.get(lease, 0))
    return None

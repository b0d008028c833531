"""Whole nodes driven by a transcript's commands; what they print is compared with the transcript.

The nodes run the real core on RamLog. Their state machine appends: its snapshot is all data so far.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ollamamax_p2p.consensus.core.config_change import as_v2, decode_conf_change
from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    LOCAL_APPLY_THREAD,
    NO_LIMIT,
    ConfChange,
    ConfChangeSingle,
    ConfChangeTransition,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
)
from ollamamax_p2p.consensus.core.names import MESSAGE_NAMES, ROLE_NAMES
from ollamamax_p2p.consensus.core.progress import describe_progress
from ollamamax_p2p.consensus.core.raft import RaftConfig, StepRefused
from ollamamax_p2p.consensus.core.raw_node import RawNode, hard_state_of
from ollamamax_p2p.consensus.core.read_only import ReadOnlyOption
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.errors import ProposalDropped
from tests.consensus.describe import entries_text, message_text, ready_text
from tests.consensus.transcript_format import Argument, Directive, parse_line

LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "FATAL", "NONE")
NONE = LEVELS.index("NONE")
LOCAL = (LOCAL_APPEND_THREAD, LOCAL_APPLY_THREAD)
ELECTION_TICKS, HEARTBEAT_TICKS = 3, 1
SWITCHES = {
    **dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True),
    **dict.fromkeys(("0", "f", "F", "false", "FALSE", "False"), False),
}
READ_ONLY = {"safe": ReadOnlyOption.SAFE, "lease-based": ReadOnlyOption.LEASE_BASED}
CHANGES = {
    "v": ConfChangeType.ADD_NODE,
    "l": ConfChangeType.ADD_LEARNER_NODE,
    "r": ConfChangeType.REMOVE_NODE,
    "u": ConfChangeType.UPDATE_NODE,
}
TRANSITIONS = {
    "auto": ConfChangeTransition.AUTO,
    "implicit": ConfChangeTransition.JOINT_IMPLICIT,
    "explicit": ConfChangeTransition.JOINT_EXPLICIT,
}


class CommandFailed(Exception):
    """A command ends with this text."""


def switch(text: str) -> bool:
    """A truth value, in the spellings that Go's ParseBool knows."""
    if text not in SWITCHES:
        raise CommandFailed(f'strconv.ParseBool: parsing "{text}": invalid syntax')
    return SWITCHES[text]


def read_only(text: str) -> ReadOnlyOption:
    if text not in READ_ONLY:
        raise CommandFailed(f'invalid read-only option "{text}"')
    return READ_ONLY[text]


OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "async-storage-writes": ("async_storage_writes", switch),
    "prevote": ("pre_vote", switch),
    "checkquorum": ("check_quorum", switch),
    "inflight": ("max_inflight_msgs", int),
    "max-committed-size-per-ready": ("max_committed_size_per_ready", int),
    "disable-conf-change-validation": ("disable_conf_change_validation", switch),
    "step-down-on-removal": ("step_down_on_removal", switch),
    "read-only": ("read_only_option", read_only),
}


class Output:
    """What is printed; also the core's logger."""

    def __init__(self) -> None:
        self.level = 0
        self._lines: list[str] = []

    @property
    def quiet(self) -> bool:
        """At level NONE nothing is printed, by nobody."""
        return self.level == NONE

    def write(self, text: str) -> None:
        if not self.quiet:
            self._lines.append(text)

    def take(self) -> str:
        text, self._lines = "".join(self._lines), []
        return text

    @contextmanager
    def indented(self) -> Iterator[None]:
        outer, self._lines = self._lines, []
        try:
            yield
        finally:
            inner = self.take()
            lines = inner.removesuffix("\n").split("\n") if inner else []
            self._lines = [*outer, *(f"  {line}\n" for line in lines)]

    def _log(self, level: int, line: str) -> None:
        if self.level <= level:
            self.write(f"{LEVELS[level]} {line}\n")

    def debug(self, line: str) -> None:
        self._log(0, line)

    def info(self, line: str) -> None:
        self._log(1, line)

    def warning(self, line: str) -> None:
        self._log(2, line)

    def error(self, line: str) -> None:
        self._log(3, line)


class Storage(RamLog):
    """A RamLog that always has a snapshot of what is applied.

    As in the original, one that came from elsewhere does not count as applied.
    """

    history: list[Snapshot]

    def snapshot(self) -> Snapshot:
        return self.history[-1]

    def compact(self, index: int) -> None:
        """Whether a snapshot covers it or not."""
        hard_state, _ = self.initial_state()
        following = self.entries(index + 1, self.last_index() + 1, NO_LIMIT)
        self.restore((self.term(index), index), following, hard_state, self.newest_snapshot())


@dataclass
class Node:
    raw: RawNode
    storage: Storage
    asynchronous: bool
    append_work: list[Message] = field(default_factory=list)
    apply_work: list[Message] = field(default_factory=list)


def parse_changes(text: str) -> tuple[ConfChangeSingle, ...]:
    """`v1 l2 r3`."""
    return tuple(parse_change(word) for word in text.split())


def parse_change(word: str) -> ConfChangeSingle:
    if len(word) < 2:
        raise CommandFailed(f"unknown token {word}")
    if word[0] not in CHANGES:
        raise CommandFailed(f"unknown input: {word}")
    if not word[1:].isdecimal():
        raise CommandFailed(f'strconv.ParseUint: parsing "{word[1:]}": invalid syntax')
    return ConfChangeSingle(CHANGES[word[0]], int(word[1:]))


class Interaction:
    """The nodes of one script."""

    def __init__(self) -> None:
        self.output = Output()
        self.nodes: list[Node] = []
        self.messages: list[Message] = []
        self.commands: dict[str, Callable[[list[Argument]], None]] = {
            "_breakpoint": lambda _: None,
            "add-nodes": self.add_nodes,
            "campaign": lambda given: self.node(given).raw.campaign(),
            "compact": self.compact,
            "deliver-msgs": self.deliver_command,
            "forget-leader": lambda given: self.node(given).raw.forget_leader(),
            "log-level": lambda given: self.set_level(given[0].key),
            "process-append-thread": lambda given: self.for_each(
                given, "processing append thread", self.process_append
            ),
            "process-apply-thread": lambda given: self.for_each(
                given, "processing apply thread", self.process_apply
            ),
            "process-ready": lambda given: self.for_each(
                given, "handling Ready", self.process_ready
            ),
            "propose": self.propose,
            "raft-log": lambda given: self.show_log(self.node(given)),
            "raft-state": lambda _: self.show_states(),
            "report-unreachable": self.report_unreachable,
            "send-snapshot": self.send_snapshot,
            "set-randomized-election-timeout": self.set_election_timeout,
            "stabilize": self.stabilize_command,
            "status": lambda given: self.output.write(
                describe_progress(self.node(given).raw.status().progress.items())
            ),
            "tick-election": lambda given: self.tick(given, ELECTION_TICKS),
            "tick-heartbeat": lambda given: self.tick(given, HEARTBEAT_TICKS),
            "transfer-leadership": self.transfer,
        }

    def run(self, directive: Directive) -> str:
        """What the directive prints."""
        try:
            if directive.command == "propose-conf-change":
                self.propose_conf_change(directive)
            else:
                self.run_lines(directive)
        except CommandFailed as error:
            if self.output.quiet:
                return str(error)
            self.output.write(str(error))
        return self.output.take() or "ok"

    def run_lines(self, directive: Directive) -> None:
        self.single(directive.command, directive.arguments)
        for line in filter(None, directive.input.splitlines()):
            try:
                self.single(*parse_line(line))
            except CommandFailed as error:
                if self.output.quiet:
                    raise
                self.output.write(str(error))

    def single(self, command: str, given: list[Argument]) -> None:
        if command not in self.commands:
            raise CommandFailed("unknown command")
        try:
            self.commands[command](given)
        except ProposalDropped as error:
            raise CommandFailed("raft proposal dropped") from error
        except StepRefused as error:
            raise CommandFailed(str(error)) from error

    # -- nodes

    def node(self, given: list[Argument]) -> Node:
        return self.nodes[int(given[0].key) - 1]

    def add_nodes(self, given: list[Argument]) -> None:
        options: dict[str, Any] = {}
        ids: dict[str, tuple[int, ...]] = {"voters": (), "learners": ()}
        index, content = 0, b""
        for each in given[1:]:
            if each.key in ids:
                ids[each.key] = tuple(map(int, each.values))
            elif each.key == "index":
                index = options["applied"] = int(each.values[0])
            elif each.key == "content":
                content = each.values[0].encode()
            elif each.key in OPTIONS:
                name, read = OPTIONS[each.key]
                options[name] = read(each.values[-1])
        state = ConfState(voters=ids["voters"], learners=ids["learners"])
        snapshot = Snapshot(SnapshotMetadata(index, 0, state), content)
        if snapshot != Snapshot():
            if index <= 1:
                raise CommandFailed("index must be specified as > 1 due to bootstrap")
            snapshot = Snapshot(SnapshotMetadata(index, 1, state), content)
        for _ in range(int(given[0].key)):
            self.add_node(snapshot, options)

    def add_node(self, snapshot: Snapshot, options: dict[str, Any]) -> None:
        storage = Storage()
        storage.history = [snapshot]
        if snapshot.metadata.index:
            storage.install_snapshot(snapshot)
        number = len(self.nodes) + 1
        try:
            config = RaftConfig(
                id=number,
                election_tick=ELECTION_TICKS,
                heartbeat_tick=HEARTBEAT_TICKS,
                storage=storage,
                max_size_per_msg=NO_LIMIT,
                rng=random.Random(number),
                logger=self.output,
                lead_before_own_vote=True,
                **{"max_inflight_msgs": 2**31 - 1, **options},
            )
        except ValueError as error:
            raise CommandFailed(str(error)) from error
        self.nodes.append(Node(RawNode(config), storage, config.async_storage_writes))

    def tick(self, given: list[Argument], count: int) -> None:
        for _ in range(count):
            self.node(given).raw.tick()

    def set_election_timeout(self, given: list[Argument]) -> None:
        named = {each.key: each.values for each in given[1:]}
        self.node(given).raw.raft.randomized_election_timeout = int(named["timeout"][0])

    def set_level(self, name: str) -> None:
        if name.upper() not in LEVELS:
            raise CommandFailed(f"log levels must be either of [{' '.join(LEVELS)}]")
        self.output.level = LEVELS.index(name.upper())

    # -- proposing

    def propose(self, given: list[Argument]) -> None:
        self.node(given).raw.propose(given[1].key.encode())

    def propose_conf_change(self, directive: Directive) -> None:
        old_form, transition = False, ConfChangeTransition.AUTO
        for key, values in directive.named.items():
            if key == "v1":
                old_form = switch(values[-1])
            elif key != "transition":
                raise CommandFailed(f"unknown command {key}")
            elif values[-1] in TRANSITIONS:
                transition = TRANSITIONS[values[-1]]
            else:
                raise CommandFailed(f"unknown transition {values[-1]}")
        changes = parse_changes(directive.input)
        change: ConfChange | ConfChangeV2 = ConfChangeV2(transition, changes)
        if old_form:
            if len(changes) > 1 or transition is not ConfChangeTransition.AUTO:
                raise CommandFailed("v1 conf change can only have one operation and no transition")
            change = ConfChange(changes[0].type, changes[0].node_id)
        try:
            self.node(directive.arguments).raw.propose_conf_change(change)
        except ProposalDropped as error:
            raise CommandFailed("raft proposal dropped") from error

    def report_unreachable(self, given: list[Argument]) -> None:
        numbers = [int(each.key) for each in given if not each.values]
        if len(numbers) != 2:
            raise CommandFailed(
                "must specify exactly two node indexes: node on which to report, and reported node"
            )
        self.nodes[numbers[0] - 1].raw.report_unreachable(numbers[1])

    def transfer(self, given: list[Argument]) -> None:
        named = {each.key: int(each.values[0]) for each in given}
        self.nodes[named["from"] - 1].raw.transfer_leader(named["to"])

    # -- working

    def for_each(self, given: list[Argument], what: str, work: Callable[[int], None]) -> None:
        numbers = [int(each.key) for each in given if not each.values]
        for number in numbers:
            if len(numbers) > 1:
                self.output.write(f"> {number} {what}\n")
                with self.output.indented():
                    work(number)
            else:
                work(number)

    def process_ready(self, number: int) -> None:
        node = self.nodes[number - 1]
        ready = node.raw.ready()
        self.output.write(ready_text(ready))
        if not node.asynchronous:
            self.append(node, ready.hard_state, ready.entries, ready.snapshot)
            self.apply(node, ready.committed_entries)
        for message in ready.messages:
            if message.type is MessageType.STORAGE_APPEND:
                node.append_work.append(message)
            elif message.type is MessageType.STORAGE_APPLY:
                node.apply_work.append(message)
            else:
                self.messages.append(message)
        if not node.asynchronous:
            node.raw.advance()

    def process_append(self, number: int) -> None:
        node = self.nodes[number - 1]
        if not node.append_work:
            self.output.write("no append work to perform")
            return
        message = node.append_work.pop(0)
        self.show_work(message)
        self.append(node, hard_state_of(message), list(message.entries), message.snapshot)
        self.respond(message)

    def process_apply(self, number: int) -> None:
        node = self.nodes[number - 1]
        if not node.apply_work:
            self.output.write("no apply work to perform")
            return
        message = node.apply_work.pop(0)
        self.show_work(message)
        self.apply(node, list(message.entries))
        self.respond(message)

    def show_work(self, message: Message) -> None:
        plain = msgspec.structs.replace(message, responses=())
        self.output.write(f"Processing:\n{message_text(plain)}\n")

    def respond(self, message: Message) -> None:
        self.output.write("Responses:\n")
        for response in message.responses:
            self.output.write(message_text(response) + "\n")
        self.messages.extend(message.responses)

    def append(
        self,
        node: Node,
        hard_state: HardState | None,
        entries: list[Entry],
        snapshot: Snapshot | None,
    ) -> None:
        if snapshot is not None:
            if entries:
                raise CommandFailed("can't apply snapshot and entries at the same time")
            node.storage.install_snapshot(snapshot, hard_state)
        else:
            node.storage.append(entries, hard_state)

    def apply(self, node: Node, entries: list[Entry]) -> None:
        for entry in entries:
            last = node.storage.history[-1]
            state, update = last.metadata.conf_state, entry.data
            if entry.type is not EntryType.NORMAL:
                change = decode_conf_change(entry)
                state = node.raw.apply_conf_change(change)
                update = as_v2(change).context
            metadata = SnapshotMetadata(entry.index, entry.term, state)
            node.storage.history.append(Snapshot(metadata, last.data + update))

    # -- delivering

    def deliver_command(self, given: list[Argument]) -> None:
        kind: MessageType | None = None
        receivers: list[tuple[int, bool]] = []
        for each in given:
            if not each.values:
                receivers.append((int(each.key), False))
            elif each.key == "drop":
                receivers += [(int(value), True) for value in each.values]
            elif each.key == "type":
                names = {name: kind for kind, name in MESSAGE_NAMES.items()}
                kind = names[each.values[0]]
        if not sum([self.deliver(number, drop, kind) for number, drop in receivers]):
            self.output.write("no messages\n")

    def take_messages(self, number: int, drop: bool, kind: MessageType | None) -> list[Message]:
        taken, left = [], []
        for message in self.messages:
            local = message.from_ == message.to or message.from_ in LOCAL or message.to in LOCAL
            wanted = message.to == number and kind in (None, message.type)
            (taken if wanted and not (drop and local) else left).append(message)
        self.messages = left
        return taken

    def deliver(self, number: int, drop: bool, kind: MessageType | None = None) -> int:
        taken = self.take_messages(number, drop, kind)
        for message in taken:
            self.output.write(("dropped: " if drop else "") + message_text(message) + "\n")
            if drop:
                continue
            try:
                self.nodes[number - 1].raw.step(message)
            except ProposalDropped:
                self.output.write("raft proposal dropped\n")
            except StepRefused as error:
                self.output.write(f"{error}\n")
        return len(taken)

    def stabilize_command(self, given: list[Argument]) -> None:
        level = self.output.level
        for each in given:
            if each.key == "log-level":
                self.set_level(each.values[0])
        numbers = [int(each.key) for each in given if not each.values]
        try:
            self.stabilize(numbers or list(range(1, len(self.nodes) + 1)))
        finally:
            self.output.level = level

    def stabilize(self, numbers: list[int]) -> None:
        while self.stabilize_once(numbers):
            pass

    def stabilize_once(self, numbers: list[int]) -> bool:
        busy = False
        for number in numbers:
            if self.nodes[number - 1].raw.has_ready():
                busy = True
                self.output.write(f"> {number} handling Ready\n")
                with self.output.indented():
                    self.process_ready(number)
        for number in numbers:
            if any(message.to == number for message in self.messages):
                busy = True
                self.output.write(f"> {number} receiving messages\n")
                with self.output.indented():
                    self.deliver(number, drop=False)
        for number in numbers:
            node = self.nodes[number - 1]
            if node.append_work:
                busy = True
                self.output.write(f"> {number} processing append thread\n")
                while node.append_work:
                    with self.output.indented():
                        self.process_append(number)
        for number in numbers:
            node = self.nodes[number - 1]
            if node.apply_work:
                busy = True
                self.output.write(f"> {number} processing apply thread\n")
                while node.apply_work:
                    with self.output.indented():
                        self.process_apply(number)
        return busy

    def send_snapshot(self, given: list[Argument]) -> None:
        sender, to = int(given[0].key), int(given[1].key)
        node = self.nodes[sender - 1]
        message = Message(
            type=MessageType.SNAP,
            to=to,
            from_=sender,
            term=node.raw.raft.term,
            snapshot=node.storage.snapshot(),
        )
        self.messages.append(message)
        self.output.write(message_text(message))

    # -- looking

    def compact(self, given: list[Argument]) -> None:
        node, index = self.node(given), int(given[1].key)
        if index < node.storage.first_index():
            raise CommandFailed("requested index is unavailable due to compaction")
        node.storage.compact(index)
        self.show_log(node)

    def show_log(self, node: Node) -> None:
        first, last = node.storage.first_index(), node.storage.last_index()
        if last < first:
            self.output.write(f"log is empty: first index={first}, last index={last}")
            return
        self.output.write(entries_text(node.storage.entries(first, last + 1, NO_LIMIT)))

    def show_states(self) -> None:
        for node in self.nodes:
            raft = node.raw.raft
            voter = "Voter" if raft.id in raft.tracker.voters.ids() else "Non-Voter"
            self.output.write(
                f"{raft.id}: {ROLE_NAMES[raft.role]} ({voter}) Term:{raft.term} "
                f"Lead:{raft.leader}\n"
            )

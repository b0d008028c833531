"""A few nodes of the core in one process: logs in memory, messages in a list, no clock."""

import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ollamamax_p2p.consensus.core.config_change import ConfChangeRefused, decode_conf_change
from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    LOCAL_APPLY_THREAD,
    ConfState,
    Entry,
    EntryType,
    HardState,
    Message,
    MessageType,
    ReadState,
    Snapshot,
    SnapshotMetadata,
    StateRole,
)
from ollamamax_p2p.consensus.core.raw_node import RaftConfig, RawNode, Ready, hard_state_of
from ollamamax_p2p.consensus.core.step_errors import UnknownPeerRefused
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.errors import ProposalDropped

ELECTION_TICKS = 10


class Lines:
    """A Logger that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def debug(self, line: str) -> None:
        self.lines.append(line)

    info = warning = error = debug

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


class LogWithConfiguration(RamLog):
    """A RamLog that remembers the configuration of what is applied, as a driver's does."""

    conf_state: ConfState | None = None

    def initial_state(self) -> tuple[HardState, ConfState]:
        hard_state, of_snapshot = super().initial_state()
        return hard_state, self.conf_state or of_snapshot


class Member:
    """One node, its log, and what it applied."""

    def __init__(self, number: int, state: ConfState, **settings: Any) -> None:
        self.log = LogWithConfiguration()
        self.log.install_snapshot(
            Snapshot(SnapshotMetadata(1, 1, state)), HardState(term=1, commit=1)
        )
        self.said = Lines()
        self.settings = {
            "id": number,
            "storage": self.log,
            "rng": random.Random(number),
            "logger": self.said,
            "election_tick": ELECTION_TICKS,
            "async_storage_writes": True,
            **settings,
        }
        self.applied: list[Entry] = []
        self.reads: list[ReadState] = []
        self.stalled: list[Message] | None = None
        """While the disk stalls: what it was asked for."""
        self.raw = RawNode(RaftConfig(applied=1, **self.settings))

    def restart(self) -> None:
        """With what is durable."""
        self.log.conf_state = self.raw.raft.tracker.config.conf_state()
        applied = max([1, *(entry.index for entry in self.applied)])
        self.raw = RawNode(RaftConfig(applied=applied, **self.settings))

    @property
    def role(self) -> StateRole:
        return self.raw.raft.role

    @property
    def term(self) -> int:
        return self.raw.raft.term

    def commands(self) -> list[bytes]:
        return [each.data for each in self.applied if each.type is EntryType.NORMAL and each.data]

    def apply(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.applied.append(entry)
            if entry.type is not EntryType.NORMAL:
                with suppress(ConfChangeRefused):  # On all nodes alike.
                    self.raw.apply_conf_change(decode_conf_change(entry))


class Cluster:
    """Nodes 1 to `voters`, then the learners."""

    def __init__(self, voters: int = 3, learners: int = 0, **settings: Any) -> None:
        self.state = ConfState(
            voters=tuple(range(1, voters + 1)),
            learners=tuple(range(voters + 1, voters + learners + 1)),
        )
        self.settings = settings
        self.members = {
            number: Member(number, self.state, **settings)
            for number in range(1, voters + learners + 1)
        }
        self.messages: list[Message] = []
        self.lost: Callable[[Message], bool] = lambda _: False
        self.sent: list[Message] = []

    def __getitem__(self, number: int) -> Member:
        return self.members[number]

    def elect(self, number: int) -> Member:
        self[number].raw.campaign()
        self.settle()
        assert self[number].role is StateRole.LEADER
        return self[number]

    def tick(self, count: int = 1, *, only: Iterable[int] | None = None) -> None:
        for _ in range(count):
            for number in only or self.members:
                self[number].raw.tick()
            self.settle()

    def settle(self) -> None:
        """Until nobody has anything to do."""
        while self.take_ready() or self.messages:
            waiting, self.messages = self.messages, []
            for message in waiting:
                self.deliver(message)

    def take_ready(self) -> bool:
        busy = False
        for member in self.members.values():
            if member.raw.has_ready():
                busy = True
                self.handle(member, member.raw.ready())
        return busy

    def handle(self, member: Member, ready: Ready) -> None:
        member.reads += ready.read_states
        if member.settings["async_storage_writes"]:
            self.messages += ready.messages
            return
        if ready.snapshot:
            member.log.install_snapshot(ready.snapshot)
        member.log.append(ready.entries, ready.hard_state)
        self.messages += ready.messages
        member.apply(ready.committed_entries)
        member.raw.advance()

    def deliver(self, message: Message) -> None:
        if message.to == LOCAL_APPEND_THREAD:
            self.write(self[message.from_], message)
        elif message.to == LOCAL_APPLY_THREAD:
            self[message.from_].apply(message.entries)
            self.messages += message.responses
        elif message.to in self.members and not self.lost(message):
            self.sent.append(message)
            self.step(message)

    def write(self, member: Member, message: Message) -> None:
        if member.stalled is not None:
            member.stalled.append(message)
            return
        if message.snapshot:
            member.log.install_snapshot(message.snapshot)
        member.log.append(message.entries, hard_state_of(message))
        self.messages += message.responses

    def disk_answers(self, member: Member) -> None:
        waiting, member.stalled = member.stalled or [], None
        for message in waiting:
            self.write(member, message)

    def step(self, message: Message) -> None:
        with suppress(ProposalDropped, UnknownPeerRefused):
            self[message.to].raw.step(message)

    def cut(self, *numbers: int) -> None:
        """These hear nothing and are not heard."""
        self.lost = lambda message: (
            message.from_ != message.to
            and message.from_ in self.members
            and (message.from_ in numbers or message.to in numbers)
        )

    def heal(self) -> None:
        self.lost = lambda _: False

    def kinds(self) -> list[MessageType]:
        return [message.type for message in self.sent]

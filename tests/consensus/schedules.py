"""Random schedules for a few nodes, and what they come to on our core.

A schedule is lines of text, so that another implementation of Raft can play the same. What is told
to whom, and when a node is cut off, is the schedule's; the messages in between are each
implementation's own, all of them delivered before the next step. So two of them need not send the
same messages, but must come to the same commits.
"""

import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ollamamax_p2p.consensus.core.config_change import ConfChangeRefused, as_v2, decode_conf_change
from ollamamax_p2p.consensus.core.messages import (
    NO_LIMIT,
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
from ollamamax_p2p.consensus.core.messages import (
    ConfChangeTransition as Transition,
)
from ollamamax_p2p.consensus.core.names import ROLE_NAMES
from ollamamax_p2p.consensus.core.raw_node import RaftConfig, RawNode
from ollamamax_p2p.consensus.core.step_errors import UnknownPeerRefused
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.errors import ProposalDropped
from tests.consensus.describe import changes_text
from tests.consensus.interaction import parse_changes

BEGUN = 10
"""The index of the snapshot that every member begins with."""


def schedule(seed: int, *, steps: int = 40) -> list[str]:
    """The lines of one schedule."""
    rng = random.Random(seed)
    voters = rng.choice((1, 3, 3, 3, 5))
    count = voters + 2
    nodes = range(1, count + 1)
    # Two rounds of heartbeats, so that what one implementation tells at once and the other with
    # the next heartbeat is told by both.
    beats = [*(f"tick {node}" for node in nodes), "settle"]
    afterwards = ["settle", *beats * 2, "show"]
    lines = [
        f"begin {voters} {count} {rng.choice(('prevote', 'plain'))}",
        "campaign 1",
        *afterwards,
    ]
    for step in range(steps):
        lines += [*_step(rng, nodes, step), *afterwards]
    return [*lines, "cut", *afterwards]


def _step(rng: random.Random, nodes: range, step: int) -> Iterator[str]:
    node = rng.choice(nodes)
    match rng.choices(
        ["propose", "campaign", "cut", "change", "leave", "transfer", "restart", "compact"],
        [40, 12, 10, 12, 8, 4, 6, 6],
    )[0]:
        case "propose":
            for number in range(rng.randint(1, 3)):
                yield f"propose {node} {step}.{number}"
        case "campaign":
            yield f"campaign {node}"
        case "cut":
            away = rng.sample(nodes, rng.randrange(len(nodes) // 2 + 1))
            yield " ".join(["cut", *map(str, away)])
        case "change":
            kinds = rng.choices("vlr", [4, 2, 2], k=rng.choice((1, 1, 1, 2, 3)))
            yield " ".join([f"change {node}", *(f"{kind}{rng.choice(nodes)}" for kind in kinds)])
        case "leave":
            yield f"change {node}"
        case "transfer":
            # To whoever asks; 3.4 sends a follower's request on as if it were for that follower.
            yield f"transfer {node} {node}"
        case "restart":
            yield f"restart {node}"
        case _:
            yield f"compact {node}"


class Disk(RamLog):
    """A RamLog that remembers the configuration of what is applied."""

    conf_state = ConfState()

    def initial_state(self) -> tuple[HardState, ConfState]:
        return super().initial_state()[0], self.conf_state

    def cut_at(self, index: int) -> None:
        metadata = SnapshotMetadata(index, self.term(index), self.conf_state)
        self.save_snapshot(Snapshot(metadata))
        self.compact(index)


class Node:
    """One node: what is durable, and the core above it."""

    def __init__(self, number: int, voters: int, *, pre_vote: bool) -> None:
        self.number, self.pre_vote = number, pre_vote
        self.disk = Disk()
        self.index = 0
        self.applied: list[str] = []
        if number <= voters:
            self.disk.conf_state, self.index = ConfState(tuple(range(1, voters + 1))), BEGUN
            begun = Snapshot(SnapshotMetadata(BEGUN, 1, self.disk.conf_state))
            self.disk.install_snapshot(begun, HardState(1, 0, BEGUN))
        self.open()

    def open(self) -> None:
        self.raw = RawNode(
            RaftConfig(
                id=self.number,
                storage=self.disk,
                rng=random.Random(self.number),
                election_tick=1000,  # Nobody campaigns unless told to.
                applied=self.index,
                max_size_per_msg=NO_LIMIT,
                max_inflight_msgs=1000,
                pre_vote=self.pre_vote,
            )
        )

    def ready(self) -> list[Message]:
        """Do all that is to be done; the messages."""
        messages: list[Message] = []
        while self.raw.has_ready():
            ready = self.raw.ready()
            if ready.snapshot:
                self.disk.install_snapshot(ready.snapshot)
                self.index = ready.snapshot.metadata.index
                self.disk.conf_state = ready.snapshot.metadata.conf_state
                self.applied.append(f"snapshot {self.index}")
            self.disk.append(ready.entries, ready.hard_state)
            messages += ready.messages
            for entry in ready.committed_entries:
                self.apply(entry)
            self.raw.advance()
        return messages

    def apply(self, entry: Entry) -> None:
        text = entry.data.decode("latin-1")
        if entry.type is not EntryType.NORMAL:
            change = as_v2(decode_conf_change(entry))
            text = f"change {changes_text(change)}"
            try:
                self.disk.conf_state = self.raw.apply_conf_change(change)
            except ConfChangeRefused:
                text += " refused"
        self.index = entry.index
        self.applied.append(f"{entry.term}/{entry.index} {text}")

    def compact(self) -> None:
        # Not in a joint configuration: 3.4 lets no voter of the outgoing half restore its snapshot.
        if self.index >= self.disk.first_index() and not self.disk.conf_state.voters_outgoing:
            self.disk.cut_at(self.index)

    def shown(self) -> dict[str, Any]:
        raft = self.raw.raft
        return {
            "term": raft.term,
            "role": ROLE_NAMES[raft.role],
            "commit": raft.log.committed,
            "applied": list(self.applied),
        }


class Player:
    """Plays schedules on our core."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.away: frozenset[int] = frozenset()

    def play(self, lines: list[str]) -> Iterator[dict[str, dict[str, Any]]]:
        """Every node's state at each `show`."""
        for line in lines:
            command, *words = line.split()
            if command == "settle":
                self.settle()
            elif command == "show":
                yield {str(number): node.shown() for number, node in self.nodes.items()}
            else:
                self.do(command, words)

    def do(self, command: str, words: list[str]) -> None:
        if command == "begin":
            voters, count = int(words[0]), int(words[1])
            self.away = frozenset()
            self.nodes = {
                number: Node(number, voters, pre_vote=words[2] == "prevote")
                for number in range(1, count + 1)
            }
            return
        if command == "cut":
            self.away = frozenset(map(int, words))
            return
        node = self.nodes[int(words[0])]
        with suppress(ProposalDropped):
            match command:
                case "campaign":
                    node.raw.campaign()
                case "tick":
                    node.raw.tick()
                case "propose":
                    node.raw.propose(words[1].encode())
                case "change":
                    changes = parse_changes(" ".join(words[1:]))
                    several = len(changes) > 1
                    transition = Transition.JOINT_EXPLICIT if several else Transition.AUTO
                    node.raw.propose_conf_change(ConfChangeV2(transition, changes))
                case "transfer":
                    node.raw.transfer_leader(int(words[1]))
                case "restart":
                    node.open()
                case "compact":
                    node.compact()

    def settle(self) -> None:
        """Until nobody has anything to say."""
        while True:
            waiting = [message for node in self.nodes.values() for message in node.ready()]
            if not waiting:
                return
            for message in waiting:
                self.deliver(message)

    def deliver(self, message: Message) -> None:
        if message.to not in self.nodes:
            return
        if (message.from_ in self.away) is (message.to in self.away):
            with suppress(ProposalDropped, UnknownPeerRefused):
                self.nodes[message.to].raw.step(message)
        elif message.type is MessageType.SNAP:
            self.nodes[message.from_].raw.report_snapshot(message.to, ok=False)

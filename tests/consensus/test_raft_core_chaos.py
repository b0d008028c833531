"""Nodes under loss, duplication, reordering, restarts and stalling disks: what must always hold."""

import random
from contextlib import suppress

import pytest

from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPLY_THREAD,
    ConfChangeSingle,
    ConfChangeType,
    ConfChangeV2,
    StateRole,
)
from ollamamax_p2p.errors import ProposalDropped
from tests.consensus.raft_core_cluster import Cluster, Member


class Chaos:
    """One step at a time, by the dice."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        guarded = self.dice.random() < 0.5
        self.cluster = Cluster(
            self.dice.choice([3, 5]),
            1,
            check_quorum=guarded,
            pre_vote=guarded,
            max_inflight_msgs=4,
            max_size_per_msg=40,
        )
        self.leaders: dict[int, int] = {}
        self.proposed = 0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            self.check()

    def step(self) -> None:
        number, member = self.dice.choice(list(self.cluster.members.items()))
        what = self.dice.random()
        if what < 0.3:
            member.raw.tick()
        elif what < 0.4:
            with suppress(ProposalDropped):
                self.proposed += 1
                member.raw.propose(str(self.proposed).encode())
        elif what < 0.41:
            self.restart(number, member)
        elif what < 0.42:
            member.raw.transfer_leader(self.dice.choice(list(self.cluster.members)))
        elif what < 0.43:
            member.raw.step_down_for_stalled_disk()
        elif what < 0.44:
            self.change(member)
        self.cluster.take_ready()
        for _ in range(self.dice.randrange(4)):
            self.deliver_one()

    def change(self, member: Member) -> None:
        kinds = [ConfChangeType.ADD_NODE, ConfChangeType.ADD_LEARNER_NODE]
        nodes = self.dice.sample(list(self.cluster.members), self.dice.randint(1, 2))
        changes = tuple(ConfChangeSingle(self.dice.choice(kinds), node) for node in nodes)
        if {each.node_id for each in changes} >= set(self.cluster.state.voters):
            return
        with suppress(ProposalDropped):
            member.raw.propose_conf_change(ConfChangeV2(changes=changes))

    def restart(self, number: int, member: Member) -> None:
        """What was not written is lost, and so is what was to be sent after it."""
        self.cluster.messages = [
            m for m in self.cluster.messages if m.to != number and m.from_ != number
        ]
        member.restart()

    def deliver_one(self) -> None:
        """The disk's and the state machine's work keeps its order; the network's does not."""
        messages = self.cluster.messages
        if not messages:
            return
        place = self.dice.randrange(len(messages))
        chosen = messages[place]
        if chosen.to >= LOCAL_APPLY_THREAD or chosen.from_ >= LOCAL_APPLY_THREAD:
            place = next(
                i for i, m in enumerate(messages) if (m.to, m.from_) == (chosen.to, chosen.from_)
            )
        elif chosen.to != chosen.from_:
            if self.dice.random() < 0.1:
                del messages[place]
                return
            if self.dice.random() < 0.1:
                messages.append(chosen)
        else:
            place = next(i for i, m in enumerate(messages) if m.to == m.from_ == chosen.to)
        message = messages.pop(place)
        self.cluster.deliver(message)

    def check(self) -> None:
        longest: list[object] = []
        for number, member in self.cluster.members.items():
            raft = member.raw.raft
            if raft.role is StateRole.LEADER:
                assert self.leaders.setdefault(raft.term, number) == number
            if len(member.applied) > len(longest):
                longest = list(member.applied)
        for member in self.cluster.members.values():
            assert member.applied == longest[: len(member.applied)]

    def calm(self) -> None:
        """Faults stop: they agree, and take new commands."""
        self.cluster.tick(400)  # Two voters that wake together may need some elections.
        leaders = [m for m in self.cluster.members.values() if m.role is StateRole.LEADER]
        newest = max(leaders, key=lambda member: member.term)
        newest.raw.propose(b"after")
        self.cluster.tick(30)
        self.check()
        for node in newest.raw.raft.tracker.progress:
            assert self.cluster[node].commands()[-1] == b"after"


@pytest.mark.parametrize("seed", range(12))
def test_nobody_ever_disagrees_and_all_recover(seed: int) -> None:
    chaos = Chaos(seed)
    chaos.run(2500)
    chaos.calm()

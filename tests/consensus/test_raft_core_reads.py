"""Linearizable reads: what confirms a leader, and what does not."""

import msgspec
import pytest

from ollamamax_p2p.consensus.core.messages import Message, MessageType
from ollamamax_p2p.consensus.core.raft import READS_WAITING_MAX
from ollamamax_p2p.consensus.core.read_only import ReadOnlyOption
from tests.consensus.raft_core_cluster import ELECTION_TICKS, Cluster, Member

LEASED = {"check_quorum": True, "read_only_option": ReadOnlyOption.LEASE_BASED}


def contexts(member: Member) -> list[bytes]:
    return [each.request_ctx for each in member.reads]


def heartbeats(cluster: Cluster) -> int:
    return cluster.kinds().count(MessageType.HEARTBEAT)


@pytest.mark.parametrize("settings", [{}, LEASED])
@pytest.mark.parametrize("reader", [1, 2])
@pytest.mark.parametrize("voters", [3, 5])
def test_a_read_sees_what_was_acknowledged_before(
    settings: dict[str, object], reader: int, voters: int
) -> None:
    cluster = Cluster(voters, **settings)
    leader = cluster.elect(1)
    leader.raw.propose(b"x")
    cluster.settle()
    cluster.tick(2)
    cluster[reader].raw.read_index(b"r")
    cluster.settle()
    assert contexts(cluster[reader]) == [b"r"]
    assert cluster[reader].reads[0].index == leader.raw.raft.log.committed


def test_a_cluster_of_one_answers_at_once() -> None:
    cluster = Cluster(1)
    cluster.elect(1).raw.read_index(b"r")
    cluster.settle()
    assert contexts(cluster[1]) == [b"r"]


def test_a_leader_without_a_majority_answers_no_read() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(1)
    leader.raw.read_index(b"r")
    cluster.tick(5)
    assert not leader.reads
    cluster.heal()
    cluster.tick()
    assert contexts(leader) == [b"r"]  # The next heartbeat carries the waiting read.


def test_the_late_answer_for_an_earlier_attempt_confirms_no_newer_read() -> None:
    """The same context twice, and an answer to the first that comes late and doubled."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raw.read_index(b"same")
    cluster.settle()
    old = [m for m in cluster.sent if m.type is MessageType.HEARTBEAT_RESP and m.context]
    assert contexts(leader) == [b"same"]
    cluster.cut(1)
    leader.raw.read_index(b"same")
    cluster.settle()
    for message in [*old, *old]:
        leader.raw.step(message)
    cluster.settle()
    assert contexts(leader) == [b"same"]


def test_an_invented_confirmation_confirms_nothing() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(1)
    leader.raw.read_index(b"r")
    leader.raw.step(
        Message(type=MessageType.HEARTBEAT_RESP, from_=2, term=leader.term, context=b"r")
    )
    cluster.settle()
    assert not leader.reads


def test_a_newer_confirmation_answers_the_older_reads_too() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(1)
    leader.raw.read_index(b"1")
    leader.raw.read_index(b"2")
    cluster.settle()
    cluster.heal()
    cluster.tick()
    assert contexts(leader) == [b"1", b"2"]


def test_learners_confirm_nothing() -> None:
    cluster = Cluster(3, 2)
    leader = cluster.elect(1)
    cluster.cut(2, 3)
    leader.raw.read_index(b"r")
    cluster.tick(3)
    assert not leader.reads


def test_a_new_leader_answers_only_after_its_first_commit() -> None:
    cluster = Cluster(3)
    cluster.lost = lambda m: m.type is MessageType.APP
    cluster.elect(1)
    cluster[1].raw.read_index(b"r")
    cluster.tick(2)
    assert not cluster[1].reads
    cluster.heal()
    cluster.tick(2)
    assert contexts(cluster[1]) == [b"r"]
    assert cluster[1].reads[0].index == 2


def test_reads_that_wait_are_dropped_with_the_leadership() -> None:
    cluster = Cluster(3)
    cluster.lost = lambda m: m.type is MessageType.APP
    cluster.elect(1)
    cluster[1].raw.read_index(b"r")
    cluster.heal()
    cluster.elect(2)
    cluster.elect(1)
    cluster.tick(2)
    assert not cluster[1].reads


def test_reads_that_wait_are_bounded() -> None:
    cluster = Cluster(3)
    cluster.lost = lambda m: m.type is MessageType.APP
    leader = cluster.elect(1)
    for _ in range(READS_WAITING_MAX + 1):
        leader.raw.read_index(b"r")
    assert "dropped a read" in leader.said
    cluster.heal()
    cluster.tick(2)
    assert len(leader.reads) == READS_WAITING_MAX


def test_the_answer_of_somebody_who_does_not_lead_is_not_believed() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[2].raw.read_index(b"r")
    cluster.settle()
    answer = next(m for m in cluster.sent if m.type is MessageType.READ_INDEX_RESP)
    cluster[2].raw.step(msgspec.structs.replace(answer, from_=3, index=1))
    cluster.settle()
    assert contexts(cluster[2]) == [b"r"]


def test_a_lease_answers_without_asking() -> None:
    cluster = Cluster(3, **LEASED)
    leader = cluster.elect(1)
    cluster.tick(2)
    before = heartbeats(cluster)
    leader.raw.read_index(b"r")
    cluster.settle()
    assert contexts(leader) == [b"r"]
    assert heartbeats(cluster) == before


def test_a_lease_ends_before_a_follower_would_vote_for_another() -> None:
    """Although the leader has not noticed: it checks its quorum once per election timeout."""
    cluster = Cluster(3, **LEASED)
    leader = cluster.elect(1)
    cluster.tick(ELECTION_TICKS)  # The check has just passed.
    cluster.cut(1)
    cluster.tick(ELECTION_TICKS - 1, only=[1])
    assert leader.raw.raft.leader == 1
    leader.raw.read_index(b"r")
    cluster.settle()
    assert not leader.reads


def test_a_lease_is_given_away_with_the_leadership() -> None:
    cluster = Cluster(3, **LEASED)
    leader = cluster.elect(1)
    cluster.tick(2)
    cluster.cut(1)
    leader.raw.transfer_leader(2)  # Its message may still arrive.
    leader.raw.read_index(b"r")
    cluster.settle()
    assert not leader.reads


def test_a_lease_forgets_heartbeats_that_nobody_answered() -> None:
    cluster = Cluster(3, **LEASED, heartbeat_tick=1)
    leader = cluster.elect(1)
    cluster.lost = lambda m: m.type is MessageType.HEARTBEAT_RESP and bool(m.context)
    cluster.tick(40)
    leader.raw.read_index(b"r")
    cluster.settle()
    assert not leader.reads
    cluster.heal()
    cluster.tick(2)
    assert b"r" in contexts(leader)


def test_a_late_answer_to_an_older_heartbeat_does_not_shorten_the_lease() -> None:
    cluster = Cluster(3, **LEASED)
    leader = cluster.elect(1)
    cluster.tick(1)
    old = [m for m in cluster.sent if m.type is MessageType.HEARTBEAT_RESP and m.context]
    cluster.tick(3)
    for message in old:
        leader.raw.step(message)
    before = heartbeats(cluster)
    leader.raw.read_index(b"r")
    cluster.settle()
    assert contexts(leader) == [b"r"]
    assert heartbeats(cluster) == before

"""Who leads, and when somebody else does."""

import pytest

from ollamamax_p2p.consensus.core.messages import (
    ConfChange,
    ConfChangeType,
    Message,
    MessageType,
    StateRole,
)
from ollamamax_p2p.errors import ProposalDropped
from tests.consensus.raft_core_cluster import ELECTION_TICKS, Cluster

GUARDED = {"check_quorum": True, "pre_vote": True}


def test_somebody_is_elected_by_time_alone() -> None:
    cluster = Cluster(5, **GUARDED)
    cluster.tick(4 * ELECTION_TICKS)
    assert [each.role for each in cluster.members.values()].count(StateRole.LEADER) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_proposed_is_applied_by_all(asynchronous: bool) -> None:
    cluster = Cluster(3, 1, async_storage_writes=asynchronous)
    leader = cluster.elect(1)
    leader.raw.propose(b"a")
    leader.raw.propose_batch([b"b", b"c"])
    cluster.settle()
    assert all(each.commands() == [b"a", b"b", b"c"] for each in cluster.members.values())


def test_a_node_that_was_cut_off_does_not_raise_its_term_nor_depose_the_leader() -> None:
    cluster = Cluster(3, **GUARDED)
    leader = cluster.elect(1)
    cluster.cut(3)
    cluster.tick(10 * ELECTION_TICKS)
    assert cluster[3].term == leader.term
    cluster.heal()
    cluster.tick(3)
    assert leader.role is StateRole.LEADER
    assert cluster[3].raw.raft.leader == 1


def test_a_leader_that_hears_nobody_steps_down() -> None:
    cluster = Cluster(3, **GUARDED)
    leader = cluster.elect(1)
    cluster.cut(1)
    cluster.tick(2 * ELECTION_TICKS + 1, only=[1])
    assert leader.role is not StateRole.LEADER
    with pytest.raises(ProposalDropped):
        leader.raw.propose(b"x")


def test_a_leader_without_a_majority_commits_nothing_and_loses_it_to_the_next() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.cut(1)
    cluster[1].raw.propose(b"lost")
    cluster.settle()
    cluster.elect(2)
    cluster[2].raw.propose(b"kept")
    cluster.settle()
    cluster.heal()
    cluster.tick(2)
    assert all(each.commands() == [b"kept"] for each in cluster.members.values())


def test_a_restarted_node_remembers_its_term_and_vote() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    before = cluster[2].raw.raft.hard_state()
    cluster[2].restart()
    assert cluster[2].raw.raft.hard_state() == before
    request = Message(type=MessageType.VOTE, to=2, from_=3, term=before.term, log_term=9, index=99)
    cluster[2].raw.step(request)
    cluster.settle()
    assert cluster[2].raw.raft.vote == 1


def test_a_vote_does_not_leave_before_it_is_durable() -> None:
    cluster = Cluster(3)
    cluster[2].stalled = []
    cluster[3].stalled = []
    cluster[1].raw.campaign()
    cluster.settle()
    assert cluster[1].role is StateRole.CANDIDATE
    cluster.disk_answers(cluster[2])
    cluster.settle()
    assert cluster[1].role is StateRole.LEADER


def test_a_candidate_does_not_lead_before_its_own_vote_is_durable() -> None:
    """Else it may lead one term twice: before a crash in which it forgets the term, and after it,
    when the others vote for it again; with one index and term for two entries.
    """
    cluster = Cluster(3, **GUARDED)
    candidate = cluster[1]
    candidate.stalled = []
    candidate.raw.campaign()
    cluster.settle()
    assert cluster[2].raw.raft.vote == cluster[3].raw.raft.vote == 1
    assert candidate.role is StateRole.CANDIDATE
    cluster.disk_answers(candidate)
    cluster.settle()
    assert candidate.role is StateRole.LEADER


def test_a_leader_commits_before_its_own_disk_has_answered() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.stalled = []
    leader.raw.propose(b"x")
    cluster.settle()
    assert cluster[2].commands() == [b"x"]
    assert leader.commands() == []  # Its own state machine waits for its own log.
    cluster.disk_answers(leader)
    cluster.settle()
    assert leader.commands() == [b"x"]


def test_a_leader_whose_disk_stalls_hands_over_at_once() -> None:
    cluster = Cluster(3, **GUARDED)
    leader = cluster.elect(1)
    cluster.tick()
    leader.stalled = []
    leader.raw.propose(b"x")
    cluster.settle()
    leader.raw.step_down_for_stalled_disk()
    cluster.settle()
    assert [cluster[2].role, cluster[3].role].count(StateRole.LEADER) == 1
    assert leader.role is StateRole.FOLLOWER
    cluster.disk_answers(leader)
    cluster.tick(2)
    assert leader.commands() == [b"x"]


def test_a_stalled_disk_changes_nothing_on_a_follower() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    before = len(cluster[2].said.lines)
    cluster[2].raw.step_down_for_stalled_disk()
    assert cluster[2].raw.raft.leader == 1
    assert len(cluster[2].said.lines) == before


def test_a_lone_leader_with_a_stalled_disk_has_nobody_to_tell() -> None:
    cluster = Cluster(1)
    leader = cluster.elect(1)
    leader.raw.step_down_for_stalled_disk()
    assert not leader.raw.raft.messages
    assert leader.role is StateRole.FOLLOWER


def test_leadership_is_handed_over() -> None:
    cluster = Cluster(3, **GUARDED)
    cluster.elect(1)
    cluster[1].raw.transfer_leader(2)
    cluster.settle()
    assert cluster[2].role is StateRole.LEADER
    assert cluster[1].raw.raft.leader == 2


def test_a_follower_sends_the_request_to_hand_over_on() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[2].raw.transfer_leader(2)
    cluster.settle()
    assert cluster[2].role is StateRole.LEADER


def test_a_node_that_is_behind_is_brought_up_before_it_is_handed_leadership() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(2)
    leader.raw.propose(b"x")
    cluster.settle()
    cluster.heal()
    leader.raw.report_unreachable(2)
    leader.raw.transfer_leader(2)
    cluster.settle()
    assert cluster[2].role is StateRole.LEADER
    assert "sent MsgTimeoutNow to 2 after received MsgAppResp" in leader.said


def test_a_transfer_that_fails_is_given_up_after_an_election_timeout() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(2)
    leader.raw.transfer_leader(2)
    cluster.settle()
    with pytest.raises(ProposalDropped):
        leader.raw.propose(b"x")
    cluster.tick(ELECTION_TICKS, only=[1])
    leader.raw.propose(b"y")
    cluster.settle()
    assert leader.commands() == [b"y"]


def test_what_a_transfer_is_told_about_itself() -> None:
    cluster = Cluster(3, 1)
    leader = cluster.elect(1)
    cluster.cut(2, 3)
    for to in (9, 4, 2, 2, 1):
        leader.raw.transfer_leader(to)
    assert "no progress available for 9" in leader.said
    assert "is learner. Ignored" in leader.said
    assert "ignores request to same node 2" in leader.said
    assert "abort previous transferring leadership to 2" in leader.said
    assert "Ignored transferring leadership to self" in leader.said
    assert leader.raw.basic_status().lead_transferee == 0


def test_without_a_leader_requests_are_dropped_and_said_so() -> None:
    cluster = Cluster(3)
    follower = cluster[1]
    follower.raw.transfer_leader(1)
    follower.raw.read_index(b"r")
    follower.raw.forget_leader()
    with pytest.raises(ProposalDropped):
        follower.raw.propose(b"x")
    assert "dropping leader transfer msg" in follower.said
    assert "dropping index reading msg" in follower.said
    assert not follower.raw.has_ready()


def test_a_follower_forwards_proposals_unless_told_not_to() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[2].raw.propose(b"x")
    cluster.settle()
    assert cluster[3].commands() == [b"x"]
    cluster = Cluster(3, disable_proposal_forwarding=True)
    cluster.elect(1)
    with pytest.raises(ProposalDropped, match="does not lead"):
        cluster[2].raw.propose(b"x")


def test_a_learner_and_a_leader_do_not_campaign() -> None:
    cluster = Cluster(2, 1)
    leader = cluster.elect(1)
    leader.raw.campaign()
    cluster[3].raw.campaign()
    assert "ignoring MsgHup because already leader" in leader.said
    assert "is unpromotable" in cluster[3].said
    assert leader.term == cluster[3].term == 2


def test_a_node_with_an_unapplied_change_does_not_campaign() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raw.propose_conf_change(ConfChange(ConfChangeType.ADD_LEARNER_NODE, 7))
    while cluster[2].raw.raft.log.committed < leader.raw.raft.log.last_index():
        leader_messages = [m for m in cluster.messages if m.to < 100 or m.from_ != 2]
        applies = [m for m in cluster.messages if m not in leader_messages]
        cluster.messages = []
        for message in leader_messages:
            cluster.deliver(message)
        for message in applies:
            if message.type is MessageType.STORAGE_APPEND:
                cluster.deliver(message)
        cluster.take_ready()
    cluster[2].raw.campaign()
    assert "still pending configuration changes" in cluster[2].said
    assert cluster[2].role is StateRole.FOLLOWER


def test_a_removed_leader_steps_down_if_asked_to() -> None:
    for asked in (True, False):
        cluster = Cluster(3, step_down_on_removal=asked)
        leader = cluster.elect(1)
        leader.raw.propose_conf_change(ConfChange(ConfChangeType.REMOVE_NODE, 1))
        cluster.settle()
        assert (leader.role is StateRole.LEADER) is not asked
        with pytest.raises(ProposalDropped):
            leader.raw.propose(b"x")


def test_a_transfer_to_a_node_that_is_removed_ends() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(3)
    leader.raw.propose_conf_change(ConfChange(ConfChangeType.REMOVE_NODE, 3))
    leader.raw.transfer_leader(3)
    cluster.settle()
    assert leader.raw.raft.lead_transferee == 0
    leader.raw.propose(b"x")
    cluster.settle()
    assert cluster[2].commands() == [b"x"]


def test_a_candidate_ignores_a_request_to_campaign_and_proposals() -> None:
    cluster = Cluster(3)
    cluster.cut(1)
    cluster[1].raw.campaign()
    cluster.settle()
    cluster[1].raw.step(Message(type=MessageType.TIMEOUT_NOW, from_=2, term=2))
    assert "ignored MsgTimeoutNow" in cluster[1].said
    with pytest.raises(ProposalDropped):
        cluster[1].raw.propose(b"x")
    cluster[1].raw.step(Message(type=MessageType.PRE_VOTE_RESP, from_=2, term=2))
    assert cluster[1].role is StateRole.CANDIDATE
    cluster[1].raw.step(Message(type=MessageType.HEARTBEAT, from_=2, term=2))
    assert cluster[1].raw.raft.leader == 2


def test_a_candidate_that_most_refuse_waits_again() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(3)
    leader.raw.propose(b"x")
    cluster.settle()
    cluster.heal()
    cluster[3].raw.campaign()
    cluster.settle()
    assert cluster[3].role is StateRole.FOLLOWER
    assert "received MsgVoteResp rejection" in cluster[3].said


def test_a_smaller_configuration_may_commit_more() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(2)
    leader.raw.propose_conf_change(ConfChange(ConfChangeType.REMOVE_NODE, 2))
    leader.raw.propose(b"x")
    cluster.lost = lambda m: m.from_ == 2 or m.to == 2 or bool(m.entries[1:])
    cluster.settle()
    leader.raw.raft.step(Message(type=MessageType.APP_RESP, from_=9, term=leader.term))
    leader.raw.raft.step(Message(type=MessageType.HEARTBEAT_RESP, from_=9, term=leader.term))
    assert "no progress available for 9" in leader.said
    cluster.heal()
    cluster.tick(2)
    assert cluster[3].commands() == [b"x"]


def test_entries_that_only_the_removed_had_not_are_committed_by_the_removal() -> None:
    cluster = Cluster(2)
    leader = cluster.elect(1)
    cluster[2].stalled = []
    leader.raw.propose(b"x")
    cluster.settle()
    assert leader.commands() == []
    leader.raw.apply_conf_change(ConfChange(ConfChangeType.REMOVE_NODE, 2))
    cluster.settle()
    assert leader.commands() == [b"x"]

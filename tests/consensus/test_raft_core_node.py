"""What a program that drives a node relies on."""

import json
import random
from typing import Any

import pytest

from ollamamax_p2p.consensus.core.logger import NoLogger
from ollamamax_p2p.consensus.core.messages import (
    ConfChange,
    ConfChangeSingle,
    ConfChangeTransition,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
    EntryType,
    HardState,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
    StateRole,
)
from ollamamax_p2p.consensus.core.progress import StateType
from ollamamax_p2p.consensus.core.raw_node import RaftConfig, RawNode, hard_state_of
from ollamamax_p2p.consensus.core.read_only import ReadOnlyOption
from ollamamax_p2p.consensus.core.tracing import EVENT_NAMES, TraceEvent, to_ndjson
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.errors import ProposalDropped
from tests.consensus.raft_core_cluster import Cluster

ADD, LEARN, REMOVE = (
    ConfChangeType.ADD_NODE,
    ConfChangeType.ADD_LEARNER_NODE,
    ConfChangeType.REMOVE_NODE,
)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"id": 0}, "none as id"),
        ({"id": 2**64 - 1}, "local target"),
        ({"heartbeat_tick": 0}, "heartbeat tick"),
        ({"election_tick": 1}, "election tick"),
        ({"max_inflight_msgs": 0}, "max inflight messages"),
        ({"max_inflight_bytes": 1}, "max inflight bytes"),
        ({"read_only_option": ReadOnlyOption.LEASE_BASED}, "CheckQuorum must be enabled"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        RaftConfig(**{"id": 1, "storage": RamLog(), "rng": random.Random(1), **settings})


def test_a_storage_that_has_lost_committed_entries_is_refused() -> None:
    log = RamLog()
    log.append((), HardState(1, 0, 5))
    with pytest.raises(ValueError, match=r"state.commit 5 is out of range \[0, 0\]"):
        RawNode(RaftConfig(id=1, storage=log, rng=random.Random(1)))


def test_what_was_applied_before_a_restart_is_not_given_out_again() -> None:
    cluster = Cluster(1)
    leader = cluster.elect(1)
    leader.raw.propose(b"x")
    cluster.settle()
    leader.restart()
    cluster.elect(1)
    assert leader.commands() == [b"x"]


def test_a_leader_that_cannot_commit_takes_only_so_much() -> None:
    cluster = Cluster(3, max_uncommitted_entries_size=10)
    leader = cluster.elect(1)
    cluster.cut(1)
    leader.raw.propose(b"x" * 100)  # The first one passes, however large.
    with pytest.raises(ProposalDropped, match="uncommitted"):
        leader.raw.propose(b"y")
    leader.raw.propose(b"")
    cluster.heal()
    cluster.tick(2)
    leader.raw.propose(b"y")
    cluster.settle()
    assert cluster[2].commands() == [b"x" * 100, b"y"]


def test_a_node_that_is_far_behind_gets_a_snapshot() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(3)
    leader.raw.propose(b"x")
    cluster.settle()
    applied = leader.raw.raft.log.applied
    leader.log.save_snapshot(Snapshot(SnapshotMetadata(applied, leader.term, cluster.state)))
    leader.log.compact(applied)
    cluster.heal()
    leader.raw.report_unreachable(3)
    cluster.tick(2)
    assert cluster[3].raw.raft.log.applied == applied
    assert leader.raw.status().progress[3].state is StateType.REPLICATE
    leader.raw.propose(b"y")
    cluster.settle()
    assert cluster[3].commands() == [b"y"]


@pytest.mark.parametrize("ok", [True, False])
def test_what_became_of_a_snapshot_is_reported(ok: bool) -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(3)
    leader.raw.propose(b"x")
    cluster.settle()
    applied = leader.raw.raft.log.applied
    leader.log.save_snapshot(Snapshot(SnapshotMetadata(applied, leader.term, cluster.state)))
    leader.log.compact(applied)
    leader.raw.report_unreachable(3)
    answer = Message(type=MessageType.HEARTBEAT_RESP, from_=3, term=leader.term)
    leader.raw.step(answer)
    progress = leader.raw.raft.tracker.progress[3]
    assert progress.state is StateType.SNAPSHOT
    leader.raw.report_snapshot(3, ok=ok)
    assert progress.state is StateType.PROBE
    assert progress.is_paused
    assert progress.next == (applied if ok else progress.match) + 1
    leader.raw.report_snapshot(3, ok=ok)
    leader.raw.report_snapshot(9, ok=ok)
    leader.raw.report_unreachable(9)
    assert "no progress available for 9" in leader.said


def test_a_snapshot_that_cannot_be_had_now_is_asked_for_again() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.cut(3)
    leader.raw.propose(b"x")
    cluster.settle()
    applied = leader.raw.raft.log.applied
    leader.log.save_snapshot(Snapshot(SnapshotMetadata(applied, leader.term, cluster.state)))
    leader.log.compact(applied)
    ready, leader.log._snapshot = leader.log._snapshot, Snapshot()
    cluster.heal()
    leader.raw.report_unreachable(3)
    cluster.tick()
    assert "snapshot is temporarily unavailable" in leader.said
    leader.log._snapshot = ready
    cluster.tick(2)
    assert cluster[3].raw.raft.log.applied == applied


def test_a_snapshot_of_what_a_node_holds_only_commits_it() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.lost = lambda m: m.type is MessageType.APP_RESP and m.from_ != m.to
    leader.raw.propose(b"x")
    cluster.settle()
    behind, last = cluster[2], leader.raw.raft.log.last_index()
    assert behind.raw.raft.log.committed < last
    snapshot = Snapshot(SnapshotMetadata(last, leader.term, cluster.state))
    for _ in range(2):
        behind.raw.step(
            Message(type=MessageType.SNAP, from_=1, term=leader.term, snapshot=snapshot)
        )
    cluster.settle()
    assert "fast-forwarded commit to snapshot" in behind.said
    assert behind.commands() == [b"x"]


def test_voters_are_replaced_through_a_joint_configuration() -> None:
    cluster = Cluster(3, 1)
    leader = cluster.elect(1)
    changes = (ConfChangeSingle(ADD, 4), ConfChangeSingle(REMOVE, 3))
    leader.raw.propose_conf_change(ConfChangeV2(ConfChangeTransition.JOINT_IMPLICIT, changes))
    cluster.settle()
    assert str(leader.raw.status().config) == "voters=(1 2 4)"
    kinds = [e.type for e in cluster[2].applied if e.type is not EntryType.NORMAL]
    assert kinds == [EntryType.CONF_CHANGE_V2] * 2


def test_a_joint_configuration_is_not_left_while_leadership_is_handed_over() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.lost = lambda m: m.type is MessageType.TIMEOUT_NOW
    changes = (ConfChangeSingle(LEARN, 4), ConfChangeSingle(LEARN, 5))
    leader.raw.propose_conf_change(ConfChangeV2(changes=changes))
    leader.raw.transfer_leader(2)
    cluster.settle()
    assert "not initiating automatic transition out of joint configuration" in leader.said
    cluster.tick(10, only=[1])
    leader.raw.propose(b"x")
    cluster.settle()
    assert str(leader.raw.status().config) == "voters=(1 2 3) learners=(4 5)"


def test_one_change_at_a_time() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    for node in (7, 8):
        leader.raw.propose_conf_change(ConfChange(LEARN, node))
    cluster.settle()
    assert "possible unapplied conf change at index" in leader.said
    assert str(leader.raw.status().config) == "voters=(1 2 3) learners=(7)"
    unchecked = Cluster(3, disable_conf_change_validation=True).elect(1)
    unchecked.raw.propose_conf_change(ConfChange(LEARN, 7))
    unchecked.raw.propose_conf_change(ConfChange(LEARN, 8))
    assert unchecked.raw.raft.pending_conf_index == unchecked.raw.raft.log.last_index()


def test_forgetting_the_leader_lets_a_follower_vote_at_once() -> None:
    cluster = Cluster(3, check_quorum=True)
    cluster.elect(1)
    for number in (2, 3):
        cluster[number].raw.forget_leader()
    cluster.elect(2)
    cluster[2].raw.forget_leader()
    assert cluster[2].role is StateRole.LEADER
    leased = Cluster(3, check_quorum=True, read_only_option=ReadOnlyOption.LEASE_BASED)
    leased.elect(1)
    leased[2].raw.forget_leader()
    assert "ignoring MsgForgetLeader due to ReadOnlyLeaseBased" in leased[2].said
    assert leased[2].raw.raft.leader == 1


def test_progress_is_told_by_the_leader_only() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    assert list(cluster[1].raw.status().progress) == [1, 2, 3]
    assert cluster[2].raw.status().progress == {}
    basic = cluster[2].raw.basic_status()
    assert (basic.soft_state.leader, basic.applied) == (1, 2)


def test_a_lone_synchronous_node_needs_ready_and_advance_in_turn() -> None:
    node = Cluster(1, async_storage_writes=False)[1].raw
    node.campaign()
    ready = node.ready()
    assert ready.must_sync
    assert ready.hard_state == HardState(2, 1, 1)
    with pytest.raises(AssertionError, match="without call to Advance"):
        node.ready()
    node.advance()
    assert node.raft.role is StateRole.LEADER


def test_an_asynchronous_node_is_not_advanced() -> None:
    with pytest.raises(AssertionError, match="AsyncStorageWrites"):
        Cluster(1)[1].raw.advance()


def test_a_request_to_write_without_hard_state_says_so() -> None:
    assert hard_state_of(Message(type=MessageType.STORAGE_APPEND)) is None


def test_the_trace_has_the_names_that_the_specification_knows() -> None:
    events: list[TraceEvent] = []
    cluster = Cluster(3, trace=events.append)
    leader = cluster.elect(1)
    leader.raw.propose(b"x")
    changes = (ConfChangeSingle(ADD, 4), ConfChangeSingle(LEARN, 5), ConfChangeSingle(REMOVE, 3))
    leader.raw.propose_conf_change(ConfChangeV2(changes=changes))
    cluster.settle()
    leader.raw.propose_conf_change(ConfChange(ConfChangeType.UPDATE_NODE, 2))
    cluster.settle()
    cluster[2].raw.step(
        Message(
            type=MessageType.SNAP,
            from_=1,
            term=leader.term,
            snapshot=Snapshot(SnapshotMetadata(99, leader.term, ConfState((1, 2)))),
        )
    )
    lines = [json.loads(to_ndjson(event)) for event in events]
    assert {line["name"] for line in lines} == EVENT_NAMES - {"SendSnapshot", "ReceiveSnapshot"}
    assert all(line["conf"] and line["nid"] in "123" and line["role"] for line in lines)
    change = next(line for line in lines if line["name"] == "ChangeConf")
    actions = [each["action"] for each in change["prop"]["cc"]["changes"]]
    assert actions == ["AddNewServer", "AddLearner", "RemoveServer"]
    sent = next(line for line in lines if line["name"] == "SendAppendEntriesRequest")
    assert sent["msg"]["from"] == "1"
    assert set(sent["prop"]) == {"match", "next"}
    snapshot = next(line for line in lines if line.get("msg", {}).get("type") == "MsgSnap")
    assert snapshot["msg"]["entries"] == 99  # All that it stands for.


def test_nothing_is_said_unless_somebody_listens() -> None:
    said = NoLogger()
    assert said.info("x") is said.error("y") is None


def compacted(cluster: Cluster) -> int:
    """Node 3 lacks what the leader has compacted away; gives the snapshot's index."""
    leader = cluster[1]
    cluster.cut(3)
    leader.raw.propose(b"x")
    cluster.settle()
    applied = leader.raw.raft.log.applied
    leader.log.save_snapshot(Snapshot(SnapshotMetadata(applied, leader.term, cluster.state)))
    leader.log.compact(applied)
    return applied


def test_no_snapshot_goes_to_a_node_that_has_been_silent() -> None:
    cluster = Cluster(3, check_quorum=True)
    leader = cluster.elect(1)
    compacted(cluster)
    cluster.tick(20, only=[1, 2])
    leader.raw.report_unreachable(3)
    leader.raw.propose(b"y")
    cluster.settle()
    assert "ignore sending snapshot to 3 since it is not recently active" in leader.said


def test_an_acknowledgement_before_the_snapshot_does_not_end_the_waiting_for_it() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.lost = lambda m: m.to == 3 or m.from_ == 3
    leader.raw.propose_batch([b"a", b"b"])
    cluster.settle()
    compacted(cluster)
    leader.raw.report_unreachable(3)
    leader.raw.step(Message(type=MessageType.HEARTBEAT_RESP, from_=3, term=leader.term))
    leader.raw.step(Message(type=MessageType.APP_RESP, from_=3, term=leader.term, index=3))
    progress = leader.raw.status().progress[3]
    assert (progress.state, progress.match) == (StateType.SNAPSHOT, 3)


def test_a_snapshot_counts_although_the_term_has_changed_while_it_was_installed() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    index = compacted(cluster)
    behind = cluster[3]
    behind.stalled = []
    cluster.heal()
    cluster[1].raw.report_unreachable(3)
    cluster.tick()
    assert behind.raw.raft.log.has_next_or_in_progress_snapshot()
    cluster.cut(3)
    behind.raw.step(Message(type=MessageType.HEARTBEAT, from_=2, term=9))
    cluster.disk_answers(behind)
    cluster.settle()
    assert behind.raw.raft.log.applied == index


def test_a_snapshot_brings_a_joint_configuration_with_all_its_parts() -> None:
    cluster = Cluster(3)
    state = ConfState((1, 2, 4), (), (1, 2, 3), (3,), True)
    snapshot = Snapshot(SnapshotMetadata(50, 2, state))
    cluster[2].raw.step(Message(type=MessageType.SNAP, from_=1, term=2, snapshot=snapshot))
    cluster.settle()
    assert cluster[2].raw.raft.tracker.config.conf_state() == state
    assert cluster[2].raw.raft.log.applied == 50


def test_old_answers_change_nothing() -> None:
    cluster = Cluster(3, heartbeat_tick=2)
    leader = cluster.elect(1)
    leader.raw.propose(b"x")
    cluster.settle()
    old = Message(type=MessageType.APP_RESP, from_=2, term=leader.term, index=1, reject=True)
    before = str(leader.raw.raft.tracker.progress[2])
    leader.raw.step(old)
    cluster.tick()  # Not yet a heartbeat's turn.
    assert str(leader.raw.raft.tracker.progress[2]) == before
    leader.raw.report_unreachable(2)
    leader.raw.report_unreachable(2)
    cluster.tick(2)
    assert str(leader.raw.raft.tracker.progress[2]) == before


def test_an_append_of_what_is_committed_is_answered_with_how_far_that_is() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raw.propose(b"x")
    cluster.settle()
    again = next(m for m in cluster.sent if m.type is MessageType.APP and m.to == 2)
    cluster[2].raw.step(again)
    answer = cluster[2].raw.raft.messages_after_append[-1]
    assert (answer.type, answer.index) == (MessageType.APP_RESP, 3)
    assert not answer.reject


def test_a_state_machine_may_remember_more_than_the_commit_index_that_was_written() -> None:
    cluster = Cluster(1)
    leader = cluster.elect(1)
    leader.raw.propose(b"x")
    cluster.settle()
    leader.log.append((), HardState(leader.term, 1, 1))
    leader.restart()
    assert leader.raw.raft.log.committed == leader.raw.raft.log.applied == 3


@pytest.mark.parametrize("applied", [1, 99])
def test_a_state_machine_of_another_log_is_refused(applied: int) -> None:
    log = RamLog()
    log.install_snapshot(Snapshot(SnapshotMetadata(5, 1, ConfState((1,)))))
    with pytest.raises(ValueError, match="do not belong together"):
        RawNode(RaftConfig(id=1, storage=log, rng=random.Random(1), applied=applied))

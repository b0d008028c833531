"""What becomes of proposals, reads and snapshots, on drives that one test moves by hand."""

import random
from collections.abc import Iterable

import pytest

from ollamamax_p2p.consensus.core.drive import (
    _LATE_ROUNDS_MAX,
    Drive,
    Outcome,
    ReadKind,
    merged_writes,
    snapshot_to_adopt,
)
from ollamamax_p2p.consensus.core.messages import (
    ConfChangeSingle,
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
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.consensus.replica import bootstrap_log
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import (
    DeadlineExceeded,
    LogDamaged,
    NotLeader,
    OutcomeUnknown,
    ProposalDropped,
    QuorumLost,
)

SETTINGS = ConsensusSettings(quorum_timeout_s=1.0, request_timeout_s=2.0)


class Drives:
    """Nodes 1 to `count`, all voters; what they are told to do is done at once."""

    def __init__(self, count: int = 3, settings: ConsensusSettings = SETTINGS) -> None:
        self.logs = {number: RamLog() for number in range(1, count + 1)}
        self.drives: dict[int, Drive] = {}
        for number, log in self.logs.items():
            bootstrap_log(log, list(self.logs))
            self.drives[number] = Drive(
                number,
                log,
                applied=0,
                conf_state=ConfState(),
                settings=settings,
                rng=random.Random(number),
            )
        self.lost: set[int] = set()
        """Nobody hears these, nor do they hear anybody."""
        self.lost_types: set[MessageType] = set()
        self.idle_disks: set[int] = set()
        """Their writes are begun and not finished."""
        self.fetches: list[Message] = []

    def __getitem__(self, number: int) -> Drive:
        return self.drives[number]

    def elect(self, number: int) -> Drive:
        self.settle()
        self[number].campaign()
        self.settle()
        assert self[number].leads
        return self[number]

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / SETTINGS.tick_s)):
            for drive in self.drives.values():
                drive.tick()
            self.settle()

    def settle(self) -> None:
        busy = True
        while busy:
            busy = False
            for number, drive in self.drives.items():
                busy = self.work(number, drive) or busy

    def work(self, number: int, drive: Drive) -> bool:
        work = drive.take_work()
        if number not in self.idle_disks:
            for write in merged_writes(work.appends, HardState()):
                self.logs[number].append(write.entries, write.hard_state)
                for message in write.messages:
                    drive.appended(message)
        for each in work.applies:
            drive.applied(each, [b"%d" % command.index for command in each.commands])
        for message in work.sends:
            if not self.lost & {number, message.to} and message.type not in self.lost_types:
                self[message.to].step(message)
        self.fetches += work.fetches
        return bool(work.appends or work.applies or work.sends or work.fetches)


def error_of(outcomes: Iterable[Outcome], request: int) -> BaseException | None:
    (outcome,) = [each for each in outcomes if each.request == request]
    return outcome.error


def only(drive: Drive) -> Outcome:
    (outcome,) = drive.take_outcomes()
    return outcome


def removing(node: int) -> ConfChangeV2:
    return ConfChangeV2(changes=(ConfChangeSingle(ConfChangeType.REMOVE_NODE, node),))


# -- proposals


def test_proposals_go_in_batches_of_a_messages_size_in_their_order():
    drives = Drives(1, ConsensusSettings(max_message_bytes=2_000))
    drive = drives.elect(1)
    requests = drive.propose_many([(b"%d" % number * 800, 0, 0) for number in range(5)])
    drives.settle()
    outcomes = drive.take_outcomes()
    assert [each.request for each in outcomes] == requests
    assert [each.index for each in outcomes] == sorted(each.index for each in outcomes)


def test_a_command_that_is_too_long_is_refused_at_once():
    drives = Drives(1)
    with pytest.raises(ProposalDropped, match="are the most"):
        drives[1].propose(bytes(SETTINGS.max_command_bytes + 1))


def test_nobody_hears_of_what_was_abandoned():
    drives = Drives(3)
    drive = drives.elect(1)
    drives.lost = {1}
    read, proposal = drive.read(), drive.propose(b"x")
    drives.settle()
    drive.abandon(read)
    drive.abandon(proposal)
    drives.lost = set()
    drives.pass_time(0.5)
    assert drive.requests_waiting == 0
    assert drive.take_outcomes() == []


def test_a_full_disk_takes_neither_commands_nor_changes_also_if_its_node_is_made_to_lead():
    drives = Drives(3)
    drive = drives.elect(1)
    drives.lost_types = {MessageType.TIMEOUT_NOW}
    drive.apply_failed()
    assert not drive.leads
    drive.step(Message(type=MessageType.TIMEOUT_NOW, to=1, from_=2, term=drive.term))
    drives.settle()
    assert drive.leads
    with pytest.raises(ProposalDropped, match="disk is full"):
        drive.propose(b"y")
    with pytest.raises(ProposalDropped, match="disk is full"):
        drive.propose_conf_change(removing(3))


def test_what_a_leader_does_not_take_while_it_hands_over_is_dropped_with_the_reason():
    drives = Drives(3)
    drive = drives.elect(1)
    drives.lost_types = {MessageType.TIMEOUT_NOW, MessageType.APP}
    drive.transfer_leader(2)
    request = drive.propose(b"x")
    drives.settle()
    for _ in range(round(SETTINGS.quorum_timeout_s / SETTINGS.tick_s)):
        # Asked for anew each time, or it would be given up after an election timeout.
        drive.transfer_leader(3 if drive.raw_node.raft.lead_transferee == 2 else 2)
        drives.pass_time(SETTINGS.tick_s)
    error = error_of(drive.take_outcomes(), request)
    assert isinstance(error, ProposalDropped)
    assert "handed to another" in str(error)


def test_a_forwarded_proposal_that_is_not_taken_is_counted():
    drives = Drives(3)
    drives.settle()
    drives[1].step(Message(type=MessageType.PROP, to=1, from_=2, entries=(Entry(0, 0),)))
    assert drives[1].proposals_dropped == 1


def test_a_leader_that_hands_over_counts_what_it_does_not_take():
    drives = Drives(3)
    drive = drives.elect(1)
    drives.lost_types = {MessageType.TIMEOUT_NOW}
    drive.transfer_leader(2)
    drive.step(Message(type=MessageType.PROP, to=1, from_=2, entries=(Entry(0, 0),)))
    assert drive.proposals_dropped == 1


def test_of_a_command_that_was_forwarded_to_a_leader_of_old_nobody_knows():
    drives = Drives(3)
    drives.elect(1)
    request = drives[3].propose(b"x")
    drives.lost = {1}
    drives.settle()
    for _ in range(2 * SETTINGS.election_ticks):
        drives[2].tick()
        drives[3].tick()
        drives.settle()
    assert drives[2].leads or drives[3].leads
    assert isinstance(error_of(drives[3].take_outcomes(), request), OutcomeUnknown)


def test_a_command_in_the_log_of_a_leader_that_is_replaced_is_dropped_when_that_is_certain():
    drives = Drives(3)
    drives.elect(1)
    drives.lost = {1}
    request = drives[1].propose(b"x")
    drives.settle()
    for _ in range(2 * SETTINGS.election_ticks):
        drives[2].tick()
        drives[3].tick()
        drives.settle()
    drives.lost = set()
    drives.pass_time(0.5)
    error = error_of(drives[1].take_outcomes(), request)
    assert isinstance(error, ProposalDropped)
    assert "another leader" in str(error)


# -- changes of the configuration


def test_a_change_that_does_not_fit_when_it_is_applied_is_dropped_with_the_reason():
    drives = Drives(1)
    drive = drives.elect(1)
    request = drive.propose_conf_change(removing(1))
    drives.settle()
    outcome = only(drive)
    assert outcome.request == request
    assert "removed all voters" in str(outcome.error)
    # Where nobody waits, nobody is told.
    drive.raw_node.propose_conf_change(removing(1))
    drives.settle()
    assert drive.take_outcomes() == []
    assert drive.leads


def test_a_second_change_before_the_first_is_applied_is_dropped():
    drives = Drives(3)
    drive = drives.elect(1)
    first, second = drive.propose_conf_change(removing(3)), drive.propose_conf_change(removing(2))
    drives.settle()
    outcomes = drive.take_outcomes()
    assert error_of(outcomes, first) is None
    assert "another change" in str(error_of(outcomes, second))


def test_a_change_whose_place_in_the_log_another_leader_took_is_dropped():
    drives = Drives(3)
    drives.elect(1)
    drives.lost = {1}
    request = drives[1].propose_conf_change(removing(3))
    drives.settle()
    for _ in range(2 * SETTINGS.election_ticks):
        drives[2].tick()
        drives[3].tick()
        drives.settle()
    drives.lost = set()
    drives.pass_time(0.5)
    error = error_of(drives[1].take_outcomes(), request)
    assert "another leader took over" in str(error)
    with pytest.raises(NotLeader, match="node"):
        drives[1].propose_conf_change(removing(3))


# -- reads


def test_a_read_that_the_leader_never_hears_of_ends_at_its_deadline():
    drives = Drives(3)
    drives.elect(1)
    drives.lost_types = {MessageType.READ_INDEX}
    request = drives[2].read()
    drives.pass_time(SETTINGS.request_timeout_s + 0.1)
    assert isinstance(error_of(drives[2].take_outcomes(), request), DeadlineExceeded)


def test_of_the_rounds_for_reads_that_nobody_answered_a_few_are_remembered():
    drives = Drives(3)
    drives.elect(1)
    drives.lost_types = {MessageType.READ_INDEX}
    for _ in range(_LATE_ROUNDS_MAX + 6):
        drives[2].read()
        drives.pass_time(1.1 * SETTINGS.election_ticks * SETTINGS.tick_s)
    assert len(drives[2]._late_rounds) == _LATE_ROUNDS_MAX
    drives.lost_types = set()
    drives[2].read()
    drives.pass_time(1.1 * SETTINGS.election_ticks * SETTINGS.tick_s)
    assert [each.error for each in drives[2].take_outcomes()][-1] is None


def test_a_read_without_a_leader_ends_with_that():
    drives = Drives(3)
    drives.lost = {1, 2, 3}
    request = drives[2].read()
    drives.pass_time(SETTINGS.quorum_timeout_s + 0.1)
    assert isinstance(error_of(drives[2].take_outcomes(), request), QuorumLost)


def test_the_answer_to_another_question_answers_no_read():
    drives = Drives(3)
    drives.elect(1)
    drives[2].read()
    drives[2].take_work()
    drives[2].step(
        Message(
            type=MessageType.READ_INDEX_RESP,
            to=2,
            from_=1,
            term=drives[2].term,
            index=1,
            entries=(Entry(0, 0, EntryType.NORMAL, b"of yesterday"),),
        )
    )
    drives[2].take_work()
    assert drives[2].take_outcomes() == []


def test_a_read_waits_until_what_was_committed_before_it_is_applied():
    drives = Drives(1)
    drive = drives.elect(1)
    drive.propose(b"x")
    work = drive.take_work()
    for write in merged_writes(work.appends, HardState()):
        drives.logs[1].append(write.entries, write.hard_state)
        for message in write.messages:
            drive.appended(message)
    slow = drive.take_work().applies
    assert slow
    read, abandoned = drive.read(), drive.read()
    drive.take_work()
    drive.abandon(abandoned)
    assert drive.take_outcomes() == []
    for each in slow:
        drive.applied(each, [b"" for _ in each.commands])
    outcomes = drive.take_outcomes()
    assert error_of(outcomes, read) is None
    assert abandoned not in [each.request for each in outcomes]


def test_there_is_no_lease_in_the_term_of_a_transfer():
    drives = Drives(3)
    drive = drives.elect(1)
    drive.read(now=1.0)
    drives.settle()
    assert drive.has_lease(1.0)
    drives.lost_types = {MessageType.TIMEOUT_NOW}
    request = Message(type=MessageType.TRANSFER_LEADER, to=1, from_=2, term=drive.term)
    drive.step(request)
    assert not drive.has_lease(1.0)
    drive.take_outcomes()
    # Asked for by lease it takes a round of heartbeats, and is right.
    drive.read(ReadKind.LEASE, now=1.0)
    drives.settle()
    assert only(drive).error is None


# -- other nodes


def test_entries_are_left_to_be_sent_again_while_the_disk_is_far_behind():
    drives = Drives(3, ConsensusSettings(max_inflight_messages=1))
    drives.elect(1)
    drives.idle_disks = {3}
    drives.lost = {2}
    for number in range(6):
        drives[3].step(
            Message(
                type=MessageType.APP,
                to=3,
                from_=1,
                term=drives[3].term,
                log_term=drives[3].term,
                index=2 + number,
                entries=(Entry(drives[3].term, 3 + number),),
            )
        )
        drives[3].take_work()
    assert drives[3].raw_node.raft.log.last_index() < 8


def test_a_node_that_cannot_be_reached_is_probed():
    drives = Drives(3)
    drive = drives.elect(1)
    drive.report_unreachable(2)
    assert "Probe" in str(drive.raw_node.status().progress[2])


def snap(drives: Drives, index: int) -> Message:
    metadata = SnapshotMetadata(index, 2, ConfState((1, 2, 3)))
    term = drives[3].term
    return Message(type=MessageType.SNAP, to=3, from_=1, term=term, snapshot=Snapshot(metadata))


def test_one_snapshot_is_fetched_at_a_time_and_another_after_a_failure():
    drives = Drives(3)
    drives.elect(1)
    first, second = snap(drives, 20), snap(drives, 30)
    drives[3].step(first)
    drives[3].step(second)
    assert drives[3].take_work().fetches == [first]
    drives[3].snapshot_failed(first)
    drives[3].step(second)
    assert drives[3].take_work().fetches == [second]
    drives[3].snapshot_fetched(second)
    assert drives[3].committed_index == 30


def test_a_snapshot_that_a_node_never_took_is_offered_again_and_one_that_it_took_is_not():
    drives = Drives(3)
    drive = drives.elect(1)
    progress = drive.raw_node.raft.tracker.progress
    progress[3].become_snapshot(2)
    drives.pass_time(SETTINGS.tick_s)
    assert drive._snapshot_since
    progress[3].become_replicate()
    drives.pass_time(SETTINGS.tick_s)
    assert not drive._snapshot_since
    progress[3].become_snapshot(2)
    drives.lost = {3}
    drives.pass_time(2 * SETTINGS.election_ticks * SETTINGS.tick_s + SETTINGS.tick_s)
    assert "Snapshot" not in str(progress[3])


def test_a_log_that_begins_behind_what_is_applied_is_refused():
    log = RamLog()
    log.restore((1, 5), [], HardState(1, 0, 5), None)
    with pytest.raises(LogDamaged, match="begins behind 5"):
        snapshot_to_adopt(log, 3, None)

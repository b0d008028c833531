"""The drive by hand: no loop, no clock, no disk."""

import random

import pytest
from msgspec.structs import replace

from ollamamax_p2p.consensus.core.drive import Drive, merged_writes, snapshot_to_adopt
from ollamamax_p2p.consensus.core.messages import (
    LOCAL_APPEND_THREAD,
    ConfChangeSingle,
    ConfChangeType,
    ConfChangeV2,
    ConfState,
    Entry,
    HardState,
    Message,
    MessageType,
    Snapshot,
    SnapshotMetadata,
)
from ollamamax_p2p.consensus.ram_log import RamLog
from ollamamax_p2p.consensus.replica import bootstrap_log
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.errors import LogDamaged, ProposalDropped


def append(*indexes: int, term: int = 1, state: HardState | None = None) -> Message:
    state = state or HardState()
    return Message(
        type=MessageType.STORAGE_APPEND,
        to=LOCAL_APPEND_THREAD,
        entries=tuple(Entry(term, index) for index in indexes),
        term=state.term,
        vote=state.vote,
        commit=state.commit,
    )


def alone() -> tuple[Drive, RamLog]:
    log = RamLog()
    bootstrap_log(log, [1])
    drive = Drive(
        1,
        log,
        applied=0,
        conf_state=ConfState(),
        settings=ConsensusSettings(),
        rng=random.Random(1),
    )
    do_all(drive, log)
    drive.campaign()
    do_all(drive, log)
    assert drive.leads
    return drive, log


def do_all(drive: Drive, log: RamLog) -> list:
    applied = []
    for _ in range(20):
        work = drive.take_work()
        for write in merged_writes(work.appends, HardState()):
            log.append(write.entries, write.hard_state)
            for message in write.messages:
                drive.appended(message)
        for each in work.applies:
            applied += each.commands
            drive.applied(each, [b"%d" % command.index for command in each.commands])
    return applied


def test_many_appends_are_one_write_and_what_is_replaced_is_not_written():
    [write] = merged_writes([append(5, 6, 7), append(6, term=2)], HardState())
    assert [(entry.index, entry.term) for entry in write.entries] == [(5, 1), (6, 2)]
    assert write.sync


def test_only_a_moved_commit_index_needs_no_fsync():
    [write] = merged_writes([append(state=HardState(3, 1, 9))], HardState(3, 1, 8))
    assert not write.sync
    [write] = merged_writes([append(state=HardState(4, 0, 9))], HardState(3, 1, 8))
    assert write.sync


def test_an_acknowledgement_of_what_an_earlier_write_made_durable_needs_none_of_its_own():
    answer = Message(type=MessageType.APP_RESP, to=2, from_=1, index=7)
    moved = replace(append(state=HardState(3, 1, 9)), responses=(answer,))
    [write] = merged_writes([moved], HardState(3, 1, 8))
    assert write.can_wait
    [write] = merged_writes([append(7), moved], HardState(3, 1, 8))
    assert write.sync
    voted = replace(append(state=HardState(3, 2, 8)), responses=(answer,))
    [write] = merged_writes([moved, voted], HardState(3, 1, 8))
    assert write.sync


def test_a_log_that_does_not_know_of_an_installed_snapshot_is_begun_anew():
    log = RamLog()
    bootstrap_log(log, [1])
    ahead = SnapshotMetadata(9, 2)
    assert snapshot_to_adopt(log, 9, ahead) == ahead
    assert snapshot_to_adopt(log, 1, SnapshotMetadata(1, 2)) == SnapshotMetadata(1, 2)
    assert snapshot_to_adopt(log, 1, SnapshotMetadata(1, 1)) is None
    with pytest.raises(LogDamaged):
        snapshot_to_adopt(log, 9, None)


@pytest.mark.parametrize(
    "message",
    [
        Message(type=MessageType.HUP, to=1, from_=2),
        Message(type=MessageType.APP_RESP, to=1, from_=7, term=2),
        Message(type=MessageType.APP, to=9, from_=2, term=2),
        Message(type=MessageType.APP, to=1, from_=1, term=2),
        Message(type=MessageType.STORAGE_APPEND_RESP, to=1, from_=LOCAL_APPEND_THREAD, term=2),
        Message(type=MessageType.SNAP, to=1, from_=2, term=2),
    ],
)
def test_what_no_correct_member_sends_is_counted_and_changes_nothing(message):
    drive, log = alone()
    before = (drive.term, drive.committed_index, log.last_index())
    drive.step(message)
    assert drive.messages_refused == 1
    assert (drive.term, drive.committed_index, log.last_index()) == before


def test_a_proposal_ends_with_its_result_and_nonsense_in_the_log_with_no_command():
    drive, log = alone()
    request = drive.propose(b"data")
    drive.raw_node.propose(b"\xc1nonsense")
    commands = do_all(drive, log)
    assert [command.data for command in commands if command.data] == [b"data"]
    [outcome] = drive.take_outcomes()
    assert (outcome.request, outcome.result) == (request, b"%d" % outcome.index)


def test_no_more_proposals_and_reads_wait_than_the_settings_say():
    drive, _ = alone()
    for _ in range(ConsensusSettings().proposals_waiting_max):
        drive.propose(b"x")
        drive.read()
    with pytest.raises(ProposalDropped, match="wait"):
        drive.propose(b"x")
    with pytest.raises(ProposalDropped, match="wait"):
        drive.read()


def test_no_more_changes_of_the_configuration_wait_than_the_settings_say():
    drive, _ = alone()
    change = ConfChangeV2(changes=(ConfChangeSingle(ConfChangeType.ADD_LEARNER_NODE, 2),))
    for _ in range(ConsensusSettings().proposals_waiting_max):
        drive.propose_conf_change(change)
    with pytest.raises(ProposalDropped, match="wait"):
        drive.propose_conf_change(change)


def test_a_leader_whose_disk_does_not_finish_a_write_steps_down():
    drive, _ = alone()
    drive.propose(b"data")
    drive.take_work()
    settings = ConsensusSettings()
    for _ in range(round(settings.disk_stall_s / settings.tick_s) + 1):
        drive.tick()
    assert not drive.leads
    assert drive.disk_stalls == 1


def test_a_leader_does_not_propose_again_what_is_in_its_own_log():
    drive, _ = alone()
    drive.propose(b"slow", session=1, sequence=1)
    drive.take_work()  # nobody says that it is written
    last = drive.raw_node.raft.log.last_index()
    for _ in range(35):  # longer than the patience with a lost one, shorter than with a disk
        drive.tick()
        drive.take_work()
    assert drive.leads
    assert drive.raw_node.raft.log.last_index() == last


def offer(*, to: int, voters: tuple[int, ...], learners: tuple[int, ...] = ()) -> Message:
    metadata = SnapshotMetadata(9, 1, ConfState(voters=voters, learners=learners))
    return Message(
        type=MessageType.SNAP, to=to, from_=1, term=1, snapshot=Snapshot(metadata)
    )  # fmt: skip


def new_node(raft_id: int) -> Drive:
    return Drive(
        raft_id,
        RamLog(),
        applied=0,
        conf_state=ConfState(),
        settings=ConsensusSettings(),
        rng=random.Random(1),
    )


def test_the_bytes_of_a_snapshot_in_which_one_is_no_member_are_not_fetched():
    drive = new_node(2)
    drive.step(offer(to=2, voters=(1,)))
    assert drive.take_work().fetches == []
    drive.step(offer(to=2, voters=(1,), learners=(2,)))
    assert len(drive.take_work().fetches) == 1


def test_a_new_member_is_offered_no_snapshot_from_before_it_was_added():
    drive, log = alone()
    for number in range(5):
        drive.propose(b"command %d" % number)
        do_all(drive, log)
    at = drive.applied_index

    def save_snapshot(index: int, conf_state: ConfState) -> None:
        log.save_snapshot(Snapshot(SnapshotMetadata(index, log.term(index), conf_state)))
        log.compact(index)

    save_snapshot(at, ConfState(voters=(1,)))
    change = ConfChangeSingle(ConfChangeType.ADD_LEARNER_NODE, 2)
    drive.propose_conf_change(ConfChangeV2(changes=(change,)))
    do_all(drive, log)
    assert not snapshots_offered(drive)
    save_snapshot(drive.applied_index, ConfState(voters=(1,), learners=(2,)))
    [offered] = snapshots_offered(drive)
    assert offered.to == 2
    assert offered.snapshot.metadata.conf_state.learners == (2,)


def snapshots_offered(drive: Drive) -> list[Message]:
    """By the time at which it has answered a heartbeat."""
    sent = []
    for _ in range(10):
        drive.tick()
        sent += drive.take_work().sends
        beat = Message(type=MessageType.HEARTBEAT_RESP, to=1, from_=2, term=drive.term)
        drive.step(beat)
        probed = drive.raw_node.raft.tracker.progress[2].next - 1
        lacks_it = Message(
            type=MessageType.APP_RESP, to=1, from_=2, term=drive.term, index=probed, reject=True
        )  # fmt: skip
        drive.step(lacks_it)
        sent += drive.take_work().sends
    return [each for each in sent if each.type is MessageType.SNAP]


def following(settings: ConsensusSettings) -> Drive:
    """Member 1 of three, which follows 3."""
    log = RamLog()
    bootstrap_log(log, [1, 2, 3])
    drive = Drive(
        1, log, applied=0, conf_state=ConfState(), settings=settings, rng=random.Random(1)
    )
    do_all(drive, log)
    drive.step(Message(type=MessageType.HEARTBEAT, to=1, from_=3, term=2, commit=3))
    do_all(drive, log)
    assert drive.leader == 3
    return drive


def asked(drive: Drive) -> list[Message]:
    sends = drive.take_work().sends
    return [each for each in sends if each.type is MessageType.READ_INDEX]


def test_a_read_takes_the_answer_to_an_attempt_that_it_had_given_up():
    """A round trip that is longer than the patience must not keep it from ever ending."""
    settings = ConsensusSettings()
    drive = following(settings)
    request = drive.read()
    [first] = asked(drive)
    again = []
    while len(again) < 2:
        drive.tick()
        drive.step(Message(type=MessageType.HEARTBEAT, to=1, from_=3, term=2, commit=3))
        again += asked(drive)
    assert len({first.entries, *(each.entries for each in again)}) == 3  # none is used twice
    answer = Message(
        type=MessageType.READ_INDEX_RESP, to=1, from_=3, term=2, index=3, entries=first.entries
    )
    drive.step(answer)
    drive.take_work()
    assert [outcome.request for outcome in drive.take_outcomes()] == [request]
    later = drive.read()
    drive.step(answer)  # repeated, it says nothing about what was asked for since
    drive.take_work()
    assert drive.take_outcomes() == []
    assert drive.requests_waiting == 1
    drive.abandon(later)


def test_a_leader_whose_disk_stalls_steps_down_and_may_lead_again_after():
    settings = ConsensusSettings()
    log = RamLog()
    bootstrap_log(log, [1, 2, 3])
    drive = Drive(
        1, log, applied=0, conf_state=ConfState(), settings=settings, rng=random.Random(1)
    )
    do_all(drive, log)
    drive.campaign()
    do_all(drive, log)
    for kind in (MessageType.PRE_VOTE_RESP, MessageType.VOTE_RESP):
        term = drive.term + (kind is MessageType.PRE_VOTE_RESP)
        drive.step(Message(type=kind, to=1, from_=2, term=term))
        do_all(drive, log)
    assert drive.leads
    drive.propose(b"x")
    stalled = drive.take_work().appends
    assert stalled
    ticks = 0
    while drive.leads:
        # Its followers answer all the time: only the disk is slow.
        heard = Message(type=MessageType.HEARTBEAT_RESP, to=1, from_=2, term=drive.term)
        drive.step(heard)
        drive.tick()
        drive.take_work()
        ticks += 1
    assert ticks * settings.tick_s <= settings.disk_stall_s + settings.tick_s
    assert drive.disk_is_stalled
    assert drive.disk_stalls == 1
    for _ in range(10 * settings.election_ticks):
        drive.tick()
        drive.take_work()
    assert not drive.raw_node.raft.role.name.endswith("CANDIDATE")  # it does not even try
    for write in merged_writes(stalled, HardState()):
        log.append(write.entries, write.hard_state)
        for message in write.messages:
            drive.appended(message)
    do_all(drive, log)
    assert not drive.disk_is_stalled
    for _ in range(3 * settings.election_ticks):
        drive.tick()
        do_all(drive, log)
    assert drive.raw_node.raft.role.name == "PRE_CANDIDATE"


@pytest.mark.parametrize("kind", [MessageType.PROP, MessageType.READ_INDEX])
def test_what_is_for_a_leader_goes_no_further_from_one_that_is_none(kind):
    """It would go in its sender's name, and who does that is taken for hostile."""
    drive = following(ConsensusSettings())
    entries = (Entry(0, 0, data=b"x"),)
    drive.step(Message(type=kind, to=1, from_=2, entries=entries))
    assert [each for each in drive.take_work().sends if each.from_ != 1] == []
    assert drive.messages_refused == 0


@pytest.mark.parametrize("kind", [MessageType.APP, MessageType.VOTE, MessageType.PRE_VOTE])
def test_nothing_piles_up_while_the_disk_finishes_no_write(kind):
    """Also no answers, which leave when what they speak of is durable."""
    settings = ConsensusSettings(max_inflight_messages=4)
    drive = following(settings)
    waiting = 0
    for number in range(500):
        # An election timeout's silence, or a vote is not considered at all.
        if kind is not MessageType.APP:
            for _ in range(settings.election_ticks):
                drive.tick()
        term = drive.term + (kind is not MessageType.APP)
        at = {"log_term": 1, "index": 3 + (number if kind is not MessageType.APP else 0)}
        drive.step(Message(type=kind, to=1, from_=3, term=term, commit=3, **at))
        waiting += len(drive.take_work().appends)
    assert waiting <= 4 * settings.max_inflight_messages

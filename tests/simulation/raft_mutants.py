"""Mistakes that an implementation of Raft can make, each put into ours for the time of a test.

Most are from the field: bugs that were found in etcd, dqlite, openraft, Redis-Raft, in the thesis'
own rule for changes of one server, and in this project by the simulation itself. A harness that
lets one live is not to be trusted (Antithesis' "brown M&Ms").
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from ollamamax_p2p.consensus import storage_work
from ollamamax_p2p.consensus.core import raft
from ollamamax_p2p.consensus.core.drive import Drive, Outcome
from ollamamax_p2p.consensus.core.log import RaftLog
from ollamamax_p2p.consensus.core.messages import NOBODY, MessageType, StateRole
from ollamamax_p2p.consensus.core.progress import Inflights
from ollamamax_p2p.consensus.core.quorum import JointConfig, MajorityConfig, VoteResult
from ollamamax_p2p.consensus.core.raft import Campaign, Raft
from ollamamax_p2p.consensus.core.read_only import ReadIndexRound, ReadOnly
from ollamamax_p2p.consensus.core.sessions import SessionTable
from ollamamax_p2p.consensus.core.tracker import Tracker
from ollamamax_p2p.consensus.file_log import FileLog
from ollamamax_p2p.testing.key_value import KeyValue


@dataclass(frozen=True)
class Mutant:
    """One mistake."""

    name: str
    owner: object
    attribute: str
    wrong: object
    found_by: int = 0
    """A seed that kills it, tried first."""

    @contextmanager
    def alive(self) -> Iterator[None]:
        """While the block is open, the product makes this mistake."""
        right = getattr(self.owner, self.attribute)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.owner, self.attribute, self.wrong)
            for table in (raft._FOLLOWER_STEPS, raft._CANDIDATE_STEPS, raft._LEADER_STEPS):
                for kind, handle in table.items():
                    if handle is right:
                        patch.setitem(table, kind, self.wrong)
            yield


def _vote_without_fsync(log, write):
    if write.snapshot is not None:
        return _carry_out_write(log, write)
    return log.append(write.entries, write.hard_state, sync=bool(write.entries))


def _acknowledge_before_fsync(log, write):
    if write.snapshot is not None:
        return _carry_out_write(log, write)
    return log.append(write.entries, write.hard_state, sync=False)


def _write_entries_only(log, write):
    """Term and vote are not written."""
    if write.snapshot is not None:
        return _carry_out_write(log, write)
    return log.append(write.entries, sync=True)


_carry_out_write = storage_work.carry_out_write


def _commit_what_a_majority_holds(node):
    index = node.tracker.committed()
    news = node.log.committed < index <= node.log.last_index()
    if news:
        node.log.commit_to(index)
    return news


def _commit_by_all_members(tracker):
    members = MajorityConfig(tracker.progress)
    return members.committed_index(tracker._match_of)


def _pre_candidate_without_vote(node):
    _become_pre_candidate(node)
    node.vote = NOBODY


_become_pre_candidate = Raft.become_pre_candidate


def _ask_with_the_same_context(drive, requests):
    drive._attempts = 0
    _ask_read_index(drive, requests)


_ask_read_index = Drive._ask_read_index


def _add_with_the_same_context(reads, index, request, *, term, leader):
    """As if it were the request's own, which a client uses again when it asks again."""
    context = b"context of client"
    reads._rounds.pop(context, None)
    reads._rounds[context] = ReadIndexRound(context, request, index, {leader: True})
    return context


def _commit_by_the_incoming_half(joint, acked):
    return joint.incoming.committed_index(acked)


def _elect_by_the_incoming_half(joint, votes):
    return joint.incoming.vote_result(votes)


def _append_without_looking(log, previous, entries, commit):
    """An old append, come late, cuts off what came after it."""
    if not log.matches(previous):
        return None
    last = previous[1] + len(entries)
    if entries:
        log.unstable.truncate_and_append(entries)
    log.commit_to(min(commit, last))
    return last


def _changes_are_never_pending(node, change):
    is_joint = node.tracker.config.voters.is_joint
    if is_joint and change.changes:
        return "must transition out of joint config first"
    if not is_joint and not change.changes:
        return "not in joint state; refusing empty conf change"
    return ""


def _lead_with_nothing_pending(node):
    _become_leader(node)
    node.pending_conf_index = 0


_become_leader = Raft.become_leader


def _lease_in_spite_of_a_transfer(drive, now):
    term, since = drive._lease
    return drive.leads and term == drive.term and now - since < drive._lease_s


def _lease_of_three_timeouts(drive):
    return 3 * drive._settings.election_ticks * drive._settings.tick_s


def _carry_out_again(table, session, sequence, index, apply):
    return apply() if session in table.rows else _once(table, session, sequence, index, apply)


_once = SessionTable.once


def _load_half(state_machine, state):
    kept = dict(list(state.values.items())[: len(state.values) // 2])
    state.values.clear()
    state.values.update(kept)
    _load(state_machine, state)


_load = KeyValue._load


def _lead_by_the_votes_of_others(node, message):
    """What the raft of etcd does, and ours did."""
    pre = node.role is StateRole.PRE_CANDIDATE
    if message.type is not (MessageType.PRE_VOTE_RESP if pre else MessageType.VOTE_RESP):
        return
    node.tracker.record_vote(message.from_, not message.reject)
    _, _, result = node.tracker.tally()
    if result is VoteResult.LOST:
        node.become_follower(node.term, NOBODY)
    elif result is VoteResult.WON and pre:
        node._campaign(Campaign.ELECTION)
    elif result is VoteResult.WON:
        node.become_leader()
        node._broadcast_append()


def _answer_reads_at_once(node, message):
    node._answer_read(message, node.log.committed)


def _load_without_vote(node, state):
    _load_state(node, state)
    node.vote = NOBODY


_load_state = Raft._load


def _heartbeats_commit_everything(node, context):
    for other in node._others():
        node._send(MessageType.HEARTBEAT, other, commit=node.log.committed, context=context)


def _vote_for_everybody(node, message):
    node.vote = NOBODY
    node.leader = NOBODY
    _on_vote_request(node, message)


_on_vote_request = Raft._on_vote_request


def _refused_appends_are_forgotten(drive):
    _append_failed(drive)
    drive._appends._held = []


_append_failed = Drive.append_failed


def _fill_with_zeros_from_the_front(log, segment):
    """What ours did: a full disk may stop it in the middle of a header."""
    size = segment.dirty_end - segment.end
    try:
        log._files.write(segment.name, segment.end, bytes(size))
    except OSError as error:
        raise log._full(size) from error
    log._sync_file(segment.name)
    segment.synced, segment.dirty_end = segment.end, 0


def _finish_reads_before_they_are_applied(drive):
    confirmed, drive._reads_confirmed = drive._reads_confirmed, []
    for _, request in confirmed:
        if drive._reads.pop(request, None) is not None:
            drive._outcomes.append(Outcome(request, drive.applied_index))


def _true(*_arguments):
    return True


def _false(*_arguments):
    return False


def _nothing(*_arguments, **_named):
    return None


MUTANTS = [
    # The list of the fault catalogue.
    Mutant("no fsync before a vote", storage_work, "carry_out_write", _vote_without_fsync),
    Mutant(
        "acknowledged before the fsync", storage_work, "carry_out_write", _acknowledge_before_fsync
    ),
    Mutant(
        "an entry of an older term is committed by counting",
        Raft,
        "_maybe_commit",
        _commit_what_a_majority_holds,
    ),
    Mutant(
        "learners count in the quorum", Tracker, "committed", _commit_by_all_members, found_by=6
    ),
    Mutant(
        "a pre-vote takes the vote back", Raft, "become_pre_candidate", _pre_candidate_without_vote
    ),
    Mutant(
        "a read is asked again with the same context",
        Drive,
        "_ask_read_index",
        _ask_with_the_same_context,
        found_by=142,
    ),
    Mutant(
        "rounds of heartbeats share a context",
        ReadOnly,
        "add",
        _add_with_the_same_context,
        found_by=5,
    ),
    Mutant(
        "one half of a joint configuration commits",
        JointConfig,
        "committed_index",
        _commit_by_the_incoming_half,
        found_by=114,
    ),
    Mutant(
        "one half of a joint configuration elects",
        JointConfig,
        "vote_result",
        _elect_by_the_incoming_half,
        found_by=6,
    ),
    Mutant("a vote without a look at the log", RaftLog, "is_up_to_date", _true),
    Mutant(
        "applied before it is durable",
        RaftLog,
        "max_appliable_index",
        lambda log, **_: log.committed,
    ),
    Mutant("a late append cuts the log", RaftLog, "maybe_append", _append_without_looking),
    Mutant(
        "a change while another is pending",
        Raft,
        "_problem_with",
        _changes_are_never_pending,
        found_by=1,
    ),
    Mutant(
        "a change before the new leader has committed",
        Raft,
        "become_leader",
        _lead_with_nothing_pending,
        found_by=3,
    ),
    Mutant(
        "a lease in spite of a transfer",
        Drive,
        "has_lease",
        _lease_in_spite_of_a_transfer,
        found_by=42,
    ),
    # And more.
    Mutant(
        "term and vote are not written",
        storage_work,
        "carry_out_write",
        _write_entries_only,
        found_by=3,
    ),
    Mutant(
        "a lease that is too long",
        Drive,
        "_lease_s",
        property(_lease_of_three_timeouts),
        found_by=39,
    ),
    Mutant("a command is carried out again", SessionTable, "once", _carry_out_again),
    Mutant("half of a snapshot is installed", KeyValue, "_load", _load_half, found_by=1),
    Mutant(
        "a snapshot is taken before its bytes are there", Drive, "_needs_bytes", _false, found_by=1
    ),
    Mutant(
        "an installed snapshot is not adopted",
        storage_work,
        "snapshot_to_adopt",
        _nothing,
        found_by=24,
    ),
    Mutant(
        "a leader before its own vote is durable",
        Raft,
        "_on_vote_answer",
        _lead_by_the_votes_of_others,
        found_by=32,
    ),
    Mutant(
        "a read that nobody confirms", Raft, "_confirm_for_read", _answer_reads_at_once, found_by=2
    ),
    Mutant(
        "a read before the first commit of the term",
        Raft,
        "_has_committed_in_this_term",
        _true,
        found_by=16,
    ),
    Mutant(
        "a read before its index is applied",
        Drive,
        "_finish_reads",
        _finish_reads_before_they_are_applied,
    ),
    Mutant("a restart forgets the vote", Raft, "_load", _load_without_vote, found_by=162),
    Mutant("a second vote in a term", Raft, "_on_vote_request", _vote_for_everybody),
    Mutant(
        "a heartbeat commits what the follower may not hold",
        Raft,
        "_broadcast_heartbeat",
        _heartbeats_commit_everything,
    ),
    Mutant(
        "what a full disk refused is lost", Drive, "append_failed", _refused_appends_are_forgotten
    ),
    Mutant(
        "a torn write is half cleaned",
        FileLog,
        "_clean",
        _fill_with_zeros_from_the_front,
        found_by=10,
    ),
    Mutant("a joint configuration is not left", Raft, "_leave_joint", _nothing, found_by=1),
    Mutant("the window of appends is not bounded", Inflights, "is_full", property(_false)),
]

"""Recovery: one node becomes the only voter of a cluster whose other voters are lost for good.

Raft cannot allow that, because it cannot know that they are lost: a majority that lives somewhere
else would go on agreeing beside this node. So a person decides, and it is called unsafe.

What is kept is all that this node has: its state, and every entry in its log, applied as if all had
been agreed on. Some may not have been, and others, which the lost voters had agreed on without it,
are missing; nobody can tell. Therefore

- the other voters are expelled: each may hold another history. They come back as newcomers.
- all tickets are withdrawn: one may have been used in what is missing.
- the learners stay, also one that is ahead. What they hold need not fit either, so everybody's log
  ends here: the outcome is a snapshot, far ahead of any index and term that were ever in use, and
  each learner is sent it whole. Fencing tokens and Raft ids, which are indexes, go on growing.

**Crashes.** The outcome is made beside the state, in a folder of its own. Then, each durable before
the next:

1. The log is given the new term, which harms nobody: nodes hear of higher terms all the time.
2. The state becomes the snapshot, as one from a leader is installed: all of it or nothing.
3. The log begins anew behind it.

Before 2 this is the old cluster still. After it, whoever opens the log carries out 3 himself
(`snapshot_to_adopt`). So no crash leaves anything to mend, and doing all of it again does no harm.
"""

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ollamamax_p2p.cluster.cluster_state import ClusterState, open_cluster_state
from ollamamax_p2p.cluster.core.commands import (
    AnyCommand,
    Refused,
    RemoveMember,
    WithdrawTickets,
    decode_result,
    encode_command,
)
from ollamamax_p2p.cluster.core.rows import Member
from ollamamax_p2p.cluster.place import load_place
from ollamamax_p2p.consensus import Command, ConsensusSettings, FileLog, open_file_log
from ollamamax_p2p.consensus.core.config_change import decode_conf_change
from ollamamax_p2p.consensus.core.drive import Drive, command_of, proposal_of, snapshot_to_adopt
from ollamamax_p2p.consensus.core.messages import (
    ConfState,
    Entry,
    EntryType,
    HardState,
    Snapshot,
    SnapshotMetadata,
)
from ollamamax_p2p.errors import BadInput

INDEX_GAP = 1_000_000
"""Entries that the lost voters may have agreed on without this node: at a thousand a second it was
away for a quarter of an hour; at what a cluster of ours agrees on, for weeks."""

TERM_GAP = 1_000
"""Elections that this node may not have heard of."""

_PIECE_BYTES = 1024 * 1024
_ALL_BYTES = 2**62


class RecoveredMember(msgspec.Struct, frozen=True):
    """Who is told of."""

    peer_id: str
    name: str
    raft_id: int


class RecoveryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a recovery will do, or has done."""

    peer_id: str
    """This node, from now on the only voter."""
    name: str
    raft_id: int
    voted: bool
    """It has been a voter. A learner may lack more of what was agreed."""
    last_index: int
    """Of the last entry that this node has."""
    last_term: int
    unconfirmed: int
    """Entries at the end of its log of which it does not know whether they were agreed on; they
    will count as if they had been."""
    expelled: tuple[RecoveredMember, ...]
    """The other voters."""
    learners: tuple[RecoveredMember, ...]
    """Who stays a member."""
    tickets: int
    """Withdrawn; those that could still be used."""
    new_index: int
    new_term: int


class Recovery:
    """A recovery that has been prepared. Made by `open_recovery`."""

    def __init__(
        self,
        raft_id: int,
        log: FileLog,
        state: ClusterState,
        outcome: ClusterState,
        voters: set[int],
    ) -> None:
        """outcome: a copy of the state, with the whole log applied; voters: all who may think that
        they vote.
        """
        self._log = log
        self._state = state
        self._outcome = outcome
        self.plan = self._planned(raft_id, voters)

    def _planned(self, raft_id: int, voters: set[int]) -> RecoveryPlan:
        outcome = self._outcome
        me = _member(outcome, raft_id)
        if not outcome.members():
            raise BadInput(
                "this node knows nothing yet of what its cluster has agreed on; recover another"
            )
        if me is None:
            raise BadInput(
                "this node is no member of its cluster any more, and cannot speak for it; recover "
                "another"
            )
        if voters == {raft_id}:
            raise BadInput("this node is the only voter already: start it, `omx up`")
        hard_state, _ = self._log.initial_state()
        members = sorted(outcome.members().values(), key=lambda each: each.raft_id)
        others = [each for each in members if each.raft_id != raft_id]
        last = outcome.applied_index
        return RecoveryPlan(
            peer_id=me.peer,
            name=me.name,
            raft_id=raft_id,
            voted=raft_id in voters,
            last_index=last,
            last_term=outcome.applied_term,
            unconfirmed=max(0, last - max(hard_state.commit, self._state.applied_index)),
            expelled=tuple(_told(each) for each in others if each.raft_id in voters),
            learners=tuple(_told(each) for each in others if each.raft_id not in voters),
            tickets=outcome.tickets().alive,
            new_index=last + INDEX_GAP,
            new_term=max(hard_state.term, outcome.applied_term) + TERM_GAP,
        )

    def carry_out(self) -> None:
        """Do it; blocks. Raises LocalTrouble. Whatever happens, this node can be started behind it,
        or recovered again.
        """
        plan, outcome = self.plan, self._outcome
        _apply(outcome, plan)
        metadata = outcome.make_snapshot(plan.new_term)
        hard_state, _ = self._log.initial_state()
        self._log.append((), HardState(term=plan.new_term, commit=hard_state.commit))
        _hand_over(outcome, metadata, self._state)
        self._log.install_snapshot(
            Snapshot(metadata), HardState(term=plan.new_term, commit=metadata.index)
        )


@contextlib.contextmanager
def open_recovery(folder: Path, settings: ConsensusSettings) -> Iterator[Recovery]:
    """Prepare to make the node with this folder the only voter of its cluster; nothing that counts
    is changed until `carry_out`. Blocks. The node must not run.

    folder: see `cluster_folder`. Raises BadInput where there is nothing to recover, LogDamaged and
    other LocalTrouble.
    """
    place = load_place(folder)
    with contextlib.ExitStack() as opened:
        state = opened.enter_context(contextlib.closing(open_cluster_state(folder / "state")))
        log = opened.enter_context(contextlib.closing(open_file_log(folder / "log", settings)))
        begun = snapshot_to_adopt(log, state.applied_index, state.newest_snapshot())
        if begun is not None:
            log.install_snapshot(Snapshot(begun))
        beside = folder / "recovering"
        shutil.rmtree(beside, ignore_errors=True)  # of a recovery that did not come to its end
        opened.callback(shutil.rmtree, beside, ignore_errors=True)
        outcome = opened.enter_context(contextlib.closing(open_cluster_state(beside)))
        if state.applied_index:
            _hand_over(state, state.make_snapshot(state.applied_term), outcome)
        voters = _apply_log(log, outcome, place.raft_id, settings)
        yield Recovery(place.raft_id, log, state, outcome, voters)


def _apply_log(
    log: FileLog, outcome: ClusterState, raft_id: int, settings: ConsensusSettings
) -> set[int]:
    """Apply what the state lacks of the log; gives the Raft ids of all who vote in one of the
    configurations from the state's on.
    """
    applied, conf_state = outcome.applied_index, outcome.conf_state
    # Nothing runs it: it knows how configurations follow each other.
    drive = Drive(
        raft_id,
        log,
        applied=applied,
        conf_state=conf_state,
        settings=settings,
        rng=random.Random(raft_id),
    )
    if not applied:
        conf_state = log.initial_state()[1]
    voters = _voters(conf_state)
    commands = []
    for entry in log.entries(applied + 1, log.last_index() + 1, _ALL_BYTES):
        command = _command(entry, drive)
        if command.conf_state is not None:
            voters |= _voters(command.conf_state)
        commands.append(command)
    outcome.apply(commands)
    return voters


def _command(entry: Entry, drive: Drive) -> Command:
    """As the replica would hand it to the state."""
    if entry.type is EntryType.NORMAL:
        return command_of(entry, proposal_of(entry))
    try:
        conf_state = drive.raw_node.apply_conf_change(decode_conf_change(entry))
    except ValueError:  # one that does not fit changes nothing, on no replica
        return command_of(entry, None)
    return command_of(entry, proposal_of(entry), conf_state)


def _apply(outcome: ClusterState, plan: RecoveryPlan) -> None:
    """The plan, as commands: the first makes voters of those who stay one, so that the others may
    be removed; the last has the new index.
    """
    learners = tuple(sorted(each.raft_id for each in plan.learners))
    conf_state = ConfState(voters=(plan.raft_id,), learners=learners)
    changes: list[AnyCommand] = [
        WithdrawTickets(),
        *(RemoveMember(peer=each.peer_id) for each in plan.expelled),
    ]
    first = plan.new_index - len(changes)
    commands = [Command(first, plan.new_term, b"", conf_state=conf_state)]
    for index, change in enumerate(changes, first + 1):
        commands.append(Command(index, plan.new_term, encode_command(change)))
    for result in outcome.apply(commands)[1:]:
        decoded = decode_result(result)
        assert not isinstance(decoded, Refused), decoded


def _hand_over(source: ClusterState, metadata: SnapshotMetadata, target: ClusterState) -> None:
    """Make one state what a snapshot of another is, durably, all of it or nothing."""
    with contextlib.closing(source.open_snapshot(metadata)) as reader:
        size, sha256 = reader.size, reader.sha256
        with contextlib.closing(target.receive_snapshot(metadata, size, sha256)) as writer:
            while piece := reader.read(writer.received, _PIECE_BYTES):
                writer.write(piece)
    target.install_snapshot(metadata, size, sha256)


def _voters(conf_state: ConfState) -> set[int]:
    return {*conf_state.voters, *conf_state.voters_outgoing}


def _member(state: ClusterState, raft_id: int) -> Member | None:
    peer = state.peer_of(raft_id)
    return None if peer is None else state.member(peer)


def _told(member: Member) -> RecoveredMember:
    return RecoveredMember(member.peer, member.name, member.raft_id)

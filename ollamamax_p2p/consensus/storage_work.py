"""What a replica does with its log and its state machine, each a call that blocks and has no loop.

`replica` makes these calls in threads, one at a time for the log and one at a time for the state
machine; `testing.simulated_cluster` makes them at moments of its choice. So what the simulation
checks is what runs.
"""

import random
from collections.abc import Callable, Sequence

from ollamamax_p2p.consensus.core.drive import Apply, Drive, Write, snapshot_to_adopt
from ollamamax_p2p.consensus.core.log_errors import SnapshotTemporarilyUnavailable
from ollamamax_p2p.consensus.core.logger import Logger
from ollamamax_p2p.consensus.core.messages import (
    ConfState,
    HardState,
    Snapshot,
    SnapshotMetadata,
)
from ollamamax_p2p.consensus.core.tracing import TraceSink
from ollamamax_p2p.consensus.log_storage import LogStorage
from ollamamax_p2p.consensus.settings import ConsensusSettings
from ollamamax_p2p.consensus.state_machine import StateMachine


def open_drive(
    raft_id: int,
    log: LogStorage,
    state_machine: StateMachine,
    *,
    settings: ConsensusSettings,
    rng: random.Random,
    logger: Logger | None = None,
    trace: TraceSink | None = None,
    name_of: Callable[[int], str] = "node {}".format,
) -> Drive:
    """A Drive that goes on where log and state machine are. Raises LogDamaged if they do not belong
    together; LocalTrouble of both.
    """
    begun = snapshot_to_adopt(log, state_machine.applied_index, state_machine.newest_snapshot())
    if begun is not None:
        log.install_snapshot(Snapshot(begun))
    return Drive(
        raft_id,
        log,
        applied=state_machine.applied_index,
        conf_state=state_machine.conf_state,
        settings=settings,
        rng=rng,
        logger=logger,
        trace=trace,
        name_of=name_of,
    )


class WaitingCommit:
    """A commit index that has only moved. Nothing depends on its being durable, so it costs neither
    a write nor an fsync of its own: the next write that cannot wait takes it along.
    """

    def __init__(self) -> None:
        self.state: HardState | None = None
        """None: nothing waits."""

    def may_wait(self, write: Write) -> bool:
        """Whether this write need not be carried out: its messages may go. If it must be, it takes
        along what waited.
        """
        write.hard_state = write.hard_state or self.state
        self.state = write.hard_state if write.can_wait else None
        return write.can_wait


def carry_out_write(log: LogStorage, write: Write) -> None:
    """Durable when it returns. Raises StoreFull with nothing written, LogSyncFailed."""
    if write.snapshot is None:
        log.append(write.entries, write.hard_state, sync=write.sync)
        return
    log.install_snapshot(write.snapshot, write.hard_state)
    if write.entries:
        log.append(write.entries)


def carry_out_applies(
    state_machine: StateMachine, batch: Sequence[Apply]
) -> list[list[bytes | None]]:
    """In one transaction; the results of each, None for what came with a snapshot that lies ahead.
    Raises StoreFull with nothing applied.
    """
    done = state_machine.applied_index
    commands = [each for apply in batch for each in apply.commands if each.index > done]
    results = iter(state_machine.apply(commands) if commands else [])
    return [
        [next(results) if command.index > done else None for command in apply.commands]
        for apply in batch
    ]


def make_snapshot(log: LogStorage, state_machine: StateMachine) -> SnapshotMetadata | None:
    """Of what is applied; None if there is one, or if one from the leader is just coming in."""
    index = state_machine.applied_index
    if index > log.last_index() or index <= snapshot_index(log):
        return None
    return state_machine.make_snapshot(log.term(index))


def let_go(log: LogStorage, metadata: SnapshotMetadata, *, trailing_entries: int) -> None:
    """Have the log remember a snapshot that was made here, and drop what lies far behind it."""
    if metadata.index <= snapshot_index(log):
        return  # one from the leader has overtaken it
    log.save_snapshot(Snapshot(metadata))
    behind = metadata.index - trailing_entries
    if behind >= log.first_index():
        log.compact(behind)


def snapshot_index(log: LogStorage) -> int:
    """Of the newest one; 0 if there is none."""
    try:
        return log.snapshot().metadata.index
    except SnapshotTemporarilyUnavailable:
        return 0


def snapshot_lacks_member(log: LogStorage, now: ConfState) -> bool:
    """A member takes no snapshot in which it is none, and if the log begins late it needs one: so
    who is added costs a snapshot. now: the configuration in force.
    """
    if log.first_index() == 1:
        return False
    made = log.snapshot().metadata.conf_state
    known = {*made.voters, *made.voters_outgoing, *made.learners}
    return not known.issuperset((*now.voters, *now.learners))

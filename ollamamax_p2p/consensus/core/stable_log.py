"""LogReader: what the core reads of the stable log; etcd's `Storage`."""

from typing import Protocol

from ollamamax_p2p.consensus.core.messages import ConfState, Entry, HardState, Snapshot


class LogReader(Protocol):
    """Reading never waits for a disk."""

    def initial_state(self) -> tuple[HardState, ConfState]:
        """What was durable when the log was opened; of a new log HardState(), ConfState().

        The ConfState is that of the last snapshot.
        """

    def entries(self, low: int, high: int, max_bytes: int) -> list[Entry]:
        """Entries [low, high), as many from the front as fit max_bytes (by `entry_size`), at least
        one.

        Raises Compacted if low < first_index(), Unavailable if high > last_index() + 1.
        """

    def term(self, index: int) -> int:
        """The term of an entry in [first_index() - 1, last_index()].

        Raises Compacted below that range and Unavailable above.
        """

    def first_index(self) -> int:
        """The first index that `entries` can give; one more than the last compacted."""

    def last_index(self) -> int:
        """The last entry's index; first_index() - 1 if there is none."""

    def snapshot(self) -> Snapshot:
        """The newest snapshot that can be sent. Raises SnapshotTemporarilyUnavailable."""

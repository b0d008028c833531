"""LogStorage: what must be durable before what.

Two implementations pass one contract suite (`tests/contracts/test_log_storage.py`): `FileLog`, a
segmented write-ahead log, and `RamLog`. Reading never waits for a disk: the entries since the last
compaction are in RAM too, bounded because the replica compacts behind its snapshots.

Reads and `append` may run in different threads: one task writes, the replica's loop reads.
"""

from collections.abc import Sequence
from typing import Protocol

from ollamamax_p2p.consensus.core.messages import Entry, HardState, Snapshot
from ollamamax_p2p.consensus.core.stable_log import LogReader


class LogStorage(LogReader, Protocol):
    """A log that is written. All methods but `close` raise LocalTrouble when the disk does."""

    def append(
        self,
        entries: Sequence[Entry] = (),
        hard_state: HardState | None = None,
        *,
        sync: bool = True,
    ) -> None:
        """Write both in one step; durable when it returns if sync is True.

        The first entry may overwrite: everything from its index on is replaced. With sync=False
        they are durable after the next synced call. Raises StoreFull after taking everything of
        this call back, so that it can be tried again; LogSyncFailed if the disk could not say that
        they are durable: then the process must end, see that error.
        """

    def install_snapshot(self, snapshot: Snapshot, hard_state: HardState | None = None) -> None:
        """Begin anew behind a snapshot that has been received and is durable in the state machine:
        all entries go. Durable when it returns. Raises ValueError if it is older than the last one.
        """

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """Remember a snapshot that was made here; entries stay until `compact`. Durable when it
        returns. Raises ValueError if its index is beyond the last entry or behind an older one.
        """

    def compact(self, index: int) -> None:
        """Drop entries up to and with index, which a saved snapshot covers. Disk space comes back
        segment by segment. Raises ValueError if no saved snapshot covers it, Compacted if done.
        """

    def close(self) -> None:
        """Give the files back; never raises."""

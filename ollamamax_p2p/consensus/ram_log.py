"""RamLog: the log in memory. What FileLog keeps beside its file, and what simulations run on."""

import threading
from collections.abc import Sequence

from ollamamax_p2p.consensus.core.log import EntryId
from ollamamax_p2p.consensus.core.log_errors import (
    Compacted,
    SnapshotTemporarilyUnavailable,
    Unavailable,
)
from ollamamax_p2p.consensus.core.messages import (
    ConfState,
    Entry,
    HardState,
    Snapshot,
    limited,
)


class RamLog:
    """LogStorage that forgets everything when the process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._compacted = (0, 0)
        """Term and index of the last entry that is not kept."""
        self._entries: list[Entry] = []
        self._hard_state = HardState()
        self._snapshot = Snapshot()

    # -- reading

    def initial_state(self) -> tuple[HardState, ConfState]:
        """See LogReader."""
        with self._lock:
            return self._hard_state, self._snapshot.metadata.conf_state

    def entries(self, low: int, high: int, max_bytes: int) -> list[Entry]:
        """See LogReader."""
        with self._lock:
            offset = self._compacted[1] + 1
            if low < offset:
                raise Compacted(low)
            if high > offset + len(self._entries):
                raise Unavailable(high)
            found = self._entries[low - offset : high - offset]
        return limited(found, max_bytes)

    def term(self, index: int) -> int:
        """See LogReader."""
        with self._lock:
            term, compacted = self._compacted
            if index == compacted:
                return term
            if index < compacted:
                raise Compacted(index)
            if index > compacted + len(self._entries):
                raise Unavailable(index)
            return self._entries[index - compacted - 1].term

    def first_index(self) -> int:
        """See LogReader."""
        return self._compacted[1] + 1

    def last_index(self) -> int:
        """See LogReader."""
        with self._lock:
            return self._compacted[1] + len(self._entries)

    def snapshot(self) -> Snapshot:
        """See LogReader."""
        if not self._snapshot.metadata.index:
            raise SnapshotTemporarilyUnavailable
        return self._snapshot

    def base(self) -> EntryId:
        """Term and index of the last entry that is not kept; 0, 0 if all are."""
        return self._compacted

    def newest_snapshot(self) -> Snapshot | None:
        """The newest one, if there is any."""
        return self._snapshot if self._snapshot.metadata.index else None

    # -- writing

    def append(
        self,
        entries: Sequence[Entry] = (),
        hard_state: HardState | None = None,
        *,
        sync: bool = True,
    ) -> None:
        """See LogStorage. Raises ValueError if the entries would leave a gap."""
        del sync  # memory is as durable as it gets
        fitting = self.fitting(entries)
        with self._lock:
            if fitting:
                place = fitting[0].index - self._compacted[1] - 1
                self._entries[place:] = fitting
            if hard_state is not None:
                self._hard_state = hard_state

    def fitting(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those that lie behind what was compacted: a write may come after the snapshot that covers
        it. Raises ValueError if they would leave a gap.
        """
        if not entries:
            return []
        first = entries[0].index
        if [entry.index for entry in entries] != list(range(first, first + len(entries))):
            raise ValueError(f"entries from {first} on do not follow each other")
        if first > self.last_index() + 1:
            raise ValueError(f"entry {first} does not follow entry {self.last_index()}")
        return list(entries[max(self._compacted[1] + 1 - first, 0) :])

    def install_snapshot(self, snapshot: Snapshot, hard_state: HardState | None = None) -> None:
        """See LogStorage."""
        self.check_newer(snapshot)
        with self._lock:
            self._snapshot = snapshot
            self._compacted = (snapshot.metadata.term, snapshot.metadata.index)
            self._entries = []
            if hard_state is not None:
                self._hard_state = hard_state

    def save_snapshot(self, snapshot: Snapshot) -> None:
        """See LogStorage."""
        self.check_saved(snapshot)
        with self._lock:
            self._snapshot = snapshot

    def check_saved(self, snapshot: Snapshot) -> None:
        """Raises what `save_snapshot` would."""
        if snapshot.metadata.index > self.last_index():
            raise ValueError(f"snapshot {snapshot.metadata.index} is beyond the log's end")
        self.check_newer(snapshot)

    def check_newer(self, snapshot: Snapshot) -> None:
        """Raises what `install_snapshot` would."""
        if snapshot.metadata.index < self._snapshot.metadata.index:
            raise ValueError(
                f"snapshot {snapshot.metadata.index} is older than "
                f"{self._snapshot.metadata.index}, which is here"
            )

    def compact(self, index: int) -> None:
        """See LogStorage."""
        term = self.check_compactable(index)
        with self._lock:
            first = self._compacted[1] + 1
            self._compacted = (term, index)
            del self._entries[: index - first + 1]

    def check_compactable(self, index: int) -> int:
        """Raises what `compact` would; gives the entry's term."""
        if index <= self._compacted[1]:
            raise Compacted(index)
        if index > self._snapshot.metadata.index:
            raise ValueError(f"no snapshot covers entry {index}")
        return self.term(index)

    def restore(
        self,
        base: EntryId,
        entries: list[Entry],
        hard_state: HardState,
        snapshot: Snapshot | None,
    ) -> None:
        """Be as a log that was read from disk. entries: behind base; kept, not copied."""
        with self._lock:
            self._compacted, self._entries = base, entries
            self._hard_state, self._snapshot = hard_state, snapshot or Snapshot()

    def close(self) -> None:
        """Nothing to give back."""

"""The log as Raft sees it: the stable part, which storage holds, and the unstable tail.

    first_index          unstable.offset           last_index
         |  in storage         |  in memory, being written  |
         ----------------------------------------------------
                applied <= applying <= committed

Entries are appended to the unstable tail, handed out to be written, and leave it once storage says
that they are durable. Until then they can be replaced, and the answer for a write that was
overtaken changes nothing.
"""

from bisect import bisect_right
from collections.abc import Sequence

from ollamamax_p2p.consensus.core.log_errors import Compacted, Unavailable
from ollamamax_p2p.consensus.core.logger import Logger
from ollamamax_p2p.consensus.core.messages import (
    NO_LIMIT,
    Entry,
    Snapshot,
    limited,
    total_size,
)
from ollamamax_p2p.consensus.core.stable_log import LogReader

EntryId = tuple[int, int]
"""Term and index, which name one entry in all logs."""


class Unstable:
    """What storage does not hold yet: a snapshot, then entries from `offset` on."""

    def __init__(self, offset: int, logger: Logger) -> None:
        self.snapshot: Snapshot | None = None
        self.entries: list[Entry] = []
        self.offset = offset
        self.snapshot_in_progress = False
        self.offset_in_progress = offset
        """The first entry that has not been handed out to be written."""
        self._journal = logger

    def first_index(self) -> int | None:
        """The first index after the snapshot, if there is one."""
        return self.snapshot.metadata.index + 1 if self.snapshot else None

    def term(self, index: int) -> int | None:
        """The term of an entry, if it is known here."""
        if index < self.offset:
            known = self.snapshot is not None and self.snapshot.metadata.index == index
            return self.snapshot.metadata.term if known and self.snapshot else None
        place = index - self.offset
        return self.entries[place].term if place < len(self.entries) else None

    def next_entries(self) -> list[Entry]:
        """Those that are to be written and have not been handed out."""
        return self.entries[self.offset_in_progress - self.offset :]

    def next_snapshot(self) -> Snapshot | None:
        """The snapshot, if it has not been handed out."""
        return None if self.snapshot_in_progress else self.snapshot

    def accept_in_progress(self) -> None:
        """All of it has been handed out."""
        if self.entries:
            self.offset_in_progress = self.offset + len(self.entries)
        if self.snapshot:
            self.snapshot_in_progress = True

    def stable_to(self, entry: EntryId) -> None:
        """Everything up to and with this entry is durable, if it is what stands there still."""
        term, index = entry
        ours = self.term(index)
        if ours is None:
            self._journal.info(f"entry at index {index} missing from unstable log; ignoring")
            return
        if index < self.offset:
            self._journal.info(f"entry at index {index} matched unstable snapshot; ignoring")
            return
        if ours != term:
            self._journal.info(
                f"entry at (index,term)=({index},{term}) mismatched with entry at "
                f"({index},{ours}) in unstable log; ignoring"
            )
            return
        del self.entries[: index + 1 - self.offset]
        self.offset = index + 1
        self.offset_in_progress = max(self.offset_in_progress, self.offset)

    def stable_snapshot_to(self, index: int) -> None:
        """The snapshot of this index is durable."""
        if self.snapshot and self.snapshot.metadata.index == index:
            self.snapshot = None
            self.snapshot_in_progress = False

    def restore(self, snapshot: Snapshot) -> None:
        """Begin anew behind a snapshot."""
        self.offset = self.offset_in_progress = snapshot.metadata.index + 1
        self.entries = []
        self.snapshot = snapshot
        self.snapshot_in_progress = False

    def truncate_and_append(self, entries: Sequence[Entry]) -> None:
        """Add entries; they replace what stands from the first one's index on."""
        start = entries[0].index
        if start == self.offset + len(self.entries):
            self.entries.extend(entries)
        elif start <= self.offset:
            self._journal.info(f"replace the unstable entries from index {start}")
            self.entries = list(entries)
            self.offset = self.offset_in_progress = start
        else:
            self._journal.info(f"truncate the unstable entries before index {start}")
            self.entries = [*self.entries[: start - self.offset], *entries]
            self.offset_in_progress = min(self.offset_in_progress, start)


class RaftLog:
    """Storage and unstable tail as one log, and how far it is committed and applied."""

    def __init__(
        self, storage: LogReader, logger: Logger, *, max_applying_bytes: int = NO_LIMIT
    ) -> None:
        """max_applying_bytes: of committed entries that are handed out and not applied yet."""
        self.storage = storage
        self._journal = logger
        self.unstable = Unstable(storage.last_index() + 1, logger)
        self.committed = self.applying = self.applied = storage.first_index() - 1
        self.max_applying_bytes = max_applying_bytes
        self.applying_bytes = 0
        self.applying_paused = False

    def __str__(self) -> str:
        return (
            f"committed={self.committed}, applied={self.applied}, applying={self.applying}, "
            f"unstable.offset={self.unstable.offset}, "
            f"unstable.offsetInProgress={self.unstable.offset_in_progress}, "
            f"len(unstable.Entries)={len(self.unstable.entries)}"
        )

    # -- appending

    def maybe_append(self, previous: EntryId, entries: Sequence[Entry], commit: int) -> int | None:
        """A leader's append: take it if we hold the entry before it; the last new index, or None.

        What we hold already is not written again; where we hold something else, ours goes.
        """
        if not self.matches(previous):
            return None
        last = previous[1] + len(entries)
        conflict = self.find_conflict(entries)
        if conflict:
            assert conflict > self.committed, (
                f"entry {conflict} conflict with committed entry [committed({self.committed})]"
            )
            self.append(entries[conflict - previous[1] - 1 :])
        self.commit_to(min(commit, last))
        return last

    def append(self, entries: Sequence[Entry]) -> int:
        """Append to the unstable tail, replacing what stands there; gives the last index."""
        if entries:
            after = entries[0].index - 1
            assert after >= self.committed, (
                f"after({after}) is out of range [committed({self.committed})]"
            )
            self.unstable.truncate_and_append(entries)
        return self.last_index()

    def find_conflict(self, entries: Sequence[Entry]) -> int:
        """The index of the first entry that we hold differently or not at all; 0 if there is none.

        The entries must be contiguous.
        """
        for entry in entries:
            if not self.matches((entry.term, entry.index)):
                if entry.index <= self.last_index():
                    self._journal.info(
                        f"found conflict at index {entry.index} [existing term: "
                        f"{self.term_or_zero(entry.index)}, conflicting term: {entry.term}]"
                    )
                return entry.index
        return 0

    def find_conflict_by_term(self, index: int, term: int) -> EntryId:
        """The last entry at or before index whose term is at most `term`: both logs can agree
        there at the latest. Its term is 0 where it is not known.
        """
        low = self.first_index() - 1
        if not low <= index <= self.last_index():
            return 0, index
        # Terms never fall along a log, so halving finds it; a peer chooses where we begin.
        places = range(low, index + 1)
        found = bisect_right(places, term, key=self.term) - 1
        if found < 0:
            return 0, max(low - 1, 0)
        return self.term(places[found]), places[found]

    # -- what is to be done

    def next_unstable_entries(self) -> list[Entry]:
        """To be written now."""
        return self.unstable.next_entries()

    def has_next_unstable_entries(self) -> bool:
        """Whether there are any."""
        unstable = self.unstable
        return unstable.offset_in_progress < unstable.offset + len(unstable.entries)

    def has_next_or_in_progress_unstable_entries(self) -> bool:
        """Whether something is not durable yet."""
        return bool(self.unstable.entries)

    def has_next_unstable_snapshot(self) -> bool:
        """Whether a snapshot is to be installed."""
        return self.unstable.next_snapshot() is not None

    def has_next_or_in_progress_snapshot(self) -> bool:
        """Whether a snapshot is not installed yet."""
        return self.unstable.snapshot is not None

    def next_committed_entries(self, *, allow_unstable: bool) -> list[Entry]:
        """To be applied now. allow_unstable: also what is not durable here yet."""
        if not self.has_next_committed_entries(allow_unstable=allow_unstable):
            return []
        room = self.max_applying_bytes - self.applying_bytes
        assert room > 0, "applying is not paused although its limit is reached"
        high = self.max_appliable_index(allow_unstable=allow_unstable) + 1
        return self.slice(self.applying + 1, high, room)

    def has_next_committed_entries(self, *, allow_unstable: bool) -> bool:
        """Whether something is to be applied now."""
        if self.applying_paused or self.has_next_or_in_progress_snapshot():
            return False
        return self.applying < self.max_appliable_index(allow_unstable=allow_unstable)

    def max_appliable_index(self, *, allow_unstable: bool) -> int:
        """How far the state machine may go."""
        if allow_unstable:
            return self.committed
        return min(self.committed, self.unstable.offset - 1)

    # -- what has been done

    def commit_to(self, index: int) -> None:
        """Everything up to index is committed; it never goes back."""
        if index > self.committed:
            assert index <= self.last_index(), (
                f"tocommit({index}) is out of range [lastIndex({self.last_index()})]"
            )
            self.committed = index

    def maybe_commit(self, entry: EntryId) -> bool:
        """Commit up to an entry, if it is ours and news."""
        term, index = entry
        if term and index > self.committed and self.matches(entry):
            self.commit_to(index)
            return True
        return False

    def accept_unstable(self) -> None:
        """All that was to be written has been handed out."""
        self.unstable.accept_in_progress()

    def accept_applying(self, index: int, size: int, *, allow_unstable: bool) -> None:
        """Entries up to index, of this many bytes, have been handed out to be applied."""
        assert index <= self.committed, (
            f"applying({index}) is out of range [prevApplying({self.applying}), "
            f"committed({self.committed})]"
        )
        self.applying = index
        self.applying_bytes += size
        # Paused also when the limit, not the end, was what cut the batch: a next entry would fit
        # by its size only if it were smaller, and order matters.
        self.applying_paused = (
            self.applying_bytes >= self.max_applying_bytes
            or index < self.max_appliable_index(allow_unstable=allow_unstable)
        )

    def applied_to(self, index: int, size: int) -> None:
        """Entries up to index, the last ones of this many bytes, have been applied."""
        assert self.applied <= index <= self.committed, (
            f"applied({index}) is out of range [prevApplied({self.applied}), "
            f"committed({self.committed})]"
        )
        self.applied = index
        self.applying = max(self.applying, index)
        self.applying_bytes = max(self.applying_bytes - size, 0)
        self.applying_paused = self.applying_bytes >= self.max_applying_bytes

    def stable_to(self, entry: EntryId) -> None:
        """Everything up to and with this entry is durable."""
        self.unstable.stable_to(entry)

    def stable_snapshot_to(self, index: int) -> None:
        """The snapshot of this index is installed."""
        self.unstable.stable_snapshot_to(index)

    def restore(self, snapshot: Snapshot) -> None:
        """Begin anew behind a snapshot, which is to be installed."""
        metadata = snapshot.metadata
        self._journal.info(
            f"log [{self}] starts to restore snapshot "
            f"[index: {metadata.index}, term: {metadata.term}]"
        )
        self.committed = metadata.index
        self.unstable.restore(snapshot)

    # -- reading

    def snapshot(self) -> Snapshot:
        """The newest that can be sent. Raises SnapshotTemporarilyUnavailable."""
        return self.unstable.snapshot or self.storage.snapshot()

    def first_index(self) -> int:
        """The first entry that can be read."""
        first = self.unstable.first_index()
        return self.storage.first_index() if first is None else first

    def last_index(self) -> int:
        """The last entry."""
        unstable = self.unstable
        if unstable.entries:
            return unstable.offset + len(unstable.entries) - 1
        snapshot = unstable.snapshot
        return snapshot.metadata.index if snapshot else self.storage.last_index()

    def last_entry_id(self) -> EntryId:
        """Term and index of the last entry."""
        last = self.last_index()
        return self.term(last), last

    def term(self, index: int) -> int:
        """The term of an entry, or of the one that a snapshot ends with.

        Raises Compacted or Unavailable.
        """
        known = self.unstable.term(index)
        if known is not None:
            return known
        if index + 1 < self.first_index():
            raise Compacted(index)
        if index > self.last_index():
            raise Unavailable(index)
        return self.storage.term(index)

    def term_or_zero(self, index: int) -> int:
        """The term of an entry, 0 where it is not known."""
        try:
            return self.term(index)
        except LookupError:
            return 0

    def matches(self, entry: EntryId) -> bool:
        """Whether we hold this entry."""
        try:
            return self.term(entry[1]) == entry[0]
        except LookupError:
            return False

    def is_up_to_date(self, last: EntryId) -> bool:
        """Whether a log that ends with this entry holds at least what ours holds."""
        return last >= self.last_entry_id()

    def entries(self, low: int, max_bytes: int = NO_LIMIT) -> list[Entry]:
        """From low on, as many as fit, at least one if there is one. Raises Compacted."""
        last = self.last_index()
        return [] if low > last else self.slice(low, last + 1, max_bytes)

    def slice(self, low: int, high: int, max_bytes: int = NO_LIMIT) -> list[Entry]:
        """Entries [low, high), as many as fit, at least one if there is one. Raises Compacted."""
        self._check_bounds(low, high)
        if low == high:
            return []
        offset = self.unstable.offset
        if low >= offset:
            return limited(self.unstable.entries[low - offset : high - offset], max_bytes)
        stable = self.storage.entries(low, min(high, offset), max_bytes)
        if high <= offset or len(stable) < offset - low:
            return stable
        tail = self.unstable.entries[: high - offset]
        if max_bytes >= NO_LIMIT:
            return stable + tail
        room = max_bytes - total_size(stable)
        if room <= 0:
            return stable
        tail = limited(tail, room)
        if len(tail) == 1 and total_size(tail) > room:
            return stable
        return stable + tail

    def _check_bounds(self, low: int, high: int) -> None:
        assert low <= high, f"invalid slice {low} > {high}"
        if low < self.first_index():
            raise Compacted(low)
        assert high <= self.last_index() + 1, (
            f"slice[{low},{high}) out of bound [{self.first_index()},{self.last_index()}]"
        )

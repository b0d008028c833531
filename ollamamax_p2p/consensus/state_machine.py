"""StateMachine: what the agreed commands change. The cluster's is `ollamamax_p2p.cluster`'s; tests
use a key-value store.

Everything it does must follow from the commands alone, in order: no clock, no dice, no settings of
this node. A command it does not understand, or that breaks a rule, is refused by a result, by every
replica alike; it never raises for it.
"""

from collections.abc import Sequence
from typing import Protocol

from ollamamax_p2p.consensus.core.command import Command
from ollamamax_p2p.consensus.core.messages import ConfState, SnapshotMetadata

__all__ = ["Command", "SnapshotReader", "SnapshotWriter", "StateMachine"]


class SnapshotReader(Protocol):
    """A consistent copy of the state, read in pieces while the state moves on."""

    metadata: SnapshotMetadata
    size: int
    """Bytes."""
    sha256: bytes

    def read(self, offset: int, count: int) -> bytes:
        """Up to count bytes from offset; b"" at the end."""

    def close(self) -> None:
        """Give it back; never raises."""


class SnapshotWriter(Protocol):
    """A snapshot being received: pieces in order, kept across restarts until installed."""

    @property
    def received(self) -> int:
        """Bytes that are here already; the sender goes on from there."""

    def write(self, data: bytes) -> None:
        """Add the next piece. Raises StoreFull."""

    def close(self) -> None:
        """Stop for now; what is here stays, and a later `receive_snapshot` of the same resumes."""


class StateMachine(Protocol):
    """Blocking calls, made in a worker thread, never two at once (readers excepted)."""

    applied_index: int
    """The last command in the durable state: what a restart begins behind."""

    conf_state: ConfState
    """The configuration after `applied_index`."""

    def apply(self, commands: Sequence[Command]) -> list[bytes]:
        """Apply them in order and in one transaction, with `applied_index`; one result each.

        Raises StoreFull (nothing applied) or StoreDamaged; anything else is a bug.
        """

    def state_hash(self) -> bytes:
        """32 bytes that are equal on two replicas exactly if their states at the same
        `applied_index` are.
        """

    def make_snapshot(self, term: int) -> SnapshotMetadata:
        """Write the state at `applied_index` (whose entry has this term) beside it, durable, and
        keep the newest two. Raises StoreFull.
        """

    def newest_snapshot(self) -> SnapshotMetadata | None:
        """The newest one that `open_snapshot` can open."""

    def open_snapshot(self, metadata: SnapshotMetadata) -> SnapshotReader:
        """Raises BlobNotFound if it is gone; then a newer one exists."""

    def receive_snapshot(
        self, metadata: SnapshotMetadata, size: int, sha256: bytes
    ) -> SnapshotWriter:
        """Begin or resume receiving; of another snapshot than the last one begun, from 0."""

    def install_snapshot(self, metadata: SnapshotMetadata, size: int, sha256: bytes) -> None:
        """Take the received snapshot's place: all of it or nothing, also when the power goes.

        Raises StoreDamaged if what was received is not it; it is thrown away then.
        """

    def close(self) -> None:
        """Give the files back; never raises."""

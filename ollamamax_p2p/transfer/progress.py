"""What a pull or a push tells while it runs and when it ends; shown by the CLI, streamed by the
API, the same for library users.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceShare:
    """What one source has contributed to a pull so far."""

    name: str
    """A peer id, or an origin's host."""
    kind: Literal["peer", "origin"]
    bytes: int
    """Verified bytes that it sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullProgress:
    """One state of a running pull, push or creation. `status` is what Ollama prints at the same
    point.
    """

    status: str
    """`pulling manifest`, `pulling <12 hex>`, `verifying sha256 digest`, `writing manifest`,
    `success`; `retrieving manifest`, `pushing <12 hex>`, `pushing manifest`.
    """
    digest: str | None = None
    """The blob being moved, while one is."""
    total: int = 0
    """Its bytes."""
    completed: int = 0
    """Those that are at their goal, verified; includes what an earlier, interrupted pull left."""
    sources: tuple[SourceShare, ...] = ()
    """Over the whole pull, largest first."""
    active_sources: int = 0
    """How many sources the current blob is coming from right now."""
    note: str = ""
    """Something a person should know: a banned peer, waiting for sources. Else empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """How a pull went."""

    model: str
    manifest_digest: str
    bytes_total: int
    """All of the model's blobs."""
    bytes_fetched: int
    """What crossed the network for it and was kept; less when resumed or when blobs were here
    already.
    """
    bytes_refetched: int
    """What was received more than once or thrown away: endgame duplicates, wrong chunks, lost
    connections.
    """
    seconds: float
    sources: tuple[SourceShare, ...]
    banned: tuple[str, ...] = ()
    """Peers found lying."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """How a push went."""

    model: str
    manifest_digest: str
    bytes_total: int
    """All of the model's blobs."""
    bytes_sent: int
    """What the registry did not have; counted once, however often it had to be sent."""
    seconds: float

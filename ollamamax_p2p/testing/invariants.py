"""What must hold at every moment of a run, whatever goes wrong.

- A blob that is visible under its name is what its name says.
- A model that is visible has all its blobs.
- Every pull that was started ends: in success, in an error of `ollamamax_p2p.errors`, or with its
  node's death. One that succeeded left the model in the store.
- A pull fetches again, for each thing that went wrong meanwhile, at most what it may have in
  flight.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from ollamamax_p2p.content import BlobStore
from ollamamax_p2p.content.core.digest import Digest, digest_of_hash
from ollamamax_p2p.content.core.model_name import ModelName
from ollamamax_p2p.errors import OmxError
from ollamamax_p2p.transfer import PullReport

_READ_BYTES = 4 * 1024 * 1024


class InvariantBroken(AssertionError):
    """What must never happen has happened; the message says what, where and when."""


class Holder(Protocol):
    """What is checked: a node, or anything else with a name and a store."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def store(self) -> BlobStore:
        """What it holds."""


@dataclass(slots=True, eq=False)
class PullRecord:
    """One pull, from its start on."""

    node: str
    model: ModelName
    started_at: float
    troubles_before: int
    """How many things had gone wrong in the run when it started."""
    ended_at: float | None = None
    troubles: int = 0
    """How many went wrong while it ran."""
    report: PullReport | None = None
    error: OmxError | None = None
    abandoned: Literal["", "the node died", "cancelled"] = ""

    def __str__(self) -> str:
        end = self.abandoned or self.error or (self.report and "success") or "still running"
        return f"pull of {self.model} on {self.node} at {self.started_at:.1f} s: {end}"


class Invariants:
    """Watches over the nodes and the pulls of one run."""

    def __init__(self, *, in_flight_bytes_max: int) -> None:
        """in_flight_bytes_max: what one pull may have asked for and not yet got."""
        self.pulls: list[PullRecord] = []
        self.checks = 0
        """How often everything was checked."""
        self._in_flight_bytes_max = in_flight_bytes_max
        self._verified: dict[str, set[Digest]] = {}

    async def check(self, nodes: Iterable[Holder]) -> None:
        """Check what is visible now. Raises InvariantBroken.

        A blob is hashed when it is first seen in a store, and again if it was gone in between.
        """
        self.checks += 1
        for node in nodes:
            visible = await node.store.blobs()
            verified = self._verified.setdefault(node.name, set())
            verified &= set(visible)
            for digest in visible:
                if digest not in verified:
                    await _check_blob(node, digest)
                    verified.add(digest)
            await _check_models(node, set(visible))

    def check_pull(self, pull: PullRecord) -> None:
        """Check one that has ended. Raises InvariantBroken."""
        if pull.report is None:
            return
        allowed = (1 + pull.troubles) * self._in_flight_bytes_max
        if pull.report.bytes_refetched > allowed:
            raise InvariantBroken(
                f"{pull}: fetched {pull.report.bytes_refetched} bytes again, "
                f"{allowed} are allowed after {pull.troubles} troubles"
            )

    def check_all_ended(self) -> None:
        """At the end of a run. Raises InvariantBroken."""
        running = [pull for pull in self.pulls if pull.ended_at is None]
        if running:
            raise InvariantBroken("; ".join(map(str, running)))


async def _check_blob(node: Holder, digest: Digest) -> None:
    whole = hashlib.sha256()
    async with await node.store.open(digest) as reader:
        for offset in range(0, reader.size, _READ_BYTES):
            whole.update(await reader.read_at(offset, min(_READ_BYTES, reader.size - offset)))
    actual = digest_of_hash(whole.digest())
    if actual != digest:
        raise InvariantBroken(f"{node.name} shows {digest}, whose bytes are {actual}")


async def _check_models(node: Holder, visible: set[Digest]) -> None:
    for model in await node.store.models():
        manifest = await node.store.manifest(model.name)
        missing = [digest for digest, _ in manifest.blobs() if digest not in visible]
        if missing:
            raise InvariantBroken(f"{node.name} shows {model.name} without {missing}")

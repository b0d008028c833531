"""What every node tells of its load, and what this node knows of all of them.

The shell calls `tell` with what is so here whenever it looked, `round` every gossip interval, and
`hear` for every message; it sends what these return. A report travels by push gossip: each round a
node sends to `fanout` random peers its own report and those it heard lately (each for a few
rounds, then it takes it for known). Messages are bounded, so that a round costs a swarm of n nodes
n · fanout messages whatever happens. What a peer missed altogether it finds out by comparing
digests: with a new peer at once (`greet`), with a random one now and then.

Which models a node could run changes seldom and is long, so a report carries only a version of that
list; who lacks that version asks whoever told them.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import Count, Name
from ollamamax_p2p.router.settings import RouterSettings
from ollamamax_p2p.wire import Message

GOSSIP_BYTES_MAX = 48 * 1024
"""Of one message: at one a round to three peers, 300 kB/s at the most."""

Short = Annotated[str, Meta(max_length=128)]
Number = Annotated[float, Meta(ge=0, le=1e12)]


class ModelSpeed(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node measured of its own model; 0: not yet."""

    model: Name
    ttft_s: Number = 0.0
    prefill_tps: Number = 0.0
    decode_tps: Number = 0.0
    load_s: Number = 0.0


class BackendLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine of a node."""

    name: Short
    slots: Annotated[int, Meta(ge=0, le=65_536)] = 1
    queued: Annotated[int, Meta(ge=0, le=65_536)] = 0
    """Requests that wait in its own queue."""
    loaded: Annotated[tuple[LoadedModel, ...], Meta(max_length=64)] = ()
    speeds: Annotated[tuple[ModelSpeed, ...], Meta(max_length=64)] = ()


class LoadReport(Message, tag="load", frozen=True, kw_only=True, omit_defaults=True):
    """What a node says of itself; replaced by its next."""

    peer: Short
    epoch: Count
    """When the node started, Unix milliseconds."""
    sequence: Count
    models_version: Count = 0
    node: Short = ""
    region: Short = ""
    weight: Number = 1.0
    draining: bool = False
    memory_free: Count = 0
    """Bytes that a model could take, of what its engines use: the accelerator's or the machine's."""
    memory_total: Count = 0
    accelerator: Short = ""
    backends: Annotated[tuple[BackendLoad, ...], Meta(max_length=16)] = ()


class BackendModels(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine could run."""

    name: Short
    models: Annotated[tuple[ServableModel, ...], Meta(max_length=4_096)]


class ModelsReport(Message, tag="models", frozen=True, kw_only=True, omit_defaults=True):
    """What a node could run, or one page of it."""

    peer: Short
    epoch: Count
    version: Count
    page: Annotated[int, Meta(ge=0, lt=64)] = 0
    pages: Annotated[int, Meta(ge=1, le=64)] = 1
    backends: Annotated[tuple[BackendModels, ...], Meta(max_length=16)] = ()


class AgedReport(msgspec.Struct, frozen=True, kw_only=True):
    """A report, and how long ago it was made as far as the teller knows."""

    report: LoadReport
    age_s: Number = 0.0


class LoadNews(Message, tag="news", frozen=True, kw_only=True):
    """What the sender takes for new to the receiver."""

    reports: Annotated[tuple[AgedReport, ...], Meta(max_length=1_024)]


class DigestEntry(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """The newest that is known of one node."""

    peer: Short
    epoch: Count
    sequence: Count
    models_version: Count


class LoadDigest(Message, tag="digest", frozen=True, kw_only=True):
    """What the sender knows; the receiver answers with what is newer, and asks for what it lacks."""

    entries: Annotated[tuple[DigestEntry, ...], Meta(max_length=1_024)]
    first: Short = ""
    """The entries are all that the sender knows from this peer id on …"""
    last: Short = ""
    """… up to this one; "": to the end."""


class LoadWanted(Message, tag="wanted", frozen=True, kw_only=True, omit_defaults=True):
    """What the sender would like to be told."""

    reports: Annotated[tuple[Short, ...], Meta(max_length=1_024)] = ()
    """Peer ids whose load report it lacks."""
    models: Annotated[tuple[Short, ...], Meta(max_length=1_024)] = ()
    """Peer ids whose models it lacks."""


GossipMessage = LoadNews | LoadDigest | LoadWanted | ModelsReport


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownNode:
    """A node as this one knows it."""

    report: LoadReport
    models: tuple[BackendModels, ...]
    """() while they are not known."""
    made_at: float
    """When the report was made, on this node's clock."""
    suspect: bool
    """Not heard of for `stale_s`."""
    is_local: bool


class LoadTable:
    """What this node knows of the load of all. Members only: the shell calls `forget` for others."""

    def __init__(
        self,
        *,
        peer: str,
        epoch: int,
        settings: RouterSettings,
        is_member: Callable[[str], bool] = lambda peer: True,
    ) -> None:
        """peer: this node's id; epoch: when it started, Unix milliseconds; is_member: whose reports
        are believed.
        """

    def tell(
        self,
        *,
        node: str,
        draining: bool,
        memory_free: int,
        memory_total: int,
        accelerator: str,
        backends: Sequence[BackendLoad],
        models: Sequence[BackendModels],
        now: float,
    ) -> None:
        """What is so on this node now. Call it when something changed and once a gossip interval;
        the others are told with the next round, if it differs or the heartbeat is due.
        """
        raise NotImplementedError

    def round(
        self, linked: Sequence[str], *, now: float, rng: random.Random
    ) -> list[tuple[str, GossipMessage]]:
        """What to send to whom now. linked: the peers with a connection."""
        raise NotImplementedError

    def greet(self, *, now: float) -> list[GossipMessage]:
        """What to send to a peer that is new: a digest, in pages."""
        raise NotImplementedError

    def hear(self, via: str, message: GossipMessage, *, now: float) -> list[GossipMessage]:
        """Take in what a peer sent; give what to answer it. via: the authenticated sender."""
        raise NotImplementedError

    def forget(self, peer: str) -> None:
        """It is no member any more, or is known to be gone."""
        raise NotImplementedError

    def nodes(self, *, now: float) -> list[KnownNode]:
        """All that were heard of within `dead_s`, this node first."""
        raise NotImplementedError

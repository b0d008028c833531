"""Call: who asks, and how a request is to be treated; Answer: what they get."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from ollamamax_p2p.inference.core.models import LoadedModel, ServableModel
from ollamamax_p2p.inference.core.requests import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuePlace:
    """Where a request stands that waits."""

    position: int
    """1: it is the next."""
    eta_s: float | None
    """Until it is begun; None while nothing is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a request's sender says about it, beside the request."""

    user: str = ""
    """Whose it is; waiting users take turns. "": everybody who says nothing is one user."""
    priority: int = 1
    """0: may wait, 1: ordinary, 2: before the others."""
    session: str = ""
    """Requests with the same one go to the same candidate as long as it is there."""
    strategy: str = ""
    """How to choose, by name; "": as the settings say for this kind of request."""
    deadline_s: float | None = None
    """Within this the answer must have begun; else DeadlineExceeded."""
    on_queue: Callable[[QueuePlace], None] | None = None
    """Told whenever the place in the queue changes. Must not block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Who answers."""

    peer_id: str
    node: str
    """The node's name."""
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmModel:
    """A model that somebody in the swarm can run."""

    model: ServableModel
    holders: tuple[Server, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningModel:
    """A model in the memory of some node."""

    model: LoadedModel
    server: Server


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeLoad:
    """How busy a node is, by its last report."""

    peer_id: str
    node: str
    """Its name."""
    region: str
    draining: bool
    heard_s: float
    """How old the report is."""
    memory_free: int
    """Bytes for models: of its accelerators, or of the machine."""
    memory_total: int
    accelerator: str
    backends: tuple[str, ...]
    slots: int
    """Requests that its engines work on at once."""
    busy: int
    queued: int
    """Requests that wait in its engines' own queues."""
    tokens_per_s: float
    models: int
    """How many it could run."""
    loaded: tuple[str, ...]


class Answer(Protocol):
    """An answer on its way; iterate over it for its parts, once."""

    @property
    def server(self) -> Server:
        """Who answers now."""

    @property
    def servers(self) -> tuple[Server, ...]:
        """Who gave a part of it so far, in order; more than one if it moved."""

    @property
    def queued_s(self) -> float:
        """How long it waited before it was begun."""

    def __aiter__(self) -> AsyncIterator[Part]:
        """Deltas, then one Finish. Raises CannotResume if it broke off and nobody could go on."""

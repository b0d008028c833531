"""What goes wrong in a swarm, and when, drawn from a seed."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Lie(StrEnum):
    """How a source deceives those who fetch from it."""

    WRONG_CHUNK = "wrong chunk"
    """The map is right, the bytes are not."""
    WRONG_MAP = "wrong map"
    """A map of other bytes, and chunks that match it."""
    TOO_MUCH = "too much"
    """Ten times what was asked for."""
    NOTHING = "nothing"
    """It says that it holds everything, and sends none of it."""
    PARTIAL_MAP = "partial map"
    """A map of other bytes, another one in each conversation, and chunks that match it; it vouches
    for none of them."""
    CHOKE = "choke"
    """It vouches for a map of other bytes, and never lets anybody ask for a chunk."""
    MAP_SWITCH = "map switch"
    """It vouches for one map after another."""
    OTHER_SIZE = "other size"
    """Its blob is a byte longer."""


class FaultKind(StrEnum):
    """What happens to nodes."""

    VANISH = "vanish"
    """Killed, for good."""
    REJOIN = "rejoin"
    """Killed, and started again with what its store kept."""
    STALL = "stall"
    """Frozen, as by SIGSTOP, for a while."""
    FLAP = "flap"
    """Its connections are reset every few seconds for a while."""
    PARTITION = "partition"
    """Cut off from all others, as a group, for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    at_s: float
    """Seconds after the schedule begins."""
    kind: FaultKind
    nodes: tuple[int, ...]
    """Who it happens to, by number; one, unless it is a partition."""
    lasts_s: float
    """Until it is over; a node that vanishes never comes back."""

    def __str__(self) -> str:
        who = ", ".join(map(str, self.nodes))
        return f"{self.at_s:6.1f} s  {self.kind} of {who} for {self.lasts_s:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSchedule:
    """Everything that goes wrong in one run."""

    faults: tuple[Fault, ...] = ()
    """In order of time."""
    liars: tuple[tuple[int, Lie], ...] = ()
    """Nodes that lie all the time, by number, and how."""

    @classmethod
    def draw(
        cls, rng: random.Random, nodes: int, duration_s: float, *, spare: int = 1
    ) -> "FaultSchedule":
        """Draw a schedule for nodes 0 to nodes - 1, over this long.

        spare: so many, the first ones, neither lie nor vanish for good, so that with what they hold
        a pull can be finished once everything is over. All else happens to them too.
        """
        others = list(range(spare, nodes))
        liars = rng.sample(others, rng.randint(0, nodes // 4))
        honest = [node for node in range(nodes) if node not in liars]
        vanishing = set(rng.sample(honest[spare:], rng.randint(0, len(honest[spare:]) // 3)))
        faults = [
            *(_draw_vanishing(rng, node, duration_s) for node in sorted(vanishing)),
            *(
                _draw_passing(rng, [node for node in honest if node not in vanishing], duration_s)
                for _ in range(rng.randint(1, nodes))
            ),
        ]
        return cls(
            faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
            liars=tuple((node, rng.choice(list(Lie))) for node in sorted(liars)),
        )

    @property
    def over_at_s(self) -> float:
        """When the last fault that passes has passed."""
        return max((fault.at_s + fault.lasts_s for fault in self.faults), default=0.0)

    @property
    def liar_nodes(self) -> frozenset[int]:
        """The numbers of those that lie."""
        return frozenset(node for node, _ in self.liars)

    @property
    def vanishing_nodes(self) -> frozenset[int]:
        """The numbers of those that do not come back."""
        return frozenset(fault.nodes[0] for fault in self.faults if fault.kind is FaultKind.VANISH)

    def __str__(self) -> str:
        lies: Iterable[str] = (f"  always  {node} lies: {lie}" for node, lie in self.liars)
        return "\n".join([*lies, *map(str, self.faults)])


_PASSING = (FaultKind.REJOIN, FaultKind.STALL, FaultKind.FLAP, FaultKind.PARTITION)

_LASTS_S_MIN, _LASTS_S_MAX = 0.5, 30.0
# Around a heartbeat's and a stall's timeouts (7 and 20 s), because their edges are where it hurts.


def _draw_vanishing(rng: random.Random, node: int, duration_s: float) -> Fault:
    return Fault(at_s=rng.uniform(0, duration_s), kind=FaultKind.VANISH, nodes=(node,), lasts_s=0.0)


def _draw_passing(rng: random.Random, nodes: list[int], duration_s: float) -> Fault:
    kind = rng.choice(_PASSING)
    count = rng.randint(1, max(1, len(nodes) // 2)) if kind is FaultKind.PARTITION else 1
    return Fault(
        at_s=rng.uniform(0, duration_s),
        kind=kind,
        nodes=tuple(sorted(rng.sample(nodes, count))),
        lasts_s=rng.uniform(_LASTS_S_MIN, _LASTS_S_MAX),
    )

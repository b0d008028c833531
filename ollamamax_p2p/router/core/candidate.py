"""Who could answer, and what is known of the request, as the strategies see them."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

Kind = Literal["chat", "generate", "embed"]

LATE_BY_CHANCE = 3.0
"""First parts so many times later than foretold are no lie: somebody else came just before, or the
prompt was not warm after all.
"""


class CandidateKey(NamedTuple):
    """Which engine of which node, and under which name it has the model."""

    peer: str
    backend: str
    model: str


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A node and back end that can serve a request; times in seconds, rates in tokens/s.

    A struct of msgspec because it is made anew for each request and candidate, and is made four
    times as fast as a dataclass.
    """

    key: CandidateKey
    node: str = ""
    """The node's name."""
    digest: str = ""
    """Of the model's manifest, "" if unknown; an answer goes on only on the same one."""
    loaded: bool = True
    loading: bool = False
    """It is being loaded: soon there, but not yet."""
    ring: int = 0
    """Its place for consistent hashing: 64 bits of peer and back end."""
    slots: int = 1
    """Requests that it works on at once; at least 1."""
    others: float = 0.0
    """Requests that it is busy with or that wait there, those from here not counted."""
    outstanding: int = 0
    """Requests from here that it has."""
    ttft_s: float = 0.0
    """Until the first part, apart from waiting, loading and reading the prompt."""
    prefill_tps: float = 500.0
    decode_tps: float = 20.0
    load_s: float = 10.0
    """What loading the model takes."""
    slowdown: float = 1.0
    """How many times longer than foretold first parts from it took of late: what was measured here
    against what it claims.
    """
    region: str = ""
    is_local: bool = False
    weight: float = 1.0
    draining: bool = False
    suspect: bool = False
    """Not heard of for a while."""
    fits: bool = True
    """Whether its free memory takes the model as it is, without another being unloaded."""
    memory_free: int = 0
    """Bytes; of them, `size` is what the model would take."""
    size: int = 0
    can_resume: bool = False

    @property
    def distrust(self) -> float:
        """1 while its first parts come more or less when they were foretold."""
        return max(1.0, self.slowdown / LATE_BY_CHANCE)

    @property
    def capacity(self) -> int:
        """Its slots, if they are believed: who is very late may not work on as many at once as it
        claims.
        """
        return self.slots if self.distrust == 1.0 else 1

    @property
    def load(self) -> float:
        """Requests that it has, as far as is known here."""
        return self.others + self.outstanding

    @property
    def pressure(self) -> float:
        """Requests per slot if it got one more; grows with distrust, so that who claims to be idle
        and is not gets no more than its answers deserve.
        """
        return (self.load + 1) / self.capacity * self.distrust

    @property
    def has_slot(self) -> bool:
        """Whether one more request would be worked on at once."""
        return self.load + 1 <= self.capacity


class PrefixPoint(NamedTuple):
    """Where a conversation could have been cut: everything before it as a hash, and how long."""

    hash: int
    """64 bits, of everything up to here."""
    tokens: int
    """An estimate of how many that are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFacts:
    """What choosing needs to know of a request; made by `request_facts.facts_of`."""

    id: int
    """The caller's, unique among those that are under way on this node."""
    model: str
    """As the user wrote it."""
    kind: Kind = "chat"
    prompt_tokens: int = 0
    """An estimate."""
    output_tokens: int = 256
    """An estimate, at most what num_predict allows."""
    prefix: tuple[PrefixPoint, ...] = ()
    """Shortest first; the last covers the whole conversation so far."""
    root: int = 0
    """The hash of what a conversation never loses: up to its first user message. 0: none."""
    session: str = ""
    region: str = ""
    """Of the node that asks."""
    priority: int = 1
    """0, 1 or 2."""
    user: str = ""
    strategy: str = ""
    """"": as the settings say for this kind."""
    needs: tuple[str, ...] = ()
    """Capabilities: completion, embedding, tools, insert, thinking."""
    can_move: bool = True
    """Whether an answer that began may go on elsewhere: plain text may; tool calls and forced
    JSON may not.
    """
    begin_by: float | None = None
    """On the clock of `now`; None: as the settings say."""

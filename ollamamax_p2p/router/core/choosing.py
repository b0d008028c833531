"""Chooser: every decision about a request, from its arrival to its end, as one pure object.

The shell numbers requests, and for each:

    outcome = chooser.choose(facts, now=now)
    Choice   send it to choice.candidate; tell what happens with choice.attempt (below)
    Wait     it is in the queue: `due(now=now)` will give its Choice or Refuse, later; `place`
             tells where it stands; `leave` when the client is gone
    Refuse   raise refuse.error

    chooser.first_part(attempt, now=now)          the first delta (or vectors) arrived
    chooser.ended(attempt, usage=…, now=now)      its Finish arrived
    chooser.cancelled(attempt, now=now)           the client left, or the other of a hedge was first
    chooser.failed(attempt, error, now=now)       gives a Choice (try there after choice.after_s,
                                                  with a Resume if choice.resumes) or a Refuse
    chooser.hedge(attempt, now=now)               after choice.hedge_after_s without a first part:
                                                  a second Choice, or None

A candidate that gives nothing within `choice.first_part_within_s` hangs: cancel it and call
`failed` with BackendUnavailable. After every `first_part`, `ended`, `failed`, `cancelled` and after
news from the table, call `due`; also at `next_wake`.
"""

import random
from dataclasses import dataclass

from ollamamax_p2p.errors import OmxError
from ollamamax_p2p.inference.core.requests import Usage
from ollamamax_p2p.router.call import QueuePlace
from ollamamax_p2p.router.core.candidate import Candidate, RequestFacts
from ollamamax_p2p.router.core.load_table import LoadTable, ModelSpeed
from ollamamax_p2p.router.settings import RouterSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Send the request there; it counts as outstanding there until the attempt is over."""

    request: RequestFacts
    attempt: int
    """The number to tell what happens with; never used again."""
    candidate: Candidate
    after_s: float = 0.0
    """Wait so long before sending (a retry's backoff)."""
    resumes: bool = False
    """The client has a part of the answer: send a Resume with it."""
    first_part_within_s: float
    """Then it hangs."""
    hedge_after_s: float | None = None
    """Then call `hedge`, if there is no first part; None: never."""
    queued_s: float = 0.0
    """How long it waited here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """It is in the queue."""

    place: QueuePlace


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """It cannot be answered."""

    request: RequestFacts
    error: OmxError


class Chooser:
    """Who answers which request. Knows time only as `now`, seconds on one monotonic clock."""

    def __init__(self, settings: RouterSettings, table: LoadTable, *, rng: random.Random) -> None:
        """table: the shell's, which goes on feeding it."""

    def choose(self, request: RequestFacts, *, now: float) -> Choice | Wait | Refuse:
        """What becomes of a new request."""
        raise NotImplementedError

    def due(self, *, now: float) -> list[Choice | Refuse]:
        """Those that waited and need not any more, in order."""
        raise NotImplementedError

    def next_wake(self, *, now: float) -> float | None:
        """When `due` must be called though nothing happened; None: never."""
        raise NotImplementedError

    def place(self, request_id: int, *, now: float) -> QueuePlace | None:
        """Where it stands; None if it does not wait."""
        raise NotImplementedError

    def places(self, *, now: float) -> dict[int, QueuePlace]:
        """The same for all that wait."""
        raise NotImplementedError

    def leave(self, request_id: int) -> None:
        """Nobody waits for it any more."""
        raise NotImplementedError

    def first_part(self, attempt: int, *, now: float) -> None:
        """Its first part has arrived."""
        raise NotImplementedError

    def ended(self, attempt: int, *, usage: Usage | None = None, now: float) -> None:
        """It came to its end. usage: as the engine told it."""
        raise NotImplementedError

    def cancelled(self, attempt: int, *, now: float) -> None:
        """It was given up from here, and nobody is to blame."""
        raise NotImplementedError

    def failed(self, attempt: int, error: OmxError, *, now: float) -> Choice | Refuse:
        """It broke off; what to do now."""
        raise NotImplementedError

    def hedge(self, attempt: int, *, now: float) -> Choice | None:
        """A second candidate for a request whose first is late, if one is free and affordable."""
        raise NotImplementedError

    def candidates(self, model: str, *, now: float) -> list[Candidate]:
        """Who could serve it now, as far as is known."""
        raise NotImplementedError

    def speeds(self, backend: str) -> tuple[ModelSpeed, ...]:
        """What was measured here of this node's own engine, for its load report."""
        raise NotImplementedError

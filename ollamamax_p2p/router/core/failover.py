"""What to do when an attempt fails: try elsewhere, go on elsewhere, or tell the client.

Retries and hedges have a budget each, a token bucket filled by requests: when everything fails,
what is added to the load stays a fixed part of it. Source: Finagle's RetryBudget; Dean and Barroso,
"The Tail at Scale", CACM 2013, for hedging after the p95.
"""

import random
from typing import Literal

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadInput,
    CannotResume,
    DeadlineExceeded,
    ModelNotFound,
    NoCandidate,
    NotAdmitted,
    OmxError,
    PeerGone,
    PeerMisbehaved,
    PeerUnreachable,
    QueueFull,
    SwarmChanging,
)

Blame = Literal["caller", "candidate", "nobody"]

_BLAME: dict[type[OmxError], tuple[Blame, bool]] = {
    # Whose fault, and whether another candidate may do better.
    BackendFailed: ("candidate", True),
    BackendUnavailable: ("candidate", True),
    PeerGone: ("candidate", True),
    PeerUnreachable: ("candidate", True),
    PeerMisbehaved: ("candidate", True),
    NotAdmitted: ("candidate", True),
    # What we know of it is wrong: it cannot go on with this,
    # has the model no more, is full, or leaves the swarm.
    CannotResume: ("nobody", True),
    ModelNotFound: ("nobody", True),
    NoCandidate: ("nobody", True),
    QueueFull: ("nobody", True),
    SwarmChanging: ("nobody", True),
    # The time that the client gave is over, wherever it was spent.
    DeadlineExceeded: ("nobody", False),
    BadInput: ("caller", False),
}


def blame(error: OmxError) -> Blame:
    """Whose fault an error is; only a candidate's own counts for its breaker."""
    return _rule(error)[0]


def may_go_elsewhere(error: OmxError) -> bool:
    """Whether another candidate may do better."""
    return _rule(error)[1]


def _rule(error: OmxError) -> tuple[Blame, bool]:
    for each in type(error).__mro__:
        if each in _BLAME:
            return _BLAME[each]
    # Trouble of a node's machine, or a class that only a newer version knows.
    return ("candidate", True)


class Budget:
    """A token bucket that requests fill, and time a little."""

    def __init__(self, *, ratio: float, burst: float, per_s: float = 0.0) -> None:
        """ratio: what each request adds; per_s: what each second adds, so that where little is
        asked a retry is never refused for that; burst: the most that is kept, and the start.
        """
        self._ratio = ratio
        self._burst = burst
        self._per_s = per_s
        self._tokens = burst
        self._filled_at: float | None = None

    def request(self, *, now: float) -> None:
        """There was one."""
        self._fill(now)
        self._tokens = min(self._tokens + self._ratio, self._burst)

    def take(self, *, now: float) -> bool:
        """Spend one token; False if there is none."""
        self._fill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _fill(self, now: float) -> None:
        if self._filled_at is not None:
            gained = max(now - self._filled_at, 0.0) * self._per_s
            self._tokens = min(self._tokens + gained, self._burst)
        self._filled_at = now


def backoff_s(attempt: int, *, first_s: float, rng: random.Random) -> float:
    """How long to wait before a retry. attempt: 1 for the first, which goes at once; from then on
    "full jitter", from 0 to first_s, twice first_s, … and at most 64 times that.
    """
    if attempt <= 1:
        return 0.0
    return rng.random() * first_s * 2.0 ** min(attempt - 2, 6)

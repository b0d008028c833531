"""Circuit breaker: who fails too often is left alone for a while, then asked carefully again.

    closed ── too many failures ──> open ── after a backoff ──> half-open ── success ──> closed
                                     ^                              │
                                     └────────── failure ───────────┘

Half-open lets one probe through at a time: an ordinary request. A probe that nobody tells the end
of gives its place back after a while, so that a breaker cannot stay half-open for ever. Whoever
hangs is told here as a failure, like whoever answers with an error, at once or midway.
"""

import random
from collections import deque
from typing import Literal

from ollamamax_p2p.router.settings import RouterSettings

OUTCOMES = 50
"""How many outcomes are remembered at most."""


class CircuitBreaker:
    """Of one candidate."""

    def __init__(self, settings: RouterSettings, *, rng: random.Random) -> None:
        self._settings = settings
        self._rng = rng
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=OUTCOMES)
        """When, and whether it went well."""
        self._open_until: float | None = None
        self._openings = 0
        """How often it opened since it was last closed."""
        self._probe_until: float | None = None
        self._on_trial = False

    def state(self, *, now: float) -> Literal["closed", "open", "half_open"]:
        """As in the picture above."""
        if self._open_until is None:
            return "closed"
        return "open" if now < self._open_until else "half_open"

    def allows(self, *, now: float) -> bool:
        """Whether a request may go there now."""
        if self._open_until is None:
            return True
        if now < self._open_until:
            return False
        return self._probe_until is None or now >= self._probe_until

    def opens_at(self, *, now: float) -> float:
        """When it will allow a request, if nothing happens meanwhile."""
        at = max(now, self._open_until if self._open_until is not None else now)
        return max(at, self._probe_until if self._probe_until is not None else at)

    def began(self, *, now: float) -> None:
        """A request goes there."""
        if self._open_until is not None:
            self._probe_until = now + self._settings.first_part_timeout_s

    def gave_up(self, *, now: float) -> None:
        """A request was cancelled from here: nothing is known; a probe may be made again."""
        self._probe_until = None

    def first_part(self, *, now: float) -> None:
        """A request got its first part. That closes it, on trial: until one is answered to the end,
        a single failure opens it again, for who always breaks off midway begins well each time.
        """
        if self._open_until is not None and now >= self._open_until:
            self._open_until = None
            self._on_trial = True
            self._outcomes.clear()
        self._probe_until = None
        self._outcomes.append((now, True))

    def ended(self) -> None:
        """A request was answered to the end."""
        if self._open_until is None:
            self._on_trial = False
            self._openings = 0

    def failed(self, *, began: bool = False, now: float) -> None:
        """A request failed by the candidate's own fault, or hung. began: after its first part."""
        if began:
            self._take_back()
        self._outcomes.append((now, False))
        if self._open_until is not None:
            if now >= self._open_until:
                self._open(now)
            return
        if self._on_trial:
            self._open(now)
            return
        since = now - self._settings.breaker_window_s
        recent = [good for at, good in self._outcomes if at >= since]
        failures = recent.count(False)
        if (
            failures >= self._settings.breaker_failures_min
            and failures >= self._settings.breaker_ratio * len(recent)
        ):
            self._open(now)

    def _take_back(self) -> None:
        """It had counted as one that goes well."""
        for place in range(len(self._outcomes) - 1, -1, -1):
            if self._outcomes[place][1]:
                del self._outcomes[place]
                return

    def _open(self, now: float) -> None:
        backoff_s = min(
            self._settings.breaker_backoff_s * 2.0 ** min(self._openings, 30),
            self._settings.breaker_backoff_max_s,
        )
        # Up to a quarter less, so that many nodes do not probe at the same moment.
        self._open_until = now + backoff_s * (1 - self._rng.random() / 4)
        self._openings += 1
        self._on_trial = False
        self._probe_until = None

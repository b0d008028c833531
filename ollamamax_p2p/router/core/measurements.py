"""What was measured here of each candidate and model: the router believes this before any claim.

Averages forget exponentially, so that an engine which became slower is known to be within some ten
requests; quantiles are of the last samples. Bounded: the candidate that was used the longest ago is
forgotten first.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from ollamamax_p2p.router.core.candidate import CandidateKey

FORGET = 0.2
"""What the newest sample counts: ten samples later, an old one counts a tenth of that."""

SAMPLES = 64
"""For quantiles: enough for a p95, few enough to follow a change."""

CANDIDATES_MAX = 8_192
"""4,096 nodes with two models each; some 10 MB."""

TRUSTED = 2.0
"""So many samples of ours count as much as a node's own claim."""

SLACK_S = 0.25
"""Added to both sides of that comparison: a network's variation should not look like a slow engine.
"""

SLOWDOWN_HALF_LIFE_S = 30.0
"""Of the slowdown of a candidate that is not asked."""

SLOWDOWN_MAX = 50.0
"""However late a candidate was, it is tried again some day: others have queues too."""


@dataclass(slots=True)
class Average:
    """Forgets exponentially; the first samples count evenly."""

    value: float = 0.0
    count: int = 0

    def add(self, sample: float) -> None:
        """One more."""
        self.count += 1
        self.value += (sample - self.value) * max(FORGET, 1 / self.count)

    def beside(self, claim: float) -> float:
        """Between what was measured and what is claimed, by how much was measured."""
        return (self.value * self.count + claim * TRUSTED) / (self.count + TRUSTED)


@dataclass(slots=True)
class Speed:
    """One candidate and model. Seconds, tokens/s."""

    ttft_s: Average = field(default_factory=Average)
    """Until the first part, with all that waits and is read before it."""
    overhead_s: Average = field(default_factory=Average)
    """Of those, what neither reading the prompt nor loading accounts for."""
    prefill_tps: Average = field(default_factory=Average)
    decode_tps: Average = field(default_factory=Average)
    load_s: Average = field(default_factory=Average)
    slowdown: Average = field(default_factory=Average)
    """Measured against foretold; 1: as foretold."""
    slowdown_at: float = 0.0
    """When that was measured the last time."""

    def slowdown_now(self, *, now: float) -> float:
        """Nearer to 1 the longer ago it was measured, so that who was late gets another chance."""
        if not self.slowdown.count:
            return 1.0
        faded = math.exp2((self.slowdown_at - now) / SLOWDOWN_HALF_LIFE_S)
        return 1.0 + (self.slowdown.value - 1.0) * faded


class Measurements:
    """By candidate and model, and over all candidates of a model."""

    def __init__(self) -> None:
        self._speeds: dict[CandidateKey, Speed] = {}
        self._models: dict[str, deque[float]] = {}
        """Latest times to the first part by model, whoever answered."""

    def of(self, key: CandidateKey) -> Speed | None:
        """None if nothing was measured of it, or it was forgotten."""
        return self._speeds.get(key)

    def by_backend(self, peer: str, backend: str) -> dict[str, Speed]:
        """All models of one engine."""
        return {
            key.model: speed
            for key, speed in self._speeds.items()
            if key.peer == peer and key.backend == backend
        }

    def first_part(
        self,
        key: CandidateKey,
        *,
        took_s: float,
        soonest_s: float,
        latest_s: float,
        now: float,
    ) -> None:
        """A first part came. soonest_s, latest_s: when it was expected, if what may be warm is, and
        if nothing is: a cache that was cold after all is no slow engine.
        """
        speed = self._touch(key)
        speed.ttft_s.add(took_s)
        foretold_s = min(max(took_s, soonest_s), latest_s)
        ratio = (took_s + SLACK_S) / (foretold_s + SLACK_S)
        speed.slowdown.add(min(max(ratio, 1 / SLOWDOWN_MAX), SLOWDOWN_MAX))
        speed.slowdown_at = now
        recent = self._models.pop(key.model, None)
        self._models[key.model] = recent if recent is not None else deque(maxlen=SAMPLES)
        self._models[key.model].append(took_s)
        if len(self._models) > CANDIDATES_MAX:
            del self._models[next(iter(self._models))]

    def ended(
        self,
        key: CandidateKey,
        *,
        took_s: float,
        prompt_tokens: int,
        prompt_s: float,
        completion_tokens: int,
        completion_s: float,
        load_s: float,
    ) -> None:
        """An answer came to its end. took_s: until its first part, measured here; the rest as the
        engine told it, 0 where it did not. Absurd figures are left out.
        """
        speed = self._touch(key)
        if prompt_tokens >= 16 and 0 < prompt_s <= took_s:
            # Fewer tokens measure the engine's fixed cost, not its speed.
            speed.prefill_tps.add(min(prompt_tokens / prompt_s, 1e6))
        if completion_tokens >= 2 and completion_s > 0:
            speed.decode_tps.add(min(completion_tokens / completion_s, 1e5))
        if 0.1 < load_s <= took_s:
            speed.load_s.add(load_s)
        speed.overhead_s.add(max(took_s - prompt_s - load_s, 0.0))

    def ttft_quantile_s(self, model: str, fraction: float, *, samples_min: int) -> float | None:
        """Of the last first parts of a model; None while there are too few."""
        recent = self._models.get(model, ())
        if len(recent) < samples_min:
            return None
        ordered = sorted(recent)
        return ordered[min(int(fraction * len(ordered)), len(ordered) - 1)]

    def _touch(self, key: CandidateKey) -> Speed:
        """The one used last is the last in the dictionary."""
        speed = self._speeds.pop(key, None) or Speed()
        self._speeds[key] = speed
        if len(self._speeds) > CANDIDATES_MAX:
            del self._speeds[next(iter(self._speeds))]
        return speed

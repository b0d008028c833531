"""Strategies: who of several candidates should answer. Each gives an order: the first is the
choice, the rest is the order of failover.

    round_robin           each in turn
    least_outstanding     the fewest requests per slot, those from here counted exactly
    power_of_two          the better of two drawn at random: nearly as good, and many routers with
                          the same old news do not all run to the same one
    lowest_expected_time  queue + loading + reading the prompt (less what is warm) + answering, from
                          what was measured
    weighted              each by its weight, interleaved as evenly as can be (smooth, as in nginx)
    session_affinity      where the session went before, else by consistent hashing
    prefix_affinity       where the longest part of the prompt is warm, else by consistent hashing
                          on the conversation's beginning; nobody gets more than `bounded_load`
                          times its fair share
    region_first          this region's as long as one of them has a free slot

A candidate that must load the model first comes after those that need not, where it fits best
first; lowest_expected_time counts the loading instead. Candidates that were not heard of for a
while come last, whatever the strategy.

Sources: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 1996; Mirrokni,
Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2017; Thaler, Ravishankar,
"Using Name-Based Mappings to Increase Hit Rates" (rendezvous hashing), 1998.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from ollamamax_p2p.router.core.affinity import Affinity
from ollamamax_p2p.router.core.candidate import Candidate, CandidateKey, RequestFacts
from ollamamax_p2p.router.settings import RouterSettings, Strategy

EVICTION = 2.0
"""Loading where another model must go first counts so many times: somebody will load that again."""

LOADING_LEFT = 0.5
"""What is left of a loading that is under way, on average."""

HERD = 0.1
"""Expected times are taken as up to this much longer at random: estimates are no better than that,
and routers that know the same should not all choose the same.
"""

WARM_TOKENS_MIN = 32
"""Less is warm everywhere: a template's beginning."""

MODELS_MAX = 4_096
"""Models whose turns are remembered."""

_MASK = 2**64 - 1

T = TypeVar("T")


class StrategyState:
    """What strategies remember from one request to the next."""

    def __init__(self, settings: RouterSettings) -> None:
        self.bounded_load = settings.bounded_load
        self.affinity = Affinity(
            ttl_s=settings.affinity_ttl_s, entries_max=settings.affinity_entries_max
        )
        self.turns: dict[str, int] = {}
        """By model: whose turn it is."""
        self.credits: dict[str, dict[CandidateKey, float]] = {}
        """By model and candidate: how much it is behind its weight."""

    def sent(self, request: RequestFacts, candidate: Candidate, *, now: float) -> None:
        """The request goes there."""
        self.affinity.sent(request, candidate.key, now=now)


def rank(
    strategy: Strategy,
    request: RequestFacts,
    candidates: Sequence[Candidate],
    *,
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    """All candidates, the best first."""
    ready = candidates
    unready: list[Candidate] = []
    if strategy not in ("lowest_expected_time", "region_first"):
        ready = [each for each in candidates if each.loaded]
        unready = [each for each in candidates if not each.loaded]
        unready.sort(key=_fit)
    order = _RANKED[strategy](request, ready, now, rng, state) + unready
    return sorted(order, key=lambda each: each.suspect)


def _fit(candidate: Candidate) -> tuple[bool, bool, bool, int, float]:
    """Where a model should be loaded: where that is under way already, then where it fits beside
    what is there; of those the one that has the least left over, so that a larger model finds
    room too.
    """
    return (
        not candidate.loading,
        not candidate.fits,
        not candidate.has_slot,
        candidate.memory_free,
        candidate.pressure,
    )


def expected_first_s(candidate: Candidate, request: RequestFacts, warm_tokens: int = 0) -> float:
    """Until its first part: waiting, loading, reading."""
    prompt = request.prompt_tokens / candidate.prefill_tps
    read = max(request.prompt_tokens - warm_tokens, 0) / candidate.prefill_tps
    # Who is before it is taken to be like it.
    service = prompt + request.output_tokens / candidate.decode_tps
    before = max(candidate.load - candidate.slots + 1, 0.0)
    return candidate.ttft_s + _load_s(candidate) + before * service / candidate.slots + read


def _load_s(candidate: Candidate) -> float:
    if candidate.loaded:
        return 0.0
    if candidate.loading:
        return candidate.load_s * LOADING_LEFT
    return candidate.load_s * (1.0 if candidate.fits else EVICTION)


def expected_s(candidate: Candidate, request: RequestFacts, warm_tokens: int = 0) -> float:
    """Until its end."""
    first = expected_first_s(candidate, request, warm_tokens) * candidate.slowdown
    return first + request.output_tokens / candidate.decode_tps


def _round_robin(
    request: RequestFacts,
    candidates: Sequence[Candidate],
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    if not candidates:
        return []
    turn = state.turns.pop(request.model, 0)
    _remember(state.turns, request.model, turn + 1)
    order = sorted(candidates, key=lambda each: each.key)
    at = turn % len(order)
    return order[at:] + order[:at]


def _least_outstanding(
    request: RequestFacts,
    candidates: Sequence[Candidate],
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    # Ties by dice: in order of names, the first would get everything while nothing is to do.
    return sorted(candidates, key=lambda each: (each.pressure, rng.random()))


def _power_of_two(
    request: RequestFacts,
    candidates: Sequence[Candidate],
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    drawn = rng.sample(candidates, min(2, len(candidates)))
    rest = [each for each in candidates if each not in drawn]
    return sorted(drawn, key=_pressure) + sorted(rest, key=_pressure)


def _lowest_expected_time(
    request: RequestFacts,
    candidates: Sequence[Candidate],
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    warm = state.affinity.warm_tokens(request, now=now)

    def time(candidate: Candidate) -> float:
        expected = expected_s(candidate, request, warm.get(candidate.key, 0))
        return expected * (1 + HERD * rng.random())

    return sorted(candidates, key=time)


def _weighted(
    request: RequestFacts,
    candidates: Sequence[Candidate],
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    """Each gains its weight, the one with the most goes and pays what all have gained."""
    if not candidates:
        return []
    before = state.credits.pop(request.model, {})
    gained = {each.key: before.get(each.key, 0.0) + each.weight for each in candidates}
    order = sorted(candidates, key=lambda each: (-gained[each.key], each.key))
    gained[order[0].key] -= sum(each.weight for each in candidates)
    _remember(state.credits, request.model, gained)
    return order


def _session_affinity(
    request: RequestFacts,
    candidates: Sequence[Candidate],
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    seed = session_seed(request)
    if not seed:
        return _least_outstanding(request, candidates, now, rng, state)
    pinned = state.affinity.of_session(request, now=now)
    order = _by_ring(request, candidates, seed)
    return sorted(order, key=lambda each: each.key != pinned)


def session_seed(request: RequestFacts) -> int:
    """Where its session is on the ring; without a session, its conversation. 0: it has none."""
    return hash_of(request.session) if request.session else request.root


def _prefix_affinity(
    request: RequestFacts,
    candidates: Sequence[Candidate],
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    if not request.root or not candidates:
        return _least_outstanding(request, candidates, now, rng, state)
    warm = state.affinity.warm_tokens(request, now=now)
    bound = load_bounds(request, candidates, state.bounded_load)

    def key(candidate: Candidate) -> tuple[bool, int, float]:
        tokens = warm.get(candidate.key, 0)
        full = candidate.load + 1 > bound[candidate.key]
        # Full ones only among themselves: the least full first.
        return (
            full,
            0 if full or tokens < WARM_TOKENS_MIN else -tokens,
            candidate.pressure if full else 0.0,
        )

    return sorted(_by_ring(request, candidates, request.root), key=key)


def load_bounds(
    request: RequestFacts, candidates: Sequence[Candidate], factor: float
) -> dict[CandidateKey, int]:
    """How many requests each may have at most, with one more than there are now: its share by how
    fast it is, times the factor, rounded up; so somebody is always below. But its slots in any
    case: while one is free, nobody waits, and where little is to do, shares are less than one.
    """
    total = sum(each.load for each in candidates) + 1
    rates = [rate(each, request) for each in candidates]
    per_rate = factor * total / sum(rates)
    return {
        candidate.key: max(math.ceil(per_rate * its_rate), candidate.capacity)
        for candidate, its_rate in zip(candidates, rates, strict=True)
    }


def rate(candidate: Candidate, request: RequestFacts) -> float:
    """Requests of this kind that it finishes in a second, all slots at work."""
    reading_s = request.prompt_tokens / candidate.prefill_tps
    writing_s = request.output_tokens / candidate.decode_tps
    return candidate.capacity / (0.01 + candidate.ttft_s + reading_s + writing_s)


def _region_first(
    request: RequestFacts,
    candidates: Sequence[Candidate],
    now: float,
    rng: random.Random,
    state: StrategyState,
) -> list[Candidate]:
    order = _lowest_expected_time(request, candidates, now, rng, state)

    def key(candidate: Candidate) -> tuple[bool, bool]:
        ready = (candidate.loaded or candidate.loading) and candidate.has_slot
        return (not ready, ready and candidate.region != request.region)

    return sorted(order, key=key)


def _pressure(candidate: Candidate) -> float:
    return candidate.pressure


def _by_ring(request: RequestFacts, candidates: Sequence[Candidate], seed: int) -> list[Candidate]:
    """Rendezvous hashing with weights: each candidate draws a number from the seed and itself, and
    the highest wins; so who joins or leaves moves only its own share, and who is faster wins more
    often, in proportion.
    """

    def score(candidate: Candidate) -> float:
        return math.log((mixed(candidate.ring ^ seed) + 1) / (_MASK + 2)) / rate(candidate, request)

    return sorted(candidates, key=score, reverse=True)


def mixed(value: int) -> int:
    """splitmix64's finish: every bit of the outcome depends on every bit of the value."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def hash_of(text: str) -> int:
    """64 bits, the same on every node."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _remember(kept: dict[str, T], model: str, value: T) -> None:
    """As the newest; the oldest goes if there are too many."""
    kept[model] = value
    if len(kept) > MODELS_MAX:
        del kept[next(iter(kept))]


_Ranked = Callable[
    [RequestFacts, Sequence[Candidate], float, random.Random, StrategyState], list[Candidate]
]

_RANKED: dict[Strategy, _Ranked] = {
    "round_robin": _round_robin,
    "least_outstanding": _least_outstanding,
    "power_of_two": _power_of_two,
    "lowest_expected_time": _lowest_expected_time,
    "weighted": _weighted,
    "session_affinity": _session_affinity,
    "prefix_affinity": _prefix_affinity,
    "region_first": _region_first,
}
STRATEGIES: tuple[Strategy, ...] = tuple(_RANKED)

"""Each strategy gives all candidates, in its own order."""

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.router.core import strategies
from ollamamax_p2p.router.core.candidate import (
    Candidate,
    CandidateKey,
    PrefixPoint,
    RequestFacts,
)
from ollamamax_p2p.router.core.load_table import ring_place
from ollamamax_p2p.router.core.strategies import (
    STRATEGIES,
    StrategyState,
    expected_first_s,
    expected_s,
    load_bounds,
    rank,
)
from ollamamax_p2p.router.settings import RouterSettings


def a_candidate(peer: str, **facts) -> Candidate:
    key = CandidateKey(peer, "ollama", "m")
    return Candidate(key=key, ring=ring_place(peer, "ollama"), **facts)


def conversation(number: int, *, turns: int = 1, **facts) -> RequestFacts:
    points = tuple(PrefixPoint(number * 1_000 + turn, 500 * turn) for turn in range(1, turns + 1))
    defaults = {"id": number, "model": "m", "prompt_tokens": 500 * turns, "output_tokens": 100}
    return RequestFacts(prefix=points, root=number * 7_919 + 1, **(defaults | facts))


PLAIN = RequestFacts(id=1, model="m", prompt_tokens=100, output_tokens=100)


class Ranking:
    """A router's memory and dice."""

    def __init__(self, seed: int = 1) -> None:
        self.state = StrategyState(RouterSettings())
        self.rng = random.Random(seed)

    def __call__(self, strategy, request, candidates, now=0.0) -> list[str]:
        order = rank(strategy, request, candidates, now=now, rng=self.rng, state=self.state)
        assert sorted(order, key=str) == sorted(candidates, key=str)
        return [each.key.peer for each in order]

    def sent(self, request, candidate, now=0.0) -> None:
        self.state.sent(request, candidate, now=now)


@pytest.fixture
def ranking() -> Ranking:
    return Ranking()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nobody_is_no_problem(ranking, strategy):
    assert ranking(strategy, PLAIN, []) == []
    assert ranking(strategy, conversation(1), []) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_who_was_not_heard_of_for_a_while_comes_last(ranking, strategy):
    best = a_candidate("a", slots=8, suspect=True, weight=9.0)
    for number in range(5):
        order = ranking(strategy, conversation(number), [best, a_candidate("b", others=3)])
        assert order == ["b", "a"]


@pytest.mark.parametrize(
    "strategy", [each for each in STRATEGIES if each != "lowest_expected_time"]
)
def test_who_has_the_model_in_memory_comes_first(ranking, strategy):
    cold = a_candidate("a", loaded=False, load_s=20.0)
    for number in range(5):
        assert ranking(strategy, conversation(number), [cold, a_candidate("b")])[0] == "b"


def test_a_model_is_loaded_where_it_fits_best(ranking):
    order = ranking(
        "least_outstanding",
        PLAIN,
        [
            a_candidate("too small", loaded=False, fits=False, memory_free=1),
            a_candidate("huge", loaded=False, memory_free=90),
            a_candidate("snug", loaded=False, memory_free=9),
            a_candidate("busy", loaded=False, memory_free=8, others=3),
            a_candidate("loading", loaded=False, loading=True, memory_free=50),
        ],
    )
    assert order == ["loading", "snug", "huge", "busy", "too small"]


def test_round_robin_goes_round(ranking):
    candidates = [a_candidate(name) for name in "cab"]
    assert [ranking("round_robin", PLAIN, candidates)[0] for _ in range(4)] == list("abca")
    other = RequestFacts(id=1, model="other")
    assert ranking("round_robin", other, candidates) == ["a", "b", "c"]


def test_turns_of_too_many_models_are_not_remembered(ranking, monkeypatch):
    monkeypatch.setattr(strategies, "MODELS_MAX", 2)
    candidates = [a_candidate("a"), a_candidate("b")]
    for model in "xyz":
        ranking("round_robin", RequestFacts(id=1, model=model), candidates)
    assert list(ranking.state.turns) == ["y", "z"]


def test_least_outstanding_counts_slots_and_what_was_sent_from_here(ranking):
    order = ranking(
        "least_outstanding",
        PLAIN,
        [
            a_candidate("small", slots=1, outstanding=1),
            a_candidate("large", slots=8, others=2, outstanding=3),
            a_candidate("idle", slots=2),
        ],
    )
    assert order == ["idle", "large", "small"]


def test_who_claims_to_be_idle_and_answers_late_does_not_get_everything(ranking):
    liar = a_candidate("liar", slots=1_000)
    honest = a_candidate("honest", slots=2, others=1)
    assert ranking("least_outstanding", PLAIN, [liar, honest])[0] == "liar"
    late_by_chance = msgspec.structs.replace(liar, slowdown=3.0)
    assert ranking("least_outstanding", PLAIN, [late_by_chance, honest])[0] == "liar"
    very_late = msgspec.structs.replace(liar, slowdown=3.5)
    assert ranking("least_outstanding", PLAIN, [very_late, honest])[0] == "honest"


def test_ties_are_broken_by_dice(ranking):
    candidates = [a_candidate(name) for name in "abc"]
    firsts = Counter(ranking("least_outstanding", PLAIN, candidates)[0] for _ in range(300))
    assert all(count > 60 for count in firsts.values())
    assert len(firsts) == 3


def test_power_of_two_takes_the_better_of_two(ranking):
    candidates = [a_candidate(str(load), others=load) for load in range(5)]
    firsts = Counter(ranking("power_of_two", PLAIN, candidates)[0] for _ in range(500))
    assert firsts["0"] > firsts["1"] > firsts["2"] > firsts["3"] > 0
    assert "4" not in firsts
    rest = ranking("power_of_two", PLAIN, candidates)[2:]
    assert rest == sorted(rest)


def test_expected_time_is_waiting_and_loading_and_reading_and_writing():
    candidate = a_candidate(
        "a", slots=2, others=3, ttft_s=0.1, prefill_tps=100.0, decode_tps=10.0, load_s=7.0
    )
    # Two before it at two slots: 1 + 10 s each.
    assert expected_first_s(candidate, PLAIN) == pytest.approx(0.1 + 11.0 + 1.0)
    assert expected_first_s(candidate, PLAIN, warm_tokens=50) == pytest.approx(0.1 + 11.0 + 0.5)
    assert expected_s(candidate, PLAIN) == pytest.approx(12.1 + 10.0)
    for loading, fits, load_s in ((False, True, 7.0), (True, True, 3.5), (False, False, 14.0)):
        cold = msgspec.structs.replace(candidate, loaded=False, loading=loading, fits=fits)
        assert expected_first_s(cold, PLAIN) == pytest.approx(12.1 + load_s)


def test_lowest_expected_time_prefers_a_busy_fast_one_to_an_idle_slow_one(ranking):
    fast = a_candidate("fast", slots=4, others=4, prefill_tps=5_000, decode_tps=100)
    slow = a_candidate("slow", slots=4, prefill_tps=50, decode_tps=5)
    assert ranking("lowest_expected_time", PLAIN, [slow, fast]) == ["fast", "slow"]


def test_lowest_expected_time_loads_a_model_where_that_is_quicker_than_waiting(ranking):
    cold = a_candidate("cold", loaded=False, load_s=5.0)
    assert ranking("lowest_expected_time", PLAIN, [cold, a_candidate("warm")])[0] == "warm"
    jammed = a_candidate("warm", others=9)
    assert ranking("lowest_expected_time", PLAIN, [cold, jammed])[0] == "cold"


def test_lowest_expected_time_goes_where_the_prompt_is_warm(ranking):
    warm, cold = a_candidate("warm", prefill_tps=100), a_candidate("cold", prefill_tps=100)
    ranking.sent(conversation(1), warm)
    assert ranking("lowest_expected_time", conversation(1, turns=2), [cold, warm])[0] == "warm"


def test_weighted_gives_each_its_weight_evenly(ranking):
    candidates = [
        a_candidate("a", weight=5.0),
        a_candidate("b", weight=1.0),
        a_candidate("c", weight=1.0),
    ]
    firsts = [ranking("weighted", PLAIN, candidates)[0] for _ in range(14)]
    assert "".join(firsts) == "aabacaa" * 2


def test_a_session_stays_where_it_went(ranking):
    candidates = [a_candidate(str(number)) for number in range(8)]
    request = RequestFacts(id=1, model="m", session="s")
    first = ranking("session_affinity", request, candidates)[0]
    assert ranking("session_affinity", request, candidates)[0] == first
    elsewhere = next(each for each in candidates if each.key.peer != first)
    ranking.sent(request, elsewhere)
    assert ranking("session_affinity", request, candidates)[0] == elsewhere.key.peer
    assert ranking("session_affinity", request, candidates, now=10_000.0)[0] == first


def test_sessions_are_spread_by_speed_and_move_little_when_somebody_leaves(ranking):
    candidates = [a_candidate(str(number)) for number in range(4)]
    candidates.append(a_candidate("fast", slots=4))

    def place(number, among):
        request = RequestFacts(id=1, model="m", session=f"s{number}")
        return ranking("session_affinity", request, among)[0]

    before = [place(number, candidates) for number in range(800)]
    counts = Counter(before)
    assert counts["fast"] == pytest.approx(400, abs=60)
    assert all(
        count == pytest.approx(100, abs=40) for name, count in counts.items() if name != "fast"
    )
    without = [each for each in candidates if each.key.peer != "0"]
    after = [place(number, without) for number in range(800)]
    assert all(old == new for old, new in zip(before, after, strict=True) if old != "0")


def test_who_has_no_session_stays_by_conversation_or_goes_where_least_is_to_do(ranking):
    candidates = [a_candidate("a", others=1), a_candidate("b")]
    firsts = {ranking("session_affinity", conversation(5), candidates)[0] for _ in range(9)}
    assert len(firsts) == 1
    assert ranking("session_affinity", PLAIN, candidates)[0] == "b"


def test_prefix_affinity_finds_the_longest_warm_prefix(ranking):
    candidates = [a_candidate(name, slots=4) for name in "abcd"]
    ranking.sent(conversation(1, turns=1), candidates[1])
    ranking.sent(conversation(1, turns=3), candidates[2])
    order = ranking("prefix_affinity", conversation(1, turns=5), candidates)
    assert order[:2] == ["c", "b"]


def test_every_router_sends_a_new_conversation_to_the_same_candidate():
    candidates = [a_candidate(name, slots=4) for name in "abcd"]
    for number in range(20):
        firsts = {
            Ranking(seed)("prefix_affinity", conversation(number), candidates)[0]
            for seed in range(5)
        }
        assert len(firsts) == 1


def test_prefix_affinity_leaves_a_warm_candidate_that_has_more_than_its_share(ranking):
    drowning = a_candidate("warm", slots=2, others=9)
    others = [a_candidate(name, slots=2) for name in "ab"]
    ranking.sent(conversation(1), drowning)
    assert ranking("prefix_affinity", conversation(1, turns=2), [drowning, *others])[-1] == "warm"


def test_prefix_affinity_without_a_prompt_goes_where_least_is_to_do(ranking):
    candidates = [a_candidate("a", others=1), a_candidate("b")]
    assert ranking("prefix_affinity", PLAIN, candidates) == ["b", "a"]


def test_another_region_is_used_only_when_nobody_here_is_free(ranking):
    request = RequestFacts(id=1, model="m", prompt_tokens=100, region="here")
    near = a_candidate("near", region="here", decode_tps=10.0)
    far = a_candidate("far", region="there", decode_tps=90.0)
    cold = a_candidate("cold", region="here", loaded=False)
    assert ranking("region_first", request, [far, near, cold]) == ["near", "far", "cold"]
    full = msgspec.structs.replace(near, others=1)
    assert ranking("region_first", request, [far, full, cold])[0] == "far"


CANDIDATES = st.lists(
    st.builds(
        lambda slots, others, outstanding, prefill, decode, slowdown: {
            "slots": slots,
            "others": others,
            "outstanding": outstanding,
            "prefill_tps": prefill,
            "decode_tps": decode,
            "slowdown": slowdown,
        },
        st.integers(1, 16),
        st.integers(0, 40),
        st.integers(0, 40),
        st.floats(1.0, 1e5),
        st.floats(0.1, 1e3),
        st.floats(0.02, 50.0),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(CANDIDATES, st.integers(1, 10**6), st.floats(1.0, 3.0))
def test_the_load_bound_is_never_exceeded_and_somebody_is_always_below_it(facts, number, factor):
    candidates = [a_candidate(f"p{at}", **each) for at, each in enumerate(facts)]
    state = StrategyState(RouterSettings(bounded_load=factor))
    request = conversation(number, turns=2)
    state.sent(conversation(number), candidates[0], now=0.0)
    bounds = load_bounds(request, candidates, factor)
    chosen = rank(
        "prefix_affinity", request, candidates, now=0.0, rng=random.Random(1), state=state
    )[0]
    assert chosen.load + 1 <= bounds[chosen.key]


@settings(max_examples=60, deadline=None)
@given(CANDIDATES, st.sampled_from(STRATEGIES), st.integers(0, 2**32))
def test_an_order_has_everybody_once(facts, strategy, seed):
    candidates = [
        a_candidate(f"p{at}", loaded=at % 3 != 1, loading=at % 4 == 1, suspect=at % 5 == 2, **each)
        for at, each in enumerate(facts)
    ]
    Ranking(seed)(strategy, conversation(3), candidates)

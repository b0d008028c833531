"""What was measured here is believed, and what is absurd is not."""

import pytest

from ollamamax_p2p.router.core import measurements
from ollamamax_p2p.router.core.candidate import CandidateKey
from ollamamax_p2p.router.core.measurements import Average, Measurements, Speed

KEY = CandidateKey("p", "ollama", "m")


def ended(measured, key=KEY, **changed):
    facts = {
        "took_s": 1.0,
        "prompt_tokens": 100,
        "prompt_s": 0.5,
        "completion_tokens": 50,
        "completion_s": 2.0,
        "load_s": 0.2,
    }
    measured.ended(key, **(facts | changed))


def test_the_first_samples_count_evenly_and_then_the_newest_counts_most():
    average = Average()
    for sample in (1.0, 2.0, 3.0):
        average.add(sample)
    assert average.value == pytest.approx(2.0)
    for _ in range(40):
        average.add(10.0)
    assert average.value == pytest.approx(10.0, rel=0.01)


def test_a_claim_counts_while_little_is_measured():
    average = Average()
    assert average.beside(7.0) == 7.0
    for _ in range(50):
        average.add(1.0)
    assert average.beside(1000.0) < 40.0


def test_speeds_are_learnt_from_answers():
    measured = Measurements()
    ended(measured)
    speed = measured.of(KEY)
    assert speed.prefill_tps.value == 200.0
    assert speed.decode_tps.value == 25.0
    assert speed.load_s.value == 0.2
    assert speed.overhead_s.value == pytest.approx(0.3)
    assert measured.of(CandidateKey("q", "ollama", "m")) is None


def test_figures_that_cannot_be_are_left_out():
    measured = Measurements()
    ended(measured, prompt_s=50.0, load_s=50.0, completion_tokens=1)
    ended(measured, prompt_tokens=3, completion_s=0.0, load_s=0.0)
    speed = measured.of(KEY)
    assert speed.prefill_tps.count == speed.decode_tps.count == speed.load_s.count == 0
    ended(measured, completion_tokens=10**15)
    assert speed.decode_tps.value == 1e5


def test_who_is_late_is_known_to_be_and_gets_another_chance_with_time():
    measured = Measurements()
    measured.first_part(KEY, took_s=4.0, soonest_s=0.1, latest_s=0.1, now=10.0)
    speed = measured.of(KEY)
    assert speed.slowdown_now(now=10.0) > 10
    assert speed.slowdown_now(now=400.0) == pytest.approx(1.0, abs=0.01)
    assert Speed().slowdown_now(now=0.0) == 1.0


def test_a_prompt_that_was_not_warm_after_all_makes_nobody_slow():
    measured = Measurements()
    for took_s, slowdown in ((2.0, 1.0), (0.5, 1.0), (4.0, 1.0)):
        measured.first_part(KEY, took_s=took_s, soonest_s=0.5, latest_s=4.0, now=0.0)
        assert measured.of(KEY).slowdown.value == slowdown
    measured.first_part(KEY, took_s=0.1, soonest_s=0.5, latest_s=4.0, now=0.0)
    assert measured.of(KEY).slowdown.value < 1.0


def test_a_quantile_needs_enough_samples():
    measured = Measurements()
    assert measured.ttft_quantile_s("m", 0.95, samples_min=1) is None
    for number in range(20):
        measured.first_part(KEY, took_s=float(number), soonest_s=1.0, latest_s=1.0, now=0.0)
    assert measured.ttft_quantile_s("m", 0.95, samples_min=21) is None
    assert measured.ttft_quantile_s("m", 0.95, samples_min=20) == 19.0
    assert measured.ttft_quantile_s("m", 1.0, samples_min=20) == 19.0


def test_one_engines_speeds_can_be_had_by_model():
    measured = Measurements()
    ended(measured)
    ended(measured, CandidateKey("p", "other", "m"))
    ended(measured, CandidateKey("p", "ollama", "n"))
    assert list(measured.by_backend("p", "ollama")) == ["m", "n"]


def test_who_was_used_the_longest_ago_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(measurements, "CANDIDATES_MAX", 2)
    measured = Measurements()
    for name in ("a", "b"):
        measured.first_part(
            CandidateKey("p", "x", name), took_s=1.0, soonest_s=1.0, latest_s=1.0, now=0.0
        )
    measured.first_part(
        CandidateKey("p", "x", "a"), took_s=1.0, soonest_s=1.0, latest_s=1.0, now=0.0
    )
    measured.first_part(
        CandidateKey("p", "x", "c"), took_s=1.0, soonest_s=1.0, latest_s=1.0, now=0.0
    )
    assert measured.of(CandidateKey("p", "x", "b")) is None
    assert measured.of(CandidateKey("p", "x", "a")) is not None
    assert measured.ttft_quantile_s("b", 0.5, samples_min=1) is None

"""A candidate that fails too often is left alone, and asked carefully again."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.router.core.circuit_breaker import CircuitBreaker
from ollamamax_p2p.router.settings import RouterSettings

SETTINGS = RouterSettings()


def a_breaker() -> CircuitBreaker:
    return CircuitBreaker(SETTINGS, rng=random.Random(1))


def opened(breaker: CircuitBreaker, *, now: float) -> None:
    for _ in range(SETTINGS.breaker_failures_min):
        breaker.failed(now=now)
    assert breaker.state(now=now) == "open"


def test_it_stays_closed_while_few_fail():
    breaker = a_breaker()
    breaker.failed(now=0.0)
    breaker.failed(now=0.0)
    assert breaker.allows(now=0.0)
    for _ in range(3):
        breaker.first_part(now=1.0)
    breaker.failed(now=1.0)  # Three of six are half of them.
    assert breaker.state(now=1.0) == "open"


def test_it_stays_closed_when_most_go_well():
    breaker = a_breaker()
    for _ in range(20):
        breaker.first_part(now=0.0)
    for _ in range(5):
        breaker.failed(now=1.0)
    assert breaker.state(now=1.0) == "closed"


def test_failures_of_long_ago_do_not_count():
    breaker = a_breaker()
    breaker.failed(now=0.0)
    breaker.failed(now=0.0)
    breaker.failed(now=SETTINGS.breaker_window_s + 1)
    assert breaker.state(now=SETTINGS.breaker_window_s + 1) == "closed"


def test_an_open_one_lets_nobody_through_until_its_time_is_over():
    breaker = a_breaker()
    assert breaker.opens_at(now=5.0) == 5.0
    opened(breaker, now=10.0)
    at = breaker.opens_at(now=10.0)
    assert 10.0 + SETTINGS.breaker_backoff_s * 0.75 <= at <= 10.0 + SETTINGS.breaker_backoff_s
    assert not breaker.allows(now=at - 0.01)
    assert breaker.allows(now=at)
    assert breaker.state(now=at) == "half_open"


def test_only_one_probe_at_a_time_goes_to_a_half_open_one():
    breaker = a_breaker()
    opened(breaker, now=0.0)
    breaker.began(now=3.0)
    assert not breaker.allows(now=3.0)
    assert breaker.opens_at(now=3.0) == 3.0 + SETTINGS.first_part_timeout_s


def test_a_probe_that_goes_well_closes_it():
    breaker = a_breaker()
    opened(breaker, now=0.0)
    breaker.began(now=3.0)
    breaker.first_part(now=4.0)
    assert breaker.state(now=4.0) == "closed"
    breaker.ended()
    breaker.began(now=4.0)
    assert breaker.allows(now=4.0)
    breaker.failed(now=4.0)  # What was before is forgiven.
    assert breaker.state(now=4.0) == "closed"


def test_a_probe_that_breaks_off_midway_opens_it_for_twice_as_long():
    breaker = a_breaker()
    opened(breaker, now=0.0)
    now = 0.0
    for doubled in (2, 4, 8, 16):
        now = breaker.opens_at(now=now)
        breaker.began(now=now)
        breaker.first_part(now=now)
        assert breaker.state(now=now) == "closed"
        breaker.failed(began=True, now=now)
        wait_s = breaker.opens_at(now=now) - now
        assert wait_s >= doubled * SETTINGS.breaker_backoff_s * 0.75


def test_who_breaks_off_midway_more_often_than_not_is_left_alone():
    breaker = a_breaker()
    for number in range(6):
        breaker.first_part(now=0.0)
        if number % 3:
            breaker.failed(began=True, now=0.0)
        else:
            breaker.ended()
    assert breaker.state(now=0.0) == "open"
    breaker.ended()  # of one that was sent before
    assert breaker.state(now=0.0) == "open"


def test_what_broke_off_is_no_more_than_one_failure_though_its_beginning_is_forgotten():
    breaker = a_breaker()
    breaker.failed(began=True, now=0.0)
    breaker.failed(began=True, now=0.0)
    assert breaker.state(now=0.0) == "closed"


def test_a_probe_that_fails_opens_it_for_twice_as_long():
    breaker = a_breaker()
    opened(breaker, now=0.0)
    breaker.failed(now=3.0)
    assert breaker.opens_at(now=3.0) - 3.0 > SETTINGS.breaker_backoff_s


def test_a_candidate_that_stays_dead_is_asked_once_a_minute():
    breaker = a_breaker()
    opened(breaker, now=0.0)
    now = 0.0
    for _ in range(60):
        now = breaker.opens_at(now=now)
        breaker.failed(now=now)
    wait_s = breaker.opens_at(now=now) - now
    assert SETTINGS.breaker_backoff_max_s * 0.75 <= wait_s <= SETTINGS.breaker_backoff_max_s


def test_what_was_sent_before_it_opened_neither_closes_it_nor_keeps_it_open_longer():
    breaker = a_breaker()
    opened(breaker, now=0.0)
    at = breaker.opens_at(now=0.0)
    breaker.failed(now=0.5)
    assert breaker.opens_at(now=0.5) == at
    breaker.first_part(now=0.6)
    assert breaker.state(now=0.6) == "open"


def test_a_probe_whose_client_left_may_be_made_again():
    breaker = a_breaker()
    opened(breaker, now=0.0)
    breaker.began(now=3.0)
    breaker.gave_up(now=3.5)
    assert breaker.allows(now=3.5)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["began", "gave_up", "first_part", "ended", "failed"]),
            st.floats(0.0, 40.0),
        ),
        max_size=80,
    )
)
def test_it_is_never_stuck_whatever_it_is_told(events):
    breaker, now = a_breaker(), 0.0
    for event, pause in events:
        now += pause
        getattr(breaker, event)(**({} if event == "ended" else {"now": now}))
        again = breaker.opens_at(now=now)
        longest = SETTINGS.breaker_backoff_max_s + SETTINGS.first_part_timeout_s
        assert now <= again <= now + longest
        assert breaker.allows(now=again)

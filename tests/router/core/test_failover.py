"""What is tried again, how often, and how soon."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.errors import (
    BackendFailed,
    BackendUnavailable,
    BadRequest,
    CannotResume,
    ContextExceeded,
    DeadlineExceeded,
    ModelNotFound,
    NotSupported,
    OmxError,
    PeerGone,
    PeerUnreachable,
    QueueFull,
    StoreFull,
)
from ollamamax_p2p.router.core.failover import Budget, backoff_s, blame, may_go_elsewhere


@pytest.mark.parametrize(
    ("error", "whose", "elsewhere"),
    [
        (BackendFailed("ollama", "500"), "candidate", True),
        (BackendUnavailable("ollama", "refused"), "candidate", True),
        (PeerGone("p"), "candidate", True),
        (PeerUnreachable("p", "no route"), "candidate", True),
        (StoreFull("/x", 2, 1), "candidate", True),
        (ModelNotFound("m"), "nobody", True),
        (QueueFull(3, 1.0), "nobody", True),
        (CannotResume("it cannot"), "nobody", True),
        (DeadlineExceeded("it", 3.0), "nobody", False),
        (BadRequest("no"), "caller", False),
        (ContextExceeded(), "caller", False),
        (NotSupported("m", "chat"), "caller", False),
        (OmxError("of a newer version"), "candidate", True),
    ],
)
def test_whose_fault_an_error_is_and_whether_another_may_do_better(error, whose, elsewhere):
    assert blame(error) == whose
    assert may_go_elsewhere(error) is elsewhere


def test_a_budget_that_is_spent_fills_again_with_requests():
    budget = Budget(ratio=0.5, burst=2)
    assert [budget.take(now=0) for _ in range(3)] == [True, True, False]
    budget.request(now=1)
    assert not budget.take(now=100)
    budget.request(now=100)
    assert budget.take(now=100)


def test_a_budget_fills_with_time_too_and_never_beyond_its_burst():
    budget = Budget(ratio=0.0, burst=2, per_s=0.5)
    assert [budget.take(now=0) for _ in range(3)] == [True, True, False]
    assert not budget.take(now=1)
    assert budget.take(now=2)
    assert [budget.take(now=1_000) for _ in range(3)] == [True, True, False]
    assert not budget.take(now=500)  # a clock that goes back gives nothing and takes nothing


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.floats(0.0, 5.0)), max_size=300),
    st.floats(0.0, 1.0),
    st.integers(0, 20),
    st.floats(0.0, 2.0),
)
def test_a_budget_is_never_exceeded(wishes, ratio, burst, per_s):
    budget, requests, retries, now = Budget(ratio=ratio, burst=burst, per_s=per_s), 0, 0, 0.0
    for is_request, later_s in wishes:
        now += later_s
        if is_request:
            budget.request(now=now)
            requests += 1
        else:
            retries += budget.take(now=now)
        assert retries <= burst + ratio * requests + per_s * now + 1e-6


def test_the_first_retry_goes_at_once_and_the_next_ones_ever_later():
    rng = random.Random(1)
    assert backoff_s(1, first_s=0.05, rng=rng) == 0.0
    for attempt in range(2, 20):
        longest = 0.05 * 2 ** min(attempt - 2, 6)
        drawn = [backoff_s(attempt, first_s=0.05, rng=rng) for _ in range(200)]
        assert all(0 <= each <= longest for each in drawn)
        assert max(drawn) > longest * 0.9
        assert min(drawn) < longest * 0.1

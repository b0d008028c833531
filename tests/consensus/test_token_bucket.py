"""A rate, and the burst that it allows."""

import pytest

from ollamamax_p2p.consensus.core.token_bucket import TokenBucket


def test_a_burst_is_free_and_the_rest_waits() -> None:
    bucket = TokenBucket(rate=10, burst=5, now=100.0)
    assert bucket.take(5, now=100.0) == 0
    assert bucket.take(5, now=100.0) == pytest.approx(0.5)
    assert bucket.take(5, now=100.5) == pytest.approx(0.5)


def test_a_pause_saves_no_more_than_a_burst() -> None:
    bucket = TokenBucket(rate=10, burst=5, now=0.0)
    bucket.take(5, now=0.0)
    assert bucket.take(10, now=1000.0) == pytest.approx(0.5)

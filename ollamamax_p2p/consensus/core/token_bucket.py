"""A rate that may be exceeded for a moment."""


class TokenBucket:
    """So many a second on average, so many at once after a pause."""

    def __init__(self, *, rate: float, burst: float, now: float) -> None:
        """rate: per second; burst: at once; now: the clock by which it will be asked."""
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def take(self, count: float, *, now: float) -> float:
        """Spend that many; gives the seconds to wait before using them. More than there are, and
        more than the burst, are lent.
        """
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - count
        self._at = now
        return max(0.0, -self._tokens / self._rate)

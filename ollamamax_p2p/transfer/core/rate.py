"""How fast a source sends while it has something to send, and how long it takes to begin."""

import math

MEMORY_S = 1.0
"""What lies this far back weighs 1/e: short enough that the first, idle round trip is soon
forgotten, long enough to even out bursts of a few chunks.
"""


class RateEstimate:
    """Bytes a second over the time a source was busy; idle time does not count."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0
        self._since = 0.0

    @property
    def bytes_per_s(self) -> float:
        """0 as long as nothing is known."""
        return self._bytes / self._seconds if self._seconds > 0 and self._bytes > 0 else 0.0

    def begin(self, now: float) -> None:
        """The source has something to do again."""
        self._since = now

    def arrived(self, size: int, now: float) -> None:
        """So many bytes came from a busy source."""
        elapsed = max(0.0, now - self._since)
        fade = math.exp(-elapsed / MEMORY_S)
        self._bytes = self._bytes * fade + size
        self._seconds = self._seconds * fade + elapsed
        self._since = now

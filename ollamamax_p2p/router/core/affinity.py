"""What was sent where of late: prefixes whose prompt cache may be warm, and sessions.

A guess, not knowledge: no engine tells what it has in its cache, so entries end after a time, and
the ones used the longest ago make room.
"""

from ollamamax_p2p.router.core.candidate import CandidateKey, RequestFacts

PLACES_MAX = 8
"""Candidates remembered for one prefix; a system prompt may be warm on all of them."""

COLD_MAX = 4_096
"""Candidates whose loss of their cache is remembered."""


class Affinity:
    """Bounded in entries and time."""

    def __init__(self, *, ttl_s: float, entries_max: int) -> None:
        self._ttl_s = ttl_s
        self._entries_max = entries_max
        # Both used last at the end. By model as the request names it, so that the same prompt to
        # another model is another prefix.
        self._prefixes: dict[tuple[str, int], dict[CandidateKey, float]] = {}
        self._sessions: dict[tuple[str, str], tuple[CandidateKey, float]] = {}
        self._cold: dict[CandidateKey, float] = {}
        """Who lost its cache, and when: what was sent there before does not count."""

    def sent(self, request: RequestFacts, key: CandidateKey, *, now: float) -> None:
        """The request went there."""
        for point in _worth_keeping(len(request.prefix)):
            entry = (request.model, request.prefix[point].hash)
            places = self._prefixes.pop(entry, {})
            places.pop(key, None)
            places[key] = now
            if len(places) > PLACES_MAX:
                del places[next(iter(places))]
            self._prefixes[entry] = places
        while len(self._prefixes) > self._entries_max:
            del self._prefixes[next(iter(self._prefixes))]
        if request.session:
            session = (request.model, request.session)
            self._sessions.pop(session, None)
            self._sessions[session] = (key, now)
            if len(self._sessions) > self._entries_max:
                del self._sessions[next(iter(self._sessions))]

    def warm_tokens(self, request: RequestFacts, *, now: float) -> dict[CandidateKey, int]:
        """How much of the prompt each candidate may have in its cache; who has none is left out."""
        warm: dict[CandidateKey, int] = {}
        for point in request.prefix:
            # The longest comes last and overwrites the shorter ones.
            for key, at in self._prefixes.get((request.model, point.hash), {}).items():
                if now - at <= self._ttl_s and at > self._cold.get(key, at - 1):
                    warm[key] = point.tokens
        return warm

    def of_session(self, request: RequestFacts, *, now: float) -> CandidateKey | None:
        """Where its session went the last time."""
        found = self._sessions.get((request.model, request.session))
        if not request.session or found is None or now - found[1] > self._ttl_s:
            return None
        return found[0]

    def forget(self, key: CandidateKey, *, now: float) -> None:
        """It failed, was restarted, or is gone: nothing is warm there."""
        self._cold.pop(key, None)
        self._cold[key] = now
        if len(self._cold) > COLD_MAX:
            del self._cold[next(iter(self._cold))]


def _worth_keeping(count: int) -> list[int]:
    """Which of so many points: the first, every doubling, and the last.

    The next turn's points include this turn's last one, so that is found; of prompts that begin
    alike and then differ, the longest kept one below is found, which is half of it at least.
    """
    kept = {0, count - 1}
    at = 1
    while at < count:
        kept.add(at)
        at *= 2
    return sorted(kept) if count else []

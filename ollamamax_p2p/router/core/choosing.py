"""Chooser: every decision about a request, from its arrival to its end, as one pure object.

The shell numbers requests, and for each:

    outcome = chooser.choose(facts, now=now)
    Choice   send it to choice.candidate; tell what happens with choice.attempt (below)
    Wait     it is in the queue: `due(now=now)` will give its Choice or Refuse, later; `place`
             tells where it stands; `leave` when the client is gone
    Refuse   raise refuse.error

    chooser.first_part(attempt, now=now)          the first delta (or vectors) arrived
    chooser.ended(attempt, usage=…, now=now)      its Finish arrived
    chooser.cancelled(attempt, now=now)           the client left, or the other of a hedge was first
    chooser.failed(attempt, error, now=now)       gives a Choice (try there after choice.after_s,
                                                  with a Resume if choice.resumes), a Refuse, or
                                                  None: the other of a hedge still runs
    chooser.hedge(attempt, now=now)               after choice.hedge_after_s without a first part:
                                                  a second Choice, or None

A candidate that gives nothing within `choice.first_part_within_s` hangs: cancel it and call
`failed` with BackendUnavailable. After every `first_part`, `ended`, `failed`, `cancelled` and after
news from the table, call `due`; also at `next_wake`.
"""

import heapq
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ollamamax_p2p.errors import (
    BadRequest,
    CannotResume,
    DeadlineExceeded,
    ModelNotFound,
    NoCandidate,
    NotSupported,
    OmxError,
    QueueFull,
)
from ollamamax_p2p.inference.core.requests import Usage
from ollamamax_p2p.router.call import QueuePlace
from ollamamax_p2p.router.core.candidate import Candidate, CandidateKey, RequestFacts
from ollamamax_p2p.router.core.circuit_breaker import CircuitBreaker
from ollamamax_p2p.router.core.failover import Budget, backoff_s, blame, may_go_elsewhere
from ollamamax_p2p.router.core.load_table import (
    Holder,
    KnownNode,
    LoadTable,
    ModelSpeed,
    model_key,
)
from ollamamax_p2p.router.core.measurements import Average, Measurements, Speed
from ollamamax_p2p.router.core.request_queue import RequestQueue
from ollamamax_p2p.router.core.strategies import (
    STRATEGIES,
    StrategyState,
    expected_first_s,
    mixed,
    rank,
    rate,
    session_seed,
)
from ollamamax_p2p.router.settings import RouterSettings, Strategy

HOLDERS_MAX = 32
"""Candidates that are looked at for one request. More than this hold a model: those where it may be
warm, those first on the conversation's ring, and others at random.
"""

KNOWN_MAX = 10
"""Of those, where it may be warm."""

RING_MAX = 6
"""Of those, from the ring: once by the conversation and once by the session."""

SLOTS_MAX = 1_024
"""Of one engine, whatever it claims; vLLM's default is 256."""

MEMORY_FACTOR = 1.2
"""What a model takes in memory, of its size on disk: context and buffers come to it."""

LOAD_BYTES_S = 1e9
"""How fast a model is loaded, before that was measured: a good SSD."""

TTFT_S = 0.05
"""Taken for an engine of which nothing is known; the same for the following. Tokens/s of a model of
8 billion parameters, on an accelerator and without.
"""

PREFILL_TPS = (1_500.0, 60.0)
DECODE_TPS = (50.0, 8.0)

ABSENT_S = 10.0
"""A candidate that said it has no such model is not asked for it again so soon."""

BREAKERS_MAX = 8_192
"""Candidates whose failures are remembered."""

COOLING_MAX_S = 5.0
"""Requests wait for a breaker that lets a probe through within this; for others they do not."""

WAKE_S = 0.25
"""While requests wait, what the others tell is looked at so often."""

SAME_AGAIN_S = 0.25
"""Before the same candidate is tried again, doubled with each attempt: there is no other, and an
engine takes a moment to start again.
"""

HEDGE_BURST = 3.0
"""Hedges that may be saved up: a node that stops answering is late with all it has at once, but
retries are for that.
"""

ENDED_MAX = 256
"""Requests that ended, remembered for each candidate: more than end between two of its reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Send the request there; it counts as outstanding there until the attempt is over."""

    request: RequestFacts
    attempt: int
    """The number to tell what happens with; never used again."""
    candidate: Candidate
    after_s: float = 0.0
    """Wait so long before sending (a retry's backoff)."""
    resumes: bool = False
    """The client has a part of the answer: send a Resume with it."""
    first_part_within_s: float
    """Then it hangs."""
    hedge_after_s: float | None = None
    """Then call `hedge`, if there is no first part; None: never."""
    queued_s: float = 0.0
    """How long it waited here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """It is in the queue."""

    place: QueuePlace


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """It cannot be answered."""

    request: RequestFacts
    error: OmxError


@dataclass(slots=True, kw_only=True)
class _Call:
    """A request that is under way."""

    request: RequestFacts
    came_at: float
    begin_by: float
    began_at: float = 0.0
    attempts: dict[int, "_Attempt"] = field(default_factory=dict)
    """Those that still run."""
    tried: set[CandidateKey] = field(default_factory=set)
    excluded: set[CandidateKey] = field(default_factory=set)
    """Those that cannot serve this one, whatever they do for others."""
    attempt_count: int = 0
    answered_by: Candidate | None = None
    """Whose parts the client has."""


@dataclass(slots=True, kw_only=True)
class _Attempt:
    call: _Call
    candidate: Candidate
    began_at: float
    soonest_s: float
    """Its first part is expected no sooner, if all is warm that may be …"""
    latest_s: float
    """… and no later, if nothing is."""
    warm_tokens: int
    resumes: bool
    first_at: float | None = None


@dataclass(slots=True)
class _Ours:
    """What one candidate got from here."""

    running: dict[int, float] = field(default_factory=dict)
    """When each attempt began."""
    ended: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=ENDED_MAX))
    """When it began and ended, latest last."""

    def at(self, time: float) -> int:
        """How many of ours it had then."""
        count = sum(began < time for began in self.running.values())
        for began, ended in reversed(self.ended):
            if ended <= time:
                break
            count += began < time
        return count


_NOTHING, _NONE = Speed(), _Ours()
"""Of a candidate that nothing was sent to; never changed."""


class Chooser:
    """Who answers which request. Knows time only as `now`, seconds on one monotonic clock."""

    def __init__(self, settings: RouterSettings, table: LoadTable, *, rng: random.Random) -> None:
        """table: the shell's, which goes on feeding it."""
        self._settings = settings
        self._table = table
        self._rng = rng
        self._state = StrategyState(settings)
        self._measured = Measurements()
        self._queue = RequestQueue(
            limit=settings.queue_max,
            limit_per_user=settings.queue_per_user_max,
            aging_s=settings.aging_s,
        )
        self._retries = Budget(
            ratio=settings.retry_ratio, burst=settings.retry_burst, per_s=settings.retry_per_s
        )
        self._hedges = Budget(ratio=settings.hedge_ratio, burst=HEDGE_BURST)
        self._breakers: dict[CandidateKey, CircuitBreaker] = {}
        self._absent: dict[CandidateKey, float] = {}
        """Who said that it has no such model, and until when that is believed."""
        self._ours: dict[CandidateKey, _Ours] = {}
        self._loading: dict[str, dict[int, Candidate]] = {}
        """By peer and attempt: which models it was given to load from here, and has not yet."""
        self._calls: dict[int, _Call] = {}
        self._attempts: dict[int, _Attempt] = {}
        self._attempt = 0

    # -- a request comes -------------------------------------------------------------------------

    def choose(self, request: RequestFacts, *, now: float) -> Choice | Wait | Refuse:
        """What becomes of a new request."""
        self._retries.request(now=now)
        self._hedges.request(now=now)
        if request.strategy and request.strategy not in STRATEGIES:
            names = ", ".join(STRATEGIES)
            error = BadRequest(f"there is no strategy {request.strategy[:40]!r}; there are {names}")
            return Refuse(request=request, error=error)
        assert request.id not in self._calls
        begin_by = request.begin_by
        if begin_by is None:
            begin_by = now + self._settings.deadline_s
        call = _Call(request=request, came_at=now, begin_by=begin_by)
        self._calls[request.id] = call
        outcome: Candidate | Wait | Refuse | None = None
        if now < begin_by:
            # Nobody overtakes those that wait for the same.
            waiting = self._queue.peek(_lane(request), now=now) is not None
            outcome = None if waiting else self._candidate_for(call, now)
        if isinstance(outcome, Candidate):
            return self._sent(call, outcome, now)
        if isinstance(outcome, Refuse):
            del self._calls[request.id]
            return outcome
        return self._queued(call, now)

    def _queued(self, call: _Call, now: float) -> Wait | Refuse:
        request = call.request
        try:
            place = self._queue.put(
                request.id,
                lane=_lane(request),
                user=request.user,
                priority=request.priority,
                cost=1.0 + request.prompt_tokens / 8 + request.output_tokens,
                begin_by=call.begin_by,
                interval_s=self._interval_s(request, now),
                now=now,
            )
        except (QueueFull, DeadlineExceeded) as error:
            del self._calls[request.id]
            return Refuse(request=request, error=error)
        return Wait(place=place)

    def _interval_s(self, request: RequestFacts, now: float) -> float | None:
        """Between two requests of this kind that begin, while all slots are taken; a guess."""
        candidates = self.candidates(request.model, now=now)
        return 1 / _rate(candidates, request) if candidates else None

    def due(self, *, now: float) -> list[Choice | Refuse]:
        """Those that waited and need not any more, in order."""
        out: list[Choice | Refuse] = []
        for request_id in self._queue.expire(now=now):
            call = self._calls.pop(request_id)
            error = DeadlineExceeded("waiting for a free engine", now - call.came_at)
            out.append(Refuse(request=call.request, error=error))
        for lane in self._queue.lanes():
            while (first := self._queue.peek(lane, now=now)) is not None:
                call = self._calls[first]
                outcome = self._candidate_for(call, now)
                if outcome is None:
                    break
                self._queue.take(lane, now=now)
                if isinstance(outcome, Refuse):
                    del self._calls[first]
                    out.append(outcome)
                else:
                    out.append(self._sent(call, outcome, now))
        return out

    def next_wake(self, *, now: float) -> float | None:
        """When `due` must be called though nothing happened; None: never."""
        first = self._queue.first_deadline()
        return None if first is None else min(first, now + WAKE_S)

    def place(self, request_id: int, *, now: float) -> QueuePlace | None:
        """Where it stands; None if it does not wait."""
        return self._queue.place(request_id, now=now)

    def places(self, *, now: float) -> dict[int, QueuePlace]:
        """The same for all that wait."""
        return self._queue.places(now=now)

    def leave(self, request_id: int) -> None:
        """Nobody waits for it any more. Attempts that run are told one by one, as `cancelled`."""
        if self._queue.remove(request_id):
            del self._calls[request_id]

    # -- what happens to an attempt --------------------------------------------------------------

    def first_part(self, attempt: int, *, now: float) -> None:
        """Its first part has arrived."""
        found = self._attempts[attempt]
        found.first_at = now
        self._loads_no_more(attempt, found)
        found.call.answered_by = found.candidate
        key = found.candidate.key
        self._breaker(key).first_part(now=now)
        took_s = now - found.began_at
        self._measured.first_part(
            key, took_s=took_s, soonest_s=found.soonest_s, latest_s=found.latest_s, now=now
        )

    def ended(self, attempt: int, *, usage: Usage | None = None, now: float) -> None:
        """It came to its end. usage: as the engine told it."""
        found = self._over(attempt, now)
        self._breaker(found.candidate.key).ended()
        if usage is not None and found.first_at is not None:
            self._measured.ended(
                found.candidate.key,
                took_s=found.first_at - found.began_at,
                # What is warm is read in no time and would make it look fast.
                prompt_tokens=0 if found.warm_tokens else usage.prompt_tokens,
                prompt_s=usage.prompt_ns / 1e9,
                # Of an answer that came from elsewhere, they count what came there too.
                completion_tokens=0 if found.resumes else usage.completion_tokens,
                completion_s=now - found.first_at,
                load_s=usage.load_ns / 1e9,
            )
        self._calls.pop(found.call.request.id, None)

    def cancelled(self, attempt: int, *, now: float) -> None:
        """It was given up from here, and nobody is to blame."""
        found = self._over(attempt, now)
        self._breaker(found.candidate.key).gave_up(now=now)
        if not found.call.attempts:
            self._calls.pop(found.call.request.id, None)

    def failed(self, attempt: int, error: OmxError, *, now: float) -> Choice | Refuse | None:
        """It broke off; what to do now. None: its hedge still runs."""
        found = self._over(attempt, now)
        call, key = found.call, found.candidate.key
        if blame(error) == "candidate":
            self._breaker(key).failed(began=found.first_at is not None, now=now)
            self._state.affinity.forget(key, now=now)
        else:
            self._breaker(key).gave_up(now=now)
        if isinstance(error, ModelNotFound):
            self._absent.pop(key, None)
            self._absent[key] = now + ABSENT_S
            if len(self._absent) > BREAKERS_MAX:
                del self._absent[next(iter(self._absent))]
        if isinstance(error, ModelNotFound | CannotResume):
            call.excluded.add(key)
        if call.attempts:
            return None
        outcome = self._elsewhere(call, error, now)
        if isinstance(outcome, Refuse):
            del self._calls[call.request.id]
        return outcome

    def _elsewhere(self, call: _Call, error: OmxError, now: float) -> Choice | Refuse:
        request = call.request
        if not may_go_elsewhere(error):
            return Refuse(request=request, error=error)
        if call.answered_by is not None and not request.can_move:
            problem = f"{error}; an answer of this kind cannot go on elsewhere"
            return Refuse(request=request, error=CannotResume(problem))
        late = call.answered_by is None and now >= call.begin_by
        tried_enough = call.attempt_count >= self._settings.attempts_max
        if late or tried_enough or not self._retries.take(now=now):
            return Refuse(request=request, error=self._told(call, error))
        usable, _ = self._usable(call, now)
        # Whoever was tried already only where there is no other; the one with room before others.
        ranked = self._ranked(request, usable, now)
        ranked.sort(key=lambda each: (each.key in call.tried, not _has_room(each, self._settings)))
        if not ranked:
            return Refuse(request=request, error=self._told(call, error))
        count = call.attempt_count
        after_s = backoff_s(count, first_s=self._settings.retry_backoff_s, rng=self._rng)
        if ranked[0].key in call.tried:
            after_s += SAME_AGAIN_S * 2.0 ** (count - 1)
        return self._sent(call, ranked[0], now, after_s=after_s)

    def _told(self, call: _Call, error: OmxError) -> OmxError:
        """What the client hears: an answer that broke off is another thing than none."""
        return error if call.answered_by is None else CannotResume(str(error))

    def hedge(self, attempt: int, *, now: float) -> Choice | None:
        """A second candidate for a request whose first is late, if one is free and affordable."""
        found = self._attempts.get(attempt)
        if found is None or found.first_at is not None or len(found.call.attempts) > 1:
            return None
        call = found.call
        usable, _ = self._usable(call, now)
        free = [
            each
            for each in usable
            if each.loaded and each.has_slot and each.key not in call.tried and not each.suspect
        ]
        ranked = self._ranked(call.request, free, now)
        if not ranked or not self._hedges.take(now=now):
            return None
        return self._sent(call, ranked[0], now, is_hedge=True)

    def _sent(
        self,
        call: _Call,
        candidate: Candidate,
        now: float,
        *,
        after_s: float = 0.0,
        is_hedge: bool = False,
    ) -> Choice:
        request = call.request
        warm = self._state.affinity.warm_tokens(request, now=now).get(candidate.key, 0)
        latest_s = expected_first_s(candidate, request)
        self._state.sent(request, candidate, now=now)
        self._breaker(candidate.key).began(now=now)
        self._attempt += 1
        begins_at = now + after_s
        attempt = _Attempt(
            call=call,
            candidate=candidate,
            began_at=begins_at,
            soonest_s=expected_first_s(candidate, request, warm),
            latest_s=latest_s,
            warm_tokens=warm,
            resumes=call.answered_by is not None,
        )
        if not call.attempt_count:
            call.began_at = now
        call.attempt_count += 1
        call.tried.add(candidate.key)
        call.attempts[self._attempt] = attempt
        self._attempts[self._attempt] = attempt
        ours = self._ours.setdefault(candidate.key, _Ours())
        ours.running[self._attempt] = begins_at
        timeout_s = self._settings.first_part_timeout_s
        if not candidate.loaded:
            self._loading.setdefault(candidate.key.peer, {})[self._attempt] = candidate
            timeout_s = max(timeout_s, self._settings.load_timeout_s)
        return Choice(
            request=request,
            attempt=self._attempt,
            candidate=candidate,
            after_s=after_s,
            resumes=call.answered_by is not None,
            first_part_within_s=max(timeout_s, 2 * latest_s),
            hedge_after_s=None if is_hedge else self._hedge_after_s(call, candidate, latest_s),
            queued_s=call.began_at - call.came_at,
        )

    def _hedge_after_s(self, call: _Call, candidate: Candidate, latest_s: float) -> float | None:
        if not self._settings.hedge or not candidate.loaded or call.answered_by is not None:
            return None
        late_s = self._measured.ttft_quantile_s(
            candidate.key.model, 0.95, samples_min=self._settings.hedge_samples_min
        )
        if late_s is None:
            return None
        # A long prompt is late by itself, and as late elsewhere.
        return max(late_s, 2 * latest_s, self._settings.hedge_after_min_s)

    def _over(self, attempt: int, now: float) -> _Attempt:
        """It runs no more."""
        found = self._attempts.pop(attempt)
        del found.call.attempts[attempt]
        self._loads_no_more(attempt, found)
        ours = self._ours[found.candidate.key]
        ours.ended.append((ours.running.pop(attempt), now))
        if not ours.running and len(self._ours) > BREAKERS_MAX:
            del self._ours[found.candidate.key]
        return found

    def _loads_no_more(self, attempt: int, found: _Attempt) -> None:
        peer = found.candidate.key.peer
        loading = self._loading.get(peer, {})
        loading.pop(attempt, None)
        if not loading:
            self._loading.pop(peer, None)

    def _breaker(self, key: CandidateKey) -> CircuitBreaker:
        """The one used last is the last in the dictionary."""
        breaker = self._breakers.pop(key, None) or CircuitBreaker(self._settings, rng=self._rng)
        self._breakers[key] = breaker
        if len(self._breakers) > BREAKERS_MAX:
            del self._breakers[next(iter(self._breakers))]
        return breaker

    # -- who could -------------------------------------------------------------------------------

    def _candidate_for(self, call: _Call, now: float) -> Candidate | Refuse | None:
        """Where a request goes now; None: it waits."""
        usable, problem = self._usable(call, now)
        if not usable:
            return Refuse(request=call.request, error=problem) if problem is not None else None
        order = self._ranked(call.request, usable, now)
        best = next((each for each in order if _has_room(each, self._settings)), None)
        if best is None and all(each.distrust > 1.0 for each in order):
            # Where all are late, nobody does better: to wait here only leaves their slots empty,
            # and an engine that batches a thousand is late as soon as it has more than one.
            best = next((each for each in order if each.load + 1 <= each.slots), None)
        if best is None or best.loaded or best.loading:
            return best
        # Loading it once more is worth it if the wait for those that have it is longer.
        ready = [each for each in order if each.loaded or each.loading]
        if not ready or order.index(best) < order.index(ready[0]):
            return best
        before = 1 + self._queue.count(_lane(call.request))
        return best if before / _rate(ready, call.request) > best.load_s else None

    def _ranked(
        self, request: RequestFacts, candidates: Iterable[Candidate], now: float
    ) -> list[Candidate]:
        return rank(
            self._strategy(request),
            request,
            list(candidates),
            now=now,
            rng=self._rng,
            state=self._state,
        )

    def _strategy(self, request: RequestFacts) -> Strategy:
        for each in STRATEGIES:
            if each == request.strategy:
                return each
        return {
            "chat": self._settings.strategy_chat,
            "generate": self._settings.strategy_generate,
            "embed": self._settings.strategy_embed,
        }[request.kind]

    def _usable(self, call: _Call, now: float) -> tuple[list[Candidate], OmxError | None]:
        """Who may be asked now; if nobody, why, or None if it is worth waiting."""
        request = call.request
        holders = self._table.holders(request.model)
        if not holders:
            return [], ModelNotFound(request.model)
        able = [each for each in holders if _is_able(each, request.needs)]
        if not able:
            return [], NotSupported(request.model, _lacking(holders, request))
        candidates = self._as_candidates(self._considered(able, request, now), now)
        before = call.answered_by
        if before is not None:
            candidates = [
                each for each in candidates if each.can_resume and each.digest == before.digest
            ]
        there = [each for each in candidates if not each.draining and each.key not in call.excluded]
        if not self._settings.load_on_demand:
            there = [each for each in there if each.loaded or each.loading]
        there = [each for each in there if self._absent.get(each.key, now) <= now]
        if not there:
            return [], NoCandidate(request.model, _why_nobody(candidates, before is not None))
        allowed = [each for each in there if self._breaker(each.key).allows(now=now)]
        if allowed:
            return allowed, None
        back_at = min(self._breaker(each.key).opens_at(now=now) for each in there)
        if back_at - now <= COOLING_MAX_S and back_at <= call.begin_by:
            return [], None
        return [], NoCandidate(request.model, "all that hold it have failed of late")

    def _considered(self, holders: list[Holder], request: RequestFacts, now: float) -> list[Holder]:
        """All, or if they are too many, those that are worth looking at."""
        if len(holders) <= HOLDERS_MAX:
            return holders
        warm = self._state.affinity.warm_tokens(request, now=now)
        pinned = self._state.affinity.of_session(request, now=now)
        known = {(key.peer, key.backend) for key in warm} | (
            {(pinned.peer, pinned.backend)} if pinned is not None else set()
        )
        chosen = [
            each
            for each in holders
            if each.peer == self._table.peer or (each.peer, each.backend) in known
        ][:KNOWN_MAX]
        for seed in {request.root, session_seed(request)} - {0}:
            chosen += _first_on_ring(holders, seed)
        chosen += self._rng.sample(holders, HOLDERS_MAX - len(chosen))
        return list({(each.peer, each.backend): each for each in chosen}.values())

    def candidates(self, model: str, *, now: float) -> list[Candidate]:
        """Who could serve it now, as far as is known."""
        return self._as_candidates(self._table.holders(model), now)

    def _as_candidates(self, holders: Iterable[Holder], now: float) -> list[Candidate]:
        suspect_from = now - self._table.suspect_after_s()
        found = ((holder, self._table.node(holder.peer)) for holder in holders)
        return [
            self._as_candidate(holder, node, suspect_from, now)
            for holder, node in found
            if node is not None and holder.backend in node.backends and self._lives(node, now)
        ]

    def _lives(self, node: KnownNode, now: float) -> bool:
        is_local = node.report.peer == self._table.peer
        return is_local or now - node.made_at <= self._settings.dead_s

    def _as_candidate(
        self, holder: Holder, node: KnownNode, suspect_from: float, now: float
    ) -> Candidate:
        """What the node claims, corrected by what was sent there and measured from here."""
        report, servable = node.report, holder.servable
        is_local = holder.peer == self._table.peer
        key, name = holder.key, holder.name
        backend, loaded = node.backends[holder.backend], node.loaded.get(name)
        claim = node.speeds.get(name) or ModelSpeed(model=servable.name)
        speed = self._measured.of(key) or _NOTHING
        ours = self._ours.get(key) or _NONE
        told = backend.queued + (loaded.busy if loaded is not None else 0)
        slots = loaded.slots if loaded is not None else backend.slots
        free = report.memory_free - self._being_loaded_bytes(node, key)
        size = int(servable.size * MEMORY_FACTOR)
        plain = not report.accelerator
        load_s = servable.size / LOAD_BYTES_S
        return Candidate(
            key=key,
            node=report.node,
            digest=servable.digest,
            ring=holder.ring,
            loaded=loaded is not None and not loaded.loading,
            loading=bool(ours.running) if loaded is None else loaded.loading,
            slots=min(max(slots, 1), SLOTS_MAX),
            others=max(told - ours.at(node.made_at), 0),
            outstanding=len(ours.running),
            ttft_s=_known(speed.overhead_s, claim.ttft_s, TTFT_S, 0.0, 60.0),
            prefill_tps=_known(speed.prefill_tps, claim.prefill_tps, PREFILL_TPS[plain], 1, 1e6),
            decode_tps=_known(speed.decode_tps, claim.decode_tps, DECODE_TPS[plain], 0.1, 1e4),
            load_s=_known(speed.load_s, claim.load_s, load_s, 0.1, 3_600.0),
            slowdown=speed.slowdown_now(now=now),
            region=report.region,
            is_local=is_local,
            weight=report.weight,
            draining=report.draining,
            suspect=not is_local and node.made_at < suspect_from,
            fits=not report.memory_total or size <= free,
            memory_free=max(free, 0),
            size=size,
            can_resume=servable.can_resume,
        )

    def _being_loaded_bytes(self, node: KnownNode, but: CandidateKey) -> int:
        """What models will take that requests from here are having loaded there, and the node did
        not know of when it told its free memory.
        """
        loading = self._loading.get(node.report.peer)
        if not loading:
            return 0
        sizes = {
            each.key: each.size
            for each in loading.values()
            if each.key != but and (each.key.backend, model_key(each.key.model)) not in node.loaded
        }
        return sum(sizes.values())

    def speeds(self, backend: str) -> tuple[ModelSpeed, ...]:
        """What was measured here of this node's own engine, for its load report."""
        return tuple(
            ModelSpeed(
                model=model,
                ttft_s=_rounded(speed.overhead_s.value),
                prefill_tps=_rounded(speed.prefill_tps.value),
                decode_tps=_rounded(speed.decode_tps.value),
                load_s=_rounded(speed.load_s.value),
            )
            for model, speed in self._measured.by_backend(self._table.peer, backend).items()
        )


def _lane(request: RequestFacts) -> str:
    """Who waits for the same: a model, and what it must be able to do."""
    return " ".join([model_key(request.model), *request.needs])


def _has_room(candidate: Candidate, settings: RouterSettings) -> bool:
    """Whether one more may be sent there, or should rather wait here."""
    return candidate.load + 1 <= candidate.capacity * (1 + settings.ahead_per_slot)


def _rate(candidates: Iterable[Candidate], request: RequestFacts) -> float:
    """Requests of this kind that they finish in a second, together."""
    return sum(rate(each, request) for each in candidates)


def _is_able(holder: Holder, needs: tuple[str, ...]) -> bool:
    """An engine that tells nothing of what its model can do is asked."""
    capabilities = holder.servable.capabilities
    return not capabilities or all(each in capabilities for each in needs)


def _lacking(holders: Iterable[Holder], request: RequestFacts) -> str:
    """What none of them can do, in Ollama's words."""
    lacking = (
        need for need in request.needs if not any(_is_able(each, (need,)) for each in holders)
    )
    first = next(lacking, request.needs[-1])
    return request.kind if first == "completion" else {"embedding": "embed"}.get(first, first)


def _why_nobody(candidates: Sequence[Candidate], midway: bool) -> str:
    if midway:
        return "nobody else can go on with an answer that began"
    if candidates and all(each.draining for each in candidates):
        return "all that hold it are being drained"
    if candidates:
        return "those that hold it do not have it in memory, or not any more"
    return "those that hold it were not heard of for too long"


def _first_on_ring(holders: Iterable[Holder], seed: int) -> list[Holder]:
    """As the strategies order them, but for their slots."""
    return heapq.nlargest(RING_MAX, holders, key=lambda each: mixed(each.ring ^ seed))


def _known(measured: Average, claim: float, guess: float, least: float, most: float) -> float:
    """What was measured here, beside what is claimed (0: nothing), else a guess; within reason."""
    claim = claim or guess
    return min(max(measured.beside(min(max(claim, least), most)), least), most)


def _rounded(value: float) -> float:
    """To two digits, so that a report differs only when something did."""
    return float(f"{min(max(value, 0.0), 1e9):.2g}")

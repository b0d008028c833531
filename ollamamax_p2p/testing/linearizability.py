"""Whether what clients saw could have come from one copy that does one thing at a time.

A history is linearizable if each operation can be given one moment between its call and its return
so that, in the order of these moments, a model of one copy gives every result that was seen
(Herlihy and Wing, 1990). An operation whose outcome is unknown (its client timed out, or its
connection broke) may have its moment at any time after its call, or never.

The search is Wing and Gong's with Lowe's memo (Testing for linearizability, 2017): give the next
moment to any operation that was called before all that wait for theirs returned; go back if nothing
fits; never look twice at the same set of operations done with the same state. What has a moment is
a window of bits, since all before the window have one. A history over several keys is
linearizable exactly if that of each key is (locality), so each key is searched by itself; that is
what keeps this fast. The question is NP-complete all the same, so a search that takes too many
steps ends as UNDECIDED.

Record with a History, check with `check`; the models here are of what `key_value` does. Leases are
also checked from outside, through a FencedResource: what a lease is worth.
"""

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import Any, Protocol

from ollamamax_p2p.testing.key_value import (
    Acquire,
    Append,
    CompareAndSet,
    Delete,
    Get,
    Put,
    Release,
    Request,
    Result,
)

STEPS_MAX = 300_000
"""Of one key's search: seconds, and some hundred MB for what it remembers."""


class Verdict(Enum):
    """What a search found."""

    LINEARIZABLE = "linearizable"
    NOT_LINEARIZABLE = "not linearizable"
    UNDECIDED = "undecided"
    """The search was given up after its number of steps."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a client asked for."""

    call: Any
    result: Any
    """None: it is unknown whether it took effect, and when."""
    called_at: float
    """In any unit; what returned at a time and what was called at the same overlap."""
    returned_at: float = inf
    key: Hashable = None
    """Operations with different keys have nothing to do with each other."""
    client: Hashable = None
    """Who asked; for the reader only."""

    @property
    def is_known(self) -> bool:
        """Whether it returned."""
        return self.returned_at != inf


class Model(Protocol):
    """One copy of one key that does one thing at a time."""

    @property
    def initial(self) -> Hashable:
        """The state before anything."""

    def step(self, state: Any, call: Any, result: Any) -> Iterable[Hashable]:
        """The states that the call may leave if it gave this result; none if it can't have given
        it. result None: any.
        """

    def needed(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        """These, all of one key, without such unknown ones as nobody can have seen anything of: if
        there is an order with those, there is one without. What is left out need not be tried at
        every moment, which is what makes a search long.
        """


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about one key."""

    key: Hashable
    verdict: Verdict
    steps: int
    done: tuple[Operation, ...] = ()
    """If it is not linearizable: the longest order that fits,"""
    stuck: tuple[Operation, ...] = ()
    """and what can't come next, though one of these must."""

    def __str__(self) -> str:
        lines = [f"key {self.key!r}: {self.verdict.value} ({self.steps} steps)"]
        if self.verdict is Verdict.NOT_LINEARIZABLE:
            lines += [f"  ... {_told(each)}" for each in self.done[-6:]]
            lines += [f"  and then none of: {_told(each)}" for each in self.stuck]
        return "\n".join(lines)


def _told(operation: Operation) -> str:
    result = operation.result if operation.is_known else "unknown"
    when = f"{operation.called_at}..{operation.returned_at}"
    return f"[{when}] client {operation.client}: {operation.call} -> {result}"


def check(
    operations: Iterable[Operation], model: Model, *, steps_max: int = STEPS_MAX
) -> list[Finding]:
    """One finding for each key, the worst first.

    steps_max: for each key; a search that needs more is UNDECIDED.
    """
    by_key: dict[Hashable, list[Operation]] = {}
    for operation in operations:
        by_key.setdefault(operation.key, []).append(operation)
    findings = [_Search(key, each, model, steps_max).finding() for key, each in by_key.items()]
    order = [Verdict.NOT_LINEARIZABLE, Verdict.UNDECIDED, Verdict.LINEARIZABLE]
    return sorted(findings, key=lambda finding: order.index(finding.verdict))


def assert_linearizable(
    operations: Iterable[Operation], model: Model, *, steps_max: int = STEPS_MAX
) -> None:
    """Raises AssertionError with what does not fit; also if it could not be decided."""
    findings = check(operations, model, steps_max=steps_max)
    bad = [each for each in findings if each.verdict is not Verdict.LINEARIZABLE]
    assert not bad, "\n".join(map(str, bad))


@dataclass(slots=True)
class _Place:
    """A point of the search: what has its moment, and what may be tried next."""

    first: int
    """All known operations before this one are done."""
    window: int
    """Bit i: the known operation first + i is done."""
    unknown: int
    """Bit i: the i-th operation of unknown outcome is done."""
    state: Hashable
    operation: Operation | None
    """What was done to get here."""
    moves: "Iterator[_Place]" = field(default_factory=lambda: iter(()))


class _Search:
    """Through the histories of one key."""

    def __init__(
        self, key: Hashable, operations: Sequence[Operation], model: Model, steps_max: int
    ) -> None:
        by_call = sorted(model.needed(operations), key=lambda each: each.called_at)
        self._key = key
        self._known = [each for each in by_call if each.is_known]
        self._unknown = [each for each in by_call if not each.is_known]
        self._model = model
        self._steps_max = steps_max

    def finding(self) -> Finding:
        place = _Place(0, 0, 0, self._model.initial, None)
        place.moves = self._moves(place)
        path, seen, steps = [place], {(0, 0, 0, place.state)}, 0
        longest = [place]
        while path:
            if path[-1].first == len(self._known):
                return Finding(self._key, Verdict.LINEARIZABLE, steps)
            place_or_none = next(path[-1].moves, None)
            if place_or_none is None:
                path.pop()
                continue
            steps += 1
            if steps > self._steps_max:
                return Finding(self._key, Verdict.UNDECIDED, steps)
            place = place_or_none
            memo = (place.first, place.window, place.unknown, place.state)
            if memo in seen:
                continue
            seen.add(memo)
            place.moves = self._moves(place)
            path.append(place)
            if _known_done(place) > _known_done(longest[-1]):
                longest = list(path)
        done = tuple(each.operation for each in longest if each.operation is not None)
        stuck = tuple(self._known[index] for index in self._callable(longest[-1])[0])
        return Finding(self._key, Verdict.NOT_LINEARIZABLE, steps, done, stuck)

    def _callable(self, place: _Place) -> tuple[list[int], float]:
        """Known operations that may come next, and the time by which the next must be called."""
        bound = inf
        found = []
        for index in range(place.first, len(self._known)):
            operation = self._known[index]
            if operation.called_at > bound:
                break
            if not place.window >> (index - place.first) & 1:
                found.append(index)
                bound = min(bound, operation.returned_at)
        # Who must return first is tried first: it often has to be.
        found.sort(key=lambda index: self._known[index].returned_at)
        return [index for index in found if self._known[index].called_at <= bound], bound

    def _moves(self, place: _Place) -> Iterator[_Place]:
        known, bound = self._callable(place)
        for index in known:
            operation = self._known[index]
            window, first = place.window | 1 << (index - place.first), place.first
            while window & 1:
                window, first = window >> 1, first + 1
            for state in self._model.step(place.state, operation.call, operation.result):
                yield _Place(first, window, place.unknown, state, operation)
        tried = set()
        for index, operation in enumerate(self._unknown):
            if operation.called_at > bound:
                break
            # Two that ask the same are one as good as the other.
            if place.unknown >> index & 1 or operation.call in tried:
                continue
            tried.add(operation.call)
            for state in self._model.step(place.state, operation.call, None):
                if state != place.state:  # what changes nothing may as well never happen
                    unknown = place.unknown | 1 << index
                    yield _Place(place.first, place.window, unknown, state, operation)


def _known_done(place: _Place) -> int:
    return place.first + place.window.bit_count()


# -- recording ---------------------------------------------------------------------------------


class History:
    """What clients ask for and get, in the order in which it happens here.

    Time is a count of calls and returns, so the clients must be tasks of one program. Then it is
    exact, and no clock can disagree with it.
    """

    def __init__(self) -> None:
        self._now = itertools.count(1)
        self._operations: dict[int, Operation] = {}

    def call(self, call: Any, *, key: Hashable = None, client: Hashable = None) -> int:
        """Note a call, just before it is made; gives what names it below. Until it returns, it is
        unknown whether it takes effect.
        """
        now = next(self._now)
        self._operations[now] = Operation(call, None, now, key=key, client=client)
        return now

    def returned(self, name: int, result: Any) -> None:
        """Note what it gave, as soon as that is known."""
        called = self._operations[name]
        self._operations[name] = Operation(
            called.call, result, called.called_at, next(self._now), called.key, called.client
        )

    def refused(self, name: int) -> None:
        """It certainly never takes effect. Where there is a doubt, leave it as it is."""
        del self._operations[name]

    @property
    def operations(self) -> list[Operation]:
        """By their calls."""
        return list(self._operations.values())

    def __len__(self) -> int:
        return len(self._operations)


def key_of(request: Request) -> str:
    """The value or lease that a request is about. A `put` under a lease is about two: it has no
    key, and needs a model of its own.
    """
    match request:
        case Acquire(lease) | Release(lease):
            return f"lease {lease}"
        case Put(lease=lease) if lease:
            raise ValueError("a put under a lease is about a value and a lease")
        case _:
            return request.key


# -- models of what `key_value` does -------------------------------------------------------------


class ValueModel:
    """One value: get, put, compare_and_set, append, delete. The state is the value."""

    initial: bytes | None = None

    def step(self, state: bytes | None, call: Request, result: Result | None) -> list[bytes | None]:
        """See Model."""
        ok, value, after = True, state, state
        match call:
            case Get():
                pass
            case Put(value=new):
                value = after = new
            case CompareAndSet(expected=expected, value=new):
                ok = state == expected
                value = after = new if ok else state
            case Append(value=more):
                value = after = (state or b"") + more
            case Delete():
                after = None
            case _:
                raise ValueError(f"no request about a value: {call}")
        fits = result is None or (result.ok, result.value) == (ok, value)
        return [after] if fits else []

    def needed(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        """See Model. All that returned, but for a put, shows the value that it found: in its
        result, or by being a comparison that held. So what was written and is in none of these was
        hidden by the next put, or by the end, before anything but further unknown ones found it.
        """
        seen = [each.result.value or b"" for each in operations if each.is_known]
        seen += [
            each.call.expected or b""
            for each in operations
            if each.is_known and isinstance(each.call, CompareAndSet)
        ]
        everything = b"\0".join(seen)
        writes = Put | CompareAndSet | Append
        return [
            each
            for each in operations
            if each.is_known or not isinstance(each.call, writes) or each.call.value in everything
        ]


class LeaseModel:
    """One lease: acquire, release. Tokens only have to grow; which they are is left open.

    The state is (holder, token, the highest token that was seen); holder None: it is free; token
    0 while held: it was given to somebody who was not told.
    """

    initial: tuple[str | None, int, int] = (None, 0, 0)

    def step(
        self, state: tuple[str | None, int, int], call: Request, result: Result | None
    ) -> list[tuple[str | None, int, int]]:
        """See Model."""
        match call:
            case Acquire(holder=asking):
                return self._acquire(state, asking, result)
            case Release(token=given):
                return self._release(state, given, result)
            case _:
                raise ValueError(f"no request about a lease: {call}")

    def needed(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        """See Model."""
        return operations

    def _acquire(
        self, state: tuple[str | None, int, int], asking: str, result: Result | None
    ) -> list[tuple[str | None, int, int]]:
        holder, token, highest = state
        if result is None:
            return [(asking, 0, highest)] if holder is None else [state]
        if result.ok:
            grown = holder is None and result.token > highest
            return [(asking, result.token, result.token)] if grown else []
        told = holder is not None and (result.value or b"").decode() == holder
        grown = result.token == token or (token == 0 and result.token > highest)
        return [(holder, result.token, max(highest, result.token))] if told and grown else []

    def _release(
        self, state: tuple[str | None, int, int], given: int, result: Result | None
    ) -> list[tuple[str | None, int, int]]:
        holder, token, highest = state
        if holder is None:
            outcomes = [(given == 0, state)]
        elif token:
            outcomes = [(True, (None, 0, highest)) if given == token else (False, state)]
        else:
            outcomes = [(False, state)]
            if given > highest:  # then it may be that token
                outcomes.append((True, (None, 0, given)))
        return [after for ok, after in outcomes if result is None or result.ok == ok]


# -- leases, from outside ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FencedWrite:
    """One attempt to use a resource under a lease."""

    holder: Hashable
    token: int
    accepted: bool


class FencedResource:
    """Something that a lease protects, and that takes no command with a token older than the newest
    it has seen. It notes all of them, in their order.
    """

    def __init__(self) -> None:
        self.newest = 0
        self.writes: list[FencedWrite] = []

    def write(self, holder: Hashable, token: int) -> bool:
        """Whether it is done."""
        accepted = token >= self.newest
        self.newest = max(self.newest, token)
        self.writes.append(FencedWrite(holder, token, accepted))
        return accepted


def fencing_faults(writes: Iterable[FencedWrite]) -> list[str]:
    """What must not be, in the order in which a resource was used: a token that two have, and work
    that was accepted from one holder after a later holder's. Empty: none.
    """
    faults = []
    holder_of: dict[int, Hashable] = {}
    newest = 0
    for write in writes:
        first = holder_of.setdefault(write.token, write.holder)
        if first != write.holder:
            faults.append(f"token {write.token} is {first}'s and {write.holder}'s")
        if write.accepted and write.token < newest:
            faults.append(f"{write.holder} worked with token {write.token} after {newest}")
        if write.accepted:
            newest = max(newest, write.token)
    return faults

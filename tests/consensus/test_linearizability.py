"""The checker itself: histories whose verdict is known, and a second one that tries everything."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollamamax_p2p.testing.key_value import (
    Acquire,
    Append,
    CompareAndSet,
    Delete,
    Get,
    Put,
    Release,
    Result,
)
from ollamamax_p2p.testing.linearizability import (
    FencedResource,
    FencedWrite,
    History,
    LeaseModel,
    Model,
    Operation,
    ValueModel,
    Verdict,
    assert_linearizable,
    check,
    fencing_faults,
    key_of,
)

NEVER = float("inf")


def put(value: str, start: float, end: float = NEVER) -> Operation:
    done = Result(True, value.encode())
    return Operation(Put("x", value.encode()), None if end == NEVER else done, start, end)


def get(value: str | None, start: float, end: float) -> Operation:
    found = None if value is None else value.encode()
    return Operation(Get("x"), Result(True, found), start, end)


def cas(
    expected: str, value: str, start: float, end: float = NEVER, *, found: str = ""
) -> Operation:
    """found: what it failed with."""
    call = CompareAndSet("x", expected.encode(), value.encode())
    result = Result(False, found.encode()) if found else Result(True, value.encode())
    return Operation(call, None if end == NEVER else result, start, end)


def append(value: str, whole: str, start: float, end: float = NEVER) -> Operation:
    result = None if end == NEVER else Result(True, whole.encode())
    return Operation(Append("x", value.encode()), result, start, end)


def delete(found: str, start: float, end: float) -> Operation:
    return Operation(Delete("x"), Result(True, found.encode()), start, end)


GOOD = {
    "nothing": [],
    "one after the other": [put("a", 1, 2), get("a", 3, 4), put("b", 5, 6), get("b", 7, 8)],
    "a read beside a write sees the old": [put("a", 1, 2), put("b", 3, 9), get("a", 4, 5)],
    "a read beside a write sees the new": [put("a", 1, 2), put("b", 3, 9), get("b", 4, 5)],
    "Herlihy and Wing: writes overlap, reads agree": [
        put("a", 1, 10),
        put("b", 2, 9),
        get("b", 3, 4),
        get("a", 5, 6),
    ],
    "a write of unknown outcome never happens": [put("a", 1, 2), put("b", 3), get("a", 4, 5)],
    "a write of unknown outcome happens much later": [
        put("a", 1, 2),
        put("b", 3),
        get("a", 4, 5),
        put("c", 6, 7),
        get("c", 8, 9),
        get("b", 10, 11),
    ],
    "an unknown one and a compare that needs it": [
        put("a", 1, 2),
        put("b", 3),
        cas("b", "c", 4, 5),
        get("c", 6, 7),
    ],
    "two writes of unknown outcome, the later one first": [
        put("b", 1),
        put("a", 2),
        get("a", 3, 4),
        get("b", 5, 6),
    ],
    "of two writes at once the one that returned first is the last": [
        put("a", 1, 10),
        put("b", 2, 9),
        get("b", 11, 12),
    ],
    "of two compares one wins": [
        put("a", 1, 2),
        cas("a", "b", 3, 6),
        cas("a", "c", 4, 5, found="b"),
        get("b", 7, 8),
    ],
    "appends in one order": [append("1", "1", 1, 5), append("2", "12", 2, 6), get("12", 7, 8)],
    "an append of unknown outcome seen behind": [
        append("1", "", 1),
        append("2", "2", 2, 3),
        get("21", 4, 5),
    ],
    "a deletion and what it took": [put("a", 1, 2), delete("a", 3, 4), get(None, 5, 6)],
    "what returns as another is called overlaps it": [put("a", 1, 3), get(None, 3, 4)],
}

BAD = {
    "a stale read": [put("a", 1, 2), put("b", 3, 4), get("a", 5, 6)],
    "reads that go back": [
        put("a", 1, 2),
        put("b", 3, 20),
        get("b", 4, 5),
        get("a", 6, 7),
    ],
    "two readers that see two writes in two orders": [
        put("a", 1, 20),
        put("b", 2, 21),
        get("a", 3, 4),
        get("b", 5, 6),
        get("a", 7, 8),
    ],
    "a lost write": [put("a", 1, 2), get(None, 3, 4)],
    "a lost update: two compares that both win": [
        put("a", 1, 2),
        cas("a", "b", 3, 6),
        cas("a", "c", 4, 5),
    ],
    "a compare that fails with a value of nobody": [
        put("a", 1, 2),
        cas("a", "b", 3, 4, found="z"),
    ],
    "a compare that fails although it matches": [put("a", 1, 2), cas("a", "b", 3, 4, found="a")],
    "a phantom": [put("a", 1, 2), get("z", 3, 4)],
    "a write seen before it is called": [get("a", 1, 2), put("a", 3, 4)],
    "a write of unknown outcome seen before it is called": [get("a", 1, 2), put("a", 3)],
    "a write of unknown outcome that happens twice": [
        put("b", 1),
        get("b", 2, 3),
        put("c", 4, 5),
        get("b", 6, 7),
    ],
    "an unknown compare that can't have happened": [
        put("a", 1, 2),
        cas("z", "b", 3),
        get("b", 4, 5),
    ],
    "an append that vanished": [append("1", "1", 1, 2), append("2", "2", 3, 4)],
    "an append done twice": [append("1", "1", 1, 2), get("11", 3, 4)],
    "split brain: both sides acknowledged": [
        append("1", "1", 1, 2),
        append("a", "1a", 3, 6),
        append("b", "1b", 4, 5),
    ],
    "a value back from the dead": [put("a", 1, 2), delete("a", 3, 4), get("a", 5, 6)],
}


@pytest.mark.parametrize("history", GOOD.values(), ids=GOOD.keys())
def test_a_good_history_is_linearizable(history: list[Operation]) -> None:
    assert_linearizable(history, ValueModel())
    assert tries_everything(history, ValueModel())


@pytest.mark.parametrize("history", BAD.values(), ids=BAD.keys())
def test_a_bad_history_is_not(history: list[Operation]) -> None:
    [finding] = check(history, ValueModel())
    assert finding.verdict is Verdict.NOT_LINEARIZABLE
    assert not tries_everything(history, ValueModel())


# -- a second one, that tries everything ---------------------------------------------------------


def tries_everything(history: Sequence[Operation], model: Model) -> bool:
    """By the definition alone: some order of all that returned and some of the others fits."""
    known = [each for each in history if each.is_known]
    unknown = [each for each in history if not each.is_known]
    return any(
        fits(order, model)
        for count in range(len(unknown) + 1)
        for some in itertools.combinations(unknown, count)
        for order in itertools.permutations([*known, *some])
    )


def fits(order: Sequence[Operation], model: Model) -> bool:
    for i, earlier in enumerate(order):
        if any(later.returned_at < earlier.called_at for later in order[i + 1 :]):
            return False
    states = {model.initial}
    for each in order:
        states = {after for state in states for after in model.step(state, each.call, each.result)}
    return bool(states)


VALUES = st.sampled_from([b"a", b"b"])
CALLS = st.one_of(
    st.just(Get("x")),
    st.builds(Put, st.just("x"), VALUES),
    st.builds(CompareAndSet, st.just("x"), st.one_of(st.none(), VALUES), VALUES),
    st.builds(Append, st.just("x"), VALUES),
    st.just(Delete("x")),
)
FOUND = st.sampled_from([None, b"a", b"b", b"aa", b"ab", b"ba"])


@st.composite
def histories(draw: st.DrawFn, calls: st.SearchStrategy, results: st.SearchStrategy) -> list:
    """Near the truth: done one by one, each at some moment, and here and there told wrongly."""
    model = draw(st.sampled_from([ValueModel() if calls is CALLS else LeaseModel()]))
    state = model.initial
    found = []
    for moment in range(draw(st.integers(1, 6))):
        call = draw(calls)
        start, end = moment - draw(st.integers(0, 4)), moment + draw(st.integers(0, 4))
        result = draw(results)
        if draw(st.integers(0, 5)):
            right = [each for each in POSSIBLE[calls is CALLS] if model.step(state, call, each)]
            result = draw(st.sampled_from(right)) if right else result
        unknown = draw(st.integers(0, 3)) == 0
        after = list(model.step(state, call, None if unknown else result))
        state = draw(st.sampled_from(after)) if after else state
        found.append(
            Operation(call, None, start) if unknown else Operation(call, result, start, end)
        )
    return found


RESULTS = st.builds(Result, st.booleans(), FOUND)
LEASE_CALLS = st.one_of(
    st.builds(Acquire, st.just("x"), st.sampled_from(["me", "you"])),
    st.builds(Release, st.just("x"), st.integers(0, 3)),
)
LEASE_RESULTS = st.builds(
    Result, st.booleans(), st.sampled_from([None, b"me", b"you"]), st.integers(0, 3)
)
POSSIBLE = {
    True: [
        Result(ok, value)
        for ok in (True, False)
        for value in (None, b"a", b"b", b"aa", b"ab", b"ba", b"bb", b"aab")
    ],
    False: [
        Result(ok, value, token)
        for ok in (True, False)
        for value in (None, b"me", b"you")
        for token in range(6)
    ],
}


@settings(max_examples=400, deadline=None)
@given(histories(CALLS, RESULTS))
def test_both_checkers_agree_on_values(history: list[Operation]) -> None:
    agree(history, ValueModel())


@settings(max_examples=200, deadline=None)
@given(histories(LEASE_CALLS, LEASE_RESULTS))
def test_both_checkers_agree_on_leases(history: list[Operation]) -> None:
    agree(history, LeaseModel())


def agree(history: list[Operation], model: Model) -> None:
    [finding] = check(history, model)
    assert finding.verdict is not Verdict.UNDECIDED
    assert (finding.verdict is Verdict.LINEARIZABLE) == tries_everything(history, model)


# -- bounds --------------------------------------------------------------------------------------


def test_what_is_too_large_to_decide_says_so() -> None:
    # Twenty writes at once, and then a value of nobody: all their orders would have to be tried.
    history = [put(f"{number}", 1, 50) for number in range(20)] + [get("z", 51, 52)]
    [finding] = check(history, ValueModel(), steps_max=10_000)
    assert finding.verdict is Verdict.UNDECIDED
    with pytest.raises(AssertionError, match="undecided"):
        assert_linearizable(history, ValueModel(), steps_max=10_000)


def test_ten_thousand_operations_of_many_clients_are_decided_in_few_steps() -> None:
    history = []
    for number in range(2500):
        at = 10 * number
        history += [put(f"{number}", at, at + 6), get(f"{number}", at + 3, at + 8)]
        history += [put(f"lost {number}", at + 1), get(f"{number}", at + 9, at + 9.5)]
    history = [each for each in history if each.is_known or each.called_at % 100 < 5]
    [finding] = check(history, ValueModel())
    assert finding.verdict is Verdict.LINEARIZABLE
    assert finding.steps < 4 * len(history)


def test_keys_are_judged_by_themselves_and_the_bad_one_is_named_first() -> None:
    history = History()
    for key in ("good", "bad"):
        name = history.call(Put(key, b"1"), key=key, client="c1")
        history.returned(name, Result(True, b"1"))
        name = history.call(Get(key), key=key, client="c2")
        history.returned(name, Result(True, b"1" if key == "good" else None))
    worst, other = check(history.operations, ValueModel())
    assert (worst.key, worst.verdict) == ("bad", Verdict.NOT_LINEARIZABLE)
    assert (other.key, other.verdict) == ("good", Verdict.LINEARIZABLE)
    assert "client c2" in str(worst)
    assert "Get" in str(worst)


def test_a_recorded_call_without_return_is_unknown_and_a_refused_one_is_none() -> None:
    history = History()
    history.call(Put("x", b"1"))
    history.refused(history.call(Put("x", b"2")))
    history.returned(history.call(Get("x")), Result(True, b"1"))
    assert len(history) == 2
    assert [each.is_known for each in history.operations] == [False, True]
    assert_linearizable(history.operations, ValueModel())


# -- leases --------------------------------------------------------------------------------------


def acquire(holder: str, start: float, end: float = NEVER, *, gave: Result) -> Operation:
    return Operation(Acquire("l", holder), None if end == NEVER else gave, start, end)


def release(token: int, start: float, end: float, *, ok: bool = True) -> Operation:
    return Operation(Release("l", token), Result(ok), start, end)


def given_to(holder: str, token: int, *, ok: bool = True) -> Result:
    return Result(ok, holder.encode(), token)


GOOD_LEASES = {
    "one after the other": [
        acquire("a", 1, 2, gave=given_to("a", 5)),
        acquire("b", 3, 4, gave=given_to("a", 5, ok=False)),
        release(5, 5, 6),
        acquire("b", 7, 8, gave=given_to("b", 9)),
        release(5, 9, 10, ok=False),
    ],
    "a holder that never knew": [
        acquire("a", 1, gave=Result(False)),
        acquire("b", 2, 3, gave=given_to("a", 5, ok=False)),
        release(5, 4, 5),
        acquire("b", 6, 7, gave=given_to("b", 8)),
    ],
}
BAD_LEASES = {
    "two holders": [
        acquire("a", 1, 2, gave=given_to("a", 5)),
        acquire("b", 3, 4, gave=given_to("b", 6)),
    ],
    "a token that does not grow": [
        acquire("a", 1, 2, gave=given_to("a", 5)),
        release(5, 3, 4),
        acquire("b", 5, 6, gave=given_to("b", 5)),
    ],
    "released by an old token": [
        acquire("a", 1, 2, gave=given_to("a", 5)),
        release(5, 3, 4),
        acquire("b", 5, 6, gave=given_to("b", 7)),
        release(5, 7, 8),
    ],
}


@pytest.mark.parametrize("history", GOOD_LEASES.values(), ids=GOOD_LEASES.keys())
def test_leases_that_one_has_at_a_time_are_fine(history: list[Operation]) -> None:
    assert_linearizable(history, LeaseModel())
    assert tries_everything(history, LeaseModel())


@pytest.mark.parametrize("history", BAD_LEASES.values(), ids=BAD_LEASES.keys())
def test_leases_that_exclude_nobody_are_found(history: list[Operation]) -> None:
    [finding] = check(history, LeaseModel())
    assert finding.verdict is Verdict.NOT_LINEARIZABLE
    assert not tries_everything(history, LeaseModel())


def test_a_resource_takes_nothing_from_an_old_holder() -> None:
    resource = FencedResource()
    assert resource.write("a", 5)
    assert resource.write("b", 8)
    assert not resource.write("a", 5)  # paused meanwhile
    assert resource.write("b", 8)
    assert fencing_faults(resource.writes) == []


def test_old_holders_that_worked_and_shared_tokens_are_named() -> None:
    worked = [FencedWrite("a", 5, True), FencedWrite("b", 8, True), FencedWrite("a", 5, True)]
    assert fencing_faults(worked) == ["a worked with token 5 after 8"]
    shared = [FencedWrite("a", 5, True), FencedWrite("b", 5, True)]
    assert fencing_faults(shared) == ["token 5 is a's and b's"]


def test_requests_are_sorted_by_what_they_are_about() -> None:
    assert key_of(Put("x", b"")) == "x"
    assert key_of(Acquire("x", "me")) == key_of(Release("x", 1)) == "lease x"
    with pytest.raises(ValueError, match="a value and a lease"):
        key_of(Put("x", b"", "lease", 1))
